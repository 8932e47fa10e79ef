"""Blocks that networks are made of."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


class Block(nn.Sequential):
    """One conv or linear layer `layer`, and what follows it: `norm` and `relu`, in either order, and `dropout`.

    One analog layer with the digital functions that follow it, so that a compensator can be placed after the layer, or
    after its BatchNorm and ReLU.
    """

    def __init__(
        self,
        layer: nn.Module,
        norm: nn.Module | None = None,
        relu: bool = True,
        norm_first: bool = True,
        dropout: float = 0.0,
    ):
        after = [("norm", norm), ("relu", nn.ReLU() if relu else None)]
        parts = [("layer", layer), *(after if norm_first else reversed(after))]
        parts.append(("dropout", nn.Dropout(dropout) if dropout else None))
        super().__init__(OrderedDict((name, part) for name, part in parts if part is not None))


def parameter_count(model: nn.Module) -> int:
    """Number of parameters, weights and biases."""
    return sum(p.numel() for p in model.parameters())


def original_parameters(model: nn.Module) -> int:
    """Number of parameters without those added in digital hardware (`digital_children`): compensation and paths."""
    added = {
        id(p): p.numel()
        for module in model.modules()
        for name in getattr(module, "digital_children", ())
        for p in module.get_submodule(name).parameters()
    }
    return parameter_count(model) - sum(added.values())
