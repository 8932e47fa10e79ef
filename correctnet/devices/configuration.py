"""The sections `variation` and `converters` of the settings.

The variation is the paper's lognormal, or a measured or published device.

Both kinds have a `level`, how much the device varies in its own measure, and `at(level)`, the same settings at another.
At level 0 every chip is the nominal network.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_serializer, model_validator

from correctnet import devices
from correctnet.devices import DEVICES
from correctnet.errors import UserError
from correctnet.files.storage import sha256
from correctnet.sections import Grown, Section, exact, place, tag, validate

# Names of the registry, so that a mistake in one is found when settings are read.
DeviceName = Literal[tuple(DEVICES)]


class VariationSettings(Section):
    """The device variation, (1) and (2) of the paper: w = w_nominal exp(theta), theta ~ N(0, sigma^2)."""

    level_key: ClassVar[str] = "sigma"
    """the setting that is the level"""

    model: DeviceName = "lognormal"
    """device model"""
    on: Literal["weight"] = "weight"
    """the quantity that varies"""
    sigma: float = Field(0.5, ge=0, le=3)
    """standard deviation of the weight's logarithm"""
    centre: Literal["median", "mean"] = "median"
    """what the programmed weight equals: the median of its distribution (the paper) or its mean"""
    resample: Literal["chip"] = "chip"
    """how often the variation is redrawn"""

    @model_validator(mode="before")
    @classmethod
    def _no_device(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and (odd := _only_in(values, DeviceSettings, cls)):
            raise ValueError(f"{odd} goes with variation.device, and no device is named")
        return values

    @property
    def level(self) -> float:
        """Sigma."""
        return self.sigma

    def at(self, level: float) -> VariationSettings:
        """The same settings with another sigma."""
        return self.model_copy(update={"sigma": level})

    def identified(self) -> VariationSettings:
        """The settings themselves: there is no file to identify."""
        return self

    @property
    def text(self) -> str:
        """The device with its level, for tables and messages."""
        return f"{self.model}, sigma {exact(self.sigma)}"


class DeviceSettings(Section):
    """A published device, or a file of measurements: how weights are mapped to it, what is stuck."""

    level_key: ClassVar[str] = "level"
    """the setting that is the level"""

    device: str | None = None
    """instead of the lognormal, a published device (`correctnet device list`) or a file of measurements, NAME.csv"""
    unit: str | None = None
    """unit of the states in the file, e.g. uS, unless its header says so"""
    time: str | None = None
    """time after programming, e.g. 1h or 2d; empty: right after it"""
    cell: Literal["pair", "two-sided", "offset", "direct"] | None = None
    """devices of a weight; empty: as published, or a pair"""
    g_min: float | None = Field(None, ge=0)
    """smallest state in use; empty: the smallest measured"""
    g_max: float | None = Field(None, gt=0)
    """largest state in use; empty: the largest measured"""
    scale: Literal["layer", "output"] = "layer"
    """whether the range is that of a layer's weights or of each of its outputs'"""
    clip_rms: float | None = Field(None, gt=0)
    """weights are clipped at this multiple of their root mean square; empty: not clipped"""
    levels: int = Field(0, ge=0)
    """number of equidistant states that can be programmed; 0: any state, or those of the file"""
    centre: Literal["target", "mean"] = "target"
    """what is nominal: the devices' targets, or the mean weight, as far as the range allows"""
    stuck_off: float = Field(0.0, ge=0, le=1)
    """probability that a device is stuck at its smallest state"""
    stuck_on: float = Field(0.0, ge=0, le=1)
    """probability that a device is stuck at its largest state"""
    chip_gain: float = Field(0.0, ge=0, le=0.15)
    """standard deviation of the gain of a chip"""
    column_gain: float = Field(0.0, ge=0, le=0.15)
    """standard deviation of the gain of each output"""
    level: float = Field(1.0, gt=0, le=10)
    """multiple of the measured deviations"""
    digest: str | None = None
    """of the content of the file, which is refused if it has another; found when it is not given"""

    @model_validator(mode="before")
    @classmethod
    def _no_lognormal(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and (odd := _only_in(values, VariationSettings, cls)):
            if odd == "model":
                raise ValueError("one of model, device is expected, not both")
            raise ValueError(f"{odd} goes with the lognormal and not with a device (model: lognormal selects it)")
        return values

    @field_validator("device")
    @classmethod
    def _named(cls, value: str | None) -> str:
        if value is None:
            raise ValueError("a published device or a file of measurements is expected")
        return place(value)

    @field_validator("time", mode="before")
    @classmethod
    def _seconds(cls, value: Any) -> Any:
        """Seconds that are given as a number."""
        return f"{exact(value)}s" if isinstance(value, int | float) and not isinstance(value, bool) else value

    @model_serializer(mode="wrap")
    def _given(self, handler: Any) -> dict[str, Any]:
        """The settings that are not the defaults."""
        fields = type(self).model_fields
        return {key: value for key, value in handler(self).items() if value != fields[key].default}

    def at(self, level: float) -> DeviceSettings | VariationSettings:
        """The same device with another multiple of its deviations; at 0 the nominal network, without a device."""
        return self.model_copy(update={"level": level}) if level else VariationSettings(sigma=0.0)

    @property
    def path(self) -> Path | None:
        """The file of measurements; None: a published device."""
        name = self.device or ""
        return Path(name).expanduser() if name.lower().endswith(".csv") else None

    def found_digest(self) -> str | None:
        """Of the content of the file; None for a published device. Raises UserError where there is no such file."""
        return None if self.path is None else sha256(self.path)

    def identified(self) -> DeviceSettings:
        """The settings with the digest of the file, once it is known that they make a device.

        Raises:
            UserError: they make none: no such file or preset, a file that has changed, a range that was not measured.
        """
        try:
            own = self if self.digest else self.model_copy(update={"digest": self.found_digest()})
            _checked(own)
        except UserError as error:
            raise UserError(f"variation: {error}") from None
        return own

    @property
    def text(self) -> str:
        """The device with its time and level, for tables and messages."""
        time = "" if self.time is None else f" after {self.time}"
        return f"{self.device}{time}, level {exact(self.level)}"


@functools.lru_cache(maxsize=256)
def _checked(settings: DeviceSettings) -> None:
    """Make the device once. The digest is one of the settings: a file that changes is read again."""
    devices.make(settings)


class ConverterSettings(Grown):
    """DACs of the inputs and ADCs of the outputs of analog layers, in use under variation (`add_converters`)."""

    later = ("dac_bits", "adc_bits", "quantile", "images")

    dac_bits: int | None = Field(None, ge=2, le=16)
    """resolution of the inputs of each analog layer; empty: exact"""
    adc_bits: int | None = Field(None, ge=2, le=16)
    """resolution of its outputs; empty: exact"""
    quantile: float = Field(0.999, gt=0, le=1)
    """fraction of the magnitudes on calibration images that the range of a converter covers"""
    images: int = Field(512, ge=1)
    """calibration images, from the training set"""


def _only_in(values: Mapping[str, Any], section: type[Section], other: type[Section]) -> str | None:
    """The first of the values' keys that `section` has and `other` has not."""
    return next((key for key in values if key in section.model_fields and key not in other.model_fields), None)


LOGNORMAL, DEVICE = tag("lognormal"), tag("device")


def _kind(values: Any) -> str:
    """Which settings values are meant for: those of a device where they name one or have a key that only it has.

    A part of the settings, as of a row, need not name the device.
    """
    if isinstance(values, Mapping):
        if "device" in values or not _only_in(values, VariationSettings, DeviceSettings):
            own = _only_in(values, DeviceSettings, VariationSettings) or values.get("centre") == "target"
            return DEVICE if own else LOGNORMAL
        return LOGNORMAL
    return DEVICE if isinstance(values, DeviceSettings) else LOGNORMAL


AnyVariation = Annotated[
    Annotated[VariationSettings, Tag(LOGNORMAL)] | Annotated[DeviceSettings, Tag(DEVICE)], Discriminator(_kind)
]
"""the settings of the lognormal or of a device"""


def checked_variation(values: Mapping[str, Any]) -> VariationSettings | DeviceSettings:
    """Check settings of a variation, or a part of them. Raises UserError with a line for each mistake."""
    return validate(_Variation, {"variation": values}, "evaluate").variation


class _Variation(Section):
    variation: AnyVariation


def replaced(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `under` that stay where `over` is merged over them: none of another device's.

    A digest, a unit or a range of one device is not that of another, and sigma is none of a device's settings.
    """
    device, before = over.get("device"), under.get("device")
    if device is not None and before is None:
        return {key: value for key, value in under.items() if key not in VariationSettings.model_fields}
    other = device is not None and device != before
    return {} if other or (over.get("model") is not None and before is not None) else dict(under)
