"""Per-chip accuracies of a Monte Carlo run, with statistics."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from correctnet.errors import UserError
from correctnet.files import csvfile, storage

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = ["sample", "correct", "images", "accuracy", "seed"]
IDENTITY = ["data", "device", "model"]
"""columns that say what was evaluated, where it is known: digest of images and labels, device model, digest of the
network"""
NO_INTERVAL = "1 chip, no interval"
# Columns in which two results must agree, apart from chips and images, to be compared chip by chip: the device, by
# whichever columns describe it, and the images.
PAIRED = ["data", "device", "dataset", "split", "variation", "on", "sigma", "centre", "resample"]


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval; `low` and `high` are NaN where there is none (one chip)."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        if np.isnan(self.low):
            return f"{self.estimate:.4f} ({NO_INTERVAL})"
        return f"{self.estimate:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True, eq=False)
class Result:
    """Per-chip accuracies of a Monte Carlo run: a table with one row a chip, `sample, correct, images, accuracy, seed`.

    Further columns (`IDENTITY`, and those that `record` adds) say what was evaluated; they are the same on every chip.
    """

    table: pd.DataFrame

    @property
    def accuracies(self) -> np.ndarray:
        """(chips,) float64, fraction of images classified correctly."""
        return self.table["accuracy"].to_numpy(np.float64)

    @property
    def chips(self) -> int:
        """Number of chips."""
        return len(self.table)

    @property
    def images(self) -> int:
        """Number of images that each chip classified."""
        return int(self.table["images"].iloc[0])

    @property
    def mean(self) -> float:
        """Mean accuracy over the chips."""
        return float(self.accuracies.mean())

    @property
    def std(self) -> float:
        """Sample standard deviation (n - 1) over the chips; 0 for one chip."""
        return float(self.accuracies.std(ddof=1)) if self.chips > 1 else 0.0

    def interval(self, level: float = 0.95) -> Interval:
        """Student's t interval of the mean: mean +- t std / sqrt(chips); NaN bounds for one chip.

        Raises UserError unless `level` is a fraction between 0 and 1.
        """
        return _mean_interval(self.accuracies, level)

    def percentile(self, q: float) -> float:
        """The q-th percentile of the chips' accuracies. Raises UserError unless 0 <= q <= 100."""
        if not 0 <= q <= 100:
            raise UserError(f"percentile: q is a number between 0 and 100 (5 for the 5th percentile), not {q}")
        return float(np.percentile(self.accuracies, q))

    def yield_at(self, threshold: float, level: float = 0.95) -> Interval:
        """The fraction of chips whose accuracy is at or above `threshold`, with Wilson's binomial interval.

        Raises UserError unless `threshold` and `level` are fractions between 0 and 1.
        """
        from scipy import stats  # slow to import, and needed for intervals only

        if not 0 <= threshold <= 1:
            raise UserError(f"yield_at: a fraction between 0 and 1 is expected (0.9, not 90); threshold is {threshold}")
        _check_level(level)
        good = int((self.accuracies >= threshold).sum())
        interval = stats.binomtest(good, self.chips).proportion_ci(level, method="wilson")
        return Interval(good / self.chips, float(interval.low), float(interval.high))

    def minus(self, other: Result, level: float = 0.95) -> Interval:
        """Mean difference of accuracy to `other` on the *same* chips, with the paired t interval.

        Raises UserError for results on different chips, images or devices, and names the difference. Images and
        devices are compared where both results describe them (`data`, `device`, `sigma`, ...).
        """
        what = "a paired comparison needs two results on the same chips and images"
        mine, others = (
            list(zip(*(r.table[k].tolist() for k in ("seed", "sample")), strict=True)) for r in (self, other)
        )
        if mine != others:
            raise UserError(f"{what}: {_chips(self)} against {_chips(other)}")
        if self.table["images"].tolist() != other.table["images"].tolist():
            raise UserError(f"{what}: {self.images} images against {other.images}")
        for column in PAIRED:
            if column in self.table and column in other.table:
                here, there = (_known(r.table[column]) for r in (self, other))
                if here and there and here != there:
                    raise UserError(f"{what}: {column} is {', '.join(here)} here and {', '.join(there)} there")
        return _mean_interval(self.accuracies - other.accuracies, level)

    def to_csv(self, path: str | Path) -> None:
        """Write the table, atomically."""
        storage.write_csv(path, self.table)

    @classmethod
    def from_csv(cls, path: str | Path) -> Result:
        """Read a file of `to_csv`: the chips of one evaluation.

        Raises UserError for a file that is missing, truncated, edited or another table; it names line and column.
        """
        return cls(read_chips(path))

    @classmethod
    def concatenate(cls, results: Iterable[Result]) -> Result:
        """Results of several chunks as one, ordered by sample.

        Raises UserError for a chip that occurs twice, and for chunks of different evaluations.
        """
        table = pd.concat([r.table for r in results], ignore_index=True).sort_values("sample", ignore_index=True)
        if table.duplicated(["seed", "sample"]).any():
            raise UserError("chunks of a Monte Carlo run overlap: a chip occurs twice")
        if table["images"].nunique() != 1:
            raise UserError("chunks of a Monte Carlo run saw different numbers of images")
        for column in ["seed", *table.columns.difference(COLUMNS)]:
            if table[column].nunique(dropna=False) != 1:
                found = ", ".join("none" if pd.isna(value) else str(value) for value in table[column].unique())
                raise UserError(f"chunks of a Monte Carlo run differ in {column} ({found})")
        return cls(table)

    def plot(self, ax: Axes | None = None, label: str | None = None) -> Axes:
        """Histogram of the chips' accuracies, with the mean and its 95 % confidence interval.

        Args:
            ax: matplotlib axes to draw on; None: those of a new figure.
            label: entry in the legend; None: no legend.

        Returns:
            The axes.
        """
        import matplotlib.pyplot as plt  # slow to import, and needed for plots only
        from matplotlib.ticker import PercentFormatter

        if ax is None:
            _, ax = plt.subplots()
        _, _, patches = ax.hist(self.accuracies, bins="auto", alpha=0.5, label=label)
        interval, colour = self.interval(), patches[0].get_facecolor()[:3]
        ax.axvline(self.mean, color=colour)
        if self.chips > 1:
            ax.axvspan(interval.low, interval.high, color=colour, alpha=0.3, linewidth=0)
        else:
            ax.text(0.02, 0.98, NO_INTERVAL, transform=ax.transAxes, fontsize=7, va="top")
        ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=int(np.ptp(self.accuracies) < 0.05)))
        ax.set(xlabel="accuracy", ylabel="chips")
        if label:
            ax.legend()
        return ax

    def __str__(self) -> str:
        if self.chips == 1:
            return f"accuracy {self.mean:.2%} ({NO_INTERVAL}) over 1 chip x {self.images} images"
        ci = self.interval()
        return (
            f"accuracy {self.mean:.2%} +- {self.std:.2%} (mean +- standard deviation; 95 % CI {ci.low:.2%} to "
            f"{ci.high:.2%}) over {self.chips} chips x {self.images} images"
        )


