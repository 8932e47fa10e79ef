"""The stages of the paper: files in, files out.

    pretrain -> suppress -> sweep -> search (one for each limit) -> compensate -> evaluate

Each is an ordinary function; `correctnet STAGE` calls it, and the workflow calls that. A stage writes its result
last and whole, and keeps what it needs to go on after a kill in a folder of its own (`Runtime.work`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pandas as pd
import torch
from torch import nn

from correctnet.crossbar.layers import analog_layers, convert, crossbar_layers, program
from correctnet.datasets import data as datasets
from correctnet.datasets.data import DataSet, Split
from correctnet.devices import lognormal as variation
from correctnet.engine.engine import MEMORY, describe
from correctnet.errors import UserError, one_line
from correctnet.evaluation.coverage import check_coverage
from correctnet.evaluation.montecarlo import clean_accuracy, evaluate
from correctnet.evaluation.results import COLUMNS, IDENTITY, Result, record
from correctnet.files import storage
from correctnet.methods import candidates as sweeping
from correctnet.methods import compensation, recalibration
from correctnet.methods import search as searching
from correctnet.methods import suppression as lipschitz
from correctnet.networks import models
from correctnet.noise import streams
from correctnet.pipeline.config import network_mistake, sizes_mistake
from correctnet.report.tables import best_state
from correctnet.settings import SEARCHING, Settings, Stage, exact
from correctnet.training.loop import Checkpoint, Hooks, fit

# Simulated chips over which BatchNorm's statistics are estimated.
RECALIBRATION_CHIPS = 20


@dataclass(frozen=True)
class Runtime:
    """Where and how a stage runs; none of it changes what the stage is asked for."""

    data_dir: str | None = None
    device: str = "cpu"
    quiet: bool = False
    work: Path | None = None
    """folder for what a killed stage needs to go on; None: it begins anew"""
    memory: int = MEMORY
    """bytes that Monte Carlo may take beside the data, about"""

    def load(self, settings: Any, description: dict[str, Any] | None = None, source: Path | str = "") -> DataSet:
        """The data set that a stage's settings name, on the device; that of the model at `source`, if it is described.

        The model's images are split as they were for it: another seed of the settings is that of chips and batches
        alone. Raises UserError where the settings name another data set than the model's, or hold out another fraction.
        """
        seed = _split_seed(settings, description, source)
        if seed != settings.seed:
            warnings.warn(
                f"seed {settings.seed} is that of chips and batches; the images are split with seed {seed}, as they "
                f"were for {source}",
                stacklevel=2,
            )
        return datasets.load(settings.data.dataset, self.data_dir, settings.data.validation, seed).to(self.device)


def _split_seed(settings: Any, description: dict[str, Any] | None, source: Path | str) -> int:
    """The seed of the split into training and validation images: that of the model, if there is one.

    Raises UserError where the settings name other images than those that the model was trained on.
    """
    made = storage.training_data(description or {})
    if made.get("dataset", settings.data.dataset) != settings.data.dataset:
        raise UserError(f"--dataset {settings.data.dataset}: {source} was trained on {made['dataset']}")
    if made.get("validation", settings.data.validation) != settings.data.validation:
        raise UserError(
            f"--validation {settings.data.validation}: {source} was trained with {made['validation']} of the training "
            "images held out"
        )
    return made.get("seed", settings.seed)


def _identity(stage: Stage, settings: Settings, description: dict[str, Any], *inputs: Path | str) -> str:
    """What a stage was asked for, as text: settings, network, images and their split, input files."""
    base = json.dumps([description.get("network"), storage.training_data(description)], sort_keys=True)
    known = datasets.digest(settings.data.dataset)
    return "\n".join([stage, settings.canonical(stage), base, known, *(storage.sha256(path) for path in inputs)])


def read_network(path: str | Path, device: str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """The network at `path` as a plain module in evaluation mode, and its description.

    Raises UserError where the files are absent, damaged, or describe no network of this package.
    """
    tensors, description = storage.read_model(path)
    if "network" not in description:
        raise UserError(
            f"{path}: holds no network of correctnet.networks.models; load it with correctnet.methods.compensation.load"
        )
    _check_description(storage.model_files(path)[1], description)
    try:
        # Other weights take the place of those drawn here.
        model = _build(description["network"], 0, "restore")
        model = compensation.restore(model, tensors, description, str(path))
    except (TypeError, ValueError) as error:  # settings that no network and no compensation has
        raise UserError(f"{storage.model_files(path)[1]}: describes no network ({one_line(error)})") from error
    return model.eval().to(device), description


def _compensated(description: dict[str, Any]) -> bool:
    """Whether a network has compensators."""
    return bool((description.get("compensation") or {"filters": {}})["filters"])


def _check_base(stage: Stage, path: Path, description: dict[str, Any]) -> None:
    """Raise a UserError where a stage that comes before compensation is given a compensated network."""
    if _compensated(description):
        raise UserError(f"{stage}: {path} is compensated; give the network that it was made from")


def _whole(value: Any, low: int) -> bool:
    """Whether a value of a JSON file is a whole number, at least `low`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _number(value: Any, low: float = 0.0, high: float = math.inf) -> bool:
    """Whether a value of a JSON file is a finite number from `low` to `high`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and low <= value <= high


def _filters(value: Any) -> bool:
    """Whether a value of a JSON file says how many filters which layers have."""
    return isinstance(value, dict) and all(_whole(m, 1) for m in value.values())


def _expect(path: Path, key: str, holds: bool, expected: str, value: Any) -> None:
    """Raise a UserError about a value of a JSON file that is not what is expected."""
    if not holds:
        raise UserError(f"{path}: {key}: {expected} is expected, not {json.dumps(value)[:60]}")


def _check_description(path: Path, description: dict[str, Any]) -> None:
    """Raise a UserError where a model's description says what no stage writes."""
    network, history = description["network"], description.get("history", [])
    _expect(path, "network", isinstance(network, dict) and isinstance(network.get("name"), str), "a network", network)
    for key in ("classes", "channels"):
        _expect(path, f"network.{key}", _whole(network.get(key), 1), "a number of them", network.get(key))
    holds = isinstance(history, list) and all(
        isinstance(h, dict) and isinstance(h.get("stage"), str) and _whole(h.get("epochs"), 0) for h in history
    )
    _expect(path, "history", holds, "a list of stages, each with its epochs", history)
    overhead = description.get("overhead", 0.0)
    _expect(path, "overhead", _number(overhead), "a fraction that is at least 0", overhead)
    plan = description.get("compensation") or {"filters": {}}
    _expect(path, "compensation", isinstance(plan, dict) and _filters(plan.get("filters")), "filters by layer", plan)
    made = description.get("data")
    if made is not None:
        holds = isinstance(made, dict) and made.get("dataset") in datasets.NAMES and _whole(made.get("seed"), 0)
        holds = holds and _number(made.get("validation"), 0, 1)
        _expect(path, "data", holds, "a data set, the fraction held out and a seed", made)


