"""REINFORCE beside random search on synthetic problems, whose true values are known, with equal numbers of evaluations.

    python tests/search_budgets.py OUT.csv

OUT.csv: the mean over seeds of the difference (REINFORCE - random search) of the true mean accuracies of the states
that the two choose, and its 95 % interval (Student's t; a seed's two searches share nothing but the noise of the
scores). `--variant` and `--problem`, both repeatable, leave the others out; `--name` is what the shipped settings are
called. A quarter of an hour on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import stats

from correctnet.files import storage
from correctnet.methods import search as searching
from correctnet.methods.search import search
from correctnet.methods.search_log import Filters, Problem
from correctnet.methods.search_policy import Room
from correctnet.settings import Search

RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)
SIX = (64, 64, 128, 128, 256, 256)
# What compensating a layer fully brings: the early layers matter, as in the paper.
GAIN = (0.20, 0.16, 0.10, 0.05, 0.01, 0.01)
VGG = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)


def saturating(filters: Filters, widths: tuple[int, ...]) -> np.ndarray:
    """(n,): what compensation with these filters brings, a fraction of what it can."""
    return 1 - (1 - np.array(filters) / np.array(widths)) ** 3


def quadratic(widths: tuple[int, ...]) -> Callable[[Filters], float]:
    """Overhead: filters x width, of a network of 3 million parameters."""
    return lambda filters: sum(m * n for m, n in zip(filters, widths, strict=True)) / 3e6


def sums(widths: tuple[int, ...], gain: tuple[float, ...]) -> Callable[[Filters], float]:
    """Accuracy: a sum over the layers."""
    return lambda filters: 0.45 + float((np.array(gain) * saturating(filters, widths)).sum())


def interacting(filters: Filters) -> float:
    """Accuracy of six layers: the first two help each other, and the third takes from the second."""
    g = saturating(filters, SIX)
    return float(0.45 + 0.25 * g[0] * g[1] + 0.1 * g[2] * g[3] + 0.15 * g[1] * (1 - g[2]) + 0.05 * g[4])


def vgg_overhead(filters: Filters) -> float:
    """Overhead of VGG16's convolutions: parameters of generators and compensators (Fig. 5)."""
    inputs = (3, *VGG[:-1])
    parameters = (m * (i + o) + m + (o + m) * o + o for m, i, o in zip(filters, inputs, VGG, strict=True) if m)
    return sum(parameters) / 15e6


THIRTEEN = tuple(0.16 * 0.75**i for i in range(13))
# name: (widths, limit, overhead, true mean accuracy)
PROBLEMS = {
    "six layers": (SIX, 0.02, quadratic(SIX), sums(SIX, GAIN)),
    "late layers matter": (SIX, 0.02, quadratic(SIX), sums(SIX, GAIN[::-1])),
    "layers interact": (SIX, 0.02, quadratic(SIX), interacting),
    "three layers": ((64, 128, 384), 0.02, quadratic((64, 128, 384)), sums((64, 128, 384), (0.2, 0.16, 0.1))),
    "thirteen layers": (VGG, 0.03, vgg_overhead, sums(VGG, THIRTEEN)),
}

# Changes to the settings that ship.
VARIANTS = {
    "shipped": {},
    "8 rollouts": {"rollouts": 8},
    "learning rate 0.02": {"learning_rate": 0.02},
    "entropy 0.01": {"entropy": 0.01},
    "baseline 0.5": {"baseline": 0.5},
    "actions that fit alike at the start": {},
}
BUDGETS = (12, 24, 150)


class AlikeRoom(Room):
    """All actions that fit are alike at the start, however many sequences go on from them."""

    def log_probabilities(self, prefix):
        fitting = np.isfinite(super().log_probabilities(prefix))
        return np.where(fitting, -np.log(fitting.sum()), -np.inf)


def problem_of(name: str, noise: float, seed: int) -> tuple[Problem, Callable[[Filters], float]]:
    """A problem whose scores have normal noise, the same whenever a state is scored, and its true means."""
    widths, limit, overhead, true = PROBLEMS[name]
    normal = np.random.default_rng(seed).standard_normal(2**16)

    def score(filters: Filters) -> tuple[float, float]:
        # hash of a tuple of integers: the same in every process
        return true(filters) + noise * normal[hash(filters) % len(normal)], 0.01

    return Problem(widths, RATIOS, limit, overhead, score), true


def found(name: str, noise: float, seed: int, **changes: object) -> float:
    """The true mean of the state that a search with changed settings chooses."""
    problem, true = problem_of(name, noise, seed)
    settings = Search(**{"episodes": 100, **changes})
    return true(search(problem, settings, seed, progress=False).best().filters)


def interval(differences: np.ndarray) -> tuple[float, float, float]:
    """Mean and its 95 % interval."""
    n, mean = len(differences), float(differences.mean())
    half = float(stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / np.sqrt(n))
    return mean, mean - half, mean + half


def differences(name: str, noise: float, evaluations: int, seeds: int, **changes: object) -> np.ndarray:
    """(seeds,): REINFORCE - random search, true means of what they choose."""
    budget = {"evaluations": evaluations}
    ours = [found(name, noise, s, strategy="reinforce", **budget, **changes) for s in range(seeds)]
    random = [found(name, noise, s, strategy="random", **budget) for s in range(seeds)]
    return np.array(ours) - np.array(random)


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--variant", action="append", choices=VARIANTS)
    parser.add_argument("--problem", action="append", choices=PROBLEMS)
    parser.add_argument("--name", default="shipped")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for variant in arguments.variant or VARIANTS:
        shipped = variant == "shipped"
        for name in arguments.problem or (PROBLEMS if shipped else ["six layers"]):
            for noise in (0.002, 0.0) if shipped and name == "six layers" else (0.002,):
                for evaluations in BUDGETS:
                    searching.Room = AlikeRoom if "alike" in variant else Room
                    measured = differences(name, noise, evaluations, arguments.seeds, **VARIANTS[variant])
                    mean, low, high = (round(x, 5) for x in interval(measured))
                    label = arguments.name if shipped else variant
                    rows.append((evaluations, noise, label, name, arguments.seeds, mean, low, high))
                    columns = ["budget", "noise", "variant", "problem", "seeds", "mean_difference", "low", "high"]
                    storage.write_csv(arguments.out, pd.DataFrame(rows, columns=columns))
                    print(*rows[-1], flush=True)


if __name__ == "__main__":
    main()
