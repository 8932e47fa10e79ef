"""Monte Carlo over chip samples: accuracies of many chips, or values of another metric, with their statistics.

result = evaluate(analog, images_and_labels, chips=250)
print(result)                     # mean, standard deviation, 95 % confidence interval
result.yield_at(0.95).low         # the fraction of chips at or above an accuracy, with its binomial interval

On the CPU the C++ core runs the network (`correctnet.engine.engine`), many times faster than torch; what it cannot run
goes through torch, and a warning names it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn

from correctnet.crossbar.calibration import warn_of_clipping
from correctnet.crossbar.convert import carries_variation, chip_of, programmed
from correctnet.crossbar.layers import AnalogLayer, AnalogModule, analog_layers
from correctnet.crossbar.probe import left_alone
from correctnet.datasets.batches import Batches, Data
from correctnet.devices.protected import Protected
from correctnet.engine.engine import MEMORY, Method
from correctnet.errors import UserError, whole
from correctnet.evaluation.counting import (
    ChipSetup,
    Counter,
    EngineWarning,
    OutputWarning,
    Tally,
    count,
    make_counter,
    restoring,
)
from correctnet.evaluation.results import COLUMNS, IDENTITY, PILOT_COLUMN, VALUES, Result, read_chips
from correctnet.evaluation.simulation import Simulation
from correctnet.evaluation.stopping import PILOT, check_until, chips_for
from correctnet.files import storage
from correctnet.metrics import ACCURACY, Metric, checked
from correctnet.precision import Precision
from correctnet.progress import ProgressBar

__all__ = ["EngineWarning", "OutputWarning", "clean_accuracy", "clean_value", "count_correct", "evaluate", "simulate"]


def count_correct(model: nn.Module, data: Batches, batch: int = 100) -> tuple[int, int]:
    """(correctly classified images, images) of `data`, with the weights that `model` has now.

    Raises UserError for data that `evaluate` would refuse.
    """
    with left_alone(model):
        found = Data.of(data, batch)
        correct = count(model, found, found.largest, ACCURACY).total
    return correct, found.images


def clean_accuracy(model: nn.Module, data: Batches, batch: int = 100) -> float:
    """Accuracy with nominal weights; `model` converted or not. Raises UserError for data that `evaluate` refuses."""
    return clean_value(model, data, batch)


def clean_value(model: nn.Module, data: Batches, batch: int = 100, metric: Metric | None = None) -> float:
    """A metric's value with nominal weights; `model` converted or not.

    Args:
        model: the network.
        data: as for `evaluate`.
        batch: images in a forward pass, for data that is not divided into batches.
        metric: None: the accuracy.

    Raises:
        UserError: data that `evaluate` refuses, or a value that is not finite.
    """
    metric = checked(metric, "clean_value")
    with programmed(model, None) if carries_variation(model) else contextlib.nullcontext():
        if metric.is_accuracy:
            correct, total = count_correct(model, data, batch)
            return correct / total
        with left_alone(model):
            found = Data.of(data, batch, targets=metric.targets)
            tally = count(model, found, found.largest, metric)
    return metric.value(tally.total, tally.count, "clean_value: with nominal weights")


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
    metric: Metric | None = None,
    until: float | None = None,
    progress: bool = True,
    title: str = "chips",
) -> Result:
    """Accuracy of chips `start`, ..., `start + chips - 1` over all of `data`, or their values of another metric.

    Args:
        model: from `correctnet.convert`. It is evaluated in evaluation mode; afterwards its modes and buffers, the
            chip that it carries, and the random generators of torch, numpy and Python are what they were before.
        data: a `Split`, an (images, labels) pair of tensors, or a loader of such batches that can be iterated over
            many times and yields the same images each time. images (N, ...), labels (N,) classes; the network maps
            images to logits (N, classes), or to something that has them: an object with `.logits`, a dict with "logits"
            or "out", a tuple whose first element they are. Another metric may read other labels and outputs. For a
            network of several inputs, data and batches are (a, b, labels), ((a, b), labels), ({"a": a, "b": b}, labels)
            or {"a": a, "b": b, "labels": labels}. A loader is read once for each chunk of chips where its batches do
            not fit `memory`. For a network that looks across a batch, batches of a loader are kept as they are, and
            tensors are divided into batches of `batch` images.
        chips: number of chip samples, >= 1; with `until`, the largest number.
        start: number of the first; chip 137 is the same chip whatever `start` and `chips` are.
        first_layer: layers of a smaller index stay nominal; all do for the last index + 1.
        engine: "auto": the C++ core, with torch for what the core cannot run and an `EngineWarning`; "torch": torch
            alone.
        precision: of weights and activations in the core, "float32" or "bfloat16" (sums are float32). On CPUs without
            instructions for bfloat16 it is float32, with a note.
        gpu_method: where noisy weights are generated on a GPU, see `correctnet.engine.engine`. On a CPU, where there is
            one way, any value but "auto" has no effect, and an `EngineWarning` says so.
        memory: bytes that the core may use, approximately, and that a loader's batches may take to be kept.
        batch: images in a forward pass of torch.
        chunk: chips that see all images before the next chips begin; None: as many as take about twenty seconds in the
            core, and one in torch; at least 16 where a loader's batches do not fit `memory`, unless `prepare` is given.
        save: a file for the rows of finished chips, written after every chunk. Chips that it already holds are not
            evaluated again. Rows of another model, device, seed or data, or of other settings, are refused; of
            `prepare` only the name is compared.
        prepare: called with the model after each chip is programmed (e.g. to recalibrate its BatchNorm). Each chip
            then has an engine of its own and begins with the parameters and buffers that the model has now; these are
            restored at the end.
        metric: a `correctnet.Metric`, e.g. `correctnet.metrics.top_k(5)` or `.mean_squared_error()`; None: the
            accuracy.
        until: as many chips as are needed for a 95 % interval of the mean of at most this half-width, in units of the
            metric (0.002: mean +- 0.2 points), and `chips` at most: 64, and as many more as their standard deviation
            asks for (`correctnet.evaluation.stopping`). None: `chips`.
        progress: show a progress bar.
        title: of the progress bar.

    Returns:
        A `Result` with one row a chip. An image counts as correct if its label is the first largest output and no
        output is NaN. With another metric its values are in the column `value`.

    Warns:
        EngineWarning: what runs through torch, and why.
        ClippingWarning: converters that clip more than 1 % of what a layer reads or computes, on the first chip and
            batch.
        OutputWarning: outputs that are not finite, or change from call to call.
        CoverageWarning: layers that the network does not use.

    Raises:
        UserError: a model without variation, variation that does not reach the layers that should carry it (there is
            no accuracy then), no chips, data other than described above, or a metric that is not finite on a chip.
    """
    simulation = Simulation(start, engine, precision, gpu_method, memory, progress)
    options = {"first_layer": first_layer, "batch": batch, "chunk": chunk, "save": save, "prepare": prepare}
    return simulate(model, data, chips, simulation, metric=metric, until=until, title=title, **options)


def simulate(
    model: nn.Module,
    data: Batches,
    chips: int,
    simulation: Simulation,
    *,
    first_layer: int = 0,
    batch: int = 100,
    chunk: int | None = None,
    save: str | Path | None = None,
    prepare: Callable[[nn.Module], None] | None = None,
    metric: Metric | None = None,
    until: float | None = None,
    title: str = "chips",
) -> Result:
    """`evaluate`, with the options that say how chips are simulated in one object; the other arguments are the same."""
    numbers = {"chips": chips, "first_layer": first_layer, "batch": batch}
    chips, first_layer, batch = (whole(value, f"evaluate: {name}") for name, value in numbers.items())
    chunk = None if chunk is None else whole(chunk, "evaluate: chunk")
    if chips < 1 or (chunk is not None and chunk < 1):
        raise UserError(f"evaluate: chips and chunk must be at least 1, not {chips} and {chunk}")
    if batch < 1:
        raise UserError(f"evaluate: batch must be at least 1, not {batch}")
    chip = chip_of(model)
    simulation = simulation.on(next(model.parameters()).device)
    last = analog_layers(model)[-1].layer_index
    if not 0 <= first_layer <= last + 1:
        raise UserError(f"evaluate: first_layer must lie in 0 to {last + 1} (no layer varies), not {first_layer}")
    if prepare is not None and not callable(prepare):
        raise UserError(f"evaluate: prepare is called with the model, but a {type(prepare).__name__} cannot be called")
    if save is not None and not isinstance(save, str | os.PathLike):
        raise UserError(f"evaluate: save is the path of a file, not a {type(save).__name__}")
    metric, until = checked(metric, "evaluate"), check_until(until, "evaluate")
    columns = [*(COLUMNS if metric.is_accuracy else VALUES), *IDENTITY]
    in_file = [*columns, "settings"]
    _check_save(save, in_file)
    end = simulation.start + chips
    if end > 2**32:
        raise UserError(f"evaluate: chips lie in [0, 2^32), not {simulation.start} to {end - 1}")
    with left_alone(model), programmed(model, None), restoring(model, parameters=prepare is not None) as put_back:
        images = Data.of(data, batch, simulation.memory, targets=metric.targets)
        settings = f"first_layer={first_layer} engine={simulation.engine} precision={simulation.precision}"
        settings += f" batch={batch}"
        if prepare is not None:
            settings += f" prepare={getattr(prepare, '__qualname__', type(prepare).__name__)}"
        saved = {
            "seed": chip.seed,
            "images": images.images,
            "data": images.digest,
            "device": _device_text(model),
            "model": state_digest(model),
            "settings": settings,
        }
        if not metric.is_accuracy:
            saved["metric"] = metric.name
            saved["settings"] += (
                f" metric={hashlib.blake2b(repr(metric.describe()).encode(), digest_size=8).hexdigest()}"
            )
        rows = storage.resume(save, lambda path: read_chips(path)[in_file].to_dict("records"), [])
        _check_rows(save, rows, saved)
        not_finite: dict[int, int] = {}
        evaluated = 0
        possible = range(simulation.start, end)

        def missing(samples: Sequence[int]) -> list[int]:
            done = {row["sample"] for row in rows}
            return [sample for sample in samples if sample not in done]

        @functools.cache
        def counter() -> tuple[Counter, int]:
            warn_of_clipping(model, images.head[0], simulation.start, first_layer)
            setup = ChipSetup(simulation, first_layer, prepare, put_back)
            count_chips, size = make_counter(model, images, missing(possible), setup, metric)
            return count_chips, chunk or size

        def finish(samples: Sequence[int]) -> None:
            nonlocal evaluated
            todo = missing(samples)
            bar.update(images.images * (len(samples) - len(todo)))
            if not todo:
                return
            count_chips, size = counter()
            for i in range(0, len(todo), size):
                part = todo[i : i + size]
                for sample, tally in zip(part, count_chips(part, bar.update), strict=True):
                    if tally.bad:
                        not_finite[sample] = tally.bad
                    rows.append({"sample": sample, **_values(metric, tally, images.images, sample), **saved})
                evaluated += len(part)
                if save:
                    storage.write_csv(Path(save), pd.DataFrame(rows, columns=in_file))

        wanted = possible if until is None else possible[:PILOT]
        with ProgressBar(
            desc=title,
            unit="image",
            unit_scale=True,
            total=images.images * len(wanted),
            disable=not simulation.progress or not missing(possible),
            mininterval=1,
        ) as bar:
            finish(wanted)
            if until is not None:
                value = {row["sample"]: row["accuracy" if metric.is_accuracy else "value"] for row in rows}
                needed = chips_for([value[sample] for sample in wanted], until)
                wanted, rest = possible[:needed], possible[len(wanted) : needed]
                bar.total = images.images * len(wanted)
                finish(rest)
        if not_finite:
            listed = ", ".join(map(str, list(not_finite)[:5])) + (", ..." if len(not_finite) > 5 else "")
            warnings.warn(
                f"outputs that are NaN or infinite on {len(not_finite)} of {evaluated} chips ({listed}), for up to "
                f"{max(not_finite.values())} of {images.images} images"
                + ("; an image with a NaN is counted as wrong" if metric.is_accuracy else ""),
                OutputWarning,
                stacklevel=3,
            )
    table = pd.DataFrame(rows, columns=columns).sort_values("sample", ignore_index=True)
    table = table[table["sample"].isin(wanted)].reset_index(drop=True)
    if until is not None:
        table[PILOT_COLUMN] = min(chips, PILOT)
    return Result(table, metric)


def _values(metric: Metric, tally: Tally, images: int, sample: int) -> dict[str, float]:
    """The columns of a chip's row that hold its value."""
    if not metric.is_accuracy:
        where = f"evaluate: on chip {sample}" + (f", with {tally.bad} outputs that are not finite" if tally.bad else "")
        return {"value": metric.value(tally.total, tally.count, where)}
    correct = tally.total
    if not 0 <= correct <= images:
        raise RuntimeError(f"evaluate: {correct} of {images} images are correct")
    return {"correct": correct, "accuracy": correct / images}


