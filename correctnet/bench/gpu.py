"""How fast a GPU evaluates chip samples: the CUDA kernels against the best that plain PyTorch does on the same GPU.

As on the CPU (`correctnet.bench.cpu`): a search finds the fastest plain loop (float32 with TF32, bfloat16 autocast, a
bfloat16 network; memory orders, batch sizes, eager, torch.compile, a CUDA graph of a chip's whole pass), then the
engine and the loops take turns, timed by CUDA events; medians count. The engine runs in each of its ways (`method`):
noise drawn while weights are loaded ("fused"), noisy weights made in memory for the same kernels ("materialise"), or
for cuBLAS and cuDNN ("library"); `crossover` says from how many images a chip the last is faster than the first.

    fraction_of_peak = images * chips * FLOP an image / time / rate of an 8192^3 bfloat16 matmul
"""

from __future__ import annotations

import copy
import itertools
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from correctnet import __version__
from correctnet.bench.cpu import PRECISIONS, SIGMA, Row, Say, Variant, Work, _flat, _why_not_compiled, select
from correctnet.crossbar.layers import convert, crossbar_layers
from correctnet.devices.lognormal import LogNormalVariation
from correctnet.engine.engine import MEMORY, Engine
from correctnet.errors import UserError, one_line
from correctnet.methods import compensation
from correctnet.networks.lenet import lenet5
from correctnet.networks.vgg import vgg16
from correctnet.noise import device as cuda
from correctnet.settings import Compensate
from correctnet.training.loop import train_only

