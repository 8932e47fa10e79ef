"""Monte Carlo over chip samples: accuracies of many chips, with their statistics.

result = evaluate(analog, images_and_labels, chips=250)
print(result)                     # mean, standard deviation, 95 % confidence interval
result.yield_at(0.95).low         # the fraction of chips at or above an accuracy, with its binomial interval

On the CPU the C++ core runs the network (`correctnet.engine`), many times faster than torch does; what it cannot run
goes through torch, and a warning names it.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from correctnet import storage
from correctnet.analog import chip_of, program, programmed
from correctnet.arithmetic import Precision
from correctnet.data import Split
from correctnet.engine import BLOCK, GPU_BLOCK, MEMORY, Engine, Method, Unsupported, check_method
from correctnet.errors import UserError
from correctnet.results import COLUMNS, Result

# A chunk of chips is what an interruption loses: floating-point operations a thread, of which a core does some 5e10 a
# second. A call into the core cannot be interrupted and prepares its images anew: the first may take so many
# operations, and those behind it as many as take about so many seconds.
CHUNK_FLOP, CALL_FLOP, CALL_SECONDS = 1e12, 1e10, 1.0
GPU_THREADS = 256  # that a GPU counts for, at least

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


def count_correct(model: nn.Module, data: Batches, batch: int = 100) -> tuple[int, int]:
    """(correctly classified images, images) of `data`, with the weights that `model` has now."""
    return _count(model, _batches(data, batch)())


@torch.no_grad()
def _count(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[int, int]:
    model.eval()
    device = next(model.parameters()).device
    correct = total = 0
    for images, labels in batches:
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


class EngineWarning(UserWarning):
    """The network, or a part of it, runs through torch instead of the C++ core."""


def evaluate(
    model: nn.Module,
    data: Batches,
    chips: int = 250,
    *,
    start: int = 0,
    first_layer: int = 0,
    engine: Literal["auto", "torch"] = "auto",
    precision: Precision = "float32",
    gpu_method: Method = "auto",
    memory: int = MEMORY,
    batch: int = 100,
    chunk: int | None = None,
    save: str | Path | None = None,
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
        engine: "auto": the C++ core, and torch for what it cannot run, with an `EngineWarning`; "torch": torch alone.
        precision: of weights and activations in the core, "float32" or "bfloat16" (sums are float32).
        gpu_method: how a GPU gets at noisy weights, see `correctnet.engine`; on a CPU, where there is one way, any but
            "auto" has no effect, and an `EngineWarning` says so.
        memory: bytes that the core may take, about.
        batch: images a forward pass in torch.
        chunk: chips that are taken over all images before the next ones are begun; None: as many as take some twenty
            seconds in the core, and one in torch.
        save: a file for the rows of the chips that are done, written after every chunk. Chips that it holds already
            are not evaluated again; whether they were of the same model and data is the caller's to know.
        prepare: called with the model after each chip is programmed (e.g. to recalibrate its BatchNorm). As the model
            is not the same on all chips then, each has an engine of its own.
        progress: show a progress bar, and warn of what runs through torch.
        title: of the bar.

    Returns:
        A `Result` with one row a chip.

    Raises:
        UserError: a model without variation, no chips, or no images.
    """
    if chips < 1 or (chunk is not None and chunk < 1):
        raise UserError(f"evaluate: chips and chunk must be at least 1, not {chips} and {chunk}")
    if engine not in ("auto", "torch"):
        raise UserError(f"evaluate: engine must be 'auto' or 'torch', not {engine!r}")
    check_method(gpu_method)
    chip = chip_of(model)
    rows = storage.resume(save, _read_rows, [])
    have = {row["sample"] for row in rows}
    todo = [sample for sample in range(start, start + chips) if sample not in have]
    if todo:
        images = sum(len(labels) for _, labels in _batches(data, BLOCK)())
        count, size = None, 1
        if engine == "auto":
            how = precision, memory, gpu_method
            count, size = _engine_counter(model, _batches(data, BLOCK), images, first_layer, *how)
        if count is None:
            count = _torch_counter(model, _batches(data, batch), first_layer, prepare)
        elif prepare is not None:
            count, size = _prepared_counter(model, _batches(data, BLOCK), first_layer, *how, prepare), 1
        total, size = images * chips, chunk or size
        with tqdm(desc=title, unit="image", unit_scale=True, total=total, disable=not progress, mininterval=1) as bar:
            bar.update(images * (chips - len(todo)))
            for i in range(0, len(todo), size):
                samples = todo[i : i + size]
                correct = count(samples, bar.update)
                rows += [
                    dict(zip(COLUMNS, (s, c, images, c / images, chip.seed), strict=True))
                    for s, c in zip(samples, correct, strict=True)
                ]
                if save:
                    storage.write_csv(Path(save), pd.DataFrame(rows, columns=COLUMNS))
    table = pd.DataFrame(rows, columns=COLUMNS).sort_values("sample", ignore_index=True)
    return Result(table[table["sample"].between(start, start + chips - 1)].reset_index(drop=True))


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of chips that `save` holds."""
    return storage.read_csv(path)[COLUMNS].to_dict("records")


# From chip samples, and a function that is told how many images were classified, the correct ones of each chip.
Counter = Callable[[Sequence[int], Callable[[int], object]], list[int]]


def _torch_counter(
    model: nn.Module,
    batches: Callable[[], Iterator[tuple[Tensor, Tensor]]],
    first_layer: int,
    prepare: Callable[[nn.Module], None] | None,
) -> Counter:
    """Chip by chip through torch."""

    def count(samples: Sequence[int], done: Callable[[int], object]) -> list[int]:
        counts = []
        with programmed(model, None):
            for sample in samples:
                program(model, sample, first_layer)
                if prepare is not None:
                    prepare(model)
                correct, total = _count(model, batches())
                counts.append(correct)
                done(total)
        return counts

    return count


def _prepared_counter(
    model: nn.Module,
    batches: Callable[[], Iterator[tuple[Tensor, Tensor]]],
    first_layer: int,
    precision: Precision,
    memory: int,
    method: Method,
    prepare: Callable[[nn.Module], None],
) -> Counter:
    """Through an engine for each chip, whose images are shared out among the threads, as the core's are chips."""

    def count(samples: Sequence[int], done: Callable[[int], object]) -> list[int]:
        counts = []
        threads = torch.get_num_threads()
        with programmed(model, None), ThreadPoolExecutor(threads) as pool:
            for sample in samples:
                program(model, sample, first_layer)
                prepare(model)
                first = next(batches())[0][:1]
                first = first.to(next(model.parameters()).device)
                engine = Engine(model, first, first_layer, precision, memory, method)
                # What runs through torch programs the model, which one thread at a time may do.
                parts = 1 if engine.on_gpu or not engine.whole else threads
                total = 0

                def part(block: tuple[Tensor, Tensor], engine: Engine = engine, sample: int = sample) -> int:
                    return engine.count_correct(*block, [sample])[0]

                for x, y in _blocks(batches(), GPU_BLOCK if engine.on_gpu else BLOCK):
                    n = math.ceil(len(y) / parts)
                    total += sum(pool.map(part, zip(x.split(n), y.split(n), strict=True)))
                    done(len(y))
                counts.append(total)
        return counts

    return count


