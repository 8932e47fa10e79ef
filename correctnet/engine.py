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
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from correctnet import native
from correctnet.analog import AnalogConv2d, AnalogLayer, AnalogLinear, analog_layers, chip_of, programmed
from correctnet.errors import UserError
from correctnet.variation import LogNormalVariation

Precision = Literal["float32", "bfloat16"]

BLOCK = 1024  # images that a plan holds at a time, at most: enough that drawing a chip's weights does not count
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


class Unsupported(Exception):
    """The core cannot run this network at all; the message says why."""


class Engine:
    """A network on many chip samples.

    Args:
        model: from `correctnet.analog.convert`; it is put into evaluation mode.
        example: inputs like those to come, (at least 1, C, H, W) or (at least 1, features).
        first_layer: layers of a smaller index stay nominal.
        precision: "float32", or "bfloat16" for weights and activations (sums are float32).
        memory: bytes that a run may take beside the images, about.

    Attributes:
        report: what runs in the core.

    Raises:
        Unsupported: `report` of such a network has a `reason`; `describe` gives it without the exception.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Tensor,
        first_layer: int = 0,
        precision: Precision = "float32",
        memory: int = MEMORY,
    ):
        if precision not in ("float32", "bfloat16"):
            raise UserError(f"engine: precision must be 'float32' or 'bfloat16', not {precision!r}")
        self._model, self._first_layer, self._memory = model.eval(), first_layer, memory
        self._chip = chip_of(model)
        graph = _trace(model, example)
        self._steps = graph.steps(first_layer, precision)
        self._output = graph.output
        self._input = graph.input
        self._root = graph.root
        self.report = _report(graph, self._steps)
        self._whole = self._steps[0] if len(self._steps) == 1 and isinstance(self._steps[0], _PlanStep) else None
        self._check(graph, example, precision)

    def _check(self, graph: _Graph, example: Tensor, precision: Precision) -> None:
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
        with torch.no_grad(), programmed(self._model, sample, self._first_layer):
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
        correct = [0] * len(samples)
        size = self.block(len(images), len(samples))
        for x, y in zip(images.split(size), labels.split(size), strict=True):
            if self._whole:
                counts = self._whole.count_correct(x, y, self._chip.seed, samples)
            else:
                counts = [(o.argmax(1) == y).sum().item() for o in self._run(x, samples)]
            correct = [a + int(b) for a, b in zip(correct, counts, strict=True)]
        return correct

    def block(self, images: int, samples: int) -> int:
        """How many images to take at a time: equal parts of at most 1,024 that fit the memory.

        Raises:
            UserError: a single vector of images takes more than the memory.
        """
        size, threads = min(BLOCK, _up(images, LANES)), torch.get_num_threads()
        plans = [s.plan for s in self._steps if isinstance(s, _PlanStep)]
        while True:
            taken = sum(p.bytes(size, samples, threads=threads) for p in plans)
            if taken <= self._memory:
                break
            if size == LANES:
                raise UserError(
                    f"engine: {LANES} images take {taken >> 20} MiB on {threads} threads, more than the "
                    f"{self._memory >> 20} MiB allowed; allow more memory or fewer threads"
                )
            size = max(LANES, size // 2)
        blocks = math.ceil(images / size)
        return min(size, _up(math.ceil(images / blocks), 4 * LANES if size >= 4 * LANES else LANES))

    def _run(self, images: Tensor, samples: Sequence[int]) -> Iterable[Tensor]:
        """The outputs of one chip after the other. What is the same on all chips is computed once."""
        if self._whole:
            # Bit by bit what several plans would give, and all chips in one call.
            yield from self._steps[0].run(images, self._chip.seed, samples)
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
                        if not isinstance(step, _PlanStep) and _in_place(self._root, step.node):
                            for n in step.node.all_input_nodes:  # the next chip wants it as it is
                                own[n] = own[n].clone() if isinstance(own[n], Tensor) else own[n]
                        own[step.node] = self._step(step, own, sample)
            yield own[self._output]

    def _step(self, step: _Step, values: dict[fx.Node, Any], sample: int) -> Any:
        if isinstance(step, _PlanStep):
            return step.run(values[step.source], self._chip.seed, [sample])[0]
        return _call(self._root, step.node, values)

    @property
    def cost(self) -> tuple[float, float, int]:
        """(FLOP an image once, FLOP an image on every chip, noisy weights of a chip) of what the core runs."""
        costs = [s.plan.cost() for s in self._steps if isinstance(s, _PlanStep)]
        return sum(c[0] for c in costs), sum(c[1] for c in costs), sum(c[2] for c in costs)


def describe(model: nn.Module, example: Tensor, first_layer: int = 0) -> Report:
    """What of a converted network the core would run; a network that it cannot run at all has a `reason`."""
    try:
        return Engine(model, example, first_layer).report
    except Unsupported as error:
        names = {id(m): n for n, m in model.named_modules()}
        return Report(unfused=tuple(names[id(layer)] for layer in analog_layers(model)), reason=str(error))


def _check_samples(samples: Sequence[int]) -> None:
    if not samples:
        raise UserError("engine: no chip samples")
    for sample in samples:
        if not 0 <= sample < 2**32:
            raise UserError(f"engine: a sample lies in [0, 2^32), not {sample}")


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


# ---- the graph ------------------------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Analog layers, and modules with hooks (which may do anything), are single steps."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, AnalogLayer) or _hooked(m) or super().is_leaf_module(m, module_qualified_name)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _trace(model: nn.Module, example: Tensor) -> _Graph:
    """The network as a graph with the shapes that follow from `example`."""
    if not native.status().built:
        raise Unsupported("the C++ core was not built")
    if len(example) == 0:
        raise UserError("engine: no images")
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type != "cpu":
            raise Unsupported(f"the model is on {tensor.device.type}, the core computes on the CPU")
    if any(p.dtype != torch.float32 for p in model.parameters()) or example.dtype != torch.float32:
        raise Unsupported("its parameters or its inputs are not float32")
    # A layer that is itself the network would be traced through, and its variation with it.
    root = nn.Sequential(model) if isinstance(model, AnalogLayer) or _hooked(model) else model
    try:
        graph = _Tracer().trace(root)
    except Exception as error:  # whatever the network's own code raises when it is traced
        raise Unsupported(f"torch.fx cannot trace it ({_one_line(error)})") from error
    nodes = list(graph.nodes)
    inputs = [n for n in nodes if n.op == "placeholder"]
    (last,) = (n for n in nodes if n.op == "output")
    if len(inputs) != 1 or not isinstance(last.args[0], fx.Node):
        raise Unsupported("it has more than one input or output")
    module = fx.GraphModule(root, graph)
    with torch.no_grad(), programmed(model, None):
        # Two images, whatever comes: a size of 1 would make a batch look like a feature.
        ShapeProp(module).propagate(example[:1].expand(2, *example.shape[1:]).contiguous())
    return _Graph(module, inputs[0], last.args[0])


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else text[:157] + "..."


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    """Of a node's output without the batch; None where it is not one tensor of a batch in float32."""
    meta = node.meta.get("tensor_meta")
    if not hasattr(meta, "shape") or meta.dtype != torch.float32 or len(meta.shape) < 2 or meta.shape[0] != 2:
        return None
    return tuple(meta.shape[1:])


