"""The data sets: digits (embedded), MNIST, CIFAR-10 and CIFAR-100, as tensors of 32 x 32 images.

Records are put in an order of their own content before anything is drawn, so that copies of a data set that store
them in another order give the same splits and the same prefixes. For the same reason a data set is known by its
records, whatever their order: a digest of their digests tells it from a damaged copy, and from another data set of the
same sizes.
"""

from __future__ import annotations

import contextlib
import difflib
import gzip
import hashlib
import os
import stat
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from correctnet.errors import UserError
from correctnet.noise import streams

# Of the order of the test images (and of digits' test split): the same in every run, whatever its seed, so that all
# rows of all runs are about the same images. Never a setting.
TEST_SEED = 20230417

Records = tuple[np.ndarray, np.ndarray]  # (N, C, H, W) uint8 images, (N,) uint8 labels


@dataclass(frozen=True)
class File:
    """A file of a publisher's layout."""

    name: str
    size: int
    """bytes"""
    archive: str
    """file of the download that holds it"""


@dataclass(frozen=True)
class Source:
    """A data set that is read from files."""

    folder: str
    train: tuple[File, ...]
    test: tuple[File, ...]
    url: str
    archives: dict[str, str]
    """MD5 of each download"""
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    read: Callable[[list[Path]], Records]
    digests: dict[str, str]
    """`part_digest` of the parts "train" and "test", by their names"""


@dataclass(frozen=True)
class Split:
    """Images and their labels.

    Attributes:
        images: (N, C, 32, 32) float32, normalised per channel.
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
    """what `digest` gives for the name: of all records before they were split; '' where it is not known"""

    def to(self, device: str) -> DataSet:
        """The data set on another device."""
        parts = (part.to(device) for part in (self.train, self.validation, self.test))
        return DataSet(self.name, *parts, self.classes, self.channels, self.digest)


def _read_idx(path: Path, magic: int) -> np.ndarray:
    raw = np.fromfile(path, np.uint8)
    header = raw[: 4 + 4 * (magic & 0xFF)].view(">u4")
    if header[0] != magic or len(raw) - header.nbytes != np.prod(header[1:], dtype=np.int64):
        raise UserError(f"{path}: not an IDX file of the kind that is expected here (wrong header)")
    return raw[header.nbytes :].reshape(tuple(header[1:]))


def _read_mnist(paths: list[Path]) -> Records:
    images, labels = _read_idx(paths[0], 0x803), _read_idx(paths[1], 0x801)
    if images.shape[1:] != (28, 28) or len(images) != len(labels):
        raise UserError(f"{paths[0]}: {images.shape} images for {len(labels)} labels; MNIST's are 28 x 28")
    padded = np.zeros((len(images), 1, 32, 32), np.uint8)
    padded[:, 0, 2:30, 2:30] = images
    _check_labels(labels, 10, paths[1])
    return padded, labels


def _read_cifar(paths: list[Path], label_bytes: int, classes: int) -> Records:
    images, labels = [], []
    for path in paths:
        records = np.fromfile(path, np.uint8).reshape(-1, label_bytes + 3072)
        _check_labels(records[:, label_bytes - 1], classes, path)
        labels.append(records[:, label_bytes - 1])
        images.append(records[:, label_bytes:].reshape(-1, 3, 32, 32))
    return np.concatenate(images), np.concatenate(labels)


def _check_labels(labels: np.ndarray, classes: int, path: Path) -> None:
    if labels.max(initial=0) >= classes:
        raise UserError(f"{path}: label {labels.max()} where labels are below {classes}; the file is damaged")


def _read_cifar10(paths: list[Path]) -> Records:
    return _read_cifar(paths, 1, 10)


def _read_cifar100(paths: list[Path]) -> Records:
    return _read_cifar(paths, 2, 100)  # a coarse label, then the fine one


CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
CIFAR10_ARCHIVE, CIFAR100_ARCHIVE = "cifar-10-binary.tar.gz", "cifar-100-binary.tar.gz"


def _mnist_file(name: str, size: int) -> File:
    return File(name, size, f"{name}.gz")


# Normalisation constants are those of the publishers' whole training sets, not of a split of them: the same image is
# the same input whatever is held out for validation.
SOURCES = {
    "mnist": Source(
        folder="MNIST/raw",
        train=(_mnist_file("train-images-idx3-ubyte", 47040016), _mnist_file("train-labels-idx1-ubyte", 60008)),
        test=(_mnist_file("t10k-images-idx3-ubyte", 7840016), _mnist_file("t10k-labels-idx1-ubyte", 10008)),
        url="https://ossci-datasets.s3.amazonaws.com/mnist/",
        archives={
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
        classes=10,
        mean=(0.1307,),
        std=(0.3081,),
        read=_read_mnist,
        digests={
            "train": "394f069b3f25ffc42a49e238de64c809",
            "test": "ea3002d0d9c4f352a7522da043bef12b",
        },
    ),
    "cifar10": Source(
        folder="cifar-10-batches-bin",
        train=tuple(File(f"data_batch_{i}.bin", 10000 * 3073, CIFAR10_ARCHIVE) for i in range(1, 6)),
        test=(File("test_batch.bin", 10000 * 3073, CIFAR10_ARCHIVE),),
        url=CIFAR_URL,
        archives={CIFAR10_ARCHIVE: "c32a1d4ab5d03f1284b67883e8d87530"},
        classes=10,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        read=_read_cifar10,
        digests={
            "train": "2ce5464d4c80e1cb0d9e203d05a91a3e",
            "test": "ec53789b417f3fd2095dc750759f678a",
        },
    ),
    "cifar100": Source(
        folder="cifar-100-binary",
        train=(File("train.bin", 50000 * 3074, CIFAR100_ARCHIVE),),
        test=(File("test.bin", 10000 * 3074, CIFAR100_ARCHIVE),),
        url=CIFAR_URL,
        archives={CIFAR100_ARCHIVE: "03b5dce01913d631647c71ecec9e9cb8"},
        classes=100,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        read=_read_cifar100,
        digests={
            "train": "46517d17e296e72129e5a81293a9e300",
            "test": "0b7db9ca442ef487d9dabbff904a6893",
        },
    ),
}
NAMES = ("digits", *SOURCES)
DIGITS = "a8a6179bbc606094d96d99d75837eb84"
"""`part_digest` of scikit-learn's digits, 8 x 8"""


