"""What a data set is: images and labels in three parts, and an order of records that is their own.

Records are put in an order of their own content before anything is drawn, so that copies of a data set that store
them in another order give the same splits and the same prefixes. For the same reason a data set is identified by its
records, whatever their order: a digest of their digests tells it from a damaged copy, and from another data set of the
same sizes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

# Seed of the order of the test images (and of digits' test split): the same in every run, so that all rows of all runs
# are about the same images. Never a setting.
TEST_SEED = 20230417

Records = tuple[np.ndarray, np.ndarray]  # (N, C, H, W) uint8 images, (N,) uint8 labels


class Source(Protocol):
    """Where the records of a data set come from; what a module of `correctnet.datasets` defines.

    Attributes:
        mean, std: per channel, of images scaled to 0 to 1. Those of the publisher's whole training set, not of a split
            of it: the same image is the same input whatever is held out for validation.
        digest: identifies the records, in hexadecimal; known without reading them.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def digest(self) -> str: ...

    def fetch(self, root: Path) -> Path:
        """Download what is missing into `root`; the folder that holds the files."""

    def records(self, root: Path) -> tuple[Records, Records]:
        """Training and test records of 32 x 32 images: the former in the order of their content, the latter permuted
        with `TEST_SEED`."""


@dataclass(frozen=True)
class Split:
    """Images and their labels.

    Attributes:
        images: (N, C, H, W) float32, normalised per channel; 32 x 32 in the data sets of `correctnet.datasets`.
        labels: (N,) int64.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, count: int | None) -> Split:
        """The first `count` images, a fair sample of all; None: all."""
        return self if count is None else Split(self.images[:count], self.labels[:count])

    def to(self, device: str) -> Split:
        """The split on another device."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class DataSet:
    """A data set in its three parts; every choice is made on `validation`, never on `test`."""

    name: str
    train: Split
    validation: Split
    test: Split
    classes: int
    channels: int
    digest: str = ""
    """of all records before they were split (`Source.digest`); '' where it is not known"""

    def to(self, device: str) -> DataSet:
        """The data set on another device."""
        parts = (part.to(device) for part in (self.train, self.validation, self.test))
        return DataSet(self.name, *parts, self.classes, self.channels, self.digest)


def permuted(records: Records, rng: np.random.Generator) -> Records:
    order = rng.permutation(len(records[1]))
    return records[0][order], records[1][order]


def record_digests(images: np.ndarray, labels: np.ndarray) -> list[bytes]:
    """16 bytes for each record, of its image and label."""
    return [
        hashlib.blake2b(image.tobytes() + label.tobytes(), digest_size=16).digest()
        for image, label in zip(images, labels, strict=True)
    ]


def content_order(digests: Sequence[bytes]) -> np.ndarray:
    """The permutation that sorts records by their digests; equal records are interchangeable."""
    return np.argsort(np.array(digests, dtype="V16").view("S16"), kind="stable")


def part_digest(digests: Sequence[bytes]) -> str:
    """Of all records of a part by their digests, in whatever order they are stored, in hexadecimal."""
    return hashlib.blake2b(b"".join(sorted(digests)), digest_size=16).hexdigest()
