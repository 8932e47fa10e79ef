"""The operation of a plan that a node of a traced network is."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from correctnet.crossbar.layers import AnalogModule
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
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    owner, _, name = node.target.rpartition(".")
    tensor, module = operator.attrgetter(node.target)(root), root.get_submodule(owner)
    digital = not isinstance(module, AnalogModule) or module.crossbar(name) is None
    return tensor if digital and isinstance(tensor, Tensor) and tensor.dtype == torch.float32 else None
