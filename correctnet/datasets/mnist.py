"""MNIST, padded to 32 x 32."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from correctnet.datasets.base import Records
from correctnet.datasets.files import File, FileSource, check_labels
from correctnet.errors import UserError


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
    check_labels(labels, 10, paths[1])
    return padded, labels


def _file(name: str, size: int) -> File:
    return File(name, size, f"{name}.gz")


MNIST = FileSource(
    name="mnist",
    folder="MNIST/raw",
    train=(_file("train-images-idx3-ubyte", 47040016), _file("train-labels-idx1-ubyte", 60008)),
    test=(_file("t10k-images-idx3-ubyte", 7840016), _file("t10k-labels-idx1-ubyte", 10008)),
    url="https://ossci-datasets.s3.amazonaws.com/mnist/",
    archives={
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    },
    mean=(0.1307,),
    std=(0.3081,),
    read=_read_mnist,
    digests={
        "train": "394f069b3f25ffc42a49e238de64c809",
        "test": "ea3002d0d9c4f352a7522da043bef12b",
    },
    files_share_records=True,
)
