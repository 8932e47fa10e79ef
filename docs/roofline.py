"""The roofline of every layer of LeNet-5 and VGG16: what bounds a Monte Carlo run, on a CPU and on a GPU.

    python docs/roofline.py results/reference/bench/lenet5-avx512bf16.json

A layer of a chip sample that sees N images takes at least

    max(N * FLOP / peak + weights * time a weight, bytes / bandwidth)        on a CPU, whose cores draw and multiply
    max(N * FLOP / peak, weights * time a weight, bytes / bandwidth)         on a GPU, which does both side by side

with bytes = N * (activations read and written, bfloat16) + weights (nominal, read once). The CPU's peak and time a
weight are those that `correctnet bench` measured (its JSON is the argument); the GPU is an NVIDIA H100 SXM by its data
sheet, and nothing about it was measured. That drawing a weight once is enough is a bound, too: the fused kernel draws
it again in every block that sweeps the images, and for every 256 output pixels where a layer's weights do not stay in
shared memory ("noise as executed"). Writes roofline.csv and roofline.png beside this file, prints kernels.md's tables.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import nn

from correctnet.networks.building import build

HERE = Path(__file__).parent
CHIPS = 100  # in one launch of a GPU
IMAGES = {"lenet5": 10000, "vgg16": 64}  # a chip sees: the MNIST test set; a reward of the search


@dataclass
class Machine:
    """`seconds_per_weight` of noise, the whole machine at work; `bandwidth` of the level that holds activations."""

    name: str
    peak: float
    bandwidth: float
    seconds_per_weight: float
    together: bool  # drawing and multiplying overlap


# H100 SXM5, data sheet: dense bf16 989 TFLOP/s, 3.35 TB/s, 132 SMs x 128 lanes at 1.755 GHz (boost, by the FP32
# figure of 66.9 TFLOP/s).
# A weight's noise is some 60 instructions of such a lane (ten rounds of Philox for four weights, a quintic, 2^x).
H100 = Machine("H100 SXM (data sheet)", 989e12, 3.35e12, 60 / (66.9e12 / 2), True)
PROCESSORS, SHARED_BYTES = 132, 227 << 10  # multiprocessors, and what a block may have of each
DRAM = 40e9  # bytes a second that two cores of a server get; only early layers of large batches come near it


@dataclass
class Layer:
    network: str
    name: str
    flop: float  # an image, taps on padding not counted
    padded_flop: float  # an image, as an implicit GEMM executes it
    weights: int
    activations: int  # read and written an image
    outputs: int  # channels
    pixels: int  # of an output channel, before a pool

    def times_drawn(self, images: int) -> int:
        """How often the fused GPU kernel makes a chip's noise, in bfloat16 (csrc/cuda: conv.cuh, launch_conv)."""
        columns = 16 if self.outputs <= 16 else 64
        slices = math.ceil(self.weights / self.outputs / 32)  # of 64 bytes along k
        shared = 4 * 192 + 2 * 256 * 12 + 3 * 256 * 64 + slices * columns * 64  # table, pixels, x, all of w
        tiles = math.ceil(images * self.pixels / 256)
        if shared > SHARED_BYTES:
            return tiles
        return min(tiles, math.ceil(2 * PROCESSORS / (CHIPS * math.ceil(self.outputs / columns))))

    def bounds(self, machine: Machine, images: int) -> dict[str, float]:
        """Seconds of one chip, by what bounds them."""
        flop = self.padded_flop if machine.together else self.flop
        return {
            "multiply": images * flop / machine.peak,
            "noise": self.weights * machine.seconds_per_weight,
            "bytes": (2 * images * self.activations + 4 * self.weights) / machine.bandwidth,
        }

    def bound(self, machine: Machine, images: int) -> tuple[str, float]:
        """What takes longest, and the least time of all."""
        parts = self.bounds(machine, images)
        least = max(parts.values()) if machine.together else max(parts["multiply"] + parts["noise"], parts["bytes"])
        return max(parts, key=parts.__getitem__), least