def _build(network: dict[str, Any], seed: int, stage: str) -> nn.Module:
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in network.items()}
    return models.build(**options, seed=seed, stage=stage)


def _write_network(
    out: Path, model: nn.Module, base: dict[str, Any], stage: Stage, settings: Settings, metrics: dict[str, Any]
) -> None:
    """Write a model that `stage` made from one described by `base`, with the stage added to its history."""
    description = {k: v for k, v in base.items() if k not in ("format", "sha256")}
    own = {**settings.data.model_dump(mode="json"), "seed": settings.seed}
    description["data"] = storage.training_data(base) or own
    entry = {"stage": stage, **metrics, "settings": json.loads(settings.canonical(stage))}
    description["history"] = [*base.get("history", []), entry]
    storage.write_model(out, model.state_dict(), description)


def _train(
    stage: Stage,
    model: nn.Module,
    base: dict[str, Any],
    data: DataSet,
    settings: Settings,
    hooks: Hooks,
    out: Path,
    runtime: Runtime,
    inputs: Sequence[Path] = (),
    parameters: Sequence[nn.Parameter] | None = None,
    judge: Callable[[], dict[str, Any]] = dict,
) -> None:
    """Train a stage's model, resumably, and write it: what all stages that train share.

    `judge` is called with the trained model and may change it; what it gives is written into the model's history.
    """
    s = settings.of(stage)
    hooks.augment = s.data.augment
    # A checkpoint is for these settings, these images, these inputs, and no others.
    identity = _identity(stage, settings, base, *inputs)
    checkpoint = Checkpoint(runtime.work / f"{stage}.safetensors", identity) if runtime.work else None
    rows = fit(
        model,
        data.train,
        getattr(s, stage),
        s.seed,
        stage=stage,
        parameters=parameters,
        hooks=hooks,
        validate=lambda: clean_accuracy(model, data.validation),
        checkpoint=checkpoint,
        log=out / "log.csv",
        title=stage,
        quiet=runtime.quiet,
    )
    metrics = {"epochs": len(rows), **judge()}
    metrics["validation"] = clean_accuracy(model, data.validation)
    _write_network(out, model, base, stage, settings, metrics)
    if checkpoint:
        checkpoint.discard()


