"""How fast this machine evaluates chip samples: the C++ core against plain PyTorch and against the machine's limits.

Three works (`WORKS`) are done by `correctnet.evaluation.montecarlo.evaluate` as users call it, and by the loop that one would
write without this package (`Plain`). Which of its many variants that is, a search finds on the machine at hand
(`select`), for float32 and bfloat16 apart. The engine and the two loops then take turns; of each the median counts.

    T* = executed FLOP / peak + weights drawn / sampler's rate

is the time that no program with these kernels can beat; the peak is that of multiply-adds in registers (csrc/peak.h).

Networks have random weights, images are random: the time depends on neither. Rates are images a second, each image
counted on every chip. A plain loop is made and compiled before its time is taken; the engine traces its network within.
"""

from __future__ import annotations

import copy
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from correctnet import __version__
from correctnet.crossbar.layers import convert
from correctnet.devices.lognormal import LogNormalVariation
from correctnet.engine.engine import Engine
from correctnet.errors import UserError, one_line
from correctnet.evaluation.montecarlo import evaluate
from correctnet.files import storage
from correctnet.networks.lenet import lenet5
from correctnet.networks.vgg import vgg16
from correctnet.noise import core as native
from correctnet.noise import streams
from correctnet.precision import Precision

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIGMA = 0.5
BATCHES = (64, 250, 1000, 2000)
NOISE_WEIGHTS = 1 << 22
PLAIN_SECONDS = 10.0  # that a plain loop takes a round, about, unless all of it is asked for
PRECISIONS: dict[str, Precision] = {"bf16": "bfloat16", "float32": "float32"}

Say = Callable[[str], object]
Row = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """So many chips of a network over so many images."""

    name: str
    maker: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    chips: int
    images: int

    def network(self, seed: int) -> nn.Module:
        """With random weights, in evaluation mode."""
        with streams.global_generators(seed, "benchmark", "network"):
            return self.maker().eval()

    def data(self, seed: int) -> tuple[Tensor, Tensor]:
        """Random images (N, C, H, W) and labels (N,)."""
        generator = streams.torch_generator(seed, "benchmark", "data")
        images = torch.randn(self.images, *self.shape, generator=generator)
        return images, torch.randint(10, (self.images,), generator=generator)


WORKS = {
    work.name: work
    for work in (
        Work("lenet5-250x10000", lenet5, (1, 32, 32), 250, 10000),
        Work("vgg16-8x2000", vgg16, (3, 32, 32), 8, 2000),
        Work("vgg16-64x64", vgg16, (3, 32, 32), 64, 64),  # a search's reward
    )
}


