"""Error compensation (Fig. 5): a generator and a compensator in digital hardware behind an analog layer.

For a layer with l input and n output feature maps, x its input and y its noisy output:

    g = act( generator( concat( avg_pool(x), y ) ) )        m filters, 1 x 1 x (l + n)
    z = compensator( concat( y, g ) )                       n filters, 1 x 1 x (n + m)

z takes the place of y. Both are digital, hence free of variation.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from correctnet import storage
from correctnet.analog import convert, crossbar_layers, program
from correctnet.config import Compensate, validate
from correctnet.data import Split
from correctnet.errors import UserError, one_line
from correctnet.models import Block, parameter_count
from correctnet.training import Hooks, fit
from correctnet.variation import TRAINING_CHIPS, Variation


class Compensated(nn.Module):
    """`original` with a generator of `filters` filters and a compensator behind it.

    x (N, l, H, W) -> z (N, n, H', W') behind a convolution; x (N, l) -> z (N, n) behind a linear layer.

    Args:
        original: a conv or linear layer, or a `Block` that begins with one.
        filters: m, the generator's filters, >= 1.
        activation: behind the generator, "relu" or "none".
        init: "identity": the compensator starts as z = y; "random": torch's default initialisation.
        pool: how x is averaged to the size of y: "adaptive", or "kernel", the layer's own window, stride and padding.
    """

    digital_children = ("generator", "compensator")  # no part of the original network, never analog

    def __init__(
        self,
        original: nn.Module,
        filters: int,
        activation: Literal["none", "relu"] = "relu",
        init: Literal["identity", "random"] = "identity",
        pool: Literal["adaptive", "kernel"] = "adaptive",
    ):
        super().__init__()
        if filters < 1:
            raise UserError(f"a generator needs at least 1 filter, not {filters}")
        layer = layer_of(original)
        inputs, outputs = _features(layer)
        self.original = original
        if isinstance(layer, nn.Linear):
            self.generator: nn.Module = nn.Linear(inputs + outputs, filters)
            self.compensator: nn.Module = nn.Linear(outputs + filters, outputs)
        else:
            self.generator = nn.Conv2d(inputs + outputs, filters, 1)
            self.compensator = nn.Conv2d(outputs + filters, outputs, 1)
        self.activation = nn.ReLU() if activation == "relu" else nn.Identity()
        self.pool = "none" if isinstance(layer, nn.Linear) else pool
        if init == "identity":
            with torch.no_grad():
                self.compensator.weight.zero_()
                self.compensator.weight.flatten(1).fill_diagonal_(1.0)
                self.compensator.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """See the module's head."""
        y = self.original(x)
        generated = self.activation(self.generator(torch.cat([self._pooled(x, y), y], dim=1)))
        return self.compensator(torch.cat([y, generated], dim=1))

    def _pooled(self, x: Tensor, y: Tensor) -> Tensor:
        if self.pool == "none":
            return x
        if self.pool == "adaptive":
            return F.adaptive_avg_pool2d(x, y.shape[-2:])
        layer = layer_of(self.original)
        return F.avg_pool2d(x, layer.kernel_size, layer.stride, layer.padding)


def layer_of(module: nn.Module) -> nn.Module:
    """The conv or linear layer of a module that can be compensated: itself, or what a Block begins with."""
    layer = module.layer if isinstance(module, Block) else module
    return layer.original if isinstance(layer, Compensated) else layer