def layers(network: str) -> list[Layer]:
    """Every conv and linear layer of a network, measured by running it once."""
    channels = 1 if network == "lenet5" else 3
    model = build(network, 10, channels).eval()
    found = []
    children = list(model.named_children())
    # Of a map that a 2 x 2 max-pool follows, a quarter is written: the pool is part of the convolution.
    pooled = {a for (a, _), (_, b) in itertools.pairwise(children) if isinstance(b, nn.MaxPool2d)}

    def note(name: str, layer: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
        taps = 1.0
        inside = 1.0
        if isinstance(layer, nn.Conv2d):
            # Sums over the taps that fall on the image, in one pass over ones.
            ones = torch.ones(1, 1, *x.shape[2:])
            kernel = torch.ones(1, 1, *layer.kernel_size)
            hits = nn.functional.conv2d(ones, kernel, stride=layer.stride, padding=layer.padding)
            inside, taps = hits.sum().item(), hits.numel() * kernel.numel()
        per_tap = 2 * layer.weight.shape[0] * layer.weight.shape[1]
        activations = x[0].numel() + y[0].numel() // (4 if name in pooled else 1)
        work = inside * per_tap, taps * per_tap, layer.weight.numel(), activations
        found.append(Layer(network, name, *work, y.shape[1], y[0, 0].numel()))

    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            label = name.removesuffix(".layer")
            module.register_forward_hook(lambda m, x, y, label=label: note(label, m, x[0], y))
    with torch.no_grad():
        model(torch.zeros(1, channels, 32, 32))
    return found


def main(bench: Path) -> None:
    measured = json.loads(bench.read_text(encoding="utf-8"))
    rate = max(r["weights_per_s"] for r in measured["rows"] if r["work"] == "noise" and r["precision"] == "bf16")
    threads = measured["threads"]
    cpu = Machine(
        f"{measured['cpu']}, {measured['isa']}, {threads} threads (measured)",
        measured["peak_flop_per_s"]["bf16"]["all"],
        DRAM,
        1 / rate / threads,
        False,
    )
    rows = []
    for network, images in IMAGES.items():
        for layer in layers(network):
            row = {
                "network": network,
                "layer": layer.name,
                "images_a_chip": images,
                "mflop_an_image": round(layer.flop / 1e6, 4),
                "weights": layer.weights,
                "activations_an_image": layer.activations,
                "flop_a_drawn_weight": round(images * layer.flop / layer.weights),
                "flop_a_byte": round(images * layer.flop / (2 * images * layer.activations + 4 * layer.weights), 1),
            }
            for short, machine in (("cpu", cpu), ("h100", H100)):
                what, seconds = layer.bound(machine, images)
                row |= {f"{short}_bound_by": what, f"{short}_microseconds_a_chip": round(seconds * 1e6, 3)}
            times = layer.times_drawn(images)
            noise = times * layer.bounds(H100, images)["noise"]
            row |= {"h100_times_drawn_fused": times, "h100_noise_fused_microseconds_a_chip": round(noise * 1e6, 3)}
            rows.append(row)
    with (HERE / "roofline.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw(cpu)
    for network, images in IMAGES.items():
        print(f"{network}, {images:,} images a chip:\n\n{table([r for r in rows if r['network'] == network])}\n")
    for short in ("cpu", "h100"):
        for network, images in IMAGES.items():
            total = sum(r[f"{short}_microseconds_a_chip"] for r in rows if r["network"] == network)
            print(f"{network}, {images} images a chip, {short}: at least {total:.1f} us a chip")


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| layer | MFLOP an image | weights | FLOP a drawn weight | FLOP a byte | CPU: bound by, µs a chip "
        "| H100 (data sheet): bound by, µs a chip | its noise as executed (fused): times drawn, µs a chip |",
        "|---|---:|---:|---:|---:|---|---|---|",
    ]
    for row in rows:
        h100 = row["h100_microseconds_a_chip"]
        noise = row["h100_noise_fused_microseconds_a_chip"]
        cells = (
            row["layer"],
            f"{row['mflop_an_image']:.4g}",
            f"{row['weights']:,}",
            f"{row['flop_a_drawn_weight']:,}",
            f"{row['flop_a_byte']:.0f}",
            f"{row['cpu_bound_by']}, {row['cpu_microseconds_a_chip']:,.1f}",
            f"{row['h100_bound_by']}, {h100:.3g}",
            f"{row['h100_times_drawn_fused']}, {noise:.3g}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(cpu: Machine) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(12, 7), layout="constrained")
    colours = {"multiply": "#4477aa", "noise": "#ee6677", "bytes": "#ccbb44"}
    for row, (network, images) in zip(axes, IMAGES.items(), strict=True):
        all_layers = layers(network)
        for axis, machine in zip(row, (cpu, H100), strict=True):
            for i, what in enumerate(colours):
                heights = [layer.bounds(machine, images)[what] * 1e6 for layer in all_layers]
                places = [p + (i - 1) * 0.27 for p in range(len(all_layers))]
                axis.bar(places, heights, 0.27, color=colours[what], label=what)
                if what == "noise" and machine is H100:
                    executed = [h * layer.times_drawn(images) for h, layer in zip(heights, all_layers, strict=True)]
                    style = {"fill": False, "edgecolor": colours[what], "linestyle": ":", "linewidth": 1}
                    axis.bar(places, executed, 0.27, label="noise as executed (fused)", **style)
            axis.set_yscale("log")
            axis.set_xticks(range(len(all_layers)), [layer.name for layer in all_layers], rotation=60, fontsize=8)
            axis.set_ylabel("µs a chip")
            axis.set_title(f"{network}, {images:,} images a chip: {machine.name}", fontsize=9)
            axis.grid(axis="y", alpha=0.3)
    labels = axes[0][1].get_legend_handles_labels()
    figure.legend(*labels, loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(HERE / "roofline.png", dpi=120)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
