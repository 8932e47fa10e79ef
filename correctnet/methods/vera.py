"""A digital path through projections that all layers share (the idea of VeRA+).

    path(x) = b * ( B ( d * ( A x ) ) )        A: rank x (inputs of the layer's kernel), B: outputs x rank

A and B are drawn once from the seed and never trained. Each layer uses the first rows and columns that it needs, so
that only the vectors d (rank) and b (outputs) of each layer are its own. b starts at 0, d at 0.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from correctnet.methods.lora import factors
from correctnet.noise import streams

START = 0.1


class SharedProjections(nn.Module):
    """b * (B (d * (A x))), with A and B frozen."""

    def __init__(self, layer: nn.Module, a: Tensor, b: Tensor):
        super().__init__()
        rank = len(a)
        self.down, self.up = factors(layer, rank)
        inputs, outputs = self.down.weight[0].numel(), len(self.up.weight)
        with torch.no_grad():
            # Unit variance of A x for inputs of unit variance, and of B y.
            self.down.weight.copy_(a[:, :inputs].reshape(self.down.weight.shape) / math.sqrt(inputs))
            self.up.weight.copy_(b[:outputs].reshape(self.up.weight.shape) / math.sqrt(rank))
        for part in (self.down, self.up):
            part.weight.requires_grad_(False)
        axes = self.down.weight.dim() - 2
        self.d = nn.Parameter(torch.full((rank, *[1] * axes), START))
        self.b = nn.Parameter(torch.zeros(outputs, *[1] * axes))

    @classmethod
    def beside(cls, layers: Mapping[str, nn.Module], *, rank: int, seed: int, **_: Any) -> dict[str, nn.Module]:
        """Make the paths of all layers, by name, with A and B of the largest layer."""
        if not layers:
            return {}
        inputs = max(layer.weight[0].numel() * getattr(layer, "groups", 1) for layer in layers.values())
        outputs = max(len(layer.weight) for layer in layers.values())
        generator = streams.torch_generator(seed, "side-path", "vera")
        a, b = torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)
        return {name: cls(m, a, b).to(m.weight.device, m.weight.dtype) for name, m in layers.items()}

    @property
    def stored(self) -> int:
        """Weights in digital memory: rank + outputs, as the seed makes A and B again."""
        return self.d.numel() + self.b.numel()

    @property
    def density(self) -> float:
        """Fraction of the modules' multiplications that are done."""
        return 1.0

    def forward(self, x: Tensor) -> Tensor:
        """x -> b * (B (d * (A x)))."""
        return self.b * self.up(self.d * self.down(x))
