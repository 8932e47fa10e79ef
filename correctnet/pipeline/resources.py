"""Threads, memory and time that each job asks for. Partitions and accounts are set in profiles.

Measured on 2 cores of an AMD EPYC (Zen 4), from the `benchmark:` files of a run of every stage on every pair
(results/reference/resources.csv; tests/test_layout.py compares the two). A retry asks for more: it continues where
the job before it was killed.
"""

from __future__ import annotations

import math

from correctnet.pipeline.specs import STAGES, Stage
from correctnet.pipeline.workload import Costs, search_state
from correctnet.settings import Network, Settings

# Peak memory in MiB: of a process with a LeNet-5 and small data, what training and simulating a VGG16 adds to that, and
# what reading a data set adds.
PROCESS = 1000
VGG16 = 900
DATA = {"digits": 0, "mnist": 300, "cifar10": 900, "cifar100": 900}
# Host memory of CUDA, in MiB; not measured yet.
CUDA = 4000


def _vgg16_share(network: Network) -> float:
    """Fraction of the multiply-adds and weights of the usual VGG16, whose widths add up to 4736, approximately."""
    return (sum(network.widths) / 4736) ** 2 if network.widths else 1.0


def work_of(network: Network, channels: int) -> tuple[float, float, int]:
    """Multiply-adds of an image of 32 x 32 pixels, number of weights, and number of crossbar layers."""
    if network.name == "vgg16":
        return 313e6 * _vgg16_share(network), 15e6 * _vgg16_share(network), 15
    a, b, c, d = network.widths or (6, 16, 120, 84)
    first, second, linear = 25 * channels * a, 25 * a * b, 25 * b * c + c * d + 10 * d
    return 28 * 28 * first + 10 * 10 * second + linear, first + second + linear, 5


def training_threads(settings: Settings) -> int:
    """8 threads for VGG16; LeNet-5 and a narrow VGG16 are too small for more than one."""
    multiply_adds, _, _ = work_of(settings.network, channels=3)
    return 8 if multiply_adds > 1e8 else 1


def costs(settings: Settings) -> Costs:
    """Seconds of one thread on the machine above."""
    channels = 1 if settings.data.dataset in ("digits", "mnist") else 3
    work, weights, layers = work_of(settings.network, channels)
    return Costs(train=1.5e-4 + 6e-11 * work, test=1e-5 + 2.5e-11 * work, sample=4e-9 * weights, layers=layers)


def memory_mib(settings: Settings, attempt: int = 1, *, cuda: bool = False) -> int:
    """Memory in MiB, 50 % more with every retry."""
    need = PROCESS + DATA[settings.data.dataset] + (VGG16 if settings.network.name == "vgg16" else 0)
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