# ---- the plain loop -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """One way to write the loop.

    Attributes:
        kind: float32 throughout; float32 weights under bfloat16 autocast; weights and images in bfloat16.
        channels_last: the memory order of images and weights.
        batch: images a forward pass.
        compiled: by torch.compile.
        at_once: chips at a time, each on its share of the threads.
        graph: a chip's pass over all images is one CUDA graph.
    """

    kind: Literal["float32", "autocast", "bf16"]
    channels_last: bool
    batch: int
    compiled: bool = False
    at_once: int = 1
    graph: bool = False

    @property
    def precision(self) -> str:
        return "float32" if self.kind == "float32" else "bf16"

    def __str__(self) -> str:
        kind = {"float32": "float32", "autocast": "bf16 autocast", "bf16": "bf16 network"}[self.kind]
        order = "channels_last" if self.channels_last else "contiguous"
        how = ", torch.compile" * self.compiled + f", {self.at_once} chips at once" * (self.at_once > 1)
        how += ", CUDA graph" * self.graph
        return f"{kind}, {order}, batch {self.batch}{how}"


class Chips:
    """Chip after chip through one network: weights = nominal * exp(sigma * randn), in place; batches of images."""

    def __init__(self, network: nn.Module, images: Tensor, labels: Tensor, variant: Variant, seed: int):
        order = torch.channels_last if variant.channels_last else torch.contiguous_format
        dtype = torch.bfloat16 if variant.kind == "bf16" else torch.float32
        self.network = copy.deepcopy(network).eval().to(memory_format=order)
        weights = [m.weight for m in self.network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        # In the order of memory: torch fills a tensor in this order, and in no other, with vector instructions.
        self._nominal = [_flat(w).clone() for w in weights]
        self.network.to(dtype)
        self._weights = [_flat(w) for w in weights]
        # Random numbers in bfloat16 are slower; float32 weights are drawn where they are to be.
        self._drawn = self._weights if dtype == torch.float32 else [torch.empty_like(n) for n in self._nominal]
        images = images.to(dtype).contiguous(memory_format=order)
        self._batches = list(zip(images.split(variant.batch), labels.split(variant.batch), strict=True))
        self._forward = torch.compile(self.network, dynamic=False) if variant.compiled else self.network
        self._autocast = variant.kind == "autocast"
        self._generator = streams.torch_generator(seed, "benchmark", "noise")

    def draw(self) -> None:
        """Program the next chip."""
        for weight, drawn, nominal in zip(self._weights, self._drawn, self._nominal, strict=True):
            drawn.normal_(0, SIGMA, generator=self._generator).exp_().mul_(nominal)
            if weight is not drawn:
                weight.copy_(drawn)

    def count(self) -> int:
        """How many images the present chip classifies correctly."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self._autocast):
            return sum(int((self._forward(x).argmax(1) == y).sum()) for x, y in self._batches)

    def run(self, chips: int, draw: bool = True, classify: bool = True) -> list[int]:
        """The counts of that many chips. What is not to be done is left out: drawing them, classifying the images."""
        counts = []
        with torch.inference_mode():
            for _ in range(chips):
                if draw:
                    self.draw()
                if classify:
                    counts.append(self.count())
        return counts


def _flat(weight: Tensor) -> Tensor:
    """A weight's memory, of one dimension."""
    return weight.detach().as_strided((weight.numel(),), (1,))


