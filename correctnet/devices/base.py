"""Interface of the device models: what programming a crossbar does to the weights.

A *chip sample* is one draw of all weights of a network, addressed by (seed, sample). The same address gives the same
weights for any batch size, chunk, thread count or process, because the noise is a function of
(seed, layer, sample, element) (`correctnet.noise.specification`). `correctnet.noise.streams` assigns sample numbers to
their uses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import Tensor


class KernelNoise(NamedTuple):
    """Parameters of the noise that the fused kernels draw: factors exp(sigma z + shift), z standard normal.

    Attributes:
        sigma: standard deviation of the factor's logarithm, >= 0.
        shift: mean of the factor's logarithm.
    """

    sigma: float
    shift: float = 0.0


class Variation(ABC):
    """A device model: maps nominal weights to the weights of one chip sample.

    Subclasses implement `sample` and `describe`. Those that settings can select also implement `from_settings` and are
    listed in `correctnet.devices.DEVICES`; those that error suppression can use implement `factor_moments`.
    """

    @abstractmethod
    def sample(self, weight: Tensor, seed: int, layer: int, sample: int) -> Tensor:
        """Return the weights of chip `sample`, differentiable in `weight`, with its shape, dtype and device.

        The result must be a function of the arguments: the same at each call.

        Args:
            weight: nominal weights, of two or more dimensions: (out, in) or (out, in / groups, kh, kw), or as torch
                has them for other kinds of layers.
            seed: 64-bit seed of the simulation.
            layer: index of the crossbar among those of the network.
            sample: number of the chip, in [0, 2^32).
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return the parameters, and the moments that follow from them, for results files."""

    @classmethod
    def from_settings(cls, settings: Any) -> Variation:
        """Make the device from the `variation` section of the settings."""
        raise NotImplementedError(f"{cls.__name__} cannot be made from settings")

    @property
    def kernel_noise(self) -> KernelNoise | None:
        """The noise with which the fused kernels draw exactly the weights of `sample`; None where they cannot."""
        return None

    def factor_moments(self) -> tuple[float, float]:
        """Return the mean and standard deviation of w / w_nominal, which the bound (10) of the paper is made of."""
        raise NotImplementedError(f"{type(self).__name__} does not give the moments of w / w_nominal")


def kernel_noise(device: Any) -> KernelNoise | None:
    """Return `device.kernel_noise`; None for a device that has the methods of a `Variation` without being one."""
    return getattr(device, "kernel_noise", None)
