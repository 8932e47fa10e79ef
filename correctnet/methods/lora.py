"""A low-rank digital path beside each layer (the idea of AHWA-LoRA).

    path(x) = B A x        A: rank x (inputs of the layer's kernel), B: outputs x rank

For a convolution A is one with the layer's window and `rank` outputs, and B one of 1 x 1. B starts at 0. The published
path has a constant factor of 32 / 8, which for Adam is a larger learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from correctnet.noise import streams


class LowRank(nn.Sequential):
    """B A x, two layers without biases."""

    def __init__(self, layer: nn.Module, rank: int):
        down, up = factors(layer, rank)
        super().__init__(down, up)
        nn.init.zeros_(self[1].weight)

    @classmethod
    def beside(cls, layers: Mapping[str, nn.Module], *, rank: int, seed: int, **_: Any) -> dict[str, nn.Module]:
        """Make the paths of all layers, by name."""
        made = {}
        for name, layer in layers.items():
            with streams.global_generators(seed, "side-path", "lora", name):
                made[name] = cls(layer, rank).to(layer.weight.device, layer.weight.dtype)
        return made

    @property
    def stored(self) -> int:
        """Weights in digital memory: rank (inputs + outputs)."""
        return sum(part.weight.numel() for part in self)

    @property
    def density(self) -> float:
        """Fraction of the modules' multiplications that are done."""
        return 1.0

    def forward(self, x: Tensor) -> Tensor:
        """x -> B A x."""
        return self[1](self[0](x))


def factors(layer: nn.Module, rank: int) -> tuple[nn.Module, nn.Module]:
    """A and B for a layer, as modules without biases: linear ones, or a convolution with the layer's window and 1 x 1.

    Drawn on the CPU in float32 from torch's global generator.
    """
    drawn: dict[str, Any] = {"bias": False, "device": "cpu", "dtype": torch.float32}
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, rank, **drawn), nn.Linear(rank, layer.out_features, **drawn)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(layer.kernel_size) - 1]
    window = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    down = kind(layer.in_channels, rank, layer.kernel_size, **window, padding_mode=layer.padding_mode, **drawn)
    return down, kind(rank, layer.out_channels, 1, **drawn)