def _engine_counter(
    model: nn.Module,
    batches: Callable[[], Iterator[tuple[Tensor, Tensor]]],
    images: int,
    first_layer: int,
    precision: Precision,
    memory: int,
    method: Method,
) -> tuple[Counter | None, int]:
    """Through the core, and the chips of a chunk; None, with a warning, where it cannot run the network."""
    first = next(batches(), None)
    if first is None or len(first[0]) == 0:
        raise UserError("evaluate: the data holds no images")
    try:
        engine = Engine(model, first[0].to(next(model.parameters()).device), first_layer, precision, memory, method)
    except Unsupported as error:
        warnings.warn(f"everything runs through torch: {error}", EngineWarning, stacklevel=3)
        return None, 1
    if method != "auto" and not engine.on_gpu:
        warnings.warn(
            f"gpu_method {method!r} has no effect: the model is on the CPU, whose core makes weights noisy while it "
            "packs them",
            EngineWarning,
            stacklevel=3,
        )
    if (engine.report.unfused or engine.report.torch) and not engine.library:
        warnings.warn(f"not all of the network runs in the C++ core: {engine.report}", EngineWarning, stacklevel=3)

    threads = GPU_THREADS if engine.on_gpu else torch.get_num_threads()
    cost = max(1.0, engine.cost[1])

    def chips(flop: float, images: int) -> int:
        """How many chips each thread may take, times the threads, so that all have as much to do."""
        return threads * max(1, int(flop / (cost * images)))

    rate = CALL_FLOP / CALL_SECONDS  # operations a second and thread, by the last call

    def count(samples: Sequence[int], done: Callable[[int], object]) -> list[int]:
        nonlocal rate
        counts = dict.fromkeys(samples, 0)
        for x, y in _blocks(batches(), GPU_BLOCK if engine.on_gpu else BLOCK):
            i = 0
            while i < len(samples):
                part = samples[i : i + chips(rate * CALL_SECONDS, len(y))]
                began = time.perf_counter()
                for sample, correct in zip(part, engine.count_correct(x, y, part), strict=True):
                    counts[sample] += correct
                rate = cost * len(part) * len(y) / threads / max(1e-6, time.perf_counter() - began)
                i += len(part)
                done(len(part) * len(y))
        return list(counts.values())

    return count, chips(CHUNK_FLOP, images)


def _blocks(batches: Iterator[tuple[Tensor, Tensor]], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches put together until they hold at least `size` images."""
    waiting: list[tuple[Tensor, Tensor]] = []
    for batch in batches:
        waiting.append(batch)
        if sum(len(labels) for _, labels in waiting) >= size:
            yield torch.cat([x for x, _ in waiting]), torch.cat([y for _, y in waiting])
            waiting = []
    if waiting:
        yield torch.cat([x for x, _ in waiting]), torch.cat([y for _, y in waiting])
