"""Protected weights: exact on every chip, e.g. because a digital copy of them is kept."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from correctnet.devices.base import Moments, Variation, drawn_by_kernels, kernel_noise
from correctnet.errors import UserError
from correctnet.noise.arrays import ArrayNoise, rounded


@dataclass(frozen=True, eq=False)
class Protected(Variation):
    """A device on which some weights of some layers are exact: their nominal values, without variation or faults.

    The other weights of a chip are the same to the bit as without protection.

    Attributes:
        device: the device model of all other weights.
        masks: by index of the layer, a bool tensor in the shape of its weight, True where a weight is protected.

    Raises:
        UserError: a mask that is no bool tensor.
    """

    device: Variation
    masks: Mapping[int, Tensor]

    def __post_init__(self) -> None:
        for layer, mask in self.masks.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise UserError(f"the mask of layer {layer} must be a bool tensor, not {kind}")
        object.__setattr__(self, "masks", {layer: mask.clone() for layer, mask in self.masks.items()})

    def mask(self, weight: Tensor, layer: int) -> Tensor | None:
        """Return the mask of a layer on the device of its weight; None where nothing is protected.

        Raises:
            UserError: the mask has another shape than the weight.
        """
        mask = self.masks.get(layer)
        if mask is None:
            return None
        if mask.shape != weight.shape:
            raise UserError(
                f"the mask of layer {layer} is {tuple(mask.shape)}, but the layer's weight {tuple(weight.shape)}"
            )
        return mask.to(weight.device)

    def sample(self, weight: Tensor, seed: int, layer: int, sample: int) -> Tensor:
        """See `Variation.sample`. The gradient of a protected weight is 1."""
        mask, drawn = self.mask(weight, layer), self.device.sample(weight, seed, layer, sample)
        return drawn if mask is None else torch.where(mask, weight, drawn)

    @property
    def has_arrays(self) -> bool:
        """See `Variation.has_arrays`."""
        return type(self).sample is Protected.sample and drawn_by_kernels(self.device)

    def array_noise(self, weight: Tensor, layer: int) -> ArrayNoise:
        """See `Variation.array_noise`."""
        weight = weight.detach()
        mask, factor = self.mask(weight, layer), kernel_noise(self.device)
        nominal, one = rounded(weight, torch.ones_like(weight))
        if factor is None:
            noise = self.device.array_noise(weight, layer)
        else:
            noise = ArrayNoise(nominal, one, factor.sigma, factor.shift)
        if mask is None:
            return noise
        exact = torch.full((), -0.0, device=weight.device)
        mean, spread = torch.where(mask, nominal, noise.mean), torch.where(mask, exact, noise.spread)
        return replace(noise, mean=mean, spread=spread)

    def moments(self, weight: Tensor) -> Moments:
        """See `Variation.moments`; those of a weight that is not protected, as the layer is not known."""
        return self.device.moments(weight)

    def chip_moments(self, weight: Tensor) -> Moments:
        """See `Variation.chip_moments`; likewise."""
        return self.device.chip_moments(weight)

    def factor_moments(self) -> tuple[float, float]:
        """See `Variation.factor_moments`; likewise."""
        return self.device.factor_moments()

    @property
    def level(self) -> float:
        """See `Variation.level`."""
        return self.device.level

    def at(self, level: float) -> Protected:
        """See `Variation.at`."""
        return Protected(self.device.at(level), self.masks)

    def describe(self) -> dict[str, Any]:
        """See `Variation.describe`: the device's, with the number of protected weights and a digest of the masks."""
        digest = hashlib.blake2b(digest_size=8)
        for layer, mask in sorted(self.masks.items()):
            digest.update(f"{layer}:{tuple(mask.shape)};".encode())
            digest.update(mask.cpu().contiguous().numpy().tobytes())
        protected = sum(int(mask.sum()) for mask in self.masks.values())
        return {**self.device.describe(), "protected": protected, "masks": digest.hexdigest()}
