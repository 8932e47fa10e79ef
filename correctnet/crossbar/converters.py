"""Converters of crossbars: DACs, which their inputs pass, and ADCs, which their outputs pass before the bias."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from correctnet.errors import UserError

BITS = range(2, 17)
"""resolutions that a converter may have"""


@dataclass(frozen=True)
class Quantizer:
    """A converter, which has as many steps above 0 as below it.

        q(x) = step round(clamp(x / step, -L, L)),    L = 2^(bits - 1) - 1,    step = limit / L

    Halves are rounded to even. The gradient is straight-through: 1 within the limit and 0 beyond it.

    Attributes:
        bits: resolution, 2 to 16.
        limit: largest magnitude that is not clipped, finite and > 0, in the unit of what is converted.

    Raises:
        UserError: an attribute is outside its range.
    """

    bits: int
    limit: float

    def __post_init__(self) -> None:
        check_bits("a converter", self.bits)
        if not (math.isfinite(self.limit) and self.limit > 0):
            raise UserError(f"the range of a converter must be a finite number > 0, not {self.limit!r}")

    @property
    def steps(self) -> int:
        """L: number of steps from 0 to the limit."""
        return 2 ** (self.bits - 1) - 1

    @property
    def step(self) -> float:
        """Difference of neighbouring values."""
        return self.limit / self.steps

    def __call__(self, x: Tensor) -> Tensor:
        """Return q(x), computed in float32 or wider, in the type of x."""
        return _Quantized.apply(x, self)

    def clips(self, x: Tensor) -> Tensor:
        """Return where |x| is beyond the limit."""
        return x.abs() > self.limit


class _Quantized(torch.autograd.Function):
    """Quantisation with the straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantizer: Quantizer) -> Tensor:
        ctx.save_for_backward(quantizer.clips(x))
        position = x.to(torch.promote_types(x.dtype, torch.float32)) * (1 / quantizer.step)
        return (position.clamp(-quantizer.steps, quantizer.steps).round() * quantizer.step).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (clipped,) = ctx.saved_tensors
        return gradient.masked_fill(clipped, 0), None


@dataclass(frozen=True)
class Converters:
    """Resolution of all converters of a network.

    Attributes:
        dac_bits: of the inputs of each analog layer, 2 to 16; None: exact inputs.
        adc_bits: of its outputs, before the digital bias; None: exact outputs.
        quantile: the range of a converter covers this fraction of the magnitudes that it sees on the calibration
            images, 0 < quantile <= 1.

    Raises:
        UserError: an attribute is outside its range.
    """

    dac_bits: int | None = None
    adc_bits: int | None = None
    quantile: float = 0.999

    def __post_init__(self) -> None:
        for name in ("dac_bits", "adc_bits"):
            if getattr(self, name) is not None:
                check_bits(name, getattr(self, name))
        if isinstance(self.quantile, bool) or not isinstance(self.quantile, int | float) or not 0 < self.quantile <= 1:
            raise UserError(f"quantile must be a fraction above 0 and at most 1, not {self.quantile!r}")

    def __bool__(self) -> bool:
        """Whether anything is converted."""
        return self.dac_bits is not None or self.adc_bits is not None


def check_bits(name: str, bits: Any) -> None:
    """Raise UserError for a number of bits that no converter has."""
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in BITS:
        raise UserError(f"{name}: {BITS[0]} to {BITS[-1]} bits are expected, not {bits!r}")


@dataclass(frozen=True)
class Periphery:
    """The converters of one crossbar.

    Attributes:
        dac: of the inputs; None: they are exact.
        adc: of the outputs, before the bias; None: likewise.
    """

    dac: Quantizer | None = None
    adc: Quantizer | None = None

    def inputs(self, x: Tensor) -> Tensor:
        """Return what reaches the crossbar of its inputs x."""
        return x if self.dac is None else self.dac(x)

    def outputs(self, sums: Tensor) -> Tensor:
        """Return what is read of the sums of the crossbar."""
        return sums if self.adc is None else self.adc(sums)
