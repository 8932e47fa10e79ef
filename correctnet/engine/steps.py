"""The steps of a network in the engine: values that torch computes, and values that plans in the C++ core compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from correctnet.engine import cuda
from correctnet.reloading import survives_reload


@survives_reload
@dataclass(frozen=True)
class TorchStep:
    """A value that torch computes; `sampled` says whether it differs from chip to chip."""

    node: fx.Node
    sampled: bool


@survives_reload
@dataclass(frozen=True)
class PlanStep(TorchStep):
    """A value that the core computes from one other.

    Attributes:
        source: the node of that other value.
        plan: the plan, a `correctnet._native.Plan`.
        shape: of the value, without the batch.
        layers: names of the layers in the plan.
        lasts: whether that other value and this one have their channels last.
        gpu: the plan on the device, where the network is on one.
    """

    source: fx.Node
    plan: Any
    shape: tuple[int, ...]
    layers: tuple[str, ...] = ()
    gpu: cuda.Plan | None = None
    lasts: tuple[bool, bool] = (False, False)

    def run(self, x: Tensor, seed: int, samples: Sequence[int], memory: int) -> Tensor:
        """Compute the value for inputs x (N, ...) on each chip, (samples, N, *shape), float32, on the device of x.

        `memory` limits the bytes of workspace on a GPU; on the CPU see `bytes`.
        """
        images = _images(x, self.lasts[0])
        if self.gpu:
            out = self.gpu.outputs(images, seed, samples, memory)
        else:
            last = dict(zip(("images_last", "outputs_last"), self.lasts, strict=True))
            threads = torch.get_num_threads()
            found, _ = self.plan.outputs(images.numpy(), seed=seed, samples=list(samples), threads=threads, **last)
            out = torch.from_numpy(found)
        return out.view(len(samples), len(x), *self.shape)

    def count_correct(self, x: Tensor, labels: Tensor, seed: int, samples: Sequence[int], memory: int) -> list[int]:
        """Return the first result of `count`."""
        return self.count(x, labels, seed, samples, memory)[0]

    def count(
        self, x: Tensor, labels: Tensor, seed: int, samples: Sequence[int], memory: int
    ) -> tuple[list[int], list[int]]:
        """Count for each chip the inputs x (N, ...) with a correct value, and those with a value that is not finite.

        A value is correct if no element is NaN and the first largest is at the index of the label, labels (N,). It is
        not finite if an element is NaN or infinite.
        """
        if self.gpu:
            correct, nonfinite = self.gpu.count(_images(x, self.lasts[0]), labels, seed, samples, memory).tolist()
            return correct, nonfinite
        labels = labels.to(torch.int64).contiguous().numpy()
        threads = torch.get_num_threads()
        images = _images(x, self.lasts[0]).numpy()
        correct, _, nonfinite = self.plan.count_correct(
            images, labels, seed=seed, samples=list(samples), threads=threads, images_last=self.lasts[0]
        )
        return correct.tolist(), nonfinite.tolist()

    def bytes(self, images: int, samples: int) -> int:
        """Return the bytes that a run takes besides the images; on a GPU, with at most four chips at once."""
        if self.gpu:
            return self.gpu.workspace(images, min(samples, 4))
        return self.plan.bytes(images, samples, threads=torch.get_num_threads())


def _images(x: Tensor, last: bool = False) -> Tensor:
    """Return a value as (N, C, H, W), or as (N, H, W, C) where `last`: vectors are one pixel, tokens one row."""
    x = x.detach()
    while x.dim() < 4:
        x = x.unsqueeze(1 if last else 2)
    return x.contiguous()
