"""Loading of data sets by name."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from correctnet import datasets
from correctnet.datasets import own
from correctnet.datasets.base import DataSet, Records, Split, permuted
from correctnet.errors import UserError
from correctnet.noise import streams


def load(name: str, data_dir: str | Path | None = None, validation: float = 0.1, seed: int = 0) -> DataSet:
    """Load a data set as tensors; it is downloaded to `data_dir` if it is not there.

    Args:
        name: a key of `correctnet.datasets.DATASETS`: "digits" (scikit-learn's 1,797 real handwritten digits; 20 % of
            them, always the same, are its test split), "mnist" (padded to 32 x 32), "cifar10" or "cifar100" (fine
            labels).
        data_dir: where the files lie in the publishers' layout; None: $CORRECTNET_DATA, else "data".
        validation: fraction of the training data that is held out, drawn with `seed`.
        seed: of that split.

    Raises:
        UserError: an unknown name, a fraction outside (0, 1), files that are absent and cannot be downloaded, or a
            file that cannot be read, is truncated, or does not hold the records of the data set.
    """
    facts = datasets.facts(name)
    _check_fraction(validation)
    source = facts.source()
    train, test = source.records(_root(data_dir))
    return _held_out(name, train, test, facts.classes, source.mean, source.std, source.digest, validation, seed)


def load_own(kind: own.Kind, place: str, digest: str | None = None, validation: float = 0.1, seed: int = 0) -> DataSet:
    """Load data of your own as tensors; see `correctnet.datasets.own`.

    Images are normalised with mean and standard deviation of each channel over all training images, those that are
    held out for validation included.

    Args:
        kind: "folder", "npz" or "factory".
        place: the folder, the file, or package.module:function.
        digest: of the content that is expected; None: any.
        validation: fraction of the training data that is held out, drawn with `seed`.
        seed: of that split.

    Raises:
        UserError: data that is absent, damaged, or not of one shape, or has another digest.
    """
    _check_fraction(validation)
    train, test, found, classes = own.read(kind, place)
    if digest not in (None, found):
        raise UserError(
            f"{place}: has changed (digest {found[:12]}, {digest[:12]} is expected); start again what was made with it"
        )
    mean, std = _moments(train[0])
    name = own.name_of(kind, place)
    return _held_out(name, train, test, classes, mean, std, found, validation, seed, "own")


def _moments(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, those of 8 bits scaled to 0 to 1; 1 for a channel that is constant.

    One channel at a time in float64 sums, not a copy of all images in float64.
    """
    scale = 255.0 if images.dtype == np.uint8 else 1.0
    mean = [float(images[:, c].mean(dtype=np.float64)) / scale for c in range(images.shape[1])]
    std = [float(images[:, c].std(dtype=np.float64)) / scale or 1.0 for c in range(images.shape[1])]
    return tuple(mean), tuple(std)


def _check_fraction(validation: float) -> None:
    if not 0 < validation < 1:
        raise UserError(f"validation must be a fraction between 0 and 1, not {validation}")


def _held_out(
    name: str,
    train: Records,
    test: Records,
    classes: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    digest: str,
    validation: float,
    seed: int,
    stream: str | None = None,
) -> DataSet:
    """The records as a data set, `validation` of the training images held out. `stream`: of the split's randomness."""
    images, labels = permuted(train, streams.numpy_generator(seed, "split", stream or name))
    held_out = round(validation * len(labels))
    if not 0 < held_out < len(labels):
        raise UserError(f"validation {validation} of {len(labels)} training images leaves one part empty")

    def split(images: np.ndarray, labels: np.ndarray) -> Split:
        centre, scale = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        scaled = torch.from_numpy(images).float().div_(255 if images.dtype == np.uint8 else 1)
        return Split(scaled.sub_(centre).div_(scale), torch.from_numpy(labels.astype(np.int64)))

    return DataSet(
        name=name,
        train=split(images[held_out:], labels[held_out:]),
        validation=split(images[:held_out], labels[:held_out]),
        test=split(*test),
        classes=classes,
        channels=images.shape[1],
        digest=digest,
    )


def fetch(name: str, data_dir: str | Path | None = None) -> Path:
    """Make sure that a data set's files are there, downloading them if not; the folder that holds them.

    Raises UserError where they are absent and cannot be downloaded, or a folder is closed to this user.
    """
    return datasets.facts(name).source().fetch(_root(data_dir))


def digest(name: str) -> str:
    """Hexadecimal digest that identifies the records of a data set; known without reading it, as `load` checks it."""
    return datasets.facts(name).source().digest


def _root(data_dir: str | Path | None) -> Path:
    return Path(data_dir or os.environ.get("CORRECTNET_DATA") or "data").expanduser()
