"""Operations that move pixels: padding of any kind, and upsampling by copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

PADS = (nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d, nn.ConstantPad2d)
UPSAMPLINGS = (nn.Upsample, nn.UpsamplingNearest2d)

Moves = tuple[tuple[int, ...], tuple[int, ...]]
"""the row and the column of the input that each row and column of the result shows; -1 for zeros"""


def moves(shape: tuple[int, ...], run: Callable[[Tensor], Tensor]) -> Moves | None:
    """Find which pixels an operation on maps (C, H, W) shows where, by running it on maps of their numbers.

    None where some pixel of the result is not one of the input or zero, or is not found by its row and column alone.
    """
    height, width = shape[1:]
    numbers = [
        torch.arange(1.0, height + 1).view(1, 1, height, 1).expand(1, 1, height, width).contiguous(),
        torch.arange(1.0, width + 1).view(1, 1, 1, width).expand(1, 1, height, width).contiguous(),
    ]
    rows, cols = (run(image)[0, 0] for image in numbers)
    row_of, col_of = rows.amax(1), cols.amax(0)
    shown = (row_of > 0)[:, None] & (col_of > 0)
    expected = torch.where(shown, row_of[:, None], 0), torch.where(shown, col_of, 0)
    # A constant that is padded with does not double.
    doubled = torch.equal(run(2 * numbers[0])[0, 0], 2 * rows)
    if not doubled or not torch.equal(rows, expected[0]) or not torch.equal(cols, expected[1]):
        return None
    if not torch.equal(row_of, row_of.round()) or not torch.equal(col_of, col_of.round()):
        return None
    return tuple((row_of.int() - 1).tolist()), tuple((col_of.int() - 1).tolist())


def of_padding(conv: nn.Conv1d | nn.Conv2d, shape: tuple[int, ...]) -> Moves | None:
    """Return what the padding of a convolution does that is not the same number of zeros on both sides."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    sides = (*conv._reversed_padding_repeated_twice, 0, 0)[:4]
    return moves((shape[0], *(1,) * (3 - len(shape)), *shape[1:]), lambda x: F.pad(x, sides, mode=mode))


def of_module(module: nn.Module, shape: tuple[int, ...]) -> Moves | None:
    """Return what a module that pads or upsamples does; None for another."""
    kind = type(module)
    if kind in PADS or (kind in UPSAMPLINGS and module.mode in ("nearest", "nearest-exact")):
        return moves(shape, module.forward)
    return None


def of_function(node: fx.Node, shape: tuple[int, ...]) -> Moves | None:
    """Return what a call of F.pad or F.interpolate does; None where an argument is itself computed."""

    def number(value: fx.Node) -> Any:
        return value.meta.get("size", value)

    if node.target is F.interpolate:
        mode = node.kwargs.get("mode", node.args[3] if len(node.args) > 3 else "nearest")
        if mode not in ("nearest", "nearest-exact"):
            return None
    args = fx.node.map_arg(node.args[1:], number)
    kwargs = fx.node.map_arg(node.kwargs, number)
    found: list[fx.Node] = []
    fx.node.map_arg((args, kwargs), found.append)
    return None if found else moves(shape, lambda x: node.target(x, *args, **kwargs))
