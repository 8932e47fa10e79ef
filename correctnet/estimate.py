"""How long a run may take, from a few seconds of measurement on the machine at hand."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from correctnet import models, variation
from correctnet.analog import analog_candidates, convert, program, programmed
from correctnet.config import Config, Settings
from correctnet.engine import Engine, Precision, Unsupported
from correctnet.errors import UserError

# Images of the training and test sets; what a setting leaves open means all of them.
SIZES = {"digits": (1438, 359), "mnist": (60000, 10000), "cifar10": (50000, 10000), "cifar100": (50000, 10000)}


def _seconds(work: Callable[[], object], at_least: float = 0.2) -> float:
    """Seconds a call, the best of several, after one that does not count."""
    work()
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < at_least or best == float("inf"):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def costs(settings: Settings) -> dict[str, float]:
    """Seconds on one thread: an image trained, an image tested with variation, a chip sampled for training."""
    s = settings
    channels = 1 if s.data.dataset in ("digits", "mnist") else 3
    options = {"widths": s.network.widths or models.LENET5_WIDTHS}
    if s.network.name == "vgg16":
        options = {"batchnorm": s.network.batchnorm}
    model = models.build(s.network.name, 100 if s.data.dataset == "cifar100" else 10, channels, **options)
    images = torch.randn(64 if s.network.name == "vgg16" else 128, channels, 32, 32)
    labels = torch.zeros(len(images), dtype=torch.int64)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=s.pretrain.precision == "bfloat16"):
            logits = model.train()(images)
        F.cross_entropy(logits.float(), labels).backward()

    # One layer stands for all: the cost of sampling is proportional to the number of weights.
    layer = min((m for _, m in analog_candidates(model)), key=lambda m: abs(m.weight.numel() - 50000))
    analog = convert(layer, variation.make(s.variation))
    weights = sum(m.weight.numel() for _, m in analog_candidates(model))

    def sample() -> None:
        program(analog, 0)
        analog._cached = None
        analog.chip_weight()

    network = convert(model.eval(), variation.LogNormalVariation(max(s.variation.sigma, 0.1)))
    test = _test_seconds(network, images, s.montecarlo.precision)
    with torch.no_grad():
        sampling = _seconds(sample) * weights / layer.weight.numel()
    return {
        "train": _seconds(step) / len(images),
        "test": test,
        "sample": sampling,
        "layers": len(list(analog_candidates(model))),
    }


def _test_seconds(analog: nn.Module, images: Tensor, precision: Precision) -> float:
    """An image on one chip, its share of drawing the chip included."""
    labels = torch.zeros(len(images), dtype=torch.int64)
    try:
        engine = Engine(analog, images, precision=precision)
    except Unsupported:
        with torch.no_grad(), programmed(analog, 0):
            return _seconds(lambda: analog(images)) / len(images)
    chips = [0] if len(images) < 100 else list(range(10))
    return _seconds(lambda: engine.count_correct(images, labels, chips)) / (len(images) * len(chips))


def stage_seconds(config: Config, pair: str) -> dict[str, float]:
    """Estimated seconds of each stage of a pair, all of its rows together, each shared run counted once."""
    own = config.settings(pair)
    cost = costs(own)
    train_images, test_images = SIZES[own.data.dataset]
    validation = round(own.data.validation * train_images)
    train_images -= validation
    seen: set[tuple[str, ...]] = set()
    total: dict[str, float] = {}

    def add(stage: str, key: str, seconds: float) -> None:
        if (stage, key) not in seen:
            seen.add((stage, key))
            total[stage] = total.get(stage, 0.0) + seconds

    for name in config.rows_of(pair):
        s, row = config.settings(pair, name), config.rows[name]
        # A training with variation draws a chip a batch on top of its steps.
        chip_batches = cost["sample"] / s.compensate.batch
        add("pretrain", s.canonical("pretrain"), s.pretrain.epochs * train_images * cost["train"])
        if row.evaluate == "inject":
            seconds = s.inject.epochs * train_images * (cost["train"] + cost["sample"] / s.inject.batch)
            add("inject", s.canonical("inject"), seconds)
        if row.evaluate in ("suppress", "compensate"):
            add("suppress", s.canonical("suppress"), s.suppress.epochs * train_images * cost["train"])
        if row.evaluate == "compensate":
            images = s.sweep.images or validation
            chips = s.sweep.chips * cost["layers"]
            add("sweep", s.canonical("sweep"), chips * images * cost["test"])
            per_image = s.compensate.chips_per_batch * (cost["train"] + chip_batches)
            if s.search.strategy != "all":
                state = s.search.train_epochs * (s.search.train_images or train_images) * per_image
                state += s.search.chips * (s.search.images or validation) * cost["test"]
                searches = len(s.search.limits) * s.search.evaluations
                add("search", s.canonical("search") + s.canonical("sweep"), searches * state)
            key = s.canonical("compensate") + s.canonical("search") + s.canonical("sweep")
            add("compensate", key, s.compensate.epochs * train_images * per_image)
        chips = s.evaluate.chips + 1 + row.curve * len(s.evaluate.sigmas) * s.evaluate.curve_chips
        images = s.evaluate.images or test_images
        add("evaluate", name, chips * images * cost["test"])
    return total


def report(config: Config, run: str, cores: int) -> str:
    """The estimate for a run as lines of text. Leaves torch with one thread."""
    if run not in config.runs:
        raise UserError(f"no run {run!r} (runs: {', '.join(config.runs)})")
    # One thread, so that neither the other core nor what else runs there enters; stages keep all cores busy.
    torch.set_num_threads(1)
    lines, everything = [], 0.0
    for pair in config.runs[run]:
        stages = {stage: seconds / cores for stage, seconds in stage_seconds(config, pair).items()}
        everything += sum(stages.values())
        parts = ", ".join(f"{stage} {_duration(seconds)}" for stage, seconds in stages.items())
        lines.append(f"  {pair}: about {_duration(sum(stages.values()))} ({parts})")
    head = f"{run}: about {_duration(everything)} on {cores} cores, from a few seconds of measurement on one of them;"
    return "\n".join([f"{head} what is done already is not done again", *lines])


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def main() -> None:
    """Print the estimate for --run of the configuration on standard input (JSON), as the workflow does at its start."""
    from correctnet.stages import available_cpus

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--run", required=True)
    parser.add_argument("--cores", type=int, default=available_cpus())
    arguments = parser.parse_args()
    cores = min(arguments.cores, available_cpus())
    print(report(Config.check(json.load(sys.stdin)), arguments.run, cores), file=sys.stderr)


if __name__ == "__main__":
    main()
