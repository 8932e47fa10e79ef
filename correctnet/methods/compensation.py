"""Error compensation (Fig. 5): a generator and a compensator in digital hardware behind an analog layer.

For a layer with l input and n output feature maps, x its input and y its noisy output:

    g = act( generator( concat( avg_pool(x), y ) ) )        m filters, 1 x 1 x (l + n)
    z = compensator( concat( y, g ) )                       n filters, 1 x 1 x (n + m)

z takes the place of y. Both are digital, hence free of variation.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from correctnet.crossbar.convert import convert, program
from correctnet.crossbar.layers import crossbar_layers
from correctnet.datasets.base import Split
from correctnet.datasets.batches import as_pair, check_batch, check_outputs
from correctnet.devices.base import Variation
from correctnet.errors import UserError, one_line, whole
from correctnet.evaluation.montecarlo import evaluate
from correctnet.files import storage
from correctnet.networks.blocks import Block, parameter_count
from correctnet.noise import streams
from correctnet.settings import JUDGED_CHIPS, Compensate, validate
from correctnet.training.loop import Hooks, fit

# From so many images on `fit_compensators` holds out every tenth, if it is given none for validation.
LEAST_TO_SPLIT = 20


class CompensationWarning(UserWarning):
    """Trained compensators lost accuracy under variation, so that the network is left as it was."""


class Compensated(nn.Module):
    """`original` with a generator of `filters` filters and a compensator behind it.

    x (N, l, H, W) -> z (N, n, H', W') behind a convolution, grouped or not; x (..., l) -> z (..., n) behind a linear
    layer. The new layers have the dtype and stand on the device of the original one. `weight` and `bias` are those of
    the original layer, for code that reads them of a layer; what is computed with them is not compensated.

    Args:
        original: a conv or linear layer, or a `Block` that begins with one.
        filters: m, the generator's filters, >= 1.
        activation: behind the generator, "relu" or "none".
        init: "identity": the compensator starts as z = y; "random": torch's default initialisation.
        pool: how x is averaged to the size of y: "adaptive", or "kernel", with the layer's own window, stride, padding
            and dilation, and 1 / (kh kw) as the weight of each pixel, padding included.
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
        for option, value, known in (
            ("activation", activation, ("none", "relu")),
            ("init", init, ("identity", "random")),
            ("pool", pool, ("adaptive", "kernel")),
        ):
            _check_option(option, value, known)
        filters = whole(filters, "the number of filters of a generator")
        if filters < 1:
            raise UserError(f"a generator needs at least 1 filter, not {filters}")
        layer = layer_of(original)
        inputs, outputs = _features(layer)
        self.original = original
        # Drawn on the CPU in float32: the same numbers on any device, and whatever torch's defaults are.
        drawn: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
        if isinstance(layer, nn.Linear):
            self.generator: nn.Module = nn.Linear(inputs + outputs, filters, **drawn)
            self.compensator: nn.Module = nn.Linear(outputs + filters, outputs, **drawn)
        else:
            self.generator = nn.Conv2d(inputs + outputs, filters, 1, **drawn)
            self.compensator = nn.Conv2d(outputs + filters, outputs, 1, **drawn)
        self.activation = nn.ReLU() if activation == "relu" else nn.Identity()
        self.pool = "none" if isinstance(layer, nn.Linear) else pool
        if init == "identity":
            self.reset()
        self.register_buffer("window", _window(layer) if self.pool == "kernel" else None, persistent=False)
        for part in (self.generator, self.compensator):
            part.to(layer.weight.device, layer.weight.dtype)

    @property
    def weight(self) -> Tensor:
        """The original layer's weight."""
        return layer_of(self.original).weight

    @property
    def bias(self) -> Tensor | None:
        """The original layer's bias."""
        return layer_of(self.original).bias

    @torch.no_grad()
    def reset(self) -> None:
        """Make the compensator the identity, z = y."""
        self.compensator.weight.zero_()
        self.compensator.weight.flatten(1).fill_diagonal_(1.0)
        self.compensator.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """See the module's head."""
        y = self.original(x)
        generated = self.activation(self.generator(torch.cat([self._pooled(x, y), y], dim=self.features)))
        return self.compensator(torch.cat([y, generated], dim=self.features))

    @property
    def features(self) -> int:
        """The dimension of the features: the last of a linear layer's, the third last of a convolution's."""
        return -1 if isinstance(self.generator, nn.Linear) else -3

    def _pooled(self, x: Tensor, y: Tensor) -> Tensor:
        if self.pool == "none":
            return x
        if self.pool == "adaptive":
            return F.adaptive_avg_pool2d(x, y.shape[-2:])
        layer = layer_of(self.original)
        if self.window is None:
            return F.avg_pool2d(x, layer.kernel_size, layer.stride, layer.padding)
        padding = layer.padding
        if layer.padding_mode != "zeros":
            x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
        return F.conv2d(x, self.window, None, layer.stride, padding, layer.dilation, layer.in_channels)


