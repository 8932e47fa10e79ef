"""Modules whose weights carry device variation.

`correctnet.convert` makes a module analog in place: its class changes but the object remains, so every reference to it
(an attribute, a list, a dict) holds the analog module. Its attribute `weight`, or those of the other weights that
crossbars hold, read the weights on the programmed chip; `nominal`, `parameters()` and `state_dict()` give the trained,
nominal weights.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from correctnet.crossbar.chips import Chip, ChipWeight
from correctnet.crossbar.converters import Periphery
from correctnet.crossbar.kinds import crossbars, derived
from correctnet.crossbar.operators import noisy_conv2d, noisy_linear
from correctnet.devices.base import KernelNoise, Variation, kernel_noise
from correctnet.errors import UserError, one_line
from correctnet.reloading import survives_reload


@survives_reload
class CoverageWarning(UserWarning):
    """Some parameters of the network cannot carry variation, or carry it without effect."""


@survives_reload
class OnCrossbar:
    """Weights on a crossbar: their address, and what they are on the programmed chip.

    Attributes:
        variation: the device model.
        layer_index: index of the crossbar, see `correctnet.crossbar.kinds.crossbars`.
        chip: the programmed chip, shared with the network's other crossbars.
        owner: the module that holds the weights.
        parameter: the attribute of the module that gives them.
        periphery: converters of inputs and outputs, in use while a chip is programmed; None: both are exact.
    """

    variation: Variation
    layer_index: int
    chip: Chip
    owner: AnalogModule
    parameter: str = "weight"
    periphery: Periphery | None = None
    # Weak references to the modules that the owner is a copy of, and to their weights: code that still runs those
    # carries no variation, which `correctnet.crossbar.probe` reports.
    _copied_from: tuple[weakref.ref[Any], ...] = ()

    @property
    def varies(self) -> bool:
        """Whether the weights carry variation at present."""
        return self.chip.sample is not None and self.layer_index >= self.chip.first_layer

    @property
    def nominal(self) -> Tensor:
        """The trained weights: a parameter, or what pruning or a parametrization derives from others."""
        return self.owner.nominal_of(self.parameter)

    def chip_weight(self) -> Tensor:
        """The weights on the programmed chip, nominal where none is; a plain tensor.

        Raises UserError where several chips are programmed.
        """
        if not self.varies:
            return self.owner.nominal_of(self.parameter)
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

    def _draw(self) -> Tensor:
        nominal, kept = self.nominal, self.chip.drawn
        # The versions of inference tensors are not counted.
        if kept is None or nominal.is_inference() or (nominal.requires_grad and torch.is_grad_enabled()):
            return self._draw_chip(self.chip.sample, nominal)
        key = (self.chip.seed, self.chip.sample, self.variation, nominal._version, nominal.data_ptr())
        if self.layer_index not in kept or kept[self.layer_index][0] != key:
            kept[self.layer_index] = key, self._draw_chip(self.chip.sample, nominal)
        return kept[self.layer_index][1]

    def _draw_chip(self, sample: int, nominal: Tensor | None = None) -> Tensor:
        if torch.jit.is_tracing():  # it does not see the core fill the weights and would record uninitialised memory
            raise UserError("torch.jit.trace cannot record a chip's weights; program(model, None) before it")
        nominal = self.nominal if nominal is None else nominal
        with torch.set_grad_enabled(torch.is_grad_enabled() and nominal.requires_grad):
            return self.variation.sample(nominal, self.chip.seed, self.layer_index, sample)


def reader(name: str) -> property:
    """Return the attribute of an analog module that reads weights on the programmed chip, nominal where none is.

    Changes in place go to the nominal weights, see `ChipWeight`. Reading raises UserError where several chips are
    programmed.
    """

    def read(module: AnalogModule) -> Tensor:
        return _read(module, name)

    read.of_chip = True
    return property(read, lambda module, value: _write(module, name, value))


def is_reader(value: Any) -> bool:
    """Return whether an attribute of a class is a `reader`."""
    return isinstance(value, property) and hasattr(value.fget, "of_chip")


def _read(module: AnalogModule, name: str) -> Tensor:
    try:
        own = module.crossbar(name)
        if own is None:
            return module.nominal_of(name)
        # What a parametrization derives is derived once a pass, as its training may count the passes.
        derived = module._parameters.get(name) is None and name not in module.__dict__
        if not own.varies or own.chip.running or derived or torch.compiler.is_compiling():
            return own.chip_weight()
        return ChipWeight.of(own.chip_weight(), own.nominal)
    except AttributeError as error:  # nn.Module would return the parameter instead
        raise RuntimeError(f"the chip's weights cannot be drawn ({one_line(error)})") from error


def _write(module: AnalogModule, name: str, value: Any) -> None:
    # Only derived weights are set here, by the hooks that compute them; nn.Module registers parameters itself.
    inherited = module._inherited(name)
    if inherited is None:
        module.__dict__[name] = value
    else:
        inherited.__set__(module, value)


@survives_reload
class AnalogModule(nn.Module):
    """Base class of modules with weights on crossbars; subclasses have a `reader` for each.

    Attributes:
        parts: the crossbars of the module by the parameter's name, apart from that which the module is itself
            (`AnalogLayer`).
        plain: the class of the module before its conversion.
    """

    parts: dict[str, Part]
    plain: type[nn.Module]

    def crossbar(self, name: str) -> OnCrossbar | None:
        """Return the crossbar that holds a parameter, or None."""
        return self.__dict__.get("parts", {}).get(name)

    def crossbars(self) -> list[OnCrossbar]:
        """Return all crossbars of the module."""
        return list(self.__dict__.get("parts", {}).values())

    def nominal_of(self, name: str) -> Tensor:
        """Return trained weights: a parameter, or what pruning or a parametrization derives from others."""
        if self._parameters.get(name) is not None:
            # Through nn.Module, so that torch.fx sees the parameter being read.
            return nn.Module.__getattr__(self, name)
        if name in self.__dict__:
            return self.__dict__[name]
        inherited = self._inherited(name)
        if inherited is None:
            raise UserError(
                f"a converted layer has lost its {name}, as to a parametrization; parametrize, then convert"
            )
        return inherited.__get__(self, type(self))

    def _inherited(self, name: str) -> property | None:
        """Return the property of the module's original class that derives a weight, or None."""
        converted = False
        for kind in type(self).__mro__:
            found = vars(kind).get(name)
            if is_reader(found):
                converted = True
            elif isinstance(found, property):
                return found if converted else None
        return None

    def _check_readers(self) -> None:
        """Raise UserError where a class that was given to the module after its conversion hides a `reader`."""
        for crossbar in self.crossbars():
            if not is_reader(getattr(type(self), crossbar.parameter)):
                self.nominal_of(crossbar.parameter)

    def __deepcopy__(self, memo: dict[int, Any]) -> AnalogModule:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy({k: v for k, v in self.__dict__.items() if k != "_copied_from"}, memo))
        return twin


