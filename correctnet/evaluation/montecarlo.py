"""Monte Carlo over chip samples: accuracies of many chips, with their statistics.

result = evaluate(analog, images_and_labels, chips=250)
print(result)                     # mean, standard deviation, 95 % confidence interval
result.yield_at(0.95).low         # the fraction of chips at or above an accuracy, with its binomial interval

On the CPU the C++ core runs the network (`correctnet.engine.engine`), many times faster than torch does; what it cannot run
goes through torch, and a warning names it.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from correctnet.crossbar.convert import chip_of, keeping, programmed
from correctnet.crossbar.layers import AnalogLayer, analog_layers
from correctnet.crossbar.probe import check_reached, left_alone, run, same
from correctnet.datasets.batches import Batch, Batches, Data, check_outputs, looks_across
from correctnet.engine.engine import BLOCK, GPU_BLOCK, MEMORY, Engine, Method, Unsupported, check_method, classified
from correctnet.errors import UserError, whole
from correctnet.evaluation.results import COLUMNS, IDENTITY, Result, read_chips
from correctnet.files import storage
from correctnet.precision import Precision

# A chunk of chips is what an interruption loses: floating-point operations a thread, of which a core does some 5e10 a
# second. A call into the core cannot be interrupted and prepares its images anew: the first may take so many
# operations, and those behind it as many as take about so many seconds.
CHUNK_FLOP, CALL_FLOP, CALL_SECONDS = 1e12, 1e10, 1.0
GPU_THREADS = 256  # that a GPU counts for, at least
TRIED = 3  # chips whose outputs must differ from the nominal ones


def count_correct(model: nn.Module, data: Batches, batch: int = 100) -> tuple[int, int]:
    """(correctly classified images, images) of `data`, with the weights that `model` has now.

    Raises UserError for data that `evaluate` would refuse.
    """
    with left_alone(model):
        found = Data(data, batch)
        correct, _ = _count(model, found, found.largest)
    return correct, found.images


@torch.no_grad()
def _count(model: nn.Module, batches: Data, largest: int) -> tuple[int, int]:
    """How many images are classified correctly, and how many have outputs that are not finite."""
    device = next(model.parameters()).device
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    for images, labels in batches:
        images = images.to(device)
        if images.dim() == 4:  # convolutions on a CPU are about 1.4 times faster in this order
            images = images.contiguous(memory_format=torch.channels_last)
        outputs = check_outputs(run(model, images), images, largest)
        counts += classified(outputs, labels.to(device))
    return tuple(counts.tolist())


def clean_accuracy(model: nn.Module, data: Batches, batch: int = 100) -> float:
    """Accuracy with nominal weights; `model` converted or not. Raises UserError for data that `evaluate` refuses."""
    if any(isinstance(module, AnalogLayer) for module in model.modules()):
        with programmed(model, None):
            correct, total = count_correct(model, data, batch)
    else:
        correct, total = count_correct(model, data, batch)
    return correct / total


class EngineWarning(UserWarning):
    """The network, or a part of it, runs through torch instead of the C++ core."""


class OutputWarning(UserWarning):
    """Outputs of the network are NaN or infinite, or change from call to call."""


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
        model: from `correctnet.crossbar.convert.convert`. It is evaluated in evaluation mode; its modes and buffers, the chip
            that it carries, and the random generators of torch, numpy and Python are what they were before.
        data: a `Split`, an (images, labels) pair of tensors, or a loader of such batches that can be iterated often
            and gives the same images each time. images (N, ...), labels (N,) classes; the network gives (N, classes).
            Where it looks across a batch, a loader's batches are kept, and those of tensors are of `batch` images.
        chips: how many chip samples, >= 1.
        start: number of the first; chip 137 is the same chip whatever `start` and `chips` are.
        first_layer: layers of a smaller index stay nominal; all do where it is one more than the last index.
        engine: "auto": the C++ core, and torch for what it cannot run, with an `EngineWarning`; "torch": torch alone.
        precision: of weights and activations in the core, "float32" or "bfloat16" (sums are float32).
        gpu_method: how a GPU gets at noisy weights, see `correctnet.engine.engine`; on a CPU, where there is one way, any but
            "auto" has no effect, and an `EngineWarning` says so.
        memory: bytes that the core may take, about.
        batch: images a forward pass in torch.
        chunk: chips that are taken over all images before the next ones are begun; None: as many as take some twenty
            seconds in the core, and one in torch.
        save: a file for the rows of the chips that are done, written after every chunk. Chips that it holds already
            are not evaluated again. Rows of another model, device, seed or data, or of other settings, are refused; a
            `prepare` is known by its name alone.
        prepare: called with the model after each chip is programmed (e.g. to recalibrate its BatchNorm). As the model
            is not the same on all chips then, each has an engine of its own; each begins with the parameters and
            buffers that the model has now, and these are put back at the end.
        progress: show a progress bar, and warn of what runs through torch.
        title: of the bar.

    Returns:
        A `Result` with one row a chip. An image counts as correct where the first largest output is its label's and no
        output is NaN.

    Warns:
        EngineWarning: what runs through torch, and why.
        OutputWarning: outputs that are not finite, or change from call to call.
        CoverageWarning: layers that the network does not use.

    Raises:
        UserError: a model without variation, variation that does not reach the layers that should carry it (then there
            is no accuracy), no chips, or data that are not as above.
    """
    chips, start, first_layer, batch, memory = (
        whole(value, f"evaluate: {name}")
        for name, value in (
            ("chips", chips),
            ("start", start),
            ("first_layer", first_layer),
            ("batch", batch),
            ("memory", memory),
        )
    )
    chunk = None if chunk is None else whole(chunk, "evaluate: chunk")
    if chips < 1 or (chunk is not None and chunk < 1):
        raise UserError(f"evaluate: chips and chunk must be at least 1, not {chips} and {chunk}")
    if batch < 1 or memory < 1:
        raise UserError(f"evaluate: batch and memory must be at least 1, not {batch} and {memory}")
    if engine not in ("auto", "torch"):
        raise UserError(f"evaluate: engine must be 'auto' or 'torch', not {engine!r}")
    check_method(gpu_method)
    chip = chip_of(model)
    last = analog_layers(model)[-1].layer_index
    if not 0 <= first_layer <= last + 1:
        raise UserError(f"evaluate: first_layer must lie in 0 to {last + 1} (no layer varies), not {first_layer}")
    if prepare is not None and not callable(prepare):
        raise UserError(f"evaluate: prepare is called with the model, but a {type(prepare).__name__} cannot be called")
    if save is not None and not isinstance(save, str | os.PathLike):
        raise UserError(f"evaluate: save is the path of a file, not a {type(save).__name__}")
    _check_save(save)
    if start < 0 or start + chips > 2**32:
        raise UserError(f"evaluate: chips lie in [0, 2^32), not {start} to {start + chips - 1}")
    with left_alone(model), programmed(model, None), _put_back(model, prepare) as put_back:
        images = Data(data, batch, memory)
        run_settings = f"first_layer={first_layer} engine={engine} precision={precision} batch={batch}"
        if prepare is not None:
            run_settings += f" prepare={getattr(prepare, '__qualname__', type(prepare).__name__)}"
        identity = {
            "seed": chip.seed,
            "images": images.images,
            "data": images.digest,
            "device": _device_text(model),
            "model": _state_digest(model),
        }
        saved = {**identity, "settings": run_settings}
        rows = storage.resume(save, _read_rows, [])
        _check_rows(save, rows, saved)
        have = {row["sample"] for row in rows}
        todo = [sample for sample in range(start, start + chips) if sample not in have]
        bad: dict[int, int] = {}
        if todo:
            simulation = _Simulation(first_layer, precision, memory, gpu_method, prepare, put_back)
            count, size = _counter(model, images, todo, engine, simulation)
            total, size = images.images * chips, chunk or size
            with tqdm(
                desc=title, unit="image", unit_scale=True, total=total, disable=not progress, mininterval=1
            ) as bar:
                bar.update(images.images * (chips - len(todo)))
                for i in range(0, len(todo), size):
                    samples = todo[i : i + size]
                    for sample, (correct, not_finite) in zip(samples, count(samples, bar.update), strict=True):
                        if not 0 <= correct <= images.images:
                            raise RuntimeError(f"evaluate: {correct} of {images.images} images are correct")
                        if not_finite:
                            bad[sample] = not_finite
                        own = {"sample": sample, "correct": correct, "accuracy": correct / images.images}
                        rows.append({**own, **saved})
                    if save:
                        columns = [*COLUMNS, *IDENTITY, "settings"]
                        storage.write_csv(Path(save), pd.DataFrame(rows, columns=columns))
        if bad:
            listed = ", ".join(map(str, list(bad)[:5])) + (", ..." if len(bad) > 5 else "")
            warnings.warn(
                f"outputs that are NaN or infinite on {len(bad)} of {len(todo)} chips ({listed}), for up to "
                f"{max(bad.values())} of {images.images} images; an image with a NaN is counted as wrong",
                OutputWarning,
                stacklevel=2,
            )
    table = pd.DataFrame(rows, columns=[*COLUMNS, *IDENTITY]).sort_values("sample", ignore_index=True)
    return Result(table[table["sample"].between(start, start + chips - 1)].reset_index(drop=True))


