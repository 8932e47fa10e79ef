"""What programming a device to a target leaves: mean and deviation of its state, a conductance or a read current.

States are numbers in the unit of the measurement, `Programming.unit`. Weights see only their ratio to the range that
they are mapped to (`correctnet.devices.device.Mapping`).
"""

from __future__ import annotations

import bisect
import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from correctnet.errors import UserError

UNITS = {"S": "S", "mS": "mS", "uS": "uS", "µS": "uS", "nS": "nS", "mA": "mA", "uA": "uA", "µA": "uA", "nA": "nA"} | {
    "relative": "relative"
}
"""units of states, by their spellings: conductances, read currents at a fixed voltage, and numbers without a unit"""

SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
"""units of times"""


def seconds(time: float | str) -> float:
    """Return a time in seconds: a number is one, a text has a unit, as in "90 s", "10min", "1h" or "2d".

    Raises:
        UserError: no number, a negative one, or another unit.
    """
    if isinstance(time, str):
        found = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(s|min|h|d)\s*", time)
        try:
            time = float(found[1]) * SECONDS[found[2]] if found else math.nan
        except ValueError:
            time = math.nan
        if math.isnan(time):
            raise UserError("a time is a number with one of the units s, min, h, d, as in 1d")
    if isinstance(time, bool) or not isinstance(time, int | float) or not (math.isfinite(time) and time >= 0):
        raise UserError(f"a time must be a finite number of seconds >= 0, not {time!r}")
    return float(time)


def time_text(time_seconds: float) -> str:
    """Return a time as `seconds` reads it, in the largest unit of which it is a whole number."""
    for unit, length in reversed(SECONDS.items()):
        if time_seconds >= length and time_seconds % length == 0:
            return f"{time_seconds / length:g}{unit}"
    return f"{time_seconds:g}s"


def normal_cdf(x: Tensor) -> Tensor:
    """Return the standard normal distribution function."""
    return torch.special.ndtr(x)