def _features(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels
    raise UserError(f"only nn.Conv2d and nn.Linear can be compensated, not {type(layer).__name__}")


def cost(layer: nn.Module, filters: int) -> int:
    """Parameters, biases included, that compensating `layer` with m = `filters` adds; 0 for 0 filters.

    m (l + n) + m for the generator, n (n + m) + n for the compensator.
    """
    inputs, outputs = _features(layer)
    if filters == 0:
        return 0
    return filters * (inputs + outputs + 1) + outputs * (outputs + filters + 1)


def filters_of(model: nn.Module, ratios: Sequence[float]) -> dict[str, int]:
    """Generator filters by layer name, for S_1..S_n of the first n layers: m_i = round(S_i n_i), none for S_i <= 0."""
    layers = list(crossbar_layers(model))
    if len(ratios) > len(layers):
        raise UserError(f"{len(ratios)} ratios for a network of {len(layers)} layers")
    counts = {
        name: max(1, round(s * _features(layer)[1])) for (name, layer), s in zip(layers, ratios, strict=False) if s > 0
    }
    return counts


def overhead(model: nn.Module, filters: Mapping[str, int]) -> float:
    """Compensation parameters / parameters of the original network, biases counted in both.

    `model` is the original network, `filters` the generator filters by layer name.
    """
    layers = dict(crossbar_layers(model))
    _check_names(layers, filters)
    return sum(cost(layers[name], m) for name, m in filters.items()) / parameter_count(model)


def _check_names(layers: Iterable[str], filters: Mapping[str, int]) -> None:
    for name in filters:
        if name not in layers:
            raise UserError(f"the network has no conv or linear layer {name!r} (layers: {', '.join(layers)})")


def compensate(
    model: nn.Module,
    filters: Mapping[str, int],
    place: Literal["layer", "block"] = "layer",
    seed: int = 0,
    **options: Any,
) -> nn.Module:
    """A copy of `model` with compensation at the named layers.

    Args:
        model: the original (digital) network.
        filters: generator filters m by layer name, names as `correctnet.analog.crossbar_layers` gives them.
        place: "layer": directly behind the analog layer; "block": behind the BatchNorm and ReLU of its
            `correctnet.models.Block`.
        seed: of the initial weights.
        options: `activation`, `init` and `pool` of `Compensated`.

    Raises:
        UserError: an unknown layer, fewer than 1 filter, or place="block" where the layer is in no Block.
    """
    _check_names([name for name, _ in crossbar_layers(model)], filters)
    compensated = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, m in filters.items():
            if place == "block":
                name = name.rpartition(".")[0]
                if not name or not isinstance(compensated.get_submodule(name), Block):
                    raise UserError(f"place 'block': layer {name or '(top)'!r} is in no Block; use place 'layer'")
            parent, _, child = name.rpartition(".")
            holder = compensated.get_submodule(parent)
            original = getattr(holder, child)
            device = next(original.parameters()).device
            setattr(holder, child, Compensated(original, m, **options).to(device))
    return compensated


def compensation_modules(model: nn.Module) -> dict[str, Compensated]:
    """The compensated layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Compensated)}


def compensation_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all generators and compensators, the only ones that are trained."""
    return [
        p
        for m in compensation_modules(model).values()
        for part in (m.generator, m.compensator)
        for p in part.parameters()
    ]


def trained_parameters(model: nn.Module, section: Any) -> list[nn.Parameter]:
    """What is trained with `section`, a `correctnet.config.Compensate`: the compensation's parameters, and with
    `batchnorm: affine` the scales and shifts of BatchNorm; nothing where no layer is compensated."""
    parameters = compensation_parameters(model)
    if parameters and section.batchnorm == "affine":
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine]
        parameters += [p for norm in norms for p in norm.parameters()]
    return parameters


def prepare(
    model: nn.Module, filters: Mapping[str, int], section: Any, variation: Variation, seed: int
) -> tuple[nn.Module, dict[str, Any], Hooks]:
    """What training compensators takes: a converted copy of `model` with untrained ones, its plan, and the hooks.

    The hooks program a fresh chip sample for every batch, `section.chips_per_batch` of them, from the range of
    chips that nothing is evaluated on; the loss is the original one.

    Args:
        model: the digital network, suppressed or not.
        filters: generator filters by layer name.
        section: a `correctnet.config.Compensate` section.
        variation: the device model.
        seed: of the chips and of the initial weights.
    """
    plan = {"filters": dict(filters), "place": section.place, "seed": seed}
    plan |= {"activation": section.activation, "init": section.init, "pool": section.pool}
    analog = convert(compensate(model, **plan), variation, seed)
    hooks = Hooks(
        before_batch=lambda draw: program(analog, TRAINING_CHIPS + draw),
        draws_per_batch=section.chips_per_batch,
        dropout=False,
        update_batchnorm=section.batchnorm == "updated",
    )
    return analog, plan, hooks