def _check_option(option: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"compensate: {option} must be one of {', '.join(map(repr, known))}, not {value!r}")


def _window(layer: nn.Conv2d) -> Tensor | None:
    """(l, 1, kh, kw), the mean over the layer's window as a convolution; None where torch's average pooling is that.

    That knows no dilation, no padding of more than half a window, and no padding by name or with other than zeros.
    """
    if not isinstance(layer.padding, str):
        little = all(2 * p <= k for p, k in zip(layer.padding, layer.kernel_size, strict=True))
        if little and layer.padding_mode == "zeros" and set(layer.dilation) == {1}:
            return None
    height, width = layer.kernel_size
    return layer.weight.new_full((layer.in_channels, 1, height, width), 1 / (height * width)).detach()


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
    for ratio in ratios:
        if not math.isfinite(ratio):
            raise UserError(f"a ratio of filters must be a finite number, not {ratio!r}")
    counts = {
        name: max(1, round(s * _features(layer)[1])) for (name, layer), s in zip(layers, ratios, strict=False) if s > 0
    }
    return counts


def overhead(model: nn.Module, filters: Mapping[str, int]) -> float:
    """Compensation parameters / parameters of the original network, biases counted in both.

    `model` is the original network, `filters` the generator filters by layer name.
    """
    _check_filters(filters, "overhead")
    layers = dict(crossbar_layers(model))
    _check_names(layers, filters)
    return sum(cost(layers[name], m) for name, m in filters.items()) / parameter_count(model)


def _check_filters(filters: Any, what: str) -> None:
    if not isinstance(filters, Mapping):
        raise UserError(f"{what}: filters map names of layers to numbers of filters, not {filters!r}")


def _check_names(layers: Iterable[str], filters: Mapping[str, int]) -> None:
    for name in filters:
        if name not in layers:
            raise UserError(f"the network has no conv or linear layer {name!r} (layers: {', '.join(layers)})")


def compensate(
    model: nn.Module,
    filters: Mapping[str, int],
    place: Literal["layer", "block"] = "layer",
    seed: int = 0,
    stage: str = "compensate",
    **options: Any,
) -> nn.Module:
    """A copy of `model` with compensation at the named layers, everywhere where the network uses them.

    Args:
        model: the original (digital) network.
        filters: generator filters m by layer name, names as `correctnet.crossbar.layers.crossbar_layers` gives them.
        place: "layer": directly behind the analog layer; "block": behind the BatchNorm and ReLU of its
            `correctnet.networks.blocks.Block`.
        seed: of the initial weights, `stage`: what they are for; see `correctnet.noise.streams`.
        options: `activation`, `init` and `pool` of `Compensated`.

    Raises:
        UserError: an unknown layer or option, a layer that is compensated already, fewer than 1 filter, or
            place="block" where the layer is in no Block, or in other places beside it.
    """
    _check_option("place", place, ("layer", "block"))
    _check_filters(filters, "compensate")
    seed = whole(seed, "compensate: the seed")
    for option in options:
        _check_option("an option", option, ("activation", "init", "pool"))
    _check_names([name for name, _ in crossbar_layers(model)], filters)
    compensated = copy.deepcopy(model)
    replaced: dict[int, Compensated] = {}
    for name, m in filters.items():
        original = compensated.get_submodule(name)
        if any(layer_of(c.original) is original for c in compensation_modules(compensated).values()):
            raise UserError(f"compensate: {name} is compensated already")
        if place == "block":
            original = _block_of(compensated, name)
        with streams.global_generators(seed, "compensators", stage, name):
            replaced[id(original)] = Compensated(original, m, **options)
    if id(compensated) in replaced:  # the model is itself one layer, or one Block
        return replaced[id(compensated)]
    for module in list(compensated.modules()):
        for name, child in module._modules.items():
            if id(child) in replaced:  # a layer may have several names
                module._modules[name] = replaced[id(child)]
    return compensated


