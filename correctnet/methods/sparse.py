"""A sparse digital path beside each layer (the idea of the hybrid RRAM/SRAM architecture).

    path(x) = (M * S) x        M: zeros and ones in the shape of the layer's weight, chosen before the training

S starts at 0, and is 0 wherever M is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class SparseResidual(nn.Module):
    """(M * S) x: a layer like the one beside it, without a bias, of whose weights only those in a mask are trained."""

    def __init__(self, layer: nn.Module, mask: Tensor | None):
        super().__init__()
        self.layer = like(layer)
        nn.init.zeros_(self.layer.weight)
        whole = torch.ones(self.layer.weight.shape, dtype=torch.bool)
        self.register_buffer("mask", whole if mask is None else mask.reshape(whole.shape).clone())

    @classmethod
    def beside(cls, layers: Mapping[str, nn.Module], *, masks: Mapping[str, Tensor], **_: Any) -> dict[str, nn.Module]:
        """Make the paths of all layers, by name."""
        return {name: cls(m, masks.get(name)).to(m.weight.device, m.weight.dtype) for name, m in layers.items()}

    @property
    def trained(self) -> dict[nn.Parameter, Tensor]:
        """Parameters of which only the weights in a mask are trained: a step moves none whose gradients are all 0."""
        return {self.layer.weight: self.mask}

    @property
    def stored(self) -> int:
        """Weights in digital memory: those in the mask. Their positions are not counted."""
        return int(self.mask.sum())

    @property
    def density(self) -> float:
        """Fraction of the modules' multiplications that are done."""
        return float(self.mask.double().mean())

    def forward(self, x: Tensor) -> Tensor:
        """x -> (M * S) x."""
        return self.layer(x)


def like(layer: nn.Module) -> nn.Module:
    """A linear layer or a convolution of the geometry of another one, without a bias, on the CPU in float32."""
    made: dict[str, Any] = {"bias": False, "device": "cpu", "dtype": torch.float32}
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, layer.out_features, **made)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(layer.kernel_size) - 1]
    made |= {key: getattr(layer, key) for key in ("stride", "padding", "dilation", "groups", "padding_mode")}
    return kind(layer.in_channels, layer.out_channels, layer.kernel_size, **made)
