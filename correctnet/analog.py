"""Layers that carry variation, and the conversion of any network to them.

analog = convert(network, LogNormalVariation(0.5), seed=0)
program(analog, 137)      # chip sample 137
logits = analog(images)
program(analog, None)     # the nominal weights again
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from correctnet.errors import UserError
from correctnet.variation import Variation

# By name of a layer, what it was called with and what it gave, a triple a call.
Calls = dict[str, list[tuple[tuple[Any, ...], dict[str, Any], Any]]]

# Parameters of these are vectors or tables that no crossbar multiplies with; they stay digital without a warning.
DIGITAL = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.Embedding, nn.PReLU)


class CoverageWarning(UserWarning):
    """Some parameters of the network cannot carry variation."""


@dataclass
class Chip:
    """Which chip sample the layers of one converted network carry; shared by all of them."""

    seed: int
    sample: int | None = None  # None: nominal weights
    first_layer: int = 0  # layers of a smaller index stay nominal


class AnalogLayer(nn.Module):
    """What analog layers share: the layer's address and its weights on the present chip."""

    variation: Variation
    layer_index: int
    chip: Chip
    _cached: tuple[tuple[object, ...], Tensor] | None

    @property
    def varies(self) -> bool:
        """Whether the layer carries variation now."""
        return self.chip.sample is not None and self.layer_index >= self.chip.first_layer

    def chip_weight(self) -> Tensor:
        """The weights on the present chip, in the shape of `weight`; nominal where no chip is programmed."""
        if not self.varies:
            return self.weight
        if self.weight.requires_grad and torch.is_grad_enabled():
            return self.variation.sample(self.weight, self.chip.seed, self.layer_index, self.chip.sample)
        # A chip stays fixed over the batches that it sees: draw once, until the chip or the weights change.
        key = (self.chip.seed, self.chip.sample, self.variation, self.weight._version, self.weight.data_ptr())
        if self._cached is None or self._cached[0] != key:
            with torch.no_grad():
                drawn = self.variation.sample(self.weight, self.chip.seed, self.layer_index, self.chip.sample)
            self._cached = (key, drawn)
        return self._cached[1]

    def _adopt(self, layer: nn.Module, variation: Variation, index: int, chip: Chip) -> None:
        """Take over the state of `layer`: parameters, buffers, hooks and the attributes of its own class."""
        self.__dict__.update(layer.__dict__)
        self.variation, self.layer_index, self.chip, self._cached = variation, index, chip, None


class AnalogLinear(AnalogLayer, nn.Linear):
    """y = x W^T + b with W on the present chip and b digital. x (..., in), W (out, in), y (..., out)."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return F.linear(x, self.chip_weight(), self.bias)


class AnalogConv2d(AnalogLayer, nn.Conv2d):
    """y = x * W + b with W on the present chip and b digital. x (N, in, H, W), W (out, in / groups, kh, kw)."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self._conv_forward(x, self.chip_weight(), self.bias)


ANALOG = {nn.Linear: AnalogLinear, nn.Conv2d: AnalogConv2d}


