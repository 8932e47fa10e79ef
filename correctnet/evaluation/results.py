"""Per-chip accuracies of a Monte Carlo run, or values of another metric, with statistics."""

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
from correctnet.evaluation.stopping import half_width
from correctnet.files import csvfile, storage
from correctnet.metrics import ACCURACY, Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = ["sample", "correct", "images", "accuracy", "seed"]
VALUES = ["sample", "value", "images", "metric", "seed"]
"""those of another metric than the accuracy"""
IDENTITY = ["data", "device", "model"]
"""columns that say what was evaluated, where it is known: digest of images and labels, device model, digest of the
network"""
PILOT_COLUMN = "pilot"
"""column of evaluations that stopped early: the number of chips from which their number was found"""
PER_CHIP = ["sample", "correct", "accuracy", "value", "adapt_seconds"]
"""columns that may differ from chip to chip of an evaluation"""
NO_INTERVAL = "1 chip, no interval"
# Columns in which two results must agree, apart from chips and images, to be compared chip by chip: the device, by
# whichever columns describe it, and the images.
PAIRED = ["data", "device", "dataset", "split", "variation", "on", "sigma", "centre", "resample"]
PAIRED += ["level", "time", "measurement", "stuck_off", "stuck_on"]


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

    With another metric the columns are `sample, value, images, metric, seed`. Further columns (`IDENTITY`, and those
    that `record` adds) say what was evaluated; they are the same on every chip.
    """

    table: pd.DataFrame
    metric: Metric = ACCURACY
    """what the chips are judged by"""

    @property
    def values(self) -> np.ndarray:
        """(chips,) float64, the metric's value on each chip: of the accuracy, the fraction of correct images."""
        return self.table["accuracy" if self.metric.is_accuracy else "value"].to_numpy(np.float64)

    @property
    def accuracies(self) -> np.ndarray:
        """(chips,) float64, fraction of images classified correctly. Raises UserError for another metric."""
        if not self.metric.is_accuracy:
            raise UserError(f"the result holds no accuracies, but the {self.metric.name}; read its values")
        return self.values

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
        """Mean accuracy, or value of the metric, over the chips."""
        return float(self.values.mean())

    @property
    def std(self) -> float:
        """Sample standard deviation (n - 1) over the chips; 0 for one chip."""
        return float(self.values.std(ddof=1)) if self.chips > 1 else 0.0

    def interval(self, level: float = 0.95) -> Interval:
        """Student's t interval of the mean: mean +- t std / sqrt(chips); NaN bounds for one chip.

        Of an evaluation with `until`, t and std are found from the first chips alone, see
        `correctnet.evaluation.stopping`.

        Raises UserError unless `level` is a fraction between 0 and 1.
        """
        return _mean_interval(self.values, level, self._pilot)

    @property
    def _pilot(self) -> int | None:
        """Number of the first chips from which the number of chips was found; None: it was given."""
        found = self.table.get(PILOT_COLUMN)  # its cells are empty in tables that hold evaluations of both kinds
        return None if found is None or found.isna().any() else int(found.iloc[0])

    def percentile(self, q: float) -> float:
        """The q-th percentile of the chips' values. Raises UserError unless 0 <= q <= 100."""
        if not 0 <= q <= 100:
            raise UserError(f"percentile: q is a number between 0 and 100 (5 for the 5th percentile), not {q}")
        return float(np.percentile(self.values, q))

    def yield_at(self, threshold: float, level: float = 0.95) -> Interval:
        """The fraction of chips whose accuracy is at or above `threshold`, with Wilson's binomial interval.

        With a metric of which smaller values are better, those at or below it. Raises UserError unless `threshold`, of
        a metric that is a fraction, and `level` are fractions between 0 and 1.
        """
        from scipy import stats  # slow to import, and needed for intervals only

        if self.metric.fraction and not 0 <= threshold <= 1:
            raise UserError(f"yield_at: a fraction between 0 and 1 is expected (0.9, not 90); threshold is {threshold}")
        _check_level(level)
        if not math.isfinite(threshold):
            raise UserError(f"yield_at: threshold is a finite number, not {threshold}")
        good = int(self.metric.as_good(self.values, threshold).sum())
        interval = stats.binomtest(good, self.chips).proportion_ci(level, method="wilson")
        return Interval(good / self.chips, float(interval.low), float(interval.high))

    def minus(self, other: Result, level: float = 0.95) -> Interval:
        """Mean difference of accuracy, or of the metric, to `other` on the *same* chips, with the paired t interval.

        Raises UserError for results on different chips, images or devices, or of different metrics, and names the
        difference. Images and devices are compared where both results describe them (`data`, `device`, `sigma`, ...).
        """
        what = "a paired comparison needs two results on the same chips and images"
        if self.metric.describe() != other.metric.describe():
            raise UserError(f"{what}, of one metric: {self.metric} against {other.metric}")
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
        pilot = next((found for found in (self._pilot, other._pilot) if found is not None), None)
        return _mean_interval(self.values - other.values, level, pilot)

    def to_csv(self, path: str | Path) -> None:
        """Write the table, atomically."""
        storage.write_csv(path, self.table)

    @classmethod
    def from_csv(cls, path: str | Path, metric: Metric = ACCURACY) -> Result:
        """Read a file of `to_csv`: the chips of one evaluation, of the metric that it was evaluated with.

        Raises UserError for a file that is missing, truncated, edited or another table, naming line and column, and for
        one of another metric.
        """
        table = read_chips(path)
        found = ACCURACY.name if "accuracy" in table else table["metric"].iloc[0]
        if found != metric.name:
            raise UserError(f"{path}: holds values of the {found}, not of the {metric.name}; give the metric")
        return cls(table, metric)

    @classmethod
    def concatenate(cls, results: Iterable[Result]) -> Result:
        """Results of several chunks as one, ordered by sample.

        Raises UserError for a chip that occurs twice, and for chunks of different evaluations.
        """
        results = list(results)
        if len(results) > 1 and any(PILOT_COLUMN in r.table for r in results):
            raise UserError("chunks of a Monte Carlo run that stopped early cannot be put together")
        metrics = {str(r.metric.describe()): r.metric for r in results}
        if len(metrics) > 1:
            raise UserError(f"chunks of a Monte Carlo run differ in metric ({', '.join(map(str, metrics.values()))})")
        table = pd.concat([r.table for r in results], ignore_index=True).sort_values("sample", ignore_index=True)
        if table.duplicated(["seed", "sample"]).any():
            raise UserError("chunks of a Monte Carlo run overlap: a chip occurs twice")
        if table["images"].nunique() != 1:
            raise UserError("chunks of a Monte Carlo run saw different numbers of images")
        for column in ["seed", *table.columns.difference([*COLUMNS, *VALUES, *PER_CHIP])]:
            if table[column].nunique(dropna=False) != 1:
                found = ", ".join("none" if pd.isna(value) else str(value) for value in table[column].unique())
                raise UserError(f"chunks of a Monte Carlo run differ in {column} ({found})")
        return cls(table, *metrics.values())

    def plot(self, ax: Axes | None = None, label: str | None = None) -> Axes:
        """Histogram of the chips' accuracies, or values of the metric, with the mean and its 95 % confidence interval.

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
        _, _, patches = ax.hist(self.values, bins="auto", alpha=0.5, label=label)
        interval, colour = self.interval(), patches[0].get_facecolor()[:3]
        ax.axvline(self.mean, color=colour)
        if self.chips > 1:
            ax.axvspan(interval.low, interval.high, color=colour, alpha=0.3, linewidth=0)
        else:
            ax.text(0.02, 0.98, NO_INTERVAL, transform=ax.transAxes, fontsize=7, va="top")
        if self.metric.fraction:
            ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=int(np.ptp(self.values) < 0.05)))
        ax.set(xlabel=self.metric.name, ylabel="chips")
        if label:
            ax.legend()
        return ax

    def __str__(self) -> str:
        name, text = self.metric.name, self.metric.text
        if self.chips == 1:
            return f"{name} {text(self.mean)} ({NO_INTERVAL}) over 1 chip x {self.images} images"
        ci = self.interval()
        return (
            f"{name} {text(self.mean)} +- {text(self.std)} (mean +- standard deviation; 95 % CI {text(ci.low)} to "
            f"{text(ci.high)}) over {self.chips} chips x {self.images} images"
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
    if table.empty or not (set(COLUMNS) <= set(table.columns) or set(VALUES) <= set(table.columns)):
        raise UserError(f"{path}: not a Monte Carlo result (columns {', '.join(COLUMNS)} are expected)")
    if "accuracy" in table:
        check_accuracies(read)
    by = [column for column in by if column in table]
    again = table.duplicated([*by, "seed", "sample"])
    if again.any():
        row = int(again.argmax())
        read.refuse(row, "sample", f"chip {table['sample'].iloc[row]} occurs twice")
    groups = [table] if not by else [rows for _, rows in table.groupby(by, sort=False)]
    for rows in groups:
        for column in rows.columns.difference(PER_CHIP):
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


def _mean_interval(values: np.ndarray, level: float, pilot: int | None = None) -> Interval:
    _check_level(level)
    mean = float(values.mean())
    if len(values) == 1:
        return Interval(mean, math.nan, math.nan)
    if pilot is not None:
        half = half_width(values[:pilot], len(values), level)
    else:
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
    return Result(table, result.metric)