def _block_of(model: nn.Module, name: str) -> Block:
    """The Block that the named layer begins, the one place where the model has it."""
    layer = model.get_submodule(name)
    places = [m for m in model.modules() for child in m._modules.values() if child is layer]
    parent = name.rpartition(".")[0]
    if not places or not isinstance(model.get_submodule(parent), Block):
        raise UserError(f"place 'block': layer {name or '(top)'!r} is in no Block; use place 'layer'")
    if len(places) > 1:
        raise UserError(f"place 'block': layer {name!r} is used outside of its Block, too; use place 'layer'")
    return model.get_submodule(parent)


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
    """What is trained with `section`, a `correctnet.settings.Compensate`: the compensation's parameters, and with
    `batchnorm: affine` the scales and shifts of BatchNorm; nothing where no layer is compensated."""
    parameters = compensation_parameters(model)
    if parameters and section.batchnorm == "affine":
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine]
        parameters += [p for norm in norms for p in norm.parameters()]
    return parameters


def prepare(
    model: nn.Module,
    filters: Mapping[str, int],
    section: Any,
    variation: Variation,
    seed: int,
    stage: str = "fit_compensators",
) -> tuple[nn.Module, dict[str, Any], Hooks]:
    """What training compensators takes: a converted copy of `model` with untrained ones, its plan, and the hooks.

    The hooks program a fresh chip sample for every batch, `section.chips_per_batch` of them, from the range of
    chips that this stage alone trains on; the loss is the original one.

    Args:
        model: the digital network, suppressed or not.
        filters: generator filters by layer name.
        section: a `correctnet.settings.Compensate` section.
        variation: the device model.
        seed: of the chips and of the initial weights.
        stage: what trains them, "compensate", "search" or "fit_compensators"; see `correctnet.noise.streams`.
    """
    plan = {"filters": dict(filters), "place": section.place, "seed": seed}
    plan |= {"activation": section.activation, "init": section.init, "pool": section.pool}
    analog = convert(compensate(model, **plan, stage=stage), variation, seed)
    hooks = Hooks(
        before_batch=lambda draw: program(analog, streams.chip(f"train-{stage}", draw)),
        draws_per_batch=section.chips_per_batch,
        dropout=False,
        update_batchnorm=section.batchnorm == "updated",
    )
    return analog, plan, hooks


def keep_better(
    analog: nn.Module,
    model: nn.Module,
    plan: Mapping[str, Any],
    data: Split,
    seed: int,
    stage: str = "fit_compensators",
    **how: Any,
) -> dict[str, Any]:
    """Compare trained compensators with none, and put the identity in their place where they lost accuracy.

    Both are evaluated on the same `JUDGED_CHIPS` chips, on which nothing was trained and nothing else is chosen.

    Args:
        analog: the trained network, from `prepare`, which may be changed; `model` and `plan`: what it was made of.
        data: validation images.
        seed: of the initial weights, `stage`: as for `prepare`.
        how: further arguments of `correctnet.evaluation.montecarlo.evaluate`.

    Returns:
        without, with: mean accuracies; kept: which of the two the network is now; chips, images.

    Warns:
        CompensationWarning: the compensators are not kept.
    """
    chips = streams.chips(f"validate-{stage}", JUDGED_CHIPS)
    trained = {name: value.clone() for name, value in analog.state_dict().items()}
    identity = compensate(model, **{**plan, "init": "identity"}, stage=stage).state_dict()

    def mean(state: dict[str, Tensor]) -> float:
        analog.load_state_dict(state)
        return evaluate(analog, data, len(chips), start=chips.start, progress=False, **how).mean

    without, with_them = mean(identity), mean(trained)
    kept = "with" if with_them >= without else "without"
    if kept == "without":
        analog.load_state_dict(identity)
        warnings.warn(
            f"the trained compensators are not kept: over {len(chips)} validation chips the network has a mean "
            f"accuracy of {with_them:.2%} with them and of {without:.2%} without; train them for more epochs or with a "
            "lower learning rate",
            CompensationWarning,
            stacklevel=3,
        )
    return {"without": without, "with": with_them, "kept": kept, "chips": len(chips), "images": len(data)}


