"""Several input tensors of a network in the place of one, and the forms that a batch may have."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from correctnet.datasets.base import Split
from correctnet.errors import UserError

LABELS = ("labels", "label", "targets", "target", "y")
"""keys of a dict that may hold the labels, in this order; all others are inputs"""


class Inputs:
    """Input tensors of a network, (N, ...) each, by name or in order, that are cut, copied and moved together.

    Args:
        tensors: by name, or a sequence. Raises UserError for another number of items in one than in the others.
    """

    def __init__(self, tensors: Mapping[str, Tensor] | Sequence[Tensor]):
        self.named = isinstance(tensors, Mapping)
        self.tensors: dict[Any, Tensor] = dict(tensors.items() if isinstance(tensors, Mapping) else enumerate(tensors))
        lengths = {key: len(t) if t.dim() else -1 for key, t in self.tensors.items()}
        if len(set(lengths.values())) != 1 or -1 in lengths.values():
            found = ", ".join(f"{key} {tuple(t.shape)}" for key, t in self.tensors.items())
            raise UserError(f"inputs have different numbers of items: {found}")

    def each(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """The inputs with each tensor replaced by the function's value."""
        new = {key: function(tensor) for key, tensor in self.tensors.items()}
        return Inputs(new if self.named else list(new.values()))

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, part: Any) -> Inputs:
        return self.each(lambda tensor: tensor[part])

    def split(self, size: int) -> list[Inputs]:
        """Parts of at most `size` items."""
        return [self[i : i + size] for i in range(0, len(self), size)]

    def to(self, device: Any) -> Inputs:
        """The inputs on another device."""
        return self.each(lambda tensor: tensor.to(device))

    def clone(self) -> Inputs:
        """A copy."""
        return self.each(torch.clone)

    def detach(self) -> Inputs:
        """The same values without gradients."""
        return self.each(lambda tensor: tensor.detach())

    @property
    def device(self) -> torch.device:
        """The device of the first tensor."""
        return next(iter(self.tensors.values())).device

    def arguments(
        self, model: nn.Module, values: Sequence[Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of the network: one each, or a single dict or tuple if it takes no more.

        `values` take the places of the tensors.
        """
        values = tuple(self.tensors.values() if values is None else values)
        by_name = dict(zip(self.tensors, values, strict=True))
        args, kwargs = ((), dict(by_name)) if self.named else (values, {})
        try:
            inspect.signature(model.forward).bind(*args, **kwargs)
        except TypeError:
            return (by_name if self.named else values,), {}
        except ValueError:  # it has no signature
            pass
        return args, kwargs


def tensors_of(inputs: Tensor | Inputs) -> list[tuple[str, Tensor]]:
    """The tensors of inputs, with their names; that of a single one is empty."""
    if isinstance(inputs, Tensor):
        return [("", inputs)]
    return [(str(key), tensor) for key, tensor in inputs.tensors.items()]


def signature(inputs: Tensor | Inputs) -> Any:
    """Names, shapes without the items, and types: equal for inputs that can be concatenated."""
    return tuple((name, tensor.shape[1:], tensor.dtype) for name, tensor in tensors_of(inputs))


def described(inputs: Tensor | Inputs) -> str:
    """Shapes and types in words, for a message."""

    def kind(tensor: Tensor) -> str:
        return f"shape {tuple(tensor.shape)} and type {str(tensor.dtype).removeprefix('torch.')}"

    return "; ".join(f"input {name} of {kind(t)}" if name else f"images of {kind(t)}" for name, t in tensors_of(inputs))


def size_of(inputs: Tensor | Inputs) -> int:
    """Bytes of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for _, tensor in tensors_of(inputs))


def joined(parts: Sequence[Any]) -> Any:
    """Inputs of the same signature, or labels, one after the other."""
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))
    new = {key: torch.cat([part.tensors[key] for part in parts]) for key in parts[0].tensors}
    return Inputs(new if parts[0].named else list(new.values()))


def called(model: nn.Module, inputs: Tensor | Inputs) -> Any:
    """The network's outputs for inputs, which are handed over as they are."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    args, kwargs = inputs.arguments(model)
    return model(*args, **kwargs)


def as_inputs(value: Any) -> Tensor | Inputs | None:
    """The inputs of a network: a tensor, or a dict, tuple or list of tensors, a single one alone; None otherwise."""
    if isinstance(value, Tensor | Inputs):
        return value
    if isinstance(value, Mapping | tuple | list) and value:
        tensors = list(value.values() if isinstance(value, Mapping) else value)
        if all(isinstance(tensor, Tensor) for tensor in tensors):
            return tensors[0] if len(tensors) == 1 else Inputs(value)
    return None


def as_pair(data: Any) -> tuple[Any, Tensor] | None:
    """(inputs, labels) of a batch, or of data that is not divided into batches; None for anything else.

    These are: a `Split`; a pair whose first element is as for `as_inputs`; a tuple or list of several tensors, of which
    the last are the labels; a dict with one of `LABELS`.
    """
    if isinstance(data, Split):
        return data.images, data.labels
    if isinstance(data, Mapping):
        key = next((key for key in LABELS if key in data), None)
        inputs = None if key is None else as_inputs({name: t for name, t in data.items() if name != key})
        return (inputs, data[key]) if inputs is not None and isinstance(data[key], Tensor) else None
    if not isinstance(data, tuple | list) or len(data) < 2 or not isinstance(data[-1], Tensor):
        return None
    inputs = as_inputs(data[0] if len(data) == 2 else data[:-1])
    return None if inputs is None else (inputs, data[-1])
