"""Where to compensate, with how many filters: the search of `correctnet.methods.search` on a network and its data."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from correctnet.crossbar.calibration import Equip
from correctnet.crossbar.kinds import crossbars
from correctnet.crossbar.probe import left_alone
from correctnet.datasets.batches import Batches, Data, take
from correctnet.devices.base import Variation
from correctnet.errors import UserError, whole
from correctnet.evaluation.montecarlo import simulate
from correctnet.evaluation.simulation import Simulation
from correctnet.methods import compensation, compensation_training
from correctnet.methods import search as searching
from correctnet.methods import work as folder
from correctnet.methods.front import digital_share
from correctnet.metrics import ACCURACY, Loss, Metric, checked
from correctnet.noise import streams
from correctnet.sections import validate
from correctnet.settings import SEARCHING, Compensate, Search
from correctnet.training.loop import fit

Filters = searching.Filters


@dataclass(frozen=True)
class Placement:
    """What a search found: the layers to compensate and their numbers of filters.

    Attributes:
        filters: generator filters by layer name, as `correctnet.fit_compensators` takes them; {}: no compensation.
        overhead: parameters of the compensation / parameters of the network.
        mean, std: accuracy (or value of the metric) of the state over chips, as the search scored it; None where
            nothing was searched.
        evaluations: number of states that were trained.
        strategy: how they were looked for.
        limit: the largest overhead allowed; None: any.
        candidates: names of the layers among which it was looked.
        log: the explored states in order, one row each, with columns evaluation, episode, filters (of each candidate),
            ratios, layers (compensated ones), overhead, mean, std, reward (12), seconds.
        metric: what states are judged by.
    """

    filters: dict[str, int]
    overhead: float
    mean: float | None
    std: float | None
    evaluations: int
    strategy: str
    limit: float | None
    candidates: tuple[str, ...]
    log: pd.DataFrame
    metric: Metric = ACCURACY

    def summary(self) -> dict[str, Any]:
        """The result as a JSON object, without the log."""
        keys = ("strategy", "limit", "filters", "overhead", "mean", "std", "evaluations")
        return {key: getattr(self, key) for key in keys}

    @property
    def where(self) -> str:
        """The compensated layers and their filters, as text."""
        return ", ".join(f"{name} ({m} filters)" for name, m in self.filters.items()) or "no layer"

    def __str__(self) -> str:
        name, text = self.metric.name, self.metric.text
        scored = "" if self.mean is None else f", {name} {text(self.mean)} +- {text(self.std)} on validation images"
        return f"compensated: {self.where}; overhead {self.overhead:.2%}{scored} ({self.evaluations} states trained)"


def make_problem(
    network: nn.Module,
    candidates: Sequence[str],
    limit: float,
    settings: Search,
    section: Compensate,
    variation: Variation,
    seed: int,
    data: Callable[[], tuple[Batches, Batches]],
    simulation: Simulation,
    *,
    augment: str = "none",
    loss: Loss | None = None,
    metric: Metric = ACCURACY,
    digital: Sequence[str] = (),
    equip: Equip | None = None,
) -> searching.Problem:
    """The search problem of a network: a state is scored by training its compensators and evaluating them on chips.

    Args:
        network: the digital network that will be compensated.
        candidates: names of the layers to choose from.
        limit: the allowed overhead, a fraction.
        settings: ratios, and the epochs and chips of a state.
        section: how compensators are built and trained; its `epochs` are replaced by `settings.train_epochs`.
        variation: the device model.
        seed: of the chips, batches and initial weights.
        data: gives training and validation images; called when the first state is trained.
        simulation: how chips are simulated, apart from `start` and `progress`, which says whether bars are shown.
        augment: augmentation of the training images, as the setting `data.augment`.
        loss: replaces the cross entropy.
        metric: what states are judged by.
        digital: names of layers that are digital. Their weights count in the overhead of every state.
        equip: called with the converted network of each state, e.g. to add converters.

    Raises:
        UserError: these layers alone are above the limit.
    """
    share = digital_share(network, digital)
    if share > limit:
        raise UserError(
            f"search: the digital layers {', '.join(digital)} are {share:.2%} of the network, which is above the limit "
            f"of {limit:.2%}"
        )
    outputs = compensation.outputs_of(network)
    section = section.model_copy(update={"epochs": settings.train_epochs})
    first = streams.chips("search", settings.chips).start
    read = functools.cache(data)

    def score(filters: Filters) -> tuple[float, float]:
        train, images = read()
        analog, _, hooks = compensation_training.prepare(
            network, named(candidates, filters), section, variation, seed, "search", loss, metric, digital, equip
        )
        parameters = compensation_training.trained_parameters(analog, section)
        if parameters:
            hooks.augment = augment
            how = {"title": "compensators " + " ".join(map(str, filters)), "quiet": not simulation.progress}
            fit(analog, train, section, seed, stage="search", parameters=parameters, hooks=hooks, **how)
        how = replace(simulation, start=first, progress=False)
        result = simulate(analog, images, settings.chips, how, metric=metric)
        return result.mean, result.std

    return searching.Problem(
        widths=tuple(outputs[name] for name in candidates),
        ratios=settings.ratios,
        limit=limit,
        overhead=lambda filters: compensation.overhead(network, named(candidates, filters)) + share,
        score=score,
        higher=metric.higher,
        fraction=metric.fraction,
    )


def place(
    problem: searching.Problem,
    candidates: Sequence[str],
    settings: Search,
    seed: int,
    log_path: Path | None = None,
    progress: bool = True,
    known: Iterable[searching.Explored] = (),
    metric: Metric = ACCURACY,
) -> Placement:
    """Solve a search problem with the strategy of `settings`.

    With "all" every candidate gets the largest ratio, whatever its overhead, and with "greedy" the ratios of
    `correctnet.methods.search.greedy`, without a search. The other arguments are those of
    `correctnet.methods.search.search`; `metric` is that of the problem.
    """
    names = tuple(candidates)
    if settings.strategy not in SEARCHING:
        unlimited = settings.strategy == "all"
        filters = searching.greedy(replace(problem, limit=math.inf) if unlimited else problem)
        limit, log = None if unlimited else problem.limit, pd.DataFrame(columns=searching.COLUMNS)
        found = named(names, filters)
        return Placement(found, problem.overhead(filters), None, None, 0, settings.strategy, limit, names, log, metric)
    log = searching.search(problem, settings, seed, log_path, progress, known)
    best = log.best()
    found = named(names, best.filters)
    how = settings.strategy, problem.limit, names
    return Placement(found, best.overhead, best.mean, best.std, log.evaluations, *how, log.table(), metric)


def named(names: Sequence[str], filters: Filters) -> dict[str, int]:
    """Generator filters of the compensated layers, by name."""
    return {name: m for name, m in zip(names, filters, strict=True) if m}


def search(
    network: nn.Module,
    candidates: Sequence[str],
    train: Batches,
    validation: Batches,
    variation: Variation,
    *,
    limit: float = 0.03,
    compensate: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
    metric: Metric | None = None,
    seed: int = 0,
    exclude: Iterable[str] | str = (),
    simulation: Simulation | None = None,
    work: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> Placement:
    """Search for the layers to compensate and their numbers of filters, within an overhead limit (Fig. 6).

    A policy is trained by REINFORCE to draw states: a ratio S of generator filters to the layer's filters for each
    candidate. The compensators of each state within the limit are trained for a short time and evaluated on chips; the
    reward (12) is mean - standard deviation - overhead. The state without compensation is explored first. With a metric
    of which smaller values are better, the reward is 1 - (mean + standard deviation) / m - overhead; m is 1 for a
    fraction and else, for either direction, the mean of the state without compensation.

    Args:
        network: the network to compensate, suppressed or not, with outputs (N, classes). It is left unchanged.
        candidates: names of its layers, as `correctnet.find_candidates` finds them.
        train: training images (N, ...) and labels (N,), a pair of tensors or a loader of such pairs.
        validation: images and labels that the choice is made on; never the test set.
        variation: the device model.
        limit: the largest overhead, parameters of the compensation / parameters of the network; 0.03 in the paper.
        compensate: fields of `correctnet.settings.Compensate`, apart from `epochs`: how compensators are built and
            trained.
        loss: replaces the cross entropy, as for `correctnet.fit_compensators`.
        metric: a `correctnet.Metric` that states are judged by; None: the accuracy.
        seed: of the policy, the chips and the training.
        exclude: names of layers that are digital, as for `correctnet.convert`. Their weights count in the overhead.
        simulation: how chips are simulated; None: as `correctnet.evaluate` does.
        work: a folder. A call that was stopped continues from its last state when it is repeated.
        progress: show progress bars.
        settings: fields of `correctnet.settings.Search` apart from `limits`, e.g. evaluations=10, train_epochs=2.

    Returns:
        A `Placement`: `filters`, `overhead`, `log`.

    Raises:
        UserError: data, outputs or a loss that are not those of a classifier, an unknown layer or setting, a layer
            named twice, a limit that is no fraction or below the share of the digital layers, or a network that is
            converted or compensated already.

    Warns:
        CompensationWarning: candidates that cannot be compensated, such as the weights of an LSTM, are left out.
    """
    section = validate(Compensate, dict(compensate or {}), "search: compensate")
    own = validate(Search, settings, "search")
    if "limits" in settings:
        raise UserError("search: limits: one search has one; give it as limit")
    if "epochs" in (compensate or {}):
        raise UserError("search: compensate: epochs: those of a state are train_epochs")
    candidates = only_compensable(network, check_candidates(network, candidates), stacklevel=3)
    seed, metric = whole(seed, "search: the seed"), checked(metric, "search")
    check_limit(limit, "search: limit")
    simulation = simulation or Simulation(progress=progress)
    with left_alone():
        images = Data.of(
            take(validation, own.images), memory=simulation.memory, what="search: validation", targets=metric.targets
        )
    learnt = take(train, own.train_images)
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    log_path = None
    if work is not None:
        parts = {"network": network, "candidates": candidates, "train": learnt, "validation": images, "loss": loss}
        parts |= {"variation": variation, "seed": seed, "limit": limit, "settings": own, "compensate": section}
        parts |= folder.judged_by(metric) | ({"exclude": exclude} if exclude else {})
        log_path = folder.file(work, "search", ".csv", folder.identity("search", **parts))
    how = {"loss": loss, "metric": metric, "digital": exclude}
    problem = make_problem(
        network, candidates, limit, own, section, variation, seed, lambda: (learnt, images), simulation, **how
    )
    return place(problem, candidates, own, seed, log_path, simulation.progress, metric=metric)


def check_limit(limit: Any, what: str) -> None:
    """Raise a UserError, which begins with `what`, unless `limit` is a fraction above 0 and at most 1."""
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit <= 1:
        raise UserError(f"{what} is a fraction above 0 and at most 1 (0.03, not 3), not {limit!r}")


def check_candidates(network: nn.Module, candidates: Any) -> tuple[str, ...]:
    """The names of candidate layers. Raises UserError unless they are layers of the network, each named once."""
    if isinstance(candidates, str) or not isinstance(candidates, Iterable):
        raise UserError(f"search: candidates are names of layers, a list, not {candidates!r}")
    names, layers = tuple(candidates), [each.name for each in crossbars(network)]
    if compensation.compensation_modules(network):
        raise UserError("search: the network is compensated already; give the one that was compensated")
    for name in names:
        if name not in layers:
            raise UserError(f"search: candidates: the network has no layer {name!r} (layers: {', '.join(layers)})")
        if names.count(name) > 1:
            raise UserError(f"search: candidates: {name} is named twice")
    return names


def only_compensable(network: nn.Module, candidates: Sequence[str], stacklevel: int = 2) -> tuple[str, ...]:
    """The candidates after which compensators can be placed. Warns of the others, see `CompensationWarning`."""
    known = compensation.compensable(network)
    if left := [name for name in candidates if name not in known]:
        warnings.warn(
            f"{', '.join(left)} cannot be compensated and left out of the search: only convolutions and linear layers "
            "that the network calls can",
            compensation_training.CompensationWarning,
            stacklevel=stacklevel,
        )
    return tuple(name for name in candidates if name in known)
