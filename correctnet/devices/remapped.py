"""Rows of weights assigned to the rows of each chip's crossbars that suit them best (the mapping of [7] and [12]).

A layer's unrolled weights are a matrix, rows by inputs (of the kernel) and columns by outputs. On a chip whose factors
are known, row p of the weights is placed on the physical row q(p), where it is multiplied with the factors of q(p). The
assignment is the one with the least

    sum over p of  sum over c of |W_pc| |F_q(p)c - 1|

which scipy solves exactly. The inputs are wired to the rows accordingly, so that nothing is trained and nothing digital
is added; but the factor of every device of every chip has to be measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from correctnet.devices.base import Moments, Variation, kernel_noise
from correctnet.errors import UserError


def assignment(weight: Tensor, factors: Tensor) -> Tensor:
    """Physical row of each row of weights, (rows,): the assignment of the least sum of |W| |F - 1|.

    Args:
        weight, factors: (outputs, ...), the rows of which are all that is behind the first dimension.
    """
    w, f = (t.detach().flatten(1).double() for t in (weight, factors))
    cost = w.abs().T @ (f - 1).abs()  # row p of the weights on the physical row q
    _, columns = linear_sum_assignment(cost.cpu().numpy())
    return torch.from_numpy(columns).to(weight.device)


@dataclass(frozen=True)
class Remapped(Variation):
    """A device that multiplies weights by factors, with the rows of each layer placed where these harm least.

    Attributes:
        device: the device model; its factors may not depend on the weights.

    Raises:
        UserError: a device whose chips are no such factors.
    """

    device: Variation

    def __post_init__(self) -> None:
        if kernel_noise(self.device) is None:
            raise UserError(
                f"remapping: rows are placed by the factors of a chip, which a {type(self.device).__name__} has not; "
                "it is for the lognormal"
            )

    def sample(self, weight: Tensor, seed: int, layer: int, sample: int) -> Tensor:
        """See `Variation.sample`."""
        with torch.no_grad():
            factors = self.device.sample(torch.ones_like(weight), seed, layer, sample)
            placed = factors.flatten(1)[:, assignment(weight, factors)].view(weight.shape)
        return weight * placed

    def moments(self, weight: Tensor) -> Moments:
        """See `Variation.moments`; those without remapping, which makes the variation smaller."""
        return self.device.moments(weight)

    def factor_moments(self) -> tuple[float, float]:
        """See `Variation.factor_moments`; likewise."""
        return self.device.factor_moments()

    @property
    def level(self) -> float:
        """See `Variation.level`."""
        return self.device.level

    def at(self, level: float) -> Remapped:
        """See `Variation.at`."""
        return Remapped(self.device.at(level))

    def describe(self) -> dict[str, Any]:
        """See `Variation.describe`: the device's, with the mapping."""
        return {**self.device.describe(), "mapping": "rows"}