def _device_text(model: nn.Module) -> str:
    """The device model as text: its name and settings, without the moments that follow from them.

    Which weights are protected is said by `state_digest`: their chips can be compared with those without protection.
    """
    device = analog_layers(model)[0].variation
    device = device.device if isinstance(device, Protected) else device
    described = dict(device.describe())
    name = described.pop("model", type(device).__name__)
    settings = (f"{key}={value}" for key, value in described.items() if key not in ("mean", "cv"))
    return f"{name}({', '.join(settings)})"


def state_digest(model: nn.Module) -> str:
    """A digest of the network: its modules' types and settings, its parameters and buffers, and which weights vary."""
    digest = hashlib.blake2b(digest_size=8)
    for name, module in model.named_modules():
        index = module.layer_index if isinstance(module, AnalogLayer) else ""
        parts = module.__dict__.get("parts", {}) if isinstance(module, AnalogModule) else {}
        index = " ".join(map(str, [index, *(f"{own.parameter}={own.layer_index}" for own in parts.values())]))
        index += " ".join(("", *getattr(module, "analog_parameters", ())))
        settings = re.sub(r"0x[0-9a-fA-F]+", "", module.extra_repr())  # without addresses of objects
        digest.update(f"{name}:{type(module).__qualname__}:{index}:{settings};".encode())
    for device in {id(own.variation): own.variation for own in analog_layers(model)}.values():
        if isinstance(device, Protected):
            digest.update(f"protected:{device.describe()['masks']};".encode())
    for own in analog_layers(model):
        if own.periphery is not None:
            digest.update(f"converters:{own.layer_index}:{own.periphery};".encode())
    state = {**model.state_dict(), **dict(model.named_buffers())}  # buffers that are not persistent, too
    for name, tensor in state.items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
            tensor = tensor if tensor.layout == torch.strided else tensor.to_dense()
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _check_save(save: str | Path | None, wanted: list[str]) -> None:
    """Check before the work begins that rows can be saved: the file is writable, and holds the same columns."""
    if not save:
        return
    storage.check_writable(save)
    path = Path(save)
    if path.is_file():
        with path.open("rb") as file:
            first = file.readline(1 << 16).strip()
        columns = [name.encode() for name in wanted]
        if not b",".join(columns).startswith(first) and not {*columns[: len(COLUMNS)]} <= {*first.split(b",")}:
            raise UserError(f"evaluate: {save} holds something else than chips; give another file, or delete it")


def _check_rows(save: str | Path | None, rows: list[dict[str, Any]], saved: dict[str, Any]) -> None:
    """Refuse rows of another simulation."""
    for row in rows:
        for name, wanted in saved.items():
            if row[name] != wanted:
                raise UserError(
                    f"evaluate: {save} holds chips of another simulation ({name}: {row[name]} there, {wanted} requested"
                    "); give another file, or delete it"
                )
