"""Trace of a network with torch.fx, and its nodes as operations that a plan of the C++ core can express."""

from __future__ import annotations

import copy
import inspect
import math
import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.fx.passes.shape_prop import _extract_tensor_metadata

from correctnet.crossbar.convert import programmed
from correctnet.crossbar.layers import AnalogConv2d, AnalogLayer, AnalogLinear, analog_layers, nominal_weight
from correctnet.devices.base import kernel_noise
from correctnet.errors import UserError, one_line
from correctnet.noise import core
from correctnet.noise import device as gpu
from correctnet.reloading import survives_reload


@survives_reload
class Unsupported(Exception):
    """The core cannot run this network; the message says why."""


class _Shapes(fx.Interpreter):
    """Runs a graph and records the shape of each value, and integer values, which may be the window of a pool."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        meta = map_aggregate(result, lambda v: _extract_tensor_metadata(v) if isinstance(v, Tensor) else None)
        if isinstance(result, Tensor) or (isinstance(meta, list | tuple) and any(m is not None for m in meta)):
            n.meta["tensor_meta"] = meta
        if isinstance(result, int) and not isinstance(result, bool):
            n.meta["size"] = result
        return result


class _Tracer(fx.Tracer):
    """Tracer that keeps analog layers, and modules with hooks (which may do anything), as single steps.

    Where a network's code decides on a size, a type or a number of dimensions (`assert x.shape[1] == 3`), the decision
    is that for `example`, if it does not depend on the number of images.
    """

    def __init__(self, example: Tensor):
        super().__init__()
        self._recording = True
        self._values = [_Values(example[:1].expand(n, *example.shape[1:])) for n in (2, 3)]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, AnalogLayer) or _hooked(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return super().call_module(m, forward, args, kwargs) if self._recording else forward(*args, **kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return super().getattr(attr, attr_val, parameter_proxy_cache) if self._recording else attr_val

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return self.known(obj.node, bool)

    def known(self, node: fx.Node, read: Callable[[Any], Any]) -> Any:
        """Return what `read` makes of the value of a node that depends on sizes alone.

        Raises TraceError where it depends on the data or on the number of images.
        """
        found = []
        if _of_sizes(node):
            self._recording = False  # what is called and read now is not part of the network
            try:
                found = [read(values.of(self.root, node)) for values in self._values]
            finally:
                self._recording = True
        if not found or found[0] != found[1]:
            raise fx.proxy.TraceError("its code depends on the images' values or on their number")
        return found[0]


class _Proxy(fx.Proxy):
    """Value of a network that is being traced; it has a length and a number where these follow from sizes."""

    def __getattr__(self, name: str) -> Any:
        if name in _SIZES:
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        return super().__getattr__(name)

    def __len__(self) -> int:
        return self.tracer.known(self.node, len)

    def __int__(self) -> int:
        return self.tracer.known(self.node, int)

    def __float__(self) -> float:
        return self.tracer.known(self.node, float)


class _Values:
    """Values of a graph that is being built, for some images."""

    def __init__(self, images: Tensor):
        self._images, self._values = images, {}

    @torch.no_grad()
    def of(self, root: nn.Module, node: fx.Node) -> Any:
        wanted, waiting = set(), [node]
        while waiting:
            n = waiting.pop()
            if n not in wanted and n not in self._values:
                wanted.add(n)
                waiting += n.all_input_nodes
        for n in node.graph.nodes:
            if n in wanted:
                self._values[n] = self._images.clone() if n.op == "placeholder" else call(root, n, self._values)
        return self._values[node]


# What is the same for all tensors of one shape and type.
_SIZES = ("shape", "ndim", "dtype", "device")


def _of_sizes(node: fx.Node) -> bool:
    if node.op == "call_function" and node.target is getattr and node.args[1] in _SIZES:
        return True
    if node.op == "call_method" and node.target in ("size", "dim", "ndimension", "numel", "nelement"):
        return True
    computed = node.op in ("call_function", "call_method") and bool(node.all_input_nodes)
    return computed and all(_of_sizes(n) for n in node.all_input_nodes)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


@survives_reload
@dataclass(frozen=True)
class Traced:
    """A network as a graph whose nodes carry the shapes of their values.

    Attributes:
        root: the graph, over copies of the network's modules that share its tensors.
        input, output: the graph's first and last value.
        unused: names of the analog layers that the graph does not use.
    """

    root: fx.GraphModule
    input: fx.Node
    output: fx.Node
    unused: tuple[str, ...] = ()


def trace(model: nn.Module, example: Tensor) -> Traced:
    """Trace a network with the shapes of `example`, (N >= 1, ...).

    Raises:
        Unsupported: the core can compute nothing of the network.
        UserError: no images.
    """
    if not core.status().built:
        raise Unsupported("the C++ core was not built")
    if len(example) == 0:
        raise UserError("engine: no images")
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers(), example)}
    if len(devices) > 1:
        raise Unsupported(f"model and images are on several devices ({', '.join(sorted(map(str, devices)))})")
    (device,) = devices
    if device.type != "cpu" and not gpu.reaches(device):
        raise Unsupported(f"the model is on {device}, and {gpu.status().reason}")
    if any(p.dtype != torch.float32 for p in model.parameters()) or example.dtype != torch.float32:
        raise Unsupported("its parameters or its inputs are not float32")
    try:
        with programmed(model, None):
            return _traced(_twin(model), example)
    except Unsupported:
        raise
    except Exception as error:  # the network's own code may raise anything
        raise Unsupported(f"torch.fx cannot trace it ({one_line(error, 160)})") from error


def _twin(model: nn.Module) -> nn.Module:
    """Copy a network, sharing tensors, variation and chip, so that tracing does not modify the original."""
    shared: dict[int, Any] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(tensor, Tensor):
                shared[id(tensor)] = tensor
        if isinstance(module, AnalogLayer):
            shared |= {id(module.chip): module.chip, id(module.variation): module.variation}
    return copy.deepcopy(model, shared).eval()


def _traced(model: nn.Module, example: Tensor) -> Traced:
    # A root module is always traced through, which would lose the variation of an analog layer.
    root = nn.Sequential(model) if isinstance(model, AnalogLayer) or _hooked(model) else model
    graph = _Tracer(example).trace(_of_one_argument(root))
    nodes = list(graph.nodes)
    inputs = [n for n in nodes if n.op == "placeholder"]
    (last,) = (n for n in nodes if n.op == "output")
    if len(inputs) != 1 or not isinstance(last.args[0], fx.Node):
        raise Unsupported("it has more than one input or output")
    module = fx.GraphModule(root, graph)
    _keep_layers(module, root)
    with torch.no_grad():
        # Two images, since a batch of 1 could not be told from a feature dimension of 1.
        _Shapes(module).run(example[:1].expand(2, *example.shape[1:]).contiguous())
    reached = set(analog_layers(module))
    unused = tuple(n for n, m in root.named_modules() if isinstance(m, AnalogLayer) and m not in reached)
    return Traced(module, inputs[0], last.args[0], unused)


def _of_one_argument(root: nn.Module) -> nn.Module:
    """Let a network whose `forward` has optional arguments be called with the first argument only."""
    first, *others = inspect.signature(root.forward).parameters.values()
    optional = all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in others)
    if others and optional and first.kind in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD):
        kind = type(root)
        root.__class__ = type(kind.__name__, (kind,), {"forward": lambda self, x: kind.forward(self, x)})
    return root


def _keep_layers(module: fx.GraphModule, root: nn.Module) -> None:
    """Put analog layers back where a graph reads their weights without calling them.

    GraphModule keeps only bare parameters there, which are nominal on every chip.
    """
    for node in module.graph.nodes:
        name = node.target.rpartition(".")[0] if node.op == "get_attr" else ""
        layer = root.get_submodule(name) if name else None
        if isinstance(layer, AnalogLayer):
            parent, _, child = name.rpartition(".")
            module.get_submodule(parent)._modules[child] = layer


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Return the shape of a node's value without the batch; None where it is not a float32 tensor with a batch."""
    meta = node.meta.get("tensor_meta")
    if not hasattr(meta, "shape") or meta.dtype != torch.float32 or len(meta.shape) < 2 or meta.shape[0] != 2:
        return None
    return tuple(meta.shape[1:])


