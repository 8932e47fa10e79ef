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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pandas as pd
import torch
from torch import nn

from correctnet import compensation, lipschitz, models, recalibration, storage, variation
from correctnet import data as datasets
from correctnet import search as searching
from correctnet import sweep as sweeping
from correctnet.analog import analog_layers, check_coverage, convert, crossbar_layers, program
from correctnet.config import SEARCHING, Settings, Stage, network_mistake, sizes_mistake
from correctnet.data import DataSet, Split
from correctnet.engine import MEMORY, describe
from correctnet.errors import UserError, one_line
from correctnet.montecarlo import clean_accuracy, evaluate
from correctnet.results import COLUMNS, Result, record
from correctnet.tables import best_state
from correctnet.training import Checkpoint, Hooks, fit


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

    def load(self, settings: Any) -> DataSet:
        """The data set that a stage's settings name, on the device."""
        data = datasets.load(settings.data.dataset, self.data_dir, settings.data.validation, settings.seed)
        return data.to(self.device)


def read_network(path: str | Path, device: str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """The network at `path` as a plain module in evaluation mode, and its description.

    Raises UserError where the files are absent, damaged, or describe no network of this package.
    """
    tensors, description = storage.read_model(path)
    if "network" not in description:
        raise UserError(f"{path}: holds no network of correctnet.models; load it with correctnet.compensation.load")
    model = _build(description["network"])
    model = compensation.restore(model, tensors, description, str(path))
    return model.eval().to(device), description


def _build(network: dict[str, Any], seed: int = 0) -> nn.Module:
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in network.items()}
    return models.build(**options, seed=seed)


def _write_network(
    out: Path, model: nn.Module, base: dict[str, Any], stage: Stage, settings: Settings, metrics: dict[str, Any]
) -> None:
    """Write a model that `stage` made from one described by `base`, with the stage added to its history."""
    description = {k: v for k, v in base.items() if k not in ("format", "sha256")}
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
) -> None:
    """Train a stage's model, resumably, and write it: what all stages that train share."""
    s = settings.of(stage)
    hooks.augment = s.data.augment
    # A checkpoint is for these settings, these inputs, and no others.
    identity = [stage, settings.canonical(stage), *(storage.sha256(p) for p in inputs)]
    checkpoint = Checkpoint(runtime.work / f"{stage}.safetensors", "\n".join(identity)) if runtime.work else None
    rows = fit(
        model,
        data.train,
        getattr(s, stage),
        s.seed,
        parameters=parameters,
        hooks=hooks,
        validate=lambda: clean_accuracy(model, data.validation),
        checkpoint=checkpoint,
        log=out / "log.csv",
        title=stage,
        quiet=runtime.quiet,
    )
    metrics = {"epochs": len(rows), "validation": clean_accuracy(model, data.validation)}
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
    model = _build(network, s.seed).to(runtime.device)
    _train("pretrain", model, {"network": network}, data, settings, Hooks(sizes=s.pretrain.sizes), out, runtime)


def suppress(settings: Settings, pretrained: Path, out: Path, runtime: Runtime) -> None:
    """Train under the Lipschitz regulariser (11), from the pre-trained weights or from scratch."""
    s = settings.of("suppress")
    model, base = read_network(pretrained, runtime.device)
    if mistake := sizes_mistake(s, "suppress", base["network"]["name"]):
        raise UserError(mistake)
    if s.suppress.start == "scratch":
        model = _build(base["network"], s.seed).to(runtime.device)
        base = {"network": base["network"]}
    lam = lipschitz.bound(s.variation.sigma, s.suppress.k, variation.make(s.variation).shift)
    ramp, beta = s.suppress.ramp, s.suppress.beta
    hooks = Hooks(
        penalty=lambda: lipschitz.penalty(
            lipschitz.analog_weights(model, s.suppress.fold_batchnorm), lam, s.suppress.form
        ),
        penalty_weight=lambda done: beta * min(1.0, done / ramp) if ramp else beta,
        temperature=s.suppress.temperature,
        sizes=s.suppress.sizes,
    )
    weights, _ = storage.model_files(pretrained)
    _train("suppress", model, base, runtime.load(s), settings, hooks, out, runtime, [weights])


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
    analog = convert(model, variation.make(s.variation), s.seed)
    hooks = Hooks(
        before_batch=lambda draw: program(analog, variation.TRAINING_CHIPS + draw),
        update_batchnorm=getattr(s, stage).batchnorm == "updated",
    )
    weights, _ = storage.model_files(path)
    _train(stage, analog, base, runtime.load(s), settings, hooks, out, runtime, [weights])


