"""Data sets in files of their publisher's layout: downloaded where they are absent, and checked when they are read."""

from __future__ import annotations

import contextlib
import gzip
import stat
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from correctnet.datasets.base import TEST_SEED, Records, content_order, part_digest, permuted, record_digests
from correctnet.errors import UserError
from correctnet.files.storage import replacing


@dataclass(frozen=True)
class File:
    """A file of a publisher's layout."""

    name: str
    size: int
    """bytes"""
    archive: str
    """file of the download that holds it"""


@dataclass(frozen=True)
class FileSource:
    """A data set that is read from files; see `correctnet.datasets.base.Source`."""

    name: str
    folder: str
    train: tuple[File, ...]
    test: tuple[File, ...]
    url: str
    archives: dict[str, str]
    """MD5 of each download"""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    read: Callable[[list[Path]], Records]
    """records of the files of a part"""
    digests: dict[str, str]
    """`part_digest` of the parts "train" and "test", by their names"""
    files_share_records: bool = False
    """whether every record takes all files of a part (images in one, labels in another)"""

    @property
    def digest(self) -> str:
        """Identifies the records, in hexadecimal."""
        return "".join(self.digests.values())

    def fetch(self, root: Path) -> Path:
        """Make sure that the files are there, downloading them if not; the folder that holds them.

        Files that are there are used as they are (their sizes and contents are checked when they are read). A download
        is checked against its publisher's MD5 and put in place whole. Raises UserError where they are absent and cannot
        be downloaded, or a folder is closed to this user.
        """
        files = (*self.train, *self.test)
        with _readable(root):
            for folder in (root / self.folder, root):
                if all(_is_file(folder / f.name) for f in files):
                    return folder
            folder = root / self.folder
            missing = [f for f in files if not _is_file(folder / f.name)]
        for archive in dict.fromkeys(f.archive for f in missing):
            _download(self, archive, [f for f in missing if f.archive == archive], root)
        return folder

    def records(self, root: Path) -> tuple[Records, Records]:
        """Training and test records. Raises UserError where a file cannot be read or does not hold them."""
        folder = self.fetch(root)
        with _readable(folder):
            train, test = (_read(self, folder, files) for files in (self.train, self.test))
        digests = {"train": record_digests(*train), "test": record_digests(*test)}
        _check_content(self, folder, digests)
        train, test = (
            tuple(values[content_order(digests[part])] for values in records)
            for part, records in (("train", train), ("test", test))
        )
        return train, permuted(test, np.random.default_rng(TEST_SEED))


def check_labels(labels: np.ndarray, classes: int, path: Path) -> None:
    """Raise a UserError where a label is not below `classes`."""
    if labels.max(initial=0) >= classes:
        raise UserError(f"{path}: label {labels.max()} where labels are below {classes}; the file is damaged")


def _read(source: FileSource, folder: Path, files: tuple[File, ...]) -> Records:
    paths = [folder / file.name for file in files]
    for path, file in zip(paths, files, strict=True):
        if path.stat().st_size != file.size:
            raise UserError(
                f"{path}: {path.stat().st_size} bytes, {file.size} expected; delete it to download it again"
            )
    return source.read(paths)


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Errors of the file system as one line that names the file."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"{error.filename or folder}: cannot be read: {reason}") from error


def _check_content(source: FileSource, folder: Path, digests: dict[str, list[bytes]]) -> None:
    """Raise a UserError where a part's records are not those of the data set; it names the files that are suspected."""
    for part, other in (("train", "test"), ("test", "train")):
        if part_digest(digests[part]) == source.digests[part]:
            continue
        files = source.train if part == "train" else source.test
        suspects, why = _suspects(files, digests[part], digests[other], source.files_share_records)
        listed = ", ".join(str(folder / file.name) for file in suspects)
        raise UserError(
            f"{listed}: not what {source.name} has for its {'training' if part == 'train' else 'test'} images ({why}); "
            "delete to download again"
        )


def _suspects(
    files: tuple[File, ...], digests: list[bytes], other: list[bytes], together: bool
) -> tuple[tuple[File, ...], str]:
    """Which files of a part hold wrong records, as far as these tell, and why. `together`: all files make each record.

    Records are taken for wrong that occur twice (a file was cut, or copied), or in the other part, too. Where there are
    none of these it can be any file.
    """
    size = len(digests) // (1 if together else len(files))
    counts, elsewhere = Counter(digests), set(other)
    shared, repeated = [], []
    for start in range(0, len(digests), size):
        own = digests[start : start + size]
        shared.append(sum(d in elsewhere for d in own))
        repeated.append(sum(counts[d] > 1 for d in own))
    for found, why in ((shared, "records of the other part"), (repeated, "records that occur twice")):
        if max(found) > size // 100:  # CIFAR-100 has a few of both
            which = files if together else tuple(f for f, n in zip(files, found, strict=True) if 2 * n >= max(found))
            return which, f"{max(found)} {why}"
    return files, "damaged, or another data set of the same sizes"


def _is_file(path: Path) -> bool:
    """Whether there is a file. Raises PermissionError where a folder above it is closed to this user."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _download(source: FileSource, archive: str, files: list[File], root: Path) -> None:
    import pooch

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
            f"{source.name}: no {names} in {folder.resolve()}, and {source.url + archive} cannot be had "
            f"({type(error).__name__}); put the files there, or say where they are with data_dir or CORRECTNET_DATA"
        ) from error


def _extract(path: Path, source: FileSource, file: File) -> bytes:
    if path.suffixes[-2:] == [".tar", ".gz"]:
        with tarfile.open(path) as archive:
            member = archive.extractfile(f"{source.folder}/{file.name}")
            if member is None:
                raise KeyError(file.name)
            return member.read()
    return gzip.decompress(path.read_bytes())
