"""Pictures in folders: which there are, their one size, a digest of all, and their pixels."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from correctnet.datasets.description import PARTS, Description, facts_of, unreadable
from correctnet.errors import UserError, one_line

if TYPE_CHECKING:
    from correctnet.datasets.base import Records

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
GREY, COLOURED = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
"""modes of pictures, as Pillow names them, of one and of three channels of 8 bits; transparency is left out"""


class Listing(NamedTuple):
    """The pictures of a folder: {part: {class: files}}, the part '' where there is no test folder."""

    classes: tuple[str, ...]
    files: dict[str, dict[str, list[Path]]]

    def paths(self) -> list[Path]:
        """All files."""
        return [path for of_part in self.files.values() for files in of_part.values() for path in files]


def _entries(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the folders and files in a folder, sorted, hidden ones left out."""
    folders, files = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    (folders if entry.is_dir() else files).append(entry.name)
    except OSError as error:
        raise unreadable(folder, error) from error
    return sorted(folders), sorted(files)


def listing(folder: Path) -> Listing:
    """The pictures of a folder. Raises UserError where it has not two classes, or a class has no picture."""
    names, _ = _entries(folder)
    parts = {"": folder}
    if set(PARTS) & set(names):
        if missing := [part for part in PARTS if part not in names]:
            raise UserError(f"{folder}: has {' and '.join(set(PARTS) & set(names))} and no {missing[0]}")
        if others := [name for name in names if name not in PARTS]:
            raise UserError(f"{folder / others[0]}: beside train and test no other folder is expected")
        parts = {part: folder / part for part in PARTS}
    classes: tuple[str, ...] | None = None
    found: dict[str, dict[str, list[Path]]] = {}
    for part, place in parts.items():
        own = tuple(_entries(place)[0])
        if len(own) < 2:
            raise UserError(f"{place}: a sub-folder for each class is expected, two or more, not {len(own)}")
        if classes is not None and own != classes:
            odd = sorted(set(classes) ^ set(own))[0]
            raise UserError(f"{folder}: class {odd!r} is in one of train and test only")
        classes = own
        found[part] = {name: _pictures(place / name) for name in own}
    return Listing(classes or (), found)


def _pictures(folder: Path) -> list[Path]:
    folders, files = _entries(folder)
    if folders:
        raise UserError(f"{folder / folders[0]}: a folder inside that of a class; pictures are expected")
    if odd := [name for name in files if not name.lower().endswith(SUFFIXES)]:
        raise UserError(f"{folder / odd[0]}: no picture by its name ({', '.join(SUFFIXES)} are read)")
    if not files:
        raise UserError(f"{folder}: the class has no picture; remove the folder or fill it")
    return [folder / name for name in files]


def _opened(path: Path, raw: bytes) -> Any:
    """The picture in the bytes of a file, not yet decoded."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its metadata
            return Image.open(io.BytesIO(raw))
    except Exception as error:  # Pillow raises many kinds for a damaged file
        raise UserError(f"{path}: no picture that can be read ({_without_address(error)})") from error


def _without_address(error: Exception) -> str:
    """A message of Pillow's, which names the object that it reads from."""
    text = one_line(error)
    return "unknown format" if "cannot identify" in text else text or type(error).__name__


class _Walk:
    """One pass over the pictures of a folder: the digest of each, their one size, and how many channels they have."""

    def __init__(self, listing: Listing):
        self.listing = listing
        self.digests: dict[str, list[bytes]] = {part: [] for part in listing.files}
        self.channels = 1
        self._first: tuple[Path, tuple[int, int]] | None = None

    def __iter__(self) -> Iterator[tuple[str, int, Path, Any]]:
        """(part, label, file, picture) of each."""
        for part, of_part in self.listing.files.items():
            for label, files in enumerate(of_part.values()):
                for path in files:
                    raw = _bytes(path)
                    picture = _opened(path, raw)
                    self._check(path, picture)
                    own = hashlib.blake2b(raw, digest_size=16)
                    own.update(label.to_bytes(8, "little"))
                    self.digests[part].append(own.digest())
                    yield part, label, path, picture

    def _check(self, path: Path, picture: Any) -> None:
        if picture.mode in COLOURED:
            self.channels = 3
        elif picture.mode not in GREY:
            raise UserError(f"{path}: pictures of 8 bits a channel are read, not of mode {picture.mode}; use an .npz")
        if self._first is None:
            self._first = path, picture.size
        elif picture.size != self._first[1]:
            other, size = self._first
            raise UserError(
                f"{path}: {_by(picture.size)} pixels, and {other} has {_by(size)}; images of one size are expected"
            )

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)"""
        width, height = self._first[1]  # type: ignore[index]
        return height, width

    def digest(self) -> str:
        """Of all pictures by part and class, whatever their names."""
        whole = hashlib.sha256("\0".join(self.listing.classes).encode("utf-8", "surrogateescape"))
        for part, digests in self.digests.items():
            whole.update(f"\0{part}\0{len(digests)}".encode())
            whole.update(b"".join(sorted(digests)))
        return whole.hexdigest()


def _by(size: tuple[int, int]) -> str:
    """(width, height) for messages."""
    return f"{size[0]} x {size[1]}"


def describe(folder: Path) -> Description:
    """Describe the pictures of a folder. Raises UserError where they cannot be used."""
    walk = _Walk(listing(folder))
    for _ in walk:
        pass
    counts = {part: len(digests) for part, digests in walk.digests.items()}
    facts = facts_of(str(folder), counts, walk.channels, len(walk.listing.classes), *walk.size)
    return Description(walk.digest(), facts)


def read(folder: Path) -> tuple[dict[str, Records], dict[str, list[bytes]], str, int]:
    """Images and labels by part, the digest of each, that of all, and the number of classes."""
    walk = _Walk(listing(folder))
    found: dict[str, tuple[list[np.ndarray], list[int]]] = {part: ([], []) for part in walk.listing.files}
    for part, label, path, picture in walk:
        try:
            decoded = np.asarray(picture.convert("L" if picture.mode in GREY else "RGB"))
        except Exception as error:  # as above
            raise UserError(f"{path}: cannot be read: {_without_address(error)}") from error
        found[part][0].append(decoded)
        found[part][1].append(label)
    parts = {}
    for part, (images, labels) in found.items():
        planes = [image[..., None] if image.ndim == 2 else image for image in images]
        whole = np.stack([np.broadcast_to(p, (*p.shape[:2], walk.channels)) for p in planes])
        parts[part] = np.ascontiguousarray(whole.transpose(0, 3, 1, 2)), np.array(labels, np.int64)
    return parts, walk.digests, walk.digest(), len(walk.listing.classes)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
