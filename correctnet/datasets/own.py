"""Data of your own: a folder of pictures, arrays in an .npz file, or arrays that a function returns.

`describe` finds numbers of images, their sizes, channels and classes, and a digest of the content, before anything is
computed and without torch; `read` gives the records. Both see the same: files are in an order of their content, so that
a renamed or copied picture changes nothing, and a changed one does.

    FOLDER/CLASS/*.png              a sub-folder a class; 20 % of the pictures, always the same, are the test images
    FOLDER/{train,test}/CLASS/*     the same with test images of their own
    FILE.npz                        train_images, train_labels, test_images, test_labels, or images and labels
    package.module:function         returns ((images, labels), (images, labels)), or (images, labels) to be split

Arrays of images are (N, H, W), (N, C, H, W) or (N, H, W, C), of 8 bits or floating point; labels are (N,) whole numbers
from 0 on.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from correctnet.datasets import arrays, pictures
from correctnet.datasets.description import Description, facts_of, test_images, unreadable
from correctnet.files import storage
from correctnet.files.factories import call, source_digest

if TYPE_CHECKING:
    from correctnet.datasets.base import Records

Kind = Literal["folder", "npz", "factory"]


def name_of(kind: Kind, place: str) -> str:
    """What own data is called in tables: its folder, its file without .npz, or its function."""
    if kind == "factory":
        return place.rpartition(":")[2]
    path = Path(place).expanduser().absolute()
    return path.name if kind == "folder" else path.stem


def describe(kind: Kind, place: str, digest: str | None = None) -> Description:
    """Describe the data at `place`; files that have not changed since are not read again by this process.

    With the `digest` of a description that this process has made, it is that one, and no file is looked at: a workflow
    asks for each of its jobs. Raises UserError where there is no such data, or it is not of one shape.
    """
    path = Path(place).expanduser()
    key = (kind, place if kind == "factory" else str(path.absolute()))
    stamp, known = _described.get(key, (None, None))
    if known is not None and known.digest == digest:
        return known
    if kind == "factory":
        found = source_digest(place, "data.factory")
        return known if known is not None and known.digest == found else Description(found, None)
    now = _stamp(pictures.listing(path).paths() if kind == "folder" else [path])
    if known is None or stamp != now:
        known = pictures.describe(path) if kind == "folder" else arrays.describe(path)
        _described[key] = now, known
    return known


_described: dict[tuple[str, str], tuple[Any, Description]] = {}


def read(kind: Kind, place: str) -> tuple[Records, Records, str, int]:
    """Training and test records, the digest of the content, and the number of classes.

    Images are (N, C, H, W), uint8 or float32; labels int64. Training records are in the order of their content, test
    records permuted as those of `correctnet.datasets` are. Raises UserError as `describe` does.
    """
    from correctnet.datasets.base import TEST_SEED, content_order, permuted, record_digests  # imports torch

    path = Path(place).expanduser()
    if kind == "folder":
        parts, digests, digest, classes = pictures.read(path)
    else:
        if kind == "npz":
            parts, digest = arrays.read(path), storage.sha256(path)
        else:
            digest = source_digest(place, "data.factory")
            parts = arrays.parts_of(call(place, {}, "data.factory"), place)
        described = {part: arrays.Shape.of(place, part, *records) for part, records in parts.items()}
        classes, one = arrays.check_parts(place, described), next(iter(described.values()))
        counts = {part: shape.count for part, shape in described.items()}
        facts = facts_of(place, counts, one.channels, classes, one.height, one.width)
        if kind == "factory":
            _described[kind, place] = None, Description(digest, facts)
        parts = {
            part: (described[part].arrange(place, images), described[part].labels)
            for part, (images, _) in parts.items()
        }
        digests = {part: record_digests(*records) for part, records in parts.items()}
    ordered = {}
    for part, (images, labels) in parts.items():
        order = content_order(digests[part])
        ordered[part] = images[order], labels[order]
    rng = np.random.default_rng(TEST_SEED)
    if "train" in ordered:
        return ordered["train"], permuted(ordered["test"], rng), digest, classes
    images, labels = permuted(ordered[""], rng)
    count = test_images(len(labels))
    return (images[count:], labels[count:]), (images[:count], labels[:count]), digest, classes


def _stamp(paths: list[Path]) -> list[tuple[str, int, int]]:
    """What tells files that were not touched from those that were."""
    found = []
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            raise unreadable(path, error) from error
        found.append((str(path), status.st_size, status.st_mtime_ns))
    return found
