"""The chip that a converted network carries, and weights on it as code that reads a layer's attributes sees them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from correctnet.reloading import survives_reload


class Watcher(Protocol):
    """Observer of every weight that a layer draws (`correctnet.crossbar.probe.Probe`)."""

    def drawing(self, layer: Any, draw: Callable[[], Tensor]) -> Tensor:
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
