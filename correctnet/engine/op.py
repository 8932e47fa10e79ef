"""The operation of a plan that a node of a traced network is."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from correctnet.crossbar.layers import AnalogModule
from correctnet.engine.trace import call
from correctnet.reloading import survives_reload


@survives_reload
@dataclass(frozen=True)
class Op:
    """An operation that a plan can express.

    Attributes:
        inputs: the nodes that it reads.
        detail: its parameters.
        last: whether the values that it reads have their channels last, (N, ..., C), not first, (N, C, ...); None: as
            they come. Values (N, C) are both.
        turns: whether its result has them the other way.
    """

    kind: Literal[
        "conv",
        "linear",
        "attention",
        "layer_norm",
        "group_norm",
        "affine",
        "activation",
        "max_pool",
        "average_pool",
        "adaptive",
        "flatten",
        "same",
        "concat",
        "taken",
        "reshaped",
        "joined",
        "shifted",
        "pixels",
        "channels",
        "add",
        "multiply",
    ]
    inputs: tuple[fx.Node, ...]
    detail: Any = None
    last: bool | None = False
    turns: bool = False


def constant(root: nn.Module, node: Any) -> Tensor | None:
    """Return a digital float32 parameter or buffer that a node reads; None for any other node."""
    tensor = _read(root, node)
    return tensor if tensor is not None and tensor.dtype == torch.float32 else None


def _read(root: nn.Module, node: Any) -> Tensor | None:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    owner, _, name = node.target.rpartition(".")
    tensor, module = operator.attrgetter(node.target)(root), root.get_submodule(owner)
    digital = not isinstance(module, AnalogModule) or module.crossbar(name) is None
    return tensor if digital and isinstance(tensor, Tensor) else None


# Operations that only move numbers, by their names as methods of tensors.
_MOVES = {
    *("view", "reshape", "permute", "transpose", "swapaxes", "contiguous", "flatten", "unflatten"),
    *("chunk", "split", "unbind", "squeeze", "unsqueeze", "movedim"),
}


def only_moves(node: fx.Node) -> bool:
    """Return whether a node gives numbers of its first argument in another order, or some of them."""
    if node.op == "call_method":
        return node.target in _MOVES
    target = node.target
    return node.op == "call_function" and (
        target is operator.getitem
        or any(target is getattr(torch, name, None) for name in _MOVES)
        or (target is getattr and node.args[1] == "mT")
    )


def moved(root: nn.Module, steps: list[fx.Node], values: dict[fx.Node, Any]) -> bool:
    """Run steps that depend on each other and on sizes alone; return whether they do. Adds to `values`."""
    for step in steps:
        for n in step.all_input_nodes:
            if n not in values and "size" not in n.meta:
                return False
            values.setdefault(n, n.meta.get("size"))
        try:
            values[step] = call(root, step, values)
        except RuntimeError:  # a view of numbers that are not adjacent
            return False
    return True


def known(root: nn.Module, node: Any) -> Tensor | None:
    """Return a digital parameter or buffer, or a part of one, also repeated for each image; None for any other node."""
    steps: list[fx.Node] = []
    while isinstance(node, fx.Node) and node.args and (only_moves(node) or node.target == "expand"):
        steps.append(node)
        node = node.args[0]
    tensor = _read(root, node)
    if tensor is None:
        return None
    values: dict[fx.Node, Any] = {node: tensor.detach().cpu()}
    found = values[steps[0] if steps else node] if moved(root, steps[::-1], values) else None
    return found if isinstance(found, Tensor) else None