def in_place(root: nn.Module, node: fx.Node) -> bool:
    """Return whether a step may change its first input in place."""
    if node.kwargs.get("inplace"):
        return True
    if node.op == "call_module":
        return any(getattr(m, "inplace", False) for m in root.get_submodule(node.target).modules())
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.endswith("_") or (node.target in vars(operator).values() and name.startswith("i") and name != "inv")


def changed_by(root: nn.Module, node: fx.Node) -> fx.Node | None:
    """Return the value that a step changes in place while other steps read it, or None."""
    inputs = node.all_input_nodes
    return inputs[0] if inputs and len(inputs[0].users) > 1 and in_place(root, node) else None


def call(root: nn.Module, node: fx.Node, values: dict[fx.Node, Any], weights: dict[str, Tensor] | None = None) -> Any:
    """Compute a node by torch; `weights` replace parameters of the module that it calls."""
    args = fx.node.map_arg(node.args, values.__getitem__)
    kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
    if node.op == "call_module":
        module = root.get_submodule(node.target)
        return torch.func.functional_call(module, weights, args, kwargs) if weights else module(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], node.target)(*args[1:], **kwargs)
    if node.op == "get_attr":
        return weights["weight"] if weights else operator.attrgetter(node.target)(root)
    return node.target(*args, **kwargs)