def _in_place(root: nn.Module, node: fx.Node) -> bool:
    """Whether a step may change its first input."""
    if node.kwargs.get("inplace"):
        return True
    if node.op == "call_module":
        return any(getattr(m, "inplace", False) for m in root.get_submodule(node.target).modules())
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.endswith("_") or (node.target in vars(operator).values() and name.startswith("i") and name != "inv")


def _call(root: nn.Module, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """What torch gives for a node."""
    args = fx.node.map_arg(node.args, values.__getitem__)
    kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
    if node.op == "call_module":
        return root.get_submodule(node.target)(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], node.target)(*args[1:], **kwargs)
    if node.op == "get_attr":
        return operator.attrgetter(node.target)(root)
    return node.target(*args, **kwargs)


# ---- what the core can do -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Op:
    """One operation that a plan can express: its kind, the nodes it reads, and what it needs beside."""

    kind: Literal[
        "conv", "linear", "affine", "relu", "max_pool", "average_pool", "adaptive", "flatten", "same", "concat", "add"
    ]
    inputs: tuple[fx.Node, ...]
    detail: Any = None


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _bind(node: fx.Node, names: Sequence[str], **defaults: Any) -> dict[str, Any] | None:
    """A function's arguments by name; None where one is unknown, or is itself computed."""
    found = {**defaults, **dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
    if len(node.args) - 1 > len(names) or not set(found) <= set(names):
        return None
    return None if any(isinstance(v, fx.Node) for v in found.values()) else found


def _module_op(node: fx.Node, module: nn.Module) -> _Op | None:
    """A module as an operation; None where the core has none, or where it may not be what it seems."""
    if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node) or _hooked(module):
        return None
    x, kind = node.args[0], type(module)
    shape = _shape(x)
    if isinstance(module, AnalogLayer) and type(module.variation) is not LogNormalVariation:
        return None
    if kind in (nn.Conv2d, AnalogConv2d):
        padding = _conv_padding(module)
        return _Op("conv", (x,), (module, padding)) if padding is not None and len(shape) == 3 else None
    if kind in (nn.Linear, AnalogLinear):
        return _Op("linear", (x,), module) if len(shape) == 1 else None
    if kind in (nn.BatchNorm1d, nn.BatchNorm2d):
        usable = module.running_mean is not None and len(shape) == (3 if kind is nn.BatchNorm2d else 1)
        return _Op("affine", (x,), _batchnorm(module)) if usable else None
    if kind is nn.ReLU:
        return _Op("relu", (x,))
    if kind in (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout):
        return _Op("same", (x,))
    if kind is nn.Flatten:
        return _flatten(node, x)
    if kind is nn.MaxPool2d:
        return _pool("max_pool", x, vars(module))
    if kind is nn.AvgPool2d:
        return _pool("average_pool", x, vars(module))
    if kind is nn.AdaptiveAvgPool2d:
        return _adaptive(node, x)
    return None