def sweep(settings: Settings, pretrained: Path, base: Path, out: Path, runtime: Runtime) -> None:
    """Find the candidate layers on the validation images. Writes out/accuracy.csv and out/candidates.json."""
    s = settings.of("sweep")
    images = runtime.load(s).validation.take(s.sweep.images)
    original, _ = read_network(pretrained, runtime.device)
    model, _ = read_network(base, runtime.device)
    found = sweeping.sweep(
        convert(model, variation.make(s.variation), s.seed),
        images,
        clean_accuracy(original, images),
        s.sweep.threshold,
        chips=s.sweep.chips,
        start=variation.VALIDATION_CHIPS,
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
        runtime.load(s).validation.take(s.sensitivity.images),
        chips=s.sensitivity.chips,
        start=variation.VALIDATION_CHIPS,
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
    or `correctnet.search.greedy` says which. `known`: states that `search_state` has scored.
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
        weights, _ = storage.model_files(base)
        identity = f"{settings.canonical('search')} {limit} {storage.sha256(weights)} {storage.sha256(candidates)}"
        log_path = _resumable(runtime.work, "search", identity)
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
    model, _ = read_network(base, runtime.device)
    layers = dict(crossbar_layers(model))
    names = _candidate_names(candidates, layers)
    section = SimpleNamespace(**{**vars(s.compensate), "epochs": s.search.train_epochs})
    device = variation.make(s.variation)

    @functools.cache
    def splits() -> tuple[Split, Split]:  # read once, and not at all where nothing is trained
        data = runtime.load(s)
        return data.train.take(s.search.train_images), data.validation.take(s.search.images)

    def score(filters: searching.Filters) -> tuple[float, float]:
        train, images = splits()
        analog, _, hooks = compensation.prepare(model, _named(names, filters), section, device, s.seed)
        parameters = compensation.trained_parameters(analog, section)
        if parameters:
            hooks.augment = s.data.augment
            title = "compensators " + " ".join(map(str, filters))
            fit(analog, train, section, s.seed, parameters=parameters, hooks=hooks, title=title, quiet=runtime.quiet)
        result = evaluate(
            analog,
            images,
            s.search.chips,
            start=variation.VALIDATION_CHIPS,
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
        try:
            filters, mean, std, seconds = (found[key] for key in ("filters", "mean", "std", "seconds"))
            states.append(searching.Explored(0, 0, tuple(map(int, filters)), 0.0, mean, std, 0.0, seconds))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}: no state of a search ({one_line(error)}); delete it to have it made again"
            ) from error
    return states


def _candidate_names(path: Path, layers: dict[str, nn.Module]) -> list[str]:
    found = storage.read_json(path)
    names = found.get("candidates") if isinstance(found, dict) else None
    if not isinstance(names, list) or not set(names) <= set(layers):
        raise UserError(f"{path}: names no candidate layers of this network")
    return names


def compensate(settings: Settings, base: Path, found: Sequence[Path], out: Path, runtime: Runtime) -> None:
    """Train the compensators of the best state that the searches found. Writes a model and its log to `out`.

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
    device = variation.make(s.variation)
    analog, plan, hooks = compensation.prepare(model, best["filters"], s.compensate, device, s.seed)
    described |= {"compensation": plan, "overhead": compensation.overhead(model, plan["filters"]), "search": best}
    parameters = compensation.trained_parameters(analog, s.compensate)
    if not parameters:
        metrics = {"epochs": 0, "validation": clean_accuracy(analog, runtime.load(s).validation)}
        _write_network(out, analog, described, "compensate", settings, metrics)
        storage.write_text(out / "log.csv", "epoch\n")
        return
    inputs = [storage.model_files(base)[0], *found]
    _train("compensate", analog, described, runtime.load(s), settings, hooks, out, runtime, inputs, parameters)


def _read_best(path: Path) -> dict[str, Any]:
    """The result of a search."""
    best = storage.read_json(path)
    if not isinstance(best, dict) or not {"filters", "mean", "overhead"} <= set(best):
        raise UserError(f"{path}: not what a search found (its best.json)")
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
) -> Result:
    """Accuracy of chips start, ..., start + chips - 1. Writes a CSV, a row a chip.

    Args:
        settings: those of `evaluate`.
        path: a model.
        chips, start: as in `correctnet.montecarlo.evaluate`; with `variation.sigma` 0 all chips are the nominal
            network, and it is evaluated once.
        notes: further columns of one value each (pair, row), put before the others.
    """
    s = settings.of("evaluate")
    storage.check_writable(out)
    model, description = read_network(path, runtime.device)
    data = runtime.load(s)
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
    }
    if taken := sorted(set(notes or {}) & {*columns, *COLUMNS}):
        raise UserError(f"--note {taken[0]}: the evaluation has a column of that name")
    if s.variation.sigma > 0:
        check_coverage(model, analog, images.images[:8], sample=start)
    else:
        chips = min(chips, 1)
    calibration = data.train.take(s.evaluate.recalibrate_images).images
    prepare = None
    if s.evaluate.recalibrate == "simulated":
        chips_used = range(variation.TRAINING_CHIPS, variation.TRAINING_CHIPS + 20)
        recalibration.recalibrate(analog, calibration, chips_used, s.montecarlo.precision)
    elif s.evaluate.recalibrate == "chip":

        def prepare(chip: nn.Module) -> None:
            recalibration.recalibrate(chip, calibration, None, s.montecarlo.precision)

    save = None
    if runtime.work:
        # The rows of other settings or another model have another name, and are not taken over.
        identity = f"{settings.canonical('evaluate')} {storage.sha256(storage.model_files(path)[0])}"
        save = _resumable(runtime.work, "chips", identity)
    result = evaluate(
        analog,
        images,
        chips,
        start=start,
        precision=s.montecarlo.precision,
        gpu_method=s.montecarlo.gpu_method,
        memory=runtime.memory,
        prepare=prepare,
        save=save,
        progress=not runtime.quiet,
    )
    result = record(result, {**(notes or {}), **columns})
    result.to_csv(out)
    if save:
        _discard(save)
    return result


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
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cpus = min(cpus, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no control group limits this process
    return cpus
