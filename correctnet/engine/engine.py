"""Runs a converted network on many chip samples in the C++ core, or on a GPU.

engine = Engine(analog, images[:2])
engine.count_correct(images, labels, samples=range(250))
print(engine.report)                # which layers were fused, and what runs through torch

The network is traced with torch.fx and cut into *plans* (csrc/engine.h): sequences of operations that the core runs
without Python in between, each convolution or linear layer fused with its bias, BatchNorm, ReLU (either order) and
2 x 2 max-pool, and its weights made noisy while they are packed. What a plan cannot express runs through torch, chip
by chip; `Report` names it. A plan holds a copy of the weights: an engine is for the model as it is when it is made.

On a GPU the weights become noisy by one of three ways (`method`):

    fused         while a kernel loads them: nothing is stored, all chips in one launch
    materialise   in memory, for some chips at a time, by the same kernels: the same bits in the outputs
    library       in memory, chip by chip; then cuBLAS and cuDNN compute the layers, and torch all else

The chips, that is the weights, are the same bits in all three. The outputs of "library" are not: sums are taken in
another order, and in bfloat16 every layer's output is rounded before bias, BatchNorm and ReLU instead of behind them.
What torch computes in float32 here is float32, whatever is set for TF32 outside.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from correctnet.crossbar.layers import AnalogLayer, analog_layers, chip_of, programmed
from correctnet.crossbar.probe import left_alone, run
from correctnet.devices.lognormal import LogNormalVariation
from correctnet.engine.lowering import METHODS, Lowering, Method, PlanStep, TorchStep
from correctnet.engine.trace import Unsupported, call, in_place, trace
from correctnet.errors import UserError
from correctnet.noise import device as cuda
from correctnet.precision import Precision

BLOCK = 1024  # images that a plan holds at a time, at most: enough that drawing a chip's weights does not count
GPU_BLOCK = 1 << 14  # the same on a GPU
LANES = 16  # images of one vector in the core
MEMORY = 2 << 30  # bytes
# Of the largest output; a wrongly translated network is off by a hundred times as much.
CHECK_TOLERANCE = 1e-3
# As often as torch's own error in float32 the core's may be as large, where a network magnifies rounding.
ILL_CONDITIONED = 10


@dataclass(frozen=True)
class Report:
    """What of a network the core runs.

    Attributes:
        fused: the analog layers that run in the core.
        unfused: the analog layers that run through torch, their weights made once a chip.
        torch: every operation that runs through torch, as "name (what it is)".
        plans: how many pieces the core runs.
        reason: why nothing runs in the core, in one line, or None.
        unused: the analog layers that the network does not use when it is evaluated.
        library: whether nothing is to run in the core but the noise (`Engine`'s method "library").
    """

    fused: tuple[str, ...] = ()
    unfused: tuple[str, ...] = ()
    torch: tuple[str, ...] = ()
    plans: int = 0
    reason: str | None = None
    library: bool = False
    unused: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.library:
            return f"{len(self.unfused)} analog layers: their weights by the CUDA kernels, the rest by cuBLAS and cuDNN"
        if self.reason:
            return f"everything runs through torch: {self.reason}"
        total = len(self.fused) + len(self.unfused)
        parts = [f"{len(self.fused)} of {total} analog layers fused, in {self.plans} piece{'s' * (self.plans != 1)}"]
        if self.unfused:
            parts.append(f"unfused: {', '.join(self.unfused)}")
        if self.torch:
            parts.append(f"through torch: {', '.join(self.torch)}")
        if self.unused:
            parts.append(f"not used: {', '.join(self.unused)}")
        return "; ".join(parts)


class Engine:
    """A network on many chip samples.

    Args:
        model: from `correctnet.crossbar.layers.convert`. The engine computes what it computes in evaluation mode; it is left
            as it is, and shares its tensors.
        example: inputs like those to come, (at least 1, C, H, W) or (at least 1, features).
        first_layer: layers of a smaller index stay nominal.
        precision: "float32", or "bfloat16" for weights and activations (sums are float32).
        memory: bytes that a run may take beside the images, about.
        sample: the chip on which the core is compared with torch, where none is programmed.
        method: how a GPU gets at noisy weights, see above; "auto" is "fused", until another one was measured to be
            faster. Of no meaning on a CPU.

    Attributes:
        report: what runs in the core.
        whole: whether that is all of the network, in one piece.
        on_gpu: whether the CUDA kernels are used.
        library: whether they make the weights alone.

    Raises:
        Unsupported: the core can run nothing of the network, or not as torch does; `describe` gives a `Report` with the
            `reason` instead.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Tensor,
        first_layer: int = 0,
        precision: Precision = "float32",
        memory: int = MEMORY,
        method: Method = "auto",
        sample: int = 0,
    ):
        check_method(method)
        if precision not in ("float32", "bfloat16"):
            raise UserError(f"engine: precision must be 'float32' or 'bfloat16', not {precision!r}")
        self._model, self._first_layer, self._memory = model, first_layer, memory
        self._chip = chip_of(model)
        graph = Lowering(trace(model, example))
        self.on_gpu = cuda.reaches(graph.device)
        self.library = self.on_gpu and method == "library"
        # "auto" never is "library": which chips are counted right shall not depend on what else there is to do.
        way = method if self.on_gpu and method != "auto" else "fused"
        self._steps = graph.steps(first_layer, precision, way)
        self._output = graph.output
        self._input = graph.input
        self._root = graph.root
        self._device, self._precision = graph.device, precision
        self._dead = _last_uses(self._steps, graph.output)
        self._layers = {s.node: graph.varied(s.node, first_layer) for s in self._steps} if self.library else {}
        self._nominal = {m: _nominal(m, precision) for own in self._layers.values() for m in own.values()}
        self.report = _report(graph, self._steps, self.library)
        self._whole = self._steps[0] if len(self._steps) == 1 and isinstance(self._steps[0], PlanStep) else None
        self.whole = self._whole is not None
        self._torch_cost = [(s.sampled, *graph.cost(s.node)) for s in self._steps] if self.library else []
        self._live = _live_bytes(self._steps, self._dead, graph.input, precision) if self.library else 0
        self._check(graph, example, sample if self._chip.sample is None else self._chip.sample)

    def _check(self, graph: Lowering, example: Tensor, sample: int) -> None:
        """Compare with torch on one chip: a network that was misread must never give an accuracy.

        Raises Unsupported, with the reason, where they differ: torch's outputs are those that count.
        """
        images = example[:LANES]
        steps, precision = self._steps, self._precision
        if precision == "bfloat16":
            self._steps = steps if self.library else graph.steps(self._first_layer, "float32")
            self._precision = "float32"
        try:
            found = self.outputs(images, [sample])[0]
        finally:
            self._steps, self._precision = steps, precision
        wanted = self._by_torch(self._model, images, sample)
        if not isinstance(wanted, Tensor) or found.shape != wanted.shape:
            raise Unsupported("the core's outputs are not of the shape of torch's; please report this network")
        finite = wanted.isfinite()
        if not torch.equal(_kinds(found), _kinds(wanted)):
            raise Unsupported(f"its outputs on chip {sample} are not all finite, and the core's in other places")
        if not finite.any():
            return
        scale = wanted[finite].abs().max().item()
        error = (found - wanted)[finite].abs().max().item()
        if error <= CHECK_TOLERANCE * scale:
            return
        if not torch.equal(wanted, self._by_torch(self._model, images, sample, passes=2)):
            raise Unsupported("its outputs change from call to call on one chip")
        exact = self._in_float64(images, sample)
        if exact is not None:
            core, own = ((outputs.double() - exact)[finite].abs().max().item() for outputs in (found, wanted))
            if core <= ILL_CONDITIONED * own:
                raise Unsupported(
                    f"it is ill-conditioned: on chip {sample} torch's own float32 is off by {own:.3g} of {scale:.3g} "
                    "from float64"
                )
        raise Unsupported(
            f"the core's outputs differ from torch's by {error:.3g} of {scale:.3g} on chip {sample}; please report "
            "this network"
        )

    @torch.no_grad()
    def _by_torch(self, model: nn.Module, images: Tensor, sample: int, passes: int = 1) -> Tensor:
        """What torch computes for the network on a chip, in the last of several passes."""
        with left_alone(model), programmed(model, sample, self._first_layer), full_float32(self._device):
            for _ in range(passes):  # each begins with the random numbers that the one before has left
                outputs = run(model, images, "engine")
            return outputs

    def _in_float64(self, images: Tensor, sample: int) -> Tensor | None:
        """The same in float64, with the same weights on the chip; None where the network's code takes float32 alone."""
        try:
            return self._by_torch(copy.deepcopy(self._model).double(), images.double(), sample)
        except UserError:
            return None

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
        return self.count(images, labels, samples)[0]

    @torch.no_grad()
    def count(self, images: Tensor, labels: Tensor, samples: Sequence[int]) -> tuple[list[int], list[int]]:
        """For each chip, on how many of `images` the largest output is the label's, and on how many one is not finite.

        An image with a NaN among its outputs is not counted as correct. images (N, ...), labels (N,).
        """
        _check_samples(samples)
        if len(images) == 0 or len(images) != len(labels):
            raise UserError(f"engine: {len(images)} images and {len(labels)} labels")
        images, labels = images.to(self._device), labels.to(self._device)
        found = [[0] * len(samples), [0] * len(samples)]
        size = self.block(len(images), len(samples))
        for x, y in zip(images.split(size), labels.split(size), strict=True):
            if self._whole:
                counts = self._whole.count(x, y, self._chip.seed, samples, self._memory)
            else:
                # Read in one go: each look at a GPU waits for it.
                counts = torch.stack([classified(o, y) for o in self._run(x, samples)], dim=1).tolist()
            found = [[a + int(b) for a, b in zip(*pair, strict=True)] for pair in zip(found, counts, strict=True)]
        return found[0], found[1]

    def block(self, images: int, samples: int) -> int:
        """How many images to take at a time: equal parts that fit the memory, of at most 1,024 on a CPU.

        Raises:
            UserError: a single vector of images takes more than the memory.
        """
        size = min(GPU_BLOCK if self.on_gpu else BLOCK, _up(images, LANES))
        while True:
            taken = sum(s.bytes(size, samples) for s in self._steps if isinstance(s, PlanStep)) + self._live * size
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
        if self.library and self._precision == "bfloat16" and images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)  # as cuDNN's bfloat16 kernels take them
        shared: dict[fx.Node, Any] = {self._input: images.clone()}  # the network may change its input in place
        with programmed(self._model, None), self._arithmetic():
            for step in self._steps:
                if not step.sampled:
                    shared[step.node] = self._step(step, shared, 0, {})
        numbers = self._numbers(samples) if self.library else None
        for i, sample in enumerate(samples):
            # A library's layers get their weights from here, so that none of theirs is programmed.
            chip = None if self.library else sample
            with programmed(self._model, chip, self._first_layer), self._arithmetic():
                weights = self._weights(*numbers, i, sample) if numbers else {}
                output = self._on_chip(dict(shared), sample, weights)
            yield output.float() if self.library else output

    def _on_chip(self, values: dict[fx.Node, Any], sample: int, weights: dict[AnalogLayer, Tensor]) -> Any:
        """The output on one chip, given the values that are the same on all."""
        for step in self._steps:
            if not step.sampled:
                continue
            if not isinstance(step, PlanStep) and in_place(self._root, step.node):
                for n in step.node.all_input_nodes:  # the next chip wants it as it is
                    values[n] = values[n].clone() if isinstance(values[n], Tensor) else values[n]
            values[step.node] = self._step(step, values, sample, weights)
            for n in self._dead[step.node]:
                del values[n]
        return values[self._output]

    def _step(
        self, step: TorchStep, values: dict[fx.Node, Any], sample: int, weights: dict[AnalogLayer, Tensor]
    ) -> Any:
        if isinstance(step, PlanStep):
            return step.run(values[step.source], self._chip.seed, [sample], self._memory)[0]
        layers = self._layers.get(step.node, {}) if weights else {}
        own = {f"{name}.weight" if name else "weight": weights[layer] for name, layer in layers.items()}
        return call(self._root, step.node, values, own)

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """That of torch's products: float32 is not TF32, and bfloat16 is where a library is to compute."""
        with ExitStack() as stack:
            stack.enter_context(full_float32(self._device))
            if self.library:
                low = self._precision == "bfloat16"
                stack.enter_context(torch.autocast(self._device.type, torch.bfloat16, enabled=low))
            yield

    def _numbers(self, samples: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Seed and chips as the noise's kernel reads them: on the device, brought there once for all layers."""
        return cuda.on_device(self._chip.seed, self._device), cuda.on_device(samples, self._device).to(torch.uint32)

    def _weights(self, seed: Tensor, chips: Tensor, i: int, sample: int) -> dict[AnalogLayer, Tensor]:
        """The noisy weights of chip number `i` of those, in the precision that is asked for."""
        dtype, found = torch.bfloat16 if self._precision == "bfloat16" else torch.float32, {}
        for layer, weight in self._nominal.items():
            variation, index = layer.variation, layer.layer_index
            if type(variation) is LogNormalVariation:
                noise = seed, chips[i : i + 1], index, variation.sigma, variation.shift
                found[layer] = cuda.noisy_weight(weight, *noise, dtype=dtype)[0]
            else:
                found[layer] = variation.sample(weight, self._chip.seed, index, sample)
        return found

    @property
    def cost(self) -> tuple[float, float, int]:
        """(FLOP an image once, FLOP an image on every chip, noisy weights of a chip) of what the core runs, or a
        library in its place, which does not skip what padding multiplies."""
        costs = [s.plan.cost() for s in self._steps if isinstance(s, PlanStep)]
        costs += [(0.0, flop, weights) if sampled else (flop, 0.0, 0) for sampled, flop, weights in self._torch_cost]
        return sum(c[0] for c in costs), sum(c[1] for c in costs), sum(c[2] for c in costs)


def _kinds(outputs: Tensor) -> Tensor:
    """What each output is: 0 finite, 1 NaN, 2 and 3 an infinity."""
    return outputs.isnan().int() + 2 * outputs.isposinf().int() + 3 * outputs.isneginf().int()


def classified(outputs: Tensor, labels: Tensor) -> Tensor:
    """(2,) int64: on how many images the first largest output is the label's and none is NaN; how many have one that
    is not finite. outputs (N, classes), labels (N,)."""
    correct = (outputs.argmax(1) == labels) & ~outputs.isnan().any(1)
    return torch.stack([correct.sum(), (~outputs.isfinite()).any(1).sum()])


def describe(model: nn.Module, example: Tensor, first_layer: int = 0) -> Report:
    """What of a converted network the core would run; a network that it cannot run at all has a `reason`."""
    try:
        return Engine(model, example, first_layer).report
    except Unsupported as error:
        names = {id(m): n for n, m in model.named_modules()}
        return Report(unfused=tuple(names[id(layer)] for layer in analog_layers(model)), reason=str(error))


def check_method(method: str) -> None:
    """Raises UserError where there is no such method."""
    if method not in METHODS:
        raise UserError(f"engine: method must be one of {', '.join(METHODS)}, not {method!r}")


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Torch without TF32, whose products have ten bits and which cuDNN takes unless it is told not to."""
    if device.type != "cuda":
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [*_turn_tf32_off(matmul, matmul), *_turn_tf32_off(cudnn, getattr(cudnn, "conv", None))]
    try:
        yield
    finally:
        for where, name, value in reversed(before):
            setattr(where, name, value)


def _turn_tf32_off(old: Any, new: Any) -> list[tuple[Any, str, Any]]:
    """What was changed for it: where, the switch's name, and what it said.

    Torch has two generations of switches. To read the old one is an error where a user has set the new one alone; and
    it does not reach what the new one says of all of torch.
    """
    before = []
    with suppress(RuntimeError):
        before.append((old, "allow_tf32", old.allow_tf32))
        old.allow_tf32 = False
    if getattr(new, "fp32_precision", None) == "tf32":
        before.append((new, "fp32_precision", "tf32"))
        new.fp32_precision = "ieee"
    return before


def _check_samples(samples: Sequence[int]) -> None:
    if not samples:
        raise UserError("engine: no chip samples")
    for sample in samples:
        if not 0 <= sample < 2**32:
            raise UserError(f"engine: a sample lies in [0, 2^32), not {sample}")


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _nominal(layer: AnalogLayer, precision: Precision) -> Tensor:
    """A layer's weights as the noise's kernel reads them and a library wants them: in bfloat16 channels_last."""
    weight = layer.nominal.detach().float()
    last = weight.dim() == 4 and precision == "bfloat16"
    return weight.contiguous(memory_format=torch.channels_last) if last else weight.contiguous()


def _last_uses(steps: list[TorchStep], output: fx.Node) -> dict[fx.Node, list[fx.Node]]:
    """By each step's node, the values that no later step reads: they need not be kept."""
    dead: dict[fx.Node, list[fx.Node]] = {s.node: [] for s in steps}
    seen = {output}
    for step in reversed(steps):
        read = [step.source] if isinstance(step, PlanStep) else step.node.all_input_nodes
        dead[step.node] = [n for n in read if n not in seen]
        seen.update(read)
    return dead


def _live_bytes(
    steps: list[TorchStep], dead: dict[fx.Node, list[fx.Node]], source: fx.Node, precision: Precision
) -> int:
    """Bytes an image that torch's values of one chip take at once, at most; what a library takes for itself is unknown.

    The values that all chips share stay; an operation's input in the library's precision counts beside the one in its
    own, as autocast makes it.
    """

    def size(node: fx.Node) -> int:
        meta = node.meta.get("tensor_meta")
        return math.prod(meta.shape[1:]) * (2 if precision == "bfloat16" else 4) if hasattr(meta, "shape") else 0

    live = size(source) + sum(size(s.node) for s in steps if not s.sampled)
    most, sampled = live, {s.node for s in steps if s.sampled}
    for step in steps:
        live += size(step.node) if step.sampled else 0
        most = max(most, live + max((size(n) for n in step.node.all_input_nodes), default=0))
        live -= sum(size(n) for n in dead[step.node] if n in sampled)
    return most


def _report(graph: Lowering, steps: list[TorchStep], library: bool) -> Report:
    fused = {name for s in steps if isinstance(s, PlanStep) for name in s.layers}
    analog = {n: m for n, m in graph.root.named_modules() if isinstance(m, AnalogLayer)}
    names = sorted(analog, key=lambda n: analog[n].layer_index)
    through = [s.node for s in steps if not isinstance(s, PlanStep) and "tensor_meta" in s.node.meta]
    return Report(
        fused=tuple(n for n in names if n in fused),
        unfused=tuple(n for n in names if n not in fused),
        torch=tuple(f"{n.name} ({_what(graph.root, n)})" for n in through),
        plans=sum(isinstance(s, PlanStep) for s in steps),
        library=library,
        unused=graph.unused,
    )


def _what(root: nn.Module, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(root.get_submodule(node.target)).__name__
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
