"""Sums of a metric over the images, chip sample by chip sample, through the C++ core or through torch.

For the accuracy they are counts of correctly classified images.

`make_counter` tries the network on a few images and chooses:

    engine     one engine for all chips: many chips a call
    prepared   one engine a chip, where `prepare` changes the model on each chip
    torch      what the core cannot run, and everything with `engine="torch"`
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from correctnet.crossbar.convert import keeping, programmed
from correctnet.crossbar.probe import check_reached, run, same
from correctnet.datasets.batches import Batch, Data, check_outputs, looks_across
from correctnet.datasets.inputs import Inputs, joined
from correctnet.engine.engine import BLOCK, GPU_BLOCK, Engine, Unsupported, classified
from correctnet.errors import UserError
from correctnet.evaluation.simulation import Simulation
from correctnet.metrics import Metric, main_output, not_finite

# An interruption loses one chunk of chips, whose size is given in floating-point operations a thread (a core does
# about 5e10 a second). A call into the core cannot be interrupted, but each call prepares its images again: the first
# call is of CALL_FLOP operations, later ones of as many as take about CALL_SECONDS.
CHUNK_FLOP, CALL_FLOP, CALL_SECONDS = 1e12, 1e10, 1.0
GPU_THREADS = 256  # threads that a GPU counts for in these sizes, at least
TRIED = 3  # chips whose outputs are compared with the nominal ones

# Where a network is in several pieces, torch may be faster: both are measured TURNS times on some images of one chip,
# and torch is taken if its time is less than FASTER of the engine's. Networks in one piece, those that take the engine
# less than WORTH seconds, and work of which this would be more than SHARE are not measured: results of those do not
# depend on how busy the machine is.
MEASURED, TURNS, FASTER, WORTH, SHARE = 128, 3, 0.9, 0.1, 0.1

# Chips that see a part of a loader before the next part is read, at least, where its batches do not fit the memory.
TOGETHER = 16


class Tally(NamedTuple):
    """Sums over images on a chip.

    Attributes:
        total: of the metric; for the accuracy, the number of correctly classified images.
        count: what the total is divided by.
        bad: images with an output that is not finite.
    """

    total: Any = 0
    count: float = 0
    bad: int = 0

    def plus(self, total: Any, count: float, bad: int) -> Tally:
        """The sums over these images and more. Raises UserError for a total of another shape."""
        shapes = [tuple(t.shape) for t in (self.total, total) if isinstance(t, Tensor)]
        if len(set(shapes)) > 1:
            raise UserError(
                f"evaluate: the metric's function must give sums of one shape, not {shapes[0]} and then {shapes[1]}; "
                "sum over the images"
            )
        return Tally(self.total + total, self.count + count, self.bad + bad)


# Maps chip samples, and a callback that is given the number of images that were evaluated since its last call, to a
# tally a chip.
Counter = Callable[[Sequence[int], Callable[[int], object]], list[Tally]]


class EngineWarning(UserWarning):
    """The network, or a part of it, runs through torch instead of the C++ core."""


class OutputWarning(UserWarning):
    """Outputs of the network are NaN or infinite, or change from call to call."""


@dataclass(frozen=True)
class ChipSetup:
    """How a model is set up for a chip sample.

    Attributes:
        simulation: how chips are simulated.
        first_layer: layers of a smaller index stay nominal.
        prepare: called with the model after each chip is programmed; None: nothing to do.
        put_back: restores the model's parameters and buffers, so that each chip begins from the same state.
    """

    simulation: Simulation
    first_layer: int
    prepare: Callable[[nn.Module], None] | None
    put_back: Callable[[], None]

    @contextmanager
    def programmed(self, model: nn.Module, sample: int) -> Iterator[None]:
        """Program and prepare a chip for the length of a block."""
        with programmed(model, sample, self.first_layer):
            self.put_back()
            if self.prepare is not None:
                self.prepare(model)
                model.eval()
            yield

    def engine(self, model: nn.Module, example: Tensor | Inputs, sample: int) -> Engine:
        """An engine for the model's current weights, tried on chip `sample`. Raises Unsupported where there is none."""
        example, how = example.to(next(model.parameters()).device), self.simulation
        return Engine(model, example, self.first_layer, how.precision, how.memory, how.gpu_method, sample)


