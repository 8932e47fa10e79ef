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

from correctnet import devices
from correctnet.crossbar.convert import convert, program, programmed
from correctnet.crossbar.kinds import crossbars
from correctnet.crossbar.layers import analog_layers
from correctnet.datasets import own
from correctnet.engine.engine import Engine, Unsupported
from correctnet.errors import UserError
from correctnet.evaluation.simulation import Simulation
from correctnet.machine import available_cpus
from correctnet.networks import NETWORKS
from correctnet.networks.building import build, build_own
from correctnet.noise import streams
from correctnet.pipeline import resources, workload
from correctnet.pipeline.config import Config
from correctnet.pipeline.specs import STAGES, Stage, lineage
from correctnet.pipeline.workload import Costs
from correctnet.precision import Precision, products
from correctnet.progress import duration
from correctnet.settings import Settings


def _seconds(work: Callable[[], object], at_least: float = 0.2) -> float:
    """Seconds a call, the best of several, after one that does not count."""
    work()
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < at_least or best == float("inf"):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def costs(settings: Settings) -> Costs:
    """What training and testing cost on this machine, measured."""
    s = settings
    if s.data.facts() is None:
        own.read(s.data.kind, s.data.place)  # this process knows numbers and sizes from now on
    facts, network = workload.facts(s), s.network
    shape = facts.channels, facts.height, facts.width
    if network.factory is not None:
        model = build_own(network.factory, network.options, facts.classes, shape)
    else:
        options = NETWORKS[network.name].options(network.widths, network.batchnorm, network.dropout)
        model = build(network.name, facts.classes, facts.channels, **options)
    size = 64 if resources.work_of(s).multiply_adds > 1e8 else 128
    generator = streams.torch_generator(0, "benchmark", "estimate")
    images = torch.randn(size, *shape, generator=generator)
    labels = torch.zeros(len(images), dtype=torch.int64)

    def step() -> None:
        with products(s.pretrain.precision, "cpu"):
            logits = model.train()(images)
        F.cross_entropy(logits.float(), labels).backward()

    # One layer stands for all: the cost of sampling is proportional to the number of weights.
    held = crossbars(model)
    layer = min(held, key=lambda each: abs(each.weight.numel() - 50000))
    analog = convert(layer.module, devices.make(s.variation))
    drawn = next(own for own in analog_layers(analog) if own.parameter == layer.parameter)
    weights = sum(each.weight.numel() for each in held)

    def sample() -> None:
        program(analog, 0)
        drawn.chip_weight()

    network = convert(model.eval(), devices.make(s.variation.at(max(s.variation.level, 0.1))))
    test = _test_seconds(network, images, s.montecarlo.precision)
    with torch.no_grad():
        sampling = _seconds(sample) * weights / layer.weight.numel()
    return Costs(_seconds(step) / len(images), test, sampling, len(held))


def _test_seconds(analog: nn.Module, images: Tensor, precision: Precision) -> float:
    """An image on one chip, its share of drawing the chip included."""
    labels = torch.zeros(len(images), dtype=torch.int64)
    precision = Simulation(precision=precision).on(images.device).precision
    try:
        engine = Engine(analog, images, precision=precision)
    except Unsupported:
        with torch.no_grad(), programmed(analog, 0):
            return _seconds(lambda: analog(images)) / len(images)
    chips = [0] if len(images) < 100 else list(range(10))
    return _seconds(lambda: engine.count_correct(images, labels, chips)) / (len(images) * len(chips))


def pair_seconds(config: Config, pair: str) -> dict[str, float]:
    """Estimated seconds of each stage of a pair, all of its rows together, each shared run counted once."""
    cost = costs(config.settings(pair))
    seen: set[tuple[str, ...]] = set()
    total: dict[str, float] = {}

    def add(stage: Stage, s: Settings, key: str, runs: int = 1, chips: int | None = None) -> None:
        if (stage, key) not in seen:
            seen.add((stage, key))
            total[stage] = total.get(stage, 0.0) + runs * STAGES[stage].seconds(s, cost, chips)

    for name in config.rows_of(pair):
        s, row = config.settings(pair, name), config.rows[name]
        for stage in lineage(s, row.evaluate):
            key = " ".join(f"{before} {STAGES[before].canonical(s)}" for before in lineage(s, stage))
            add(stage, s, key, len(s.search.limits) if stage == "search" else 1)
        add("evaluate", s, name, chips=s.evaluate.chips + 1)
        if row.curve:
            images = s.evaluate.curve_images or s.evaluate.images
            at_others = s.evaluate.model_copy(update={"images": images})
            chips = len(s.evaluate.sigmas) * s.evaluate.curve_chips
            add("evaluate", s.model_copy(update={"evaluate": at_others}), f"{name} curve", chips=chips)
        if name == "correctnet":
            add("sensitivity", s, name, runs=3)
    return total


def report(config: Config, run: str, cores: int) -> str:
    """The estimate for a run as lines of text. Leaves torch with one thread."""
    if run not in config.runs:
        raise UserError(f"no run {run!r} (runs: {', '.join(config.runs)})")
    # One thread, so that neither the other core nor what else runs there enters; stages keep all cores busy.
    torch.set_num_threads(1)
    lines, everything, pretrained = [], 0.0, set()
    for pair in config.runs[run]:
        stages = {stage: seconds / cores for stage, seconds in pair_seconds(config, pair).items()}
        if (owner := config.pretrains(pair)) in pretrained:
            stages.pop("pretrain", None)
        pretrained.add(owner)
        everything += sum(stages.values())
        parts = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in stages.items())
        lines.append(f"  {pair}: about {duration(sum(stages.values()))} ({parts})")
    head = f"{run}: about {duration(everything)} on {cores} cores, from a few seconds of measurement on one of them;"
    return "\n".join([f"{head} what is done already is not done again", *lines])


def main() -> None:
    """Print the estimate for --run of the configuration on standard input (JSON), as the workflow does at its start."""

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--run", required=True)
    parser.add_argument("--cores", type=int, default=available_cpus())
    arguments = parser.parse_args()
    cores = min(arguments.cores, available_cpus())
    print(report(Config.check(json.load(sys.stdin)), arguments.run, cores), file=sys.stderr)


if __name__ == "__main__":
    main()
