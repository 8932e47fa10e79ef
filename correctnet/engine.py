"""Runs a converted network on many chip samples in the C++ core.

engine = Engine(analog, images[:2])
engine.count_correct(images, labels, samples=range(250))
print(engine.report)                # which layers were fused, and what runs through torch

The network is traced with torch.fx and cut into *plans* (csrc/engine.h): sequences of operations that the core runs
without Python in between, each convolution or linear layer fused with its bias, BatchNorm, ReLU (either order) and
2 x 2 max-pool, and its weights made noisy while they are packed. What a plan cannot express runs through torch, chip
by chip; `Report` names it. A plan holds a copy of the weights: an engine is for the model as it is when it is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from correctnet import cuda
from correctnet.analog import AnalogLayer, analog_layers, chip_of, programmed
from correctnet.errors import UserError
from correctnet.graph import Unsupported, call, in_place, trace
from correctnet.lowering import Lowering, PlanStep, Precision, TorchStep

BLOCK = 1024  # images that a plan holds at a time, at most: enough that drawing a chip's weights does not count
GPU_BLOCK = 1 << 14  # the same on a GPU
LANES = 16  # images of one vector in the core
MEMORY = 2 << 30  # bytes
# Of the largest output; a wrongly translated network is off by a hundred times as much.
CHECK_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Report:
    """What of a network the core runs.

    Attributes:
        fused: the analog layers that run in the core.
        unfused: the analog layers that run through torch, their weights made once a chip.
        torch: every operation that runs through torch, as "name (what it is)".
        plans: how many pieces the core runs.
        reason: why nothing runs in the core, in one line, or None.
    """

    fused: tuple[str, ...] = ()
    unfused: tuple[str, ...] = ()
    torch: tuple[str, ...] = ()
    plans: int = 0
    reason: str | None = None

    def __str__(self) -> str:
        if self.reason:
            return f"everything runs through torch: {self.reason}"
        total = len(self.fused) + len(self.unfused)
        parts = [f"{len(self.fused)} of {total} analog layers fused, in {self.plans} piece{'s' * (self.plans != 1)}"]
        if self.unfused:
            parts.append(f"unfused: {', '.join(self.unfused)}")
        if self.torch:
            parts.append(f"through torch: {', '.join(self.torch)}")
        return "; ".join(parts)


class Engine:
    """A network on many chip samples.

    Args:
        model: from `correctnet.analog.convert`; it is put into evaluation mode.
        example: inputs like those to come, (at least 1, C, H, W) or (at least 1, features).
        first_layer: layers of a smaller index stay nominal.
        precision: "float32", or "bfloat16" for weights and activations (sums are float32).
        memory: bytes that a run may take beside the images, about.
        method: how CUDA kernels get at noisy weights, see `correctnet.cuda.Plan`; of no meaning on a CPU.

    Attributes:
        report: what runs in the core.
        whole: whether that is all of the network, in one piece.

    Raises:
        Unsupported: the core can run nothing of the network; `describe` gives a `Report` with the `reason` instead.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Tensor,
        first_layer: int = 0,
        precision: Precision = "float32",
        memory: int = MEMORY,
        method: cuda.Method = "fused",
    ):
        if precision not in ("float32", "bfloat16"):
            raise UserError(f"engine: precision must be 'float32' or 'bfloat16', not {precision!r}")
        self._model, self._first_layer, self._memory = model.eval(), first_layer, memory
        self._chip = chip_of(model)
        graph = Lowering(trace(model, example))
        self._steps = graph.steps(first_layer, precision, method)
        self._output = graph.output
        self._input = graph.input
        self._root = graph.root
        self.report = _report(graph, self._steps)
        self.on_gpu = cuda.reaches(graph.device)
        self._device = graph.device
        self._whole = self._steps[0] if len(self._steps) == 1 and isinstance(self._steps[0], PlanStep) else None
        self.whole = self._whole is not None
        self._check(graph, example, precision)

    def _check(self, graph: Lowering, example: Tensor, precision: Precision) -> None:
        """Compare with torch on a chip of its own: a network that was misread must never give an accuracy."""
        sample = 0 if self._chip.sample is None else self._chip.sample
        images = example[:LANES]
        steps = self._steps
        if precision == "bfloat16":
            self._steps = graph.steps(self._first_layer, "float32")
        try:
            found = self.outputs(images, [sample])[0]
        finally:
            self._steps = steps
        with torch.no_grad(), programmed(self._model, sample, self._first_layer), _full_float32(self._device):
            wanted = self._model(images)
        scale = wanted.abs().max().item()
        error = (found - wanted).abs().max().item()
        if found.shape != wanted.shape or (math.isfinite(scale) and not error <= CHECK_TOLERANCE * scale):
            raise UserError(
                f"engine: the core's outputs differ from torch's by {error:.3g} of {scale:.3g}; "
                "please report this network, and use engine='torch' meanwhile"
            )

    @torch.no_grad()
    def outputs(self, images: Tensor, samples: Sequence[int]) -> Tensor:
        """The network's outputs on each chip, (samples, N, ...), float32."""
        _check_samples(samples)
        if len(images) == 0:
            raise UserError("engine: no images")
        parts = []
        images = images.to(self._device)
        size = self.block(len(images), len(samples))
        for block in images.split(size):
            parts.append(torch.stack(list(self._run(block, samples))))
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def count_correct(self, images: Tensor, labels: Tensor, samples: Sequence[int]) -> list[int]:
        """On how many of `images` the largest output is the label's, for each chip; images (N, ...), labels (N,)."""
        _check_samples(samples)
        if len(images) == 0 or len(images) != len(labels):
            raise UserError(f"engine: {len(images)} images and {len(labels)} labels")
        images, labels = images.to(self._device), labels.to(self._device)
        correct = [0] * len(samples)
        size = self.block(len(images), len(samples))
        for x, y in zip(images.split(size), labels.split(size), strict=True):
            if self._whole:
                counts = self._whole.count_correct(x, y, self._chip.seed, samples, self._memory)
            else:
                counts = [(o.argmax(1) == y).sum().item() for o in self._run(x, samples)]
            correct = [a + int(b) for a, b in zip(correct, counts, strict=True)]
        return correct

    def block(self, images: int, samples: int) -> int:
        """How many images to take at a time: equal parts that fit the memory, of at most 1,024 on a CPU.

        Raises:
            UserError: a single vector of images takes more than the memory.
        """
        size = min(GPU_BLOCK if self.on_gpu else BLOCK, _up(images, LANES))
        while True:
            taken = sum(s.bytes(size, samples) for s in self._steps if isinstance(s, PlanStep))
            if taken <= self._memory:
                break
            if size == LANES:
                where = "on the device" if self.on_gpu else f"on {torch.get_num_threads()} threads"
                raise UserError(
                    f"engine: {LANES} images take {taken >> 20} MiB {where}, more than the "
                    f"{self._memory >> 20} MiB allowed; allow more memory or fewer threads"
                )
            size = max(LANES, size // 2)
        blocks = math.ceil(images / size)
        return min(size, _up(math.ceil(images / blocks), 4 * LANES if size >= 4 * LANES else LANES))

    def _run(self, images: Tensor, samples: Sequence[int]) -> Iterable[Tensor]:
        """The outputs of one chip after the other. What is the same on all chips is computed once."""
        if self._whole:
            # Bit by bit what several plans would give, and all chips in one call.
            yield from self._steps[0].run(images, self._chip.seed, samples, self._memory)
            return
        shared: dict[fx.Node, Any] = {self._input: images}
        for step in self._steps:
            if not step.sampled:
                shared[step.node] = self._step(step, shared, 0)
        for sample in samples:
            own = dict(shared)
            with programmed(self._model, sample, self._first_layer):
                for step in self._steps:
                    if step.sampled:
                        if not isinstance(step, PlanStep) and in_place(self._root, step.node):
                            for n in step.node.all_input_nodes:  # the next chip wants it as it is
                                own[n] = own[n].clone() if isinstance(own[n], Tensor) else own[n]
                        own[step.node] = self._step(step, own, sample)
            yield own[self._output]

    def _step(self, step: TorchStep, values: dict[fx.Node, Any], sample: int) -> Any:
        if isinstance(step, PlanStep):
            return step.run(values[step.source], self._chip.seed, [sample], self._memory)[0]
        return call(self._root, step.node, values)

    @property
    def cost(self) -> tuple[float, float, int]:
        """(FLOP an image once, FLOP an image on every chip, noisy weights of a chip) of what the core runs."""
        costs = [s.plan.cost() for s in self._steps if isinstance(s, PlanStep)]
        return sum(c[0] for c in costs), sum(c[1] for c in costs), sum(c[2] for c in costs)


def describe(model: nn.Module, example: Tensor, first_layer: int = 0) -> Report:
    """What of a converted network the core would run; a network that it cannot run at all has a `reason`."""
    try:
        return Engine(model, example, first_layer).report
    except Unsupported as error:
        names = {id(m): n for n, m in model.named_modules()}
        return Report(unfused=tuple(names[id(layer)] for layer in analog_layers(model)), reason=str(error))


@contextmanager
def _full_float32(device: torch.device) -> Iterator[None]:
    """Torch without TF32, whose products have ten bits."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _check_samples(samples: Sequence[int]) -> None:
    if not samples:
        raise UserError("engine: no chip samples")
    for sample in samples:
        if not 0 <= sample < 2**32:
            raise UserError(f"engine: a sample lies in [0, 2^32), not {sample}")


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _report(graph: Lowering, steps: list[TorchStep]) -> Report:
    fused = {name for s in steps if isinstance(s, PlanStep) for name in s.layers}
    analog = {n: m for n, m in graph.root.named_modules() if isinstance(m, AnalogLayer)}
    names = sorted(analog, key=lambda n: analog[n].layer_index)
    through = [s.node for s in steps if not isinstance(s, PlanStep) and "tensor_meta" in s.node.meta]
    return Report(
        fused=tuple(n for n in names if n in fused),
        unfused=tuple(n for n in names if n not in fused),
        torch=tuple(f"{n.name} ({_what(graph.root, n)})" for n in through),
        plans=sum(isinstance(s, PlanStep) for s in steps),
    )


def _what(root: nn.Module, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(root.get_submodule(node.target)).__name__
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
