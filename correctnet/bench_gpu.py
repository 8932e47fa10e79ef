"""How fast a GPU evaluates chip samples: the CUDA kernels against the best that plain PyTorch does on the same GPU.

As on the CPU (`correctnet.bench`): a search finds the fastest plain loop (float32 with TF32, bfloat16 autocast, a
bfloat16 network; memory orders, batch sizes, eager, torch.compile, a CUDA graph of a chip's whole pass), then the
engine and the loops take turns, timed by CUDA events; medians count. The engine runs both ways that it has: noise drawn
while weights are loaded ("fused"), or noisy weights made once in memory ("materialise"); `crossover` says from how many
images a chip the second is faster.

    fraction_of_peak = images * chips * FLOP an image / time / rate of an 8192^3 bfloat16 matmul
"""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from correctnet import __version__, compensation, cuda, models
from correctnet.analog import convert
from correctnet.bench import PRECISIONS, SIGMA, Row, Say, Variant, Work, _flat, _why_not_compiled, select
from correctnet.config import Compensate
from correctnet.engine import Engine
from correctnet.errors import UserError
from correctnet.variation import LogNormalVariation

BATCHES = (250, 1000, 2500, 10000)
WORKS = {
    work.name: work
    for work in (
        Work("lenet5-250x10000", models.lenet5, (1, 32, 32), 250, 10000),
        Work("vgg16-64x64", models.vgg16, (3, 32, 32), 64, 64),
        Work("vgg16-250x10000", models.vgg16, (3, 32, 32), 250, 10000),
    )
}
PLAIN_SECONDS = 5.0  # that a plain loop takes a round, about
CROSSOVER_IMAGES = (16, 64, 256, 1024, 4096)


def seconds(work: Callable[[], object], at_least: float = 0.0) -> float:
    """Seconds a call between two CUDA events on the current stream, of as many calls as take `at_least`."""
    calls, total = 0, 0.0
    while calls == 0 or total < at_least:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        total += start.elapsed_time(end) / 1e3
        calls += 1
    return total / calls


# ---- the plain loop -------------------------------------------------------------------------------------------------


class Chips:
    """Chip after chip on the GPU: weights = nominal * exp(sigma * randn), in place; nothing waits for the device."""

    def __init__(self, network: nn.Module, images: Tensor, labels: Tensor, variant: Variant, seed: int):
        self.variant = variant
        order = torch.channels_last if variant.channels_last else torch.contiguous_format
        dtype = torch.bfloat16 if variant.kind == "bf16" else torch.float32
        self.network = copy.deepcopy(network).eval().cuda().to(memory_format=order)
        weights = [m.weight for m in self.network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        self._nominal = [_flat(w).clone() for w in weights]
        self.network.to(dtype)
        self._weights = [_flat(w) for w in weights]
        self._drawn = self._weights if dtype == torch.float32 else [torch.empty_like(n) for n in self._nominal]
        images = images.cuda().to(dtype).contiguous(memory_format=order)
        self._batches = list(zip(images.split(variant.batch), labels.cuda().split(variant.batch), strict=True))
        self._forward = torch.compile(self.network, dynamic=False) if variant.compiled else self.network
        self._correct = torch.zeros((), dtype=torch.int64, device="cuda")
        torch.cuda.manual_seed(seed)
        with torch.inference_mode():
            for _ in range(3):  # compiles, and lets libraries choose their kernels
                self._chip()
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
        with torch.autocast("cuda", torch.bfloat16, enabled=self.variant.kind == "autocast"):
            for x, y in self._batches:
                self._correct += (self._forward(x).argmax(1) == y).sum()

    def _chip(self) -> None:
        self._draw()
        self._classify()

    def run(self, chips: int) -> None:
        """Program and classify that many chips."""
        with torch.inference_mode():
            for _ in range(chips):
                self._graph.replay() if self._graph else self._chip()

    def forward(self, chips: int) -> None:
        """Classify as often, without drawing (and without a graph)."""
        with torch.inference_mode():
            for _ in range(chips):
                self._classify()


def _fastest(work: Work, network: nn.Module, data: tuple[Tensor, Tensor], compiles: bool, say: Say) -> dict[str, Any]:
    """The fastest plain variant of each precision and its images a second."""

    def rate(variant: Variant) -> float:
        torch._dynamo.reset()
        try:
            plain = Chips(network, *data, variant, 0)
            found = work.images / seconds(lambda: plain.run(1), 0.3)
        except torch.cuda.OutOfMemoryError:
            found = 0.0
        torch.cuda.empty_cache()
        say(f"  {variant}: {found:,.0f} images/s")
        return found

    sizes = sorted({min(batch, work.images) for batch in BATCHES})
    return select(rate, sizes, compiles, 1, graphs=True)


# ---- the measurements -----------------------------------------------------------------------------------------------


def matmul_peak(dtype: torch.dtype, size: int = 8192) -> float:
    """FLOP a second of a square matmul of torch's, the best of ten."""
    a = torch.randn(size, size, device="cuda", dtype=dtype)
    b = torch.randn(size, size, device="cuda", dtype=dtype)
    a @ b
    return 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(10))


