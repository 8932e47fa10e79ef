"""Lognormal variation of the weights, the device model of the paper."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from correctnet.devices.base import KernelNoise, Moments, Variation
from correctnet.noise import draw, specification


@dataclass(frozen=True)
class LogNormalVariation(Variation):
    """w = w_nominal exp(theta + shift), theta ~ N(0, sigma^2) independent per weight: (1) and (2) of the paper.

    With `centre="median"` (the paper) shift is 0 and the *mean* weight is exp(sigma^2 / 2) times nominal, 1.133 at
    sigma 0.5. With `centre="mean"` shift is -sigma^2 / 2, so that E[w] is nominal.

    Attributes:
        sigma: standard deviation of the logarithm of a weight (no unit), >= 0.
        centre: which moment of its distribution the nominal weight is, "median" or "mean".

    Raises:
        ValueError: sigma is not a number >= 0, or so large that factors leave the range of float32; or centre is
            unknown.
    """

    sigma: float = 0.5
    centre: Literal["median", "mean"] = "median"

    def __post_init__(self) -> None:
        try:
            fine = not isinstance(self.sigma, bool) and math.isfinite(self.sigma) and self.sigma >= 0
        except TypeError:
            fine = False
        if not fine:
            raise ValueError(f"sigma must be a finite number >= 0, not {self.sigma!r}")
        if self.centre not in ("median", "mean"):
            raise ValueError(f"centre must be 'median' or 'mean', not {self.centre!r}")
        specification.log2_scale(self.sigma, self.shift)

    @property
    def shift(self) -> float:
        """Mean of the factor's logarithm: 0, or -sigma^2 / 2 with `centre="mean"`."""
        return 0.0 if self.centre == "median" else -(self.sigma**2) / 2

    @property
    def mean(self) -> float:
        """E[w] / w_nominal = exp(sigma^2 / 2 + shift)."""
        return math.exp(self.sigma**2 / 2 + self.shift)

    @property
    def cv(self) -> float:
        """Coefficient of variation, standard deviation / mean = sqrt(exp(sigma^2) - 1); 0.533 at sigma 0.5."""
        return math.sqrt(math.expm1(self.sigma**2))

    @property
    def kernel_noise(self) -> KernelNoise | None:
        """See `Variation.kernel_noise`; None for subclasses that draw in another way."""
        return KernelNoise(self.sigma, self.shift) if type(self).sample is __class__.sample else None

    def factor_moments(self) -> tuple[float, float]:
        """See `Variation.factor_moments`."""
        deviation = math.sqrt(math.expm1(self.sigma**2) * math.exp(self.sigma**2)) * math.exp(self.shift)
        return self.mean, deviation

    def moments(self, weight: Tensor) -> Moments:
        """See `Variation.moments`."""
        mean, deviation = self.factor_moments()
        w = weight.double()
        return Moments(w * mean, w.abs() * deviation)

    @property
    def level(self) -> float:
        """See `Variation.level`: sigma."""
        return self.sigma

    def at(self, level: float) -> LogNormalVariation:
        """See `Variation.at`."""
        return replace(self, sigma=level)

    @classmethod
    def from_settings(cls, settings: Any) -> LogNormalVariation:
        """See `Variation.from_settings`."""
        return cls(sigma=settings.sigma, centre=settings.centre)

    def sample(self, weight: Tensor, seed: int, layer: int, sample: int) -> Tensor:
        """See `Variation.sample`. At sigma 0 the result is `weight` itself."""
        if self.sigma == 0:
            return weight
        # Rounded once, from float32: weights in bfloat16 see the same chip as weights in float32. Without a gradient
        # no autograd.Function is used, which torch.vmap would refuse.
        if not (weight.requires_grad and torch.is_grad_enabled()):
            return draw.noisy_weight(weight, seed, layer, sample, self.sigma, self.shift)
        return _Programmed.apply(weight, (seed, layer, sample, self.sigma, self.shift))

    def describe(self) -> dict[str, Any]:
        """See `Variation.describe`: the settings, with the mean and coefficient of variation of w / w_nominal."""
        return {
            "model": "lognormal",
            "on": "weight",
            "sigma": self.sigma,
            "centre": self.centre,
            "resample": "chip",
            "mean": self.mean,
            "cv": self.cv,
        }


class _Programmed(torch.autograd.Function):
    """weight -> weight * factor(address). Its gradient is the factor, which is drawn again instead of stored."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, address: tuple[Any, ...]) -> Tensor:
        ctx.address = address
        return draw.noisy_weight(weight, *address)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return draw.noisy_weight(gradient, *ctx.address), None