def fit_compensators(
    model: nn.Module,
    filters: Mapping[str, int],
    images: Tensor,
    labels: Tensor,
    variation: Variation,
    *,
    validation: tuple[Tensor, Tensor] | Split | None = None,
    seed: int = 0,
    quiet: bool = False,
    **settings: Any,
) -> nn.Module:
    """A compensated copy of `model` as a plain `nn.Module`, its generators and compensators trained.

    At the end the network is evaluated on a few chips with them and without. Where they lost accuracy a warning says
    so, and the copy computes what `model` does: its compensators are the identity. `model` and torch's global
    generators stay as they are.

    Args:
        model: any network that `correctnet.crossbar.convert.convert` takes, with outputs (N, classes).
        filters: generator filters by layer name, e.g. {"conv1": 16}; `filters_of` makes them from ratios.
        images: (N, ...) training inputs, `labels`: (N,) their classes, integers.
        variation: the device model to compensate.
        validation: images and labels for that comparison. None: a tenth of `images`, drawn with `seed`, which is not
            trained on; of fewer than 20 images none is held out, and the comparison is on the training images.
        seed: of the batches, the chips, the initial weights and the images that are held out.
        quiet: no progress bar.
        settings: fields of `correctnet.settings.Compensate`, e.g. epochs=5, learning_rate=1e-3.

    Returns:
        The compensated network, in evaluation mode.

    Raises:
        UserError: inputs or outputs that are no classification, an unknown layer or setting, a layer that the network
            computes with but never calls, so that it cannot be compensated, or a loss that is not finite.

    Warns:
        CompensationWarning: the trained compensators are not kept.
    """
    caller = "fit_compensators"
    section = validate(Compensate, settings, caller)
    _check_filters(filters, caller)
    seed = whole(seed, f"{caller}: the seed")
    device = next(model.parameters(), torch.empty(0)).device
    train = _labelled((images, labels), f"{caller}: images and labels", device)
    if validation is not None:
        judged = _labelled(validation, f"{caller}: validation", device)
    elif len(train) >= LEAST_TO_SPLIT:
        generator = streams.torch_generator(seed, "held-out", caller)
        order = torch.randperm(len(train), generator=generator, device="cpu").to(device)
        held_out, rest = order[: len(train) // 10], order[len(train) // 10 :]
        train, judged = (Split(train.images[part], train.labels[part]) for part in (rest, held_out))
    else:
        judged = train
    analog, plan, hooks = prepare(model, filters, section, variation, seed, caller)
    compensated = compensate(model, **plan, stage=caller).eval()
    largest = max(int(train.labels.max()), int(judged.labels.max()))
    _check_calls(compensated, train.images[:8], largest, caller)
    parameters = trained_parameters(analog, section)
    if parameters:  # none where no layer is compensated
        fit(analog, train, section, seed, stage=caller, parameters=parameters, hooks=hooks, quiet=quiet)
        keep_better(analog, model, plan, judged, seed, caller, engine="torch")
    compensated.load_state_dict(analog.state_dict())
    return compensated


def _labelled(data: Any, what: str, device: torch.device) -> Split:
    """Images and labels on the model's device, checked."""
    pair = as_pair(data)
    if pair is None:
        raise UserError(f"{what}: a tensor of images and one of labels are expected")
    split = Split(*check_batch(tuple(part.to(device) for part in pair), what))
    if not len(split):
        raise UserError(f"{what}: there are no images")
    return split


def _check_calls(model: nn.Module, images: Tensor, largest: int, what: str) -> None:
    """Raise UserError where a compensated network is no classifier, or uses a compensated layer's weight itself.

    The network runs as it is evaluated, without gradients and without hooks: in their presence torch chooses other
    code, which calls layers that it does not call otherwise.
    """
    compensated, calls = compensation_modules(model), dict.fromkeys(compensation_modules(model), 0)
    layers = {name: layer_of(m.original) for name, m in compensated.items()}
    own = dict.fromkeys(layers, 0)
    with _counted(compensated, calls), _counted(layers, own), torch.no_grad():
        try:
            outputs = model(images.clone())
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            raise UserError(f"{what}: the network cannot compute these images ({one_line(error)})") from error
    check_outputs(outputs, images, largest, what)
    for name in compensated:
        if calls[name] == 0:
            raise UserError(
                f"{what}: {name} is never called on these images, so that compensating it has no effect: the network "
                "does not use it, or uses its weight directly"
            )
        if own[name] > calls[name]:
            raise UserError(f"{what}: {name} is also called from where it cannot be compensated (a list or function)")


@contextmanager
def _counted(modules: Mapping[str, nn.Module], calls: dict[str, int]) -> Iterator[None]:
    """Count the calls of modules by name for a block; no hooks."""

    def count(name: str, module: nn.Module) -> None:
        forward = module.forward

        def counting(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return forward(*args, **kwargs)

        module.forward = counting

    before = [(module, module.__dict__.get("forward")) for module in modules.values()]
    for name, module in modules.items():
        count(name, module)
    try:
        yield
    finally:
        for module, forward in before:
            if forward is None:
                del module.forward
            else:
                module.forward = forward


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
        filters[f"{name}.layer".lstrip(".") if block else name] = module.generator.weight.shape[0]
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
        model = compensate(original, **plan, stage="restore")  # other weights take the place of those drawn here
    except (UserError, TypeError, ValueError) as error:
        raise UserError(f"{source}: compensation: no plan that is known ({one_line(error, 200)})") from error
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        first = one_line(error, 200)
        raise UserError(f"{source}: made for another network ({first})") from error
    return model