def fit_compensators(
    model: nn.Module,
    filters: Mapping[str, int],
    images: Tensor,
    labels: Tensor,
    variation: Variation,
    *,
    seed: int = 0,
    quiet: bool = False,
    **settings: Any,
) -> nn.Module:
    """A compensated copy of `model` as a plain `nn.Module`, its generators and compensators trained.

    Args:
        model: any network that `correctnet.analog.convert` takes.
        filters: generator filters by layer name, e.g. {"conv1": 16}; `filters_of` makes them from ratios.
        images: (N, ...) training inputs, `labels`: (N,) their classes.
        variation: the device model to compensate.
        seed: of the batches, the chips and the initial weights.
        quiet: no progress bar.
        settings: fields of `correctnet.config.Compensate`, e.g. epochs=5, learning_rate=1e-3.
    """
    section = validate(Compensate, settings, "fit_compensators")
    analog, plan, hooks = prepare(model, filters, section, variation, seed)
    parameters = trained_parameters(analog, section)
    if parameters:  # none where no layer is compensated
        fit(analog, Split(images, labels), section, seed, parameters=parameters, hooks=hooks, quiet=quiet)
    compensated = compensate(model, **plan).eval()
    compensated.load_state_dict(analog.state_dict())
    return compensated


def save(model: nn.Module, path: str | Path) -> None:
    """Write a compensated model as safetensors + JSON, what `compensate` was told included, for `load`."""
    storage.write_model(path, model.state_dict(), {"compensation": plan_of(model)})


def plan_of(model: nn.Module) -> dict[str, Any]:
    """What `compensate` has to be told to make the architecture of a compensated model.

    Raises UserError where the compensated layers differ in place, activation or pooling: `compensate` makes all alike.
    """
    filters: dict[str, int] = {}
    made: dict[str, set[str]] = {"place": set(), "activation": set(), "pool": set()}
    for name, module in compensation_modules(model).items():
        block = isinstance(module.original, Block)
        filters[f"{name}.layer" if block else name] = module.generator.weight.shape[0]
        made["place"].add("block" if block else "layer")
        made["activation"].add("relu" if isinstance(module.activation, nn.ReLU) else "none")
        if module.pool != "none":  # a linear layer pools nothing, whatever it was told
            made["pool"].add(module.pool)
    if any(len(values) > 1 for values in made.values()):
        raise UserError("save: the compensated layers differ in place, activation or pooling")
    return {"filters": filters, **{option: value for option, values in made.items() for value in values}}


def load(original: nn.Module, path: str | Path) -> nn.Module:
    """The compensated model at `path` as a plain `nn.Module`; `original` is a network of the same architecture.

    Raises UserError where the files are damaged or were made for another network.
    """
    tensors, description = storage.read_model(path)
    return restore(original, tensors, description, str(path))


def restore(original: nn.Module, tensors: dict[str, Tensor], description: dict[str, Any], source: str) -> nn.Module:
    """Put what `storage.read_model` gave into a copy of `original`, compensation included."""
    plan = description.get("compensation") or {"filters": {}}
    try:
        model = compensate(original, **plan)
    except (TypeError, ValueError) as error:
        raise UserError(f"{source}: compensation: no plan that is known ({one_line(error, 200)})") from error
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        first = one_line(error, 200)
        raise UserError(f"{source}: made for another network ({first})") from error
    return model