def _is_dense(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.layout == torch.strided and not tensor.is_meta


@contextmanager
def restoring(model: nn.Module, parameters: bool) -> Iterator[Callable[[], None]]:
    """Yield a function that restores the buffers, and with `parameters` the parameters, to their values on entry.

    It is also called at the end of the block. Buffers are always restored: a network may count its calls in one.
    """
    owners = [(m._buffers, name) for m in model.modules() for name, value in m._buffers.items() if _is_dense(value)]
    buffers = [(own, name, own[name], own[name].detach().clone()) for own, name in owners]
    kept = [(p, p.detach().clone()) for p in model.parameters()] if parameters else []

    @torch.no_grad()
    def restore() -> None:
        for own, name, buffer, value in buffers:
            own[name] = buffer
            if not same(buffer, value):
                buffer.copy_(value)
        for parameter, value in kept:
            parameter.copy_(value)

    try:
        yield restore
    finally:
        restore()


@torch.no_grad()
def count(model: nn.Module, batches: Iterable[Batch], largest: int, metric: Metric) -> Tally:
    """The sums of a metric over batches, through torch, with current weights; `largest` is the largest label."""
    device = next(model.parameters()).device
    found, tally, images_of = torch.zeros(2, dtype=torch.int64, device=device), Tally(), 0
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)
        images_of += len(labels)
        # Convolutions on a CPU are about 1.4 times faster in this memory order.
        if isinstance(images, Tensor) and images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        outputs = check_outputs(run(model, images), images, largest, metric=metric)
        if metric.is_accuracy:
            found += classified(main_output(outputs), labels)
        else:
            tally = tally.plus(*metric.batch(outputs, labels, "evaluate"), not_finite(outputs, len(labels)))
    if metric.is_accuracy:
        correct, bad = found.tolist()
        return Tally(correct, images_of, bad)
    return tally


def make_counter(
    model: nn.Module, data: Data, samples: Sequence[int], setup: ChipSetup, metric: Metric
) -> tuple[Counter, int]:
    """Choose how chips are simulated: (counter, chips in a chunk).

    The network is first tried on a few images: variation must reach its layers, and its outputs must be those that the
    metric reads.

    Args:
        model: a converted model, in evaluation mode and with nominal weights.
        data: images and labels.
        samples: the chip samples that will be counted, at least one.
        setup: how the model is set up for each.
        metric: what is summed.

    Warns:
        EngineWarning: what runs through torch, and why.
        OutputWarning: outputs that change from call to call.

    Raises:
        UserError: as `correctnet.crossbar.probe.check_reached` and `correctnet.datasets.batches.check_outputs`.
    """
    device = next(model.parameters()).device
    few = data.head[0].to(device)
    reason = None
    with torch.no_grad():
        nominal = check_outputs(run(model, few), few, data.largest, metric=metric)
        metric.batch(nominal, data.head[1].to(device), "evaluate")
        check_reached(model, few, nominal, samples[:TRIED], setup.first_layer)
        if looks_across(lambda x: run(model, x), few, nominal):
            reason = "its output for an image depends on the others of the batch, so batches are kept as they are"
            if not same(nominal, run(model, few)):
                reason = "its outputs change from call to call"
                warnings.warn(
                    "the network's outputs change from call to call on one chip, and its accuracies with them"
                    if metric.is_accuracy
                    else f"the network's outputs change from call to call on one chip, and the {metric.name} with them",
                    OutputWarning,
                    stacklevel=4,
                )
        elif not isinstance(nominal, Tensor) and not metric.reads_main:
            reason = "it returns more than one tensor, which the metric reads"
        elif not data.uniform:
            reason = "the images have several shapes or types"
    automatic = setup.simulation.engine == "auto"
    if automatic and reason is None:
        try:
            return _engine_counter(model, data, setup, samples, metric)
        except Unsupported as error:
            reason = str(error)
    if automatic:
        warnings.warn(f"everything runs through torch: {reason}", EngineWarning, stacklevel=4)
    # A loader that is read anew is read once for several chips; `prepare` makes each chip's network once.
    return _torch_counter(model, data, setup, metric), 1 if data.kept or setup.prepare is not None else TOGETHER


def _torch_counter(model: nn.Module, data: Data, setup: ChipSetup, metric: Metric) -> Counter:
    """Count through torch: chip by chip, or where the data does not fit the memory, piece by piece on each chip."""

    def counter(samples: Sequence[int], done: Callable[[int], object]) -> list[Tally]:
        tallies = dict.fromkeys(samples, Tally())
        whole = setup.prepare is not None or len(samples) == 1
        for batches in [data] if whole else data.pieces():
            for sample in samples:
                with setup.programmed(model, sample), keeping(model):
                    tallies[sample] = tallies[sample].plus(*count(model, batches, data.largest, metric))
                done(data.images if whole else sum(len(labels) for _, labels in batches))
        return list(tallies.values())

    return counter


def _prepared_counter(model: nn.Module, data: Data, setup: ChipSetup, metric: Metric) -> Counter:
    """Count with an engine of its own for each chip."""

    def counter(samples: Sequence[int], done: Callable[[int], object]) -> list[Tally]:
        tallies = []
        for sample in samples:
            with setup.programmed(model, sample):
                try:
                    engine = setup.engine(model, data.head[0], sample)
                except Unsupported as error:
                    warnings.warn(f"chip {sample} runs through torch: {error}", EngineWarning, stacklevel=2)
                    with keeping(model):
                        tallies.append(count(model, data, data.largest, metric))
                    done(data.images)
                    continue
                tally = Tally()
                for x, y in _blocks(data, GPU_BLOCK if engine.on_gpu else BLOCK):
                    (found,) = _by_engine(engine, x, y, [sample], metric)
                    tally = tally.plus(*found)
                    done(len(y))
                tallies.append(tally)
        return tallies

    return counter


