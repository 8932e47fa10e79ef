"""Images in arrays: of an .npz file, or of what a function returns."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from correctnet.datasets.description import PARTS, Description, facts_of, unreadable
from correctnet.errors import UserError, one_line
from correctnet.files import storage

NAMES = {part: ((f"{part}_images", f"{part}_labels"), (f"x_{part}", f"y_{part}")) for part in PARTS}
"""names of the arrays of an .npz file"""


class Shape(NamedTuple):
    """A part of the data in arrays: how its images lie, and its labels."""

    count: int
    channels: int
    height: int
    width: int
    axis: int | None
    """of the channels; None where there is none"""
    labels: np.ndarray
    """(N,) int64"""

    @classmethod
    def of(cls, place: str | Path, part: str, images: Any, labels: np.ndarray) -> Shape:
        """Of anything with `shape` and `dtype`, and labels. Raises UserError for arrays of another kind."""
        what = f"{place}: {part} images" if part else f"{place}: images"
        shape, dtype = tuple(images.shape), np.dtype(images.dtype)
        if dtype != np.uint8 and dtype.kind != "f":
            raise UserError(f"{what}: uint8 or floating point is expected, not {dtype}")
        if len(shape) not in (3, 4) or 0 in shape:
            raise UserError(f"{what}: (N, H, W), (N, C, H, W) or (N, H, W, C) is expected, not {shape}")
        axis = None
        if len(shape) == 4:
            axis = 1 if shape[1] <= 4 or shape[3] > 4 else 3
        channels = 1 if axis is None else shape[axis]
        height, width = (n for i, n in enumerate(shape) if i not in (0, axis))
        return cls(shape[0], channels, height, width, axis, _labels(what.replace("images", "labels"), labels, shape[0]))

    def arrange(self, place: str | Path, images: np.ndarray) -> np.ndarray:
        """(N, C, H, W), uint8 or float32."""
        if self.axis is None:
            images = images[:, None]
        elif self.axis == 3:
            images = images.transpose(0, 3, 1, 2)
        if images.dtype != np.uint8 and not np.isfinite(images).all():
            raise UserError(f"{place}: images with numbers that are not finite")
        return np.ascontiguousarray(images, images.dtype if images.dtype == np.uint8 else np.float32)


def _labels(what: str, labels: np.ndarray, count: int) -> np.ndarray:
    if labels.ndim == 2 and labels.shape[1] == 1:  # a column, as some collections have it
        labels = labels[:, 0]
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise UserError(f"{what}: whole numbers (N,) are expected, not {labels.shape} {labels.dtype}")
    if len(labels) != count:
        raise UserError(f"{what}: {len(labels)} of them for {count} images")
    if labels.min() < 0:
        raise UserError(f"{what}: classes from 0 on are expected; there is a {labels.min()}")
    return labels.astype(np.int64)


def check_parts(place: str | Path, parts: Mapping[str, Shape]) -> int:
    """The number of classes. Raises UserError where the parts do not go together."""
    shapes = {part: (s.channels, s.height, s.width) for part, s in parts.items()}
    if len(set(shapes.values())) > 1:
        (a, first), (b, second) = shapes.items()
        raise UserError(f"{place}: {a} images are {first} and {b} images {second} (channels, height, width)")
    labels = np.concatenate([s.labels for s in parts.values()])
    classes = int(labels.max()) + 1
    if classes < 2:
        raise UserError(f"{place}: two classes or more are expected; all labels are {labels.max()}")
    seen = np.bincount(next(iter(parts.values())).labels, minlength=classes)
    if not seen.all():
        raise UserError(
            f"{place}: class {int(seen.argmin())} of {classes} has no {'training ' * (len(parts) > 1)}image"
        )
    return classes


class _Header(NamedTuple):
    """Shape and type of an array that was not read."""

    shape: tuple[int, ...]
    dtype: np.dtype


def _names(path: Path, known: list[str]) -> dict[str, tuple[str, str]]:
    """{part: names of its arrays}. Raises UserError where a file has not the arrays that are expected."""
    found = {part: next((pair for pair in NAMES[part] if set(pair) <= set(known)), None) for part in PARTS}
    if all(found.values()):
        return {part: pair for part, pair in found.items() if pair}
    if {"images", "labels"} <= set(known) and not any(found.values()):
        return {"": ("images", "labels")}
    raise UserError(
        f"{path}: arrays train_images, train_labels, test_images and test_labels, or images and labels, are expected, "
        f"not {', '.join(known) or 'none'}"
    )


def describe(path: Path) -> Description:
    """Describe the arrays of an .npz file, without reading its images. Raises UserError where they cannot be used."""
    with _npz(path) as file:
        parts = {
            part: Shape.of(path, part, _header(file, images), file[labels])
            for part, (images, labels) in _names(path, file.files).items()
        }
    classes, first = check_parts(path, parts), next(iter(parts.values()))
    counts = {part: s.count for part, s in parts.items()}
    facts = facts_of(str(path), counts, first.channels, classes, first.height, first.width)
    return Description(storage.sha256(path), facts)


def _header(file: Any, name: str) -> _Header:
    with file.zip.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, _, dtype = reader(member)
    return _Header(shape, dtype)


def read(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images and labels of an .npz file, by part."""
    with _npz(path) as file:
        return {part: (file[images], file[labels]) for part, (images, labels) in _names(path, file.files).items()}


@contextlib.contextmanager
def _npz(path: Path) -> Iterator[Any]:
    """An .npz file that is open; mistakes in it become a UserError in one line. No pickles."""
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise UserError(f"{path}: a single array; an .npz file of several is expected")
        with file:
            yield file
    except FileNotFoundError as error:
        raise unreadable(path, error) from error
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: no .npz file that can be read ({one_line(error, 80)})") from error


def parts_of(found: Any, place: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What a function of data returned, as arrays."""
    expected = (
        f"data.factory: {place}: ((images, labels), (images, labels)), (images, labels), or data sets of torch in "
        "their place are expected"
    )

    def pair(value: Any) -> bool:
        return isinstance(value, tuple | list) and len(value) == 2

    if _is_dataset(found):
        parts = {"": found}
    elif not pair(found):
        raise UserError(f"{expected}, not {type(found).__name__}")
    else:
        both = all(pair(value) or _is_dataset(value) for value in found)
        parts = dict(zip(PARTS, found, strict=True)) if both else {"": found}
    arrays = {}
    for part, value in parts.items():
        try:
            images, labels = _items(value) if _is_dataset(value) else value
            arrays[part] = np.asarray(images), np.asarray(labels)  # tensors, too
        except UserError:
            raise
        except Exception as error:  # a data set is code that is not ours
            raise UserError(f"{expected}, arrays or tensors ({one_line(error, 80)})") from error
    return arrays


def _is_dataset(value: Any) -> bool:
    """Whether a value is like a `torch.utils.data.Dataset` of which each item can be had."""
    return (
        not isinstance(value, tuple | list | Mapping | str)
        and not hasattr(value, "shape")
        and all(hasattr(value, name) for name in ("__len__", "__getitem__"))
    )


def _items(dataset: Any) -> tuple[np.ndarray, np.ndarray]:
    """All images and labels of a data set; each item is (image, label)."""
    items = [dataset[i] for i in range(len(dataset))]
    return np.stack([np.asarray(image) for image, _ in items]), np.array([int(label) for _, label in items])
