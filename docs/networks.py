"""Common networks on the CPU: the engine against every loop over chips that one would write in plain PyTorch, in turns.

    python docs/networks.py results/reference/bench/networks.csv [--networks resnet18 ...] [--rounds 3]

Needs torchvision, which correctnet does not depend on. Weights and images are random, which does not affect the time.
The plain loops draw the same number of weights, w exp(sigma z), in place, and are

    eager      torch as it is, contiguous or with the channels last
    compiled   torch.compile, contiguous or with the channels last
    vmap       torch.vmap over functional_call with the weights of four chips at a time

All compute in float32 on the same number of threads, and are compiled before they are timed; the engine's time includes
tracing the network and comparing it with torch. A row of the file is one way's time in one round.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from correctnet import LogNormalVariation, convert, evaluate
from correctnet.bench.baseline import Chips, Variant
from correctnet.bench.workloads import SIGMA, Workload
from correctnet.machine import cpu_name

AT_ONCE = 4  # chips of one vmap
COLUMNS = ("network", "side", "chips", "images", "way", "round", "seconds", "threads", "cpu", "torch")


def workloads() -> dict[str, Workload]:
    """Return the networks with how many chips and images each is run on."""
    library = torch.library.Library("torchvision", "FRAGMENT")  # what its import asks for beside a torch without CUDA
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from torchvision import models

    def vit() -> nn.Module:
        return models.VisionTransformer(32, 4, 6, 3, hidden_dim=192, mlp_dim=768, num_classes=10)

    makers: dict[str, tuple[Callable[..., nn.Module], int, int, int]] = {
        "resnet18": (models.resnet18, 32, 10, 500),
        "mobilenet_v2": (models.mobilenet_v2, 64, 10, 200),
        "efficientnet_b0": (models.efficientnet_b0, 64, 10, 200),
        "shufflenet_v2_x1_0": (models.shufflenet_v2_x1_0, 64, 10, 200),
        "densenet121": (models.densenet121, 32, 10, 200),
        "convnext_tiny": (models.convnext_tiny, 64, 5, 100),
        "vit_6_192": (vit, 32, 10, 200),
    }
    return {
        name: Workload(name, make if make is vit else lambda make=make: make(num_classes=10), (3, side, side), c, n)
        for name, (make, side, c, n) in makers.items()
    }


def vmapped(network: nn.Module, x: Tensor, y: Tensor, batch: int) -> Callable[[int], None]:
    """Return the loop that runs `AT_ONCE` chips at a time by torch.vmap."""
    layers = [n for n, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    nominal = {f"{n}.weight": network.get_submodule(n).weight.detach() for n in layers}

    def forward(weights: dict[str, Tensor], images: Tensor) -> Tensor:
        return torch.func.functional_call(network, weights, images)

    over_chips = torch.vmap(forward, in_dims=(0, None), randomness="different")

    def run(chips: int) -> None:
        with torch.inference_mode():
            for first in range(0, chips, AT_ONCE):
                count = min(AT_ONCE, chips - first)
                noisy = {n: torch.randn(count, *w.shape).mul_(SIGMA).exp_().mul_(w) for n, w in nominal.items()}
                for images, labels in zip(x.split(batch), y.split(batch), strict=True):
                    (over_chips(noisy, images).argmax(2) == labels).sum(1)

    return run


def ways_of(workload: Workload, batch: int) -> dict[str, Callable[[int], object]]:
    """Return the ways to run a workload, each a function of the number of chips."""
    network, (x, y) = workload.network(0), workload.data(0)
    analog = convert(network, LogNormalVariation(SIGMA))
    ways: dict[str, Callable[[int], object]] = {"engine": lambda chips: evaluate(analog, (x, y), chips, progress=False)}
    for compiled in (False, True):
        for last in (False, True):
            loop = Chips(network, x, y, Variant("float32", last, batch, compiled), 0)
            ways["compiled" * compiled + "eager" * (not compiled) + ", channels last" * last] = loop.run
    return ways | {"vmap": vmapped(network, x, y, batch)}


def main() -> None:
    """Measure, write the rows, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    known = workloads()
    parser.add_argument("--networks", nargs="+", choices=known, default=list(known))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=100, help="images of a forward pass of the plain loops")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    machine = (torch.get_num_threads(), cpu_name(), torch.__version__)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for name in args.networks:
            torch._dynamo.reset()
            work = known[name]
            ways = ways_of(work, args.batch)
            taken: dict[str, list[float]] = {way: [] for way in ways}
            for run in ways.values():
                run(1)
            for turn in range(args.rounds):
                for way, run in ways.items():
                    began = time.perf_counter()
                    run(work.chips)
                    taken[way].append(time.perf_counter() - began)
                    row = (name, work.shape[1], work.chips, work.images, way, turn, round(taken[way][-1], 3))
                    writer.writerow((*row, *machine))
                    file.flush()
            medians = {way: statistics.median(seconds) for way, seconds in taken.items()}
            best = min((w for w in medians if w != "engine"), key=medians.__getitem__)
            ratio = medians[best] / medians["engine"]
            print(f"{name}: {ratio:.2f} x the best plain loop ({best})", medians, flush=True)


if __name__ == "__main__":
    main()
