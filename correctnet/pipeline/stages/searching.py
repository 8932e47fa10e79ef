"""The stages that look for where to compensate: candidate layers and search."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from correctnet import devices
from correctnet.crossbar.layers import crossbar_layers
from correctnet.datasets.base import Split
from correctnet.errors import UserError
from correctnet.files import storage
from correctnet.methods import candidates as sweeping
from correctnet.methods import placement
from correctnet.methods import search as searching
from correctnet.noise import streams
from correctnet.pipeline.models import check_uncompensated, expect, is_number, is_whole, read_network
from correctnet.pipeline.runtime import (
    Runtime,
    digital_layers,
    discard,
    give_converters,
    resumable,
    split_seed,
    stage_identity,
)
from correctnet.pipeline.specs import STAGES
from correctnet.settings import SEARCHING, Digital, Settings


def sweep(settings: Settings, pretrained: Path, base: Path, out: Path, runtime: Runtime) -> None:
    """Find the candidate layers on the validation images. Writes out/accuracy.csv and out/candidates.json."""
    s = STAGES["sweep"].read(settings)
    original, of_original = read_network(pretrained, runtime.device)
    model, description = read_network(base, runtime.device)
    for path, of in ((pretrained, of_original), (base, description)):
        check_uncompensated("sweep", path, of)
    if split_seed(s, description, base) != split_seed(s, of_original, pretrained):
        raise UserError(f"sweep: {base} and {pretrained} were trained on other splits of the images")
    data = runtime.load(s, description, base)
    images = data.validation.take(s.sweep.images)
    found = sweeping.find_candidates(
        model,
        images,
        devices.make(s.variation),
        original=original,
        threshold=s.sweep.threshold,
        chips=s.sweep.chips,
        seed=s.seed,
        exclude=digital_layers(s, model, data.train),
        equip=lambda analog: give_converters(s, analog, data.train, description.get("converters")),
        simulation=runtime.simulation(s, streams.chips("sweep", s.sweep.chips).start),
    )
    storage.write_csv(out / "accuracy.csv", found.table())
    storage.write_json(out / "candidates.json", {**found.summary(), "chips": s.sweep.chips, "images": len(images)})


def search(
    settings: Settings,
    base: Path,
    candidates: Path,
    limit: float,
    out: Path,
    runtime: Runtime,
    known: Sequence[Path] = (),
) -> dict[str, Any]:
    """Search the states within one overhead limit. Writes out/log.csv and out/best.json, and returns the latter.

    With `strategy` "all" every candidate gets the largest ratio, whatever its overhead, and with "greedy" the ratios of
    `correctnet.methods.search.greedy`, without a search. `known`: states that `search_state` has scored.
    """
    s = STAGES["search"].read(settings)
    problem, names = _search_problem(settings, base, candidates, limit, runtime)
    log_path = None
    if runtime.work and s.search.strategy in SEARCHING:
        # A log of other settings or inputs is a file of another name.
        weights, text = storage.model_files(base)
        identity = stage_identity("search", settings, storage.read_json(text), weights, candidates)
        log_path = resumable(runtime.work, "search", f"{identity} {limit}")
    placed = placement.place(problem, names, s.search, s.seed, log_path, not runtime.quiet, _read_states(known))
    storage.write_csv(out / "log.csv", placed.log.assign(candidates=" ".join(names)))
    storage.write_json(out / "best.json", placed.summary())
    if log_path:
        discard(log_path)
    return placed.summary()


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
    s = STAGES["search"].read(settings)
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
    """The search problem within one overhead limit, and the names of the candidate layers."""
    s = STAGES["search"].read(settings)
    if not 0 < limit <= 1:
        raise UserError(f"search: --limit is a fraction above 0 and at most 1, not {limit}")
    model, description = read_network(base, runtime.device)
    split_seed(s, description, base)  # mistakes are found before any work
    check_uncompensated("search", base, description)
    found = _candidate_names(candidates, dict(crossbar_layers(model)))
    names = list(placement.only_compensable(model, found))

    loaded = functools.cache(lambda: runtime.load(s, description, base))
    # Data that tells nothing about the state is not read before the first one is trained.
    digital = digital_layers(s, model, loaded().train) if s.digital != Digital() else ()

    def read() -> tuple[Split, Split]:
        data = loaded()
        return data.train.take(s.search.train_images), data.validation.take(s.search.images)

    problem = placement.make_problem(
        model,
        names,
        limit,
        s.search,
        s.compensate,
        devices.make(s.variation),
        s.seed,
        read,
        runtime.simulation(s, 0),
        augment=s.data.augment,
        digital=digital,
        equip=lambda analog: give_converters(s, analog, loaded().train),
    )
    return problem, names


def _read_states(paths: Sequence[Path]) -> list[searching.Explored]:
    """States that `search_state` scored; files with `null` hold none."""
    states = []
    for path in paths:
        found = storage.read_json(path)
        if found is None:
            continue
        keys = ("filters", "mean", "std", "seconds")
        if not isinstance(found, dict) or not set(keys) <= set(found):
            raise UserError(f"{path}: no state of a search; delete it to have it remade")
        filters, mean, std, seconds = (found[key] for key in keys)
        holds = isinstance(filters, list) and all(is_whole(m, 0) for m in filters)
        expect(path, "filters", holds, "a list of numbers of filters", filters)
        for key in ("mean", "std"):
            expect(path, key, is_number(found[key], 0, 1), "a fraction between 0 and 1", found[key])
        expect(path, "seconds", is_number(seconds), "a number that is at least 0", seconds)
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
