"""Workloads of the benchmarks, and what their timing needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from correctnet.errors import one_line
from correctnet.networks.lenet import lenet5
from correctnet.networks.vgg import vgg16
from correctnet.noise import streams
from correctnet.precision import Precision

SIGMA = 0.5
PRECISIONS: dict[str, Precision] = {"bf16": "bfloat16", "float32": "float32"}

Log = Callable[[str], object]
Row = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """Classification of `images` images on each of `chips` chips by a network.

    Attributes:
        name: name of the workload.
        maker: makes the network.
        shape: (C, H, W) of an image.
        chips, images: how many.
    """

    name: str
    maker: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    chips: int
    images: int

    def network(self, seed: int) -> nn.Module:
        """Make the network with random weights, in evaluation mode."""
        with streams.global_generators(seed, "benchmark", "network"):
            return self.maker().eval()

    def data(self, seed: int) -> tuple[Tensor, Tensor]:
        """Make random images (N, C, H, W) and labels (N,)."""
        generator = streams.torch_generator(seed, "benchmark", "data")
        images = torch.randn(self.images, *self.shape, generator=generator)
        return images, torch.randint(10, (self.images,), generator=generator)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("lenet5-250x10000", lenet5, (1, 32, 32), 250, 10000),
        Workload("vgg16-8x2000", vgg16, (3, 32, 32), 8, 2000),
        Workload("vgg16-64x64", vgg16, (3, 32, 32), 64, 64),  # one reward of the search
    )
}


def seconds_of(call: Callable[[], object], at_least: float = 0.0) -> float:
    """Return the seconds a call takes, averaged over as many calls as fit into `at_least` seconds."""
    began, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - began < at_least:
        call()
        calls += 1
    return (time.perf_counter() - began) / calls


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let torch use `threads` threads within an operation, for the length of a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def flat(weight: Tensor) -> Tensor:
    """Return a view of a weight's memory with one dimension."""
    return weight.detach().as_strided((weight.numel(),), (1,))


def why_not_compiled(device: str = "cpu") -> str | None:
    """Explain why torch.compile does not work here, in one line, or None."""
    try:
        with torch.inference_mode():
            torch.compile(nn.Linear(2, 2, device=device), dynamic=False)(torch.ones(1, 2, device=device))
    except Exception as error:  # no compiler, no headers, an unsupported Python, ...
        return one_line(error).partition(" Set TORCH")[0][:200] or type(error).__name__
    return None
