"""Data sets as tensors of 32 x 32 images, data of one's own (`own`), and the contract for data of any kind.

To add a data set, write a module that defines a `correctnet.datasets.base.Source`, and add a line to `DATASETS`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from correctnet.errors import UserError

if TYPE_CHECKING:
    from correctnet.datasets.base import Source


@dataclass(frozen=True)
class Facts:
    """Facts about a data set that settings are checked against, known without torch and without the files."""

    where: str
    """module and name of its `Source`; '' for data of one's own (`correctnet.datasets.own`)"""
    train: int
    """training images"""
    test: int
    """test images"""
    channels: int
    classes: int
    height: int = 32
    """of the images, in pixels"""
    width: int = 32

    def source(self) -> Source:
        """The source of the records; imports its module."""
        module, name = self.where.split(":")
        return getattr(import_module(f"correctnet.datasets.{module}"), name)


DATASETS = {
    "digits": Facts("digits:DIGITS", train=1438, test=359, channels=1, classes=10),
    "mnist": Facts("mnist:MNIST", train=60000, test=10000, channels=1, classes=10),
    "cifar10": Facts("cifar:CIFAR10", train=50000, test=10000, channels=3, classes=10),
    "cifar100": Facts("cifar:CIFAR100", train=50000, test=10000, channels=3, classes=100),
}


def facts(name: str) -> Facts:
    """The facts about a data set. Raises UserError for an unknown name."""
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(DATASETS)}"
        raise UserError(f"unknown data set {name!r} ({hint})")
    return DATASETS[name]
