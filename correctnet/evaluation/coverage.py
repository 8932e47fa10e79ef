"""Check that variation reaches every layer that should carry it, and no other.

`check_coverage` compares a converted network with a digital one that is given a chip's weights, through the same code
and the same engine as `correctnet.evaluate`, which itself makes the cheaper checks of `correctnet.crossbar.probe`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from correctnet.crossbar.convert import programmed
from correctnet.crossbar.kinds import Crossbar, crossbars
from correctnet.crossbar.layers import AnalogModule, OnCrossbar, analog_layers, analog_names
from correctnet.crossbar.probe import Reads, address, change, left_alone, run, same, watching
from correctnet.datasets.inputs import Inputs, as_inputs
from correctnet.engine.engine import CHECK_TOLERANCE, Engine
from correctnet.engine.trace import Unsupported
from correctnet.errors import UserError


def check_coverage(model: nn.Module, analog: nn.Module, inputs: Any, sample: int = 0) -> list[str]:
    """Check on real inputs that variation reaches each layer that should carry it, and no other.

    In evaluation mode and without gradients, as in `evaluate`, the outputs of `analog` with nominal weights must equal
    those of `model`, and with chip `sample` those of `model` with the chip's weights in place of its own (drawn here
    from their address, not read from the layer). The engine of `evaluate` is compared with the same outputs.

    Args:
        model: the digital network.
        analog: the network that `correctnet.convert` made from it.
        inputs: (N, ...), a batch; or a dict or tuple of several tensors.
        sample: number of the chip.

    Returns:
        The names of the layers that carry variation and are used in evaluation.

    Raises:
        UserError: names the layers that fail, e.g. one whose nominal weights are used elsewhere in the network.
    """
    given, inputs = inputs, as_inputs(inputs)
    if inputs is None:
        raise UserError(
            f"check_coverage: inputs are a tensor, or a dict or tuple of them, not a {type(given).__name__}"
        )
    devices = {p.device for p in model.parameters()}
    if devices and inputs.device not in devices:
        raise UserError("check_coverage: model and inputs are on different devices")
    layers, names = analog_layers(analog), analog_names(analog)
    if not layers:
        raise UserError("check_coverage: the second model carries no variation; pass the one that convert() returned")
    known = _digital(model, analog)
    if foreign := [names[id(layer)] for layer in layers if names[id(layer)] not in known]:
        raise UserError(f"check_coverage: the first model has no layer {foreign[0]!r}; pass the one that was converted")
    with torch.no_grad(), left_alone(model, analog), programmed(analog, None):
        wanted = run(model, inputs, "check_coverage")
        if not same(wanted, run(model, inputs, "check_coverage")):
            raise UserError(
                "check_coverage: the network's outputs change from call to call, so nothing can be compared"
            )
        if not same(wanted, run(analog, inputs, "check_coverage")):
            raise UserError("check_coverage: with nominal weights the two models differ")
        drawn = [
            (known[names[id(own)]], own.variation.sample(known[names[id(own)]].weight.detach(), *_address(own, sample)))
            for own in layers
        ]
        with _chip_weights(drawn):
            wanted = run(model, inputs, "check_coverage")
            used = _used(model, known.values(), inputs)
        with programmed(analog, sample), watching(analog, layers) as probe:
            run(analog, inputs, "check_coverage")
        bypassed = [names[id(layer)] for layer in layers if layer.layer_index in probe.leaked]
        if bypassed:
            raise UserError(f"check_coverage: {bypassed[0]}: its nominal weights are used past the layer")
        reached = [names[id(layer)] for layer in layers if layer.layer_index in probe.used]
        for layer in layers:
            if names[id(layer)] in used and layer.layer_index not in probe.used and _varies(layer, sample):
                raise UserError(f"check_coverage: {names[id(layer)]} is never called, so its variation has no effect")
        with programmed(analog, sample):
            found = run(analog, inputs, "check_coverage")
        if not same(found, wanted):
            raise UserError(f"check_coverage: {_first_difference(model, analog, drawn, inputs, sample)}")
    _check_engine(analog, inputs, found, sample)
    return reached if reached else [names[id(layer)] for layer in layers if names[id(layer)] in used]


def _digital(model: nn.Module, analog: nn.Module) -> dict[str, Crossbar]:
    """The crossbars of a digital model by name, also of parameters that were named when it was converted."""
    found = {each.name: each for each in crossbars(model)}
    modules = dict(model.named_modules())
    for each in crossbars(analog):
        module = modules.get(each.name.removesuffix(each.parameter).rstrip("."))
        if each.name not in found and module is not None and module._parameters.get(each.parameter) is not None:
            found[each.name] = each._replace(module=module)
    return found


def _varies(layer: OnCrossbar, sample: int) -> bool:
    before, layer.chip.sample = layer.chip.sample, sample
    try:
        return change(layer) > 0
    finally:
        layer.chip.sample = before


def _address(layer: OnCrossbar, sample: int) -> tuple[int, int, int]:
    return layer.chip.seed, layer.layer_index, sample


class _Fixed(nn.Module):
    """Takes the place of a parametrization that derives a weight."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = weight

    def forward(self) -> Tensor:
        """The weight."""
        return self.weight


