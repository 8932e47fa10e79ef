"""Devices whose weights are Gaussian around a mean: all that `moments` can describe, at the speed of the kernels."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from correctnet.devices.base import Moments, Variation
from correctnet.noise import arrays, draw
from correctnet.noise.arrays import ArrayNoise, FaultTable, Outcome

WORKS = Outcome(1.0, 1.0, 0.0)


class GaussianVariation(Variation):
    """w = M + z S, z ~ N(0, 1) independent per weight, then stuck devices; M and S from `moments`.

    Subclasses implement `moments` with torch operations, element by element in the weight: what depends on the whole
    layer (its largest weight) is detached. The gradient of a chip's weight is dM + z dS, 0 where it is stuck. Those
    with stuck devices also implement `outcomes`.
    """

    @abstractmethod
    def moments(self, weight: Tensor) -> Moments:
        """See `Variation.moments`."""

    def outcomes(self) -> tuple[list[Outcome], bool] | None:
        """Return what becomes of weights with stuck devices, see `FaultTable.of`; None where all devices work."""
        return None

    def reach(self, weight: Tensor) -> Tensor:
        """Return what the range of a device is worth in units of the weight, (out,), float64; only with `outcomes`."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its range is worth")

    @property
    def gains(self) -> tuple[float, float]:
        """Standard deviations of the gain of a chip and of each of its outputs, around 1."""
        return 0.0, 0.0

    def chip_moments(self, weight: Tensor) -> Moments:
        """See `Variation.chip_moments`."""
        mean, std = self.moments(weight)
        found, (chip, column) = self.outcomes(), self.gains
        spread = (1 + chip**2) * (1 + column**2)  # second moment of the gain
        if found is None:
            return Moments(mean, (spread * (mean.square() + std.square()) - mean.square()).clamp(min=0).sqrt())
        outcomes, signed = found
        reach = self.reach(weight).view(-1, *[1] * (weight.dim() - 1))
        if signed:
            reach = torch.where(mean < 0, -reach, reach)
        first = sum(o.probability * (o.keep * mean + o.move * reach) for o in outcomes)
        second = sum(
            o.probability * ((o.keep * mean + o.move * reach).square() + (o.keep * std).square()) for o in outcomes
        )
        return Moments(first, (spread * second - first.square()).clamp(min=0).sqrt())

    @property
    def has_arrays(self) -> bool:
        """See `Variation.has_arrays`; False for subclasses that draw in another way."""
        return type(self).sample is GaussianVariation.sample

    def array_noise(self, weight: Tensor, layer: int) -> ArrayNoise:
        """See `Variation.array_noise`."""
        return self._arrays(weight.detach(), *self.moments(weight.detach()))

    def _arrays(self, weight: Tensor, mean: Tensor, std: Tensor) -> ArrayNoise:
        found = self.outcomes()
        if found is None and not any(self.gains):
            return ArrayNoise(*arrays.rounded(mean, std))
        reach = weight.new_zeros(len(weight)) if found is None else self.reach(weight)
        table = FaultTable.of(*(found or ([WORKS], False)), self.gains)
        return ArrayNoise(*arrays.rounded(mean, std), faults=table, reach=reach.float())

    def sample(self, weight: Tensor, seed: int, layer: int, sample: int) -> Tensor:
        """See `Variation.sample`."""
        if not (weight.requires_grad and torch.is_grad_enabled()):
            return draw.programmed(self.array_noise(weight, layer), seed, layer, sample, weight.dtype)
        return _Programmed.apply(weight, self, (seed, layer, sample))


class _Programmed(torch.autograd.Function):
    """weight -> the weights of a chip. Its gradient is dM + z dS; z is drawn again instead of stored."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, device: GaussianVariation, address: tuple[int, int, int]) -> Tensor:
        with torch.enable_grad():
            own = weight.detach().double().requires_grad_()
            mean, std = device.moments(own)
            slopes = [
                torch.autograd.grad(m.sum(), own, retain_graph=True, allow_unused=True)[0] if m.requires_grad else None
                for m in (mean, std)
            ]
        noise = device._arrays(weight.detach(), mean, std)
        zero = torch.zeros_like(noise.mean)
        slopes = [zero if slope is None else slope.float() for slope in slopes]
        ctx.save_for_backward(*slopes)
        ctx.address, ctx.faults, ctx.reach = address, noise.faults, noise.reach
        return draw.programmed(noise, *address, weight.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        slope, spread_slope = ctx.saved_tensors
        wide = gradient.float()
        # z and 1 of a working device, times its gain, and 0 of a stuck one: chips of M = 0, S = 1 and of M = 1, S = 0.
        nothing = None if ctx.reach is None else torch.zeros_like(ctx.reach)
        ones, zeros = torch.ones_like(slope), torch.zeros_like(slope)
        z = draw.programmed(ArrayNoise(zeros, ones, faults=ctx.faults, reach=nothing), *ctx.address)
        works = slope
        if ctx.faults is not None:
            works = slope * draw.programmed(ArrayNoise(ones, zeros, faults=ctx.faults, reach=nothing), *ctx.address)
        return (wide * (works + spread_slope * z)).to(gradient.dtype), None, None
