"""Baseline of the benchmarks: the fastest loop over chips in plain PyTorch, found by a search on this machine."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from correctnet.bench.workloads import PRECISIONS, SIGMA, Workload, flat, seconds_of, torch_threads
from correctnet.noise import streams


@dataclass(frozen=True)
class Variant:
    """A way to write the loop over chips.

    Attributes:
        kind: "float32", float32 weights under bfloat16 "autocast", or weights and images in bfloat16 ("bf16").
        channels_last: whether images and weights have this memory order.
        batch: images a forward pass.
        compiled: whether torch.compile is used.
        at_once: chips that run concurrently, each on its share of the threads.
        graph: whether a chip's pass over all images is one CUDA graph.
    """

    kind: Literal["float32", "autocast", "bf16"]
    channels_last: bool
    batch: int
    compiled: bool = False
    at_once: int = 1
    graph: bool = False

    @property
    def precision(self) -> str:
        """Precision of the products, a key of `PRECISIONS`."""
        return "float32" if self.kind == "float32" else "bf16"

    def __str__(self) -> str:
        kind = {"float32": "float32", "autocast": "bf16 autocast", "bf16": "bf16 network"}[self.kind]
        order = "channels_last" if self.channels_last else "contiguous"
        how = ", torch.compile" * self.compiled + f", {self.at_once} chips at once" * (self.at_once > 1)
        how += ", CUDA graph" * self.graph
        return f"{kind}, {order}, batch {self.batch}{how}"


class Chips:
    """The loop over chips on the CPU: weights = nominal * exp(sigma * randn), in place, then batches of images."""

    def __init__(self, network: nn.Module, images: Tensor, labels: Tensor, variant: Variant, seed: int):
        order = torch.channels_last if variant.channels_last else torch.contiguous_format
        dtype = torch.bfloat16 if variant.kind == "bf16" else torch.float32
        self.network = copy.deepcopy(network).eval().to(memory_format=order)
        weights = [m.weight for m in self.network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        # In memory order, the only one in which torch fills a tensor with vector instructions.
        self._nominal = [flat(w).clone() for w in weights]
        self.network.to(dtype)
        self._weights = [flat(w) for w in weights]
        # Random numbers in bfloat16 are slower to draw; float32 weights are drawn in place.
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
        """Return how many images the programmed chip classifies correctly."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self._autocast):
            return sum(int((self._forward(x).argmax(1) == y).sum()) for x, y in self._batches)

    def run(self, chips: int, draw: bool = True, classify: bool = True) -> list[int]:
        """Return the counts of `chips` chips; without `draw` or `classify` that part of the work is skipped."""
        counts = []
        with torch.inference_mode():
            for _ in range(chips):
                if draw:
                    self.draw()
                if classify:
                    counts.append(self.count())
        return counts


class Plain:
    """The loop in plain PyTorch: as many `Chips` concurrently as the variant says."""

    def __init__(self, network: nn.Module, images: Tensor, labels: Tensor, variant: Variant, threads: int, seed: int):
        self.variant, self._threads = variant, max(1, threads // variant.at_once)
        self._workers = [Chips(network, images, labels, variant, seed + i) for i in range(variant.at_once)]
        with torch_threads(self._threads):
            for worker in self._workers:
                worker.run(1)  # compiles, and makes what torch caches

    def run(self, chips: int, draw: bool = True, classify: bool = True) -> list[int]:
        """See `Chips.run`."""
        each, rest = divmod(chips, len(self._workers))
        with torch_threads(self._threads):
            if len(self._workers) == 1:
                return self._workers[0].run(chips, draw, classify)
            with ThreadPoolExecutor(len(self._workers)) as pool:
                done = [pool.submit(w.run, each + (i < rest), draw, classify) for i, w in enumerate(self._workers)]
                return [count for part in done for count in part.result()]


def select(
    rate: Callable[[Variant], float], batches: Sequence[int], compiles: bool, at_once: int, graphs: bool = False
) -> dict[str, tuple[Variant, float]]:
    """Find the fastest variant of each precision ("bf16", "float32"), and its rate.

    A local search from each kind and memory order changes one attribute at a time as long as that is faster. The
    fastest three of each precision are then measured again, since a single measurement can be too good by chance.

    Args:
        rate: measures a variant; larger is faster.
        batches: the batch sizes, ascending.
        compiles: whether to try torch.compile.
        at_once: number of concurrent chips to try besides one.
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


def rate_of(workload: Workload, network: nn.Module, variant: Variant, threads: int, seconds: float) -> float:
    """Estimate the images a second of a variant on the whole workload from a few chips and images."""
    torch._dynamo.reset()  # dynamo stops compiling a function after too many variants
    # Whole batches, of at least 500 images or one batch.
    images = min(workload.images, variant.batch * max(1, 500 // variant.batch))
    x, y = replace(workload, images=images).data(0)
    plain = Plain(network, x, y, variant, threads, 0)
    draw = seconds_of(lambda: plain.run(variant.at_once, classify=False), seconds / 5)
    classify = seconds_of(lambda: plain.run(variant.at_once, draw=False), seconds)
    return variant.at_once * workload.images / (draw + classify / images * workload.images)
