"""The data that `evaluate` and related functions accept, checked once for every engine.

A batch is one tensor of images (N, ...) and one of labels (N,), whole numbers below the number of classes; the
network's output is one floating-point tensor (N, classes). With another metric than the accuracy, labels are what it
says (`correctnet.metrics.Targets`). Several tensors, in order or by name, may be in the place of the images
(`correctnet.datasets.inputs`). Anything else is refused in one line that says what is accepted.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from correctnet.datasets.base import Split
from correctnet.datasets.inputs import Inputs, as_pair, joined, signature, size_of, tensors_of
from correctnet.errors import UserError
from correctnet.metrics import Metric, Targets, floats, kind_of, main_output

Batch = tuple[Tensor | Inputs, Tensor]
Batches = Split | tuple[Any, Tensor] | Mapping[str, Tensor] | Iterable[Any]
ACCEPTED = (
    "a pair of tensors (images, labels), or a loader that yields such pairs and can be iterated over many times, is "
    "expected"
)
BATCH = (
    "a batch must be (images, labels), two tensors, or several inputs and labels, as a tuple with the labels last, a "
    "dict with 'labels', or (inputs, labels)"
)
CHANGING = "other images in each pass, so that results cannot be compared"
PIXELS = "; for labels per pixel, give metric=correctnet.metrics.mean_iou()"
REGRESSION = "; for a regression, give metric=correctnet.metrics.mean_squared_error()"
BITS = 128  # bits of a digest
HEAD = 16  # images that a network is tried on


class DataWarning(UserWarning):
    """A loader yields other images in each pass."""


class Data:
    """Images and labels that can be iterated over many times with the same result.

    Args:
        data: a `Split`, an (images, labels) pair of tensors, or a loader of such batches.
        size: images in a batch, for data that is not divided into batches.
        memory: bytes of a loader's batches that are kept, approximately. A loader with more data is read again in each
            pass, and must yield the same images each time.
        what: the caller's name, for messages.
        targets: what labels are checked to be, see `correctnet.metrics.Metric`.

    Attributes:
        head: the first images, at most `HEAD`, and their labels.
        images: number of images.
        largest: the largest label; -1 where labels are no classes.
        uniform: whether all images have the same shape and type.
        kept: whether the batches are in memory; if not, the loader is read again in each pass.

    Warns:
        DataWarning: a loader whose batches are kept yields other images in a second pass.

    Raises:
        UserError: anything that is not such data.
    """

    def __init__(
        self,
        data: Batches,
        size: int = 100,
        memory: int = 2 << 30,
        what: str = "evaluate",
        targets: Targets = "classes",
    ):
        self.what, self._targets, self._memory = what, targets, memory
        self._loader: Any = None
        self._kept: list[Batch] | None = None
        pair = as_pair(data)
        if pair is not None:
            images, labels = check_batch(pair, what, targets)
            batches: Iterable[Batch] = zip(images.split(size), labels.split(size), strict=True)
        else:
            self._loader = check_loader(data, what)
            batches = self._read()
        kept: list[Batch] = []
        head: list[Batch] = []
        shapes: set[Any] = set()
        self.images, self.largest, taken, total = 0, -1, 0, 0
        for x, y in batches:
            if not len(y):
                continue
            shapes.add(signature(x))
            if self.images < HEAD and len(shapes) == 1:
                head.append((x[:HEAD], y[:HEAD]))
            self.images += len(y)
            self.largest = max(self.largest, largest_label(y, targets))
            taken += size_of(x) + size_of(y) if self._loader is not None else 0
            kept.append((x, y))
            if taken > memory:  # from here on, the loader is read in each pass and compared with this one
                total += sum(_digest(*batch) for batch in kept)
                kept = []
        if not self.images:
            raise UserError(f"{what}: the data holds no images")
        self.uniform = len(shapes) == 1
        self.head = tuple(joined(parts)[:HEAD] for parts in zip(*head, strict=True))
        if taken > memory:
            self.digest = _hexadecimal(total + sum(_digest(*batch) for batch in kept))
        else:
            self._kept = kept
        if self._kept is not None and self._loader is not None and not isinstance(data, list | tuple):
            again = _hexadecimal(sum(_digest(*batch) for batch in self._read()))
            if again != self.digest:
                warnings.warn(
                    f"the loader yields {CHANGING}; all chips of this evaluation see the images of one pass",
                    DataWarning,
                    stacklevel=4,
                )

    @classmethod
    def of(
        cls,
        data: Batches | Data,
        size: int = 100,
        memory: int = 2 << 30,
        what: str = "evaluate",
        targets: Targets = "classes",
    ) -> Data:
        """`data` itself if it is one, which has been read and checked already; else as the class."""
        return data if isinstance(data, Data) else cls(data, size, memory, what, targets)

    @cached_property
    def digest(self) -> str:
        """A hexadecimal digest of all images and labels that does not depend on their order and batches."""
        return _hexadecimal(sum(_digest(*batch) for batch in self._kept))

    @property
    def kept(self) -> bool:
        """See the class."""
        return self._kept is not None

    def pieces(self) -> Iterator[list[Batch]]:
        """One pass in pieces of consecutive batches, of which two fit the memory: a single one where all batches do.

        The reader still holds a piece while the next is put together.
        """
        if self._kept is not None:
            yield self._kept
            return
        piece: list[Batch] = []
        taken = 0
        for batch in self:
            size = sum(map(size_of, batch))
            if piece and taken + size > self._memory // 2:
                yield piece
                piece, taken = [], 0
            piece.append(batch)
            taken += size
        if piece:
            yield piece

    def __iter__(self) -> Iterator[Batch]:
        if self._kept is not None:
            yield from self._kept
            return
        total = 0
        for batch in self._read():
            total += _digest(*batch)
            yield batch
        if _hexadecimal(total) != self.digest:
            raise UserError(
                f"{self.what}: the loader yields {CHANGING}; load them without random augmentation, and without "
                "drop_last where it shuffles"
            )

    def _read(self) -> Iterator[Batch]:
        """One pass over the loader."""
        for batch in self._loader:
            yield check_batch(batch, self.what, self._targets)


def first_batch(data: Batches, what: str, targets: Targets = "classes") -> Batch:
    """The first images and labels of `data`, a `Data` or what it is made of. Raises UserError as `Data` does."""
    if isinstance(data, Data):
        return data.head
    pair = as_pair(data)
    for batch in check_loader(data, what) if pair is None else [pair]:
        images, labels = check_batch(batch, what, targets)
        if len(images):
            return images, labels
    raise UserError(f"{what}: the data holds no images")


class Taken:
    """The first `count` images of each pass over a loader, in its batches, the last of which may be cut."""

    def __init__(self, loader: Iterable[Batch], count: int):
        self.loader, self.count = loader, count
        self.batch_size, self.dataset = getattr(loader, "batch_size", None), getattr(loader, "dataset", None)

    def __iter__(self) -> Iterator[Batch]:
        left = self.count
        for batch in self.loader:
            if (pair := as_pair(batch)) is None:  # the reader refuses it
                yield batch
                return
            images, labels = pair
            yield images[:left], labels[:left]
            left -= len(labels)
            if left <= 0:
                return


def take(data: Batches | Data, count: int | None) -> Any:
    """The first `count` images of `data`, or fewer where it has fewer; None: all of it."""
    if count is None:
        return data
    pair = as_pair(data)
    if pair is not None:
        return Split(*pair).take(count)
    return Taken(check_loader(data, "take"), count)


def check_loader(data: Any, what: str) -> Any:
    """`data`, if it is a loader that can be read many times. Raises UserError for anything else."""
    if isinstance(data, Tensor | Mapping | Inputs | str | bytes) or not isinstance(data, Iterable):
        extra = "; wrap a Dataset in a DataLoader" if hasattr(data, "__getitem__") and hasattr(data, "__len__") else ""
        raise UserError(f"{what}: {ACCEPTED}, not {kind_of(data)}{extra}")
    if isinstance(data, torch.utils.data.Dataset) and not isinstance(data, torch.utils.data.IterableDataset):
        raise UserError(f"{what}: {ACCEPTED}, not {kind_of(data)}; wrap a Dataset in a DataLoader")
    if isinstance(data, Iterator):  # `iter(data)` would start a DataLoader's workers
        raise UserError(f"{what}: {ACCEPTED}, not {kind_of(data)}, which can be iterated over once")
    return data


def check_batch(batch: Any, what: str, targets: Targets = "classes") -> Batch:
    """A batch as (images, labels), labels of classes as int64. Raises UserError if it is not a batch."""
    if as_pair(batch) is None:
        raise UserError(f"{what}: {BATCH}, not {kind_of(batch)}")
    images, labels = as_pair(batch)
    for tensor in (*(tensor for _, tensor in tensors_of(images)), labels):
        if tensor.is_nested or tensor.layout != torch.strided:
            raise UserError(f"{what}: dense tensors are expected, not nested or sparse ones; convert them")
    if isinstance(images, Tensor) and images.dim() < 2:
        raise UserError(f"{what}: images (N, ...) are expected, not a tensor of shape {tuple(images.shape)}")
    if labels.dim() == 0 or (labels.dim() != 1 and targets == "classes"):
        hint = "" if labels.dim() else "; give batches, as a DataLoader with a batch_size does"
        if labels.dim() == 2:
            hint = "; squeeze the column" if labels.shape[1] == 1 else "; of one-hot rows take labels.argmax(1)"
        elif labels.dim() == 3:
            hint = PIXELS
        raise UserError(f"{what}: labels (N,), one an image, are expected, not {tuple(labels.shape)}{hint}")
    if len(images) != len(labels):
        raise UserError(f"{what}: {len(images)} images and {len(labels)} labels")
    return images.detach(), check_labels(labels.detach(), what, targets)


def check_labels(labels: Tensor, what: str, targets: Targets) -> Tensor:
    """Labels (N, ...) as a metric reads them: classes as int64. Raises UserError for values that it cannot mean."""
    if targets == "any":
        return labels
    if targets == "numbers":
        if labels.is_complex() or not labels.isfinite().all():
            found = "complex" if labels.is_complex() else f"{int((~labels.isfinite()).sum())} that are not"
            raise UserError(f"{what}: labels are expected that are finite numbers, not {found}")
        return labels if labels.is_floating_point() else labels.float()
    if labels.is_complex() or (
        labels.is_floating_point() and not (labels.isfinite() & (labels == labels.round())).all()
    ):
        hint = "" if targets == "pixels" or labels.is_complex() else REGRESSION
        found = str(labels.dtype).removeprefix("torch.")
        raise UserError(f"{what}: labels are classes, whole numbers; these are {found}{hint}")
    whole = labels.to(torch.int64)
    if targets == "classes" and len(whole) and int(whole.min()) < 0:
        raise UserError(f"{what}: labels are classes from 0 on; there is a {int(whole.min())}")
    return whole


def largest_label(labels: Tensor, targets: Targets = "classes") -> int:
    """The largest label of a batch, at least one image; -1 where labels are no classes."""
    return int(labels.max()) if targets == "classes" else -1


def check_outputs(
    outputs: Any, images: Tensor | Inputs, largest: int, what: str = "evaluate", metric: Metric | None = None
) -> Any:
    """The network's outputs on a batch, (N, classes) unless a metric reads others. Raises UserError otherwise.

    Args:
        outputs: of the network.
        images: (N, ...), its input.
        largest: the largest label of the data, which must be below the number of classes.
        what: the caller's name, for messages.
        metric: None: the accuracy.
    """
    if metric is not None and metric.targets != "classes":
        return outputs
    try:
        logits = main_output(outputs)
    except UserError as error:
        raise UserError(f"{what}: {error}") from None
    if logits.dim() != 2 or len(logits) != len(images) or logits.shape[1] < 2 or not logits.is_floating_point():
        hint = REGRESSION if logits.dim() == 1 or logits.shape[1:] == (1,) else PIXELS if logits.dim() == 4 else ""
        raise UserError(
            f"{what}: the network must return (N, classes) with 2 classes or more, floating point, for N = "
            f"{len(images)} images, not {tuple(logits.shape)} {str(logits.dtype).removeprefix('torch.')}{hint}"
        )
    if largest >= logits.shape[1]:
        raise UserError(f"{what}: there is a label {largest}, and the network has {logits.shape[1]} classes")
    return outputs


def _digest(images: Tensor | Inputs, labels: Tensor) -> int:
    """The sum of the digests of each image with its label: independent of their order."""
    total, named = 0, tensors_of(images)
    kind = "".join(f"{name}{tensor.dtype}{tuple(tensor.shape[1:])}" for name, tensor in named).encode()
    parts = [_rows(tensor) for _, tensor in named if tensor.numel()]
    rows = (b"".join(own) for own in zip(*parts, strict=True)) if len(parts) > 1 else parts[0] if parts else ()
    if labels.dim() == 1 and not labels.is_floating_point():
        keys: Iterable[bytes] = (b"%d" % label for label in labels.tolist())
    else:  # keys of 16 bytes
        kind += f"{labels.dtype}{tuple(labels.shape[1:])}".encode()
        keys = (hashlib.blake2b(part, digest_size=16).digest() for part in _rows(labels))
    for row, key in zip(rows, keys, strict=True):
        digest = hashlib.blake2b(row, digest_size=BITS // 8, key=key)
        digest.update(kind)
        total += int.from_bytes(digest.digest(), "little")
    return total


def _rows(tensor: Tensor) -> Any:
    """The bytes of each item of a tensor, (N, bytes) uint8."""
    return tensor.detach().cpu().contiguous().view(len(tensor), -1).view(torch.uint8).numpy()


def _hexadecimal(total: int) -> str:
    return f"{total % (1 << BITS):032x}"[:16]


def looks_across(run: Callable[[Tensor], Any], images: Tensor, whole: Any, tolerance: float = 1e-3) -> bool:
    """Whether the output for an image depends on the rest of its batch, as with statistics of the batch.

    Args:
        run: computes the outputs of a batch.
        images: (N, ...), of which two halves are run.
        whole: the outputs of all `images`.
        tolerance: largest difference that is ascribed to rounding, relative to the largest output.
    """
    if len(images) < 2:
        return False
    try:
        halves = [floats(run(half)) for half in images.split((len(images) + 1) // 2)]
        parts = [torch.cat(pair) for pair in zip(*halves, strict=True)]
    except (UserError, RuntimeError, TypeError, ValueError):  # a network that needs a certain batch size
        return True
    wholes = floats(whole)
    return len(parts) != len(wholes) or any(_differ(a, b, tolerance) for a, b in zip(wholes, parts, strict=True))


def _differ(whole: Tensor, parts: Tensor, tolerance: float) -> bool:
    if whole.shape != parts.shape:
        return True
    scale = whole.abs().max() if whole.numel() else 0.0
    return bool(((whole - parts).abs() > tolerance * scale).any())