def pretrain(settings: Settings, out: Path, runtime: Runtime) -> None:
    """Train the network without any method. Writes out/model.{safetensors,json} and out/log.csv."""
    s = settings.of("pretrain")
    if mistake := network_mistake(settings):
        raise UserError(mistake)
    data = runtime.load(s)
    network: dict[str, Any] = {"name": s.network.name, "classes": data.classes, "channels": data.channels}
    network |= models.options(s.network)
    model = _build(network, s.seed, "pretrain").to(runtime.device)
    _train("pretrain", model, {"network": network}, data, settings, Hooks(sizes=s.pretrain.sizes), out, runtime)


def suppress(settings: Settings, pretrained: Path, out: Path, runtime: Runtime) -> None:
    """Train under the Lipschitz regulariser (11), from the pre-trained weights or from scratch.

    From scratch the architecture is all that is taken of the pre-trained network.
    """
    s = settings.of("suppress")
    model, base = read_network(pretrained, runtime.device)
    _check_base("suppress", pretrained, base)
    if mistake := sizes_mistake(s, "suppress", base["network"]["name"]):
        raise UserError(mistake)
    if s.suppress.start == "scratch":
        model = _build(base["network"], s.seed, "suppress").to(runtime.device)
        base = {"network": base["network"], "data": storage.training_data(base)}
    lam = lipschitz.bound(s.variation.sigma, s.suppress.k, variation.make(s.variation).shift)
    ramp, beta = s.suppress.ramp, s.suppress.beta
    norms = lipschitz.batchnorms(model) if s.suppress.fold_batchnorm else {}
    hooks = Hooks(
        penalty=lambda: lipschitz.penalty(lipschitz.analog_weights(model, norms), lam, s.suppress.form),
        penalty_weight=lambda done: beta * min(1.0, done / ramp) if ramp else beta,
        temperature=s.suppress.temperature,
        sizes=s.suppress.sizes,
    )
    # From scratch, nothing of the pre-trained network but its shape is used.
    inputs = [] if s.suppress.start == "scratch" else [storage.model_files(pretrained)[0]]
    data = runtime.load(s, base, pretrained)
    _train("suppress", model, base, data, settings, hooks, out, runtime, inputs)


def inject(settings: Settings, pretrained: Path, out: Path, runtime: Runtime) -> None:
    """Train on with variation in all weights, a fresh chip each batch: a rival after [11], without overhead."""
    _train_with_variation("inject", settings, pretrained, out, runtime)


def finetune(settings: Settings, compensated: Path, out: Path, runtime: Runtime) -> None:
    """Train a compensated network in full, with variation in its analog weights: no part of the paper.

    Weights and digital compensators minimise the cross entropy together, each batch on a fresh chip w exp(theta).
    Writes a model and its log to `out`. Raises UserError where `compensated` is no model, or the loss is not finite.
    """
    _train_with_variation("finetune", settings, compensated, out, runtime)


def _train_with_variation(
    stage: Literal["inject", "finetune"], settings: Settings, path: Path, out: Path, runtime: Runtime
) -> None:
    """Train all that the model at `path` has, a fresh chip a batch; what `inject` and `finetune` share."""
    s = settings.of(stage)
    model, base = read_network(path, runtime.device)
    _split_seed(s, base, path)  # refused before any work
    if stage == "inject":
        _check_base(stage, path, base)
    elif "compensation" not in base:
        raise UserError(f"finetune: {path} is no model of `compensate`; `inject` trains one that is not compensated")
    analog = convert(model, variation.make(s.variation), s.seed)
    hooks = Hooks(
        before_batch=lambda draw: program(analog, streams.chip(f"train-{stage}", draw)),
        update_batchnorm=getattr(s, stage).batchnorm == "updated",
    )
    weights, _ = storage.model_files(path)
    _train(stage, analog, base, runtime.load(s, base, path), settings, hooks, out, runtime, [weights])