def traces(module: nn.Module, name: str) -> tuple[weakref.ref[Any], ...]:
    """Return weak references to a module and its parameter."""
    weight = module._parameters.get(name)
    return (weakref.ref(module),) if weight is None else (weakref.ref(module), weakref.ref(weight))


@survives_reload
class Part(OnCrossbar):
    """One of several weights of a module, each on a crossbar of its own."""

    def __init__(
        self,
        owner: AnalogModule,
        parameter: str,
        variation: Variation,
        index: int,
        chip: Chip,
        copied: tuple[weakref.ref[Any], ...] = (),
    ):
        self.owner, self.parameter, self.variation = owner, parameter, variation
        self.layer_index, self.chip, self._copied_from = index, chip, copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Part:
        owner, variation, chip = (copy.deepcopy(v, memo) for v in (self.owner, self.variation, self.chip))
        copied = (*self._copied_from, *traces(self.owner, self.parameter))
        return Part(owner, self.parameter, variation, self.layer_index, chip, copied)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_copied_from"}


@survives_reload
class AnalogLayer(OnCrossbar, AnalogModule):
    """Base class of analog layers, whose attribute `weight` is on a crossbar: the layer is that crossbar itself.

    Layers of kinds without a class of their own compute with the forward of their original class, which reads `weight`.
    """

    weight = reader("weight")

    @property
    def owner(self) -> AnalogModule:
        """The layer itself."""
        return self

    def crossbar(self, name: str) -> OnCrossbar | None:
        """See `AnalogModule.crossbar`."""
        return self if name == "weight" else super().crossbar(name)

    def crossbars(self) -> list[OnCrossbar]:
        """See `AnalogModule.crossbars`."""
        return [self, *super().crossbars()]

    def _computed(self, x: Tensor) -> Tensor:
        """Apply the layer on the programmed chip, or on several, with its converters."""
        if self.periphery is None or not self.varies:
            return self._product(x, self.bias)
        sums = self.periphery.outputs(self._product(self.periphery.inputs(x), None))
        return sums if self.bias is None else sums + self.along_outputs(self.bias.to(sums.dtype))

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the layer with another bias, without converters."""
        return self._on_chips(x, bias) if self._shares_batch else self._apply_weight(x, self.chip_weight(), bias)

    def along_outputs(self, bias: Tensor) -> Tensor:
        """Return a number for each output in the dimensions of the layer's outputs."""
        return bias

    def _on_chips(self, x: Tensor, bias: Tensor | None) -> Tensor:
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
            return self._operator(parts, noise, bias).flatten(0, 1)
        return torch.cat(
            [self._apply_weight(part, self._draw_chip(chip), bias) for part, chip in zip(parts, samples, strict=True)]
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

    def _apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the layer to x with `weight` and `bias` in place of its own."""
        raise NotImplementedError

    def _operator(self, parts: Tensor, noise: KernelNoise, bias: Tensor | None) -> Tensor:
        """Apply the layer's operator to `parts` (S, N, ...), one of each of the S chips."""
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> AnalogLayer:
        twin = super().__deepcopy__(memo)
        twin.__dict__["_copied_from"] = (*self._copied_from, *traces(self, "weight"))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k != "_copied_from"}


