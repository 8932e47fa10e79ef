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

from correctnet.noise.arrays import ArrayNoise


class KernelNoise(NamedTuple):
    """Parameters of the noise that the fused kernels draw: factors exp(sigma z + shift), z standard normal.

    Attributes:
        sigma: standard deviation of the factor's logarithm, >= 0.
        shift: mean of the factor's logarithm.
    """

    sigma: float
    shift: float = 0.0


class Moments(NamedTuple):
    """Mean and standard deviation of each weight over all chips: float64, in the shape of the weight."""

    mean: Tensor
    std: Tensor


class Variation(ABC):
    """A device model: maps nominal weights to the weights of one chip sample.

    Subclasses implement `sample` and `describe`. Those that settings can select also implement `from_settings` and are
    listed in `correctnet.devices.DEVICES`; those that error suppression can use implement `factor_moments`. A device
    whose weights are Gaussian implements `moments` instead of `sample`
    (`correctnet.devices.gaussian.GaussianVariation`), and the kernels draw it.
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

    @property
    def has_arrays(self) -> bool:
        """Whether the kernels draw exactly the weights of `sample` from `array_noise`."""
        return False

    def array_noise(self, weight: Tensor, layer: int) -> ArrayNoise:
        """Return the arrays from which the kernels draw the weights of a layer; only with `has_arrays`.

        Args:
            weight, layer: as for `sample`.
        """
        raise NotImplementedError(f"{type(self).__name__} is not drawn from arrays")

    def factor_moments(self) -> tuple[float, float]:
        """Return the mean and standard deviation of w / w_nominal, which the bound (10) of the paper is made of."""
        raise NotImplementedError(f"{type(self).__name__} does not give the moments of w / w_nominal")

    def moments(self, weight: Tensor) -> Moments:
        """Return mean and standard deviation of the weights of working devices over all chips.

        Args:
            weight: as for `sample`; any floating-point type. The result is computed in float64.
        """
        raise NotImplementedError(f"{type(self).__name__} does not give the moments of its weights")

    def chip_moments(self, weight: Tensor) -> Moments:
        """Return `moments` with stuck devices among the chips' devices."""
        return self.moments(weight)

    def bound(self, weight: Tensor, k: float = 1.0) -> float:
        """Return lambda of (10) for one layer: k / (m + 3 s), m = <w, M> / <w, w> and s = ||S|| / ||w||.

        M and S are `chip_moments`. For a factor of the same distribution on all weights this is (10).

        Args:
            weight: nominal weights of the layer.
            k: Lipschitz constant that the layer must keep under variation; 1 in the paper.

        Raises:
            ValueError: all weights are 0.
        """
        mean, deviation = self.relative_moments(weight)
        return k / (mean + 3 * deviation)

    def relative_moments(self, weight: Tensor) -> tuple[float, float]:
        """Return (<w, M> / <w, w>, ||S|| / ||w||) of a layer, M and S being `chip_moments`.

        Raises:
            ValueError: all weights are 0.
        """
        w = weight.detach().double()
        energy = w.square().sum().item()
        if energy == 0:
            raise ValueError("the moments of a layer relative to its weights: all weights are 0")
        mean, std = self.chip_moments(weight.detach())
        return (w * mean).sum().item() / energy, (std.square().sum().item() / energy) ** 0.5

    @property
    def level(self) -> float:
        """How much the device varies, in its own measure; the axis of curves over variation."""
        raise NotImplementedError(f"{type(self).__name__} has no level")

    def at(self, level: float) -> Variation:
        """Return the same device at another level."""
        raise NotImplementedError(f"{type(self).__name__} has no level")


def kernel_noise(device: Any) -> KernelNoise | None:
    """Return `device.kernel_noise`; None for a device that has the methods of a `Variation` without being one."""
    return getattr(device, "kernel_noise", None)


def has_arrays(device: Any) -> bool:
    """Return `device.has_arrays`; False as for `kernel_noise`."""
    return getattr(device, "has_arrays", False)


def drawn_by_kernels(device: Any) -> bool:
    """Return whether the kernels draw exactly the weights of `device.sample`."""
    return kernel_noise(device) is not None or has_arrays(device)
