"""Analog modules of kinds that the operators do not compute, and the change of a module's class when it is converted.

They compute with the forward of their original class, which reads the weights from the module's attributes.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map

from correctnet.crossbar.chips import Chip
from correctnet.crossbar.kinds import Crossbar, kind_of, plain_type
from correctnet.crossbar.layers import ANALOG, AnalogLayer, AnalogModule, OnCrossbar, Part, is_reader, reader, traces
from correctnet.devices.base import Variation
from correctnet.errors import UserError
from correctnet.reloading import survives_reload


@survives_reload
class Divided(AnalogModule):
    """A module that is called with a batch; several chips each get an equal part of it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the original class does, with the weights on the programmed chip, or on several chips."""
        self._check_readers()
        if isinstance(self.chip.sample, tuple) and any(own.varies for own in self.crossbars()):
            return self._on_each(super().forward, args, kwargs)
        return super().forward(*args, **kwargs)

    def batch_axis(self, name: str, value: Tensor) -> int | None:
        """Return the axis of the batch in an argument; None where all chips share the argument."""
        return 0

    def output_axis(self, position: int) -> int:
        """Return the axis of the batch in the output, or in that of several with this position."""
        return 0

    def _on_each(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        chips, outputs = self.chip.sample, []
        bound = inspect.signature(forward).bind(*args, **kwargs)
        for i in range(len(chips)):
            part = {name: self._part(name, value, i) for name, value in bound.arguments.items()}
            own = inspect.BoundArguments(bound.signature, part)
            self.chip.sample = chips[i]
            try:
                outputs.append(forward(*own.args, **own.kwargs))
            finally:
                self.chip.sample = chips
        return self._joined(outputs, 0)

    def _part(self, name: str, value: Any, i: int) -> Any:
        """Return what the i-th chip gets of an argument."""
        chips = len(self.chip.sample)
        if isinstance(value, PackedSequence):
            raise UserError("program: several chips cannot share a packed sequence; program one chip")

        def part(tensor: Any) -> Any:
            axis = self.batch_axis(name, tensor) if isinstance(tensor, Tensor) else None
            if axis is None:
                return tensor
            if tensor.dim() <= max(axis, 1) or tensor.shape[axis] % chips:
                raise UserError(
                    f"program: {chips} chips share each batch; an input of shape {tuple(tensor.shape)} cannot be "
                    "divided evenly among them"
                )
            return tensor.chunk(chips, axis)[i]

        return tree_map(part, value)

    def _joined(self, outputs: list[Any], position: int) -> Any:
        if isinstance(outputs[0], tuple):
            return tuple(self._joined(list(each), i) for i, each in enumerate(zip(*outputs, strict=True)))
        return torch.cat(outputs, self.output_axis(position)) if isinstance(outputs[0], Tensor) else outputs[0]


@survives_reload
class AnalogOther(AnalogLayer, Divided):
    """A layer that reads its attribute `weight`: convolutions of other dimensions, transposed ones, subclasses."""

    def batch_axis(self, name: str, value: Tensor) -> int | None:
        """See `Divided.batch_axis`."""
        axes = len(self.kernel_size) + 2 if isinstance(self, nn.modules.conv._ConvNd) else 2
        if value.dim() < axes:
            raise UserError(f"program: several chips share each batch; an input {tuple(value.shape)} has none")
        return 0


@survives_reload
class AnalogAttention(Divided):
    """`nn.MultiheadAttention`: one crossbar for the weights of queries, keys and values, or one for each.

    torch's fused kernels read the same attributes. The output projection is a layer of its own.
    """

    def batch_axis(self, name: str, value: Tensor) -> int | None:
        """See `Divided.batch_axis`."""
        if name in ("query", "key", "value"):
            if value.dim() != 3:
                raise UserError(f"program: several chips share each batch; an input {tuple(value.shape)} has none")
            return 0 if self.batch_first else 1
        return None if name == "attn_mask" and value.dim() == 2 else 0

    def output_axis(self, position: int) -> int:
        """See `Divided.output_axis`."""
        return 1 if position == 0 and not self.batch_first else 0


@survives_reload
class AnalogRecurrent(Divided):
    """`nn.LSTM`, `nn.GRU`, `nn.RNN`: one crossbar for each weight, with the rows of all gates."""

    def _update_flat_weights(self) -> None:
        # torch computes with this list of all weights and biases, and renews it where the attributes are other objects.
        self._flat_weights = [getattr(self, name, None) for name in self._flat_weights_names]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See `Divided.forward`."""
        try:
            return super().forward(*args, **kwargs)
        finally:  # a copy or a check of types must not find the weights of a chip
            self._flat_weights = [self._nominal_or_none(name) for name in self._flat_weights_names]

    def _nominal_or_none(self, name: str) -> Tensor | None:
        found = self._parameters.get(name)
        return self.__dict__.get(name) if found is None else found

    def batch_axis(self, name: str, value: Tensor) -> int | None:
        """See `Divided.batch_axis`."""
        if value.dim() != 3:
            raise UserError(f"program: several chips share each batch; an input {tuple(value.shape)} has none")
        return 0 if name == "input" and self.batch_first else 1

    def output_axis(self, position: int) -> int:
        """See `Divided.output_axis`."""
        return 0 if position == 0 and self.batch_first else 1


