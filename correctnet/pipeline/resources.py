"""Threads, memory and time that each job asks for. Partitions and accounts are set in profiles.

Measured on 2 cores of an AMD EPYC (Zen 4), from the `benchmark:` files of a run of every stage on every pair
(results/reference/resources.csv; tests/test_layout.py compares the two). A retry asks for more: it continues where
the job before it was killed.
"""

from __future__ import annotations

import math

from correctnet.networks import NETWORKS, Architecture, Work, some_work
from correctnet.pipeline.specs import STAGES, Stage
from correctnet.pipeline.workload import Costs, facts, search_state
from correctnet.settings import Settings

# Peak memory in MiB of a process with a small network and small data.
PROCESS = 1000
# Host memory of CUDA, in MiB; not measured yet.
CUDA = 4000


def work_of(settings: Settings) -> Work:
    """The size of a row's network on its images."""
    images = facts(settings)
    if settings.network.name is None:
        work = some_work((), images.channels)
    else:
        network = NETWORKS[settings.network.name]
        work = network.work(settings.network.widths or network.widths, images.channels)
    return work._replace(multiply_adds=work.multiply_adds * images.height * images.width / (32 * 32))


def training_threads(settings: Settings) -> int:
    """8 threads for a VGG16 of the usual widths; smaller networks are too small for more than one."""
    return 8 if work_of(settings).multiply_adds > 1e8 else 1


def costs(settings: Settings) -> Costs:
    """Seconds of one thread on the machine above."""
    work = work_of(settings)
    train, test = 1.5e-4 + 6e-11 * work.multiply_adds, 1e-5 + 2.5e-11 * work.multiply_adds
    return Costs(train=train, test=test, sample=4e-9 * work.weights, layers=work.layers)


def memory_mib(settings: Settings, attempt: int = 1, *, cuda: bool = False) -> int:
    """Memory in MiB, 50 % more with every retry."""
    images = facts(settings)
    pixels = images.channels * images.height * images.width
    data = 1.3 * 4 * pixels * (images.train + images.test) / 2**20  # float32, and reading it
    name = settings.network.name
    need = PROCESS + data + (Architecture.memory if name is None else NETWORKS[name].memory)
    return math.ceil((need + cuda * CUDA) * (1 + 0.5 * (attempt - 1)))


def minutes(
    stage: Stage, settings: Settings, attempt: int = 1, *, chips: int | None = None, state: bool = False
) -> int:
    """Time limit in minutes: four times the expected time plus ten, times the number of the attempt.

    Args:
        stage: the stage.
        settings: of its row.
        attempt: 1, and one more with every retry.
        chips: of one job of `evaluate`.
        state: one state of a search instead of all of it.
    """
    cost = costs(settings)
    seconds = search_state(settings, cost) if state else STAGES[stage].seconds(settings, cost, chips)
    return attempt * math.ceil(10 + 4 * seconds / 60)
