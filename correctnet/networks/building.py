"""Networks by name."""

from __future__ import annotations

from torch import nn

from correctnet.errors import UserError
from correctnet.networks import NETWORKS
from correctnet.noise import streams


def build(name: str, classes: int, channels: int, seed: int = 0, stage: str = "build", **options: object) -> nn.Module:
    """Make a network by name, its weights drawn from `seed`; torch's global generator is left unchanged.

    `options` are arguments of the function that makes it. Each `stage` that begins with new weights has its own.
    Raises UserError for an unknown name.
    """
    if name not in NETWORKS:
        raise UserError(f"unknown network {name!r} (known: {', '.join(NETWORKS)})")
    with streams.global_generators(seed, "network", stage):
        return NETWORKS[name].make()(classes, channels, **options)
