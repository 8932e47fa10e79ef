"""The stages that evaluate a model on chip samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from correctnet import devices
from correctnet.crossbar.calibration import clipped, most_clipped
from correctnet.crossbar.convert import chip_of, convert
from correctnet.crossbar.layers import analog_layers, analog_names
from correctnet.crossbar.protection import protect
from correctnet.devices.configuration import DeviceSettings
from correctnet.devices.lognormal import LogNormalVariation
from correctnet.devices.remapped import Remapped
from correctnet.engine.engine import describe
from correctnet.errors import UserError
from correctnet.evaluation.coverage import check_coverage
from correctnet.evaluation.montecarlo import simulate
from correctnet.evaluation.results import COLUMNS, IDENTITY, Result, record
from correctnet.files import storage
from correctnet.methods import candidates as sweeping
from correctnet.methods import recalibration
from correctnet.methods.adaptation import adapt
from correctnet.methods.calibration import add_calibration, calibrate, calibration_share
from correctnet.methods.costs import digital_multiplications
from correctnet.methods.front import digital_share
from correctnet.methods.selection import protected_share, protected_weights
from correctnet.noise import streams
from correctnet.pipeline.models import image_shape, last_stage, network_name, read_network, trained_sigma
from correctnet.pipeline.runtime import Runtime, digital_layers, discard, give_converters, resumable, stage_identity
from correctnet.pipeline.specs import STAGES
from correctnet.settings import Settings

# Simulated chips over which BatchNorm's statistics are estimated.
RECALIBRATION_CHIPS = 20
# Images on which it is counted what converters clip.
CLIPPED_IMAGES = 100


def sensitivity(settings: Settings, path: Path, out: Path, runtime: Runtime) -> None:
    """Evaluate a model with variation in each layer alone, on the validation images. Writes a CSV."""
    s = STAGES["sensitivity"].read(settings)
    storage.check_writable(out)
    model, description = read_network(path, runtime.device)
    data = runtime.load(s, description, path)
    table = sweeping.sensitivity(
        model,
        data.validation.take(s.sensitivity.images),
        devices.make(s.variation),
        chips=s.sensitivity.chips,
        seed=s.seed,
        exclude=digital_layers(s, model, data.train),
        equip=lambda analog: give_converters(s, analog, data.train, description.get("converters")),
        simulation=runtime.simulation(s, streams.chips("sensitivity", s.sensitivity.chips).start),
    )
    level = {s.variation.level_key: s.variation.level}
    storage.write_csv(out, table.assign(stage=last_stage(description), **_device_column(s), **level))


def evaluate_chips(
    settings: Settings,
    path: Path,
    out: Path,
    runtime: Runtime,
    *,
    chips: int,
    start: int = 0,
    notes: Mapping[str, Any] | None = None,
    prefixes: Sequence[int] = (),
) -> Result:
    """Evaluate a model on chip samples. Writes a CSV with a row a chip.

    Args:
        settings: settings of `evaluate`.
        path: the model.
        chips: number of chip samples; at level 0 of the variation all are the nominal network, which is evaluated once.
            With `evaluate.until`, the largest number.
        start: number of the first chip among those for these images: test and validation images have separate chips
            (`correctnet.noise.streams`), as choices are made on the latter.
        notes: further columns of one value each (pair, row), placed before the others.
        prefixes: at level 0, numbers of images N: the number of correct ones among the first N is written
            to the column `prefixes` as N:CORRECT. Table I divides the accuracies of rows with N images by it. Values of
            N that are not below the number of all images are ignored.
    """
    s = STAGES["evaluate"].read(settings)
    storage.check_writable(out)
    if prefixes and s.variation.level != 0:
        raise UserError("--prefix: the nominal network alone is judged on fewer images, too; it needs --sigma 0")
    if s.adapt.passes and s.adapt.weights == "protected" and not s.protect.fraction:
        raise UserError("adapt: the weights that are trained on each chip are the protected ones; set protect.fraction")
    model, description = read_network(path, runtime.device)
    data = runtime.load(s, description, path)
    images = getattr(data, s.evaluate.split).take(s.evaluate.images)
    digital = digital_layers(s, model, data.train)
    if s.calibrate.images:
        model = add_calibration(model, s.calibrate.rank, digital)
    device = devices.make(s.variation)
    analog = convert(model, Remapped(device) if s.mapping.rows == "assigned" else device, s.seed, digital)
    first = streams.chips(s.evaluate.split, chips, start).start
    if s.variation.level > 0:
        check_coverage(model, analog, images.images[:8], sample=first)
    else:
        chips = min(chips, 1)
    masks = {}
    if s.protect.fraction:
        known, how = data.train.take(s.protect.images), {"exclude": digital, "seed": s.seed}
        masks = protected_weights(model, s.protect.fraction, s.protect.select, s.protect.allocation, data=known, **how)
        protect(analog, masks)
    if s.variation.level > 0:  # the nominal network is digital
        give_converters(s, analog, data.train, description.get("converters"))
    history = description.get("history", [])
    plan = description.get("compensation") or {"filters": {}}
    columns = {
        "network": network_name(description["network"]),
        "dataset": s.data.name,
        "split": s.evaluate.split,
        **_variation_columns(analog),
        "overhead": (
            description.get("overhead", 0.0)
            + digital_share(model, digital)
            + protected_share(model, masks)
            + calibration_share(model)
        ),
        "layers": len(plan["filters"]),
        "epochs": " + ".join(f"{h['epochs']} {h['stage']}" for h in history),
        "trained_sigma": trained_sigma(history),
    }
    if any(layer.periphery is not None for layer in analog_layers(analog)):
        # The first chip of all, since the chunks of an evaluation have the same columns.
        same = streams.chips(s.evaluate.split, 1).start
        fractions = clipped(analog, images.take(CLIPPED_IMAGES).images, same)
        columns |= {"dac_bits": s.converters.dac_bits, "adc_bits": s.converters.adc_bits}
        columns |= {"clipped": most_clipped(fractions)}
    if digital or masks or plan["filters"] or description.get("sidepath") or s.calibrate.images:
        columns["digital_macs"] = _multiplications(model, images.images[:2], digital, masks)
    if taken := sorted(set(notes or {}) & {*columns, *COLUMNS, *IDENTITY, "prefixes"}):
        raise UserError(f"--note {taken[0]}: the evaluation has a column of that name")
    calibration = data.train.take(s.evaluate.recalibrate_images).images
    steps: list[Callable[[nn.Module], None]] = []
    if s.evaluate.recalibrate == "simulated":
        simulated = streams.chips("recalibration", RECALIBRATION_CHIPS)
        recalibration.recalibrate(analog, calibration, simulated, s.montecarlo.precision)
    elif s.evaluate.recalibrate == "chip":
        steps.append(lambda chip: recalibration.recalibrate(chip, calibration, None, s.montecarlo.precision))
    if s.calibrate.images and s.variation.level > 0:
        few = data.train.take(s.calibrate.images).images
        columns["calibrate_images"] = len(few)
        steps.append(lambda chip: calibrate(chip, few, s.calibrate.ridge))
    times: dict[int, float] = {}
    if s.adapt.passes and s.variation.level > 0:  # without variation there is nothing to adapt to
        columns |= {"adapt_images": len(data.train.take(s.adapt.images)), "adapt_passes": s.adapt.passes}
        steps.append(lambda chip: adapt(chip, data.train, seed=s.seed, **dict(s.adapt)))

    def prepare(chip: nn.Module) -> None:
        began = time.perf_counter()
        for step in steps:
            step(chip)
        times[chip_of(chip).sample] = time.perf_counter() - began

    on_chip = prepare if steps else None
    save = None
    if runtime.work:
        # Rows of other settings or another model are in a file of another name.
        save = resumable(
            runtime.work, "chips", stage_identity("evaluate", settings, description, *storage.model_files(path))
        )
    until = s.evaluate.until if s.variation.level > 0 else None
    result = simulate(analog, images, chips, runtime.simulation(s, first), save=save, prepare=on_chip, until=until)
    silent = runtime.simulation(s, first, progress=False)
    counts = {
        n: simulate(analog, images.take(n), 1, silent, prepare=on_chip).table["correct"][0]
        for n in sorted(set(prefixes))
        if n < len(images)
    }
    if counts:
        columns["prefixes"] = " ".join(f"{n}:{correct}" for n, correct in counts.items())
    if "adapt_passes" in columns:  # of the chips that were not done before a resumption
        seconds = result.table["sample"].map(times).astype(float).round(3)
        result = replace(result, table=result.table.assign(adapt_seconds=seconds))
    result = record(result, {**(notes or {}), **columns})
    result.to_csv(out)
    if save:
        discard(save)
    return result


def _multiplications(
    model: nn.Module, images: Tensor, digital: Sequence[str], masks: Mapping[str, Tensor]
) -> float | None:
    """Digital multiplications / those of the original network; None for networks whose layers are not all counted."""
    try:
        return digital_multiplications(model, images, digital, masks)
    except UserError:  # attention, recurrent layers
        return None


def describe_engine(path: Path) -> str:
    """List layer by layer, as text, what of the model at `path` the C++ core runs."""
    model, description = read_network(path)
    analog = convert(model, LogNormalVariation(0.5))
    example = torch.zeros(2, *image_shape(description["network"]))
    report = describe(analog, example)
    names = analog_names(analog)
    lines = [f"{path}: {network_name(description['network'])}, {report}"]
    for layer in analog_layers(analog):
        name = names[id(layer)]
        state = "fused" if name in report.fused else "unfused"
        lines.append(f"  {layer.layer_index:2d} {name:24s} {state:8s} {' x '.join(map(str, layer.nominal.shape))}")
    return "\n".join(lines)


def _device_column(settings: Settings) -> dict[str, str]:
    """The column that names a measured device; none for the lognormal."""
    return {"variation": settings.variation.text} if isinstance(settings.variation, DeviceSettings) else {}


def _variation_columns(analog: nn.Module) -> dict[str, Any]:
    """Columns of the device model: its settings, and of the lognormal the moments of w / w_nominal.

    The multiple of a measured device's deviations is its `level`, and `measurement` the digest of its table or fit.
    """
    described = analog_layers(analog)[0].variation.describe()
    names = {"model": "variation", "mean": "factor_mean", "cv": "factor_cv", "noise": "level"}
    return {names.get(key, key): value for key, value in described.items()}