def sweep(settings: Settings, pretrained: Path, base: Path, out: Path, runtime: Runtime) -> None:
    """Find the candidate layers on the validation images. Writes out/accuracy.csv and out/candidates.json."""
    s = settings.of("sweep")
    original, of_original = read_network(pretrained, runtime.device)
    model, description = read_network(base, runtime.device)
    for path, of in ((pretrained, of_original), (base, description)):
        _check_base("sweep", path, of)
    if _split_seed(s, description, base) != _split_seed(s, of_original, pretrained):
        raise UserError(f"sweep: {base} and {pretrained} were trained on other splits of the images")
    images = runtime.load(s, description, base).validation.take(s.sweep.images)
    found = sweeping.sweep(
        convert(model, variation.make(s.variation), s.seed),
        images,
        clean_accuracy(original, images),
        s.sweep.threshold,
        chips=s.sweep.chips,
        start=streams.chips("sweep", s.sweep.chips).start,
        precision=s.montecarlo.precision,
        gpu_method=s.montecarlo.gpu_method,
        memory=runtime.memory,
        progress=not runtime.quiet,
    )
    storage.write_csv(out / "accuracy.csv", found.table())
    storage.write_json(out / "candidates.json", {**found.summary(), "chips": s.sweep.chips, "images": len(images)})


def sensitivity(settings: Settings, path: Path, out: Path, runtime: Runtime) -> None:
    """What variation in each layer alone costs a model, on the validation images. Writes a CSV."""
    s = settings.of("sensitivity")
    storage.check_writable(out)
    model, description = read_network(path, runtime.device)
    table = sweeping.sensitivity(
        model,
        variation.make(s.variation),
        s.seed,
        runtime.load(s, description, path).validation.take(s.sensitivity.images),
        chips=s.sensitivity.chips,
        start=streams.chips("sensitivity", s.sensitivity.chips).start,
        precision=s.montecarlo.precision,
        gpu_method=s.montecarlo.gpu_method,
        memory=runtime.memory,
        progress=not runtime.quiet,
    )
    storage.write_csv(out, table.assign(stage=_last_stage(description), sigma=s.variation.sigma))


def _last_stage(description: dict[str, Any]) -> str:
    """The stage that made a model."""
    return description.get("history", [{"stage": "pretrain"}])[-1]["stage"]


def search(
    settings: Settings,
    base: Path,
    candidates: Path,
    limit: float,
    out: Path,
    runtime: Runtime,
    known: Sequence[Path] = (),
) -> dict[str, Any]:
    """Search the states within one overhead limit. Writes out/log.csv (as it goes) and out/best.json, and gives it.

    With `strategy` "all" or "greedy" nothing is searched: every candidate gets the largest ratio, whatever that costs,
    or `correctnet.methods.search.greedy` says which. `known`: states that `search_state` has scored.
    """
    s = settings.of("search")
    if s.search.strategy not in SEARCHING:
        problem, names = _search_problem(settings, base, candidates, limit, runtime)
        unlimited = s.search.strategy == "all"
        filters = searching.greedy(replace(problem, limit=math.inf) if unlimited else problem)
        best = {"strategy": s.search.strategy, "limit": None if unlimited else limit, "filters": _named(names, filters)}
        best |= {"overhead": problem.overhead(filters), "mean": None, "std": None, "evaluations": 0}
        storage.write_json(out / "best.json", best)
        storage.write_csv(out / "log.csv", pd.DataFrame(columns=[*searching.COLUMNS, "candidates"]))
        return best

    problem, names = _search_problem(settings, base, candidates, limit, runtime)
    log_path = None
    if runtime.work:
        # A log of other settings or inputs has another name, and is not resumed from.
        weights, text = storage.model_files(base)
        identity = _identity("search", settings, storage.read_json(text), weights, candidates)
        log_path = _resumable(runtime.work, "search", f"{identity} {limit}")
    log = searching.search(problem, s.search, s.seed, log_path, not runtime.quiet, _read_states(known))
    storage.write_csv(out / "log.csv", log.table().assign(candidates=" ".join(names)))
    chosen = log.best()
    best = {"strategy": s.search.strategy, "limit": limit, "filters": _named(names, chosen.filters)}
    best |= {"overhead": chosen.overhead, "mean": chosen.mean, "std": chosen.std, "evaluations": log.evaluations}
    storage.write_json(out / "best.json", best)
    if log_path:
        _discard(log_path)
    return best