def missing_chip(samples: pd.Series) -> int | None:
    """The first chip missing between the smallest and the largest number; None: there is no gap."""
    ordered = sorted(set(samples.tolist()))
    return next((a + 1 for a, b in itertools.pairwise(ordered) if b != a + 1), None)


def read_chips(path: str | Path, by: Sequence[str] = ()) -> pd.DataFrame:
    """A CSV file with a row a chip, each cell csvfile.

    Args:
        path: the file.
        by: columns that distinguish the evaluations of the file (pair, row, sigma); (): it holds one.

    Raises:
        UserError: what `correctnet.files.csvfile.read` refuses, an accuracy that is not correct / images, a chip that
            occurs twice, or a column whose value changes within an evaluation. It names file, line and column.
    """
    read = csvfile.read(path, known=csvfile.EVALUATION)
    table = read.table
    if not set(COLUMNS) <= set(table.columns) or table.empty:
        raise UserError(f"{path}: not a Monte Carlo result (columns {', '.join(COLUMNS)} are expected)")
    check_accuracies(read)
    by = [column for column in by if column in table]
    again = table.duplicated([*by, "seed", "sample"])
    if again.any():
        row = int(again.argmax())
        read.refuse(row, "sample", f"chip {table['sample'].iloc[row]} occurs twice")
    groups = [table] if not by else [rows for _, rows in table.groupby(by, sort=False)]
    for rows in groups:
        for column in rows.columns.difference(["sample", "correct", "accuracy"]):
            first = rows[column].iloc[0]
            other = rows[column].ne(first) & ~(rows[column].isna() & pd.isna(first))
            if other.any():
                row = rows.index[int(other.argmax())]
                what = f"{table[column][row]} where the lines before have {first}; one evaluation is expected"
                read.refuse(row, column, what)
    return table


def check_accuracies(read: csvfile.Checked) -> None:
    """Raise a UserError, with the line, where correct > images or accuracy is not correct / images."""
    table = read.table
    for row, (correct, images, accuracy) in enumerate(
        zip(*(table[c].tolist() for c in ("correct", "images", "accuracy")), strict=True)
    ):
        if correct > images:
            read.refuse(row, "correct", f"{correct} of {images} images")
        if abs(accuracy - correct / images) > 1e-12:
            read.refuse(row, "accuracy", f"{accuracy} where correct / images is {correct} / {images}")


def _chips(result: Result) -> str:
    table = result.table
    seeds = "/".join(map(str, sorted(set(table["seed"].tolist()))))
    return f"{result.chips} chips, {table['sample'].min()} to {table['sample'].max()}, of seed {seeds}"


def _known(values: pd.Series) -> list[str]:
    """The distinct values of a column, without empty ones."""
    return sorted({str(value) for value in values.tolist() if not pd.isna(value) and value != ""})


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise UserError(f"level: a fraction between 0 and 1 is expected (0.95, not 95); it is {level}")


def _mean_interval(values: np.ndarray, level: float) -> Interval:
    _check_level(level)
    mean = float(values.mean())
    if len(values) == 1:
        return Interval(mean, math.nan, math.nan)
    from scipy import stats

    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values))
    return Interval(mean, mean - half, mean + half)


def record(result: Result, columns: Mapping[str, Any]) -> Result:
    """`result` with further columns of constant value (pair, row, sigma, ...) in front.

    Raises UserError if the result already has a column of that name.
    """
    table = result.table.copy()
    if taken := [name for name in columns if name in table]:
        raise UserError(f"the result has a column {taken[0]!r} already")
    for i, (name, value) in enumerate(columns.items()):
        table.insert(i, name, value)
    return Result(table)