def load(name: str, data_dir: str | Path | None = None, validation: float = 0.1, seed: int = 0) -> DataSet:
    """A data set as tensors; downloaded to `data_dir` if it is not there.

    Args:
        name: "digits" (scikit-learn's 1,797 real handwritten digits, embedded; 20 % of them, always the same, are its
            test split), "mnist" (padded to 32 x 32), "cifar10" or "cifar100" (fine labels).
        data_dir: where the files lie in the publishers' layout; None: $CORRECTNET_DATA, else "data".
        validation: fraction of the training data that is held out, drawn with `seed`.
        seed: of that split.

    Raises:
        UserError: an unknown name, a fraction outside (0, 1), files that are absent and cannot be downloaded, or a
            file that cannot be read, is truncated, or does not hold the records of the data set.
    """
    _check_name(name)
    if not 0 < validation < 1:
        raise UserError(f"validation must be a fraction between 0 and 1, not {validation}")
    if name == "digits":
        train, test, mean, std = *_digits(), (0.3050,), (0.3239,)
        classes = 10
    else:
        source = SOURCES[name]
        folder = fetch(name, data_dir)
        with _readable(folder):
            train, test = (_read(source, folder, files) for files in (source.train, source.test))
        digests = {"train": _record_digests(*train), "test": _record_digests(*test)}
        _check_content(name, source, folder, digests)
        train, test = (
            tuple(values[_content_order(digests[part])] for values in records)
            for part, records in (("train", train), ("test", test))
        )
        test = _permuted(test, np.random.default_rng(TEST_SEED))
        classes, mean, std = source.classes, source.mean, source.std
    images, labels = _permuted(train, streams.numpy_generator(seed, "split", name))
    held_out = round(validation * len(labels))
    if not 0 < held_out < len(labels):
        raise UserError(f"validation {validation} of {len(labels)} training images leaves one part empty")

    def split(images: np.ndarray, labels: np.ndarray) -> Split:
        channel = torch.tensor(mean).view(1, -1, 1, 1), torch.tensor(std).view(1, -1, 1, 1)
        scaled = torch.from_numpy(images).float().div_(255).sub_(channel[0]).div_(channel[1])
        return Split(scaled, torch.from_numpy(labels.astype(np.int64)))

    return DataSet(
        name=name,
        train=split(images[held_out:], labels[held_out:]),
        validation=split(images[:held_out], labels[:held_out]),
        test=split(*test),
        classes=classes,
        channels=images.shape[1],
        digest=digest(name),
    )