def search_state(
    settings: Settings,
    base: Path,
    candidates: Path,
    limit: float,
    known: Sequence[Path],
    slot: int,
    out: Path,
    runtime: Runtime,
) -> None:
    """Score one state of a population, so that several jobs can work at a search. Writes it to `out`, a JSON file.

    The search is replayed with the states that are `known` to the point where it needs more; of those this one is
    number `slot`. Where there are not so many, or the search is over, the file says `null`.
    """
    s = settings.of("search")
    if s.search.strategy not in SEARCHING:
        raise UserError(f"search: strategy {s.search.strategy} trains no states")
    problem, _ = _search_problem(settings, base, candidates, limit, runtime)
    try:
        searching.search(replace(problem, score=None), s.search, s.seed, None, False, _read_states(known))
        waiting: tuple[searching.Filters, ...] = ()
    except searching.Pending as pending:
        waiting = pending.states
    if slot >= len(waiting):
        storage.write_json(out, None)
        return
    began = time.monotonic()
    mean, std = problem.score(waiting[slot])
    seconds = round(time.monotonic() - began, 3)
    storage.write_json(out, {"filters": waiting[slot], "mean": mean, "std": std, "seconds": seconds})


def _search_problem(
    settings: Settings, base: Path, candidates: Path, limit: float, runtime: Runtime
) -> tuple[searching.Problem, list[str]]:
    """What is searched within one overhead limit, and the names of the candidate layers."""
    s = settings.of("search")
    if not 0 < limit <= 1:
        raise UserError(f"search: --limit is a fraction above 0 and at most 1, not {limit}")
    model, description = read_network(base, runtime.device)
    _split_seed(s, description, base)  # refused before any work
    _check_base("search", base, description)
    layers = dict(crossbar_layers(model))
    names = _candidate_names(candidates, layers)
    section = SimpleNamespace(**{**vars(s.compensate), "epochs": s.search.train_epochs})
    device = variation.make(s.variation)

    @functools.cache
    def splits() -> tuple[Split, Split]:  # read once, and not at all where nothing is trained
        data = runtime.load(s, description, base)
        return data.train.take(s.search.train_images), data.validation.take(s.search.images)

    def score(filters: searching.Filters) -> tuple[float, float]:
        train, images = splits()
        analog, _, hooks = compensation.prepare(model, _named(names, filters), section, device, s.seed, "search")
        parameters = compensation.trained_parameters(analog, section)
        if parameters:
            hooks.augment = s.data.augment
            how = {"title": "compensators " + " ".join(map(str, filters)), "quiet": runtime.quiet}
            fit(analog, train, section, s.seed, stage="search", parameters=parameters, hooks=hooks, **how)
        result = evaluate(
            analog,
            images,
            s.search.chips,
            start=streams.chips("search", s.search.chips).start,
            precision=s.montecarlo.precision,
            gpu_method=s.montecarlo.gpu_method,
            memory=runtime.memory,
            progress=False,
        )
        return result.mean, result.std

    problem = searching.Problem(
        widths=tuple(layers[name].weight.shape[0] for name in names),
        ratios=s.search.ratios,
        limit=limit,
        overhead=lambda filters: compensation.overhead(model, _named(names, filters)),
        score=score,
    )
    return problem, names


def _named(names: Sequence[str], filters: searching.Filters) -> dict[str, int]:
    """The generator filters of the layers that are compensated, by name."""
    return {name: m for name, m in zip(names, filters, strict=True) if m}


def _read_states(paths: Sequence[Path]) -> list[searching.Explored]:
    """The states that `search_state` scored; files that say `null` hold none."""
    states = []
    for path in paths:
        found = storage.read_json(path)
        if found is None:
            continue
        keys = ("filters", "mean", "std", "seconds")
        if not isinstance(found, dict) or not set(keys) <= set(found):
            raise UserError(f"{path}: no state of a search; delete it to have it made again")
        filters, mean, std, seconds = (found[key] for key in keys)
        holds = isinstance(filters, list) and all(_whole(m, 0) for m in filters)
        _expect(path, "filters", holds, "a list of numbers of filters", filters)
        for key in ("mean", "std"):
            _expect(path, key, _number(found[key], 0, 1), "a fraction between 0 and 1", found[key])
        _expect(path, "seconds", _number(seconds), "a number that is at least 0", seconds)
        states.append(searching.Explored(0, 0, tuple(filters), 0.0, mean, std, 0.0, seconds))
    return states