DEVICE = "cuda"  # the tests' is the CPU: all but the graphs and the times
METHODS: tuple[Literal["fused", "materialise", "library"], ...] = ("fused", "materialise", "library")
BATCHES = (250, 1000, 2500, 10000)
WORKS = {
    work.name: work
    for work in (
        Work("lenet5-250x10000", lenet5, (1, 32, 32), 250, 10000),
        Work("vgg16-64x64", vgg16, (3, 32, 32), 64, 64),
        Work("vgg16-250x10000", vgg16, (3, 32, 32), 250, 10000),
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


def memory() -> int:
    """Bytes that an engine may take: half of what is free, as a chip's work is best done in one launch."""
    return torch.cuda.mem_get_info()[0] // 2 if DEVICE == "cuda" else MEMORY


# ---- the plain loop -------------------------------------------------------------------------------------------------


class Chips:
    """Chip after chip on the GPU: weights = nominal * exp(sigma * randn), in place; nothing waits for the device."""

    def __init__(self, network: nn.Module, images: Tensor, labels: Tensor, variant: Variant, seed: int):
        self.variant = variant
        order = torch.channels_last if variant.channels_last else torch.contiguous_format
        dtype = torch.bfloat16 if variant.kind == "bf16" else torch.float32
        self.network = copy.deepcopy(network).eval().to(DEVICE, memory_format=order)
        weights = [m.weight for m in self.network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        self._nominal = [_flat(w).clone() for w in weights]
        self.network.to(dtype)
        self._weights = [_flat(w) for w in weights]
        self._drawn = self._weights if dtype == torch.float32 else [torch.empty_like(n) for n in self._nominal]
        images = images.to(DEVICE, dtype).contiguous(memory_format=order)
        self._batches = list(zip(images.split(variant.batch), labels.to(DEVICE).split(variant.batch), strict=True))
        self._forward = torch.compile(self.network, dynamic=False) if variant.compiled else self.network
        self._correct = torch.zeros((), dtype=torch.int64, device=DEVICE)
        torch.manual_seed(seed)
        with torch.inference_mode():
            for _ in range(3):  # compiles, and lets libraries choose their kernels
                self._chip()
            if DEVICE == "cuda":
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
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.variant.kind == "autocast"):
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
    return select(rate, sizes, compiles, 1, graphs=DEVICE == "cuda")


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
        crossover: also the methods of the engine over the number of images.
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
    reason = _why_not_compiled(DEVICE) if compiles and (works or training) else None
    if reason:
        say(f"torch.compile does not work here, plain loops do without: {reason}")
    rows: list[Row] = []
    for name in works:
        rows += _work_rows(WORKS[name], peaks, rounds, seed, compiles and reason is None, say)
    if crossover:
        rows += crossover_rows(seed, rounds, say)
    if training:
        rows += training_rows(seed, rounds, say, compiles and reason is None)
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
    analog = convert(network, LogNormalVariation(SIGMA), seed).to(DEVICE)
    x, y = (t.to(DEVICE) for t in data)
    engines = {
        (p, m): Engine(analog, x[:2], precision=PRECISIONS[p], method=m, memory=memory())
        for p in PRECISIONS
        for m in METHODS
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
                "fraction_of_peak": rate * sum(engines[precision, "fused"].cost[:2]) / peaks[precision],
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
    """VGG16 in bfloat16 by each method over the number of images a chip."""
    work = Work("crossover", vgg16, (3, 32, 32), chips, max(CROSSOVER_IMAGES))
    x, y = (t.to(DEVICE) for t in work.data(seed))
    analog = convert(work.network(seed), LogNormalVariation(SIGMA), seed).to(DEVICE)
    engines = {m: Engine(analog, x[:2], precision="bfloat16", method=m, memory=memory()) for m in METHODS}
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


def crossover(rows: Sequence[Row], method: str = "library", than: str = "fused") -> int | None:
    """The smallest number of images a chip from which `method` is faster, there and at all more images that `rows`
    of `crossover_rows` know; None where it is not even at the most."""
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


# ---- training -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """One way to train compensators, a fresh chip each batch.

    Attributes:
        noise: whose, the CUDA kernels' or torch's.
        compiled: the network, and torch's noise, by torch.compile.
        graph: a step is one CUDA graph.
    """

    noise: Literal["kernels", "torch"]
    compiled: bool = False
    graph: bool = False

    def __str__(self) -> str:
        whose = "the kernels' noise" if self.noise == "kernels" else "torch's noise"
        how = ["torch.compile"] * self.compiled + ["CUDA graph"] * self.graph
        return f"{whose}, {', '.join(how) or 'eager'}"


class Trainer:
    """Steps of training the compensators of `network`, bfloat16 autocast: a fresh chip's weights are written over those
    of a digital network, and all that is new at a step (the chip's number, the noise) stands on the device."""

    def __init__(self, network: nn.Module, filters: dict[str, int], x: Tensor, y: Tensor, way: Way, seed: int):
        self._x, self._y = x.to(DEVICE).contiguous(memory_format=torch.channels_last), y.to(DEVICE)
        self._way = way
        self.network = compensation.compensate(network, filters, seed=seed).eval()
        self.network.to(DEVICE, memory_format=torch.channels_last)
        self.parameters = compensation.compensation_parameters(self.network)
        train_only(self.network, self.parameters)
        self.weights = [layer.weight for _, layer in crossbar_layers(self.network)]
        self._nominal = [w.detach().clone(memory_format=torch.preserve_format) for w in self.weights]
        self._seed = torch.full((), seed, dtype=torch.int64, device=DEVICE)
        self.chip = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        self._optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, capturable=way.graph)
        self._forward = torch.compile(self.network, dynamic=False) if way.compiled else self.network
        self._draw = self._kernels if way.noise == "kernels" else self._torch
        if way.compiled and way.noise == "torch":
            self._draw = torch.compile(self._torch, dynamic=False)
        self._graph = None
        if way.graph:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # as torch wants it: what is made once must not be made while it captures
                for _ in range(3):
                    self._step()
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._step()
        else:
            for _ in range(3):
                self._step()

    def _kernels(self) -> None:
        self.chip += 1
        for i, (weight, nominal) in enumerate(zip(self.weights, self._nominal, strict=True)):
            weight.copy_(cuda.noisy_weight(nominal, self._seed, self.chip, i, SIGMA)[0])

    def _torch(self) -> None:
        for weight, nominal in zip(self.weights, self._nominal, strict=True):
            weight.normal_(0, SIGMA).exp_().mul_(nominal)

    def _step(self) -> None:
        with torch.no_grad():
            self._draw()
        with torch.autocast(DEVICE, torch.bfloat16):
            logits = self._forward(self._x)
        loss = F.cross_entropy(logits.float(), self._y)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()

    def run(self, steps: int) -> None:
        """So many steps."""
        for _ in range(steps):
            self._graph.replay() if self._graph else self._step()


def training_rows(
    seed: int, rounds: int, say: Say, compiles: bool = True, batch: int = 128, steps: int = 20
) -> list[Row]:
    """Training VGG16's compensators (six convolutions, S = 1), a fresh chip each batch: each way with the kernels'
    noise against the fastest with torch's. "fit" is what `correctnet.training.loop.fit` does."""
    work = Work("training", vgg16, (3, 32, 32), 1, batch)
    x, y = work.data(seed)
    network = work.network(seed)
    filters = {f"conv{i}.layer": network.get_submodule(f"conv{i}.layer").out_channels for i in range(1, 7)}
    runs: dict[str, Callable[[int], None]] = {"fit": _fit(network, filters, x, y, seed)}
    ours, failed = ["fit"], {}
    torch._dynamo.reset()  # it gives up on a function that was compiled in too many variants
    noises: tuple[Literal["kernels", "torch"], ...] = ("kernels", "torch")
    for noise, compiled, graph in itertools.product(
        noises, sorted({False, compiles}), sorted({False, DEVICE == "cuda"})
    ):
        way = Way(noise, compiled, graph)
        try:
            runs[str(way)] = Trainer(network, filters, x, y, way, seed).run
        except Exception as error:  # a compiler's, or a capture's: the ways that are left are measured
            failed[str(way)] = one_line(error, 160)
            say(f"training, {way}: does not work here: {failed[str(way)]}")
            continue
        ours += [str(way)] * (noise == "kernels")
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            taken[name].append(seconds(lambda run=run: run(steps)) / steps)
        say(f"training, round {i} of {rounds}: " + ", ".join(f"{n}: {1 / t[-1]:.1f} steps/s" for n, t in taken.items()))
    rates = {name: 1 / median(t[1:]) for name, t in taken.items()}
    theirs = {name: rate for name, rate in rates.items() if name not in ours}
    best = max(theirs, key=theirs.__getitem__)
    return [
        {
            "work": "training",
            "precision": "bf16",
            "way": name,
            "against": best,
            "ratio": rates[name] / rates[best],
            "steps_per_s": rates[name],
            "plain_steps_per_s": rates[best],
            "plain": theirs,
            "failed": failed,
            "batch": batch,
            "rounds": rounds,
        }
        for name in ours
    ]


def _fit(network: nn.Module, filters: dict[str, int], x: Tensor, y: Tensor, seed: int) -> Callable[[int], None]:
    """Steps as `correctnet.training.loop.fit` takes them, but for reading the loss."""
    section = Compensate(precision="bfloat16")
    analog, _, hooks = compensation.prepare(network, filters, section, LogNormalVariation(SIGMA), seed)
    analog = analog.to(DEVICE, memory_format=torch.channels_last)
    x, y = x.to(DEVICE).contiguous(memory_format=torch.channels_last), y.to(DEVICE)
    parameters = compensation.compensation_parameters(analog)
    train_only(analog, parameters)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    drawn = itertools.count()

    def run(steps: int) -> None:
        for _ in range(steps):
            hooks.before_batch(next(drawn))
            with torch.autocast(DEVICE, torch.bfloat16):
                loss = F.cross_entropy(analog(x).float(), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return run


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
