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
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import nn


class Work(NamedTuple):
    """The size of a network on an image of 32 x 32 pixels, approximately: for estimates of memory and time."""

    multiply_adds: float
    weights: float
    layers: int
    """convolutions and linear layers"""


def some_work(widths: tuple[int, ...], channels: int) -> Work:
    """A network about which nothing is known: a sixth of the usual VGG16."""
    return Work(50e6, 2.5e6, len(widths) + 1 if widths else 15)


def _lenet5_work(widths: tuple[int, ...], channels: int) -> Work:
    a, b, c, d = widths
    first, second, linear = 25 * channels * a, 25 * a * b, 25 * b * c + c * d + 10 * d
    return Work(28 * 28 * first + 10 * 10 * second + linear, first + second + linear, 5)


def _vgg16_work(widths: tuple[int, ...], channels: int) -> Work:
    share = (sum(widths) / 4736) ** 2  # of the usual VGG16, whose widths add up to 4736
    return Work(313e6 * share, 15e6 * share, 15)


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
    work: Callable[[tuple[int, ...], int], Work] = some_work
    """its size, of widths and channels of the images"""
    memory: int = 900
    """MiB that training or simulating it adds to a process; resources.csv in results/reference has those measured"""

    def make(self) -> Callable[..., nn.Module]:
        """The function that makes it; imports its module."""
        module, name = self.where.split(":")
        return getattr(import_module(f"correctnet.networks.{module}"), name)

    def options(self, widths: tuple[int, ...], batchnorm: str, dropout: float) -> dict[str, Any]:
        """Its arguments beside `classes` and `channels`, from settings; empty `widths`: the default ones."""
        own = {"batchnorm": batchnorm} if self.batchnorm else {}
        return {"dropout": dropout, "widths": widths or self.widths, **own}


NETWORKS = {
    "lenet5": Architecture(
        "lenet:lenet5", (6, 16, 120, 84), "conv1, conv2, linear1, linear2", work=_lenet5_work, memory=0
    ),
    "vgg16": Architecture(
        "vgg:vgg16",
        (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512, 512),
        "conv1, ..., conv13, linear1",
        batchnorm=True,
        any_size=True,
        work=_vgg16_work,
    ),
}
