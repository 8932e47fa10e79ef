"""Candidate layers for compensation: accuracy with variation from layer i to the last (Fig. 9), or in one layer alone.

Layers are counted in the order in which the network runs them. The layer index, which addresses a layer's noise, is
counted in the order of registration instead.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from correctnet.crossbar.calibration import Equip, equipped
from correctnet.crossbar.convert import convert, programmed
from correctnet.crossbar.kinds import crossbars
from correctnet.crossbar.layers import analog_layers
from correctnet.crossbar.modules import hold_nominal
from correctnet.crossbar.probe import Reads, address, left_alone, run
from correctnet.datasets.batches import Batches, Data, first_batch
from correctnet.devices.base import Variation
from correctnet.errors import UserError
from correctnet.evaluation.montecarlo import clean_value, simulate
from correctnet.evaluation.results import Result
from correctnet.evaluation.simulation import Simulation
from correctnet.methods import work as folder
from correctnet.metrics import ACCURACY, Metric, Targets, checked
from correctnet.noise import streams
from correctnet.progress import ProgressBar


@dataclass(frozen=True)
class Sweep:
    """Accuracies with variation in layers i..L for every i, and the layers that need compensation.

    With another metric, its values are in the place of accuracies.
    """

    results: dict[int, Result]
    """by i, 1 <= i <= L, counted as in the paper"""
    names: tuple[str, ...]
    """names of the L layers, in the order of execution"""
    original: float
    """clean accuracy of the pre-trained network on the same images"""
    threshold: float
    """fraction of `original` below which layers become candidates"""
    metric: Metric = ACCURACY
    digital: tuple[str, ...] = ()
    """those of the layers that are digital: they carry no variation, have no result, and are no candidates"""

    @property
    def bound(self) -> float:
        """The mean at which no compensation is needed: threshold * original, or original / threshold of an error."""
        return self.metric.bound(self.threshold, self.original)

    @property
    def candidates(self) -> tuple[str, ...]:
        """The first i layers, for the largest i with a mean that is worse than `bound`, without digital ones."""
        below = [i for i, r in self.results.items() if not self.metric.as_good(r.mean, self.bound)]
        return tuple(name for name in self.names[: max(below, default=0)] if name not in self.digital)

    def table(self) -> pd.DataFrame:
        """One row a layer and chip: layer (i), name, sample, accuracy (or value), ..., original."""
        parts = [
            r.table.assign(layer=i, name=self.names[i - 1], original=self.original, threshold=self.threshold)
            for i, r in sorted(self.results.items())
        ]
        return pd.concat(parts, ignore_index=True)

    def summary(self) -> dict[str, Any]:
        """The result as a JSON object: candidates, original, threshold, and mean accuracies, or values, by layer."""
        return {
            "candidates": list(self.candidates),
            "original": self.original,
            "threshold": self.threshold,
            "accuracy" if self.metric.is_accuracy else "value": {
                self.names[i - 1]: r.mean for i, r in sorted(self.results.items())
            },
        }


def executed(model: nn.Module, data: Batches, targets: Targets = "classes") -> list[str]:
    """Names of the crossbars in the order in which `model` first reads their weights or calls their layers.

    Observed on images of `data`, in evaluation mode. Raises UserError for a layer that is not used: variation in it has
    no effect.
    """
    images, _ = first_batch(data, "sweep", targets)
    layers = crossbars(model)
    device = next(model.parameters()).device
    order: dict[str, None] = {}
    with torch.no_grad(), left_alone(model):
        # Derived weights are other tensors in each forward pass, and layers that share a weight are told apart by their
        # calls alone.
        weights = {each.name: each.module._parameters.get(each.parameter) for each in layers}
        places = {name: None if weight is None else address(weight) for name, weight in weights.items()}
        shared = Counter(places.values())
        read = {place: name for name, place in places.items() if place is not None and shared[place] == 1}
        several = [each for each in layers if each.name in read.values() and each.name.endswith(each.parameter)]
        hooks = [
            each.module.register_forward_hook(lambda *_, name=each.name: order.setdefault(name))
            for each in layers
            if each not in several  # a module may not use all of its weights
        ]
        try:
            with Reads(lambda a: order.setdefault(read[a]) if a in read else None):
                run(model, images[:2].to(device), "sweep")
        finally:
            for hook in hooks:
                hook.remove()
    if never := [each.name for each in layers if each.name not in order]:
        raise UserError(f"{never[0]} is not used, so variation in it has no effect; remove it from the network")
    return list(order)


def _nominal(model: nn.Module, names: Collection[str]) -> nn.Module:
    """A copy of a converted model whose layers `names` carry no variation; all others keep their addresses."""
    model = copy.deepcopy(model)
    for each in crossbars(model):
        if each.name in names:
            hold_nominal(each.module, [each.parameter])
    return model


def sweep(
    model: nn.Module,
    data: Batches,
    original: float,
    threshold: float = 0.95,
    *,
    chips: int = 50,
    simulation: Simulation | None = None,
    save: Path | None = None,
    metric: Metric = ACCURACY,
) -> Sweep:
    """Evaluate with variation in layers i..L for i = L, L-1, ..., 1, each on the same chips (Fig. 9).

    Layer i is the i-th that the network runs.

    Args:
        model: from `correctnet.convert`. Layers that it excluded are digital: they are passed over, and no candidates.
        data: validation images, never the test set: the result is used to choose.
        original: clean accuracy of the pre-trained network on them, in (0, 1]; or the metric's value, above 0.
        threshold: candidates are the first i layers for the first i (from the last layer backwards) whose mean
            accuracy is below threshold * original, or whose error is above original / threshold; 0.95 in the paper.
        chips: chip samples a layer.
        simulation: how chips are simulated.
        save: a folder for the finished layers, a file each, which are not evaluated again.
        metric: what they are judged by.

    Raises:
        UserError: accuracies that are not fractions, or a layer that is not used.
    """
    simulation = simulation or Simulation()
    if metric.fraction and not 0 < original <= 1:
        raise UserError(f"sweep: the original {metric.name} must lie in (0, 1], not {original}")
    if not 0 < original < math.inf:
        raise UserError(
            f"sweep: the original {metric.name} must be above 0, not {original}: candidates are found by a fraction "
            "of it; use a metric that is positive"
        )
    if not 0 < threshold <= 1:
        raise UserError(f"sweep: the threshold is a fraction in (0, 1] (0.95, not 95), not {threshold}")
    layers = crossbars(model)
    registered = tuple(each.name for each in layers)
    varying = {own.layer_index for own in analog_layers(model)}
    digital = {each.name for each in layers if each.index not in varying}
    with programmed(model, None):
        names = tuple(executed(model, data, metric.targets))
    results = {}
    backwards = [i for i in range(len(names), 0, -1) if names[i - 1] not in digital]
    for i in ProgressBar(backwards, desc="sweep", unit="layer", disable=not simulation.progress):
        in_order = names == registered
        varied = model if in_order else _nominal(model, names[: i - 1])
        first_layer = layers[i - 1].index if in_order else 0
        options = {"first_layer": first_layer, "chunk": chips, "title": names[i - 1]}
        options |= {"save": None if save is None else save / f"{i}.csv", "metric": metric}
        results[i] = simulate(varied, data, chips, simulation, **options)
    return Sweep(results, names, original, threshold, metric, tuple(name for name in names if name in digital))


def find_candidates(
    network: nn.Module,
    data: Batches,
    variation: Variation,
    *,
    original: nn.Module | float | None = None,
    threshold: float = 0.95,
    chips: int = 50,
    seed: int = 0,
    exclude: Iterable[str] | str = (),
    equip: Equip | None = None,
    metric: Metric | None = None,
    simulation: Simulation | None = None,
    work: str | Path | None = None,
    progress: bool = True,
) -> Sweep:
    """Find the layers that need compensation: the first i, for the largest i with too low an accuracy (Fig. 9).

    The network is evaluated with variation from layer i to the last, for i = L, L-1, ..., 1. Layers are counted in the
    order in which the network runs them.

    Args:
        network: the network that will be compensated, suppressed or not.
        data: validation images and labels, as in `correctnet.evaluate`; never the test set.
        variation: the device model.
        original: the network before suppression, or its clean accuracy (or value of the metric) on `data`; None:
            `network` itself is the original one.
        threshold: the first i layers are candidates if their mean accuracy is below `threshold` times the original
            accuracy; 0.95 in the paper. Of a metric of which smaller values are better, if their mean is above the
            original value divided by `threshold`.
        chips: chip samples a layer.
        seed: of the chips.
        exclude: names of layers that are digital, as for `correctnet.convert`; they are no candidates.
        equip: called with the converted network, e.g. to add converters; not with `work`, which cannot compare it.
        metric: a `correctnet.Metric` with positive values; None: the accuracy.
        simulation: how chips are simulated; None: as `correctnet.evaluate` does, on chips that only this choice uses.
        work: a folder. A call that was stopped continues from its last layer when it is repeated.
        progress: show progress bars, where `simulation` does not say.

    Returns:
        A `Sweep`: `candidates`, names of layers; `table()`, accuracies of every layer and chip.

    Raises:
        UserError: as `correctnet.convert` and `correctnet.evaluate`; a layer that the network does not use; a threshold
            or an original accuracy that is no fraction; or an original network of accuracy 0.
    """
    simulation = simulation or Simulation(streams.chips("sweep", max(0, chips)).start, progress=progress)
    metric = checked(metric, "find_candidates")
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    if equip is not None and work is not None:
        raise UserError("find_candidates: with equip, a call cannot be continued from a folder")
    analog = equipped(convert(network, variation, seed, exclude), equip)
    with left_alone():
        data = Data.of(data, memory=simulation.memory, what="find_candidates", targets=metric.targets)
    if original is None or isinstance(original, nn.Module):
        original = clean_value(network if original is None else original, data, metric=metric)
    save = None
    if work is not None:
        parts = {
            "network": network,
            "data": data,
            "variation": variation,
            "seed": seed,
            "precision": simulation.precision,
            **folder.judged_by(metric),
            **({"exclude": exclude} if exclude else {}),
        }
        save = folder.file(work, "sweep", "", folder.identity("sweep", **parts, start=simulation.start))
    how = {"chips": chips, "simulation": simulation, "save": save, "metric": metric}
    return sweep(analog, data, original, threshold, **how)


def sensitivity(
    network: nn.Module,
    data: Batches,
    variation: Variation,
    *,
    chips: int = 20,
    seed: int = 0,
    exclude: Iterable[str] | str = (),
    equip: Equip | None = None,
    metric: Metric | None = None,
    simulation: Simulation | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Accuracy with variation in one layer alone and nominal weights in every other layer, for each layer.

    Args:
        network: a digital network, compensated or not.
        data: images and labels, as in `correctnet.evaluate`.
        variation: the device model.
        chips: chip samples a layer.
        seed: of the chips. A layer carries the same weights on chip n here as on chip n of the converted network.
        exclude: names of layers that are digital, as for `correctnet.convert`; they have no rows.
        equip: called with the converted network, e.g. to add converters.
        metric: a `correctnet.Metric`; None: the accuracy.
        simulation: how chips are simulated; None: as `correctnet.evaluate` does, on chips that nothing else uses.
        progress: show progress bars, where `simulation` does not say.

    Returns:
        One row a layer and chip: layer (1 is the first that the network runs), name, weights (their number), sample,
        accuracy (or value), ..., clean (the same of the nominal network on the same images).

    Raises:
        UserError: as `correctnet.convert` and `correctnet.evaluate`, and for a layer that the network does not use.
    """
    simulation = simulation or Simulation(streams.chips("sensitivity", max(0, chips)).start, progress=progress)
    metric = checked(metric, "sensitivity")
    weights = {each.name: each.weight.numel() for each in crossbars(network)}
    with left_alone():
        data = Data.of(data, memory=simulation.memory, what="sensitivity", targets=metric.targets)
    names = executed(network, data)
    clean = clean_value(network, data, metric=metric)
    analog = equipped(convert(network, variation, seed, exclude), equip)
    varying = {own.layer_index for own in analog_layers(analog)}
    varied = {each.name for each in crossbars(analog) if each.index in varying}
    parts = []
    numbered = [(i, name) for i, name in enumerate(names, start=1) if name in varied]
    for i, name in ProgressBar(numbered, desc="sensitivity", unit="layer", disable=not simulation.progress):
        alone = _nominal(analog, [other for other in names if other != name])
        result = simulate(alone, data, chips, simulation, chunk=chips, metric=metric, title=name)
        parts.append(result.table.assign(layer=i, name=name, weights=weights[name], clean=clean))
    return pd.concat(parts, ignore_index=True)
