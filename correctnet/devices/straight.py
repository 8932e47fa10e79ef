"""Gradients that ignore the variation: a device for trainings with straight-through estimates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from correctnet.devices.base import Moments, Variation


class _Straight(torch.autograd.Function):
    """(weight, drawn) -> drawn, with the gradient of the identity in weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, drawn: Tensor) -> Tensor:
        return drawn.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


@dataclass(frozen=True)
class Straight(Variation):
    """A device whose chips are those of another one, with gradients as if the weights did not vary.

    Attributes:
        device: the other device model.
    """

    device: Variation

    def sample(self, weight: Tensor, seed: int, layer: int, sample: int) -> Tensor:
        """See `Variation.sample`. The gradient of each weight is 1."""
        with torch.no_grad():
            drawn = self.device.sample(weight.detach(), seed, layer, sample)
        return _Straight.apply(weight, drawn)

    def moments(self, weight: Tensor) -> Moments:
        """See `Variation.moments`."""
        return self.device.moments(weight)

    def factor_moments(self) -> tuple[float, float]:
        """See `Variation.factor_moments`."""
        return self.device.factor_moments()

    def describe(self) -> dict[str, Any]:
        """See `Variation.describe`: the device's, with the gradient."""
        return {**self.device.describe(), "gradient": "straight"}


def with_gradient(device: Variation, gradient: Literal["through", "straight"]) -> Variation:
    """Return the device for a training: itself, whose gradients are those of its weights, or `Straight`."""
    return Straight(device) if gradient == "straight" else device