def _device_text(model: nn.Module) -> str:
    """The device model in words: its name and settings, without the moments that follow from them."""
    described = dict(analog_layers(model)[0].variation.describe())
    name = described.pop("model", type(analog_layers(model)[0].variation).__name__)
    settings = (f"{key}={value}" for key, value in described.items() if key not in ("mean", "cv"))
    return f"{name}({', '.join(settings)})"


def _state_digest(model: nn.Module) -> str:
    """A digest of the network: its modules' kinds and settings, its parameters and buffers, and which layers vary."""
    digest = hashlib.blake2b(digest_size=8)
    for name, module in model.named_modules():
        index = module.layer_index if isinstance(module, AnalogLayer) else ""
        settings = re.sub(r"0x[0-9a-fA-F]+", "", module.extra_repr())  # without addresses of objects
        digest.update(f"{name}:{type(module).__qualname__}:{index}:{settings};".encode())
    state = {**model.state_dict(), **dict(model.named_buffers())}  # those that are not saved, too
    for name, tensor in state.items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
            tensor = tensor if tensor.layout == torch.strided else tensor.to_dense()
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of chips that `save` holds."""
    return read_chips(path)[[*COLUMNS, *IDENTITY, "settings"]].to_dict("records")


def _check_save(save: str | Path | None) -> None:
    """Find out before the work whether rows can be put there: in a file that can be written, and holds nothing else."""
    if not save:
        return
    storage.check_writable(save)
    path = Path(save)
    if path.is_file():
        with path.open("rb") as file:
            first = file.readline(1 << 16).strip()
        columns = [name.encode() for name in (*COLUMNS, *IDENTITY, "settings")]
        if not b",".join(columns).startswith(first) and not set(columns[: len(COLUMNS)]) <= set(first.split(b",")):
            raise UserError(f"evaluate: {save} holds something else than chips; give another file, or delete it")


def _check_rows(save: str | Path | None, rows: list[dict[str, Any]], saved: dict[str, Any]) -> None:
    """Refuse rows of another simulation."""
    for row in rows:
        for name, wanted in saved.items():
            if row[name] != wanted:
                raise UserError(
                    f"evaluate: {save} holds chips of another simulation ({name}: {row[name]} there, {wanted} asked "
                    "for); give another file, or delete it"
                )


# From chip samples, and a function that is told how many images were classified: for each chip, on how many images it
# is correct, and how many have outputs that are not finite.
Counter = Callable[[Sequence[int], Callable[[int], object]], list[tuple[int, int]]]


@dataclass(frozen=True)
class _Simulation:
    """How chips are simulated; the arguments of `evaluate` that all counters take."""

    first_layer: int
    precision: Precision
    memory: int
    method: Method
    prepare: Callable[[nn.Module], None] | None
    put_back: Callable[[], None]

    def ready(self, model: nn.Module) -> None:
        """Prepare the chip that is programmed now, from the state that the model came with."""
        self.put_back()
        if self.prepare is not None:
            self.prepare(model)
            model.eval()

    def engine(self, model: nn.Module, example: Tensor, sample: int) -> Engine:
        """An engine for the model as it is now, tried on a chip."""
        example = example.to(next(model.parameters()).device)
        return Engine(model, example, self.first_layer, self.precision, self.memory, self.method, sample)


def _dense(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.layout == torch.strided and not tensor.is_meta


@contextmanager
def _put_back(model: nn.Module, prepare: object) -> Iterator[Callable[[], None]]:
    """A function that puts parameters and buffers back to what they are now; called at the end, too.

    Without `prepare`, which is what changes parameters, it puts buffers back: a network may count its calls.
    """
    owners = [(m._buffers, name) for m in model.modules() for name, value in m._buffers.items() if _dense(value)]
    buffers = [(own, name, own[name], own[name].detach().clone()) for own, name in owners]
    parameters = [] if prepare is None else [(p, p.detach().clone()) for p in model.parameters()]

    @torch.no_grad()
    def restore() -> None:
        for own, name, buffer, value in buffers:
            own[name] = buffer
            if not same(buffer, value):
                buffer.copy_(value)
        for parameter, value in parameters:
            parameter.copy_(value)

    try:
        yield restore
    finally:
        restore()


def _counter(
    model: nn.Module, data: Data, samples: Sequence[int], engine: str, simulation: _Simulation
) -> tuple[Counter, int]:
    """What counts, and the chips of a chunk: the core, or torch, with a warning, where the core cannot do it.

    The network is tried on a few images before: variation must reach its layers, and its outputs be classes.
    """
    device = next(model.parameters()).device
    few = data.head[0].to(device)
    reason = None
    with torch.no_grad():
        nominal = check_outputs(run(model, few), few, data.largest)
        check_reached(model, few, nominal, samples[:TRIED], simulation.first_layer)
        if looks_across(lambda x: run(model, x), few, nominal):
            reason = "its output for an image depends on the others of the batch, whose batches are kept"
            if not same(nominal, run(model, few)):
                reason = "its outputs change from call to call"
                warnings.warn(
                    "the network's outputs change from call to call on one chip, and its accuracies with them",
                    OutputWarning,
                    stacklevel=3,
                )
        elif not data.uniform:
            reason = "the images have several shapes or types"
    if engine == "auto" and reason is None:
        try:
            return _engine_counter(model, data, simulation, samples[0])
        except Unsupported as error:
            reason = str(error)
    if engine == "auto":
        warnings.warn(f"everything runs through torch: {reason}", EngineWarning, stacklevel=3)
    return _torch_counter(model, data, simulation), 1


def _torch_counter(model: nn.Module, data: Data, simulation: _Simulation) -> Counter:
    """Chip by chip through torch."""

    def count(samples: Sequence[int], done: Callable[[int], object]) -> list[tuple[int, int]]:
        counts = []
        for sample in samples:
            with programmed(model, sample, simulation.first_layer):
                simulation.ready(model)
                with keeping(model):
                    counts.append(_count(model, data, data.largest))
            done(data.images)
        return counts

    return count


def _prepared_counter(model: nn.Module, data: Data, simulation: _Simulation) -> Counter:
    """Through an engine for each chip."""

    def count(samples: Sequence[int], done: Callable[[int], object]) -> list[tuple[int, int]]:
        counts = []
        for sample in samples:
            with programmed(model, sample, simulation.first_layer):
                simulation.ready(model)
                try:
                    engine = simulation.engine(model, data.head[0], sample)
                except Unsupported as error:
                    warnings.warn(f"chip {sample} runs through torch: {error}", EngineWarning, stacklevel=2)
                    with keeping(model):
                        counts.append(_count(model, data, data.largest))
                    done(data.images)
                    continue
                correct = not_finite = 0
                for x, y in _blocks(data, GPU_BLOCK if engine.on_gpu else BLOCK):
                    (a,), (b,) = engine.count(x, y, [sample])
                    correct, not_finite = correct + a, not_finite + b
                    done(len(y))
                counts.append((correct, not_finite))
        return counts

    return count


def _engine_counter(model: nn.Module, data: Data, simulation: _Simulation, sample: int) -> tuple[Counter, int]:
    """Through the core, and the chips of a chunk. Raises Unsupported where the core cannot run the network."""
    engine = simulation.engine(model, data.head[0], sample)
    if simulation.method != "auto" and not engine.on_gpu:
        warnings.warn(
            f"gpu_method {simulation.method!r} has no effect: the model is on the CPU, whose core makes weights noisy "
            "while it packs them",
            EngineWarning,
            stacklevel=4,
        )
    if (engine.report.unfused or engine.report.torch) and not engine.library:
        warnings.warn(f"not all of the network runs in the C++ core: {engine.report}", EngineWarning, stacklevel=4)
    if simulation.prepare is not None:
        return _prepared_counter(model, data, simulation), 1

    threads = GPU_THREADS if engine.on_gpu else torch.get_num_threads()
    cost = max(1.0, engine.cost[1])

    def chips(flop: float, images: int) -> int:
        """How many chips each thread may take, times the threads, so that all have as much to do."""
        return threads * max(1, int(flop / (cost * images)))

    rate = CALL_FLOP / CALL_SECONDS  # operations a second and thread, by the last call

    def count(samples: Sequence[int], done: Callable[[int], object]) -> list[tuple[int, int]]:
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

    return count, chips(CHUNK_FLOP, data.images)


def _blocks(batches: Data, size: int) -> Iterator[Batch]:
    """Batches put together until they hold at least `size` images."""
    waiting: list[Batch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(len(labels) for _, labels in waiting) >= size:
            yield torch.cat([x for x, _ in waiting]), torch.cat([y for _, y in waiting])
            waiting = []
    if waiting:
        yield torch.cat([x for x, _ in waiting]), torch.cat([y for _, y in waiting])
