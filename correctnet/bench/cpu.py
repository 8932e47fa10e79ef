"""Throughput of the Monte Carlo engine on the CPU, against plain PyTorch and against the machine's limits.

Three workloads (`WORKLOADS`) are run by `correctnet.evaluate`, as users call it, and by the baseline, the loop that one
would write without this package (`correctnet.bench.baseline`): the fastest of many variants for float32 and for
bfloat16, found by a search on this machine. The engine and the two baselines then take turns; medians are reported.

    T* = executed FLOP / peak + weights drawn / sampler's rate

is a lower bound on the time of any program with these kernels; the peak is that of multiply-adds in registers
(`_native.peak`).

Networks and images are random, which does not affect the time. Rates are in images a second, each image counted on
every chip. Baselines are made and compiled before they are timed; the engine's time includes tracing its network.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from correctnet import __version__
from correctnet.bench.baseline import Plain, Variant, rate_of, select
from correctnet.bench.workloads import (
    PRECISIONS,
    SIGMA,
    WORKLOADS,
    Log,
    Row,
    Workload,
    seconds_of,
    torch_threads,
    why_not_compiled,
)
from correctnet.crossbar.convert import convert
from correctnet.devices.device import Faults
from correctnet.devices.lognormal import LogNormalVariation
from correctnet.engine.engine import Engine
from correctnet.errors import UserError
from correctnet.evaluation.montecarlo import evaluate
from correctnet.machine import cpu_name
from correctnet.noise import arrays, core, draw, streams
from correctnet.noise.arrays import ArrayNoise, FaultTable
from correctnet.precision import Precision

BATCHES = (64, 250, 1000, 2000)
NOISE_WEIGHTS = 1 << 22
KIND_WEIGHTS = 1 << 18
PLAIN_SECONDS = 10.0  # time of a baseline in each round, about, unless all chips are requested


# ---- the machine ----------------------------------------------------------------------------------------------------


class Machine:
    """Limits of this machine, by precision ("bf16", "float32").

    Attributes:
        threads: number of threads in use.
        peak: FLOP a second in registers on all threads at once, the best that was measured.
        weights: noisy weights a second on one thread.
    """

    def __init__(self, threads: int, weights: dict[str, float]):
        self.threads, self.weights = threads, weights
        self.peak = dict.fromkeys(PRECISIONS, 0.0)
        self.remeasure_peak()

    def remeasure_peak(self) -> None:
        """Measure the peaks again and keep the better: other load on the machine can only lower them."""
        for name, precision in PRECISIONS.items():
            self.peak[name] = max(self.peak[name], peak(precision, self.threads))

    def seconds(self, precision: str, flop: float, weights: float) -> float:
        """Return T*: the time of `flop` at the peak and of `weights` drawn, on all threads."""
        return flop / self.peak[precision] + weights / (self.weights[precision] * self.threads)


def peak(precision: Precision, threads: int, seconds: float = 0.2) -> float:
    """Return the FLOP a second of `threads` threads at once, in registers; the best of five parts of `seconds`."""

    def rate(_: int) -> float:
        flop, began = 0.0, time.perf_counter()
        while (taken := time.perf_counter() - began) < seconds / 5:
            flop += core.extension.peak(precision, 500_000)  # milliseconds
        return flop / taken

    with ThreadPoolExecutor(threads) as pool:
        return max(sum(pool.map(rate, range(threads))) for _ in range(5))


def noise_rates(rounds: int, weights: int = NOISE_WEIGHTS, seconds: float = 0.1) -> dict[tuple[str, str], float]:
    """Return the weights drawn a second on one thread by (precision, "core" or "plain"), medians over `rounds`.

    "plain" is normal_, exp_, mul_ in allocated buffers, rounded once to bfloat16.
    """
    generator = streams.torch_generator(0, "benchmark", "noise rates")
    nominal = torch.randn(weights // 1024, 1024, generator=generator)
    drawn, rounded = torch.empty_like(nominal), torch.empty_like(nominal, dtype=torch.bfloat16)
    ways: dict[tuple[str, str], Callable[[], object]] = {
        ("bf16", "core"): lambda: draw.noisy_weight(nominal, 0, 0, 0, SIGMA, dtype=torch.bfloat16),
        ("bf16", "plain"): lambda: rounded.copy_(drawn.normal_(0, SIGMA, generator=generator).exp_().mul_(nominal)),
        ("float32", "core"): lambda: draw.noisy_weight(nominal, 0, 0, 0, SIGMA),
        ("float32", "plain"): lambda: drawn.normal_(0, SIGMA, generator=generator).exp_().mul_(nominal),
    }
    with torch.inference_mode(), torch_threads(1):
        for way in ways.values():
            way()
        taken = [{key: seconds_of(way, seconds) for key, way in ways.items()} for _ in range(rounds)]
    return {key: nominal.numel() / median(turn[key] for turn in taken) for key in ways}


def kind_rates(rounds: int, weights: int = KIND_WEIGHTS, seconds: float = 0.1) -> dict[str, float]:
    """Return the weights drawn a second on one thread by kind of noise, in float32, medians over `rounds`.

    The kinds take turns, on arrays that stay in a cache.
    """
    weight = torch.randn(weights // 256, 256, generator=streams.torch_generator(0, "benchmark", "noise rates"))
    mean, spread = arrays.rounded(weight, weight.abs() / 4)
    outcomes = Faults(0.01, 0.002).outcomes("pair")
    faults = {"faults": FaultTable.of(*outcomes), "reach": weight.abs().amax(1)}
    given = {
        "lognormal, protected": ArrayNoise(mean, torch.ones_like(mean), SIGMA),
        "Gaussian": ArrayNoise(mean, spread),
        "Gaussian, stuck devices": ArrayNoise(mean, spread, **faults),
    }
    ways: dict[str, Callable[[], object]] = {"lognormal": lambda: draw.noisy_weight(weight, 0, 0, 0, SIGMA)}
    ways |= {kind: (lambda noise=noise: draw.programmed(noise, 0, 0, 0)) for kind, noise in given.items()}  # type: ignore[misc]
    with torch.inference_mode(), torch_threads(1):
        for way in ways.values():
            way()
        taken = [{key: seconds_of(way, seconds) for key, way in ways.items()} for _ in range(rounds)]
    return {key: weights / median(turn[key] for turn in taken) for key in ways}


# ---- the measurements -----------------------------------------------------------------------------------------------


def measure(
    workloads: Sequence[Workload] = tuple(WORKLOADS.values()),
    *,
    noise: bool = True,
    scaling: bool = False,
    rounds: int = 5,
    full: bool = False,
    seed: int = 0,
    batches: Sequence[int] = BATCHES,
    compiles: bool = True,
    seconds: float = 0.5,
    log: Log = lambda text: None,
) -> dict[str, Any]:
    """Run the benchmarks on as many threads as torch has.

    Args:
        workloads: what to run.
        noise: also measure the sampler.
        scaling: also measure the time against samples, images and threads.
        rounds: turns of the engine and the baselines.
        full: run baselines on all chips, instead of as many as take ten seconds.
        seed: seed of images, chips and weights.
        batches: batch sizes of the baselines.
        compiles: whether baselines may use torch.compile.
        seconds: least time for each variant in the search for the baselines.
        log: called with a line on what is being measured.

    Returns:
        A description of the machine (cpu, isa, threads, versions, peaks) and `rows`, a dict each: see `_workload_rows`,
        `_noise_rows` and `scaling_rows`.

    Raises:
        UserError: the C++ core was not built, or fewer than one round.
    """
    status = core.status()
    if not status.built:
        raise UserError(f"bench: nothing to measure, {status.reason}")
    if rounds < 1:
        raise UserError(f"bench: at least one round is needed, not {rounds}")
    threads = torch.get_num_threads()
    log(f"peaks of {cpu_name()}, {status.isa}, on one thread and on {threads}")
    sampler = noise_rates(rounds)
    machine = Machine(threads, {name: sampler[name, "core"] for name in PRECISIONS})
    alone = {name: peak(precision, 1) for name, precision in PRECISIONS.items()}
    rows = _noise_rows(sampler, rounds) + _kind_rows(kind_rates(rounds), rounds) if noise else []
    reason = None
    if compiles and workloads:
        reason = why_not_compiled()
        if reason:
            log(f"torch.compile does not work here, baselines do without: {reason}")
    for workload in workloads:
        rows += _workload_rows(
            workload, machine, rounds, full, seed, batches, compiles and reason is None, seconds, log
        )
    if scaling:
        rows += scaling_rows(threads, rounds, seed, log)
    about = {
        "cpu": cpu_name(),
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


def _workload_rows(
    workload: Workload,
    machine: Machine,
    rounds: int,
    full: bool,
    seed: int,
    batches: Sequence[int],
    compiles: bool,
    seconds: float,
    log: Log,
) -> list[Row]:
    """Measure a workload: each precision of the engine against the best baseline, overall and of each precision.

    Keys: work (the workload), precision (of the engine), against ("best", or the baseline's precision), ratio (of the
    medians) with ratio_low and ratio_high (of single rounds), fraction_of_limit (T* / T), images_per_s,
    limit_images_per_s; plain (the baseline in words), plain_precision, plain_images_per_s, plain_forward_images_per_s
    (without drawing weights), plain_chips (that it was timed on); chips, images, rounds.
    """
    images, labels = workload.data(seed)
    network = workload.network(seed)
    analog = convert(network, LogNormalVariation(SIGMA), seed)

    def engine(precision: str) -> None:
        evaluate(analog, (images, labels), workload.chips, precision=PRECISIONS[precision], progress=False)

    def rate(variant: Variant) -> float:
        found = rate_of(workload, network, variant, machine.threads, seconds)
        log(f"  {variant}: {found:,.0f} images/s")
        return found

    log(f"{workload.name}: searching the fastest plain PyTorch loop")
    sizes = sorted({min(batch, workload.images) for batch in batches})
    chosen = select(rate, sizes, compiles, min(machine.threads, workload.chips))
    torch._dynamo.reset()
    plain, chips = {}, {}
    for precision, (variant, found) in chosen.items():
        plain[precision] = Plain(network, images, labels, variant, machine.threads, seed)
        turns = max(1, round(PLAIN_SECONDS * found / workload.images / variant.at_once))
        chips[precision] = workload.chips if full else min(workload.chips, turns * variant.at_once)
        engine(precision)

    # Seconds of each round.
    ours: dict[str, list[float]] = {p: [] for p in PRECISIONS}
    theirs: dict[str, list[float]] = {p: [] for p in PRECISIONS}
    forward: dict[str, list[float]] = {p: [] for p in PRECISIONS}
    few = {p: min(chips[p], max(chosen[p][0].at_once, chips[p] // 4)) for p in PRECISIONS}
    for i in range(rounds):
        machine.remeasure_peak()
        for p in PRECISIONS:
            ours[p].append(seconds_of(lambda p=p: engine(p)))
            theirs[p].append(seconds_of(lambda p=p: plain[p].run(chips[p])))
            forward[p].append(seconds_of(lambda p=p: plain[p].run(few[p], draw=False)))
            rates = (n * workload.images / taken[p][-1] for n, taken in ((workload.chips, ours), (chips[p], theirs)))
            shown = "engine {:,.0f} images/s, plain {:,.0f} images/s".format(*rates)
            log(f"{workload.name}, round {i + 1} of {rounds}, {p}: {shown}")

    our_rate = {p: workload.chips * workload.images / median(ours[p]) for p in PRECISIONS}
    plain_rate = {p: chips[p] * workload.images / median(theirs[p]) for p in PRECISIONS}
    best = max(plain_rate, key=plain_rate.__getitem__)
    rows = []
    for p in PRECISIONS:
        limit = limit_of(workload, analog, images, machine, p)
        for against in ("best", *PRECISIONS):
            other = best if against == "best" else against
            ratios = [workload.chips / a / (chips[other] / b) for a, b in zip(ours[p], theirs[other], strict=True)]
            rows.append(
                {
                    "work": workload.name,
                    "precision": p,
                    "against": against,
                    "ratio": our_rate[p] / plain_rate[other],
                    "ratio_low": min(ratios),
                    "ratio_high": max(ratios),
                    "fraction_of_limit": limit / median(ours[p]),
                    "images_per_s": our_rate[p],
                    "limit_images_per_s": workload.chips * workload.images / limit,
                    "plain": str(plain[other].variant),
                    "plain_precision": other,
                    "plain_images_per_s": plain_rate[other],
                    "plain_forward_images_per_s": few[other] * workload.images / median(forward[other]),
                    "plain_chips": chips[other],
                    "chips": workload.chips,
                    "images": workload.images,
                    "rounds": rounds,
                }
            )
    return rows


def limit_of(workload: Workload, analog: nn.Module, images: Tensor, machine: Machine, precision: str) -> float:
    """Return T* of a workload in seconds. The engine draws a chip's weights once for each of its blocks of images."""
    engine = Engine(analog, images[:2], precision=PRECISIONS[precision])
    shared, sampled, weights = engine.cost
    blocks = -(-workload.images // engine.block(workload.images, workload.chips))
    return machine.seconds(
        precision, workload.images * (shared + workload.chips * sampled), workload.chips * weights * blocks
    )


def _noise_rows(rates: dict[tuple[str, str], float], rounds: int) -> list[Row]:
    """Return the sampler's rows: weights_per_s on one thread, plain_weights_per_s of plain PyTorch, and their ratio."""
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


def _kind_rows(rates: dict[str, float], rounds: int) -> list[Row]:
    """Return a row for each kind of noise: weights_per_s on one thread, and its time relative to the lognormal's."""
    about = {"work": "noise kinds", "precision": "float32", "threads": 1, "rounds": rounds}
    return [
        {**about, "kind": kind, "weights_per_s": rate, "relative_time": rates["lognormal"] / rate}
        for kind, rate in rates.items()
    ]


def scaling_rows(threads: int, rounds: int, seed: int, log: Log, chips: int = 16, images: int = 2048) -> list[Row]:
    """Measure LeNet-5 in bfloat16 over samples, images and threads, the other two fixed.

    Keys: work ("scaling"), precision, axis ("samples", "images" or "threads"), chips, images, threads, seconds (the
    median), images_per_s. `chips` is the number of chips a thread.
    """
    workload = replace(WORKLOADS["lenet5-250x10000"], chips=chips * threads, images=4 * images)
    x, y = workload.data(seed)
    engine = Engine(convert(workload.network(seed), LogNormalVariation(SIGMA), seed), x[:2], precision="bfloat16")
    each = sorted({*(2**i for i in range(threads.bit_length())), threads})
    points = [("samples", workload.chips * 2**i // 4, images, threads) for i in range(5)]
    points += [("images", workload.chips, images * 2**i // 4, threads) for i in range(5)]
    points += [("threads", workload.chips, images, n) for n in each]
    taken: list[list[float]] = [[] for _ in points]
    for i in range(rounds + 1):  # the first round does not count
        log(f"scaling, round {i} of {rounds}")
        for (_, samples, count, used), seconds in zip(points, taken, strict=True):
            with torch_threads(used):
                seconds.append(
                    seconds_of(lambda n=samples, k=count: engine.count_correct(x[:k], y[:k], range(n)))  # type: ignore[misc]
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
