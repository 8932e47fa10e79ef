"""Throughput of the CUDA kernels against the fastest plain PyTorch loop on the same GPU.

As on the CPU (`correctnet.bench.cpu`), a search finds the baseline (float32 with TF32, bfloat16 autocast, a bfloat16
network; memory orders, batch sizes, eager, torch.compile, a CUDA graph of a chip's whole pass). The engine and the
baseline then take turns, timed by CUDA events; medians are reported. The engine runs with each of its methods, see
`correctnet.engine.engine`; `crossover` finds the number of images a chip from which one is faster than another.

    fraction_of_peak = images * chips * FLOP an image / time / rate of an 8192^3 matmul
"""

from __future__ import annotations

import copy
import platform
from collections.abc import Sequence
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn

from correctnet import __version__
from correctnet.bench import gpu_timing as on
from correctnet.bench.baseline import Variant, select
from correctnet.bench.gpu_training import training_rows
from correctnet.bench.workloads import PRECISIONS, SIGMA, Log, Row, Workload, flat, why_not_compiled
from correctnet.crossbar.convert import convert
from correctnet.devices.lognormal import LogNormalVariation
from correctnet.engine.engine import Engine
from correctnet.errors import UserError
from correctnet.networks.lenet import lenet5
from correctnet.networks.vgg import vgg16
from correctnet.noise import device as gpu

METHODS: tuple[Literal["fused", "materialise", "library"], ...] = ("fused", "materialise", "library")
BATCHES = (250, 1000, 2500, 10000)
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("lenet5-250x10000", lenet5, (1, 32, 32), 250, 10000),
        Workload("vgg16-64x64", vgg16, (3, 32, 32), 64, 64),
        Workload("vgg16-250x10000", vgg16, (3, 32, 32), 250, 10000),
    )
}
PLAIN_SECONDS = 5.0  # time of the baseline in each round, about
CROSSOVER_IMAGES = (16, 64, 256, 1024, 4096)


# ---- the baseline ---------------------------------------------------------------------------------------------------