# ---- operations -----------------------------------------------------------------------------------------------------


@survives_reload
@dataclass(frozen=True)
class Op:
    """An operation that a plan can express.

    Attributes:
        inputs: the nodes that it reads.
        detail: its parameters.
        last: whether the values that it reads have their channels last, (N, ..., C), not first, (N, C, ...); None: as
            they come. Values (N, C) are both.
        turns: whether its result has them the other way.
    """

    kind: Literal[
        "conv",
        "linear",
        "layer_norm",
        "group_norm",
        "affine",
        "activation",
        "max_pool",
        "average_pool",
        "adaptive",
        "flatten",
        "same",
        "concat",
        "channels",
        "add",
        "multiply",
    ]
    inputs: tuple[fx.Node, ...]
    detail: Any = None
    last: bool | None = False
    turns: bool = False


def op_of(root: nn.Module, node: fx.Node) -> Op | None:
    """Return a node as an operation of a plan; None where no operation is certain to compute the same."""
    op = None
    if not shape_of(node):
        return None
    if node.op == "call_module" and all(shape_of(n) for n in node.all_input_nodes):
        op = _module_op(node, root.get_submodule(node.target))
    elif node.op == "call_function" and (name := _function(node.target)):
        op = _function_op(root, node, name)
    elif node.op == "call_method" and node.target in _METHODS:
        op = _function_op(root, node, _METHODS[node.target])
    if changed_by(root, node):
        return None  # other steps may rely on the change
    return op if op and all(shape_of(n) for n in op.inputs) else None


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _bind(node: fx.Node, names: Sequence[str], **defaults: Any) -> dict[str, Any] | None:
    """Return a function's arguments by name; None where one is unknown or is itself computed."""
    found = {**defaults, **dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
    if len(node.args) - 1 > len(names) or not set(found) <= set(names):
        return None
    if any(isinstance(v, fx.Node) and "size" not in v.meta for v in found.values()):
        return None
    found = {k: v.meta["size"] if isinstance(v, fx.Node) else v for k, v in found.items()}
    return None if any(found[k] is None and k not in defaults for k in found) else found


# An activation as the core's `Pointwise` has it: (name, low, high); low and high are the bounds of a clamp, and low is
# the slope of a leaky ReLU.
Activation = tuple[str, float, float]
RELU: Activation = ("relu", 0.0, 0.0)
# By name of the function in torch.nn.functional, also of torch and of tensors: the activations without arguments.
_PLAIN = {
    "relu": RELU,
    "relu6": ("clamp", 0.0, 6.0),
    **{name: (name, 0.0, 0.0) for name in ("sigmoid", "tanh", "silu", "hardsigmoid", "hardswish")},
}
_PLAIN_MODULES = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.SiLU: "silu",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Hardswish: "hardswish",
}


