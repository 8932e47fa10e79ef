"""Monte Carlo over chip samples: accuracies of many chips, with their statistics.

result = evaluate(analog, images_and_labels, chips=250)
print(result)                     # mean, standard deviation, 95 % confidence interval
result.yield_at(0.95).low         # the fraction of chips at or above an accuracy, with its binomial interval
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from correctnet.analog import chip_of, program, programmed
from correctnet.data import Split
from correctnet.errors import UserError
from correctnet.results import COLUMNS, Result

Batches = Split | tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]]


def _batches(data: Batches, size: int) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    """A function that iterates over (images, labels) batches anew at each call."""
    if isinstance(data, Split):
        data = (data.images, data.labels)
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(t, Tensor) for t in data):
        images, labels = data
        if len(images) != len(labels) or len(images) == 0:
            raise UserError(f"evaluate: {len(images)} images and {len(labels)} labels")
        return lambda: zip(images.split(size), labels.split(size), strict=True)
    if iter(data) is data:
        raise UserError("evaluate: data must be a tensor pair or a loader that can be iterated over many times")
    return lambda: iter(data)


@torch.no_grad()
def count_correct(model: nn.Module, data: Batches, batch: int = 100) -> tuple[int, int]:
    """(correctly classified images, images) of `data`, with the weights that `model` has now."""
    model.eval()
    device = next(model.parameters()).device
    correct = total = 0
    for images, labels in _batches(data, batch)():
        images = images.to(device)
        if images.dim() == 4:  # convolutions on a CPU are about 1.4 times faster in this order
            images = images.contiguous(memory_format=torch.channels_last)
        correct += (model(images).argmax(1) == labels.to(device)).sum().item()
        total += len(labels)
    if total == 0:
        raise UserError("evaluate: the data holds no images")
    return correct, total


def clean_accuracy(model: nn.Module, data: Batches, batch: int = 100) -> float:
    """Accuracy with nominal weights; `model` converted or not."""
    try:
        chip_of(model)
    except UserError:
        correct, total = count_correct(model, data, batch)
    else:
        with programmed(model, None):
            correct, total = count_correct(model, data, batch)
    return correct / total


def evaluate(
    model: nn.Module,
    data: Batches,
    chips: int = 250,
    *,
    start: int = 0,
    first_layer: int = 0,
    batch: int = 100,
    prepare: Callable[[nn.Module], None] | None = None,
    progress: bool = True,
    title: str = "chips",
) -> Result:
    """Accuracy of chips `start`, ..., `start + chips - 1` over all of `data`.

    Args:
        model: from `correctnet.analog.convert`.
        data: a `Split`, an (images, labels) pair of tensors, or a loader of such batches that can be iterated often.
        chips: how many chip samples, >= 1.
        start: number of the first; chip 137 is the same chip whatever `start` and `chips` are.
        first_layer: layers of a smaller index stay nominal.
        batch: images a forward pass.
        prepare: called with the model after each chip is programmed (e.g. to recalibrate its BatchNorm).
        progress: show a progress bar.
        title: of the bar.

    Returns:
        A `Result` with one row a chip.

    Raises:
        UserError: a model without variation, no chips, or no images.
    """
    if chips < 1:
        raise UserError(f"evaluate: chips must be at least 1, not {chips}")
    chip = chip_of(model)
    rows = []
    with programmed(model, None):
        for sample in tqdm(range(start, start + chips), desc=title, unit="chip", disable=not progress, mininterval=1):
            program(model, sample, first_layer)
            if prepare is not None:
                prepare(model)
            correct, total = count_correct(model, data, batch)
            rows.append((sample, correct, total, correct / total, chip.seed))
    return Result(pd.DataFrame(rows, columns=COLUMNS))