class Chips:
    """The loop over chips on the GPU: weights = nominal * exp(sigma * randn), in place, without synchronisation."""

    def __init__(self, network: nn.Module, images: Tensor, labels: Tensor, variant: Variant, seed: int):
        self.variant = variant
        order = torch.channels_last if variant.channels_last else torch.contiguous_format
        dtype = torch.bfloat16 if variant.kind == "bf16" else torch.float32
        self.network = copy.deepcopy(network).eval().to(on.DEVICE, memory_format=order)
        weights = [m.weight for m in self.network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        self._nominal = [flat(w).clone() for w in weights]
        self.network.to(dtype)
        self._weights = [flat(w) for w in weights]
        self._drawn = self._weights if dtype == torch.float32 else [torch.empty_like(n) for n in self._nominal]
        images = images.to(on.DEVICE, dtype).contiguous(memory_format=order)
        self._batches = list(zip(images.split(variant.batch), labels.to(on.DEVICE).split(variant.batch), strict=True))
        self._forward = torch.compile(self.network, dynamic=False) if variant.compiled else self.network
        self._correct = torch.zeros((), dtype=torch.int64, device=on.DEVICE)
        torch.manual_seed(seed)
        with torch.inference_mode():
            for _ in range(3):  # compiles, and lets libraries choose their kernels
                self._chip()
            if on.DEVICE == "cuda":
                torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph() if variant.graph else None
            if self._graph:
                with torch.cuda.graph(self._graph):
                    self._chip()

    def _draw(self) -> None:
        for weight, drawn, nominal in zip(self._weights, self._drawn, self._nominal, strict=True):
            drawn.normal_(0, SIGMA).exp_().mul_(nominal)
            if weight is not drawn:
                weight.copy_(drawn)

    def _classify(self) -> None:
        with torch.autocast(on.DEVICE, torch.bfloat16, enabled=self.variant.kind == "autocast"):
            for x, y in self._batches:
                self._correct += (self._forward(x).argmax(1) == y).sum()

    def _chip(self) -> None:
        self._draw()
        self._classify()

    def run(self, chips: int) -> None:
        """Program `chips` chips and classify the images on each."""
        with torch.inference_mode():
            for _ in range(chips):
                self._graph.replay() if self._graph else self._chip()

    def forward(self, chips: int) -> None:
        """Classify the images as many times, without drawing weights and without a graph."""
        with torch.inference_mode():
            for _ in range(chips):
                self._classify()


def _fastest(
    workload: Workload, network: nn.Module, data: tuple[Tensor, Tensor], compiles: bool, log: Log
) -> dict[str, Any]:
    """Find the fastest variant of each precision and its images a second."""

    def rate(variant: Variant) -> float:
        torch._dynamo.reset()
        try:
            plain = Chips(network, *data, variant, 0)
            found = workload.images / on.seconds(lambda: plain.run(1), 0.3)
        except torch.cuda.OutOfMemoryError:
            found = 0.0
        torch.cuda.empty_cache()
        log(f"  {variant}: {found:,.0f} images/s")
        return found

    sizes = sorted({min(batch, workload.images) for batch in BATCHES})
    return select(rate, sizes, compiles, 1, graphs=on.DEVICE == "cuda")


# ---- the measurements -----------------------------------------------------------------------------------------------


def matmul_peak(dtype: torch.dtype, size: int = 8192) -> float:
    """Return the FLOP a second of torch's square matmul, the best of ten."""
    a = torch.randn(size, size, device="cuda", dtype=dtype)
    b = torch.randn(size, size, device="cuda", dtype=dtype)
    a @ b
    return 2 * size**3 / min(on.seconds(lambda: a @ b) for _ in range(10))


def measure(
    workloads: Sequence[str] = tuple(WORKLOADS),
    *,
    training: bool = True,
    crossover: bool = True,
    rounds: int = 5,
    seed: int = 0,
    compiles: bool = True,
    log: Log = lambda text: None,
) -> dict[str, Any]:
    """Run the benchmarks on the current CUDA device.

    Args:
        workloads: names in `WORKLOADS`.
        training: also measure the training of compensators, batch 128, a fresh chip each batch.
        crossover: also measure the engine's methods over the number of images.
        rounds: turns of the engine and the baseline.
        seed: seed of images, chips and weights.
        compiles: whether baselines may use torch.compile.
        log: called with a line on what is being measured.

    Returns:
        A description of the machine (device, capability, versions, peaks) and `rows`, a dict each.

    Raises:
        UserError: no CUDA device, or no CUDA kernels.
    """
    status = gpu.status()
    if not status.usable:
        raise UserError(f"bench --device cuda: {status.reason}")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    log(f"{device.name}: peaks of an 8192^3 matmul")
    peaks = {"bf16": matmul_peak(torch.bfloat16), "float32": matmul_peak(torch.float32)}
    reason = why_not_compiled(on.DEVICE) if compiles and (workloads or training) else None
    if reason:
        log(f"torch.compile does not work here, baselines do without: {reason}")
    rows: list[Row] = []
    for name in workloads:
        rows += workload_rows(WORKLOADS[name], peaks, rounds, seed, compiles and reason is None, log)
    if crossover:
        rows += crossover_rows(seed, rounds, log)
    if training:
        rows += training_rows(seed, rounds, log, compiles and reason is None)
    about = {
        "device": device.name,
        "capability": f"{device.major}.{device.minor}",
        "architectures": status.architectures,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "correctnet": __version__,
        "python": platform.python_version(),
        "sigma": SIGMA,
        "torch_compile": compiles and (reason or "works"),
        "matmul_flop_per_s": peaks,
    }
    return about | {"rows": [{**row, "device": device.name} for row in rows]}


def workload_rows(
    workload: Workload, peaks: dict[str, float], rounds: int, seed: int, compiles: bool, log: Log
) -> list[Row]:
    """Measure a workload: each precision and method of the engine against the best baseline of any precision."""
    data = workload.data(seed)
    network = workload.network(seed)
    log(f"{workload.name}: searching the fastest plain PyTorch loop")
    chosen = _fastest(workload, network, data, compiles, log)
    best = max(chosen, key=lambda p: chosen[p][1])
    variant, found = chosen[best]
    torch._dynamo.reset()
    plain = Chips(network, *data, variant, seed)
    chips = min(workload.chips, max(1, round(PLAIN_SECONDS * found / workload.images)))
    analog = convert(network, LogNormalVariation(SIGMA), seed).to(on.DEVICE)
    x, y = (t.to(on.DEVICE) for t in data)
    engines = {
        (p, m): Engine(analog, x[:2], precision=PRECISIONS[p], method=m, memory=on.memory())
        for p in PRECISIONS
        for m in METHODS
    }

    ours: dict[tuple[str, str], list[float]] = {key: [] for key in engines}
    theirs: list[float] = []
    forward: list[float] = []
    for i in range(rounds + 1):  # the first round does not count
        for key, engine in engines.items():
            ours[key].append(on.seconds(lambda engine=engine: engine.count_correct(x, y, range(workload.chips))))
        theirs.append(on.seconds(lambda: plain.run(chips)))
        forward.append(on.seconds(lambda: plain.forward(max(1, chips // 4))))
        rates = (f"{p} {m} {workload.chips * workload.images / t[-1]:,.0f}" for (p, m), t in ours.items())
        baseline = f"plain {chips * workload.images / theirs[-1]:,.0f} images/s"
        log(f"{workload.name}, round {i} of {rounds}: {baseline}, engine {', '.join(rates)}")
    plain_rate = chips * workload.images / median(theirs[1:])
    rows = []
    for (precision, method), taken in ours.items():
        rate = workload.chips * workload.images / median(taken[1:])
        rows.append(
            {
                "work": workload.name,
                "precision": precision,
                "method": method,
                "against": "best",
                "ratio": rate / plain_rate,
                "images_per_s": rate,
                "fraction_of_peak": rate * sum(engines[precision, "fused"].cost[:2]) / peaks[precision],
                "plain": str(variant),
                "plain_precision": best,
                "plain_images_per_s": plain_rate,
                "plain_forward_images_per_s": max(1, chips // 4) * workload.images / median(forward[1:]),
                "plain_chips": chips,
                "chips": workload.chips,
                "images": workload.images,
                "rounds": rounds,
            }
        )
    return rows


def crossover_rows(seed: int, rounds: int, log: Log, chips: int = 32) -> list[Row]:
    """Measure each of the engine's methods on VGG16 in bfloat16 over the number of images a chip."""
    workload = Workload("crossover", vgg16, (3, 32, 32), chips, max(CROSSOVER_IMAGES))
    x, y = (t.to(on.DEVICE) for t in workload.data(seed))
    analog = convert(workload.network(seed), LogNormalVariation(SIGMA), seed).to(on.DEVICE)
    engines = {m: Engine(analog, x[:2], precision="bfloat16", method=m, memory=on.memory()) for m in METHODS}
    rows = []
    for images in CROSSOVER_IMAGES:
        for method, engine in engines.items():
            taken = [
                on.seconds(lambda e=engine, n=images: e.count_correct(x[:n], y[:n], range(chips)))
                for _ in range(rounds + 1)
            ]
            rows.append(
                {
                    "work": "crossover",
                    "precision": "bf16",
                    "method": method,
                    "chips": chips,
                    "images": images,
                    "images_per_s": chips * images / median(taken[1:]),
                    "rounds": rounds,
                }
            )
            log(f"crossover, {images} images, {method}: {rows[-1]['images_per_s']:,.0f} images/s")
    return rows


def crossover(rows: Sequence[Row], method: str = "library", than: str = "fused") -> int | None:
    """Return the smallest number of images a chip from which on `method` is faster than `than`.

    None where it is not faster at the largest number of images in `rows` (of `crossover_rows`).
    """
    rates: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["work"] == "crossover":
            rates.setdefault(row["images"], {})[row["method"]] = row["images_per_s"]
    found = None
    for images in sorted(rates, reverse=True):
        if rates[images][method] <= rates[images][than]:
            break
        found = images
    return found


# ---- table ----------------------------------------------------------------------------------------------------------


def table(measured: dict[str, Any]) -> str:
    """Format the result of `measure` as Markdown."""
    peaks = measured["matmul_flop_per_s"]
    lines = [
        f"{measured['device']}, torch {measured['torch']} (CUDA {measured['cuda']}), kernels for "
        f"{measured['architectures']}; matmul 8192^3: bf16 {peaks['bf16'] / 1e12:.0f}, float32 with TF32 "
        f"{peaks['float32'] / 1e12:.0f} TFLOP/s; random weights and images, sigma {measured['sigma']:g}; medians",
        "",
        "| work | engine | images/s | x the best plain PyTorch | of the matmul peak | best plain PyTorch | images/s |",
        "|---|---|---:|---:|---:|---|---:|",
    ]
    for row in measured["rows"]:
        if "fraction_of_peak" in row:
            ours = f"{row['precision']}, {row['method']} | {row['images_per_s']:,.0f} | {row['ratio']:.1f}"
            plain = f"{row['plain']} | {row['plain_images_per_s']:,.0f}"
            lines.append(f"| {row['work']} | {ours} | {row['fraction_of_peak']:.0%} | {plain} |")
    crossing = [row for row in measured["rows"] if row["work"] == "crossover"]
    if crossing:
        lines += ["", f"| VGG16, bf16: images a chip | {' | '.join(f'{m}, images/s' for m in METHODS)} |"]
        lines.append("|---:" * (1 + len(METHODS)) + "|")
        for images in dict.fromkeys(row["images"] for row in crossing):
            rates = {row["method"]: row["images_per_s"] for row in crossing if row["images"] == images}
            lines.append(f"| {images:,} | {' | '.join(f'{rates[m]:,.0f}' for m in METHODS)} |")
        lines.append("")
        for method in METHODS[1:]:
            found = crossover(crossing, method)
            where = "not up to the most images measured" if found is None else f"from {found:,} images a chip on"
            lines.append(f"Crossover: {method} is faster than fused {where}.")
    training = [row for row in measured["rows"] if row["work"] == "training"]
    if training:
        lines += ["", f"Training compensators, batch {training[0]['batch']}, a fresh chip each batch:", ""]
        lines += ["| way | steps/s | x the best with torch's noise |", "|---|---:|---:|"]
        best = training[0]["plain_steps_per_s"]
        lines += [f"| {row['way']} | {row['steps_per_s']:.1f} | {row['ratio']:.2f} |" for row in training]
        lines += [f"| {name} | {rate:.1f} | {rate / best:.2f} |" for name, rate in training[0]["plain"].items()]
        lines += [f"| {name} | does not work: {why} | |" for name, why in training[0]["failed"].items()]
    return "\n".join(lines)