def _clamp(low: float | None, high: float | None) -> Activation:
    return "clamp", -math.inf if low is None else float(low), math.inf if high is None else float(high)


def _leaky(slope: float) -> Activation | None:
    return ("leaky", float(slope), 0.0) if math.isfinite(slope) else None


def _gelu(approximate: str) -> Activation | None:
    name = {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)
    return (name, 0.0, 0.0) if name else None


def _module_activation(module: nn.Module) -> Activation | None:
    kind = type(module)
    if kind in _PLAIN_MODULES:
        return _PLAIN[_PLAIN_MODULES[kind]]
    if kind is nn.Hardtanh:
        return _clamp(module.min_val, module.max_val)
    if kind is nn.LeakyReLU:
        return _leaky(module.negative_slope)
    return _gelu(module.approximate) if kind is nn.GELU else None


def _function_activation(node: fx.Node, name: str) -> Activation | None:
    if name in _PLAIN:
        return _PLAIN[name] if _bind(node, ("inplace",), inplace=False) else None
    if name == "hardtanh":
        bound = _bind(node, ("min_val", "max_val", "inplace"), min_val=-1.0, max_val=1.0, inplace=False)
        return _clamp(bound["min_val"], bound["max_val"]) if bound else None
    if name == "clamp":
        bound = _bind(node, ("min", "max"), min=None, max=None)
        numbers = bound and all(v is None or isinstance(v, int | float) for v in bound.values())
        return _clamp(bound["min"], bound["max"]) if numbers else None
    if name == "leaky_relu":
        bound = _bind(node, ("negative_slope", "inplace"), negative_slope=0.01, inplace=False)
        return _leaky(bound["negative_slope"]) if bound else None
    if name == "gelu":
        bound = _bind(node, ("approximate",), approximate="none")
        return _gelu(bound["approximate"]) if bound else None
    return None


_ACTIVATIONS = (*_PLAIN, "hardtanh", "clamp", "leaky_relu", "gelu")


def _module_op(node: fx.Node, module: nn.Module) -> Op | None:
    if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node) or _hooked(module):
        return None
    x, kind = node.args[0], type(module)
    shape = shape_of(x)
    if isinstance(module, AnalogLayer) and kernel_noise(module.variation) is None:
        return None
    if kind in (nn.Conv2d, AnalogConv2d, nn.Linear, AnalogLinear) and nominal_weight(module).numel() == 0:
        return None
    if kind in (nn.Conv2d, AnalogConv2d):
        padding = _conv_padding(module)
        return Op("conv", (x,), (module, padding)) if padding is not None and len(shape) == 3 else None
    if kind in (nn.Linear, AnalogLinear):
        return Op("linear", (x,), module, last=len(shape) > 1) if len(shape) <= 3 else None
    if kind is nn.LayerNorm:
        return _layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)
    if kind is nn.GroupNorm:
        return _group_norm(x, module.num_groups, module.weight, module.bias, module.eps)
    if kind is nn.InstanceNorm2d and module.running_mean is None and len(shape) == 3:
        return _group_norm(x, module.num_features, module.weight, module.bias, module.eps)
    if kind in (nn.BatchNorm1d, nn.BatchNorm2d):
        usable = module.running_mean is not None and len(shape) == (3 if kind is nn.BatchNorm2d else 1)
        return Op("affine", (x,), _batchnorm(module)) if usable else None
    if activation := _module_activation(module):
        return Op("activation", (x,), activation, last=None)
    if kind is nn.ChannelShuffle and len(shape) == 3:
        return _shuffle(x, module.groups)
    if kind in (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout):
        return Op("same", (x,), last=None)
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
    """Return (scale, shift) of a BatchNorm in evaluation mode."""
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    scale = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale.cpu().numpy(), shift.cpu().numpy()


