"""Conv and linear layers whose weights carry device variation.

`correctnet.convert` makes a layer analog in place: its class changes but the object remains, so every reference to it
(an attribute, a list, a dict) holds the analog layer. `weight` reads the weights on the programmed chip; `nominal`,
`parameters()` and `state_dict()` give the trained, nominal weights.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from correctnet.crossbar.operators import noisy_conv2d, noisy_linear
from correctnet.devices.base import KernelNoise, Variation, kernel_noise
from correctnet.errors import UserError, one_line
from correctnet.reloading import survives_reload


@survives_reload
class CoverageWarning(UserWarning):
    """Some parameters of the network cannot carry variation, or carry it without effect."""


class Watcher(Protocol):
    """Observer of every weight that a layer draws (`correctnet.crossbar.probe.Probe`)."""

    def drawing(self, layer: AnalogLayer, draw: Callable[[], Tensor]) -> Tensor:
        """Call `draw` and return its weights."""


@survives_reload
@dataclass
class Chip:
    """The chip sample that a converted network carries, shared by all of its layers.

    Attributes:
        seed: seed of the simulation.
        sample: number of the chip, or numbers of the chips that share each batch; None for nominal weights.
        first_layer: layers of a smaller index keep their nominal weights.
        drawn: weights of the chip by layer index, cached between forward passes; None to draw them in each. Only
            `keeping` sets it, for a block in which the nominal weights do not change.
        watcher: observer of every weight that is drawn, or None.
        running: whether this package runs the network, whose code then reads plain tensors.
        lock: held while the network is programmed for a block of code, so that threads take turns.
    """

    seed: int
    sample: int | tuple[int, ...] | None = None
    first_layer: int = 0
    drawn: dict[int, tuple[object, Tensor]] | None = None
    watcher: Watcher | None = None
    running: bool = False
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy has the same address; locks, cached weights and watchers belong to the original.
        return Chip, (self.seed, self.sample, self.first_layer)


@survives_reload
class ChipWeight(Tensor):
    """The weights of a layer on a chip, as its attribute `weight` returns them.

    Reads give the chip's weights. Changes in place (`mul_`, `[...] =`, `.data = `, also through `.data`, `detach()` and
    views) go to the nominal weights, from which the chip's weights are drawn at each read.
    """

    _nominal: Tensor

    @classmethod
    def of(cls, drawn: Tensor, nominal: Tensor) -> ChipWeight:
        """Wrap the weights `drawn` of a chip, whose nominal weights are `nominal`."""
        weight = drawn.as_subclass(cls)
        weight._nominal = nominal
        return weight

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickled as a plain tensor, which `torch.load` reads by default.
        return self.as_subclass(Tensor).detach().__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args and isinstance(args[0], ChipWeight) else None
        change = _changes(func)
        with torch._C.DisableTorchFunctionSubclass():
            if change and not args:  # torch.nn.init passes its argument by name
                return func(**{k: v._nominal if isinstance(v, ChipWeight) else v for k, v in kwargs.items()})
            if "out" in kwargs and isinstance(kwargs["out"], ChipWeight):
                return func(*args, **{**kwargs, "out": kwargs["out"]._nominal})
            if target is None:
                if change and isinstance(args[0], list | tuple):  # torch._foreach_mul_ and similar
                    changed = [v._nominal if isinstance(v, ChipWeight) else v for v in args[0]]
                    return func(changed, *args[1:], **kwargs)
                return func(*args, **kwargs)
            if change or _of_parameter(func):
                return func(target._nominal, *args[1:], **kwargs)
            result = func(*args, **kwargs)
            if not _view(result, target):
                return result
            nominal = func(target._nominal, *args[1:], **kwargs)
            if isinstance(result, Tensor):
                return cls.of(result, nominal)
            return type(result)(cls.of(*pair) for pair in zip(result, nominal, strict=True))


_OPERATORS = ["add", "sub", "mul", "matmul", "div", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"]
_CHANGING = {f"__i{name}__" for name in (*_OPERATORS, "lshift", "rshift")} | {"__setitem__", "__set__"}


def _changes(func: Any) -> bool:
    """Return whether a torch function changes its first argument in place."""
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name in _CHANGING


def _of_parameter(func: Any) -> bool:
    """Return whether a function reads an attribute of the parameter itself, such as its gradient."""
    if getattr(func, "__name__", "") != "__get__":
        return False
    return getattr(func.__self__, "__name__", "") in ("grad", "is_leaf", "requires_grad")


def _view(result: Any, tensor: Tensor) -> bool:
    """Return whether the result of an operation shares memory with a tensor."""
    first = result[0] if isinstance(result, tuple | list) and result else result
    if not isinstance(first, Tensor) or first.layout != torch.strided:
        return False
    return first.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


@survives_reload
class AnalogLayer(nn.Module):
    """Base class of analog layers: the layer's address, and its weights on the programmed chip.

    Attributes:
        variation: the device model.
        layer_index: index of the layer among all conv and linear layers of the network.
        chip: the programmed chip, shared with the network's other layers.
    """

    variation: Variation
    layer_index: int
    chip: Chip
    # Weak references to the layers that this one is a copy of, and to their weights: code that still runs those carries
    # no variation, which `correctnet.crossbar.probe` reports.
    _copied_from: tuple[weakref.ref[Any], ...] = ()

    @property
    def varies(self) -> bool:
        """Whether the layer carries variation at present."""
        return self.chip.sample is not None and self.layer_index >= self.chip.first_layer

    @property
    def nominal(self) -> Tensor:
        """The trained weights: the parameter `weight`, or what pruning or weight normalisation derives from others."""
        found = self._parameters.get("weight")
        if found is None and "weight" not in self.__dict__:
            raise UserError("a converted layer has lost its weight, as to a parametrization; parametrize, then convert")
        return self.__dict__["weight"] if found is None else found

    @property
    def weight(self) -> Tensor:
        """The weights on the programmed chip, in the shape of `nominal`; nominal where no chip is programmed.

        Changes in place go to the nominal weights, see `ChipWeight`. Raises UserError where several chips are
        programmed.
        """
        try:
            if not self.varies or self.chip.running or torch.compiler.is_compiling():
                return self.chip_weight()
            return ChipWeight.of(self.chip_weight(), self.nominal)
        except AttributeError as error:  # nn.Module would return the parameter instead
            raise RuntimeError(f"the chip's weights cannot be drawn ({one_line(error)})") from error

    @weight.setter
    def weight(self, value: Any) -> None:
        # Only derived weights are set here, by the hooks that compute them; nn.Module registers parameters itself.
        self.__dict__["weight"] = value

    def chip_weight(self) -> Tensor:
        """See `weight`; a plain tensor."""
        if not self.varies:
            if self._parameters.get("weight") is None:
                return self.nominal
            # Through nn.Module, so that torch.fx sees the parameter being read.
            return nn.Module.__getattr__(self, "weight")
        if self._shares_batch:
            raise UserError(
                "several chips are programmed, each with weights of its own; program one chip to read a layer's weight"
            )
        if self.chip.watcher is not None:
            return self.chip.watcher.drawing(self, self._draw)
        return self._draw()

    @property
    def _shares_batch(self) -> bool:
        """Whether several chips share each batch that the layer is applied to."""
        return self.varies and isinstance(self.chip.sample, tuple)

    def _on_chips(self, x: Tensor) -> Tensor:
        """Apply the layer on several chips, each to an equal part of the batch x (N, ...), in order."""
        samples, least = self.chip.sample, 4 if isinstance(self, nn.Conv2d) else 2
        if x.dim() < least or x.shape[0] % len(samples):
            raise UserError(
                f"program: {len(samples)} chips share each batch; an input of shape {tuple(x.shape)} cannot be divided "
                "evenly among them"
            )
        parts = x.unflatten(0, (len(samples), x.shape[0] // len(samples)))
        noise = kernel_noise(self.variation)
        if noise is not None and self._operator_fits(x):
            return self._operator(parts, noise).flatten(0, 1)
        return torch.cat(
            [self._apply_weight(part, self._draw_chip(chip)) for part, chip in zip(parts, samples, strict=True)]
        )

    def _operator_fits(self, x: Tensor) -> bool:
        """Whether the operators compute what torch would with the chips' weights: no autocast, and one dtype."""
        dtypes = {t.dtype for t in (x, self.nominal, self.bias) if t is not None}
        return (
            len(dtypes) == 1
            and dtypes <= {torch.float32, torch.bfloat16}
            and not torch.is_autocast_enabled(x.device.type)
            and x.numel() > 0
            and self.nominal.numel() > 0
        )

    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """Apply the layer to x with `weight` in place of its own."""
        raise NotImplementedError

    def _operator(self, parts: Tensor, noise: KernelNoise) -> Tensor:
        """Apply the layer's operator to `parts` (S, N, ...), one of each of the S chips."""
        raise NotImplementedError

    def _draw(self) -> Tensor:
        nominal, kept = self.nominal, self.chip.drawn
        # The versions of inference tensors are not counted.
        if kept is None or nominal.is_inference() or (nominal.requires_grad and torch.is_grad_enabled()):
            return self._draw_chip(self.chip.sample)
        key = (self.chip.seed, self.chip.sample, self.variation, nominal._version, nominal.data_ptr())
        if self.layer_index not in kept or kept[self.layer_index][0] != key:
            kept[self.layer_index] = key, self._draw_chip(self.chip.sample)
        return kept[self.layer_index][1]

    def _draw_chip(self, sample: int) -> Tensor:
        if torch.jit.is_tracing():  # it does not see the core fill the weights and would record uninitialised memory
            raise UserError("torch.jit.trace cannot record a chip's weights; program(model, None) before it")
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.nominal.requires_grad):
            return self.variation.sample(self.nominal, self.chip.seed, self.layer_index, sample)

    def __deepcopy__(self, memo: dict[int, Any]) -> AnalogLayer:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy({k: v for k, v in self.__dict__.items() if k != "_copied_from"}, memo))
        twin.__dict__["_copied_from"] = (*self._copied_from, *_traces(self))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_copied_from"}