def _by_engine(
    engine: Engine, images: Tensor | Inputs, labels: Tensor, samples: Sequence[int], metric: Metric
) -> list[Tally]:
    """The sums of a metric over images on each chip, through an engine."""
    if metric.is_accuracy:
        counts = zip(*engine.count(images, labels, samples), strict=True)
        return [Tally(correct, len(labels), bad) for correct, bad in counts]
    tallies = [Tally() for _ in samples]
    for i, part, outputs in engine.each(images, samples):
        targets = labels[part].to(outputs.device)
        found = metric.batch(outputs, targets, "evaluate")
        tallies[i] = tallies[i].plus(*found, not_finite(outputs, len(targets)))
    return tallies


def _engine_counter(
    model: nn.Module, data: Data, setup: ChipSetup, samples: Sequence[int], metric: Metric
) -> tuple[Counter, int]:
    """Count through one engine: (counter, chips in a chunk). Raises Unsupported if torch has to run the network."""
    engine = setup.engine(model, data.head[0], samples[0])
    if setup.simulation.gpu_method != "auto" and not engine.on_gpu:
        warnings.warn(
            f"gpu_method {setup.simulation.gpu_method!r} has no effect: the model is on the CPU, where the core draws "
            "noise while it packs the weights",
            EngineWarning,
            stacklevel=5,
        )
    _check_faster(engine, model, data, setup, samples, metric)
    if (engine.report.unfused or engine.report.torch) and not engine.library:
        warnings.warn(f"not all of the network runs in the C++ core: {engine.report}", EngineWarning, stacklevel=5)
    if setup.prepare is not None:
        return _prepared_counter(model, data, setup, metric), 1

    threads = GPU_THREADS if engine.on_gpu else torch.get_num_threads()
    cost = max(1.0, engine.cost[1])

    def chips(flop: float, images: int) -> int:
        """The chips of a call in which each thread does about `flop` operations: a multiple of the threads."""
        return threads * max(1, int(flop / (cost * images)))

    rate = CALL_FLOP / CALL_SECONDS  # operations a second and thread, as measured in the last call

    def counter(samples: Sequence[int], done: Callable[[int], object]) -> list[Tally]:
        nonlocal rate
        tallies = dict.fromkeys(samples, Tally())
        for x, y in _blocks(data, GPU_BLOCK if engine.on_gpu else BLOCK):
            i = 0
            while i < len(samples):
                part = samples[i : i + chips(rate * CALL_SECONDS, len(y))]
                began = time.perf_counter()
                for sample, found in zip(part, _by_engine(engine, x, y, part, metric), strict=True):
                    tallies[sample] = tallies[sample].plus(*found)
                rate = cost * len(part) * len(y) / threads / max(1e-6, time.perf_counter() - began)
                i += len(part)
                done(len(part) * len(y))
        return list(tallies.values())

    size = chips(CHUNK_FLOP, data.images)
    return counter, size if data.kept else max(size, TOGETHER)


def _check_faster(
    engine: Engine, model: nn.Module, data: Data, setup: ChipSetup, samples: Sequence[int], metric: Metric
) -> None:
    """Measure the engine and torch on the first chip. Raises Unsupported where torch is faster."""
    chosen = setup.simulation.precision != "float32" or setup.prepare is not None
    short = 2 * TURNS * min(MEASURED, data.images) > SHARE * len(samples) * data.images
    if engine.whole or engine.on_gpu or chosen or short:
        return
    sample = samples[0]
    images, labels = next(_blocks(data, MEASURED))
    batch = images[:MEASURED], labels[:MEASURED]

    def by_torch() -> None:
        with setup.programmed(model, sample), keeping(model):
            count(model, [batch], data.largest, metric)

    ways = {"engine": lambda: _by_engine(engine, *batch, [sample], metric), "torch": by_torch}
    seconds = dict.fromkeys(ways, math.inf)
    for _ in range(TURNS):  # the first warms up
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            seconds[name] = min(seconds[name], time.perf_counter() - began)
            if seconds["engine"] < WORTH:
                return
    if seconds["torch"] < FASTER * seconds["engine"]:
        raise Unsupported(
            f"torch is faster ({seconds['torch']:.2g} s, the core {seconds['engine']:.2g} s for {len(batch[1])} images "
            "on a chip)"
        )


def _blocks(batches: Data, size: int) -> Iterator[Batch]:
    """Batches concatenated until they hold at least `size` images."""
    waiting: list[Batch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(len(labels) for _, labels in waiting) >= size:
            yield tuple(map(joined, zip(*waiting, strict=True)))
            waiting = []
    if waiting:
        yield tuple(map(joined, zip(*waiting, strict=True)))
