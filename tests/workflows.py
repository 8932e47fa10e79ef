"""The workflow with tiny budgets in a folder of its own, for the tests that run it."""

from __future__ import annotations

import copy
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "workflow" / "experiments"

ROWS = {
    "unprotected": {"evaluate": "pretrain", "label": "unprotected", "curve": True},
    "suppressed": {"evaluate": "suppress", "label": "Lipschitz regularisation alone"},
    "correctnet": {"evaluate": "compensate", "label": "CorrectNet", "curve": True},
    "mean-preserving": {"evaluate": "pretrain", "label": "mean-preserving", "set": {"variation": {"centre": "mean"}}},
    "injected": {"evaluate": "inject", "label": "variation-aware training"},
    "finetuned": {"evaluate": "finetune", "label": "CorrectNet, fine-tuned"},
}
DEFAULTS = {
    "sweep": {"threshold": 0.95},
    "search": {"limits": [0.01, 0.02, 0.03]},
    "evaluate": {"chips": 250, "sigmas": [0.1, 0.2, 0.3, 0.4], "curve_chips": 50, "chunk": 125},
}
PAIR = {
    "rows": ["unprotected", "suppressed", "correctnet", "mean-preserving"],
    "data": {"dataset": "digits", "validation": 0.15},
    "pretrain": {"epochs": 3},
    "suppress": {"epochs": 1},
    "sweep": {"threshold": 1.0, "chips": 2, "images": 50},
    "search": {"limits": [0.02], "evaluations": 2, "episodes": 3, "train_images": 64, "chips": 2, "images": 50},
    "compensate": {"epochs": 1},
    "evaluate": {"chips": 3, "sigmas": [0.2], "curve_chips": 2, "chunk": 2, "images": 50},
    "sensitivity": {"chips": 2, "images": 50},
}
# Columns that differ between any two runs.
MACHINE = {"seconds", "process"}


def configuration() -> dict:
    """A configuration with two pairs of tiny budgets, `one` with four rows and `two` with the original network."""
    return {
        "results": "results",
        "runs": {"paper": ["one"], "quick": ["one"], "both": ["one", "two"]},
        "rows": copy.deepcopy(ROWS),
        "defaults": copy.deepcopy(DEFAULTS),
        "pairs": {"one": copy.deepcopy(PAIR), "two": {**copy.deepcopy(PAIR), "rows": ["unprotected"]}},
    }


def short(config: dict) -> dict:
    """`config` with the original network alone: a few jobs."""
    config["pairs"]["one"]["rows"] = ["unprotected"]
    config["pairs"]["one"]["evaluate"]["sigmas"] = []
    return config


def prepare(folder: Path, config: dict | None = None) -> Path:
    """Put the workflow and a configuration into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "Snakefile", folder)
    for name in ("workflow", "profiles"):
        shutil.copytree(ROOT / name, folder / name)
    configure(folder, config or configuration())
    return folder


def configure(folder: Path, config: dict) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def environment() -> dict[str, str]:
    """One thread, the commands of this Python's installation, and tracebacks of what is aborted."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, "PYTHONFAULTHANDLER": "1"}


def start(folder: Path, *arguments: object, **options: object) -> subprocess.Popen:
    """Start snakemake, in a session of its own."""
    command = [sys.executable, "-m", "snakemake", *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} | options
    return subprocess.Popen(command, cwd=folder, env=environment(), start_new_session=True, **options)


def snakemake(folder: Path, *arguments: object, check: bool = True, cores: bool = True) -> str:
    """Run snakemake to its end and give what it printed."""
    process = start(folder, *(["--cores", 2] if cores else []), *arguments)
    output = ended(process)
    assert not check or process.returncode == 0, output[-5000:]
    return output


def ended(process: subprocess.Popen, seconds: float = 1200) -> str:
    """Wait until what `start` started has ended, and give what it printed. Fails with its stacks if it does not end."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)
        raise AssertionError(f"not ended after {seconds} s:\n{process.communicate()[0][-10000:]}") from None


def stats(dry_run: str) -> dict[str, int]:
    """{rule: jobs} of a dry run, without the targets themselves."""
    table = re.search(r"Job stats:\njob +count\n[- ]+\n((?:\S+ +\d+\n)+)", dry_run)
    jobs = dict(line.split() for line in table[1].splitlines()) if table else {}
    return {name: int(n) for name, n in jobs.items() if name not in ("total", "quick", "both", "all")}


def results(folder: Path) -> dict[str, bytes]:
    """Every result of a run by its path, without the columns and files that only describe the machine."""
    found = {}
    for path in sorted((folder / "results").rglob("*")):
        name = str(path.relative_to(folder / "results"))
        if not path.is_file() or name.startswith((".logs", ".benchmarks")) or path.stem == "provenance":
            continue
        if path.name == "log.csv":
            found[name] = "\n".join(_without(path.read_text(), MACHINE)).encode()
        elif path.name != "search.html":  # its texts are those of log.csv
            found[name] = path.read_bytes()
    return found


def _without(text: str, columns: set[str]) -> list[str]:
    header, *lines = (line.split(",") for line in text.splitlines())
    keep = [i for i, name in enumerate(header) if name not in columns]
    return [",".join(line[i] for i in keep) for line in [header, *lines]]