def _flatten(node: fx.Node, x: fx.Node) -> Op | None:
    shape, result = shape_of(x), shape_of(node)
    if result == shape or (shape is not None and len(shape) == 1 and result == (*shape, 1, 1)):
        return Op("same", (x,), last=None)
    if shape is not None and len(shape) == 4:
        return _shuffled(node, x)
    whole = shape is not None and result == (math.prod(shape),)
    return Op("flatten", (x,)) if whole and len(shape) in (1, 3) else None


def _shuffle(x: fx.Node, groups: int) -> Op:
    """Return the channel shuffle: (groups, channels a group) transposed."""
    order = np.arange(shape_of(x)[0]).reshape(groups, -1).T.ravel()
    return Op("channels", (x,), tuple(order.tolist()))


def _shuffled(node: fx.Node, x: fx.Node) -> Op | None:
    """Return a channel shuffle that is written as view, transpose and view, of which `node` is the last."""
    while x.op == "call_method" and x.target == "contiguous" and len(x.args) == 1 and not x.kwargs:
        x = x.args[0]
    transposed = (x.op == "call_method" and x.target in ("transpose", "permute")) or (
        x.op == "call_function" and x.target in (torch.transpose, torch.permute)
    )
    axes = tuple(x.args[1]) if len(x.args) == 2 and isinstance(x.args[1], list | tuple) else tuple(x.args[1:])
    if not transposed or x.kwargs or axes not in ((1, 2), (2, 1), (0, 2, 1, 3, 4)):
        return None
    view = x.args[0]
    is_view = (view.op == "call_method" and view.target in ("view", "reshape")) or view.target is torch.reshape
    source = view.args[0] if is_view and view.args else None
    if not isinstance(source, fx.Node) or shape_of(source) is None or shape_of(source) != shape_of(node):
        return None
    shape, split = shape_of(source), shape_of(view)
    if len(shape) != 3 or split is None or len(split) != 4 or split[2:] != shape[1:]:
        return None
    return _shuffle(source, split[0])


def _parts(node: fx.Node) -> Op | None:
    """Return a selection of channels: one of the parts of chunk or split, or a slice."""
    source, index = node.args
    if not isinstance(source, fx.Node):
        return None
    if isinstance(index, tuple):
        shape = shape_of(source)
        if index == (slice(None), slice(None), None, None) and shape is not None and len(shape) == 1:
            return Op("same", (source,), last=None)
        channels = index[1] if len(index) > 1 and index[0] == slice(None) else None
        rest = all(i == slice(None) or i is Ellipsis for i in index[2:])
        if shape is None or len(shape) not in (1, 3) or not rest or not isinstance(channels, slice):
            return None
        if any(isinstance(v, fx.Node) for v in (channels.start, channels.stop, channels.step)):
            return None
        return Op("channels", (source,), tuple(range(shape[0])[channels]))
    function = {torch.chunk: "chunk", torch.split: "split"}.get(source.target, source.target)
    if source.op not in ("call_function", "call_method") or function not in ("chunk", "split"):
        return None
    name = "chunks" if function == "chunk" else "split_size" if source.op == "call_method" else "split_size_or_sections"
    bound, x = _bind(source, (name, "dim"), dim=0), source.args[0]
    shape = shape_of(x) if isinstance(x, fx.Node) else None
    if bound is None or shape is None or len(shape) not in (1, 3) or bound["dim"] not in (1, -len(shape)):
        return None
    sizes = [meta.shape[1] for meta in source.meta["tensor_meta"]]
    if not isinstance(index, int):
        return None
    index = range(len(sizes))[index]
    first = sum(sizes[:index])
    return Op("channels", (x,), tuple(range(first, first + sizes[index])))


