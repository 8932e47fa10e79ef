"""Random streams: one for each purpose, each a function of the seed, the purpose and where it is used."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import torch


def seed_of(seed: int, purpose: str, *where: object) -> int:
    """A 63-bit seed that `seed`, `purpose` and `where` (JSON values) determine."""
    digest = hashlib.sha256(json.dumps([seed, purpose, *where]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def torch_generator(seed: int, purpose: str, *where: object) -> torch.Generator:
    """A torch generator on the CPU, seeded by `seed_of`."""
    return torch.Generator().manual_seed(seed_of(seed, purpose, *where))


def numpy_generator(seed: int, purpose: str, *where: object) -> np.random.Generator:
    """A NumPy generator, seeded by `seed_of`."""
    return np.random.default_rng(seed_of(seed, purpose, *where))
