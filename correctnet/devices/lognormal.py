"""Device variation: what programming a crossbar does to the weights that are put into it.

A *chip sample* is one draw of all weights of a network; it is addressed by (seed, sample), and the same address gives
the same weights in any batch size, chunk, thread count or process, because the noise is a function of
(seed, layer, sample, element) (`correctnet.noise.specification`) and not a stream. `correctnet.noise.streams` says which samples are
for what.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from correctnet.noise import core as native
from correctnet.noise import specification as reference


class Variation(ABC):
    """A device model: nominal weights to the weights that one chip sample carries."""

    @abstractmethod
    def sample(self, weight: Tensor, seed: int, layer: int, sample: int) -> Tensor:
        """The weights of chip `sample`, a differentiable function of `weight` of the same shape, dtype and device.

        Args:
            weight: nominal weights, (out, in) or (out, in / groups, kh, kw).
            seed: 64-bit seed of the whole simulation.
            layer: index of the layer among all conv and linear layers of the network.
            sample: number of the chip, in [0, 2^32).
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The settings and the moments that follow from them, for results files."""


@dataclass(frozen=True)
class LogNormalVariation(Variation):
    """w = w_nominal exp(theta + shift), theta ~ N(0, sigma^2) independent per weight: (1) and (2) of the paper.

    With `centre="median"` (the paper) shift is 0 and the *mean* weight is exp(sigma^2 / 2) times nominal, 1.133 at
    sigma 0.5. With `centre="mean"` w is programmed as w exp(-sigma^2 / 2), so that E[w] is nominal.

    Attributes:
        sigma: standard deviation of the logarithm of a weight (no unit), >= 0.
        centre: what the nominal weight is of the distribution, "median" or "mean".

    Raises:
        ValueError: sigma no number, negative, or so large that factors leave the range of float32; centre unknown.
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
        reference.log2_scale(self.sigma, self.shift)

    @property
    def shift(self) -> float:
        """What is added to theta: 0, or -sigma^2 / 2 where the mean is kept."""
        return 0.0 if self.centre == "median" else -(self.sigma**2) / 2

    @property
    def mean(self) -> float:
        """E[w] / w_nominal = exp(sigma^2 / 2 + shift)."""
        return math.exp(self.sigma**2 / 2 + self.shift)

    @property
    def cv(self) -> float:
        """Coefficient of variation, standard deviation / mean = sqrt(exp(sigma^2) - 1); 0.533 at sigma 0.5."""
        return math.sqrt(math.expm1(self.sigma**2))

    def factor(self, weight: Tensor, seed: int, layer: int, sample: int) -> Tensor:
        """exp(theta + shift) of each weight, float32, in the shape of `weight`.

        `element` counts in the order (out, kh, kw, in), whatever the memory order of `weight` is.
        """
        draws = native.lognormal(seed, layer, sample, weight.numel(), self.sigma, self.shift)
        flat = draws.to(weight.device)
        if weight.dim() != 4:
            return flat.view(weight.shape)
        out, inputs, kh, kw = weight.shape
        return flat.view(out, kh, kw, inputs).permute(0, 3, 1, 2)

    def sample(self, weight: Tensor, seed: int, layer: int, sample: int) -> Tensor:
        """See `Variation.sample`. At sigma 0 the result is `weight` itself."""
        if self.sigma == 0:
            return weight
        # Rounded once, from float32: weights in bfloat16 see the same chip as weights in float32.
        if not (
            weight.requires_grad and torch.is_grad_enabled()
        ):  # also inside torch.vmap, which takes no such function
            return native.noisy_weight(weight, seed, layer, sample, self.sigma, self.shift)
        return _Programmed.apply(weight, (seed, layer, sample, self.sigma, self.shift))

    def describe(self) -> dict[str, Any]:
        """The four settings that say which "lognormal" this is, with the mean and coefficient of variation."""
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
    """weight -> weight * factor(address). Its gradient is the factor, drawn again from the address, not stored."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, address: tuple[Any, ...]) -> Tensor:
        ctx.address = address
        return native.noisy_weight(weight, *address)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return native.noisy_weight(gradient, *ctx.address), None


def make(settings: Any) -> Variation:
    """The device model that the `variation` section of the settings asks for."""
    return LogNormalVariation(sigma=settings.sigma, centre=settings.centre)