def crossbar_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every conv and linear layer of the original network, in order of registration.

    The position in this order is the layer index of the noise, for excluded layers too. Layers that were added in
    digital hardware (generators, compensators) are no part of the original network and are passed over.
    """

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        # Exact types only: a subclass may use its weight in its own way, or leave that to its parent.
        if type(module) in ANALOG or isinstance(module, AnalogLayer):
            yield prefix, module
            return
        digital = getattr(module, "digital_children", ())
        for name, child in module.named_children():
            if name not in digital:
                yield from walk(child, f"{prefix}.{name}" if prefix else name)

    seen: set[int] = set()
    for name, module in walk(model, ""):
        if id(module) not in seen:  # a layer used twice is one layer on one crossbar
            seen.add(id(module))
            yield name, module


def convert(model: nn.Module, variation: Variation, seed: int = 0, exclude: Iterable[str] = ()) -> nn.Module:
    """A copy of `model` whose conv and linear layers carry variation; until a chip is programmed its output is equal.

    Args:
        model: any module. `nn.Conv2d` and `nn.Linear` (not subclasses of them) become analog; biases, normalisation
            and embeddings stay digital.
        variation: the device model.
        seed: of the simulation; with the sample number it addresses a chip.
        exclude: names of layers, or of modules that hold layers, that stay digital.

    Warns:
        CoverageWarning: names the matrices that will not carry variation, e.g. attention's in_proj or an LSTM's.

    Raises:
        UserError: nothing to convert, an excluded name that does not exist, or a model that is converted already.
    """
    layers = dict(crossbar_layers(model))
    if any(isinstance(layer, AnalogLayer) for layer in layers.values()):
        raise UserError("convert: the model carries variation already; convert the original one")
    exclude = tuple(exclude)
    names = {name for name, _ in model.named_modules()}
    for name in exclude:
        if name not in names:
            raise UserError(f"convert: exclude: the model has no module {name!r}")
    if not 0 <= seed < 2**64:
        raise UserError(f"convert: seed must lie in [0, 2^64), not {seed}")

    analog, chip = copy.deepcopy(model), Chip(seed)
    kept = {name: i for i, name in enumerate(layers) if not _within(name, exclude)}
    if not kept:
        raise UserError("convert: the model has no nn.Conv2d or nn.Linear layer left to convert")
    replaced: dict[int, AnalogLayer] = {}
    for name, index in kept.items():
        layer = analog.get_submodule(name)
        converted = ANALOG[type(layer)].__new__(ANALOG[type(layer)])
        converted._adopt(layer, variation, index, chip)
        replaced[id(layer)] = converted
    if "" in kept:  # the model is itself one layer
        analog = next(iter(replaced.values()))
    for module in list(analog.modules()):
        for name, child in module._modules.items():
            if id(child) in replaced:
                module._modules[name] = replaced[id(child)]
    _warn_uncovered(analog, exclude)
    return analog


def _within(name: str, parents: Iterable[str]) -> bool:
    return any(name == p or name.startswith(f"{p}.") for p in parents)


def _warn_uncovered(analog: nn.Module, exclude: tuple[str, ...]) -> None:
    covered = {id(p) for layer in analog_layers(analog) for p in layer.parameters()}
    for prefix, module in analog.named_modules():
        digital = getattr(module, "digital_children", ())
        covered |= {id(p) for name in digital for p in module.get_submodule(name).parameters()}
        if isinstance(module, DIGITAL) or _within(prefix, exclude):
            covered |= {id(p) for p in module.parameters()}
    left = [name for name, p in analog.named_parameters() if p.dim() > 1 and id(p) not in covered]
    if left:
        warnings.warn(
            f"no variation on {', '.join(left)}: only nn.Conv2d and nn.Linear become analog; "
            "name their modules in `exclude` if they are digital",
            CoverageWarning,
            stacklevel=3,
        )


def analog_layers(model: nn.Module) -> list[AnalogLayer]:
    """The layers that can carry variation, by layer index."""
    layers = (m for m in model.modules() if isinstance(m, AnalogLayer))
    return sorted(layers, key=lambda layer: layer.layer_index)


def chip_of(model: nn.Module) -> Chip:
    """The chip that `model` stands for. Raises UserError where it was not converted."""
    layers = analog_layers(model)
    if not layers:
        raise UserError("the model carries no variation: pass it through convert() first")
    return layers[0].chip


def program(model: nn.Module, sample: int | None, first_layer: int = 0, seed: int | None = None) -> None:
    """Program chip `sample` into a converted model; None programs the nominal weights.

    Args:
        model: from `convert`.
        sample: number of the chip in [0, 2^32), or None.
        first_layer: layers of a smaller index stay nominal (the sweep of Fig. 9).
        seed: another seed than the one given to `convert`, from now on.
    """
    chip = chip_of(model)
    if sample is not None and not 0 <= sample < 2**32:
        raise UserError(f"program: a sample lies in [0, 2^32), not {sample}")
    chip.sample, chip.first_layer = sample, first_layer
    if seed is not None:
        chip.seed = seed


@contextmanager
def programmed(model: nn.Module, sample: int | None, first_layer: int = 0) -> Iterator[nn.Module]:
    """`program` for the length of a block; what was programmed before is restored."""
    chip = chip_of(model)
    before = chip.sample, chip.first_layer
    program(model, sample, first_layer)
    try:
        yield model
    finally:
        chip.sample, chip.first_layer = before


def check_coverage(model: nn.Module, analog: nn.Module, inputs: Tensor, sample: int = 0) -> list[str]:
    """Prove on real inputs that variation reaches each layer that should have it, and no other.

    Runs `model` and `analog` in evaluation mode and compares, layer by layer and each on the input that it really
    got: with nominal weights both agree exactly; with chip `sample` every analog layer gives what its varied weights
    (drawn here from the address, not taken from the layer) give, and differs from nominal; every other layer that
    holds parameters gives what the digital one gives.

    Args:
        model: the digital network; `analog`: the one that `convert` made of it; `inputs`: a batch.

    Returns:
        The names of the layers that carry variation.

    Raises:
        UserError: names the first layer that does not do what it should, e.g. one whose weight is used behind its
            back, so that its forward is never called.
    """
    if next(model.parameters()).device != inputs.device:
        raise UserError("check_coverage: model and inputs are on different devices")
    was_training = model.training, analog.training
    model.eval(), analog.eval()
    seen: Calls = {}
    names = {id(m): n for n, m in analog.named_modules()}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.setdefault(names[id(module)], []).append((args, kwargs, output))

    leaves = [m for m in analog.modules() if _has_own_parameters(m)]
    hooks = [m.register_forward_hook(record, with_kwargs=True) for m in leaves]
    try:
        with torch.no_grad():
            with programmed(analog, None):
                if not torch.equal(model(inputs), analog(inputs)):
                    raise UserError("check_coverage: with nominal weights the two models differ")
            seen.clear()
            with programmed(analog, sample):
                analog(inputs)
                for layer in leaves:
                    _check_layer(names[id(layer)], layer, model, seen)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training[0]), analog.train(was_training[1])
    return [names[id(layer)] for layer in analog_layers(analog)]


def _has_own_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _check_layer(name: str, layer: nn.Module, model: nn.Module, seen: Calls) -> None:
    original = model.get_submodule(name)
    if name not in seen:
        if isinstance(layer, AnalogLayer):
            raise UserError(f"check_coverage: {name} is never called, so its variation has no effect")
        return  # not called in a digital layer: nothing that could carry variation
    for args, kwargs, y in seen[name]:
        if not isinstance(layer, AnalogLayer):
            if not torch.equal(_first(y), _first(original(*args, **kwargs))):
                raise UserError(f"check_coverage: {name} is digital, yet its output changes with the chip")
            continue
        weight = layer.variation.sample(original.weight, layer.chip.seed, layer.layer_index, layer.chip.sample)
        wanted = torch.func.functional_call(original, {"weight": weight}, args, kwargs)
        if not torch.equal(y, wanted):
            raise UserError(f"check_coverage: {name} does not give what its chip's weights give")
        if torch.equal(weight, original.weight):
            raise UserError(f"check_coverage: {name} carries no variation")


def _first(output: object) -> Tensor:
    """The output of a layer, or its first part where it gives several (attention, recurrent layers)."""
    return output if isinstance(output, Tensor) else output[0]
