"""Where the batches of a training come from: tensors, which are shuffled here, or a loader.

Everything that an epoch draws is a function of (seed, stage, epoch), so that a training that was killed between two
epochs continues with the batches that it would have had.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from correctnet.datasets.base import Split
from correctnet.datasets.batches import Batches, check_batch, check_loader, largest_label
from correctnet.datasets.inputs import Inputs, as_pair
from correctnet.errors import UserError
from correctnet.metrics import Targets
from correctnet.noise import streams

WHAT = "training"


class Step(NamedTuple):
    """A batch of a training."""

    images: Tensor | Inputs
    labels: Tensor
    largest: int
    """the largest label of the batch, or of all data; -1 where labels are no classes"""


class TensorFeed:
    """Images and labels in memory: every image once an epoch, in another order each time.

    Attributes:
        steps: batches an epoch.
        images: number of images, where it is known.
    """

    def __init__(self, split: Split, batch: int, device: torch.device, targets: Targets = "classes"):
        self.split, self.batch, self.device, self.images = split, batch, device, len(split)
        self.steps = math.ceil(len(split) / batch)
        self._largest = largest_label(split.labels, targets)

    def epoch(self, seed: int, stage: str, epoch: int) -> Iterator[Step]:
        """The batches of an epoch."""
        generator = streams.torch_generator(seed, "batches", stage, epoch)
        order = torch.randperm(len(self.split), generator=generator, device="cpu").to(self.split.images.device)
        for part in order.split(self.batch):
            images, labels = self.split.images[part], self.split.labels[part]
            yield Step(images.to(self.device), labels.to(self.device), self._largest)


class LoaderFeed:
    """A loader's batches, as they come: its own size, order and augmentation.

    Python's, NumPy's and torch's generators, and those that a `DataLoader` was given, are set at the beginning of each
    epoch, and those that it was given and Python's and NumPy's are restored after it. Workers that persist
    (`persistent_workers`) keep generators of their own, so with them a resumed training sees other augmentations.

    Attributes: as `TensorFeed`. A loader without a length is read once to count its batches.
    """

    def __init__(self, loader: Any, device: torch.device, targets: Targets = "classes"):
        self.loader, self.device, self._targets = check_loader(loader, WHAT), device, targets
        self.images: int | None = None
        try:
            self.steps = len(loader)
        except (TypeError, NotImplementedError):
            with self._drawing(0), torch.random.fork_rng(devices=[]):
                self.steps = sum(1 for _ in loader)

    def epoch(self, seed: int, stage: str, epoch: int) -> Iterator[Step]:
        """The batches of an epoch. Raises UserError for another number of them than `steps`."""
        number, steps = streams.seed_of(seed, "batches", stage, epoch), 0
        with self._drawing(number):
            for batch in self.loader:
                images, labels = check_batch(batch, WHAT, self._targets)
                if not len(labels):
                    raise UserError(f"{WHAT}: the loader yields a batch without images")
                steps += 1
                if steps > self.steps:
                    break
                largest = largest_label(labels, self._targets)
                yield Step(images.to(self.device), labels.to(self.device), largest)
        if steps != self.steps:
            more = "more than" if steps > self.steps else f"{steps} instead of"
            raise UserError(
                f"{WHAT}: the loader yields {more} {self.steps} batches in epoch {epoch + 1}; the learning rate is "
                "planned for the same number in each epoch"
            )

    @contextlib.contextmanager
    def _drawing(self, number: int) -> Iterator[None]:
        """Set the generators that the loader may draw from, but torch's own, for the length of a block."""
        given = {id(g): g for g in self._generators()}.values()
        before = random.getstate(), np.random.get_state(), [g.get_state() for g in given]  # noqa: NPY002
        random.seed(number)
        np.random.seed(number % 2**32)  # noqa: NPY002 (the one that transforms draw from)
        for generator in given:
            generator.manual_seed(number)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002
            for generator, state in zip(given, before[2], strict=True):
                generator.set_state(state)

    def _generators(self) -> Iterator[torch.Generator]:
        holders = [self.loader, *(getattr(self.loader, name, None) for name in ("sampler", "batch_sampler"))]
        holders.append(getattr(holders[-1], "sampler", None))
        for holder in holders:
            if isinstance(generator := getattr(holder, "generator", None), torch.Generator):
                yield generator


def feed(data: Batches, batch: int, device: torch.device, targets: Targets = "classes") -> TensorFeed | LoaderFeed:
    """The batches of a training on `data`: a `Split` or a pair of tensors in batches of `batch` images, or a loader.

    `targets` says what labels are checked to be, see `correctnet.metrics.Metric`.

    Raises UserError for anything else, and for data without images.
    """
    pair = as_pair(data)
    if pair is None:
        found: TensorFeed | LoaderFeed = LoaderFeed(data, device, targets)
        empty = not found.steps
    else:
        split = Split(*check_batch(pair, WHAT, targets))
        empty = not len(split)
        found = split if empty else TensorFeed(split, batch, device, targets)
    if empty:
        raise UserError(f"{WHAT}: there are no images")
    return found
