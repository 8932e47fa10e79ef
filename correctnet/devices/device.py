"""A measured or published device on a crossbar: how weights are mapped to it, what programming leaves, what is stuck.

device = Device.preset("rram-wan-2022", time="1d", scale="output", clip_rms=2.5).stuck(off=0.01)
device = Device.from_csv("levels.csv", unit="uS")
analog = convert(network, device, seed=0)
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from correctnet.devices.base import Moments
from correctnet.devices.gaussian import GaussianVariation
from correctnet.devices.presets import PRESETS
from correctnet.devices.programming import Programming, interpolated, seconds, time_text
from correctnet.errors import UserError
from correctnet.noise.arrays import Outcome

Cell = Literal["pair", "two-sided", "offset", "direct"]
KNOTS = 2049  # at which the curve of the mean is inverted
BLOCK = 1 << 14  # weights at a time


@dataclass(frozen=True)
class Mapping:
    """How a weight w in [-w_max, w_max] becomes targets g of devices in [g_min, g_max]; r = g_max - g_min.

        pair        g+ = g_min + r max(w, 0) / w_max, g- likewise of -w; w' = (g+' - g-') w_max / r
        two-sided   g+- = g_min + r (1 +- w / w_max) / 2; w' = (g+' - g-') w_max / r
        offset      g = g_min + r (1 + w / w_max) / 2; w' = (g' - (g_min + g_max) / 2) 2 w_max / r
        direct      |g| = g_min + r |w| / w_max, without an idle device; w' = sign(w) (g' - g_min) w_max / r

    Attributes:
        cell: see above.
        g_min, g_max: range in use, in the unit of the measurement; None: all of what was measured.
        scale: whether the layer or each output has a w_max of its own.
        clip_rms: w_max is at most this multiple of the weights' root mean square, and larger weights are clipped; None:
            w_max is the largest |w|.
        levels: number of equidistant targets that can be programmed; 0: any target, or those of the measurement.

    Raises:
        UserError: an attribute is outside its range.
    """

    cell: Cell = "pair"
    g_min: float | None = None
    g_max: float | None = None
    scale: Literal["layer", "output"] = "layer"
    clip_rms: float | None = None
    levels: int = 0

    def __post_init__(self) -> None:
        if self.cell not in get_args(Cell):
            raise UserError(f"cell must be one of {', '.join(get_args(Cell))}, not {self.cell!r}")
        if self.scale not in ("layer", "output"):
            raise UserError(f"scale must be 'layer' or 'output', not {self.scale!r}")
        for name, least in (("g_min", 0.0), ("g_max", 0.0), ("clip_rms", math.ulp(0.0))):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and value >= least):
                raise UserError(f"{name} must be a finite number {'> 0' if least else '>= 0'}, not {value!r}")
        if isinstance(self.levels, bool) or not isinstance(self.levels, int) or self.levels < 0 or self.levels == 1:
            raise UserError(f"levels must be 0 or at least 2, not {self.levels!r}")

    def largest(self, weight: Tensor) -> Tensor:
        """Return w_max, of shape (1, 1, ...) or (out, 1, ...), without a gradient."""
        w = weight.detach()
        over = tuple(range(w.dim())) if self.scale == "layer" else tuple(range(1, w.dim()))
        largest = w.abs().amax(over, keepdim=True)
        if self.clip_rms is not None:
            largest = torch.minimum(largest, self.clip_rms * w.square().mean(over, keepdim=True).sqrt())
        return largest


@dataclass(frozen=True)
class Faults:
    """Probabilities that a device is stuck: at g_min (`off`) or at g_max (`on`), from before it is programmed.

    Raises:
        UserError: no probabilities, or a sum above 1.
    """

    off: float = 0.0
    on: float = 0.0

    def __post_init__(self) -> None:
        for name in ("off", "on"):
            value = getattr(self, name)
            if not (_is_number(value) and 0 <= value <= 1):
                raise UserError(f"stuck {name}: a probability is expected, not {value!r}")
        if self.off + self.on > 1:
            raise UserError(f"stuck off {self.off:g} and stuck on {self.on:g} sum to more than 1")

    def outcomes(self, cell: Cell) -> tuple[list[Outcome], bool]:
        """Return what becomes of a weight in a cell, and whether the range takes the weight's sign.

        Both devices of a pair are stuck independently. A stuck device keeps the mean of its target; only the noise of
        the healthy one remains, taken to be that of the whole weight.
        """
        p, q = self.off, self.on
        works = 1 - p - q
        if cell == "offset":
            return [Outcome(p, 0, -1), Outcome(q, 0, 1), Outcome(works, 1, 0)], False
        if cell == "direct":
            return [Outcome(p, 0, 0), Outcome(q, 0, 1), Outcome(works, 1, 0)], True
        if cell == "pair":  # the idle device is at g_min in any case but stuck on
            return [
                Outcome(p * (1 - q) + q * q, 0, 0),
                Outcome(q * (1 - q), 0, 1),
                Outcome(p * q, 0, -1),
                Outcome(works * q, 1, -1),
                Outcome(works * (1 - q), 1, 0),
            ], True
        # two-sided: with one device stuck, the other one still moves the weight by half
        return [
            Outcome(p * p + q * q, 0, 0),
            Outcome(p * q, 0, 1),
            Outcome(p * q, 0, -1),
            Outcome(works * (p + q), 0.5, 0.5),
            Outcome(works * (p + q), 0.5, -0.5),
            Outcome(works * works, 1, 0),
        ], False


@dataclass(frozen=True)
class Gain:
    """Standard deviations of gains around 1, e.g. of the converters: one gain a chip, and one for each output.

    Raises:
        UserError: numbers outside 0 to 0.15, with which a gain could be negative.
    """

    chip: float = 0.0
    column: float = 0.0

    def __post_init__(self) -> None:
        for name in ("chip", "column"):
            value = getattr(self, name)
            if not (_is_number(value) and 0 <= value <= 0.15):
                raise UserError(f"the gain of a {name}: a deviation between 0 and 0.15 is expected, not {value!r}")


@dataclass(frozen=True)
class Device(GaussianVariation):
    """A device of which it was measured what programming leaves.

    The weights of a chip are Gaussian, with the exact mean and standard deviation of the cell: independent devices
    whose states cannot be negative. Noise scales with the range of a device, not with the weight: what counts is
    w_max / rms(w), and weights near 0 vary, too.

    Attributes:
        programming: what programming to a target leaves.
        mapping: how weights become targets.
        faults: probabilities that a device is stuck.
        gain: deviations of the gains of a chip and of its outputs, which multiply the weights last.
        noise: multiple of the measured deviations, >= 0; 1 as measured. The level that curves sweep.
        centre: "target": the devices are programmed to the targets of the nominal weight; "mean": to those targets with
            which the *mean* weight is nominal, as far as the range allows.
        name: of the measurement, for results.

    Raises:
        UserError: an attribute is outside its range, or the mapping outside of what was measured.
    """

    programming: Programming
    mapping: Mapping = field(default_factory=Mapping)
    faults: Faults = field(default_factory=Faults)
    gain: Gain = field(default_factory=Gain)
    noise: float = 1.0
    centre: Literal["target", "mean"] = "target"
    name: str = "measured"

    def __post_init__(self) -> None:
        if not (_is_number(self.noise) and self.noise >= 0):
            raise UserError(f"noise must be a finite number >= 0, not {self.noise!r}")
        if self.centre not in ("target", "mean"):
            raise UserError(f"centre must be 'target' or 'mean', not {self.centre!r}")
        measured, (low, high) = self.programming, self.limits
        if low >= high:
            raise UserError(f"g_max must be above g_min; they are {high:g} and {low:g} {measured.unit}")
        for name, value in (("g_min", low), ("g_max", high)):
            if not measured.low <= value <= measured.high:
                raise UserError(
                    f"{name} {value:g} {measured.unit} is outside of what was measured, {measured.low:g} to "
                    f"{measured.high:g} {measured.unit}"
                )
        if self.programming.levels and self.mapping.levels:
            raise UserError(f"levels: {self.name} has {len(self.programming.levels)} of its own; leave them at 0")
        if self.programming.levels and len(self.targets) < 2:
            raise UserError(f"between g_min {low:g} and g_max {high:g} {measured.unit} there are no two levels")

    # ---- how to make one -----------------------------------------------------------------------------------------

    @classmethod
    def preset(cls, name: str, time: float | str | None = None, **options: Any) -> Device:
        """Make a published device.

        Args:
            name: one of `correctnet.devices.presets.PRESETS`, which give the sources.
            time: after programming, in seconds or as a text ("1d"); None: right after it.
            options: attributes of `Mapping` and of `Device`.

        Raises:
            UserError: no such preset, or not measured at that time.
        """
        if name not in PRESETS:
            raise UserError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
        preset = PRESETS[name]
        programming = preset.make() if time is None else preset.make().after(seconds(time))
        return cls._with(programming, {"cell": preset.cell, "name": name, **options})

    @classmethod
    def from_csv(
        cls, path: str | Path, unit: str | None = None, time: float | str | None = None, **options: Any
    ) -> Device:
        """Make a device of a file of measurements; see `correctnet.devices.measured.read`.

        Args:
            path: the file.
            unit: of its states, e.g. "uS", unless its header says so.
            time: which of several times after programming to take.
            options: attributes of `Mapping` and of `Device`.

        Raises:
            UserError: a file of another kind, or numbers that cannot be a device's.
        """
        from correctnet.devices import measured

        return cls._with(measured.read(path, unit, time), {"name": Path(path).name, **options})

    @classmethod
    def from_settings(cls, settings: Any) -> Device:
        """See `Variation.from_settings`.

        Raises:
            UserError: no device is named, it is none, its file has changed, or its settings are outside their ranges.
        """
        if settings.device is None:
            raise UserError("device: a published device or a file of measurements is expected; none is named")
        options = {key: getattr(settings, key) for key in ("g_min", "g_max", "scale", "clip_rms", "levels", "centre")}
        options |= {} if settings.cell is None else {"cell": settings.cell}
        options["faults"] = Faults(settings.stuck_off, settings.stuck_on)
        options["gain"] = Gain(settings.chip_gain, settings.column_gain)
        options["noise"] = settings.level
        if settings.path is None:
            if settings.unit is not None:
                raise UserError(f"unit: {settings.device} is a published device, whose unit is known")
            return cls.preset(settings.device, settings.time, **options)
        if settings.digest not in (None, settings.found_digest()):
            raise UserError(f"{settings.device}: the file has changed since the settings were made")
        return cls.from_csv(settings.path, settings.unit, settings.time, **options)

    @classmethod
    def _with(cls, programming: Programming, options: dict[str, Any]) -> Device:
        mapping = {f.name: options.pop(f.name) for f in fields(Mapping) if f.name in options}
        known = {f.name for f in fields(cls)} - {"programming", "mapping"}
        if unknown := sorted(set(options) - known):
            names = [f.name for f in fields(Mapping)] + sorted(known)
            raise UserError(f"a device has no {unknown[0]!r}; it has {', '.join(names)}")
        return cls(programming, Mapping(**mapping), **options)

    def stuck(self, off: float = 0.0, on: float = 0.0) -> Device:
        """Return the same device with other probabilities of stuck devices."""
        return replace(self, faults=Faults(off, on))

    def after(self, time: float | str) -> Device:
        """Return the same device at another time after programming.

        Raises:
            UserError: it was not measured then.
        """
        return replace(self, programming=self.programming.after(seconds(time)))

    @property
    def level(self) -> float:
        """See `Variation.level`: the multiple of the measured deviations."""
        return self.noise

    def at(self, level: float | str) -> Device:
        """Return the same device with another multiple of the deviations, or with a text ("1d") at another time."""
        return self.after(level) if isinstance(level, str) else replace(self, noise=level)

    # ---- what a chip carries -------------------------------------------------------------------------------------

    @property
    def limits(self) -> tuple[float, float]:
        """(g_min, g_max) in use."""
        mapping, measured = self.mapping, self.programming
        low = measured.low if mapping.g_min is None else mapping.g_min
        return low, measured.high if mapping.g_max is None else mapping.g_max

    def _states(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the states of devices whose targets are `part` of the range, relative to the range."""
        low, high = self.limits
        r = high - low
        target = low + r * part
        levels = self.targets
        if levels:
            at = torch.tensor(levels, dtype=target.dtype, device=target.device)
            borders = (at[1:] + at[:-1]) / 2
            nearest = at[torch.searchsorted(borders, target.detach().contiguous())]
            target = target + (nearest - target).detach()  # the gradient passes straight through
        mean, variance = self.programming.moments(target, self.noise)
        return (mean - low) / r, variance / r**2

    @property
    def targets(self) -> tuple[float, ...]:
        """The targets that can be programmed; empty: all."""
        low, high = self.limits
        if self.mapping.levels:
            return tuple(low + (high - low) * i / (self.mapping.levels - 1) for i in range(self.mapping.levels))
        return tuple(level for level in self.programming.levels if low <= level <= high)

    def curve(self, x: Tensor) -> Moments:
        """Return mean and standard deviation of a weight x w_max, in units of w_max.

        Args:
            x: in [-1, 1], float64.
        """
        if x.numel() > BLOCK and not (x.requires_grad and torch.is_grad_enabled()):  # temporaries stay in a cache
            parts = [self.curve(part) for part in x.reshape(-1).split(BLOCK)]
            return Moments(*(torch.cat(columns).view(x.shape) for columns in zip(*parts, strict=True)))
        if self.centre == "target":
            return self._curve(x)
        means, knots = _inverse(self)
        wanted = x.clamp(means[0], means[-1])
        return Moments(wanted, self._curve(interpolated(wanted, means, knots)).std)

    def _curve(self, x: Tensor) -> Moments:
        cell = self.mapping.cell
        if cell == "offset":
            mean, variance = self._states((1 + x) / 2)
            return Moments(2 * mean - 1, 2 * _root(variance))
        if cell == "two-sided":
            (plus, first), (minus, second) = self._states((1 + x) / 2), self._states((1 - x) / 2)
            return Moments(plus - minus, _root(first + second))
        negative = x < 0
        mean, variance = self._states(torch.where(negative, -x, x))
        if cell == "pair":
            idle, own = self._states(torch.zeros((), dtype=x.dtype, device=x.device))
            mean, variance = mean - idle, variance + own
        return Moments(torch.where(negative, -mean, mean), _root(variance))

    def moments(self, weight: Tensor) -> Moments:
        """See `Variation.moments`. Raises UserError for weights that are not finite."""
        w = weight.double()
        largest = self.mapping.largest(w)
        if not largest.isfinite().all():
            raise UserError("weights that are not finite cannot be programmed")
        mean, std = self.curve((w / torch.where(largest > 0, largest, 1.0)).clamp(-1, 1))
        return Moments(mean * largest, std * largest)

    def outcomes(self) -> tuple[list[Outcome], bool] | None:
        """See `GaussianVariation.outcomes`."""
        return self.faults.outcomes(self.mapping.cell) if self.faults.off or self.faults.on else None

    @property
    def gains(self) -> tuple[float, float]:
        """See `GaussianVariation.gains`."""
        return self.gain.chip, self.gain.column

    def reach(self, weight: Tensor) -> Tensor:
        """See `GaussianVariation.reach`."""
        return self.mapping.largest(weight.double()).reshape(-1).expand(len(weight))

    def describe(self) -> dict[str, Any]:
        """See `Variation.describe`: all settings, and a digest of the measurement."""
        low, high = self.limits
        measured = self.programming.describe()
        text = json.dumps([type(self.programming).__name__, self.programming.unit, measured], sort_keys=True)
        time_seconds = self.programming.time_seconds
        return {
            "model": self.name,
            "on": "weight",
            "cell": self.mapping.cell,
            "g_min": low,
            "g_max": high,
            "unit": self.programming.unit,
            "scale": self.mapping.scale,
            "clip_rms": self.mapping.clip_rms,
            "levels": self.mapping.levels,
            "time": None if time_seconds is None else time_text(time_seconds),
            "noise": self.noise,
            "centre": self.centre,
            "stuck_off": self.faults.off,
            "stuck_on": self.faults.on,
            "chip_gain": self.gain.chip,
            "column_gain": self.gain.column,
            "resample": "chip",
            "measurement": hashlib.blake2b(text.encode(), digest_size=8).hexdigest(),
        }


@functools.lru_cache(maxsize=16)
def _inverse(device: Device) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Ascending mean weights of a device, and the targets that have them, in units of w_max."""
    knots = torch.linspace(-1, 1, KNOTS, dtype=torch.float64)
    means = device._curve(knots).mean
    ascends = torch.ones(KNOTS, dtype=torch.bool)
    ascends[1:] = means[1:] > means.cummax(0).values[:-1]
    return tuple(means[ascends].tolist()), tuple(knots[ascends].tolist())


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)


def _root(variance: Tensor) -> Tensor:
    """The square root, with gradient 0 where the variance is 0."""
    positive = variance > 0
    return torch.where(positive, torch.where(positive, variance, 1.0).sqrt(), 0.0)