def measure(
    works: Sequence[str] = tuple(WORKS),
    *,
    training: bool = True,
    crossover: bool = True,
    rounds: int = 5,
    seed: int = 0,
    compiles: bool = True,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Measure on the current CUDA device.

    Args:
        works: names in `WORKS`.
        training: also the training of a compensator, batch 128, a fresh chip each batch.
        crossover: also both methods of the engine over the number of images.
        rounds: turns that each side takes.
        seed: of images, chips and weights.
        compiles: whether plain loops may use torch.compile.
        say: called with a line about what is being measured.

    Returns:
        What was measured on (device, capability, driver, versions, peaks) and `rows`, a dict each.

    Raises:
        UserError: no CUDA device, or no CUDA kernels.
    """
    status = cuda.status()
    if not status.usable:
        raise UserError(f"bench --device cuda: {status.reason}")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    say(f"{device.name}: peaks of an 8192^3 matmul")
    peaks = {"bf16": matmul_peak(torch.bfloat16), "float32": matmul_peak(torch.float32)}
    reason = _why_not_compiled() if compiles and works else None
    rows: list[Row] = []
    for name in works:
        rows += _work_rows(WORKS[name], peaks, rounds, seed, compiles and reason is None, say)
    if crossover:
        rows += crossover_rows(seed, rounds, say)
    if training:
        rows += training_rows(seed, rounds, say)
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


def _work_rows(work: Work, peaks: dict[str, float], rounds: int, seed: int, compiles: bool, say: Say) -> list[Row]:
    """One row for each precision and method of the engine, against the best plain loop of any precision."""
    data = work.data(seed)
    network = work.network(seed)
    say(f"{work.name}: which plain loop is the fastest")
    chosen = _fastest(work, network, data, compiles, say)
    best = max(chosen, key=lambda p: chosen[p][1])
    variant, found = chosen[best]
    torch._dynamo.reset()
    plain = Chips(network, *data, variant, seed)
    chips = min(work.chips, max(1, round(PLAIN_SECONDS * found / work.images)))
    analog = convert(network, LogNormalVariation(SIGMA), seed).cuda()
    x, y = (t.cuda() for t in data)
    engines = {
        (p, m): Engine(analog, x[:2], precision=PRECISIONS[p], method=m) for p in PRECISIONS for m in cuda.METHODS
    }

    ours: dict[tuple[str, str], list[float]] = {key: [] for key in engines}
    theirs: list[float] = []
    forward: list[float] = []
    for i in range(rounds + 1):  # the first round does not count
        for key, engine in engines.items():
            ours[key].append(seconds(lambda engine=engine: engine.count_correct(x, y, range(work.chips))))
        theirs.append(seconds(lambda: plain.run(chips)))
        forward.append(seconds(lambda: plain.forward(max(1, chips // 4))))
        say(f"{work.name}, round {i} of {rounds}: plain {chips * work.images / theirs[-1]:,.0f} images/s, engine "
            + ", ".join(f"{p} {m} {work.chips * work.images / t[-1]:,.0f}" for (p, m), t in ours.items()))  # fmt: skip
    plain_rate = chips * work.images / median(theirs[1:])
    rows = []
    for (precision, method), taken in ours.items():
        rate = work.chips * work.images / median(taken[1:])
        rows.append(
            {
                "work": work.name,
                "precision": precision,
                "method": method,
                "against": "best",
                "ratio": rate / plain_rate,
                "images_per_s": rate,
                "fraction_of_peak": rate * sum(engines[precision, method].cost[:2]) / peaks[precision],
                "plain": str(variant),
                "plain_precision": best,
                "plain_images_per_s": plain_rate,
                "plain_forward_images_per_s": max(1, chips // 4) * work.images / median(forward[1:]),
                "plain_chips": chips,
                "chips": work.chips,
                "images": work.images,
                "rounds": rounds,
            }
        )
    return rows


def crossover_rows(seed: int, rounds: int, say: Say, chips: int = 32) -> list[Row]:
    """VGG16 in bfloat16 by both methods over the number of images a chip."""
    work = Work("crossover", models.vgg16, (3, 32, 32), chips, max(CROSSOVER_IMAGES))
    x, y = (t.cuda() for t in work.data(seed))
    analog = convert(work.network(seed), LogNormalVariation(SIGMA), seed).cuda()
    engines = {m: Engine(analog, x[:2], precision="bfloat16", method=m) for m in cuda.METHODS}
    rows = []
    for images in CROSSOVER_IMAGES:
        for method, engine in engines.items():
            taken = [
                seconds(lambda e=engine, n=images: e.count_correct(x[:n], y[:n], range(chips)))
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
            say(f"crossover, {images} images, {method}: {rows[-1]['images_per_s']:,.0f} images/s")
    return rows


def training_rows(seed: int, rounds: int, say: Say, batch: int = 128, steps: int = 20) -> list[Row]:
    """Steps a second of training VGG16's compensators (six convolutions, S = 1), a fresh chip each batch: with the
    kernels' noise, and with torch's."""
    work = Work("training", models.vgg16, (3, 32, 32), 1, batch)
    x, y = (t.cuda() for t in work.data(seed))
    x = x.contiguous(memory_format=torch.channels_last)
    network = work.network(seed)
    filters = {f"conv{i}.layer": network.get_submodule(f"conv{i}.layer").out_channels for i in range(1, 7)}
    section = Compensate(precision="bfloat16")
    analog, _, hooks = compensation.prepare(network, filters, section, LogNormalVariation(SIGMA), seed)
    analog = analog.cuda().to(memory_format=torch.channels_last)
    parameters = compensation.compensation_parameters(analog)
    for p in analog.parameters():
        p.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(analog(x).float(), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    weights = [m.weight.detach().cuda() for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]

    def torch_noise() -> None:
        for nominal in weights:
            torch.empty_like(nominal).normal_(0, SIGMA).exp_().mul_(nominal)

    def ours() -> None:
        for i in range(steps):
            hooks.before_batch(i)
            step()

    def plain() -> None:
        for _ in range(steps):
            torch_noise()
            step()

    ways = {"kernels": ours, "torch": plain}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(rounds + 1):
        for name, way in ways.items():
            taken[name].append(seconds(way) / steps)
        say(f"training, round {i} of {rounds}: " + ", ".join(f"{n} {1 / t[-1]:.1f} steps/s" for n, t in taken.items()))
    rates = {name: 1 / median(t[1:]) for name, t in taken.items()}
    return [
        {
            "work": "training",
            "precision": "bf16",
            "against": "torch's noise, eager",
            "ratio": rates["kernels"] / rates["torch"],
            "steps_per_s": rates["kernels"],
            "plain_steps_per_s": rates["torch"],
            "batch": batch,
            "rounds": rounds,
        }
    ]


# ---- what is shown --------------------------------------------------------------------------------------------------


def table(measured: dict[str, Any]) -> str:
    """What was measured, as Markdown with the card's name."""
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
        lines += ["", "| VGG16, bf16: images a chip | fused, images/s | materialised, images/s |", "|---:|---:|---:|"]
        for images in dict.fromkeys(row["images"] for row in crossing):
            rates = {row["method"]: row["images_per_s"] for row in crossing if row["images"] == images}
            lines.append(f"| {images:,} | {rates['fused']:,.0f} | {rates['materialise']:,.0f} |")
    for row in measured["rows"]:
        if row["work"] == "training":
            lines += [
                "",
                f"Training compensators, batch {row['batch']}, a fresh chip each batch: {row['steps_per_s']:.1f} "
                f"steps/s, {row['ratio']:.2f} x with {row['against']} ({row['plain_steps_per_s']:.1f}).",
            ]
    return "\n".join(lines)
