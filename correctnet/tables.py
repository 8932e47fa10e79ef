"""Table I of the paper from per-sample results, beside the paper's numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from correctnet.errors import UserError
from correctnet.results import COLUMNS, Result

# What the paper states (Section IV), as fractions, by (network, data set): clean accuracy, and by row at sigma 0.5
# (mean, standard deviation). Table I itself is not legible in the copies at hand; these are the values of its text.
# VGG16-CIFAR100's clean accuracy is not stated: 67.01 % is "more than 95 %" of it, so it is at most 70.54 %.
PAPER_CLEAN = {("lenet5", "cifar10"): 0.8089}
PAPER_CLEAN_AT_MOST = {("vgg16", "cifar100"): 0.7054}
PAPER = {
    ("vgg16", "cifar100"): {
        "unprotected": (0.0169, None),
        "correctnet": (0.6701, 0.0087),
        "all-candidates": (0.6714, 0.0083),
    },
    ("lenet5", "cifar10"): {"correctnet": (0.749, None)},
}
PAPER_SIGMA = 0.5

KEYS = ["pair", "row", "network", "dataset", "split", "sigma", "centre", "overhead", "layers", "epochs"]


def paper_mean(samples: pd.DataFrame, row: str) -> float | None:
    """The paper's mean of a row at PAPER_SIGMA, for the network and data set of a pair's samples; None: not stated."""
    key = (samples["network"].iloc[0], samples["dataset"].iloc[0])
    return PAPER.get(key, {}).get(row, (None,))[0]


def best_state(means: Sequence[float], overheads: Sequence[float]) -> int:
    """The position of the state that a search chooses: the best mean accuracy, of equals the least overhead.

    Of states that are equal in both, the first.
    """
    return max(range(len(means)), key=lambda i: (means[i], -overheads[i]))


def read_samples(files: Iterable[Path]) -> pd.DataFrame:
    """Per-sample results of several files as one table.

    Raises UserError for a file that is not one, and for a chip of a row that comes twice.
    """
    tables = []
    for path in files:
        table = Result.from_csv(path).table
        missing = [c for c in [*KEYS, *COLUMNS] if c not in table.columns]
        if missing:
            raise UserError(f"{path}: no column {missing[0]!r}; evaluate with --note {missing[0]}=...")
        tables.append(table)
    samples = pd.concat(tables, ignore_index=True)
    twice = samples.duplicated(["pair", "row", "sigma", "seed", "sample"])
    if twice.any():
        first = samples[twice].iloc[0]
        raise UserError(
            f"chip {first['sample']} of row {first['row']} of {first['pair']} at sigma {first['sigma']:g} comes twice"
        )
    return samples


def table1(samples: pd.DataFrame, sigma: float, labels: Mapping[str, str] | None = None) -> pd.DataFrame:
    """One row a (pair, row): accuracies at `sigma` against the clean accuracy of the pair's unprotected network.

    Columns: pair, row, label, centre, clean (of the row's own network), mean, std, ci_low, ci_high (95 % t interval),
    ratio (mean / clean accuracy of the row `unprotected`, or else of the pair's first row, on all images that that one
    has; those of a row with fewer are its first), overhead, layers, chips, images, epochs, seed, paper (its mean
    at sigma 0.5, where it is known), difference. `labels` names the rows for people.

    Raises:
        UserError: a row lacks its clean accuracy, or rows of a pair differ in split, seed or first chip and must not
            stand in one table. They may differ in how many chips and images they have: each says it, and a smaller
            number of chips is the first of the larger one.
    """
    rows = []
    for pair, of_pair in samples.groupby("pair", sort=False):
        varied = of_pair[of_pair["sigma"] == sigma]
        if varied.empty:
            raise UserError(f"table: pair {pair} has no results at sigma {sigma}")
        shape = varied.groupby("row", sort=False).apply(_shape, include_groups=False)
        if shape.nunique() != 1:
            listed = "; ".join(f"{row}: {text}" for row, text in shape.items())
            raise UserError(f"table: rows of {pair} are not comparable ({listed})")
        clean = of_pair[of_pair["sigma"] == 0].groupby("row")["accuracy"].first()
        names = list(varied["row"].unique())
        if missing := [row for row in names if row not in clean.index]:
            raise UserError(f"table: row {missing[0]} of {pair} has no results at sigma 0")
        reference = "unprotected" if "unprotected" in names else names[0]  # files may come in any order
        for row, of_row in varied.groupby("row", sort=False):
            result, first = Result(of_row), of_row.iloc[0]
            interval = result.interval()
            paper = paper_mean(of_row, row) if sigma == PAPER_SIGMA else None
            rows.append(
                {
                    "pair": pair,
                    "row": row,
                    "label": (labels or {}).get(row, row),
                    "centre": first["centre"],
                    "clean": clean[row],
                    "mean": result.mean,
                    "std": result.std,
                    "ci_low": interval.low,
                    "ci_high": interval.high,
                    "ratio": result.mean / clean[reference],
                    "overhead": first["overhead"],
                    "layers": int(first["layers"]),
                    "chips": result.chips,
                    "images": result.images,
                    "epochs": first["epochs"],
                    "seed": first["seed"],
                    "paper": paper,
                    "difference": None if paper is None else result.mean - paper,
                }
            )
    return pd.DataFrame(rows)


def _shape(rows: pd.DataFrame) -> str:
    seeds = "/".join(str(n) for n in sorted(rows["seed"].unique()))
    return f"chips from {rows['sample'].min()} on, {rows['split'].iloc[0]} images, seed {seeds}"


def markdown(table: pd.DataFrame, sigma: float) -> str:
    """The table for people, percentages with the confidence interval and the paper's number."""
    lines = [
        f"Accuracies in %; sigma = {sigma:g}; mean ± standard deviation over chips, [95 % confidence interval of the "
        "mean]; ratio: mean / clean accuracy of the unprotected network on all images that it has.",
        "",
        "| pair | row | clean | mean ± std | 95 % CI | ratio | overhead | layers | chips × images | epochs | seed "
        "| paper | difference |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---|---:|---:|---:|",
    ]
    for r in table.to_dict("records"):
        paper = "" if pd.isna(r["paper"]) else f"{r['paper']:.2%}"
        difference = "" if pd.isna(r["difference"]) else f"{100 * r['difference']:+.2f}"
        lines.append(
            f"| {r['pair']} | {r['label']} | {r['clean']:.2%} | {r['mean']:.2%} ± {100 * r['std']:.2f} "
            f"| [{100 * r['ci_low']:.2f}, {100 * r['ci_high']:.2f}] | {r['ratio']:.2%} | {r['overhead']:.2%} "
            f"| {r['layers']} | {r['chips']} × {r['images']} | {r['epochs']} | {r['seed']} | {paper} | {difference} |"
        )
    return "\n".join(lines) + "\n"
