"""Specification of noise that arrays describe, weight by weight: Gaussian around a mean, faults, exact weights.

    z    standard normal number of the weight's address, as in `correctnet.noise.specification` (purpose 0)
    v    fma(z, spread, mean)                                                    Gaussian
         mean * 2^(z (s * spread) + h * spread)                                  lognormal; s, h: `log2_scale`
    u    the address's word of purpose 1, div 2: 31 bits
    k    the number of thresholds t[j] with u > t[j]
    w'   fma(keep[k] gain, v, +-(move[k] reach) gain), or v where there are no faults; the sign: see `FaultTable`
    gain fma(z1, chip_gain, 1) * fma(z2, column_gain, 1): z1 of the chip (purpose 6, layer and element 0), z2 of the
         output (purpose 4, the output in place of the element)

`spread` 0 gives the mean, to the bit. With the sign bit set (-0) the weight also has no faults: that is how a weight is
protected. All operations are on 32 bits and rounded once, so every kernel gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from correctnet.noise import specification

PROGRAM, FAULT, COLUMN, CHIP = 0, 1, 4, 6
"""purposes of the words of an address: z of a programming, which devices are stuck, gains of a column and of a chip"""

OUTCOMES = 6
SMALLEST, LARGEST = 2.0**-64, 2.0**64
"""of a spread that is not 0: within them no product of z and spread leaves the normal numbers of float32"""


@dataclass(frozen=True)
class Outcome:
    """What becomes of a weight v whose devices are stuck in one of the possible ways: keep v + move reach.

    `reach` is what the whole range of a device is worth in units of the weight, one number an output.
    """

    probability: float
    keep: float
    move: float


@dataclass(frozen=True)
class FaultTable:
    """What the kernels know of stuck devices and of gains.

    Attributes:
        thresholds: five numbers in [-1, 2^31), ascending. A weight has the outcome whose number is the number of
            thresholds below its word div 2.
        keep, move: six numbers each, of the outcomes.
        signed: whether `reach` takes the sign of the weight's mean.
        chip_gain, column_gain: standard deviations of the gains of a chip and of each of its outputs, whose mean is 1.
    """

    thresholds: tuple[int, ...]
    keep: tuple[float, ...]
    move: tuple[float, ...]
    signed: bool
    chip_gain: float = 0.0
    column_gain: float = 0.0

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], signed: bool, gains: tuple[float, float] = (0.0, 0.0)) -> FaultTable:
        """Divide the 2^31 values of a word among up to six outcomes; their probabilities sum to 1.

        A probability is rounded to a multiple of 2^-31; 0 and 1 are exact.
        """
        if not 1 <= len(outcomes) <= OUTCOMES or any(not outcome.probability >= 0 for outcome in outcomes):
            raise ValueError(f"one to {OUTCOMES} outcomes with probabilities >= 0 are expected, not {outcomes}")
        total = np.cumsum([outcome.probability for outcome in outcomes])
        if abs(total[-1] - 1) > 1e-9:
            raise ValueError(f"the outcomes' probabilities sum to {total[-1]}")
        # Threshold j is the last value of outcome j; outcomes that are not there have none of the values.
        filled = [Outcome(0.0, 1.0, 0.0)] * (OUTCOMES - len(outcomes)) + list(outcomes)
        last = [-1] * (OUTCOMES - len(outcomes)) + [round(float(c) * 2**31) - 1 for c in total[:-1]]
        keep, move = (tuple(getattr(outcome, name) for outcome in filled) for name in ("keep", "move"))
        return cls(tuple(min(t, 2**31 - 1) for t in last), keep, move, signed, *gains)


@dataclass(frozen=True, eq=False)
class ArrayNoise:
    """Noise of one layer as the kernels read it. Tensors have the shape of the weight, (out, in, *kernel), float32.

    Attributes:
        mean: what the weight is without noise, finite; no -0 and no subnormal number.
        spread: >= 0. Gaussian: the standard deviation, 0 or from 2^-64 to 2^64. Lognormal: 1, or 0 for a weight that
            does not vary. -0: exact, without faults either.
        sigma, shift: parameters of the lognormal factor; None and 0: Gaussian.
        faults: which devices are stuck, and the gains; or None.
        reach: (out,), >= 0; None without faults.

    Raises:
        ValueError: values outside these ranges.
    """

    mean: Tensor
    spread: Tensor
    sigma: float | None = None
    shift: float = 0.0
    faults: FaultTable | None = None
    reach: Tensor | None = None

    def __post_init__(self) -> None:
        if self.mean.dim() < 2 or self.mean.shape != self.spread.shape:
            raise ValueError(f"mean {tuple(self.mean.shape)} and spread {tuple(self.spread.shape)} differ in shape")
        if {self.mean.dtype, self.spread.dtype} != {torch.float32}:
            raise ValueError(f"mean and spread must be float32, not {self.mean.dtype} and {self.spread.dtype}")
        if not self.mean.isfinite().all():
            raise ValueError("the mean of a weight is not finite")
        size = self.spread.abs()
        if not ((size == 0) | ((size >= SMALLEST) & (size <= LARGEST))).all():
            raise ValueError(f"a spread is neither 0 nor between {SMALLEST:.3g} and {LARGEST:.3g}")
        if self.sigma is not None:
            specification.log2_scale(self.sigma, self.shift)
            if not ((size == 0) | (size == 1)).all():
                raise ValueError("the spread of lognormal noise must be 0 or 1")
        if (self.faults is None) != (self.reach is None):
            raise ValueError("faults and reach belong together")
        if self.reach is not None and not (
            self.reach.shape == self.mean.shape[:1]
            and self.reach.dtype == torch.float32
            and (self.reach.isfinite() & (self.reach >= 0)).all()
        ):
            raise ValueError(f"reach must be float32, ({len(self.mean)},), finite and >= 0, not {self.reach}")

    @property
    def parameters(self) -> tuple[float, float]:
        """(sigma, shift) of the factor; zeros for Gaussian noise, which has none."""
        return (0.0 if self.sigma is None else self.sigma), self.shift


def rounded(mean: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Round moments in float64 to the arrays of `ArrayNoise`.

    -0 and numbers below the normal ones of float32 become 0, and standard deviations below 2^-64 as well.
    """
    mean, spread = mean.detach().to(torch.float32), spread.detach().to(torch.float32)
    zero = torch.zeros((), device=mean.device)
    return (
        torch.where(mean.abs() < torch.finfo(torch.float32).tiny, zero, mean),
        torch.where(spread < SMALLEST, zero, spread),
    )


