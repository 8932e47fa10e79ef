"""How often intervals cover the mean where the number of chips was not fixed before.

    python docs/stopping.py results/reference/stopping.csv

Each population is the accuracies of all chips of a row in results/reference (250 chips, sigma 0.5), or normal; chips
are drawn from it with replacement, so that its mean is known. Two rules stop at a half-width h: Stein's, which
`correctnet.evaluate(until=h)` follows, and looking after each chip from the eighth on, with the usual t interval.
Beside them stands the usual interval of a number of chips that is fixed before, that of the known deviation. The table
has, for each population and h, the fraction of 95 % intervals that cover the mean and the mean number of chips.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from correctnet.evaluation.stopping import LEVEL, PILOT, chips_for, half_width

MOST, RUNS = 2000, 1000
FIRST = 8  # chips before the naive rule looks for the first time
WIDTHS = (0.08, 0.1, 0.14, 0.2, 0.28)  # h in standard deviations: about 600, 390, 200, 100 and 50 chips


def populations() -> dict[str, np.ndarray]:
    """Accuracies by name: of each row with 250 chips at sigma 0.5, and normal ones."""
    found = {"normal": np.random.default_rng(0).standard_normal(100_000)}
    for path in sorted(Path("results/reference").glob("*/samples.csv")):
        table = pd.read_csv(path)
        for (pair, row), chips in table[table["sigma"] == 0.5].groupby(["pair", "row"], sort=False):
            if len(chips) >= 250:
                found.setdefault(f"{pair} {row}", chips["accuracy"].to_numpy())
    return found


def naive(values: np.ndarray, h: float) -> int:
    """Number of chips at which the t interval of the chips so far is at most h wide to each side, from FIRST on."""
    n = np.arange(1, len(values) + 1)
    mean = np.cumsum(values) / n
    variance = (np.cumsum(values**2) - n * mean**2)[1:] / n[:-1]
    half = stats.t.ppf((1 + LEVEL) / 2, n[1:] - 1) * np.sqrt(np.maximum(variance, 0) / n[1:])
    narrow = np.flatnonzero(half[FIRST - 2 :] <= h)
    return int(narrow[0]) + FIRST if len(narrow) else len(values)


def usual(values: np.ndarray) -> float:
    """Half-width of the t interval of the values."""
    return float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * stats.sem(values))


def main() -> None:
    """Simulate the rules, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    rows = []
    for name, values in populations().items():
        mean, deviation = values.mean(), values.std()
        rng = np.random.default_rng(1)
        for width in WIDTHS:
            h = width * deviation
            fixed = math.ceil((stats.norm.ppf((1 + LEVEL) / 2) / width) ** 2)
            covered, chips = (
                dict.fromkeys(("stein", "naive", "fixed"), 0),
                dict.fromkeys(("stein", "naive", "fixed"), 0),
            )
            for _ in range(RUNS):
                drawn = rng.choice(values, MOST)
                n = min(MOST, chips_for(drawn[:PILOT], h))
                found = {
                    "stein": (n, half_width(drawn[:PILOT], n)),
                    **{rule: (n, usual(drawn[:n])) for rule, n in (("naive", naive(drawn, h)), ("fixed", fixed))},
                }
                for rule, (n, half) in found.items():
                    covered[rule] += abs(drawn[:n].mean() - mean) <= half
                    chips[rule] += n
            rows.append(
                {
                    "population": name,
                    "skewness": round(float(stats.skew(values)), 2),
                    "width": width,
                    **{f"covered_{rule}": covered[rule] / RUNS for rule in covered},
                    **{f"chips_{rule}": round(chips[rule] / RUNS, 1) for rule in chips},
                }
            )
    table = pd.DataFrame(rows)
    table.to_csv(args.out, index=False)
    print(table.to_string(index=False))
    covered = table.filter(like="covered_")
    print(covered.agg(["mean", "min", "max"]).round(3).to_string())


if __name__ == "__main__":
    main()