def digest(name: str) -> str:
    """What tells a data set from every other one, in hexadecimal; known without reading it, as `load` checks it."""
    _check_name(name)
    return DIGITS if name == "digits" else "".join(SOURCES[name].digests.values())


def _check_name(name: str) -> None:
    if name not in NAMES:
        close = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(NAMES)}"
        raise UserError(f"unknown data set {name!r} ({hint})")


def _digits() -> tuple[Records, Records]:
    """(train, test) of scikit-learn's digits, 8 x 8 with 17 grey levels, upsampled bilinearly to 32 x 32."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    if part_digest(_record_digests(bunch.images.astype(np.uint8), bunch.target.astype(np.uint8))) != DIGITS:
        raise UserError("digits: scikit-learn's load_digits() gives other images than it should; install it anew")
    small = torch.from_numpy(bunch.images).float().unsqueeze(1)
    large = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
    images = (large * (255 / 16)).round().to(torch.uint8).numpy()
    labels = bunch.target.astype(np.uint8)
    order = _content_order(_record_digests(images, labels))
    images, labels = _permuted((images[order], labels[order]), np.random.default_rng(TEST_SEED))
    held_out = round(0.2 * len(labels))
    return (images[held_out:], labels[held_out:]), (images[:held_out], labels[:held_out])


def _permuted(records: Records, rng: np.random.Generator) -> Records:
    order = rng.permutation(len(records[1]))
    return records[0][order], records[1][order]


def _record_digests(images: np.ndarray, labels: np.ndarray) -> list[bytes]:
    """16 bytes for each record, of its image and label."""
    return [
        hashlib.blake2b(image.tobytes() + label.tobytes(), digest_size=16).digest()
        for image, label in zip(images, labels, strict=True)
    ]


def _content_order(digests: Sequence[bytes]) -> np.ndarray:
    """The permutation that sorts records by their digests; equal records are interchangeable."""
    return np.argsort(np.array(digests, dtype="V16").view("S16"), kind="stable")


def part_digest(digests: Sequence[bytes]) -> str:
    """Of all records of a part by their digests, in whatever order they are stored, in hexadecimal."""
    return hashlib.blake2b(b"".join(sorted(digests)), digest_size=16).hexdigest()


def _read(source: Source, folder: Path, files: tuple[File, ...]) -> Records:
    paths = [folder / file.name for file in files]
    for path, file in zip(paths, files, strict=True):
        if path.stat().st_size != file.size:
            raise UserError(f"{path}: {path.stat().st_size} bytes, {file.size} expected; delete it to download it anew")
    return source.read(paths)


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Errors of the file system as one line that names the file."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"{error.filename or folder}: cannot be read: {reason}") from error


def _check_content(name: str, source: Source, folder: Path, digests: dict[str, list[bytes]]) -> None:
    """Raise a UserError where a part's records are not those of the data set; it names the files that are suspected."""
    for part, other in (("train", "test"), ("test", "train")):
        if part_digest(digests[part]) == source.digests[part]:
            continue
        files = source.train if part == "train" else source.test
        suspects, why = _suspects(files, digests[part], digests[other], source.read is _read_mnist)
        listed = ", ".join(str(folder / file.name) for file in suspects)
        raise UserError(
            f"{listed}: not what {name} has for its {'training' if part == 'train' else 'test'} images ({why}); "
            "delete to download anew"
        )


def _suspects(
    files: tuple[File, ...], digests: list[bytes], other: list[bytes], together: bool
) -> tuple[tuple[File, ...], str]:
    """Which files of a part hold wrong records, as far as these tell, and why. `together`: all files make each record.

    Records are taken for wrong that stand twice (a file was cut, or copied), or in the other part, too. Where there are
    none of these it can be any file.
    """
    size = len(digests) // (1 if together else len(files))
    counts, elsewhere = Counter(digests), set(other)
    shared, repeated = [], []
    for start in range(0, len(digests), size):
        own = digests[start : start + size]
        shared.append(sum(d in elsewhere for d in own))
        repeated.append(sum(counts[d] > 1 for d in own))
    for found, why in ((shared, "records of the other part"), (repeated, "records that stand twice")):
        if max(found) > size // 100:  # CIFAR-100 has a few of both
            which = files if together else tuple(f for f, n in zip(files, found, strict=True) if 2 * n >= max(found))
            return which, f"{max(found)} {why}"
    return files, "damaged, or another data set of the same sizes"