@survives_reload
class AnalogCell(Divided):
    """`nn.LSTMCell`, `nn.GRUCell`, `nn.RNNCell`: a crossbar each for the weights of the input and of the state."""


_BASES = {nn.MultiheadAttention: AnalogAttention, nn.RNNBase: AnalogRecurrent, nn.RNNCellBase: AnalogCell}


@functools.cache
def analog_type(plain: type[nn.Module], readers: tuple[str, ...], single: bool) -> type[AnalogModule]:
    """Return the analog class of modules of class `plain`.

    Args:
        plain: the original class.
        readers: the parameters on crossbars, apart from the one that the module is itself.
        single: whether that is `weight`.
    """
    if single and not readers and plain in ANALOG:
        return ANALOG[plain]
    if single:
        base = ANALOG.get(plain, AnalogOther)
    else:
        base = next((analog for kind, analog in _BASES.items() if issubclass(plain, kind)), AnalogModule)
    own: dict[str, Any] = {name: reader(name) for name in readers}
    own |= {"plain": plain, "__module__": AnalogModule.__module__, "__reduce_ex__": _reduced}
    bases = (base,) if issubclass(base, plain) else (base, plain)
    return type(f"Analog{plain.__name__}", bases, own)


def _reduced(module: AnalogModule, protocol: Any) -> Any:
    """Pickle a module whose class is made by `analog_type`."""
    own = next(kind for kind in type(module).__mro__ if "plain" in vars(kind))
    readers = tuple(name for name, value in vars(own).items() if is_reader(value))
    return _remade, (own.plain, readers, isinstance(module, AnalogLayer)), *object.__reduce_ex__(module, protocol)[2:]


def _remade(plain: type[nn.Module], readers: tuple[str, ...], single: bool) -> nn.Module:
    """Return an empty object of the analog class of a pickled module."""
    kind = analog_type(plain, readers, single)
    return kind.__new__(kind)


def make_analog(
    module: nn.Module, crossbars: list[Crossbar], variation: Variation, chip: Chip, original: nn.Module
) -> str | None:
    """Turn a plain module, a copy of `original`, into an analog one in place, with these of its parameters.

    Returns an attribute of the module that one of analog modules would hide, or that would hide one; None: there is
    none. With one the module is left as it is.
    """
    kind = kind_of(module)
    single = kind is not None and kind.parameters(module) == ("weight",)
    single = single and any(each.parameter == "weight" for each in crossbars)
    parts = [each for each in crossbars if not (single and each.parameter == "weight")]
    # A parametrization makes a class for each module, not to be kept for longer than that.
    make = analog_type.__wrapped__ if parametrize.is_parametrized(module) else analog_type
    analog = make(type(module), tuple(each.parameter for each in parts), single)
    if clash := _own_names(analog) & _names(original):
        return min(clash)
    module.__class__, module.chip = analog, chip
    if single:
        module.variation, module._copied_from = variation, traces(original, "weight")
        (module.layer_index,) = (each.index for each in crossbars if each.parameter == "weight")
    if parts:
        module.parts = {
            each.parameter: Part(module, each.parameter, variation, each.index, chip, traces(original, each.parameter))
            for each in parts
        }
    return None


OWN = ("variation", "layer_index", "chip", "parts", "periphery", "_copied_from")
"""attributes of analog modules"""


def _own_names(analog: type[AnalogModule]) -> set[str]:
    """Return the names of what an analog class adds to its plain class, apart from what it replaces on purpose."""
    kinds = [k for k in analog.__mro__ if issubclass(k, OnCrossbar | AnalogModule) and not issubclass(k, analog.plain)]
    names = {name for kind in kinds for name in vars(kind) if not name.startswith("__")} | {"chip", "parts", "plain"}
    names |= {"variation", "layer_index"} if issubclass(analog, OnCrossbar) else set()
    return names - {"forward", "weight", "_update_flat_weights"}


def _names(module: nn.Module) -> set[str]:
    """Return the names of a module's attributes, and of those of its class that are the user's."""
    kinds = [kind for kind in type(module).__mro__ if not kind.__module__.startswith("torch.") and kind is not object]
    own = {*vars(module), *module._parameters, *module._buffers, *module._modules}
    return own | {name for kind in kinds for name in vars(kind) if not name.startswith("__")}


def make_plain(module: AnalogModule) -> None:
    """Give an analog module its original class again; its weights are then the nominal ones."""
    module.__class__ = plain_type(module)
    for name in OWN:
        module.__dict__.pop(name, None)
    if isinstance(module, nn.RNNBase):
        module._flat_weight_refs = [None if w is None else weakref.ref(w) for w in module._flat_weights]


def hold_nominal(module: AnalogModule, parameters: list[str]) -> None:
    """Take parameters of an analog module off their crossbars: they keep their nominal weights on every chip."""
    for name in parameters:
        if name in module.__dict__.get("parts", {}):
            del module.parts[name]
    if "weight" in parameters and isinstance(module, AnalogLayer):
        parts = module.__dict__.get("parts", {})
        module.__class__ = analog_type(plain_type(module), tuple(parts), False) if parts else plain_type(module)