def _conv_padding(conv: nn.Conv2d) -> tuple[int, int] | None:
    if conv.padding_mode != "zeros":
        return None
    if conv.padding == "valid":
        return 0, 0
    if conv.padding == "same":
        spans = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return None if any(s % 2 for s in spans) else (spans[0] // 2, spans[1] // 2)
    return _pair(conv.padding)


def _batchnorm(norm: nn.modules.batchnorm._BatchNorm) -> tuple[np.ndarray, np.ndarray]:
    """(scale, shift) of a BatchNorm in evaluation mode."""
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    scale = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale.numpy(), shift.numpy()


def _flatten(node: fx.Node, x: fx.Node) -> _Op | None:
    shape, result = _shape(x), _shape(node)
    if result == shape:
        return _Op("same", (x,))
    whole = shape is not None and result == (math.prod(shape),)
    return _Op("flatten", (x,)) if whole and len(shape) in (1, 3) else None


def _pool(kind: Any, x: fx.Node, options: dict[str, Any]) -> _Op | None:
    shape = _shape(x)
    plain = (
        not options.get("ceil_mode")
        and not options.get("return_indices")
        and options.get("count_include_pad", True)
        and options.get("divisor_override") is None
        and _pair(options.get("dilation", 1)) == (1, 1)
    )
    if not plain or shape is None or len(shape) != 3:
        return None
    kernel = _pair(options["kernel_size"])
    stride = options.get("stride")
    return _Op(
        kind, (x,), (kernel, kernel if stride in (None, ()) else _pair(stride), _pair(options.get("padding", 0)))
    )


def _adaptive(node: fx.Node, x: fx.Node) -> _Op | None:
    shape, result = _shape(x), _shape(node)
    if shape is None or result is None or len(shape) != 3 or len(result) != 3:
        return None
    return _Op("adaptive", (x,), result[1:])


def _mean(node: fx.Node, x: fx.Node) -> _Op | None:
    """A mean over height and width is an average pool."""
    bound, shape = _bind(node, ("dim", "keepdim"), dim=None, keepdim=False), _shape(x)
    if bound is None or shape is None or len(shape) != 3 or bound["dim"] is None:
        return None
    dims = {d % 4 for d in ((bound["dim"],) if isinstance(bound["dim"], int) else bound["dim"])}
    return _Op("adaptive", (x,), (1, 1)) if dims == {2, 3} else None


def _add(node: fx.Node, x: fx.Node) -> _Op | None:
    if len(node.args) != 2 or node.kwargs or not isinstance(node.args[1], fx.Node):
        return None
    shapes = {_shape(n) for n in node.args}
    return _Op("add", tuple(node.args)) if len(shapes) == 1 and None not in shapes else None


def _concat(node: fx.Node) -> _Op | None:
    bound = _bind(node, ("dim",), dim=0)
    parts = node.args[0] if node.args else None
    if bound is None or not isinstance(parts, (list, tuple)) or not parts:
        return None
    if not all(isinstance(p, fx.Node) and _shape(p) for p in parts):
        return None
    ranks = {len(_shape(p)) for p in parts}
    if len(ranks) != 1 or ranks - {1, 3} or bound["dim"] not in (1, -max(ranks)):
        return None
    return _Op("concat", tuple(parts))


def _function_op(node: fx.Node, name: str) -> _Op | None:
    if name in ("cat", "concat", "concatenate"):
        return _concat(node)
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    x = node.args[0]
    if name in ("relu", "relu_"):
        return _Op("relu", (x,)) if not {k: v for k, v in node.kwargs.items() if k != "inplace"} else None
    if name == "dropout":
        bound = _bind(node, ("p", "training", "inplace"), p=0.5, training=True, inplace=False)
        return _Op("same", (x,)) if bound and bound["training"] is False else None
    if name in ("flatten", "view", "reshape"):
        return _flatten(node, x)
    if name == "contiguous":
        return _Op("same", (x,))
    if name == "max_pool2d":
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        bound = _bind(node, names)
        return _pool("max_pool", x, bound) if bound else None
    if name == "avg_pool2d":
        names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
        bound = _bind(node, names)
        return _pool("average_pool", x, bound) if bound else None
    if name == "adaptive_avg_pool2d":
        return _adaptive(node, x)
    if name == "mean":
        return _mean(node, x)
    if name == "add":
        return _add(node, x)
    return None


# Functions are known by identity: a user's own `relu` is not torch's.
_FUNCTIONS: dict[Callable[..., Any], str] = {
    function: name
    for name, functions in {
        "relu": (F.relu, torch.relu, F.relu_),
        "dropout": (F.dropout,),
        "flatten": (torch.flatten,),
        "reshape": (torch.reshape,),
        "max_pool2d": (F.max_pool2d, torch.max_pool2d),
        "avg_pool2d": (F.avg_pool2d,),
        "adaptive_avg_pool2d": (F.adaptive_avg_pool2d,),
        "mean": (torch.mean,),
        "cat": (torch.cat, torch.concat, torch.concatenate),
        "add": (operator.add, operator.iadd, torch.add),
    }.items()
    for function in functions
}
_METHODS = ("relu", "flatten", "view", "reshape", "contiguous", "mean", "add")


# ---- plans ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Step:
    """One value that is computed, by torch."""

    node: fx.Node
    sampled: bool


@dataclass(frozen=True)
class _PlanStep(_Step):
    """One value that the core computes from one other."""

    source: fx.Node
    plan: Any
    shape: tuple[int, ...]
    layers: tuple[str, ...] = ()

    def run(self, x: Tensor, seed: int, samples: Sequence[int]) -> Tensor:
        out, _ = self.plan.outputs(_images(x), seed=seed, samples=list(samples), threads=torch.get_num_threads())
        return torch.from_numpy(out).view(len(samples), len(x), *self.shape)

    def count_correct(self, x: Tensor, labels: Tensor, seed: int, samples: Sequence[int]) -> list[int]:
        labels = labels.to(torch.int64).contiguous().numpy()
        threads = torch.get_num_threads()
        correct, _ = self.plan.count_correct(_images(x), labels, seed=seed, samples=list(samples), threads=threads)
        return correct.tolist()


def _images(x: Tensor) -> np.ndarray:
    x = x.detach()
    return (x if x.dim() == 4 else x[:, :, None, None]).contiguous().numpy()


@dataclass
class _Function:
    """relu and affine maps behind an operation, as far as a plan takes them in one: see Pointwise in engine.h."""

    channels: int
    scale: np.ndarray | float = 1.0
    shift: np.ndarray | float = 0.0
    relu: bool = False
    after_scale: np.ndarray | None = None
    after_shift: np.ndarray | None = None

    def absorb(self, op: _Op) -> bool:
        """Put `op` behind, if that can be done."""
        if op.kind == "same":
            return True
        if op.kind == "relu":
            if self.after_scale is not None:
                return False
            self.relu = True
            return True
        if op.kind != "affine":
            return False
        scale, shift = op.detail
        if not self.relu:
            self.scale, self.shift = self.scale * scale, self.shift * scale + shift
        elif self.after_scale is None:
            self.after_scale, self.after_shift = scale, shift
        else:
            self.after_scale, self.after_shift = self.after_scale * scale, self.after_shift * scale + shift
        return True

    def identity(self, op: _Op) -> bool:
        """Whether `op` with what was put behind it does nothing at all."""
        return op.kind == "same" and not self.relu and isinstance(self.scale, float)

    def pointwise(self) -> Any:
        from correctnet import _native

        def array(values: np.ndarray | float | None) -> np.ndarray | None:
            return None if values is None else np.broadcast_to(values, self.channels).astype(np.float32)

        after = array(self.after_scale), array(self.after_shift)
        return _native.Pointwise(
            scale=array(self.scale), shift=array(self.shift), relu=self.relu, after_scale=after[0], after_shift=after[1]
        )


@dataclass
class _Graph:
    """A traced network and which of its nodes the core can compute."""

    root: fx.GraphModule
    input: fx.Node
    output: fx.Node
    ops: dict[fx.Node, _Op] = field(default_factory=dict)
    sources: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """by node of a plan, the one value that the plan begins with"""

    def __post_init__(self) -> None:
        for node in self.root.graph.nodes:
            op = self._op(node)
            # A plan has one input. Where two values meet that torch made, torch goes on.
            sources = {self.sources.get(n, n) for n in op.inputs} if op else set()
            if len(sources) == 1 and _rank_fits(source := sources.pop()):
                self.ops[node], self.sources[node] = op, source

    def _op(self, node: fx.Node) -> _Op | None:
        op = None
        if node.op == "call_module" and _shape(node) and all(_shape(n) for n in node.all_input_nodes):
            op = _module_op(node, self.root.get_submodule(node.target))
        elif node.op == "call_function" and node.target in _FUNCTIONS and _shape(node):
            op = _function_op(node, _FUNCTIONS[node.target])
        elif node.op == "call_method" and node.target in _METHODS and _shape(node):
            op = _function_op(node, node.target)
        if op and _in_place(self.root, node) and len(op.inputs[0].users) > 1:
            return None  # what else reads the input may want to see it changed
        return op if op and all(_shape(n) for n in op.inputs) else None

    def steps(self, first_layer: int, precision: Precision) -> list[_Step]:
        """What computes the output, in order."""
        needed: set[fx.Node] = set()
        waiting = [self.output]
        while waiting:
            node = waiting.pop()
            if node in needed or node is self.input:
                continue
            needed.add(node)
            waiting += [self.sources[node]] if self._planned(node) else node.all_input_nodes
        sampled = self._sampled(first_layer)
        return [
            self._plan(node, first_layer, precision, node in sampled)
            if self._planned(node)
            else _Step(node, node in sampled)
            for node in self.root.graph.nodes
            if node in needed
        ]

    def _planned(self, node: fx.Node) -> bool:
        """Whether a plan is to compute the value: where no layer is in it, torch is as fast."""
        return node in self.ops and any(self.ops[n].kind in ("conv", "linear") for n in self._region(node))

    def _sampled(self, first_layer: int) -> set[fx.Node]:
        """The nodes whose values differ from chip to chip."""
        sampled: set[fx.Node] = set()
        for node in self.root.graph.nodes:
            own = node.op == "call_module" and any(
                _noise(m, first_layer) for m in self.root.get_submodule(node.target).modules()
            )
            if own or any(n in sampled for n in node.all_input_nodes):
                sampled.add(node)
        return sampled

    def _plan(self, target: fx.Node, first_layer: int, precision: Precision, sampled: bool) -> _PlanStep:
        from correctnet import _native

        source = self.sources[target]
        region = self._region(target)
        readers = {n: [r for r in region if n in self.ops[r].inputs] for n in (source, *region)}
        channels, height, width = (*_shape(source), 1, 1)[:3]
        plan = _native.Plan(precision, channels, height, width)
        values, done, layers = {source: 0}, set(), []
        for node in region:
            if node in done:
                continue
            op = self.ops[node]
            chain = _Function(_shape(node)[0])
            pool, last = False, node
            if op.kind in ("affine", "relu", "same"):
                chain.absorb(op)
            # What follows and can be done in the same pass, up to a value that something else reads, too.
            while op.kind in ("conv", "linear", "affine", "relu", "same", "add"):
                after = readers[last]
                if last is target or len(after) != 1:
                    break
                following = self.ops[after[0]]
                if op.kind == "conv" and not pool and _halves(following, _shape(last)):
                    pool = True
                elif pool and following.kind != "same" or not chain.absorb(following):
                    break
                last = after[0]
                done.add(last)
            x = [values[n] for n in op.inputs]
            values[last] = x[0] if chain.identity(op) else self._emit(plan, op, x, chain, pool, first_layer)
            if op.kind in ("conv", "linear"):
                layers.append(node.target)
        plan.finish(values[target])
        return _PlanStep(target, sampled, source, plan, _shape(target), tuple(layers))

    def _region(self, target: fx.Node) -> list[fx.Node]:
        """The nodes between a plan's source and its target, in order."""
        found, waiting = set(), [target]
        while waiting:
            node = waiting.pop()
            if node in self.ops and node not in found:
                found.add(node)
                waiting += self.ops[node].inputs
        return [n for n in self.root.graph.nodes if n in found]

    def _emit(self, plan: Any, op: _Op, x: list[int], chain: _Function, pool: bool, first_layer: int) -> int:
        """Append an operation to a plan; the number of its value."""
        if op.kind == "conv":
            layer, padding = op.detail
            chain.shift = chain.shift + chain.scale * _bias(layer)
            return plan.conv(
                x[0],
                layer.weight.detach().permute(0, 2, 3, 1).contiguous().numpy(),
                stride=layer.stride,
                padding=padding,
                dilation=layer.dilation,
                groups=layer.groups,
                noise=_noise(layer, first_layer),
                pointwise=chain.pointwise(),
                pool=pool,
            )
        if op.kind == "linear":
            layer = op.detail
            chain.shift = chain.shift + chain.scale * _bias(layer)
            weight = layer.weight.detach().contiguous().numpy()
            return plan.linear(x[0], weight, noise=_noise(layer, first_layer), pointwise=chain.pointwise())
        if op.kind in ("max_pool", "average_pool"):
            return getattr(plan, op.kind)(x[0], *op.detail)
        if op.kind == "adaptive":
            return plan.adaptive_average_pool(x[0], *op.detail)
        if op.kind == "flatten":
            return plan.flatten(x[0])
        if op.kind == "concat":
            return plan.concat(x)
        if op.kind == "add":
            return plan.add(x[0], x[1], chain.pointwise())
        return plan.pointwise(x[0], chain.pointwise())


def _rank_fits(source: fx.Node) -> bool:
    shape = _shape(source)
    return shape is not None and len(shape) in (1, 3)


def _halves(op: _Op, shape: tuple[int, ...]) -> bool:
    """Whether `op` is the 2 x 2 max-pool that a convolution does in passing."""
    return op.kind == "max_pool" and op.detail == ((2, 2), (2, 2), (0, 0)) and min(shape[1:]) >= 2


def _bias(layer: nn.Module) -> np.ndarray | float:
    return 0.0 if layer.bias is None else layer.bias.detach().double().numpy()


def _noise(layer: nn.Module, first_layer: int) -> Any:
    """What varies a layer's weights, or None."""
    if not isinstance(layer, AnalogLayer) or layer.layer_index < first_layer:
        return None
    if type(layer.variation) is not LogNormalVariation:
        return layer.variation
    if layer.variation.sigma == 0:
        return None
    from correctnet import _native

    return _native.LayerNoise(layer.layer_index, layer.variation.sigma, layer.variation.shift)


def _report(graph: _Graph, steps: list[_Step]) -> Report:
    fused = {name for s in steps if isinstance(s, _PlanStep) for name in s.layers}
    analog = {n: m for n, m in graph.root.named_modules() if isinstance(m, AnalogLayer)}
    names = sorted(analog, key=lambda n: analog[n].layer_index)
    through = [s.node for s in steps if not isinstance(s, _PlanStep) and "tensor_meta" in s.node.meta]
    return Report(
        fused=tuple(n for n in names if n in fused),
        unfused=tuple(n for n in names if n not in fused),
        torch=tuple(f"{n.name} ({_what(graph.root, n)})" for n in through),
        plans=sum(isinstance(s, _PlanStep) for s in steps),
    )


def _what(root: nn.Module, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(root.get_submodule(node.target)).__name__
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