def fetch(name: str, data_dir: str | Path | None = None) -> Path:
    """Make sure that a data set's files are there, downloading them if not; the folder that holds them.

    Files that are there are used as they are (their sizes and contents are checked when they are read). A download
    is checked against its publisher's MD5 and put in place whole. Raises UserError where they are absent and cannot be
    downloaded, or a folder is closed to this user.
    """
    _check_name(name)
    root = Path(data_dir or os.environ.get("CORRECTNET_DATA") or "data").expanduser()
    if name == "digits":
        return root
    source = SOURCES[name]
    files = (*source.train, *source.test)
    with _readable(root):
        for folder in (root / source.folder, root):
            if all(_is_file(folder / f.name) for f in files):
                return folder
        folder = root / source.folder
        missing = [f for f in files if not _is_file(folder / f.name)]
    for archive in dict.fromkeys(f.archive for f in missing):
        _download(name, source, archive, [f for f in missing if f.archive == archive], root)
    return folder


def _is_file(path: Path) -> bool:
    """Whether there is a file. Raises PermissionError where a folder above it is closed to this user."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _download(name: str, source: Source, archive: str, files: list[File], root: Path) -> None:
    import pooch

    from correctnet.files.storage import replacing

    folder, names = root / source.folder, ", ".join(f.name for f in files)
    try:
        path = pooch.retrieve(
            source.url + archive,
            known_hash=f"md5:{source.archives[archive]}",
            fname=archive,
            path=root / "downloads",
            progressbar=True,
        )
        for file in files:
            with replacing(folder / file.name) as temporary:
                temporary.write_bytes(_extract(Path(path), source, file))
        Path(path).unlink()
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"{error.filename or root}: cannot be written: {error.strerror or 'not permitted'}") from error
    except Exception as error:  # whatever the network, the server or the archive did wrong, the way out is the same
        raise UserError(
            f"{name}: no {names} in {folder.resolve()}, and {source.url + archive} cannot be had "
            f"({type(error).__name__}); put the files there, or say where they are with data_dir or CORRECTNET_DATA"
        ) from error


def _extract(path: Path, source: Source, file: File) -> bytes:
    if path.suffixes[-2:] == [".tar", ".gz"]:
        with tarfile.open(path) as archive:
            member = archive.extractfile(f"{source.folder}/{file.name}")
            if member is None:
                raise KeyError(file.name)
            return member.read()
    return gzip.decompress(path.read_bytes())


def augment(images: Tensor, generator: torch.Generator, padding: int = 4, flip: bool = True) -> Tensor:
    """Random crop after zero padding, and random horizontal flip, each image on its own; no loop over images.

    Args:
        images: (N, C, H, W).
        generator: a CPU generator; the same state gives the same crops.
        padding: pixels of zeros on each side before the crop back to H x W.
        flip: mirror half of the images.

    Returns:
        (N, C, H, W), a new tensor.
    """
    n, _, height, width = images.shape
    top, left = torch.randint(0, 2 * padding + 1, (2, n, 1), generator=generator)
    rows = top + torch.arange(height)  # (N, H)
    columns = left + torch.arange(width)  # (N, W)
    if flip:
        mirrored = torch.rand(n, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(images, (padding,) * 4)
    device = images.device
    index = (torch.arange(n)[:, None, None].to(device), rows[:, :, None].to(device), columns[:, None, :].to(device))
    # Advanced indexing puts the indexed dimensions first: (N, H, W, C).
    return padded.permute(0, 2, 3, 1)[index].permute(0, 3, 1, 2).contiguous()


def resize(images: Tensor, side: int) -> Tensor:
    """(N, C, H, W) images as (N, C, side, side): bilinear, the filter as wide as the pixels that it averages."""
    if images.shape[-2:] == (side, side):
        return images
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True)
