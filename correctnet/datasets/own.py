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

import contextlib
import hashlib
import io
import os
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from correctnet.datasets import Facts
from correctnet.errors import UserError, one_line
from correctnet.files import storage
from correctnet.files.factories import call, source_digest

if TYPE_CHECKING:
    from correctnet.datasets.base import Records

Kind = Literal["folder", "npz", "factory"]
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
GREY, COLOURED = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
"""modes of pictures, as Pillow names them, of one and of three channels of 8 bits; transparency is left out"""
TEST = 0.2
"""fraction of the images that are test images where the data does not say which are"""
PARTS = ("train", "test")
NAMES = {
    part: ((f"{part}_images", f"{part}_labels"), (f"x_{part}", f"y_{part}")) for part in PARTS
}  # arrays of an .npz file


@dataclass(frozen=True)
class Description:
    """What is known of own data before it is used."""

    digest: str
    """of the content of the files; for a function, of the source of its module"""
    facts: Facts | None
    """None for a function whose images this process has not read: it is not called to describe it"""


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
    now = _stamp(_listing(path).paths() if kind == "folder" else [path])
    if known is None or stamp != now:
        known = _describe_folder(path) if kind == "folder" else _describe_npz(path)
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
        parts, digests, digest, classes = _read_folder(path)
    else:
        if kind == "npz":
            parts, digest = _read_npz(path), storage.sha256(path)
        else:
            digest = source_digest(place, "data.factory")
            parts = _as_parts(call(place, {}, "data.factory"), place)
        described = {part: _Shape.of(place, part, *records) for part, records in parts.items()}
        classes, one = _check_parts(place, described), next(iter(described.values()))
        counts = {part: shape.count for part, shape in described.items()}
        facts = _facts(place, counts, one.channels, classes, one.height, one.width)
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
    count = _test_images(len(labels))
    return (images[count:], labels[count:]), (images[:count], labels[:count]), digest, classes


def _test_images(count: int) -> int:
    return round(TEST * count)


def _stamp(paths: list[Path]) -> list[tuple[str, int, int]]:
    """What tells files that were not touched from those that were."""
    found = []
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            raise _unreadable(path, error) from error
        found.append((str(path), status.st_size, status.st_mtime_ns))
    return found


def _unreadable(path: Path, error: OSError) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path}: no such file or folder")
    return UserError(f"{error.filename or path}: cannot be read: {error.strerror or one_line(error)}")


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


# --- pictures


class _Listing(NamedTuple):
    """The pictures of a folder: {part: {class: files}}, the part '' where there is no test folder."""

    classes: tuple[str, ...]
    files: dict[str, dict[str, list[Path]]]

    def paths(self) -> list[Path]:
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
        raise _unreadable(folder, error) from error
    return sorted(folders), sorted(files)


def _listing(folder: Path) -> _Listing:
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
    return _Listing(classes or (), found)


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

    def __init__(self, listing: _Listing):
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


def _describe_folder(folder: Path) -> Description:
    walk = _Walk(_listing(folder))
    for _ in walk:
        pass
    counts = {part: len(digests) for part, digests in walk.digests.items()}
    facts = _facts(str(folder), counts, walk.channels, len(walk.listing.classes), *walk.size)
    return Description(walk.digest(), facts)


def _read_folder(folder: Path) -> tuple[dict[str, Records], dict[str, list[bytes]], str, int]:
    walk = _Walk(_listing(folder))
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


# --- arrays


class _Shape(NamedTuple):
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
    def of(cls, place: str | Path, part: str, images: Any, labels: np.ndarray) -> _Shape:
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


def _check_parts(place: str | Path, parts: Mapping[str, _Shape]) -> int:
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


def _facts(place: str, counts: Mapping[str, int], channels: int, classes: int, height: int, width: int) -> Facts:
    if "" in counts:
        test = _test_images(counts[""])
        counts = {"train": counts[""] - test, "test": test}
    if not counts["test"]:
        raise UserError(f"{place}: too few images to hold {TEST:.0%} of them out as test images")
    return Facts("", counts["train"], counts["test"], channels, classes, height, width)


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


def _describe_npz(path: Path) -> Description:
    with _npz(path) as file:
        parts = {
            part: _Shape.of(path, part, _header(file, images), file[labels])
            for part, (images, labels) in _names(path, file.files).items()
        }
    classes, first = _check_parts(path, parts), next(iter(parts.values()))
    counts = {part: s.count for part, s in parts.items()}
    facts = _facts(str(path), counts, first.channels, classes, first.height, first.width)
    return Description(storage.sha256(path), facts)


def _header(file: Any, name: str) -> _Header:
    with file.zip.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, _, dtype = header(member)
    return _Header(shape, dtype)


def _read_npz(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
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
        raise _unreadable(path, error) from error
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: no .npz file that can be read ({one_line(error, 80)})") from error


def _as_parts(found: Any, place: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
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
