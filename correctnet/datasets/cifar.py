"""CIFAR-10 and CIFAR-100 (fine labels), in the publisher's binary layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from correctnet.datasets.base import Records
from correctnet.datasets.files import File, FileSource, check_labels

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
CIFAR10_ARCHIVE, CIFAR100_ARCHIVE = "cifar-10-binary.tar.gz", "cifar-100-binary.tar.gz"


def _read_cifar(paths: list[Path], label_bytes: int, classes: int) -> Records:
    images, labels = [], []
    for path in paths:
        records = np.fromfile(path, np.uint8).reshape(-1, label_bytes + 3072)
        check_labels(records[:, label_bytes - 1], classes, path)
        labels.append(records[:, label_bytes - 1])
        images.append(records[:, label_bytes:].reshape(-1, 3, 32, 32))
    return np.concatenate(images), np.concatenate(labels)


def _read_cifar10(paths: list[Path]) -> Records:
    return _read_cifar(paths, 1, 10)


def _read_cifar100(paths: list[Path]) -> Records:
    return _read_cifar(paths, 2, 100)  # a coarse label, then the fine one


CIFAR10 = FileSource(
    name="cifar10",
    folder="cifar-10-batches-bin",
    train=tuple(File(f"data_batch_{i}.bin", 10000 * 3073, CIFAR10_ARCHIVE) for i in range(1, 6)),
    test=(File("test_batch.bin", 10000 * 3073, CIFAR10_ARCHIVE),),
    url=CIFAR_URL,
    archives={CIFAR10_ARCHIVE: "c32a1d4ab5d03f1284b67883e8d87530"},
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    read=_read_cifar10,
    digests={
        "train": "2ce5464d4c80e1cb0d9e203d05a91a3e",
        "test": "ec53789b417f3fd2095dc750759f678a",
    },
)
CIFAR100 = FileSource(
    name="cifar100",
    folder="cifar-100-binary",
    train=(File("train.bin", 50000 * 3074, CIFAR100_ARCHIVE),),
    test=(File("test.bin", 10000 * 3074, CIFAR100_ARCHIVE),),
    url=CIFAR_URL,
    archives={CIFAR100_ARCHIVE: "03b5dce01913d631647c71ecec9e9cb8"},
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
    read=_read_cifar100,
    digests={
        "train": "46517d17e296e72129e5a81293a9e300",
        "test": "0b7db9ca442ef487d9dabbff904a6893",
    },
)
