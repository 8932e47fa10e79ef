"""Parts of values and their joins: slices and chunks, tokens and maps of another shape, tokens that are parameters."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from correctnet.engine.op import Op, known
from correctnet.engine.trace import bind, shape_of


def part_of(node: fx.Node) -> Op | None:
    """Return a part of a value: one of those of chunk or split, or a slice."""
    source, index = node.args
    if not isinstance(source, fx.Node):
        return None
    if isinstance(index, tuple):
        return _slice(source, index)
    function = {torch.chunk: "chunk", torch.split: "split"}.get(source.target, source.target)
    if source.op not in ("call_function", "call_method") or function not in ("chunk", "split"):
        return None
    name = "chunks" if function == "chunk" else "split_size" if source.op == "call_method" else "split_size_or_sections"
    bound, x = bind(source, (name, "dim"), dim=0), source.args[0]
    shape = shape_of(x) if isinstance(x, fx.Node) else None
    if bound is None or shape is None or len(shape) > 3 or not isinstance(index, int):
        return None
    dim = bound["dim"] % (len(shape) + 1)
    if dim == 0:
        return None
    sizes = [meta.shape[dim] for meta in source.meta["tensor_meta"]]
    index = range(len(sizes))[index]
    first = sum(sizes[:index])
    places = [range(n) for n in shape]
    places[dim - 1] = range(first, first + sizes[index])
    return _taken(x, places)


def _slice(x: fx.Node, index: tuple[Any, ...]) -> Op | None:
    shape = shape_of(x)
    if shape is None or len(shape) > 3:
        return None
    if index == (slice(None), slice(None), None, None) and len(shape) == 1:
        return Op("same", (x,), last=None)
    if any(i is None or isinstance(i, fx.Node) for i in index):
        return None
    rest = len(shape) + 1 - len([i for i in index if i is not Ellipsis])
    if Ellipsis in index:
        where = index.index(Ellipsis)
        index = (*index[:where], *(slice(None),) * rest, *index[where + 1 :])
    else:
        index = (*index, *(slice(None),) * rest)
    if index[0] != slice(None) or not all(isinstance(i, int | slice) for i in index):
        return None
    if any(isinstance(v, fx.Node) for i in index if isinstance(i, slice) for v in (i.start, i.stop, i.step)):
        return None
    numbers = [i for i, item in enumerate(index) if isinstance(item, int)]
    if numbers and len(shape) != 2:
        return None
    # One token, (N, T, C) -> (N, C), or one element of all channels.
    last = {(1,): True, (2,): False, (): None}.get(tuple(numbers))
    if numbers and last is None:
        return None
    places = [
        range(n)[i] if isinstance(i, slice) else range(n)[i : (i + 1) or None]
        for n, i in zip(shape, index[1:], strict=True)
    ]
    return _taken(x, places, last)


def _taken(x: fx.Node, places: list[range], last: bool | None = None) -> Op | None:
    """Return the elements at these places along each dimension."""
    if not all(places):
        return None
    if all(len(p) == n for p, n in zip(places, shape_of(x), strict=True)) and last is None:
        return Op("same", (x,), last=None)
    return Op("taken", (x,), tuple(tuple(p) for p in places), last=last)


def reshaped(shape: tuple[int, ...], node: fx.Node, x: fx.Node) -> Op | None:
    """Return a view that divides or joins the pixels of a value and leaves its channels, such as maps as tokens."""
    result = shape_of(node)
    if result is None or not {len(shape), len(result)} <= {2, 3}:
        return None
    if math.prod(shape) != math.prod(result):
        return None
    for last, channels in ((False, 0), (True, -1)):
        if shape[channels] == result[channels]:
            return Op("reshaped", (x,), _image(result, last)[1:], last=last)
    return None


def _image(shape: tuple[int, ...], last: bool) -> tuple[int, int, int]:
    """Return (C, H, W) of a value with two or three dimensions."""
    channels, *pixels = (shape[-1], *shape[:-1]) if last else shape
    return (channels, *(1,) * (2 - len(pixels)), *pixels)


def _parameter(root: nn.Module, node: Any) -> Tensor | None:
    """Return a float32 parameter, or a part of one, also where it is repeated for each image, (1, ...)."""
    tensor = known(root, node)
    if tensor is None or tensor.dtype != torch.float32:
        return None
    # For the two images of the traced shapes.
    repeated = tensor.dim() > 0 and len(tensor) == 2 and torch.equal(tensor[0], tensor[1])
    return tensor[:1] if repeated and shape_of(node) is not None else tensor


def shifted(root: nn.Module, node: fx.Node) -> Op | None:
    """Return the sum of a value and a parameter with the shape of an image."""
    if len(node.args) != 2 or node.kwargs:
        return None
    for x, other in (node.args, node.args[::-1]):
        shape = shape_of(x) if isinstance(x, fx.Node) else None
        tensor = _parameter(root, other)
        if shape is None or tensor is None or len(shape) > 3 or shape_of(node) != shape:
            continue
        if tensor.dim() > len(shape) and len(tensor) != 1:  # a number for each image
            continue
        return Op("shifted", (x,), tensor.expand(1, *shape)[0].numpy(), last=None)
    return None


def joined(root: nn.Module, node: fx.Node) -> Op | None:
    """Return a concatenation of tokens, of which those of one value differ from image to image, (N, T, C)."""
    bound, result = bind(node, ("dim",), dim=0), shape_of(node)
    if bound is None or result is None or len(result) != 2 or bound["dim"] not in (1, -2):
        return None
    source, tokens, added = None, [], []
    for part in node.args[0]:
        parameter = _parameter(root, part)
        if parameter is not None:
            tokens += [-1] * parameter.shape[1]
            added.append(parameter[0])
        elif source is None and isinstance(part, fx.Node) and shape_of(part) is not None:
            source = part
            tokens += range(shape_of(part)[0])
            added.append(torch.zeros(shape_of(part)))
        else:
            return None
    if source is None:
        return None
    return Op("joined", (source,), (tokens, torch.cat(added).numpy()), last=True)


def emit(plan: Any, op: Op, x: int, shape: tuple[int, ...], last: bool) -> int:
    """Append one of these operations to a plan; return the number of its value.

    Args:
        plan: a `correctnet._native.Plan`.
        op: the operation.
        x: the number of the value that it reads.
        shape: of that value, without the batch.
        last: whether its channels are last.
    """
    if op.kind == "reshaped":
        height, width = op.detail
        return plan.gather(x, height, width, list(range(height * width)))
    if op.kind == "joined":
        tokens, added = op.detail
        return plan.gather(x, 1, len(tokens), tokens, added)
    if op.kind == "shifted":
        added = op.detail if last or op.detail.ndim == 1 else np.moveaxis(op.detail, 0, -1)
        height, width = (1, 1) if len(shape) == 1 else _image(shape, last)[1:]
        return plan.gather(x, height, width, list(range(height * width)), added.reshape(height * width, -1))
    if len(shape) == 1:
        return plan.channels(x, op.detail[0])
    channels, *pixels = (op.detail[-1], *op.detail[:-1]) if last else op.detail
    rows, cols = pixels if len(pixels) == 2 else ((0,), *pixels)
    count, height, width = _image(shape, last)
    if (len(rows), len(cols)) != (height, width):
        x = plan.pixels(x, rows, cols)
    return x if len(channels) == count else plan.channels(x, channels)