@contextmanager
def _chip_weights(drawn: Iterable[tuple[Crossbar, Tensor]]) -> Iterator[None]:
    """Give a digital model a chip's weights for the length of a block; derived weights are replaced by a hook."""
    with ExitStack() as put_back:
        for place, weight in drawn:
            module, name = place.module, place.parameter
            own, derived = module._parameters.get(name), getattr(module, "parametrizations", {})
            if own is not None:
                module._parameters[name] = nn.Parameter(weight, requires_grad=False)
                put_back.callback(module._parameters.__setitem__, name, own)
            elif name in derived:
                put_back.callback(derived._modules.__setitem__, name, derived[name])
                derived._modules[name] = _Fixed(weight)
            else:
                hook = module.register_forward_pre_hook(lambda m, _args, n=name, w=weight: setattr(m, n, w))
                put_back.callback(hook.remove)
        yield


def _used(model: nn.Module, places: Iterable[Crossbar], inputs: Tensor | Inputs) -> set[str]:
    """The names of weights of a digital model that are read in its forward pass."""
    read: set[int] = set()
    with Reads(read.add):
        run(model, inputs, "check_coverage")
    return {place.name for place in places if address(place.weight) in read}


def _first_difference(
    model: nn.Module,
    analog: nn.Module,
    drawn: list[tuple[Crossbar, Tensor]],
    inputs: Tensor | Inputs,
    sample: int,
) -> str:
    """A description of the first module whose output differs from that of the digital model with the chip's weights."""

    def outputs(network: nn.Module) -> list[tuple[str, Any]]:
        seen: list[tuple[str, Any]] = []
        own = {id(m): n for n, m in network.named_modules()}

        def record(module: nn.Module, _args: Any, output: Any) -> None:
            seen.append((own[id(module)], [v.clone() for v in tree_leaves(output) if isinstance(v, Tensor)]))

        hooks = [m.register_forward_hook(record) for m in network.modules()]
        try:
            run(network, inputs, "check_coverage")
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    with _chip_weights(drawn):
        wanted = outputs(model)
    with programmed(analog, sample):
        found = outputs(analog)
    for (name, a), (other, b) in zip(wanted, found, strict=False):
        if name != other or not same(a, b):
            if isinstance(analog.get_submodule(other), AnalogModule):
                return f"{other} does not compute with its chip's weights"
            return f"{other} is digital, yet its output changes with the chip"
    return "the network does not compute with its chip's weights"


def _check_engine(analog: nn.Module, inputs: Tensor | Inputs, wanted: Any, sample: int) -> None:
    """Compare the outputs of the engine of `evaluate` with those of torch on the chip."""
    if not isinstance(wanted, Tensor) or not wanted.isfinite().all():
        return
    with left_alone(analog), programmed(analog, sample):
        try:
            engine = Engine(analog, inputs)
        except Unsupported:
            return
    found, scale = engine.outputs(inputs, [sample])[0], wanted.abs().max()
    if not (found - wanted).abs().max() <= CHECK_TOLERANCE * scale:
        raise UserError("check_coverage: the outputs of the C++ core are not those of the chip's weights")
