"""The networks of the paper.

To add a network, write a module with a function that makes it, and add a line to `NETWORKS`. The function takes
`classes`, `channels` (of the N x channels x 32 x 32 input) and those of `widths`, `batchnorm` and `dropout` that its
`Architecture` names, and gives an `nn.Module`. Compensators can be placed after a whole block where it is made of
`correctnet.networks.blocks.Block`s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Architecture:
    """Facts about a network that settings are checked against, known without torch."""

    where: str
    """module and name of the function that makes it"""
    widths: tuple[int, ...]
    """outputs of each layer but the last, by default"""
    layers: str
    """those layers, for messages"""
    batchnorm: bool = False
    """whether it can have BatchNorm, and takes `batchnorm`"""
    any_size: bool = False
    """whether it takes images of other sizes than 32 x 32"""

    def make(self) -> Callable[..., nn.Module]:
        """The function that makes it; imports its module."""
        module, name = self.where.split(":")
        return getattr(import_module(f"correctnet.networks.{module}"), name)

    def options(self, widths: tuple[int, ...], batchnorm: str, dropout: float) -> dict[str, Any]:
        """Its arguments beside `classes` and `channels`, from settings; empty `widths`: the default ones."""
        own = {"batchnorm": batchnorm} if self.batchnorm else {}
        return {"dropout": dropout, "widths": widths or self.widths, **own}


NETWORKS = {
    "lenet5": Architecture("lenet:lenet5", (6, 16, 120, 84), "conv1, conv2, linear1, linear2"),
    "vgg16": Architecture(
        "vgg:vgg16",
        (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512, 512),
        "conv1, ..., conv13, linear1",
        batchnorm=True,
        any_size=True,
    ),
}
