"""Counts of correctly classified images, chip sample by chip sample, through the C++ core or through torch.

`make_counter` tries the network on a few images and chooses:

    engine     one engine for all chips: many chips a call
    prepared   one engine a chip, where `prepare` changes the model on each chip
    torch      what the core cannot run, and everything with `engine="torch"`
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from correctnet.crossbar.convert import keeping, programmed
from correctnet.crossbar.probe import check_reached, run, same
from correctnet.datasets.batches import Batch, Data, check_outputs, looks_across
from correctnet.engine.engine import BLOCK, GPU_BLOCK, Engine, Unsupported, classified
from correctnet.evaluation.simulation import Simulation

# An interruption loses one chunk of chips, whose size is given in floating-point operations a thread (a core does
# about 5e10 a second). A call into the core cannot be interrupted, but each call prepares its images again: the first
# call is of CALL_FLOP operations, later ones of as many as take about CALL_SECONDS.
CHUNK_FLOP, CALL_FLOP, CALL_SECONDS = 1e12, 1e10, 1.0
GPU_THREADS = 256  # threads that a GPU counts for in these sizes, at least
TRIED = 3  # chips whose outputs are compared with the nominal ones

# Maps chip samples, and a callback that is given the number of images classified since its last call, to a pair a
# chip: (correctly classified images, images with an output that is not finite).
Counter = Callable[[Sequence[int], Callable[[int], object]], list[tuple[int, int]]]


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

    def engine(self, model: nn.Module, example: Tensor, sample: int) -> Engine:
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
def count(model: nn.Module, data: Data) -> tuple[int, int]:
    """(correctly classified images, images with an output that is not finite), through torch, with current weights."""
    device = next(model.parameters()).device
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    for images, labels in data:
        images = images.to(device)
        if images.dim() == 4:  # convolutions on a CPU are about 1.4 times faster in this memory order
            images = images.contiguous(memory_format=torch.channels_last)
        outputs = check_outputs(run(model, images), images, data.largest)
        counts += classified(outputs, labels.to(device))
    return tuple(counts.tolist())


def make_counter(model: nn.Module, data: Data, samples: Sequence[int], setup: ChipSetup) -> tuple[Counter, int]:
    """Choose how chips are simulated: (counter, chips in a chunk).

    The network is first tried on a few images: variation must reach its layers, and its outputs must be logits.

    Args:
        model: a converted model, in evaluation mode and with nominal weights.
        data: images and labels.
        samples: the chip samples that will be counted, at least one.
        setup: how the model is set up for each.

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
        nominal = check_outputs(run(model, few), few, data.largest)
        check_reached(model, few, nominal, samples[:TRIED], setup.first_layer)
        if looks_across(lambda x: run(model, x), few, nominal):
            reason = "its output for an image depends on the others of the batch, so batches are kept as they are"
            if not same(nominal, run(model, few)):
                reason = "its outputs change from call to call"
                warnings.warn(
                    "the network's outputs change from call to call on one chip, and its accuracies with them",
                    OutputWarning,
                    stacklevel=4,
                )
        elif not data.uniform:
            reason = "the images have several shapes or types"
    automatic = setup.simulation.engine == "auto"
    if automatic and reason is None:
        try:
            return _engine_counter(model, data, setup, samples[0])
        except Unsupported as error:
            reason = str(error)
    if automatic:
        warnings.warn(f"everything runs through torch: {reason}", EngineWarning, stacklevel=4)
    return _torch_counter(model, data, setup), 1


def _torch_counter(model: nn.Module, data: Data, setup: ChipSetup) -> Counter:
    """Count chip by chip through torch."""

    def counter(samples: Sequence[int], done: Callable[[int], object]) -> list[tuple[int, int]]:
        counts = []
        for sample in samples:
            with setup.programmed(model, sample), keeping(model):
                counts.append(count(model, data))
            done(data.images)
        return counts

    return counter


def _prepared_counter(model: nn.Module, data: Data, setup: ChipSetup) -> Counter:
    """Count with an engine of its own for each chip."""

    def counter(samples: Sequence[int], done: Callable[[int], object]) -> list[tuple[int, int]]:
        counts = []
        for sample in samples:
            with setup.programmed(model, sample):
                try:
                    engine = setup.engine(model, data.head[0], sample)
                except Unsupported as error:
                    warnings.warn(f"chip {sample} runs through torch: {error}", EngineWarning, stacklevel=2)
                    with keeping(model):
                        counts.append(count(model, data))
                    done(data.images)
                    continue
                correct = not_finite = 0
                for x, y in _blocks(data, GPU_BLOCK if engine.on_gpu else BLOCK):
                    (a,), (b,) = engine.count(x, y, [sample])
                    correct, not_finite = correct + a, not_finite + b
                    done(len(y))
                counts.append((correct, not_finite))
        return counts

    return counter


def _engine_counter(model: nn.Module, data: Data, setup: ChipSetup, sample: int) -> tuple[Counter, int]:
    """Count through one engine: (counter, chips in a chunk). Raises Unsupported if the core cannot run the network."""
    engine = setup.engine(model, data.head[0], sample)
    if setup.simulation.gpu_method != "auto" and not engine.on_gpu:
        warnings.warn(
            f"gpu_method {setup.simulation.gpu_method!r} has no effect: the model is on the CPU, where the core draws "
            "noise while it packs the weights",
            EngineWarning,
            stacklevel=5,
        )
    if (engine.report.unfused or engine.report.torch) and not engine.library:
        warnings.warn(f"not all of the network runs in the C++ core: {engine.report}", EngineWarning, stacklevel=5)
    if setup.prepare is not None:
        return _prepared_counter(model, data, setup), 1

    threads = GPU_THREADS if engine.on_gpu else torch.get_num_threads()
    cost = max(1.0, engine.cost[1])

    def chips(flop: float, images: int) -> int:
        """The chips of a call in which each thread does about `flop` operations: a multiple of the threads."""
        return threads * max(1, int(flop / (cost * images)))

    rate = CALL_FLOP / CALL_SECONDS  # operations a second and thread, as measured in the last call

    def counter(samples: Sequence[int], done: Callable[[int], object]) -> list[tuple[int, int]]:
        nonlocal rate
        counts = {sample: [0, 0] for sample in samples}
        for x, y in _blocks(data, GPU_BLOCK if engine.on_gpu else BLOCK):
            i = 0
            while i < len(samples):
                part = samples[i : i + chips(rate * CALL_SECONDS, len(y))]
                began = time.perf_counter()
                for sample, *found in zip(part, *engine.count(x, y, part), strict=True):
                    counts[sample] = [a + b for a, b in zip(counts[sample], found, strict=True)]
                rate = cost * len(part) * len(y) / threads / max(1e-6, time.perf_counter() - began)
                i += len(part)
                done(len(part) * len(y))
        return [tuple(found) for found in counts.values()]

    return counter, chips(CHUNK_FLOP, data.images)


def _blocks(batches: Data, size: int) -> Iterator[Batch]:
    """Batches concatenated until they hold at least `size` images."""
    waiting: list[Batch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(len(labels) for _, labels in waiting) >= size:
            yield torch.cat([x for x, _ in waiting]), torch.cat([y for _, y in waiting])
            waiting = []
    if waiting:
        yield torch.cat([x for x, _ in waiting]), torch.cat([y for _, y in waiting])
