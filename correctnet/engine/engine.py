"""Evaluation of a converted network on many chip samples in the C++ core, or on a GPU.

engine = Engine(analog, images[:2])
engine.count_correct(images, labels, samples=range(250))
print(engine.report)                # which layers were fused, and what runs through torch

The network is traced with torch.fx and divided into *plans*: sequences of operations that the core runs without Python
in between. Each convolution or linear layer is fused with its bias, BatchNorm, activation (either order) and max-pool,
and its weights become noisy while they are packed. Torch computes what a plan cannot express, chip by chip; `Report`
lists it. An engine snapshots the weights; create a new one after changing the model.

On a GPU, `method` selects where the weights become noisy:

    fused         while a kernel loads them: nothing is stored, all chips in one launch
    materialise   in memory, for some chips at a time, by the same kernels: outputs with the same bits
    library       in memory, chip by chip; cuBLAS and cuDNN then compute the layers, and torch everything else

The weights of the chips have the same bits with all three. The outputs of "library" differ in rounding: it sums in
another order, and in bfloat16 rounds every layer's output before bias, BatchNorm and ReLU instead of after them.
Float32 computed by torch in an engine never uses TF32, whatever torch's settings are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from correctnet.crossbar.calibration import without_converters
from correctnet.crossbar.convert import chip_of, programmed
from correctnet.crossbar.layers import OnCrossbar, analog_layers, analog_names
from correctnet.crossbar.probe import left_alone, run
from correctnet.datasets.inputs import Inputs
from correctnet.devices.base import has_arrays, kernel_noise
from correctnet.engine.lowering import METHODS, Lowering, Method
from correctnet.engine.report import Report, report_of
from correctnet.engine.steps import PlanStep, TorchStep
from correctnet.engine.trace import Unsupported, argument, call, in_place, trace
from correctnet.errors import UserError
from correctnet.metrics import chosen
from correctnet.noise import device as gpu
from correctnet.precision import Precision, full_float32

BLOCK = 1024  # images that a plan takes at a time, at most; enough to make the time of drawing weights negligible
GPU_BLOCK = 1 << 14  # the same on a GPU
LANES = 16  # images of one vector in the core
MEMORY = 2 << 30  # bytes
# Relative to the largest output; the error of a wrongly lowered network is a hundred times as large.
CHECK_TOLERANCE = 1e-3
# The core's error may be this multiple of torch's own error in float32, for networks that amplify rounding.
ILL_CONDITIONED = 10


class Engine:
    """Evaluates a network on many chip samples.

    Args:
        model: from `correctnet.convert`. The engine computes its outputs in evaluation mode, leaves it unchanged and
            shares its tensors.
        example: inputs with the shape of those to evaluate, (N >= 1, C, H, W) or (N >= 1, features), or several.
        first_layer: layers of a smaller index keep their nominal weights.
        precision: "float32", or "bfloat16" for weights and activations (sums are float32).
        memory: bytes that a run may take besides the images, about.
        method: where weights become noisy on a GPU, see above; "auto" is "fused". Ignored on a CPU.
        sample: the chip on which the core is compared with torch, unless one is programmed.

    Attributes:
        report: what runs in the core.
        whole: whether one plan computes the whole network.
        on_gpu: whether the CUDA kernels are used.
        library: whether they only draw the weights (method "library").

    Raises:
        Unsupported: the core can run nothing of the network, or its outputs differ from torch's. `describe` returns a
            `Report` with the `reason` instead.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Tensor | Inputs,
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
        self.on_gpu = gpu.reaches(graph.device)
        self.library = self.on_gpu and method == "library"
        # "auto" never picks "library": it rounds differently, and results must not depend on the workload.
        way = method if self.on_gpu and method != "auto" else "fused"
        self._steps = graph.steps(first_layer, precision, way)
        self._output = graph.output
        self._input = graph.input
        self._root = graph.root
        self._device, self._precision = graph.device, precision
        self._dead = _last_uses(self._steps, graph.output)
        self._layers = {s.node: graph.varied(s.node, first_layer) for s in self._steps} if self.library else {}
        self._nominal = {m: _nominal(m, precision) for own in self._layers.values() for m in own.values()}
        for layer in self._nominal:
            if layer.periphery is not None:
                raise Unsupported("method 'library' has no converters")
            if layer.owner._parameters.get(layer.parameter) is None:
                raise Unsupported("method 'library' cannot replace weights that pruning or a parametrization derives")
        self._arrays = {
            m: m.variation.array_noise(weight, m.layer_index)
            for m, weight in self._nominal.items()
            if has_arrays(m.variation)
        }
        self.report = report_of(graph, self._steps, self.library)
        self._whole = self._steps[0] if len(self._steps) == 1 and isinstance(self._steps[0], PlanStep) else None
        self.whole = self._whole is not None
        self._torch_cost = [(s.sampled, *graph.cost(s.node)) for s in self._steps] if self.library else []
        low = self.library and precision == "bfloat16"
        self._live = 0 if self.whole else _live_bytes(self._steps, self._dead, graph.input, low)
        present = self._chip.sample
        if present is not None:
            sample = present[0] if isinstance(present, tuple) else present
        self._check(graph, example, sample)

    def _check(self, graph: Lowering, example: Tensor | Inputs, sample: int) -> None:
        """Compare with torch on one chip, so that a wrongly lowered network never gives an accuracy.

        Raises Unsupported where the outputs differ; torch's are correct by definition.
        """
        if all(own.periphery is None for own in analog_layers(self._model)):
            return self._compare(graph, example, sample)
        # A value near the middle of two steps may be rounded to either, which changes others after it. So the network
        # is compared without its converters, and with them to what these change.
        steps, precision = self._steps, self._precision
        try:
            with without_converters(self._model, graph.root):
                self._steps, self._precision = graph.steps(self._first_layer, "float32"), "float32"
                self._compare(graph, example, sample)
                exact = self._by_torch(self._model, example[:LANES], sample)
            self._steps = graph.steps(self._first_layer, "float32")
            found = self.outputs(example[:LANES], [sample])[0]
        finally:
            self._steps, self._precision = steps, precision
        wanted = self._by_torch(self._model, example[:LANES], sample)
        error, changed = ((a - wanted).square().mean().sqrt().item() for a in (found, exact))
        if error > max(changed, CHECK_TOLERANCE * wanted.abs().max().item()):
            raise Unsupported(
                f"with converters the core's outputs differ from torch's by {error:.3g} on chip {sample}; please "
                "report this network"
            )

    def _compare(self, graph: Lowering, example: Tensor | Inputs, sample: int) -> None:
        """Compare with torch on one chip; see `_check`."""
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
    def _by_torch(self, model: nn.Module, images: Tensor | Inputs, sample: int, passes: int = 1) -> Tensor:
        """Return torch's outputs of the network on a chip, of the last of several passes."""
        with left_alone(model), programmed(model, sample, self._first_layer), full_float32(self._device):
            for _ in range(passes):  # each continues the random numbers of the one before
                outputs = chosen(run(model, images, "engine"))
            return outputs

    def _in_float64(self, images: Tensor | Inputs, sample: int) -> Tensor | None:
        """Return `_by_torch` in float64 with the same weights; None where the network's code requires float32."""
        try:
            doubled = images.double() if isinstance(images, Tensor) else images.each(_double)
            return self._by_torch(copy.deepcopy(self._model).double(), doubled, sample)
        except UserError:
            return None

    @torch.no_grad()
    def outputs(self, images: Tensor | Inputs, samples: Sequence[int]) -> Tensor:
        """Return the network's outputs on each chip, (S, N, ...), float32."""
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
        """Count for each chip the images (N, ...) whose largest output is that of the label, labels (N,)."""
        return self.count(images, labels, samples)[0]

    @torch.no_grad()
    def count(self, images: Tensor | Inputs, labels: Tensor, samples: Sequence[int]) -> tuple[list[int], list[int]]:
        """Count for each chip the correctly classified images, and those with an output that is not finite.

        An image with a NaN among its outputs is not correct. images (N, ...), labels (N,).
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
                # Read at once: each read waits for the GPU.
                counts = torch.stack([classified(o, y) for o in self._run(x, samples)], dim=1).tolist()
            found = [[a + int(b) for a, b in zip(*pair, strict=True)] for pair in zip(found, counts, strict=True)]
        return found[0], found[1]

    @torch.no_grad()
    def each(self, images: Tensor | Inputs, samples: Sequence[int]) -> Iterator[tuple[int, slice, Tensor]]:
        """Yield (index of the chip, images of the block, outputs (block, ...)), one pair of block and chip at a time.

        What `outputs` returns at once, in blocks of images and then chips, within the memory.
        """
        _check_samples(samples)
        images = images.to(self._device)
        size = self.block(len(images), len(samples))
        for first in range(0, len(images), size):
            block = images[first : first + size]
            together = len(samples)
            if self._whole:  # which gives the outputs of all chips of a call at once
                together = max(1, self._memory // max(1, 4 * len(block) * math.prod(self._whole.shape)))
            for i in range(0, len(samples), together):
                for j, found in enumerate(self._run(block, samples[i : i + together]), start=i):
                    yield j, slice(first, first + len(block)), found

    def block(self, images: int, samples: int) -> int:
        """Return how many images to take at a time: equal parts that fit the memory, at most 1,024 on a CPU.

        Raises:
            UserError: the smallest block of images takes more than the memory.
        """
        size = min(GPU_BLOCK if self.on_gpu else BLOCK, _up(images, LANES))
        while True:
            # Plans run one after the other; what they read and give is there all the while.
            plans = [s.bytes(size, samples) for s in self._steps if isinstance(s, PlanStep)]
            taken = max(plans, default=0) + self._live * size
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

    def _run(self, images: Tensor | Inputs, samples: Sequence[int]) -> Iterable[Tensor]:
        """Yield the outputs of each chip. Values that are the same on all chips are computed once."""
        if self._whole:
            # The bits that several plans would give, with all chips in one call.
            yield from self._steps[0].run(images, self._chip.seed, samples, self._memory)
            return
        if self.library and self._precision == "bfloat16" and isinstance(images, Tensor) and images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)  # the order of cuDNN's bfloat16 kernels
        shared: dict[fx.Node, Any] = {self._input: argument(images)}
        with programmed(self._model, None), self._arithmetic():
            for step in self._steps:
                if not step.sampled:
                    shared[step.node] = self._step(step, shared, 0, {})
        numbers = self._numbers(samples) if self.library else None
        for i, sample in enumerate(samples):
            # With "library" the layers receive their weights from here, so no chip is programmed.
            chip = None if self.library else sample
            with programmed(self._model, chip, self._first_layer), self._arithmetic():
                weights = self._weights(*numbers, i, sample) if numbers else {}
                output = self._on_chip(dict(shared), sample, weights)
            yield output.float() if self.library else output

    def _on_chip(self, values: dict[fx.Node, Any], sample: int, weights: dict[OnCrossbar, Tensor]) -> Any:
        """Return the output on one chip, given the values that are the same on all."""
        for step in self._steps:
            if not step.sampled:
                continue
            if not isinstance(step, PlanStep) and in_place(self._root, step.node):
                for n in step.node.all_input_nodes:  # unchanged for the next chip
                    values[n] = values[n].clone() if isinstance(values[n], Tensor) else values[n]
            values[step.node] = self._step(step, values, sample, weights)
            for n in self._dead[step.node]:
                del values[n]
        return values[self._output]

    def _step(self, step: TorchStep, values: dict[fx.Node, Any], sample: int, weights: dict[OnCrossbar, Tensor]) -> Any:
        if isinstance(step, PlanStep):
            return step.run(values[step.source], self._chip.seed, [sample], self._memory)[0]
        layers = self._layers.get(step.node, {}) if weights else {}
        own = {name: weights[layer] for name, layer in layers.items()}
        return call(self._root, step.node, values, own)

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """Set the arithmetic of torch's products: no TF32, and autocast where a library computes in bfloat16."""
        with ExitStack() as stack:
            stack.enter_context(full_float32(self._device))
            if self.library:
                low = self._precision == "bfloat16"
                stack.enter_context(torch.autocast(self._device.type, torch.bfloat16, enabled=low))
            yield

    def _numbers(self, samples: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Copy seed and chips to the device for the noise's kernel, once for all layers."""
        return gpu.on_device(self._chip.seed, self._device), gpu.on_device(samples, self._device).to(torch.uint32)

    def _weights(self, seed: Tensor, chips: Tensor, i: int, sample: int) -> dict[OnCrossbar, Tensor]:
        """Draw the noisy weights of the `i`-th of the chips, `sample`, in the engine's precision."""
        dtype, found = torch.bfloat16 if self._precision == "bfloat16" else torch.float32, {}
        for layer, weight in self._nominal.items():
            noise, address = kernel_noise(layer.variation), (seed, chips[i : i + 1], layer.layer_index)
            if noise is not None:
                found[layer] = gpu.noisy_weight(weight, *address, *noise, dtype=dtype)[0]
            elif layer in self._arrays:
                found[layer] = gpu.programmed(self._arrays[layer], *address, dtype)[0]
            else:
                found[layer] = layer.variation.sample(weight, self._chip.seed, layer.layer_index, sample)
        return found

    @property
    def cost(self) -> tuple[float, float, int]:
        """(FLOP an image once, FLOP an image a chip, noisy weights a chip) of what the core or a library runs.

        Unlike the core, a library also multiplies by padding.
        """
        costs = [s.plan.cost() for s in self._steps if isinstance(s, PlanStep)]
        costs += [(0.0, flop, weights) if sampled else (flop, 0.0, 0) for sampled, flop, weights in self._torch_cost]
        return sum(c[0] for c in costs), sum(c[1] for c in costs), sum(c[2] for c in costs)


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _kinds(outputs: Tensor) -> Tensor:
    """Classify each output: 0 finite, 1 NaN, 2 and 3 the infinities."""
    return outputs.isnan().int() + 2 * outputs.isposinf().int() + 3 * outputs.isneginf().int()


def classified(outputs: Tensor, labels: Tensor) -> Tensor:
    """Count the correctly classified images, and those with an output that is not finite, as (2,) int64.

    An image is correct if its first largest output is that of the label and none is NaN. outputs (N, classes),
    labels (N,).
    """
    correct = (outputs.argmax(1) == labels) & ~outputs.isnan().any(1)
    return torch.stack([correct.sum(), (~outputs.isfinite()).any(1).sum()])


def describe(model: nn.Module, example: Tensor | Inputs, first_layer: int = 0) -> Report:
    """Report which parts of a converted network the core would run, or the `reason` why it runs nothing."""
    try:
        return Engine(model, example, first_layer).report
    except Unsupported as error:
        names = analog_names(model)
        return Report(unfused=tuple(names[id(layer)] for layer in analog_layers(model)), reason=str(error))


def check_method(method: str) -> None:
    """Check the name of a method. Raises UserError where there is no such method."""
    if method not in METHODS:
        raise UserError(f"engine: method must be one of {', '.join(METHODS)}, not {method!r}")


def _check_samples(samples: Sequence[int]) -> None:
    if not samples:
        raise UserError("engine: no chip samples")
    for sample in samples:
        if not 0 <= sample < 2**32:
            raise UserError(f"engine: a sample lies in [0, 2^32), not {sample}")


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _nominal(layer: OnCrossbar, precision: Precision) -> Tensor:
    """Return a layer's weights in the order that a library prefers: channels_last in bfloat16."""
    weight = layer.nominal.detach().float()
    last = weight.dim() == 4 and precision == "bfloat16"
    return weight.contiguous(memory_format=torch.channels_last) if last else weight.contiguous()


def _last_uses(steps: list[TorchStep], output: fx.Node) -> dict[fx.Node, list[fx.Node]]:
    """Return, by each step's node, the values that no later step reads."""
    dead: dict[fx.Node, list[fx.Node]] = {s.node: [] for s in steps}
    seen = {output}
    for step in reversed(steps):
        read = [step.source] if isinstance(step, PlanStep) else step.node.all_input_nodes
        dead[step.node] = [n for n in read if n not in seen]
        seen.update(read)
    return dead


def _live_bytes(steps: list[TorchStep], dead: dict[fx.Node, list[fx.Node]], source: fx.Node, low: bool) -> int:
    """Return the most bytes an image that the values of one chip take at once, without what computes them.

    Values shared by all chips are always counted; an operation's input is counted again for the copy that autocast
    makes. `low`: values are bfloat16, not float32.
    """

    def size(node: fx.Node) -> int:
        meta = node.meta.get("tensor_meta")
        return math.prod(meta.shape[1:]) * (2 if low else 4) if hasattr(meta, "shape") else 0

    live = size(source) + sum(size(s.node) for s in steps if not s.sampled)
    most, sampled = live, {s.node for s in steps if s.sampled}
    for step in steps:
        live += size(step.node) if step.sampled else 0
        most = max(most, live + max((size(n) for n in step.node.all_input_nodes), default=0))
        live -= sum(size(n) for n in dead[step.node] if n in sampled)
    return most
