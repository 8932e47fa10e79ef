"""As many chips as a stated precision needs: the two-stage rule of Stein.

A fixed number of chips gives an interval of unknown width. A rule that looks at the interval after every chip and stops
when it is narrow enough stops too early where the spread happens to look small, and its intervals cover less than they
say. Stein's rule looks once:

1. Evaluate a pilot of n0 chips; s0 is its standard deviation.
2. Evaluate N = max(n0, ceil((t s0 / h)^2)) chips in all, with t a quantile of Student's distribution with nu degrees of
   freedom, and h the half-width that is wanted.

mean +- t s0 / sqrt(N) is then an interval of a half-width of at most h. Of normally distributed values the mean is
independent of s0, so that with nu = n0 - 1 this interval covers exactly what it says. Accuracies of chips have a longer
tail on one side, and s0 spreads more than that of normal values: Var(s0^2) / sigma^4 = k / n0 + 2 / (n0 - 1) with k the
excess kurtosis. nu = 2 / (that) makes t wider where the pilot has k > 0 (Satterthwaite's degrees of freedom), and is
n0 - 1 where it has not. docs/stopping.py measures how often intervals cover the mean.

C. Stein, "A two-sample test for a linear hypothesis whose power is independent of the variance", Annals of Mathematical
Statistics 16 (1945). F. E. Satterthwaite, "An approximate distribution of estimates of variance components", Biometrics
Bulletin 2 (1946).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from correctnet.errors import UserError

PILOT = 64
LEVEL = 0.95


def check_until(until: float | None, what: str) -> float | None:
    """Return the half-width as a float. Raises UserError unless it is None or a positive finite number."""
    if until is None:
        return None
    if isinstance(until, bool) or not isinstance(until, int | float) or not 0 < until < math.inf:
        raise UserError(f"{what}: until is the half-width of the interval, a number above 0, not {until!r}")
    return float(until)


def half_width(pilot: Sequence[float], chips: int, level: float = LEVEL) -> float:
    """Half-width of the interval of a mean over `chips` values: t s0 / sqrt(chips).

    Args:
        pilot: (n0,) values of the first chips, from which s0 and t are found; n0 >= 2.
        chips: number of all values, the pilot's included.
        level: of confidence.
    """
    from scipy import stats  # slow to import, and needed for intervals only

    values = np.asarray(pilot, np.float64)
    if np.ptp(values) == 0:
        return 0.0
    spread = values.std(ddof=1)
    kurtosis = max(0.0, float(stats.kurtosis(values, bias=False))) if len(values) > 3 else 0.0
    freedom = 2 / (kurtosis / len(values) + 2 / (len(values) - 1))
    return float(stats.t.ppf((1 + level) / 2, freedom) * spread / math.sqrt(chips))


def chips_for(pilot: Sequence[float], until: float) -> int:
    """Number of chips after which the 95 % interval of the mean is at most `until` wide to each side; >= n0.

    A single chip says nothing about the spread, and stays one.
    """
    if len(pilot) < 2:
        return len(pilot)
    square = (half_width(pilot, 1) / until) ** 2
    return max(len(pilot), math.ceil(min(square, 2.0**53) * (1 - 1e-12)))  # not one more for the square's rounding
