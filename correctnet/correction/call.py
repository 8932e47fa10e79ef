"""`correct`: suppression, candidate layers, search, compensators and evaluation, in one call."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from correctnet.correction.outcome import Correction
from correctnet.crossbar.convert import convert, copy_model
from correctnet.crossbar.layers import CoverageWarning
from correctnet.crossbar.probe import left_alone, run
from correctnet.datasets.batches import Batches, Data, check_outputs, first_batch, largest_label, take
from correctnet.devices.base import Variation
from correctnet.devices.lognormal import LogNormalVariation
from correctnet.errors import UserError, whole
from correctnet.evaluation.montecarlo import EngineWarning, clean_value, simulate
from correctnet.evaluation.results import Result
from correctnet.evaluation.simulation import Simulation
from correctnet.files import storage
from correctnet.methods import candidates as sweeping
from correctnet.methods import work as folder
from correctnet.methods.compensation import compensation_modules
from correctnet.methods.compensation_training import train_compensators
from correctnet.methods.placement import check_limit
from correctnet.methods.placement import search as find_placement
from correctnet.methods.suppression_training import suppress as train_suppressed
from correctnet.metrics import Loss, Metric, checked, loss_of
from correctnet.noise import streams
from correctnet.sections import Section, validate
from correctnet.settings import Compensate, Search, Suppress, Sweep

Options = Mapping[str, Any]
WHAT = "correct"


def correct(
    network: nn.Module,
    train: Batches,
    validation: Batches,
    test: Batches,
    variation: Variation | None = None,
    *,
    limit: float = 0.03,
    chips: int = 250,
    suppress: bool | Options = True,
    sweep: Options | None = None,
    search: Options | None = None,
    compensate: Options | None = None,
    loss: Loss | None = None,
    metric: Metric | None = None,
    seed: int = 0,
    simulation: Simulation | None = None,
    work: str | Path | None = None,
    progress: bool = True,
) -> Correction:
    """Make a trained network robust against device variation: the whole method of the paper.

    1. Error suppression trains a copy under (10) and (11) (`correctnet.suppress`).
    2. Candidate layers are found on the validation images (`correctnet.find_candidates`).
    3. A search decides which of them to compensate, with how many filters (`correctnet.search`).
    4. Their compensators are trained, and kept if they help (`correctnet.fit_compensators`).
    5. The original, the suppressed and the corrected network are evaluated on the same chips and test images.

    The functions named do the same one by one, with the same seed and, for the compensators, `stage="compensate"`.

    Args:
        network: a trained network that `correctnet.convert` accepts, with outputs (N, classes), or such that `metric`
            reads. It is left unchanged.
        train: training images (N, ...) and labels (N,): a pair of tensors, or a loader of such pairs, each of whose
            batches is a step, with augmentation or not. For several inputs, and labels that are no classes, see
            `correctnet.evaluate`.
        validation: images and labels for every choice: a pair, or a loader that yields the same images in each pass.
        test: images and labels that the results are about, likewise. Nothing is chosen on them.
        variation: the device model; None: the paper's, `LogNormalVariation(0.5)`.
        limit: the largest overhead, parameters of the compensation / parameters of the network; 0.03 in the paper.
        chips: chip samples of the results; 250 in the paper.
        suppress: False leaves suppression out; or fields of `correctnet.settings.Suppress`, e.g. {"epochs": 5}.
        sweep: fields of `correctnet.settings.Sweep`.
        search: fields of `correctnet.settings.Search`, apart from `limits`.
        compensate: fields of `correctnet.settings.Compensate`.
        loss: replaces the cross entropy, or the loss of the metric, in all trainings: a function of outputs and labels
            that returns the mean over the images.
        metric: what networks are judged by: a `correctnet.Metric` with positive values; None: the accuracy. Of one of
            which smaller values are better, 95 % of the original is the original value divided by 0.95.
        seed: of everything that is drawn.
        simulation: how chips are simulated; None: as `correctnet.evaluate` does. Its `start` is not used.
        work: a folder. A call that was stopped continues there when it is repeated with the same arguments; with other
            ones only what depends on them is done again. A loader for training is known by its kind, length and batch
            size alone: use another folder when its images change.
        progress: show progress bars, where `simulation` does not say.

    Returns:
        A `Correction`: `network`, `table`, `candidates`, `search.log`, `plot()`, `report(path)`.

    Raises:
        UserError: data, outputs or a loss that are not those of a classifier, an unknown setting, a limit that is no
            fraction, a network that is converted or compensated already, or one whose weights cannot carry variation.

    Warns:
        CoverageWarning, EngineWarning, CompensationWarning: as the functions named; the first two for `network` alone.
    """
    if not isinstance(suppress, bool | Mapping):
        raise UserError(f"{WHAT}: suppress is True, False or settings by name, not {suppress!r}")
    sections = {
        "suppress": _section(Suppress, suppress if isinstance(suppress, Mapping) else {}, "suppress"),
        "sweep": _section(Sweep, sweep, "sweep"),
        "search": _section(Search, search, "search"),
        "compensate": _section(Compensate, compensate, "compensate"),
    }
    variation = LogNormalVariation(0.5) if variation is None else variation
    check_limit(limit, f"{WHAT}: limit")
    seed, chips = whole(seed, f"{WHAT}: the seed"), whole(chips, f"{WHAT}: chips")
    if chips < 1:
        raise UserError(f"{WHAT}: chips must be at least 1, not {chips}")
    metric = checked(metric, WHAT)
    loss_of(metric, loss, WHAT)
    simulation = simulation or Simulation(progress=progress)
    analog = convert(network, variation, seed)  # mistakes are found before any work
    if compensation_modules(network):
        raise UserError(f"{WHAT}: the network is compensated already; give the original one")
    with left_alone(network), torch.no_grad():
        judged, shown = (
            Data.of(data, memory=simulation.memory, what=f"{WHAT}: {name}", targets=metric.targets)
            for name, data in (("validation", validation), ("test", test))
        )
        _check_outputs(network, metric, train, judged, shown)
    images = take(judged, sections["sweep"].images)
    run_of = _Run(network, shown, variation, seed, chips, simulation, work, metric)
    with contextlib.ExitStack() as held:
        if work is not None:
            storage.check_writable(work, "folder")
            held.enter_context(storage.exclusive(work))
        results, clean = {}, {}
        results["unprotected"], clean["unprotected"] = run_of.evaluate("unprotected", network, analog)
        held.enter_context(warnings.catch_warnings())
        for given in (CoverageWarning, EngineWarning):  # once is enough: the networks differ in their compensators
            warnings.simplefilter("ignore", given)
        base = network
        if suppress is not False:
            how = {"loss": loss, "metric": metric, "seed": seed, "work": work, "validation": judged}
            how["progress"] = simulation.progress
            own = sections["suppress"].model_dump(exclude_unset=True)
            base = train_suppressed(network, train, variation, **how, **own)
            results["suppressed"], clean["suppressed"] = run_of.evaluate("suppressed", base)
        found = sweeping.find_candidates(
            base,
            images,
            variation,
            original=network,
            threshold=sections["sweep"].threshold,
            chips=sections["sweep"].chips,
            seed=seed,
            metric=metric,
            simulation=replace(simulation, start=streams.chips("sweep", sections["sweep"].chips).start),
            work=work,
        )
        built = sections["compensate"].model_dump(exclude_unset=True, exclude={"epochs"})
        placed = find_placement(
            base,
            found.candidates,
            train,
            judged,
            variation,
            limit=limit,
            compensate=built,
            loss=loss,
            metric=metric,
            seed=seed,
            simulation=simulation,
            work=work,
            **sections["search"].model_dump(exclude_unset=True),
        )
        corrected, kept = copy_model(base, WHAT).eval(), None
        if placed.filters:
            parts = {"network": base, "filters": placed.filters, "train": train, "judged": judged, "seed": seed}
            parts |= {"variation": variation, "loss": loss, "settings": sections["compensate"]}
            parts |= folder.judged_by(metric)
            text = "" if work is None else folder.identity("compensate", **parts)
            corrected, kept = train_compensators(
                base,
                placed.filters,
                train,
                judged,
                sections["compensate"],
                variation,
                seed,
                "compensate",
                loss=loss,
                metric=metric,
                checkpoint=folder.checkpoint(work, "compensate", text),
                simulation=simulation,
                quiet=not simulation.progress,
            )
        results["corrected"], clean["corrected"] = run_of.evaluate("corrected", corrected)
    described = {
        "variation": {"model": type(variation).__name__, **variation.describe()},
        "limit": limit,
        "chips": chips,
        "seed": seed,
        "suppress": False if suppress is False else sections["suppress"].model_dump(mode="json"),
        **{name: sections[name].model_dump(mode="json") for name in ("sweep", "search", "compensate")},
        "loss": "cross entropy" if loss is None else getattr(loss, "__qualname__", type(loss).__qualname__),
    }
    if not metric.is_accuracy:
        described["metric"] = metric.describe()
        if loss is None:
            described["loss"] = described["metric"]["loss"] or described["loss"]
    suppressed = None if suppress is False else base
    threshold = sections["sweep"].threshold
    return Correction(corrected, suppressed, results, clean, found, placed, kept, threshold, described, metric)


def _section(kind: type[Section], values: Options | None, name: str) -> Any:
    if values is not None and not isinstance(values, Mapping):
        raise UserError(f"{WHAT}: {name} is settings by name, such as {{'chips': 20}}, not {values!r}")
    if kind is Search and "limits" in (values or {}):
        raise UserError(f"{WHAT}: search: limits: one search has one; give it as limit")
    return validate(kind, dict(values or {}), f"{WHAT}: {name}")


def _check_outputs(network: nn.Module, metric: Metric, train: Batches, *others: Data) -> None:
    """Check that the network classifies all data, before any work: its outputs, and the labels; or its metric's."""
    device = next(network.parameters()).device
    first = first_batch(train, f"{WHAT}: train", metric.targets)
    for name, (images, labels), largest in (
        ("train", first, largest_label(first[1], metric.targets)),
        *((name, data.head, data.largest) for name, data in zip(("validation", "test"), others, strict=True)),
    ):
        what, few = f"{WHAT}: {name}", images[:8].to(device)
        outputs = check_outputs(run(network, few, what), few, largest, what, metric)
        metric.batch(outputs, labels[:8].to(device), what)


class _Run:
    """The evaluations of a call, all on the same chips and images."""

    def __init__(
        self,
        network: nn.Module,
        images: Data,
        variation: Variation,
        seed: int,
        chips: int,
        simulation: Simulation,
        work: str | Path | None,
        metric: Metric,
    ):
        self.images, self.variation, self.seed, self.chips, self.work = images, variation, seed, chips, work
        self.metric = metric
        self.simulation = replace(simulation, start=streams.chips("test", chips).start)

    def evaluate(self, row: str, network: nn.Module, analog: nn.Module | None = None) -> tuple[Result, float]:
        """The chips' accuracies, or values, of a network, and its own without variation."""
        save = None
        if self.work is not None:
            parts = {"network": network, "data": self.images, "variation": self.variation, "seed": self.seed}
            parts |= {"simulation": [self.simulation.engine, self.simulation.precision]}
            parts |= folder.judged_by(self.metric)
            save = folder.file(self.work, "evaluate", ".csv", folder.identity("evaluate", **parts))
        analog = convert(network, self.variation, self.seed) if analog is None else analog
        how = {"save": save, "metric": self.metric, "title": row}
        result = simulate(analog, self.images, self.chips, self.simulation, **how)
        return result, clean_value(network, self.images, metric=self.metric)