def in_order(tensor: Tensor) -> Tensor:
    """Return (out, in, *kernel) as (out, *kernel, in), the order in which elements count, contiguous."""
    return tensor.movedim(1, -1).contiguous()


def programmed(noise: ArrayNoise, seed: int, layer: int, sample: int) -> NDArray[np.float32]:
    """Return the weights of a chip, (out, *kernel, in), by numpy; `correctnet.noise.draw.programmed` is the fast twin.

    Args:
        noise: of the layer.
        seed, layer, sample: see `specification.words`.
    """
    mean, spread = (in_order(tensor).cpu().numpy() for tensor in (noise.mean, noise.spread))
    size = mean.size // max(1, len(mean))
    factor, address = None if noise.sigma is None else noise.parameters, (seed, layer, sample)
    reach = gain = None
    if noise.faults is not None:
        reach, gain = noise.reach.cpu().numpy(), gains(*address, len(mean), noise.faults)
        reach, gain = np.repeat(reach, size), np.repeat(gain, size)
    return values(*address, mean.ravel(), spread.ravel(), factor, noise.faults, reach, gain).reshape(mean.shape)


def gains(seed: int, layer: int, sample: int, outputs: int, faults: FaultTable) -> NDArray[np.float32]:
    """Return the gains of a layer's outputs on a chip, (outputs,)."""
    one = np.float32(1)
    chip, columns = (
        specification.standard_normal(specification.words(seed, index, sample, count, purpose=purpose))
        for index, count, purpose in ((0, 1, CHIP), (layer, outputs, COLUMN))
    )
    column = specification.fma(columns, np.float32(faults.column_gain), one)
    return specification.fma(chip, np.float32(faults.chip_gain), one) * column


def values(
    seed: int,
    layer: int,
    sample: int,
    mean: NDArray[np.float32],
    spread: NDArray[np.float32],
    factor: tuple[float, float] | None = None,
    faults: FaultTable | None = None,
    reach: NDArray[np.float32] | None = None,
    gain: NDArray[np.float32] | None = None,
    start: int = 0,
) -> NDArray[np.float32]:
    """Return the weights of elements start, start + 1, ... of a chip.

    Args:
        seed, layer, sample, start: see `specification.words`.
        mean, spread: float32, (count,), of these elements.
        factor: (sigma, shift) of lognormal noise; None: Gaussian.
        faults: which devices are stuck, or None.
        reach, gain: float32, (count,), with `faults`.

    Returns:
        float32, (count,).
    """
    size = mean.size
    z = specification.standard_normal(specification.words(seed, layer, sample, size, start, PROGRAM))
    if factor is None:
        value = specification.fma(z, spread, mean)
    else:
        scale, offset = specification.log2_scale(*factor)
        value = mean * specification.exp2(specification.fma(z, scale * spread, offset * spread))
    if faults is None:
        return value
    u = (specification.words(seed, layer, sample, size, start, FAULT) >> np.uint32(1)).astype(np.int64)
    outcome = sum((u > t).astype(np.int64) for t in faults.thresholds)
    keep, move = (np.array(numbers, np.float32)[outcome] for numbers in (faults.keep, faults.move))
    moved = move * reach * gain
    if faults.signed:
        moved = np.where(np.signbit(mean), -moved, moved)
    return np.where(np.signbit(spread), value, specification.fma(keep * gain, value, moved))
