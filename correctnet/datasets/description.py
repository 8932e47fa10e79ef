"""What is known of own data before it is used, whatever it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from correctnet.datasets import Facts
from correctnet.errors import UserError, one_line

TEST = 0.2
"""fraction of the images that are test images where the data does not say which are"""
PARTS = ("train", "test")


@dataclass(frozen=True)
class Description:
    """What is known of own data before it is used."""

    digest: str
    """of the content of the files; for a function, of the source of its module"""
    facts: Facts | None
    """None for a function whose images this process has not read: it is not called to describe it"""


def test_images(count: int) -> int:
    """How many of so many images are test images, where the data does not say which."""
    return round(TEST * count)


def facts_of(place: str, counts: Mapping[str, int], channels: int, classes: int, height: int, width: int) -> Facts:
    """Facts about data of so many images by part; those of the part '' are to be split.

    Raises UserError where none would be left to test.
    """
    if "" in counts:
        test = test_images(counts[""])
        counts = {"train": counts[""] - test, "test": test}
    if not counts["test"]:
        raise UserError(f"{place}: too few images to hold {TEST:.0%} of them out as test images")
    return Facts("", counts["train"], counts["test"], channels, classes, height, width)


def unreadable(path: Path, error: OSError) -> UserError:
    """The UserError for a file or folder that does not exist or cannot be read."""
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path}: no such file or folder")
    return UserError(f"{error.filename or path}: cannot be read: {error.strerror or one_line(error)}")
