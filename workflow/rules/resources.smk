"""What each job asks for: threads, memory, time, a GPU. Partitions and accounts stand in profiles.

Measured on 2 cores of an AMD EPYC (Zen 4), from the `benchmark:` files of a run of every stage on every pair
(results/reference/resources.csv; tests/test_workflow.py holds what is asked for against it). A retry asks for more: it
goes on where the job before it was killed.
"""

import math

from correctnet.pipeline.specs import STAGES
from correctnet.pipeline.workload import Costs, search_state

# Peak memory in MiB: of a process with a LeNet-5 and small data, what VGG16's trainings and simulations take beside
# that, and what a data set takes while it is read.
PROCESS = 1000
VGG16 = 900
DATA = {"digits": 0, "mnist": 300, "cifar10": 900, "cifar100": 900}
# CUDA's own host memory; not measured yet.
CUDA = 4000


def vgg16_share(network):
    """Of the multiply-adds and weights of the usual VGG16, whose widths add up to 4736, roughly."""
    return (sum(network.widths) / 4736) ** 2 if network.widths else 1.0


def work_of(network, channels):
    """Multiply-adds of an image of 32 x 32 pixels, weights, and crossbar layers."""
    if network.name == "vgg16":
        return 313e6 * vgg16_share(network), 15e6 * vgg16_share(network), 15
    a, b, c, d = network.widths or (6, 16, 120, 84)
    first, second, linear = 25 * channels * a, 25 * a * b, 25 * b * c + c * d + 10 * d
    return 28 * 28 * first + 10 * 10 * second + linear, first + second + linear, 5


def training_threads(wildcards):
    """LeNet-5 and a narrow VGG16 are too small for more than one thread; VGG16 takes what there is."""
    multiply_adds, _, _ = work_of(settings_of(wildcards).network, channels=3)
    return 8 if multiply_adds > 1e8 else 1


def costs(settings):
    """Seconds of one thread on the machine above; the time asked for is a multiple of what follows from them."""
    channels = 1 if settings.data.dataset in ("digits", "mnist") else 3
    work, weights, layers = work_of(settings.network, channels)
    return Costs(train=1.5e-4 + 6e-11 * work, test=1e-5 + 2.5e-11 * work, sample=4e-9 * weights, layers=layers)


def mem_mb(wildcards, attempt):
    """MiB, half as much again with every retry."""
    settings = settings_of(wildcards)
    need = PROCESS + DATA[settings.data.dataset] + (VGG16 if settings.network.name == "vgg16" else 0)
    return math.ceil((need + GPUS * CUDA) * (1 + 0.5 * (attempt - 1)))


def runtime(stage):
    """A resource function: minutes, four times what the job takes and ten more, doubled and trebled by retries."""

    def minutes(wildcards, attempt):
        settings = settings_of(wildcards)
        cost = costs(settings)
        if stage == "state":
            seconds = search_state(settings, cost)
        else:
            chips = int(wildcards.stop) - int(wildcards.start) if stage == "evaluate" else None
            seconds = STAGES[stage].seconds(settings, cost, chips)
        return attempt * math.ceil(10 + 4 * seconds / 60)

    return minutes