def rectified(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of max(x, 0), x ~ N(mean, std^2).

        E = m Phi(a) + s phi(a),    E[x^2] = (m^2 + s^2) Phi(a) + m s phi(a),    a = m / s

    Differentiable; std may be 0.
    """
    exact = std <= 0
    s = torch.where(exact, torch.ones_like(std), std)
    a = mean / s
    probability, density = normal_cdf(a), torch.exp(-a.square() / 2) / math.sqrt(2 * math.pi)
    first = mean * probability + s * density
    second = (mean.square() + s.square()) * probability + mean * s * density
    variance = (second - first.square()).clamp(min=0)
    return torch.where(exact, mean.clamp(min=0), first), torch.where(exact, torch.zeros_like(mean), variance)


@dataclass(frozen=True)
class Programming(ABC):
    """What programming to a target leaves: a state that is Gaussian around a mean, and never negative.

    Attributes:
        unit: of all states, one of `UNITS`.
        low, high: the range of targets in which this was measured, 0 <= low < high.
        time_seconds: time after programming; None: right after it.

    Raises:
        UserError: an attribute is outside its range.
    """

    unit: str
    low: float
    high: float
    time_seconds: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "unit", unit_named(self.unit))
        if not (math.isfinite(self.low) and math.isfinite(self.high) and 0 <= self.low < self.high):
            raise UserError(f"a range of states must be 0 <= low < high, not {self.low!r} to {self.high!r}")
        if self.time_seconds is not None:
            object.__setattr__(self, "time_seconds", seconds(self.time_seconds))

    @abstractmethod
    def gaussian(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the state by its target, before it is kept from being negative.

        Args:
            target: between `low` and `high`, float64.
        """

    def moments(self, target: Tensor, noise: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return mean and variance of the state by its target, with `noise` times the measured deviations."""
        mean, std = self.gaussian(target)
        return rectified(mean, std * noise)

    def after(self, time_seconds: float) -> Programming:
        """Return the same device at another time after programming. Raises UserError where that was not measured."""
        raise UserError("the device was measured at one time; it has no others")

    @property
    def levels(self) -> tuple[float, ...]:
        """The targets that can be programmed; empty: all of them."""
        return ()

    def describe(self) -> dict[str, Any]:
        """Return what identifies the measurement, for results files."""
        return {"time_seconds": self.time_seconds}


def unit_named(unit: str) -> str:
    """Return a unit of `UNITS` in its canonical spelling. Raises UserError for any other."""
    if unit not in UNITS:
        raise UserError(f"unit: there is no {unit!r}; the units are {', '.join(dict.fromkeys(UNITS.values()))}")
    return UNITS[unit]


def polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """Return the sum of coefficients[i] x^i by Horner's rule."""
    result = torch.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        result = result * x + coefficient
    return result


@dataclass(frozen=True)
class Polynomial(Programming):
    """Mean: the target. Standard deviation: max(0, sum of c_i (g / reference)^i).

    Attributes:
        coefficients: c_0, c_1, ..., in `unit`.
        reference: what targets are divided by; 1: the polynomial is one in the state itself.
    """

    coefficients: tuple[float, ...] = (0.0,)
    reference: float = 1.0

    def gaussian(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """See `Programming.gaussian`."""
        return target, polynomial(self.coefficients, target / self.reference).clamp(min=0)

    def describe(self) -> dict[str, Any]:
        """See `Programming.describe`."""
        return {**super().describe(), "coefficients": self.coefficients, "reference": self.reference}


@dataclass(frozen=True)
class Table(Programming):
    """Mean and standard deviation at some targets, linear between them.

    Attributes:
        targets: ascending, at least one; the first and the last are `low` and `high`.
        means, stds: by target. The standard deviations are >= 0.
        discrete: whether nothing but these targets can be programmed.

    Raises:
        UserError: numbers that are not finite, out of order, twice, or negative.
    """

    targets: tuple[float, ...] = ()
    means: tuple[float, ...] = ()
    stds: tuple[float, ...] = ()
    discrete: bool = False

    @classmethod
    def of(
        cls, unit: str, targets: list[float], means: list[float], stds: list[float], discrete: bool = False
    ) -> Table:
        """Make a table whose range is that of its targets."""
        if len(targets) < 2:
            raise UserError(f"a device needs at least two levels, not {len(targets)}")
        low, high = float(targets[0]), float(targets[-1])
        numbers = (tuple(map(float, column)) for column in (targets, means, stds))
        return cls(unit, low, high, None, *numbers, discrete)

    def __post_init__(self) -> None:
        columns = {"targets": self.targets, "means": self.means, "standard deviations": self.stds}
        for name, column in columns.items():
            if len(column) != len(self.targets):
                raise UserError(f"{len(self.targets)} targets, but {len(column)} {name}")
            for number in column:
                if not math.isfinite(number):
                    raise UserError(f"{name}: {number!r} is not finite")
        for number in self.stds:
            if number < 0:
                raise UserError(f"standard deviations: {number:g} is negative")
        for before, after in zip(self.targets, self.targets[1:], strict=False):
            if before >= after:
                what = "is there twice" if before == after else f"comes after {before:g}"
                raise UserError(f"targets must ascend: {after:g} {what}")
        super().__post_init__()

    def gaussian(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """See `Programming.gaussian`."""
        return tuple(interpolated(target, self.targets, values) for values in (self.means, self.stds))

    @property
    def levels(self) -> tuple[float, ...]:
        """See `Programming.levels`."""
        return self.targets if self.discrete else ()

    def describe(self) -> dict[str, Any]:
        """See `Programming.describe`."""
        return {**super().describe(), "targets": self.targets, "means": self.means, "stds": self.stds}


def interpolated(x: Tensor, knots: tuple[float, ...], values: tuple[float, ...]) -> Tensor:
    """Interpolate linearly between the knots, and continue as constants beyond them; differentiable in x."""
    at, to = (torch.tensor(numbers, dtype=x.dtype, device=x.device) for numbers in (knots, values))
    i = torch.searchsorted(at, x.detach().contiguous(), right=True).clamp(1, len(knots) - 1)
    part = ((x - at[i - 1]) / (at[i] - at[i - 1])).clamp(0, 1)
    return to[i - 1] + part * (to[i] - to[i - 1])


@dataclass(frozen=True)
class Snapshots(Programming):
    """One polynomial of the standard deviation for each of some times, which includes that of programming.

    Attributes:
        reference: what targets are divided by.
        by_time: (seconds, coefficients), as in `Polynomial`; the first one is that right after programming.
    """

    reference: float = 1.0
    by_time: tuple[tuple[float, tuple[float, ...]], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.time_seconds is None:
            object.__setattr__(self, "time_seconds", self.by_time[0][0])
        self._coefficients  # noqa: B018 (it refuses other times)

    @property
    def _coefficients(self) -> tuple[float, ...]:
        for time, coefficients in self.by_time:
            if time == self.time_seconds:
                return coefficients
        times = ", ".join(time_text(time) for time, _ in self.by_time)
        raise UserError(f"the device was measured after {times}, not after {time_text(self.time_seconds or 0)}")

    def gaussian(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """See `Programming.gaussian`."""
        return target, polynomial(self._coefficients, target / self.reference).clamp(min=0)

    def after(self, time_seconds: float) -> Programming:
        """See `Programming.after`."""
        return replace(self, time_seconds=time_seconds)

    def describe(self) -> dict[str, Any]:
        """See `Programming.describe`."""
        return {**super().describe(), "coefficients": self._coefficients, "reference": self.reference}


def between(times: tuple[float, ...], time: float) -> tuple[int, float]:
    """Return (i, part): `time` is `part` of the way from times[i] to times[i + 1]."""
    i = min(max(bisect.bisect_right(times, time) - 1, 0), len(times) - 2)
    return i, (time - times[i]) / (times[i + 1] - times[i])
