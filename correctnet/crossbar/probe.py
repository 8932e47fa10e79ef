"""Checks of which weights a forward pass reads, and forward passes without side effects on the network.

Code can read weights in other ways than through a layer's forward: a closure over the network that was converted, a
reference to a weight, torch's fused kernels. `Probe` observes the tensors that every operation of a forward pass reads,
and so finds layers whose nominal weights are used, or whose weights on the chip are not.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from correctnet.crossbar.chips import Chip
from correctnet.crossbar.convert import chip_of, programmed
from correctnet.crossbar.layers import AnalogModule, CoverageWarning, OnCrossbar, analog_layers, analog_names
from correctnet.datasets.inputs import Inputs, called, described
from correctnet.devices.base import drawn_by_kernels
from correctnet.errors import UserError, one_line

# Where a chip changes no weight by more than this fraction, its outputs may round to the nominal ones.
VISIBLE = 1e-3


@contextmanager
def left_alone(*models: nn.Module) -> Iterator[None]:
    """Use evaluation mode for the length of a block; restore modes and random generators after it.

    Other threads that enter such a block with the same converted models wait.
    """
    chips = {id(m.chip): m.chip for model in models for m in model.modules() if isinstance(m, AnalogModule)}
    with ExitStack() as held:
        for _, chip in sorted(chips.items()):
            held.enter_context(chip.lock)
        with _left_alone(models, list(chips.values())):
            yield


@contextmanager
def _left_alone(models: Iterable[nn.Module], chips: list[Chip]) -> Iterator[None]:
    """Do what `left_alone` does, with the chips' locks held."""
    running = [(chip, chip.running) for chip in chips]
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 (the caller's generator)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices), modes_kept(*models):
        for model in models:
            model.eval()
        for chip in chips:
            chip.running = True
        try:
            yield
        finally:
            for chip, before in running:
                chip.running = before
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002


@contextmanager
def modes_kept(*models: nn.Module) -> Iterator[None]:
    """Restore the mode (`training`) of each module after a block, also after an error."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def names_of(model: nn.Module) -> dict[int, str]:
    """Return the names of a converted network's weights that can carry variation, by identity."""
    return {own: name or "the network itself" for own, name in analog_names(model).items()}


class Probe(TorchDispatchMode):
    """Observes which weights the operations of a forward pass read.

    Attributes:
        used: indices of the layers whose weights on the chip were read by an operation.
        changed: indices of the layers whose weights on the chip the forward pass changed in place.
        leaked: by layer index, the operation that bypassed the layer and read its nominal weights, or those of a layer
            that it was copied from.
    """

    def __init__(self, model: nn.Module, layers: Iterable[OnCrossbar]):
        super().__init__()
        self.used: set[int] = set()
        self.leaked: dict[int, str] = {}
        self._drawing = 0
        self._chip: dict[int, int] = {}  # by address of the weights' storage, the layer's index
        self._drawn: list[tuple[int, Tensor, Tensor]] = []  # layer index, weights, and what they were
        self._kept: list[Tensor] = []  # so that no other tensor gets such an address
        self._nominal: dict[int, int] = {}
        for layer in layers:
            copies = [ref() for ref in layer._copied_from]
            modules = [w for w in copies if isinstance(w, nn.Module)]
            weights = [w.__dict__.get("_parameters", {}).get(layer.parameter) for w in modules]
            weights += [w for w in copies if isinstance(w, Tensor)]
            for weight in (layer.nominal, *weights):
                if weight is not None and (where := address(weight)) is not None:
                    self._nominal[where] = layer.layer_index
                    self._kept.append(weight)  # derived weights are recomputed in each forward pass
        # A digital module that shares a weight may read it.
        varied = {(id(layer.owner), layer.parameter) for layer in layers}
        for module in model.modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and (id(module), name) not in varied:
                    self._nominal.pop(address(tensor), None)

    def drawing(self, layer: OnCrossbar, draw: Callable[[], Tensor]) -> Tensor:
        """See `correctnet.crossbar.layers.Watcher`: drawing reads the nominal weights, which is not a leak."""
        self._drawing += 1
        try:
            weight = draw()
        finally:
            self._drawing -= 1
        self._chip[address(weight)] = layer.layer_index
        self._kept.append(weight)
        self._drawn.append((layer.layer_index, weight, weight.detach().clone()))
        return weight

    @property
    def changed(self) -> set[int]:
        """See the class."""
        return {index for index, weight, before in self._drawn if not same(weight.detach(), before)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._drawing:
            for where in operands(args, kwargs):
                if where in self._chip:
                    self.used.add(self._chip[where])
                elif where in self._nominal:
                    self.leaked.setdefault(self._nominal[where], str(func))
        return func(*args, **(kwargs or {}))


def address(tensor: Tensor) -> int | None:
    """Return the address of a tensor's storage; None for a tensor without memory of its own."""
    with suppress(RuntimeError, NotImplementedError):  # sparse and wrapped tensors have none
        return tensor.untyped_storage().data_ptr() or None
    return None


def operands(args: Any, kwargs: Any) -> Iterator[int]:
    """Yield the addresses of the tensors among an operation's arguments."""
    for value in tree_leaves((args, kwargs)):
        if isinstance(value, Tensor) and (where := address(value)) is not None:
            yield where


class Reads(TorchDispatchMode):
    """Calls `seen` with the address of each tensor that an operation reads, in order."""

    def __init__(self, seen: Callable[[int], object]):
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for where in operands(args, kwargs):
            self._seen(where)
        return func(*args, **(kwargs or {}))


@contextmanager
def watching(model: nn.Module, layers: list[OnCrossbar]) -> Iterator[Probe]:
    """Observe the weights of `layers` in the forward passes of a block."""
    probe, chip = Probe(model, layers), chip_of(model)
    chip.watcher = probe
    try:
        with probe:
            yield probe
    finally:
        chip.watcher = None


def run(model: nn.Module, images: Tensor | Inputs, what: str = "evaluate") -> Any:
    """Return the outputs of a forward pass on a copy of the images, or of other inputs.

    Raises UserError, in one line, where the network cannot run on them.
    """
    try:
        return called(model, images.clone())
    except UserError:
        raise
    except Exception as error:  # the network's own code may raise anything
        raise UserError(
            f"{what}: the network cannot run on {described(images)}: {type(error).__name__}: {one_line(error, 200)}"
        ) from error


@torch.no_grad()
def check_reached(
    model: nn.Module, images: Tensor | Inputs, nominal: Any, samples: Iterable[int], first_layer: int = 0
) -> None:
    """Check that variation reaches the layers that should carry it.

    Args:
        model: from `correctnet.convert`, in evaluation mode.
        images: a few inputs.
        nominal: the network's outputs for them with nominal weights.
        samples: a few chips.
        first_layer: layers of a smaller index keep their nominal weights.

    Warns:
        CoverageWarning: layers that the network does not use in evaluation mode, or outputs that do not depend on the
            weights.

    Raises:
        UserError: a device model returns no weights, different ones at each call, or changes the nominal ones; a
            layer's nominal weights are read by other code; the forward pass changes a layer's weights; no layer is
            used; or the chips do not affect the outputs.
    """
    names = names_of(model)
    layers = [layer for layer in analog_layers(model) if layer.layer_index >= first_layer]
    if not layers:  # first_layer is after the last one
        return
    samples = list(samples)
    _check_device(layers, samples[0])
    with programmed(model, samples[0], first_layer), watching(model, layers) as probe:
        output = run(model, images)
    if probe.leaked:
        listed = ", ".join(names[id(layer)] for layer in layers if layer.layer_index in probe.leaked)
        raise UserError(
            f"evaluate: variation does not reach {listed}: the network uses the nominal weights past the layer (in "
            f"{next(iter(probe.leaked.values()))}), as a function does that holds the network or the weights that "
            "were converted; make it a method that reads them from self"
        )
    if changed := [names[id(layer)] for layer in layers if layer.layer_index in probe.changed]:
        raise UserError(
            f"evaluate: the network changes the weights of {', '.join(changed)} in its forward pass, which a chip "
            "cannot do; change the trained weights before convert()"
        )
    unused = [names[id(layer)] for layer in layers if layer.layer_index not in probe.used]
    if len(unused) == len(layers):
        raise UserError(
            f"evaluate: variation has no effect: none of {', '.join(unused)} is used when the network is evaluated"
        )
    if unused:
        warnings.warn(
            f"{', '.join(unused)} not used when the network is evaluated: no variation from there",
            CoverageWarning,
            stacklevel=5,
        )
    if same(nominal, output):
        _check_effect(model, layers, images, nominal, samples, first_layer)


def _check_device(layers: Iterable[OnCrossbar], sample: int) -> None:
    """Check that a user's device model returns weights, the same at each call, and does not change the nominal ones."""
    for layer in layers:
        if drawn_by_kernels(layer.variation):
            continue
        kept, found = layer.nominal.detach().clone(), []
        for _ in range(2):
            drawn = layer.variation.sample(layer.nominal, layer.chip.seed, layer.layer_index, sample)
            if not isinstance(drawn, Tensor) or (drawn.shape, drawn.dtype) != (kept.shape, kept.dtype):
                got = f"{tuple(drawn.shape)} {drawn.dtype}" if isinstance(drawn, Tensor) else type(drawn).__name__
                wanted = f"{tuple(kept.shape)} {kept.dtype}"
                raise UserError(
                    f"evaluate: {_device(layer)} must give weights {wanted}, not {got}".replace("torch.", "")
                )
            found.append(drawn.detach().clone())
            if not same(layer.nominal.detach(), kept):
                layer.nominal.detach().copy_(kept)
                raise UserError(f"evaluate: {_device(layer)} changes the nominal weights in place; give new ones")
        if not same(*found):
            raise UserError(
                f"evaluate: {_device(layer)} gives other weights each time for one chip; they must be a function of "
                "(weight, seed, layer, sample)"
            )


def _device(layer: OnCrossbar) -> str:
    return f"the device model {type(layer.variation).__name__}"


def _check_effect(
    model: nn.Module, layers: list[OnCrossbar], images: Tensor, nominal: Any, samples: list[int], first_layer: int
) -> None:
    """Find out why a chip gives the nominal outputs: nominal weights, a network that ignores them, or a fault."""
    with programmed(model, samples[0], first_layer):
        if max(change(layer) for layer in layers) < VISIBLE:
            return
    for sample in samples[1:]:
        with programmed(model, sample, first_layer):
            if not same(nominal, run(model, images)):
                return
    overridden = {}
    with programmed(model, samples[0], first_layer):
        modules = {id(module): name for name, module in model.named_modules()}
        for layer in analog_layers(model):
            if layer.varies and layer.owner._parameters.get(layer.parameter) is not None:
                place = filter(None, (modules[id(layer.owner)], layer.parameter))
                overridden[".".join(place)] = layer.chip_weight()
    with programmed(model, None):
        args, kwargs = ((images.clone(),), {}) if isinstance(images, Tensor) else images.clone().arguments(model)
        wanted = torch.func.functional_call(model, overridden, args, kwargs, tie_weights=False)
    names = names_of(model)
    listed = ", ".join(names[id(layer)] for layer in layers)
    if not same(wanted, nominal):
        raise UserError(f"evaluate: variation of {listed} does not show in the outputs, which are the nominal ones")
    warnings.warn(
        f"the network's outputs do not depend on the weights of {listed}: they are the same on every chip",
        CoverageWarning,
        stacklevel=6,
    )


def change(layer: OnCrossbar) -> float:
    """Return the largest relative change of a weight on the programmed chip."""
    nominal, weight = layer.nominal.detach(), layer.chip_weight().detach()
    change = ((weight - nominal).abs() / nominal.abs()).nan_to_num(0.0)
    return float(change.max()) if change.numel() else 0.0


def same(a: Any, b: Any) -> bool:
    """Return whether two outputs, tensors or containers of them, are equal; NaN equals NaN."""
    first, second = tree_leaves(_plain(a)), tree_leaves(_plain(b))
    return len(first) == len(second) and all(
        torch.equal(x, y) or (x.shape == y.shape and bool(((x == y) | ((x != x) & (y != y))).all()))
        if isinstance(x, Tensor) and isinstance(y, Tensor)
        else x is y or (not isinstance(x, Tensor) and not isinstance(y, Tensor))
        for x, y in zip(first, second, strict=True)
    )


def _plain(output: Any) -> Any:
    """Return an output as `tree_leaves` understands it: objects with attributes as a dict."""
    if isinstance(output, Tensor | list | tuple | dict):
        return output
    return dict(vars(output)) if hasattr(output, "__dict__") else output