@survives_reload
class AnalogLinear(AnalogLayer, nn.Linear):
    """y = x W^T + b with W on the programmed chip and b digital. x (..., in), W (out, in), y (..., out)."""

    plain = nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self._computed(x)

    def _apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `AnalogLayer._apply_weight`."""
        return F.linear(x, weight, bias)

    def _operator(self, parts: Tensor, noise: KernelNoise, bias: Tensor | None) -> Tensor:
        """See `AnalogLayer._operator`."""
        address = {"seed": self.chip.seed, "layer": self.layer_index, "samples": self.chip.sample}
        y = noisy_linear(parts.flatten(1, -2), self.nominal, bias, **address, **noise._asdict())
        return y.unflatten(1, parts.shape[1:-1])


@survives_reload
class AnalogConv2d(AnalogLayer, nn.Conv2d):
    """y = x * W + b with W on the programmed chip and b digital. x (N, in, H, W), W (out, in / groups, kh, kw)."""

    plain = nn.Conv2d

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self._computed(x)

    def _apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `AnalogLayer._apply_weight`."""
        return self._conv_forward(x, weight, bias)

    def along_outputs(self, bias: Tensor) -> Tensor:
        """See `AnalogLayer.along_outputs`."""
        return bias[:, None, None]

    def _operator(self, parts: Tensor, noise: KernelNoise, bias: Tensor | None) -> Tensor:
        """See `AnalogLayer._operator`."""
        address = {"seed": self.chip.seed, "layer": self.layer_index, "samples": self.chip.sample}
        geometry = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}
        return noisy_conv2d(parts, self.nominal, bias, **address, **noise._asdict(), **geometry)

    def _operator_fits(self, x: Tensor) -> bool:
        return self.padding_mode == "zeros" and not isinstance(self.padding, str) and super()._operator_fits(x)


ANALOG: dict[type[nn.Module], type[AnalogLayer]] = {nn.Linear: AnalogLinear, nn.Conv2d: AnalogConv2d}
"""by class, the analog layers that compute several chips at once by the operators"""


def crossbar_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of every crossbar of the original network, see `correctnet.crossbar.kinds.crossbars`.

    The position in this order is the layer index of the noise, apart from parameters that are named one by one;
    excluded layers count as well. Layers that were added in digital hardware (generators, compensators) are not part of
    the original network and do not count.
    """
    for crossbar in crossbars(model):
        yield crossbar.name, crossbar.module


def analog_layers(model: nn.Module) -> list[OnCrossbar]:
    """Return the weights that can carry variation, by layer index; a layer with one weight is that weight's object."""
    found = (own for m in model.modules() if isinstance(m, AnalogModule) for own in m.crossbars())
    return sorted(found, key=lambda own: own.layer_index)


def analog_names(model: nn.Module) -> dict[int, str]:
    """Return the names of a converted network's weights that can carry variation, by identity, see `Crossbar.name`."""
    return {
        id(own): name if own is module else ".".join(filter(None, (name, own.parameter)))
        for name, module in model.named_modules()
        if isinstance(module, AnalogModule)
        for own in module.crossbars()
    }


def trained_weight(layer: nn.Module) -> Tensor:
    """Return `nominal_weight`, derived anew where torch's old functions derive it before each pass."""
    found = derived(layer, "weight")
    return nominal_weight(layer) if found is None else found


def nominal_weight(layer: nn.Module) -> Tensor:
    """Return the trained weights of a layer, analog or not, whichever chip is programmed."""
    return layer.nominal if isinstance(layer, AnalogLayer) else layer.weight
