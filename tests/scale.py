"""How long a dry run takes, and how much memory, as the workflow grows: `python tests/scale.py OUT.csv OUT.png`.

Up to 40 pairs, each with 11 sigmas and 3 methods of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib
import pandas as pd
from workflows import configuration, environment, prepare, stats

PAIRS = (1, 5, 10, 20, 40)
SIGMAS = [0.05 * i for i in range(1, 10)] + [0.5]  # and 0, which is always evaluated
ROWS = ["unprotected", "correctnet", "injected"]


def configured(pairs: int) -> dict:
    """A configuration of so many pairs, whose rows are all curves, with two chunks a sigma."""
    config = configuration()
    pair = {"rows": ROWS, "data": {"dataset": "digits"}, "evaluate": {"sigmas": SIGMAS[:-1], "curve_chips": 100}}
    pair["evaluate"] |= {"chips": 250, "chunk": 50}
    names = [f"pair{i}" for i in range(pairs)]
    config["pairs"] = {name: {**pair, "seed": i} for i, name in enumerate(names)}
    config["runs"] = {"paper": names, "quick": names[:1]}
    config["rows"] = {name: {**config["rows"][name], "curve": True} for name in ROWS}
    return config


def measure(pairs: int) -> dict[str, float]:
    """Jobs, seconds and peak memory of a dry run."""
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(Path(folder) / "run", configured(pairs))
        began = time.monotonic()
        command = [sys.executable, "-m", "snakemake", "-n", "--quiet", "rules", "all"]
        process = subprocess.Popen(command, cwd=run, env=environment(), stdout=subprocess.PIPE, text=True)
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
        assert status == 0, output
        return {
            "pairs": pairs,
            "jobs": sum(stats(output).values()),
            "seconds": round(seconds, 1),
            "memory_mib": round(usage.ru_maxrss / 1024),
        }


def main(csv: str, png: str) -> None:
    """Measure, write the table, and draw it."""
    table = pd.DataFrame([measure(pairs) for pairs in PAIRS])
    table.to_csv(csv, index=False)
    print(table.to_string(index=False))
    matplotlib.use("Agg")
    axes = table.plot(x="jobs", y=["seconds", "memory_mib"], subplots=True, marker="o", legend=False, figsize=(6, 5))
    for ax, label in zip(axes, ("seconds", "peak memory, MiB"), strict=True):
        ax.set(ylabel=label, ylim=(0, None), xlabel="jobs of the dry run")
        ax.grid(alpha=0.3)
    axes[0].figure.tight_layout()
    axes[0].figure.savefig(png, dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])