class Plain:
    """The loop in PyTorch alone: `Chips`, as many at once as the variant says."""

    def __init__(self, network: nn.Module, images: Tensor, labels: Tensor, variant: Variant, threads: int, seed: int):
        self.variant, self._threads = variant, max(1, threads // variant.at_once)
        self._workers = [Chips(network, images, labels, variant, seed + i) for i in range(variant.at_once)]
        with _torch_threads(self._threads):
            for worker in self._workers:
                worker.run(1)  # compiles, and makes what torch makes once

    def run(self, chips: int, draw: bool = True, classify: bool = True) -> list[int]:
        """See `Chips.run`."""
        each, rest = divmod(chips, len(self._workers))
        with _torch_threads(self._threads):
            if len(self._workers) == 1:
                return self._workers[0].run(chips, draw, classify)
            with ThreadPoolExecutor(len(self._workers)) as pool:
                done = [pool.submit(w.run, each + (i < rest), draw, classify) for i, w in enumerate(self._workers)]
                return [count for part in done for count in part.result()]


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def select(
    rate: Callable[[Variant], float], batches: Sequence[int], compiles: bool, at_once: int, graphs: bool = False
) -> dict[str, tuple[Variant, float]]:
    """The fastest variant of each precision ("bf16", "float32"), and its rate.

    From each kind and memory order one thing at a time is changed, and what is faster kept, until nothing is. Then the
    fastest three of each precision are measured again, since one measurement can be a lucky one.

    Args:
        rate: what measures a variant; larger is faster.
        batches: the batch sizes, ascending.
        compiles: whether to try torch.compile.
        at_once: how many chips at once to try, beside one.
        graphs: whether to try CUDA graphs.
    """
    rates: dict[Variant, float] = {}

    def known(variant: Variant) -> float:
        if variant not in rates:
            rates[variant] = rate(variant)
        return rates[variant]

    def neighbours(v: Variant) -> Iterator[Variant]:
        if compiles:
            yield replace(v, compiled=not v.compiled)
        i = batches.index(v.batch)
        yield from (replace(v, batch=b) for b in batches[max(0, i - 1) : i + 2] if b != v.batch)
        if at_once > 1:
            yield replace(v, at_once=at_once if v.at_once == 1 else 1)
        if graphs:
            yield replace(v, graph=not v.graph)

    kinds: tuple[Literal["float32", "autocast", "bf16"], ...] = ("float32", "autocast", "bf16")
    for kind in kinds:
        for channels_last in (False, True):
            here: Variant | None = Variant(kind, channels_last, batches[(len(batches) - 1) // 2])
            while here is not None:
                best = known(here)
                here = next((n for n in neighbours(here) if known(n) > best), None)
    found = {}
    for precision in PRECISIONS:
        those = [v for v in rates if v.precision == precision]
        again = sorted(those, key=rates.__getitem__, reverse=True)[:3]
        both = {v: (rates[v] + rate(v)) / 2 for v in again}
        fastest = max(both, key=both.__getitem__)
        found[precision] = fastest, both[fastest]
    return found


def _rate(work: Work, network: nn.Module, variant: Variant, threads: int, seconds: float) -> float:
    """Images a second on the whole work, from drawing some chips and taking some images through them."""
    torch._dynamo.reset()  # it gives up on a function that was compiled in too many variants
    # Whole batches, and enough of them.
    images = min(work.images, variant.batch * max(1, 500 // variant.batch))
    x, y = replace(work, images=images).data(0)
    plain = Plain(network, x, y, variant, threads, 0)
    draw = _seconds(lambda: plain.run(variant.at_once, classify=False), seconds / 5)
    classify = _seconds(lambda: plain.run(variant.at_once, draw=False), seconds)
    return variant.at_once * work.images / (draw + classify / images * work.images)


def _seconds(work: Callable[[], object], at_least: float = 0.0) -> float:
    """Seconds a call."""
    began, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - began < at_least:
        work()
        calls += 1
    return (time.perf_counter() - began) / calls


# ---- the machine ----------------------------------------------------------------------------------------------------


class Machine:
    """What no program can beat on this machine, by precision ("bf16", "float32").

    Attributes:
        threads: that are used.
        peak: FLOP a second in registers on all threads at once, the best that was seen.
        weights: noisy weights a second on one thread.
    """

    def __init__(self, threads: int, weights: dict[str, float]):
        self.threads, self.weights = threads, weights
        self.peak = dict.fromkeys(PRECISIONS, 0.0)
        self.look()

    def look(self) -> None:
        """Measure the peaks again: what else runs on the machine can only lower them."""
        for name, precision in PRECISIONS.items():
            self.peak[name] = max(self.peak[name], peak(precision, self.threads))

    def seconds(self, precision: str, flop: float, weights: float) -> float:
        """T*: `flop` at the peak and `weights` drawn, on all threads."""
        return flop / self.peak[precision] + weights / (self.weights[precision] * self.threads)


def peak(precision: Precision, threads: int, seconds: float = 0.2) -> float:
    """FLOP a second that `threads` threads execute at once, in registers; the best of five parts of `seconds`."""
    from correctnet import _native

    def rate(_: int) -> float:
        flop, began = 0.0, time.perf_counter()
        while (taken := time.perf_counter() - began) < seconds / 5:
            flop += _native.peak(precision, 500_000)  # milliseconds
        return flop / taken

    with ThreadPoolExecutor(threads) as pool:
        return max(sum(pool.map(rate, range(threads))) for _ in range(5))


def noise_rates(rounds: int, weights: int = NOISE_WEIGHTS, seconds: float = 0.1) -> dict[tuple[str, str], float]:
    """Weights a second on one thread by (precision, "core" or "plain"): medians of turns taken.

    The plain way is normal_, exp_, mul_ over buffers that are there already, rounded once to bfloat16.
    """
    generator = streams.torch_generator(0, "benchmark", "noise rates")
    nominal = torch.randn(weights // 1024, 1024, generator=generator)
    drawn, rounded = torch.empty_like(nominal), torch.empty_like(nominal, dtype=torch.bfloat16)
    ways: dict[tuple[str, str], Callable[[], object]] = {
        ("bf16", "core"): lambda: native.noisy_weight(nominal, 0, 0, 0, SIGMA, dtype=torch.bfloat16),
        ("bf16", "plain"): lambda: rounded.copy_(drawn.normal_(0, SIGMA, generator=generator).exp_().mul_(nominal)),
        ("float32", "core"): lambda: native.noisy_weight(nominal, 0, 0, 0, SIGMA),
        ("float32", "plain"): lambda: drawn.normal_(0, SIGMA, generator=generator).exp_().mul_(nominal),
    }
    with torch.inference_mode(), _torch_threads(1):
        for way in ways.values():
            way()
        taken = [{key: _seconds(way, seconds) for key, way in ways.items()} for _ in range(rounds)]
    return {key: nominal.numel() / median(turn[key] for turn in taken) for key in ways}


# ---- the measurements -----------------------------------------------------------------------------------------------


def measure(
    works: Sequence[Work] = tuple(WORKS.values()),
    *,
    noise: bool = True,
    scaling: bool = False,
    rounds: int = 5,
    full: bool = False,
    seed: int = 0,
    batches: Sequence[int] = BATCHES,
    compiles: bool = True,
    seconds: float = 0.5,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Measure with the threads that torch has.

    Args:
        works: what to run.
        noise: whether to give rows for the sampler.
        scaling: whether to measure cost against samples, images and threads.
        rounds: turns that the engine and the plain loops take.
        full: plain loops over all chips, rather than over as many as take ten seconds.
        seed: of images, chips and weights.
        batches: the plain loops' batch sizes.
        compiles: whether they may use torch.compile.
        seconds: that each of them is tried for, at least, in the search for the fastest.
        say: called with a line about what is being measured.

    Returns:
        What was measured on (cpu, isa, threads, versions, peaks) and `rows`, a dict each: see `_work_rows`,
        `_noise_rows` and `scaling_rows`.

    Raises:
        UserError: the C++ core was not built, or fewer than one round.
    """
    status = native.status()
    if not status.built:
        raise UserError(f"bench: nothing to measure, {status.reason}")
    if rounds < 1:
        raise UserError(f"bench: at least one round is needed, not {rounds}")
    threads = torch.get_num_threads()
    say(f"peaks of {native.cpu_name()}, {status.isa}, on one thread and on {threads}")
    sampler = noise_rates(rounds)
    machine = Machine(threads, {name: sampler[name, "core"] for name in PRECISIONS})
    alone = {name: peak(precision, 1) for name, precision in PRECISIONS.items()}
    rows = _noise_rows(sampler, rounds) if noise else []
    reason = None
    if compiles and works:
        reason = _why_not_compiled()
        if reason:
            say(f"torch.compile does not work here, plain loops do without: {reason}")
    for work in works:
        rows += _work_rows(work, machine, rounds, full, seed, batches, compiles and reason is None, seconds, say)
    if scaling:
        rows += scaling_rows(threads, rounds, seed, say)
    about = {
        "cpu": native.cpu_name(),
        "isa": status.isa,
        "threads": threads,
        "torch": torch.__version__,
        "correctnet": __version__,
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
        "sigma": SIGMA,
        "data": "random weights and images",
        "torch_compile": compiles and (reason or "works"),
        "peak_flop_per_s": {n: {"one": alone[n], "all": machine.peak[n]} for n in PRECISIONS},
    }
    return about | {"rows": [{**row, "cpu": about["cpu"], "threads": row.get("threads", threads)} for row in rows]}


def _why_not_compiled(device: str = "cpu") -> str | None:
    """Why torch.compile does not work here, in one line, or None."""
    try:
        with torch.inference_mode():
            torch.compile(nn.Linear(2, 2, device=device), dynamic=False)(torch.ones(1, 2, device=device))
    except Exception as error:  # whatever it is (no compiler, no headers, an unknown Python), the loops do without
        return one_line(error).partition(" Set TORCH")[0][:200] or type(error).__name__
    return None


def _work_rows(
    work: Work,
    machine: Machine,
    rounds: int,
    full: bool,
    seed: int,
    batches: Sequence[int],
    compiles: bool,
    seconds: float,
    say: Say,
) -> list[Row]:
    """The rows of one work: each precision of the engine against the best plain loop, of both precisions and of either.

    Keys: work, precision (the engine's), against ("best", or the plain loop's precision), ratio (of the medians) with
    ratio_low and ratio_high (of single rounds), fraction_of_limit (T*/T), images_per_s, limit_images_per_s; plain (the
    loop in words), plain_precision, plain_images_per_s, plain_forward_images_per_s (without drawing weights),
    plain_chips (that it was timed on); chips, images, rounds.
    """
    images, labels = work.data(seed)
    network = work.network(seed)
    analog = convert(network, LogNormalVariation(SIGMA), seed)

    def engine(precision: str) -> None:
        evaluate(analog, (images, labels), work.chips, precision=PRECISIONS[precision], progress=False)

    def rate(variant: Variant) -> float:
        found = _rate(work, network, variant, machine.threads, seconds)
        say(f"  {variant}: {found:,.0f} images/s")
        return found

    say(f"{work.name}: which plain loop is the fastest")
    sizes = sorted({min(batch, work.images) for batch in batches})
    chosen = select(rate, sizes, compiles, min(machine.threads, work.chips))
    torch._dynamo.reset()
    plain, chips = {}, {}
    for precision, (variant, found) in chosen.items():
        plain[precision] = Plain(network, images, labels, variant, machine.threads, seed)
        turns = max(1, round(PLAIN_SECONDS * found / work.images / variant.at_once))
        chips[precision] = work.chips if full else min(work.chips, turns * variant.at_once)
        engine(precision)

    # By round: seconds of each.
    ours: dict[str, list[float]] = {p: [] for p in PRECISIONS}
    theirs: dict[str, list[float]] = {p: [] for p in PRECISIONS}
    forward: dict[str, list[float]] = {p: [] for p in PRECISIONS}
    few = {p: min(chips[p], max(chosen[p][0].at_once, chips[p] // 4)) for p in PRECISIONS}
    for i in range(rounds):
        machine.look()
        for p in PRECISIONS:
            ours[p].append(_seconds(lambda p=p: engine(p)))
            theirs[p].append(_seconds(lambda p=p: plain[p].run(chips[p])))
            forward[p].append(_seconds(lambda p=p: plain[p].run(few[p], draw=False)))
            say(
                f"{work.name}, round {i + 1} of {rounds}, {p}: engine {work.chips * work.images / ours[p][-1]:,.0f} "
                f"images/s, plain {chips[p] * work.images / theirs[p][-1]:,.0f} images/s"
            )

    our_rate = {p: work.chips * work.images / median(ours[p]) for p in PRECISIONS}
    plain_rate = {p: chips[p] * work.images / median(theirs[p]) for p in PRECISIONS}
    best = max(plain_rate, key=plain_rate.__getitem__)
    rows = []
    for p in PRECISIONS:
        limit = _limit(work, analog, images, machine, p)
        for against in ("best", *PRECISIONS):
            other = best if against == "best" else against
            ratios = [work.chips / a / (chips[other] / b) for a, b in zip(ours[p], theirs[other], strict=True)]
            rows.append(
                {
                    "work": work.name,
                    "precision": p,
                    "against": against,
                    "ratio": our_rate[p] / plain_rate[other],
                    "ratio_low": min(ratios),
                    "ratio_high": max(ratios),
                    "fraction_of_limit": limit / median(ours[p]),
                    "images_per_s": our_rate[p],
                    "limit_images_per_s": work.chips * work.images / limit,
                    "plain": str(plain[other].variant),
                    "plain_precision": other,
                    "plain_images_per_s": plain_rate[other],
                    "plain_forward_images_per_s": few[other] * work.images / median(forward[other]),
                    "plain_chips": chips[other],
                    "chips": work.chips,
                    "images": work.images,
                    "rounds": rounds,
                }
            )
    return rows


def _limit(work: Work, analog: nn.Module, images: Tensor, machine: Machine, precision: str) -> float:
    """T* of a work in seconds. A chip's weights are drawn once for each block of images that the engine takes."""
    engine = Engine(analog, images[:2], precision=PRECISIONS[precision])
    shared, sampled, weights = engine.cost
    blocks = -(-work.images // engine.block(work.images, work.chips))
    return machine.seconds(precision, work.images * (shared + work.chips * sampled), work.chips * weights * blocks)


def _noise_rows(rates: dict[tuple[str, str], float], rounds: int) -> list[Row]:
    """The rows of the sampler: weights_per_s on one thread, plain_weights_per_s of torch's way, and their ratio."""
    plain = {p: rates[p, "plain"] for p in PRECISIONS}
    best = max(plain, key=plain.__getitem__)
    return [
        {
            "work": "noise",
            "precision": p,
            "against": against,
            "ratio": rates[p, "core"] / plain[best if against == "best" else against],
            "fraction_of_limit": None,
            "weights_per_s": rates[p, "core"],
            "plain": "normal_, exp_, mul_",
            "plain_precision": best if against == "best" else against,
            "plain_weights_per_s": plain[best if against == "best" else against],
            "threads": 1,
            "rounds": rounds,
        }
        for p in PRECISIONS
        for against in ("best", *PRECISIONS)
    ]


def scaling_rows(threads: int, rounds: int, seed: int, say: Say, chips: int = 16, images: int = 2048) -> list[Row]:
    """Seconds of LeNet-5 in bfloat16 over samples, images and threads, the two others fixed.

    Keys: work ("scaling"), precision, axis ("samples", "images" or "threads"), chips, images, threads, seconds (the
    median), images_per_s. `chips` is meant a thread.
    """
    work = replace(WORKS["lenet5-250x10000"], chips=chips * threads, images=4 * images)
    x, y = work.data(seed)
    engine = Engine(convert(work.network(seed), LogNormalVariation(SIGMA), seed), x[:2], precision="bfloat16")
    each = sorted({*(2**i for i in range(threads.bit_length())), threads})
    points = [("samples", work.chips * 2**i // 4, images, threads) for i in range(5)]
    points += [("images", work.chips, images * 2**i // 4, threads) for i in range(5)]
    points += [("threads", work.chips, images, n) for n in each]
    taken: list[list[float]] = [[] for _ in points]
    for i in range(rounds + 1):  # the first round does not count
        say(f"scaling, round {i} of {rounds}")
        for (_, samples, count, used), seconds in zip(points, taken, strict=True):
            with _torch_threads(used):
                seconds.append(
                    _seconds(lambda n=samples, k=count: engine.count_correct(x[:k], y[:k], range(n)))  # type: ignore[misc]
                )
    return [
        {
            "work": "scaling",
            "precision": "bf16",
            "axis": axis,
            "chips": samples,
            "images": count,
            "threads": used,
            "seconds": median(seconds[1:]),
            "images_per_s": samples * count / median(seconds[1:]),
            "rounds": rounds,
        }
        for (axis, samples, count, used), seconds in zip(points, taken, strict=True)
    ]


# ---- what is shown --------------------------------------------------------------------------------------------------


def table(measured: dict[str, Any]) -> str:
    """What was measured, for a terminal."""
    threads = measured["threads"]
    lines = [
        f"{measured['cpu']}, {threads} thread{'s' * (threads != 1)}, {measured['isa']}; torch {measured['torch']}",
        f"{measured['data']}, sigma {measured['sigma']:g}; medians; the load of the machine was {measured['load']:.1f}",
        "peak in registers: "
        + "; ".join(
            f"{name} {of['one'] / 1e9:.0f} GFLOP/s on one thread, {of['all'] / 1e9:.0f} on {threads}"
            for name, of in measured["peak_flop_per_s"].items()
        ),
    ]
    of_work: dict[str, list[Row]] = {}
    for row in measured["rows"]:
        of_work.setdefault(row["work"], []).append(row)
    for name, rows in of_work.items():
        shown = {"noise": _noise_table, "scaling": _scaling_table}.get(name, _work_table)
        lines += ["", *shown(rows)]
    if any("limit_images_per_s" in row for row in measured["rows"]):
        lines += [
            "",
            "limit: executed FLOP / peak + weights drawn × time a weight, on all threads",
            "*: the best plain loop; forward: without drawing weights; × bf16, × float32: how much faster the engine",
        ]
    return "\n".join(lines)


def _by_precision(rows: list[Row], key: str) -> dict[str, Row]:
    return {p: row for p in PRECISIONS for row in rows if row[key] == p}


def _work_table(rows: list[Row]) -> list[str]:
    ours, plain = _by_precision(rows, "precision"), _by_precision(rows, "plain_precision")
    ratio = {(row["precision"], row["plain_precision"]): row["ratio"] for row in rows}
    best = next(row["plain_precision"] for row in rows if row["against"] == "best")
    lines = [
        f"{rows[0]['work']}: {rows[0]['chips']} chips × {rows[0]['images']:,} images",
        f"  {'engine':<74}{'chips':>6}{'images/s':>10}{'of limit':>10}",
    ]
    for p, row in ours.items():
        lines.append(f"  {p:<74}{row['chips']:>6}{row['images_per_s']:>10,.0f}{row['fraction_of_limit']:>10.0%}")
    times = "".join(f"{'× ' + p:>10}" for p in ours)
    lines.append(f"  {'plain PyTorch':<74}{'chips':>6}{'images/s':>10}{'forward':>10}{times}")
    for p, row in plain.items():
        times = "".join(f"{ratio[q, p]:>9.1f}×" for q in ours)
        rates = f"{row['plain_images_per_s']:>10,.0f}{row['plain_forward_images_per_s']:>10,.0f}"
        lines.append(f"{'*' if p == best else ' '} {row['plain']:<74}{row['plain_chips']:>6}{rates}{times}")
    return lines


def _noise_table(rows: list[Row]) -> list[str]:
    return [
        "noise: millions of weights a second on one thread",
        f"  {'':<10}{'core':>8}{'plain PyTorch':>16}{'ratio':>8}",
        *(
            f"  {row['precision']:<10}{row['weights_per_s'] / 1e6:>8,.0f}{row['plain_weights_per_s'] / 1e6:>16,.0f}"
            f"{row['ratio']:>7.1f}×"
            for row in rows
            if row["against"] == row["precision"]
        ),
    ]


def _scaling_table(rows: list[Row]) -> list[str]:
    return [
        "scaling: LeNet-5 in bf16",
        f"  {'':<8}{'chips':>8}{'images':>8}{'threads':>9}{'seconds':>10}{'images/s':>11}",
        *(
            f"  {row['axis']:<8}{row['chips']:>8,}{row['images']:>8,}{row['threads']:>9}{row['seconds']:>10.3f}"
            f"{row['images_per_s']:>11,.0f}"
            for row in rows
        ),
    ]


def check_plot(path: Path) -> None:
    """Find out before the work that a plot can be written to `path`. Raises UserError where it cannot."""
    from matplotlib.figure import Figure

    known = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:] not in known:
        raise UserError(f"--plot {path}: the name must end with one of {', '.join('.' + k for k in sorted(known))}")
    storage.check_writable(path)


def plot(measured: dict[str, Any], path: Path) -> list[Path]:
    """Draw the rates to `path`, and the scaling, where it was measured, to a file beside it; the files written."""
    import matplotlib.pyplot as plt

    from correctnet.report import figures

    written = []
    scaling = [row for row in measured["rows"] if row["work"] == "scaling"]
    rates = [row for row in measured["rows"] if row["work"] != "scaling"]
    with plt.rc_context(figures.STYLE):
        for rows, draw, to in (
            (rates, _draw_rates, path),
            (scaling, _draw_scaling, path.with_stem(f"{path.stem}-scaling")),
        ):
            if not rows:
                continue
            figure = draw(rows)
            where = f"{measured['cpu']}, {measured['isa']}, torch {measured['torch']}"
            figure.supxlabel(where, fontsize=6, color=figures.GREY)
            with storage.replacing(to) as temporary:
                figure.savefig(temporary, format=to.suffix[1:], dpi=160)
            plt.close(figure)
            written.append(to)
    return written


def _draw_rates(rows: list[Row]) -> Figure:
    """A panel a work: the engine and the best plain loop in both precisions, and the engine's limits."""
    import matplotlib.pyplot as plt

    works = list(dict.fromkeys(row["work"] for row in rows))
    columns = min(2, len(works))
    lines = -(-len(works) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 2.3 * lines + 0.3), squeeze=False)
    for ax in axes.flat[len(works) :]:
        ax.remove()
    for ax, work in zip(axes.flat, works, strict=False):
        _draw_work(ax, [row for row in rows if row["work"] == work])
    return figure


def _draw_work(ax: Axes, rows: list[Row]) -> None:
    from correctnet.report.figures import BLUE, GREY, ORANGE

    unit = "weights_per_s" if rows[0]["work"] == "noise" else "images_per_s"
    ours, plain = _by_precision(rows, "precision"), _by_precision(rows, "plain_precision")
    best = {row["precision"]: row for row in rows if row["against"] == "best"}
    labels = [*(f"engine, {p}" for p in ours), *(f"plain, {p}" for p in plain)]
    rates = [*(row[unit] for row in ours.values()), *(row[f"plain_{unit}"] for row in plain.values())]
    bars = ax.barh(labels, rates, color=[BLUE] * len(ours) + [ORANGE] * len(plain), height=0.65)
    texts = [_short(rate) for rate in rates]
    for i, p in enumerate(ours):
        texts[i] += f" ({best[p]['ratio']:.1f}×)"
    for text in ax.bar_label(bars, texts, padding=4, fontsize=8):
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8})
    for i, row in enumerate(ours.values()):
        if row["fraction_of_limit"]:
            ax.vlines(row["limit_images_per_s"], i - 0.4, i + 0.4, color=GREY, linewidth=2, label="" if i else "limit")
    ax.invert_yaxis()
    ax.margins(x=0.3)
    ax.grid(axis="y", visible=False)
    ax.set_axisbelow(True)
    ax.xaxis.set_major_formatter(lambda rate, _: _short(rate))
    of_what = "weights/s on one thread" if unit == "weights_per_s" else "images/s"
    ax.set(title=rows[0]["work"], xlabel=f"{of_what} (× the best plain PyTorch)")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="lower right")


def _draw_scaling(rows: list[Row]) -> Figure:
    """Three panels: measured points over samples, images and threads, and the straight line through the origin."""
    import matplotlib.pyplot as plt

    from correctnet.report.figures import BLUE, GREY

    figure, axes = plt.subplots(1, 3, figsize=(9.6, 2.9))
    fixed = {"samples": ("images", "threads"), "images": ("chips", "threads"), "threads": ("chips", "images")}
    for ax, axis in zip(axes, fixed, strict=True):
        of_axis = [row for row in rows if row["axis"] == axis]
        xs = [row["chips" if axis == "samples" else axis] for row in of_axis]
        value = "images_per_s" if axis == "threads" else "seconds"
        ys = [row[value] for row in of_axis]
        slope = ys[0] / xs[0] if axis == "threads" else ys[-1] / xs[-1]
        ax.plot([0, xs[-1]], [0, slope * xs[-1]], color=GREY, linestyle="--", label="proportional")
        ax.plot(xs, ys, color=BLUE, marker="o", markersize=4, linestyle="", label="measured")
        ax.set(xlabel="chip samples" if axis == "samples" else axis, ylabel=value.replace("_per_", "/"), ylim=(0, None))
        ax.set_title(", ".join(f"{of_axis[0][name]:,} {name}" for name in fixed[axis]), fontsize=8)
        ax.yaxis.set_major_formatter(lambda y, _: _short(y) if y >= 10 else f"{y:g}")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend()
    return figure


def _short(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"