def _candidate_names(path: Path, layers: dict[str, nn.Module]) -> list[str]:
    found = storage.read_json(path)
    names = found.get("candidates") if isinstance(found, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: names no candidate layers (candidates.json of `sweep` is expected)")
    if unknown := [name for name in names if name not in layers]:
        raise UserError(f"{path}: candidates: the network has no layer {unknown[0]!r} (layers: {', '.join(layers)})")
    if len(set(names)) != len(names):
        raise UserError(f"{path}: candidates: a layer is named twice")
    return names


def compensate(settings: Settings, base: Path, found: Sequence[Path], out: Path, runtime: Runtime) -> None:
    """Train the compensators of the best state that the searches found. Writes a model and its log to `out`.

    The network with the trained compensators and the one without are compared under variation on validation images; the
    better one is written, both accuracies stand in its history (`judged`), and a warning says if it is the latter.

    Args:
        settings, base, out, runtime: as elsewhere.
        found: best.json of each limit; the one with the best mean validation accuracy is taken, of equals the one
            with the least overhead. Where no layer is a candidate the result is that network itself.
    """
    s = settings.of("compensate")
    results = [_read_best(path) for path in found]
    means = [1.0 if r["mean"] is None else r["mean"] for r in results]
    best = results[best_state(means, [r["overhead"] for r in results])]
    model, described = read_network(base, runtime.device)
    _check_base("compensate", base, described)
    device = variation.make(s.variation)
    analog, plan, hooks = compensation.prepare(model, best["filters"], s.compensate, device, s.seed, "compensate")
    described |= {"compensation": plan, "overhead": compensation.overhead(model, plan["filters"]), "search": best}
    parameters = compensation.trained_parameters(analog, s.compensate)
    if not parameters:
        data = runtime.load(s, described, base)
        metrics = {"epochs": 0, "validation": clean_accuracy(analog, data.validation)}
        _write_network(out, analog, described, "compensate", settings, metrics)
        storage.write_text(out / "log.csv", "epoch\n")
        return
    inputs = [storage.model_files(base)[0], *found]
    data = runtime.load(s, described, base)

    def judge() -> dict[str, Any]:
        how = {"stage": "compensate", "memory": runtime.memory}
        return {"judged": compensation.keep_better(analog, model, plan, data.validation, s.seed, **how)}

    _train("compensate", analog, described, data, settings, hooks, out, runtime, inputs, parameters, judge)


def _read_best(path: Path) -> dict[str, Any]:
    """The result of a search."""
    best = storage.read_json(path)
    if not isinstance(best, dict) or not {"filters", "mean", "overhead"} <= set(best):
        raise UserError(f"{path}: not what a search found (its best.json)")
    _expect(path, "filters", _filters(best["filters"]), "a number of filters for each layer", best["filters"])
    holds = best["mean"] is None or _number(best["mean"], 0, 1)
    _expect(path, "mean", holds, "a fraction between 0 and 1, or null", best["mean"])
    _expect(path, "overhead", _number(best["overhead"]), "a number that is at least 0", best["overhead"])
    return best


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
    """Accuracy of a number of chips. Writes a CSV, a row a chip.

    Args:
        settings: those of `evaluate`.
        path: a model.
        chips: how many; with `variation.sigma` 0 all chips are the nominal network, and it is evaluated once.
        start: number of the first among the chips for these images: test images and validation images are evaluated on
            chips of their own (`correctnet.noise.streams`), as choices are made on the latter.
        notes: further columns of one value each (pair, row), put before the others.
        prefixes: with `variation.sigma` 0, numbers of images: how many of the first N are correct is put into the
            column `prefixes`, as N:CORRECT, for Table I to divide the accuracies of rows of N images by. One that is
            not below the number of all images is left out.
    """
    s = settings.of("evaluate")
    storage.check_writable(out)
    if prefixes and s.variation.sigma != 0:
        raise UserError("--prefix: the nominal network alone is judged on fewer images, too; it needs --sigma 0")
    model, description = read_network(path, runtime.device)
    data = runtime.load(s, description, path)
    images = getattr(data, s.evaluate.split).take(s.evaluate.images)
    analog = convert(model, variation.make(s.variation), s.seed)
    history = description.get("history", [])
    plan = description.get("compensation") or {"filters": {}}
    columns = {
        "network": description["network"]["name"],
        "dataset": s.data.dataset,
        "split": s.evaluate.split,
        **_variation_columns(analog),
        "overhead": description.get("overhead", 0.0),
        "layers": len(plan["filters"]),
        "epochs": " + ".join(f"{h['epochs']} {h['stage']}" for h in history),
        "trained_sigma": _trained_sigma(history),
    }
    if taken := sorted(set(notes or {}) & {*columns, *COLUMNS, *IDENTITY, "prefixes"}):
        raise UserError(f"--note {taken[0]}: the evaluation has a column of that name")
    first = streams.chips(s.evaluate.split, chips, start).start
    if s.variation.sigma > 0:
        check_coverage(model, analog, images.images[:8], sample=first)
    else:
        chips = min(chips, 1)
    calibration = data.train.take(s.evaluate.recalibrate_images).images
    prepare = None
    if s.evaluate.recalibrate == "simulated":
        simulated = streams.chips("recalibration", RECALIBRATION_CHIPS)
        recalibration.recalibrate(analog, calibration, simulated, s.montecarlo.precision)
    elif s.evaluate.recalibrate == "chip":

        def prepare(chip: nn.Module) -> None:
            recalibration.recalibrate(chip, calibration, None, s.montecarlo.precision)

    save = None
    if runtime.work:
        # The rows of other settings or another model have another name, and are not taken over.
        save = _resumable(
            runtime.work, "chips", _identity("evaluate", settings, description, *storage.model_files(path))
        )
    how = {"precision": s.montecarlo.precision, "gpu_method": s.montecarlo.gpu_method, "memory": runtime.memory}
    how |= {"start": first, "prepare": prepare}
    result = evaluate(analog, images, chips, save=save, progress=not runtime.quiet, **how)
    counts = {
        n: evaluate(analog, images.take(n), 1, progress=False, **how).table["correct"][0]
        for n in sorted(set(prefixes))
        if n < len(images)
    }
    if counts:
        columns["prefixes"] = " ".join(f"{n}:{correct}" for n, correct in counts.items())
    result = record(result, {**(notes or {}), **columns})
    result.to_csv(out)
    if save:
        _discard(save)
    return result


def _trained_sigma(history: Sequence[dict[str, Any]]) -> str:
    """The sigmas that a model was trained for, by the stages that know one; "none" where none does."""
    sigmas = (h.get("settings", {}).get("variation", {}).get("sigma") for h in history)
    return " + ".join(dict.fromkeys(exact(sigma) for sigma in sigmas if sigma is not None)) or "none"


def _resumable(folder: Path, name: str, identity: str) -> Path:
    """The CSV in which a stage notes what is done: one of its own for each `identity` of settings and inputs."""
    return folder / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.csv"


def _discard(path: Path) -> None:
    """Remove what a finished stage no longer needs to go on, and its folder where that is empty then."""
    path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # the folder holds something else
        path.parent.rmdir()


def describe_engine(path: Path) -> str:
    """What of the model at `path` the C++ core runs, layer by layer, as text."""
    model, description = read_network(path)
    analog = convert(model, variation.LogNormalVariation(0.5))
    example = torch.zeros(2, description["network"]["channels"], 32, 32)
    report = describe(analog, example)
    names = {id(m): n for n, m in analog.named_modules()}
    lines = [f"{path}: {description['network']['name']}, {report}"]
    for layer in analog_layers(analog):
        name = names[id(layer)]
        state = "fused" if name in report.fused else "unfused"
        lines.append(f"  {layer.layer_index:2d} {name:24s} {state:8s} {' x '.join(map(str, layer.weight.shape))}")
    return "\n".join(lines)


def _variation_columns(analog: nn.Module) -> dict[str, Any]:
    """What the variation was, and the mean and coefficient of variation of w / w_nominal that follow."""
    described = analog_layers(analog)[0].variation.describe()
    names = {"model": "variation", "mean": "factor_mean", "cv": "factor_cv"}
    return {names.get(key, key): value for key, value in described.items()}


def set_threads(threads: int) -> None:
    """Use `threads` threads within and between operations, never more than the CPUs this process may use."""
    threads = max(1, min(threads, available_cpus()))
    torch.set_num_threads(threads)
    if torch.get_num_interop_threads() != 1:
        torch.set_num_interop_threads(1)  # nothing here runs two operations at once


def available_cpus() -> int:
    """The CPUs that this process may use: its affinity, and its control group's quota."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            cpus = min(cpus, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no control group limits this process
    return cpus
