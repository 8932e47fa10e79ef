"""Two networks on the same chips: the paired difference, with as many chips as its precision needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from correctnet.datasets.batches import Batches
from correctnet.errors import UserError
from correctnet.evaluation.montecarlo import evaluate
from correctnet.evaluation.results import PILOT_COLUMN, Interval, Result
from correctnet.evaluation.stopping import PILOT, check_until, chips_for


@dataclass(frozen=True, eq=False)
class Comparison:
    """Results of two networks on the same chips."""

    first: Result
    second: Result

    @property
    def difference(self) -> Interval:
        """Mean difference first - second, with its 95 % interval (`Result.minus`)."""
        return self.first.minus(self.second)

    def __str__(self) -> str:
        return f"first: {self.first}\nsecond: {self.second}\nfirst - second: {self.difference}"


def compare(
    first: nn.Module, second: nn.Module, data: Batches, chips: int = 250, *, until: float | None = None, **options: Any
) -> Comparison:
    """Evaluate two networks on the same chips and images.

    Chips that differ by several points differ much less in what the second network loses on each of them: the paired
    difference needs fewer chips than either mean.

    Args:
        first: from `correctnet.convert`.
        second: likewise, with the same seed and device.
        data: as for `correctnet.evaluate`.
        chips: number of chip samples, >= 1; with `until`, the largest number.
        until: as many chips as are needed for a 95 % interval of the mean difference of at most this half-width: 64,
            and as many more as the standard deviation of their differences asks for
            (`correctnet.evaluation.stopping`). None: `chips`.
        options: of `correctnet.evaluate`, apart from `save`.

    Returns:
        A `Comparison`: `first`, `second`, `difference`.

    Raises:
        UserError: what `correctnet.evaluate` refuses, and networks with other chips.
    """
    until = check_until(until, "compare")
    if "save" in options:
        raise UserError("compare: save is of one evaluation; evaluate each network with a file of its own")

    def both(start: int, chips: int) -> tuple[Result, Result]:
        first_chip = start + options.get("start", 0)
        return tuple(evaluate(each, data, chips, **{**options, "start": first_chip}) for each in (first, second))

    if until is None or chips <= PILOT:
        found = Comparison(*both(0, chips))
        found.first.minus(found.second)  # networks with other chips are refused
        return found
    pilot = both(0, PILOT)
    pilot[0].minus(pilot[1])
    more = min(chips, chips_for(pilot[0].values - pilot[1].values, until)) - PILOT
    parts = [pilot, *([both(PILOT, more)] if more else [])]
    together = (Result.concatenate(part[i] for part in parts) for i in range(2))
    return Comparison(*(_stopped(result) for result in together))


def _stopped(result: Result) -> Result:
    """`result` as one whose number of chips was found from the first ones."""
    return Result(result.table.assign(**{PILOT_COLUMN: PILOT}), result.metric)
