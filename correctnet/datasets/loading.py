"""Loading of data sets by name."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from correctnet import datasets
from correctnet.datasets.base import DataSet, Split, permuted
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
    if not 0 < validation < 1:
        raise UserError(f"validation must be a fraction between 0 and 1, not {validation}")
    source = facts.source()
    train, test = source.records(_root(data_dir))
    images, labels = permuted(train, streams.numpy_generator(seed, "split", name))
    held_out = round(validation * len(labels))
    if not 0 < held_out < len(labels):
        raise UserError(f"validation {validation} of {len(labels)} training images leaves one part empty")

    def split(images: np.ndarray, labels: np.ndarray) -> Split:
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (source.mean, source.std))
        scaled = torch.from_numpy(images).float().div_(255).sub_(mean).div_(std)
        return Split(scaled, torch.from_numpy(labels.astype(np.int64)))

    return DataSet(
        name=name,
        train=split(images[held_out:], labels[held_out:]),
        validation=split(images[:held_out], labels[:held_out]),
        test=split(*test),
        classes=facts.classes,
        channels=images.shape[1],
        digest=source.digest,
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