def make_analog(layer: nn.Module, variation: Variation, index: int, chip: Chip, original: nn.Module) -> None:
    """Turn a plain layer, a copy of `original`, into an analog one in place."""
    layer.__class__ = ANALOG[type(layer)]
    layer.variation, layer.layer_index, layer.chip = variation, index, chip
    layer._copied_from = _traces(original)


def _traces(layer: nn.Module) -> tuple[weakref.ref[Any], ...]:
    """Return weak references to a layer and its weight."""
    weight = layer._parameters.get("weight")
    return (weakref.ref(layer),) if weight is None else (weakref.ref(layer), weakref.ref(weight))


@survives_reload
class AnalogLinear(AnalogLayer, nn.Linear):
    """y = x W^T + b with W on the programmed chip and b digital. x (..., in), W (out, in), y (..., out)."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self._on_chips(x) if self._shares_batch else self._apply_weight(x, self.chip_weight())

    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """See `AnalogLayer._apply_weight`."""
        return F.linear(x, weight, self.bias)

    def _operator(self, parts: Tensor, noise: KernelNoise) -> Tensor:
        """See `AnalogLayer._operator`."""
        address = {"seed": self.chip.seed, "layer": self.layer_index, "samples": self.chip.sample}
        y = noisy_linear(parts.flatten(1, -2), self.nominal, self.bias, **address, **noise._asdict())
        return y.unflatten(1, parts.shape[1:-1])


@survives_reload
class AnalogConv2d(AnalogLayer, nn.Conv2d):
    """y = x * W + b with W on the programmed chip and b digital. x (N, in, H, W), W (out, in / groups, kh, kw)."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self._on_chips(x) if self._shares_batch else self._apply_weight(x, self.chip_weight())

    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """See `AnalogLayer._apply_weight`."""
        return self._conv_forward(x, weight, self.bias)

    def _operator(self, parts: Tensor, noise: KernelNoise) -> Tensor:
        """See `AnalogLayer._operator`."""
        address = {"seed": self.chip.seed, "layer": self.layer_index, "samples": self.chip.sample}
        geometry = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}
        return noisy_conv2d(parts, self.nominal, self.bias, **address, **noise._asdict(), **geometry)

    def _operator_fits(self, x: Tensor) -> bool:
        return self.padding_mode == "zeros" and not isinstance(self.padding, str) and super()._operator_fits(x)


ANALOG: dict[type[nn.Module], type[AnalogLayer]] = {nn.Linear: AnalogLinear, nn.Conv2d: AnalogConv2d}


def crossbar_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of every conv and linear layer of the original network, in order of registration.

    The position in this order is the layer index of the noise; excluded layers count as well. Layers that were added in
    digital hardware (generators, compensators) are not part of the original network and do not count.
    """

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        # Exact types only: a subclass may use its weight in another way, or not at all.
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


def analog_layers(model: nn.Module) -> list[AnalogLayer]:
    """Return the layers that can carry variation, by layer index."""
    layers = (m for m in model.modules() if isinstance(m, AnalogLayer))
    return sorted(layers, key=lambda layer: layer.layer_index)


def nominal_weight(layer: nn.Module) -> Tensor:
    """Return the trained weights of a layer, analog or not, whichever chip is programmed."""
    return layer.nominal if isinstance(layer, AnalogLayer) else layer.weight
