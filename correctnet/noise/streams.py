"""Where randomness comes from: every draw is a function of (seed, purpose, where), and no two purposes share one.

Two kinds of draws:

    streams   of generators: the seed of each is a hash of (seed, purpose, *where), with `purpose` one of `PURPOSES`.
              Stages that follow one another draw from streams of their own, as `where` begins with the stage.
    chips     addressed by (seed, layer, sample), see `correctnet.noise.specification`: the 32-bit numbers of chip samples are
              divided into ranges of 2^28, one for each of `CHIPS`. What is trained on, chosen on and reported on
              are different chips, whatever the numbers of chips are.

The order of the test images is no draw: it is the same in every run (`correctnet.datasets.base.TEST_SEED`).
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

# The purposes of streams, and where each is used. `stage` is the stage of the command line that draws, or the function
# of the library ("fit", "fit_compensators", "compensate").
PURPOSES = {
    "split": "which training images are held out for validation (data set)",
    "held-out": "which images are held out by `fit_compensators`, given none for validation (stage)",
    "network": "initial weights of a network (stage)",
    "compensators": "initial weights of generators and compensators (stage, layer)",
    "batches": "order of the training images (stage, epoch)",
    "augmentation": "crops and flips of the training images (stage, epoch)",
    "dropout": "whatever layers draw from torch's global generators while they train (stage, epoch)",
    "policy": "initial weights of the search's policy (overhead limit)",
    "actions": "actions that the policy draws (overhead limit)",
    "random-search": "states of the random search (overhead limit)",
    "benchmark": "weights and images of benchmarks, and noise of the loops that they compare with (what)",
}

# The purposes of chips. A purpose's place is the upper four bits of its chips' numbers, so that places must not change.
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
)
CHIPS_EACH = 1 << 28


def seed_of(seed: int, purpose: str, *where: str | int | float) -> int:
    """The seed of a stream: the first 63 bits of SHA-256 of [seed, purpose, *where] as JSON.

    Args:
        seed: the seed of the run, any integer.
        purpose: one of `PURPOSES`.
        where: strings and numbers that tell this draw from others of the same purpose.

    Raises:
        ValueError: no such purpose, or a `where` of another type.
    """
    if purpose not in PURPOSES:
        raise ValueError(f"no stream has the purpose {purpose!r} (known: {', '.join(PURPOSES)})")
    for part in where:
        if type(part) not in (str, int, float) or (type(part) is float and not math.isfinite(part)):
            raise ValueError(f"a stream is told where it is used by strings and finite numbers, not {part!r}")
    digest = hashlib.sha256(json.dumps([index(seed), purpose, *where]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def torch_generator(seed: int, purpose: str, *where: str | int | float) -> torch.Generator:
    """A torch generator on the CPU at the beginning of a stream; arguments as for `seed_of`."""
    return torch.Generator().manual_seed(seed_of(seed, purpose, *where))


def numpy_generator(seed: int, purpose: str, *where: str | int | float) -> np.random.Generator:
    """A NumPy generator at the beginning of a stream; arguments as for `seed_of`."""
    return np.random.default_rng(seed_of(seed, purpose, *where))


@contextmanager
def global_generators(
    seed: int, purpose: str, *where: str | int | float, devices: Iterable[torch.device] = ()
) -> Iterator[None]:
    """Torch's global generators at the beginning of a stream, and afterwards as they were before.

    For what takes no generator: initial weights of layers, dropout.

    Args:
        seed, purpose, where: as for `seed_of`.
        devices: whose generators are meant beside the CPU's; those that are not CUDA devices are passed over.
    """
    number = seed_of(seed, purpose, *where)
    cuda = sorted({torch.cuda.current_device() if d.index is None else d.index for d in devices if d.type == "cuda"})
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(number)  # torch.manual_seed would seed all devices, those not forked, too
        for device in cuda:
            torch.cuda.default_generators[device].manual_seed(number)
        yield


def first_chip(purpose: str) -> int:
    """The number of the first chip sample of a purpose, one of `CHIPS`. Raises ValueError for any other."""
    if purpose not in CHIPS:
        raise ValueError(f"no chips have the purpose {purpose!r} (known: {', '.join(CHIPS)})")
    return CHIPS.index(purpose) * CHIPS_EACH


def chips(purpose: str, count: int, start: int = 0) -> range:
    """The numbers of `count` chip samples of a purpose, from its `start`-th on.

    Raises:
        ValueError: no such purpose.
        UserError: a purpose has 2^28 chips, and these are beyond its last.
    """
    first = first_chip(purpose)
    if start < 0 or count < 0 or start + count > CHIPS_EACH:
        raise UserError(
            f"chips {start} to {start + count - 1} for {purpose}: there are {CHIPS_EACH} for each purpose, "
            f"0 to {CHIPS_EACH - 1}"
        )
    return range(first + start, first + start + count)


def chip(purpose: str, number: int) -> int:
    """The number of a purpose's `number`-th chip sample; errors as for `chips`."""
    return chips(purpose, 1, number)[0]
