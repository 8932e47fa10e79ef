"""Where results come from: code, versions, machine and command of each job, with its wall time and memory.

A stage that the workflow starts writes `here()` as the first line of its log, and Snakemake its time and memory as a
benchmark file beside; `jobs` puts the two together.
"""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from correctnet.errors import UserError, one_line

PREFIX = "provenance: "
COLUMNS = ["job", "seconds", "memory_mib", "cpu_seconds", "started", "version", "revision", "torch", "cpu", "command"]


@cache
def revision() -> str | None:
    """Git revision of the code, '+' behind it where files were changed since; None for code that is no checkout."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        described = ["git", "-C", str(root), "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty=+"]
        return subprocess.run(described, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def here(device: str = "cpu", threads: int | None = None) -> dict[str, Any]:
    """The present process: version, revision, Python, torch, CPU, device, threads, start and command."""
    import torch

    from correctnet import __version__, native

    status = native.status()
    return {
        "version": __version__,
        "revision": revision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": native.cpu_name(),
        "kernels": status.isa if status.built else "none",
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": threads or torch.get_num_threads(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def line(device: str, threads: int | None) -> str:
    """`here()` as a line of a log."""
    return PREFIX + json.dumps(here(device, threads))


def jobs(results: Path, pairs: list[str]) -> pd.DataFrame:
    """One row a job of `pairs` that has a benchmark file under `results`, in the order in which they started.

    Columns: job (its path), seconds (wall time) and memory_mib (peak, resident) of its last process, cpu_seconds,
    started, and from its log version, revision, torch, cpu and command.
    """
    rows = []
    for pair in pairs:
        for path in sorted((results / ".benchmarks" / pair).rglob("*.tsv")):
            job = str(path.relative_to(results / ".benchmarks")).removesuffix(".tsv")
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
    """What a job's log says of it; nothing where it was written by something else."""
    try:
        with open(log) as file:
            first = file.readline()
        found = json.loads(first.removeprefix(PREFIX)) if first.startswith(PREFIX) else {}
    except (OSError, ValueError):
        return {}
    return {key: found.get(key) for key in COLUMNS if key in found}