def _pool(kind: Any, x: fx.Node, options: dict[str, Any]) -> Op | None:
    shape = shape_of(x)
    include_padding = bool(options.get("count_include_pad", True))
    plain = (
        not options.get("return_indices")
        and options.get("divisor_override") is None
        and _pair(options.get("dilation", 1)) == (1, 1)
    )
    if not plain or shape is None or len(shape) != 3:
        return None
    kernel, padding = _pair(options["kernel_size"]), _pair(options.get("padding", 0))
    stride = options.get("stride")
    stride = kernel if stride in (None, ()) else _pair(stride)
    # ceil_mode makes no difference where the windows end with the map.
    rests = [(n + 2 * p - k) % s for n, p, k, s in zip(shape[1:], padding, kernel, stride, strict=True)]
    ceil = bool(options.get("ceil_mode")) and any(rests)
    if kind == "average_pool" and include_padding and ceil:
        return None  # its last windows count a part of the padding
    return Op(kind, (x,), (kernel, stride, padding, ceil, include_padding))


def _adaptive(node: fx.Node, x: fx.Node) -> Op | None:
    shape, result = shape_of(x), shape_of(node)
    if shape is None or result is None or len(shape) != 3 or len(result) != 3:
        return None
    return Op("adaptive", (x,), result[1:])


def _mean(node: fx.Node, x: fx.Node) -> Op | None:
    """Return a mean over height and width, or over tokens, as an average pool."""
    bound, shape = _bind(node, ("dim", "keepdim"), dim=None, keepdim=False), shape_of(x)
    if bound is None or shape is None or bound["dim"] is None:
        return None
    rank = len(shape) + 1
    dims = {d % rank for d in ((bound["dim"],) if isinstance(bound["dim"], int) else bound["dim"])}
    if rank == 4 and dims == {2, 3}:
        return Op("adaptive", (x,), (1, 1))
    tokens = (rank == 4 and dims == {1, 2}) or (rank == 3 and dims == {1})
    return Op("adaptive", (x,), (1, 1), last=True) if tokens and not bound["keepdim"] else None


def _layer_norm(x: fx.Node, over: Any, weight: Tensor | None, bias: Tensor | None, eps: float) -> Op | None:
    """Return LayerNorm over the last dimension, which the channels are."""
    shape = shape_of(x)
    if shape is None or len(shape) not in (2, 3) or tuple(over) != shape[-1:]:
        return None
    return Op("layer_norm", (x,), (float(eps), _numbers(weight, 1.0), _numbers(bias, 0.0)), last=True)


