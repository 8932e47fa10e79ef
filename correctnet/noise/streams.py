"""Every source of randomness as a function of (seed, purpose, where); no two purposes share a draw.

There are two kinds of draws:

    streams   of generators. The seed of each is a hash of (seed, purpose, *where), with `purpose` one of `PURPOSES`.
              `where` begins with the stage, so that consecutive stages draw from different streams.
    chips     addressed by (seed, layer, sample), see `correctnet.noise.specification`. The 32-bit numbers of chip
              samples are divided into ranges of 2^28, one for each of `CHIPS`, so that training, selection and
              reported evaluation use different chips, however many they use.

The order of the test images is not random: it is the same in every run (`correctnet.datasets.base.TEST_SEED`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import index

import numpy as np
import torch

from correctnet.errors import UserError

# The purposes of streams, and what `where` holds for each. `stage` is the command-line stage that draws, or the library
# function ("fit", "fit_compensators", "compensate").
PURPOSES = {
    "split": "which training images are held out for validation (data set)",
    "held-out": "which images `fit_compensators` holds out when it is given none for validation (stage)",
    "network": "initial weights of a network (stage)",
    "compensators": "initial weights of generators and compensators (stage, layer)",
    "batches": "order of the training images (stage, epoch)",
    "augmentation": "crops and flips of the training images (stage, epoch)",
    "dropout": "draws of layers from torch's global generators during training (stage, epoch)",
    "policy": "initial weights of the search's policy (overhead limit)",
    "actions": "actions that the policy draws (overhead limit)",
    "random-search": "states of the random search (overhead limit)",
    "side-path": "initial weights of a digital path beside a layer (path, layer)",
    "mask": "which weights are protected (layer)",
    "benchmark": "weights and images of benchmarks, and noise of their baseline loops (what)",
}

# The purposes of chips. A purpose's index is the upper four bits of its chips' numbers, so the order must not change.
CHIPS = (
    "test",  # evaluations on test images, Table I
    "validation",  # evaluations on validation images, for choices between settings
    "sweep",  # candidate layers
    "search",  # scores of the search's states
    "sensitivity",  # variation in each layer alone
    "recalibration",  # simulated chips for BatchNorm's statistics
    "train-inject",
    "train-search",  # trainings of the search's states
    "train-compensate",
    "train-finetune",
    "validate-compensate",  # whether trained compensators are kept, see `compensation.judge`
    "train-fit_compensators",
    "validate-fit_compensators",
    "train-distil",
    "train-sidepath",
)
CHIPS_EACH = 1 << 28


def seed_of(seed: int, purpose: str, *where: str | int | float) -> int:
    """Return the seed of a stream: the first 63 bits of SHA-256 of [seed, purpose, *where] as JSON.

    Args:
        seed: the seed of the run, any integer.
        purpose: one of `PURPOSES`.
        where: strings and numbers that distinguish this draw from others of the same purpose.

    Raises:
        ValueError: no such purpose, or a `where` of another type.
    """
    if purpose not in PURPOSES:
        raise ValueError(f"no stream has the purpose {purpose!r} (known: {', '.join(PURPOSES)})")
    for part in where:
        if type(part) not in (str, int, float) or (type(part) is float and not math.isfinite(part)):
            raise ValueError(f"`where` of a stream must be strings and finite numbers, not {part!r}")
    digest = hashlib.sha256(json.dumps([index(seed), purpose, *where]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def torch_generator(seed: int, purpose: str, *where: str | int | float) -> torch.Generator:
    """Return a torch generator on the CPU at the beginning of a stream; arguments as for `seed_of`."""
    return torch.Generator().manual_seed(seed_of(seed, purpose, *where))


def numpy_generator(seed: int, purpose: str, *where: str | int | float) -> np.random.Generator:
    """Return a NumPy generator at the beginning of a stream; arguments as for `seed_of`."""
    return np.random.default_rng(seed_of(seed, purpose, *where))


@contextmanager
def global_generators(
    seed: int, purpose: str, *where: str | int | float, devices: Iterable[torch.device] = ()
) -> Iterator[None]:
    """Put torch's global generators at the beginning of a stream for the length of a block, and restore them after it.

    For code that accepts no generator: initial weights of layers, dropout.

    Args:
        seed, purpose, where: as for `seed_of`.
        devices: devices whose generators to set besides the CPU's; only CUDA devices have one.
    """
    number = seed_of(seed, purpose, *where)
    cuda = sorted({torch.cuda.current_device() if d.index is None else d.index for d in devices if d.type == "cuda"})
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(number)  # torch.manual_seed would seed all devices, those not forked, too
        for device in cuda:
            torch.cuda.default_generators[device].manual_seed(number)
        yield


def first_chip(purpose: str) -> int:
    """Return the number of the first chip sample of a purpose, one of `CHIPS`. Raises ValueError for any other."""
    if purpose not in CHIPS:
        raise ValueError(f"no chips have the purpose {purpose!r} (known: {', '.join(CHIPS)})")
    return CHIPS.index(purpose) * CHIPS_EACH


def chips(purpose: str, count: int, start: int = 0) -> range:
    """Return the numbers of `count` chip samples of a purpose, from its `start`-th on.

    Raises:
        ValueError: no such purpose.
        UserError: the chips are beyond the last of the purpose's 2^28.
    """
    first = first_chip(purpose)
    if start < 0 or count < 0 or start + count > CHIPS_EACH:
        raise UserError(
            f"chips {start} to {start + count - 1} for {purpose}: there are {CHIPS_EACH} for each purpose, "
            f"0 to {CHIPS_EACH - 1}"
        )
    return range(first + start, first + start + count)


def chip(purpose: str, number: int) -> int:
    """Return the number of a purpose's `number`-th chip sample; errors as for `chips`."""
    return chips(purpose, 1, number)[0]
