"""Provenance of results: code, versions, machine and command of each job, with its wall time and memory.

A stage that the workflow starts writes `here()` as the first line of its log, and Snakemake writes its time and memory
to a benchmark file; `jobs` joins the two.
"""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from correctnet.errors import UserError, one_line
from correctnet.files.yamlfile import json_values

PREFIX = "provenance: "
COLUMNS = ["job", "seconds", "memory_mib", "cpu_seconds", "started", "version", "revision", "torch", "cpu", "command"]


@cache
def revision() -> str | None:
    """Git revision of the code, followed by '+' where files were changed since; None outside a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        described = ["git", "-C", str(root), "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty=+"]
        return subprocess.run(described, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def here(device: str = "cpu", threads: int | None = None) -> dict[str, Any]:
    """This process: version, revision, Python, torch, CPU, device, threads, start and command."""
    import torch

    from correctnet import __version__, machine
    from correctnet.noise import core

    status = core.status()
    return {
        "version": __version__,
        "revision": revision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": machine.cpu_name(),
        "kernels": status.isa if status.built else "none",
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": threads or torch.get_num_threads(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def line(device: str, threads: int | None) -> str:
    """`here()` as a line for a log."""
    return PREFIX + json.dumps(here(device, threads))


def fold(names: Iterable[str]) -> str:
    """Names of jobs, which are paths, as short JSON: folders are objects, and the jobs of one folder a list."""
    tree: dict[str, Any] = {}
    for name in names:
        *folders, last = name.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place.setdefault("", []).append(last)
    return json.dumps(_without_empty(tree), separators=(",", ":"))


def _without_empty(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return tree[""] if set(tree) == {""} else {name: _without_empty(inner) for name, inner in tree.items()}


def unfold(text: str) -> list[str]:
    """Names of jobs from the output of `fold`. Raises UserError for anything else."""

    def names(tree: Any, path: tuple[str, ...]) -> Iterator[str]:
        if isinstance(tree, dict):
            for name, inner in tree.items():
                yield from names(inner, (*path, name) if name else path)
        elif isinstance(tree, list) and all(isinstance(name, str) for name in tree):
            yield from ("/".join((*path, name)) for name in tree)
        else:
            raise UserError("--jobs: objects of folders and lists of jobs are expected")

    try:
        tree = json_values(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--jobs: not JSON ({one_line(error)})") from error
    return list(names(tree, ()))


def jobs(results: Path, pairs: list[str], only: Collection[str] | None = None) -> pd.DataFrame:
    """Table of the jobs of `pairs` with a benchmark file under `results`, in the order in which they started.

    `only` names the jobs of the run as it is configured now; files of other jobs (of removed rows, of settings before a
    change) are left out.

    Columns: job (its path), seconds (wall time) and memory_mib (peak, resident) of its last process, cpu_seconds,
    started, and from its log version, revision, torch, cpu and command.
    """
    if not results.is_dir():
        raise UserError(f"{results}: no such folder")
    rows = []
    wanted = None if only is None else set(only)
    shared = (name.partition("/")[0] for name in only or ())  # of another pair, whose network these have
    for pair in dict.fromkeys([*pairs, *shared]):
        for path in sorted((results / ".benchmarks" / pair).rglob("*.tsv")):
            job = str(path.relative_to(results / ".benchmarks")).removesuffix(".tsv")
            if wanted is not None and job not in wanted:
                continue
            row = {"job": job, **_benchmark(path)}
            row |= _first_line(results / ".logs" / f"{job}.log")
            rows.append(row)
    table = pd.DataFrame(rows, columns=COLUMNS)
    return table.sort_values("started", kind="stable", na_position="first", ignore_index=True)


def _benchmark(path: Path) -> dict[str, Any]:
    try:
        last = pd.read_csv(path, sep="\t", na_values="-").iloc[-1]
        return {"seconds": last["s"], "memory_mib": last["max_rss"], "cpu_seconds": last["cpu_time"]}
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{path}: not a benchmark file ({one_line(error)}); delete it") from error


def _first_line(log: Path) -> dict[str, Any]:
    """The provenance in the first line of a job's log; empty where there is none."""
    try:
        with open(log, encoding="utf-8", errors="replace") as file:
            first = file.readline()
        found = json.loads(first.removeprefix(PREFIX)) if first.startswith(PREFIX) else {}
    except (OSError, ValueError):
        return {}
    return {key: found.get(key) for key in COLUMNS if key in found}
