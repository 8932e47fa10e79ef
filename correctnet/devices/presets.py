"""Published devices: fits of measurements, each with its source.

The coefficients are facts of the papers and of the tools that fitted them; g_max is a part of each fit, so a mapping
cannot exceed it. Two fits of one figure can differ threefold at small states, where most weights are, hence names after
paper and fit. To add a device, write a function that returns its `Programming` and add a line to `PRESETS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from correctnet.devices.programming import (
    SECONDS,
    Polynomial,
    Programming,
    Snapshots,
    between,
    normal_cdf,
    polynomial,
    rectified,
)
from correctnet.errors import UserError

DAY = SECONDS["d"]


# ---- phase-change memory --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PhaseChange(Polynomial):
    """Phase-change memory: programming noise, and with a time also drift and accumulated 1/f noise.

        g(t) = g_prog (t' / t0)^(-|nu|) (1 + q(t) xi),   t' = t + t0,   nu ~ N(m, s^2),   xi ~ N(0, 1)
        q(t) = q sqrt(ln((t' + t_read) / (2 t_read)))

    m, s and q are functions of x = target / reference. The three random numbers are independent, so the moments of g(t)
    are products of theirs.

    Attributes:
        t0_seconds: time of the first reading, before which there is no drift.
        read_seconds: length of a reading.
    """

    t0_seconds: float = 20.0
    read_seconds: float = 250e-9

    def exponent(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return m and s, mean and standard deviation of the drift exponent."""
        raise NotImplementedError

    def reading(self, x: Tensor) -> Tensor:
        """Return q, the scale of the accumulated 1/f noise relative to the state."""
        raise NotImplementedError

    def moments(self, target: Tensor, noise: float = 1.0) -> tuple[Tensor, Tensor]:
        """See `Programming.moments`."""
        mean, std = self.gaussian(target)
        first, variance = rectified(mean, std * noise)
        if self.time_seconds is None:
            return first, variance
        x = (target / self.reference).clamp(min=1e-7)
        later = self.time_seconds + self.t0_seconds
        m, s = self.exponent(x)
        log = math.log(later / self.t0_seconds)
        once, twice = power_moment(m, s * noise, log), power_moment(m, s * noise, 2 * log)
        q = self.reading(x) * noise * math.sqrt(math.log((later + self.read_seconds) / (2 * self.read_seconds)))
        second = (variance + first.square()) * twice * (1 + q.square())
        return first * once, (second - (first * once).square()).clamp(min=0)

    def after(self, time_seconds: float) -> Programming:
        """See `Programming.after`."""
        return replace(self, time_seconds=time_seconds)


def power_moment(mean: Tensor, std: Tensor, log: float) -> Tensor:
    """Return E[exp(-log |nu|)], nu ~ N(mean, std^2), log >= 0.

    = e^(-c m + c^2 s^2 / 2) Phi(m / s - c s) + e^(c m + c^2 s^2 / 2) Phi(-m / s - c s),  c = log.
    """
    exact = std <= 0
    s = torch.where(exact, torch.ones_like(std), std)
    half = (log * s).square() / 2
    value = torch.exp(half - log * mean) * normal_cdf(mean / s - log * s)
    value = value + torch.exp(half + log * mean) * normal_cdf(-mean / s - log * s)
    return torch.where(exact, torch.exp(-log * mean.abs()), value)


@dataclass(frozen=True)
class Nandakumar(PhaseChange):
    """Drift and 1/f noise of `pcm_nandakumar_2019`."""

    def exponent(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `PhaseChange.exponent`."""
        log = x.log()
        return (-0.0155 * log + 0.0244).clamp(0.049, 0.1), (-0.0125 * log - 0.0059).clamp(0.008, 0.045)

    def reading(self, x: Tensor) -> Tensor:
        """See `PhaseChange.reading`."""
        return (0.0088 / x.pow(0.65)).clamp(max=0.2)


def pcm_nandakumar_2019() -> Programming:
    """Phase-change memory, 0 to 25 uS, drift from 20 s on.

    Nandakumar et al., ICECS 2019 (ieeexplore 8964852); the fit is that of aihwkit's `PCMLikeNoiseModel`.
    """
    return Nandakumar("uS", 0.0, 25.0, None, (0.26348, 1.9650, -1.1731), 25.0, 20.0, 250e-9)


@dataclass(frozen=True)
class Hermes(PhaseChange):
    """Drift and 1/f noise of `pcm_hermes_1` and `pcm_hermes_2`.

    Attributes:
        devices: in parallel for one state, 1 or 2.
    """

    devices: int = 1

    def exponent(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `PhaseChange.exponent`."""
        log = x.log()
        m = torch.where(
            x < 0.0945, (-0.0387 * log - 0.0182).clamp(0.0720, 0.13), polynomial((0.0736, -0.0126, -0.0436), x)
        )
        if self.devices == 1:
            low, high, border = (-0.0120 * log - 0.0023).clamp(0.0124, 0.04), (0.0104, 0.0116, -0.0165), 0.3039
        else:
            low, high, border = (-0.0117 * log - 0.0057).clamp(0.0091, 0.04), (0.0073, 0.0093, -0.0118), 0.3055
        return m, torch.where(x < border, low, polynomial(high, x))

    def reading(self, x: Tensor) -> Tensor:
        """See `PhaseChange.reading`."""
        log = x.log()
        if self.devices == 1:
            low, high = (-0.0078 * log + 0.0038).clamp(0.0179, 0.04), (0.0088, 0.0768, -0.1352, 0.0664)
            return torch.where(x < 0.1591, low, polynomial(high, x))
        low, high = (-0.0117 * log - 0.0069).clamp(0.015, 0.04), (0.0123, 0.0211, -0.0280, 0.0069)
        return torch.where(x < 0.16, low, polynomial(high, x))


def pcm_hermes_1() -> Programming:
    """Phase-change memory of the HERMES chip, one device a state, 0 to 10.35 uS, drift from 200 s on.

    Le Gallo et al., Nat. Electron. 6, 680 (2023); the fit is that of aihwkit's `HermesNoiseModel`.
    """
    coefficients = (0.15781817, 2.32443916, -2.16310839, 0.68841818)
    return Hermes("uS", 0.0, 10.35, None, coefficients, 10.35, 200.0, 512e-9, 1)


def pcm_hermes_2() -> Programming:
    """Phase-change memory of the HERMES chip, two devices a state, 0 to 20.7 uS, drift from 300 s on.

    Le Gallo et al., Nat. Electron. 6, 680 (2023), programming as in Vasilopoulos et al., IEEE TED 2023; the fit is that
    of aihwkit's `HermesNoiseModel`.
    """
    coefficients = (0.16603222, 4.71806468, -8.48101252, 4.68961419)
    return Hermes("uS", 0.0, 20.7, None, coefficients, 20.7, 300.0, 512e-9, 2)


# ---- resistive memory -----------------------------------------------------------------------------------------------


def rram_wan_2022() -> Programming:
    """Resistive memory, 0 to 40 uS, measured 1 s, 1 day and 2 days after programming.

    Wan et al., Nature 608, 504 (2022), Extended Data Fig. 3d; the fit is that of aihwkit's `ReRamWan2022NoiseModel`,
    with the reference of 40 uS that it belongs to.
    """
    by_time = (
        (1.0, (0.348, 16.030, -43.853, 45.393, -16.815)),
        (DAY, (0.701, 22.086, -50.773, 47.095, -16.458)),
        (2 * DAY, (0.782, 20.274, -43.507, 37.062, -11.934)),
    )
    return Snapshots("uS", 0.0, 40.0, None, 40.0, by_time)


def rram_milo_2021() -> Programming:
    """Resistive memory (HfO2, written and verified by IGVVA-100), 50 to 225 uS.

    Milo et al., IRPS 2021 (ieeexplore 9405119), Fig. 4; the fit is that of CrossSim's `RRAMMilo`.
    """
    return Polynomial("uS", 50.0, 225.0, None, (4.782321, -0.009107))


@dataclass(frozen=True)
class Relaxing(Polynomial):
    """Programming noise, and from 1 s on a shift and a deviation of the state that grow with ln t, and 1/f noise.

        g(t) = g_prog + a ln t + (b ln t + c) z1 + d log10(g) sqrt(ln((t + t_read) / (2 t_read))) z2

    Attributes:
        shift: a.
        relaxation: (c, b).
        reading: d.
        read_seconds: t_read.
    """

    shift: float = 0.0
    relaxation: tuple[float, float] = (0.0, 0.0)
    reading: float = 0.0
    read_seconds: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.time_seconds is not None and self.time_seconds < 1:
            raise UserError(f"the device's relaxation was measured from 1 s on, not after {self.time_seconds:g} s")

    def gaussian(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """See `Programming.gaussian`."""
        mean, std = super().gaussian(target)
        if self.time_seconds is None:
            return mean, std
        log = math.log(self.time_seconds)
        mean = mean + self.shift * log
        relaxed = self.relaxation[0] + self.relaxation[1] * log
        read = self.reading * math.sqrt(math.log((self.time_seconds + self.read_seconds) / (2 * self.read_seconds)))
        read = read * mean.clamp(min=1).log10()
        return mean, (std.square() + relaxed**2 + read.square()).sqrt()

    def after(self, time_seconds: float) -> Programming:
        """See `Programming.after`."""
        return replace(self, time_seconds=time_seconds)


def rram_cmo_2025() -> Programming:
    """Filamentary CMO/HfOx memory, 9 to 88.2 uS, programmed to within 2 %, relaxation from 1 s on.

    Falcone et al., arXiv 2502.04524; the fit is that of aihwkit's `ReRamCMONoiseModel` at an acceptance range of 2 %.
    """
    return Relaxing(
        *("uS", 9.0, 88.2, None),
        (0.0112185391, 0.01129027418),
        shift=-0.08900206,
        relaxation=(0.41183342, 0.04201137),
        reading=0.0277316483,
    )


# ---- charge-trap memory ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sonos(Programming):
    """Mean: the target. Standard deviation: A (1 - exp(-I / B)) of a read current I.

    A and B were fitted after whole days, and are interpolated linearly between them. The mean's shift with time is left
    out: the polynomials of the source, evaluated, move 1600 nA by -246 nA after one day and by -98 nA after two, which
    is their degree and not a device.
    """

    DAYS = (0, 1, 2, 3, 4, 5)
    SATURATION = (
        *((19.88665, 176.3115), (25.59102, 186.85544), (28.72753, 193.56834)),
        *((31.04318, 198.90332), (33.76214, 204.77023), (34.57909, 207.34309)),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.time_seconds is not None and self.time_seconds > self.DAYS[-1] * DAY:
            raise UserError(f"the device was measured for {self.DAYS[-1]} days, not after {self.time_seconds / DAY:g}")

    def gaussian(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """See `Programming.gaussian`."""
        i, part = between(self.DAYS, (self.time_seconds or 0.0) / DAY)
        limit, scale = (a + part * (b - a) for a, b in zip(self.SATURATION[i], self.SATURATION[i + 1], strict=True))
        return target, (limit * (1 - torch.exp(-target / scale))).clamp(min=0)

    def after(self, time_seconds: float) -> Programming:
        """See `Programming.after`."""
        return replace(self, time_seconds=time_seconds)


def sonos_agrawal_2022() -> Programming:
    """SONOS charge-trap memory in subthreshold operation, read currents of 0 to 1600 nA, up to 5 days.

    Agrawal et al., IEDM 2022, Fig. 10; the fit is that of CrossSim's `SONOS`, without its read noise
    (Fig. 11) and without the shift of the mean with time.
    """
    return Sonos("nA", 0.0, 1600.0)


@dataclass(frozen=True)
class Preset:
    """A published device.

    Attributes:
        make: returns its programming.
        cell: how a weight is mapped to it in the publication, see `correctnet.devices.device.Mapping`.
    """

    make: Callable[[], Programming]
    cell: Any = "pair"

    @property
    def source(self) -> str:
        """What the device is and where its numbers are from, in one line."""
        return " ".join((self.make.__doc__ or "").split())


PRESETS = {
    "pcm-nandakumar-2019": Preset(pcm_nandakumar_2019),
    "pcm-hermes-1": Preset(pcm_hermes_1),
    "pcm-hermes-2": Preset(pcm_hermes_2),
    "rram-wan-2022": Preset(rram_wan_2022),
    "rram-milo-2021": Preset(rram_milo_2021),
    "rram-cmo-2025": Preset(rram_cmo_2025, cell="offset"),
    "sonos-agrawal-2022": Preset(sonos_agrawal_2022),
}
