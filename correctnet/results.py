"""What a Monte Carlo run gave: accuracies of many chips, with their statistics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from correctnet import storage
from correctnet.errors import UserError, one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = ["sample", "correct", "images", "accuracy", "seed"]
# What a chip's accuracy belongs to: digests of the images and of the network, and the device model.
IDENTITY = ["data", "device", "model"]


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.estimate:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True, eq=False)
class Result:
    """What a Monte Carlo run gave: a table with one row a chip, `sample, correct, images, accuracy, seed`."""

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
        """Images that each chip saw."""
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
        """Student's t interval of the mean: mean +- t std / sqrt(chips). A point for one chip."""
        return _mean_interval(self.accuracies, level)

    def percentile(self, q: float) -> float:
        """The q-th percentile of the chips' accuracies, q in [0, 100]."""
        return float(np.percentile(self.accuracies, q))

    def yield_at(self, threshold: float, level: float = 0.95) -> Interval:
        """The fraction of chips whose accuracy is at or above `threshold`, with Wilson's binomial interval."""
        from scipy import stats  # slow to import, and wanted for intervals only

        good = int((self.accuracies >= threshold).sum())
        interval = stats.binomtest(good, self.chips).proportion_ci(level, method="wilson")
        return Interval(good / self.chips, float(interval.low), float(interval.high))

    def minus(self, other: Result, level: float = 0.95) -> Interval:
        """Mean difference of accuracy to `other` on the *same* chips, with the paired t interval.

        Raises UserError where the two did not see the same chips and as many images.
        """
        keys = ["seed", "sample", "images"]
        if self.chips != other.chips or not (self.table[keys].to_numpy() == other.table[keys].to_numpy()).all():
            raise UserError("a paired comparison needs two results on the same chips and images")
        return _mean_interval(self.accuracies - other.accuracies, level)

    def to_csv(self, path: str | Path) -> None:
        """Write the table, atomically."""
        storage.write_csv(path, self.table)

    @classmethod
    def from_csv(cls, path: str | Path) -> Result:
        """Read what `to_csv` wrote. Raises UserError where it is absent or not such a table."""
        try:
            table = storage.read_csv(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({one_line(error)})") from error
        if not set(COLUMNS) <= set(table.columns) or table.empty:
            raise UserError(f"{path}: not a Monte Carlo result (columns {', '.join(COLUMNS)} are expected)")
        return cls(table)

    @classmethod
    def concatenate(cls, results: Iterable[Result]) -> Result:
        """Results of several chunks as one, ordered by sample.

        Raises UserError for a chip that comes twice, and for chunks that are not of one evaluation.
        """
        table = pd.concat([r.table for r in results], ignore_index=True).sort_values("sample", ignore_index=True)
        if table.duplicated(["seed", "sample"]).any():
            raise UserError("chunks of a Monte Carlo run overlap: a chip comes twice")
        if table["images"].nunique() != 1:
            raise UserError("chunks of a Monte Carlo run saw different numbers of images")
        for column in table.columns.difference(COLUMNS):
            if table[column].nunique(dropna=False) != 1:
                raise UserError(f"chunks of a Monte Carlo run differ in {column}")
        return cls(table)

    def plot(self, ax: Axes | None = None, label: str | None = None) -> Axes:
        """Histogram of the chips' accuracies with the mean and its interval; returns the matplotlib axes."""
        from correctnet.figures import chip_histogram

        return chip_histogram(self, ax, label)

    def __str__(self) -> str:
        ci = self.interval()
        return (
            f"accuracy {self.mean:.2%} +- {self.std:.2%} (mean +- standard deviation; 95 % CI {ci.low:.2%} to "
            f"{ci.high:.2%}) over {self.chips} chips x {self.images} images"
        )


def _mean_interval(values: np.ndarray, level: float) -> Interval:
    mean = float(values.mean())
    if len(values) == 1:
        return Interval(mean, mean, mean)
    from scipy import stats

    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values))
    return Interval(mean, mean - half, mean + half)


def record(result: Result, columns: Mapping[str, Any]) -> Result:
    """`result` with further columns of constant value (pair, row, sigma, ...), put first."""
    table = result.table.copy()
    for i, (name, value) in enumerate(columns.items()):
        table.insert(i, name, value)
    return Result(table)