def _group_norm(x: fx.Node, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Op | None:
    shape = shape_of(x)
    if shape is None or len(shape) not in (1, 3) or shape[0] % groups:
        return None
    scale, shift = _numbers(weight, 1.0), _numbers(bias, 0.0)
    return Op("group_norm", (x,), (groups, float(eps), scale, shift))


def _numbers(tensor: Tensor | None, otherwise: float) -> np.ndarray | float:
    return otherwise if tensor is None else tensor.detach().double().cpu().numpy()


def _function_layer_norm(root: nn.Module, node: fx.Node, x: fx.Node) -> Op | None:
    found = dict(zip(("normalized_shape", "weight", "bias", "eps"), node.args[1:], strict=False)) | node.kwargs
    found = {"weight": None, "bias": None, "eps": 1e-5} | found
    for name in ("weight", "bias"):
        if found[name] is not None:
            found[name] = _constant(root, found[name])
            if found[name] is None:
                return None
    if any(isinstance(v, fx.Node) for v in found.values()) or not isinstance(found["normalized_shape"], list | tuple):
        return None
    return _layer_norm(x, found["normalized_shape"], found["weight"], found["bias"], found["eps"])


def _constant(root: nn.Module, node: Any) -> Tensor | None:
    """Return a digital float32 parameter or buffer that a node reads; None for any other node."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    owner, _, _ = node.target.rpartition(".")
    tensor = operator.attrgetter(node.target)(root)
    digital = not isinstance(root.get_submodule(owner), AnalogLayer)
    return tensor if digital and isinstance(tensor, Tensor) and tensor.dtype == torch.float32 else None


def _permuted(node: fx.Node, x: fx.Node) -> Op | None:
    """Return a permutation that puts the channels last or first."""
    axes = node.args[1:]
    axes = tuple(axes[0]) if len(axes) == 1 and isinstance(axes[0], list | tuple) else axes
    if node.kwargs or not all(isinstance(a, int) for a in axes) or shape_of(x) is None or len(shape_of(x)) != 3:
        return None
    last = {(0, 2, 3, 1): False, (0, 3, 1, 2): True}.get(tuple(a % 4 for a in axes))
    return None if last is None else Op("same", (x,), last=last, turns=True)


def _scaled(root: nn.Module, node: fx.Node) -> Op | None:
    """Return the product of a value and a parameter with a number a channel."""
    if len(node.args) != 2 or node.kwargs:
        return None
    for x, other in (node.args, node.args[::-1]):
        parameter, shape = _constant(root, other), shape_of(x) if isinstance(x, fx.Node) else None
        if parameter is None or shape is None or len(shape) not in (2, 3):
            continue
        sizes = tuple(parameter.shape)
        last = {(shape[0], 1, 1): False, (1, shape[0], 1, 1): False, shape[-1:]: True}.get(sizes)
        if last is None or (last is False and len(shape) != 3):
            continue
        scale = parameter.detach().double().cpu().numpy().ravel()
        return Op("affine", (x,), (scale, np.zeros_like(scale)), last=last)
    return None


def _arithmetic(node: fx.Node, name: str) -> Op | None:
    """Return a sum or product of two values, or of one and a number."""
    if len(node.args) != 2 or node.kwargs:
        return None
    a, b = node.args
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        return _two_values(a, b, name)
    x, number = (a, b) if isinstance(a, fx.Node) else (b, a)
    if not isinstance(x, fx.Node) or isinstance(number, bool) or not isinstance(number, int | float):
        return None
    if not math.isfinite(number) or (name == "div" and (x is b or number == 0)):
        return None
    scale, shift = {
        "add": (1.0, number),
        "sub": (1.0, -number) if x is a else (-1.0, number),
        "mul": (number, 0.0),
        "div": (1 / (number or 1), 0.0),
    }[name]
    return Op("affine", (x,), (np.full(1, scale, float), np.full(1, shift, float)), last=None)


def _two_values(a: fx.Node, b: fx.Node, name: str) -> Op | None:
    shapes = shape_of(a), shape_of(b)
    if None in shapes:
        return None
    if shapes[0] == shapes[1]:
        return {"add": Op("add", (a, b), last=None), "mul": Op("multiply", (a, b), last=None)}.get(name)
    if name != "mul" or {len(s) for s in shapes} != {3} or shapes[0][0] != shapes[1][0]:
        return None
    one_pixel = [s[1:] == (1, 1) for s in shapes]
    return Op("multiply", (b, a) if one_pixel[0] else (a, b)) if any(one_pixel) else None


def _concat(node: fx.Node) -> Op | None:
    bound = _bind(node, ("dim",), dim=0)
    parts = node.args[0] if node.args else None
    if bound is None or not isinstance(parts, (list, tuple)) or not parts:
        return None
    if not all(isinstance(p, fx.Node) and shape_of(p) for p in parts):
        return None
    ranks = {len(shape_of(p)) for p in parts}
    if len(ranks) != 1 or ranks - {1, 3} or bound["dim"] not in (1, -max(ranks)):
        return None
    return Op("concat", tuple(parts))


def _function(target: Any) -> str | None:
    """Return the name under which `_function_op` knows a function."""
    torchvision = sys.modules.get("torchvision.ops.stochastic_depth")
    if torchvision is not None and target is torchvision.stochastic_depth:
        return "stochastic_depth"
    return _FUNCTIONS.get(target)


def _function_op(root: nn.Module, node: fx.Node, name: str) -> Op | None:
    if name == "cat":
        return _concat(node)
    if name in ("add", "sub", "mul", "div"):
        return (_scaled(root, node) if name == "mul" else None) or _arithmetic(node, name)
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    x = node.args[0]
    if name in _ACTIVATIONS:
        activation = _function_activation(node, name)
        return Op("activation", (x,), activation, last=None) if activation else None
    if name == "getitem":
        return _parts(node)
    if name == "permute":
        return _permuted(node, x)
    if name == "layer_norm":
        return _function_layer_norm(root, node, x)
    if name == "dropout":
        bound = _bind(node, ("p", "training", "inplace"), p=0.5, training=True, inplace=False)
        return Op("same", (x,), last=None) if bound and bound["training"] is False else None
    if name == "stochastic_depth":
        bound = _bind(node, ("p", "mode", "training"), training=True)
        return Op("same", (x,), last=None) if bound and bound["training"] is False else None
    if name in ("flatten", "view", "reshape"):
        return _flatten(node, x)
    if name == "contiguous":
        return Op("same", (x,), last=None)
    if name == "max_pool2d":
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        bound = _bind(node, names, stride=None)
        return _pool("max_pool", x, bound) if bound else None
    if name == "avg_pool2d":
        names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
        bound = _bind(node, names, stride=None, divisor_override=None)
        return _pool("average_pool", x, bound) if bound else None
    if name == "adaptive_avg_pool2d":
        return _adaptive(node, x)
    if name == "mean":
        return _mean(node, x)
    return None


# Functions are matched by identity, not by name: a user may define another `relu`.
_FUNCTIONS: dict[Callable[..., Any], str] = {
    function: name
    for name, functions in {
        "relu": (F.relu, torch.relu, F.relu_, torch.relu_),
        "relu6": (F.relu6,),
        "sigmoid": (torch.sigmoid, torch.sigmoid_, F.sigmoid, torch.special.expit),
        "tanh": (torch.tanh, torch.tanh_, F.tanh),
        "silu": (F.silu,),
        "hardsigmoid": (F.hardsigmoid,),
        "hardswish": (F.hardswish,),
        "hardtanh": (F.hardtanh, F.hardtanh_),
        "clamp": (torch.clamp, torch.clamp_, torch.clip, torch.clip_),
        "leaky_relu": (F.leaky_relu, F.leaky_relu_),
        "gelu": (F.gelu,),
        "getitem": (operator.getitem,),
        "permute": (torch.permute,),
        "layer_norm": (F.layer_norm,),
        "dropout": (F.dropout,),
        "flatten": (torch.flatten,),
        "reshape": (torch.reshape,),
        "max_pool2d": (F.max_pool2d, torch.max_pool2d),
        "avg_pool2d": (F.avg_pool2d,),
        "adaptive_avg_pool2d": (F.adaptive_avg_pool2d,),
        "mean": (torch.mean,),
        "cat": (torch.cat, torch.concat, torch.concatenate),
        "add": (operator.add, operator.iadd, torch.add),
        "sub": (operator.sub, operator.isub, torch.sub, torch.subtract),
        "mul": (operator.mul, operator.imul, torch.mul, torch.multiply),
        "div": (operator.truediv, operator.itruediv, torch.div, torch.divide),
    }.items()
    for function in functions
}
_METHODS = {
    **{name: name for name in ("flatten", "view", "reshape", "contiguous", "mean", "permute")},
    **{
        name + end: name
        for name in ("relu", "sigmoid", "tanh", "clamp", "add", "sub", "mul", "div")
        for end in ("", "_")
    },
    "clip": "clamp",
    "clip_": "clamp",
}
