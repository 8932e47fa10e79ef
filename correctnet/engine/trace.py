"""Trace of a network with torch.fx, and its nodes as operations that a plan of the C++ core can express."""

from __future__ import annotations

import copy
import math
import operator
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
    """Tracer that keeps analog layers, and modules with hooks (which may do anything), as single steps."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, AnalogLayer) or _hooked(m) or super().is_leaf_module(m, module_qualified_name)


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
    graph = _Tracer().trace(root)
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
    """An operation that a plan can express: its kind, the nodes that it reads, and its parameters."""

    kind: Literal[
        "conv", "linear", "affine", "relu", "max_pool", "average_pool", "adaptive", "flatten", "same", "concat", "add"
    ]
    inputs: tuple[fx.Node, ...]
    detail: Any = None


def op_of(root: nn.Module, node: fx.Node) -> Op | None:
    """Return a node as an operation of a plan; None where no operation is certain to compute the same."""
    op = None
    if not shape_of(node):
        return None
    if node.op == "call_module" and all(shape_of(n) for n in node.all_input_nodes):
        op = _module_op(node, root.get_submodule(node.target))
    elif node.op == "call_function" and node.target in _FUNCTIONS:
        op = _function_op(node, _FUNCTIONS[node.target])
    elif node.op == "call_method" and node.target in _METHODS:
        op = _function_op(node, node.target)
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
    found = {k: v.meta.get("size") if isinstance(v, fx.Node) else v for k, v in found.items()}
    return None if any(found[k] is None and k not in defaults for k in found) else found


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
        return Op("linear", (x,), module) if len(shape) == 1 else None
    if kind in (nn.BatchNorm1d, nn.BatchNorm2d):
        usable = module.running_mean is not None and len(shape) == (3 if kind is nn.BatchNorm2d else 1)
        return Op("affine", (x,), _batchnorm(module)) if usable else None
    if kind is nn.ReLU:
        return Op("relu", (x,))
    if kind in (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout):
        return Op("same", (x,))
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
    if result == shape:
        return Op("same", (x,))
    whole = shape is not None and result == (math.prod(shape),)
    return Op("flatten", (x,)) if whole and len(shape) in (1, 3) else None


def _pool(kind: Any, x: fx.Node, options: dict[str, Any]) -> Op | None:
    shape = shape_of(x)
    plain = (
        not options.get("return_indices")
        and options.get("count_include_pad", True)
        and options.get("divisor_override") is None
        and _pair(options.get("dilation", 1)) == (1, 1)
    )
    if not plain or shape is None or len(shape) != 3:
        return None
    kernel, padding = _pair(options["kernel_size"]), _pair(options.get("padding", 0))
    stride = options.get("stride")
    stride = kernel if stride in (None, ()) else _pair(stride)
    # ceil_mode makes no difference where the windows end with the map; the core rounds down.
    rests = [(n + 2 * p - k) % s for n, p, k, s in zip(shape[1:], padding, kernel, stride, strict=True)]
    if options.get("ceil_mode") and any(rests):
        return None
    return Op(kind, (x,), (kernel, stride, padding))


def _adaptive(node: fx.Node, x: fx.Node) -> Op | None:
    shape, result = shape_of(x), shape_of(node)
    if shape is None or result is None or len(shape) != 3 or len(result) != 3:
        return None
    return Op("adaptive", (x,), result[1:])


def _mean(node: fx.Node, x: fx.Node) -> Op | None:
    """Return a mean over height and width as an average pool."""
    bound, shape = _bind(node, ("dim", "keepdim"), dim=None, keepdim=False), shape_of(x)
    if bound is None or shape is None or len(shape) != 3 or bound["dim"] is None:
        return None
    dims = {d % 4 for d in ((bound["dim"],) if isinstance(bound["dim"], int) else bound["dim"])}
    return Op("adaptive", (x,), (1, 1)) if dims == {2, 3} else None


def _add(node: fx.Node, x: fx.Node) -> Op | None:
    if len(node.args) != 2 or node.kwargs or not isinstance(node.args[1], fx.Node):
        return None
    shapes = {shape_of(n) for n in node.args}
    return Op("add", tuple(node.args)) if len(shapes) == 1 and None not in shapes else None


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


def _function_op(node: fx.Node, name: str) -> Op | None:
    if name == "cat":
        return _concat(node)
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    x = node.args[0]
    if name == "relu":
        return Op("relu", (x,)) if not {k: v for k, v in node.kwargs.items() if k != "inplace"} else None
    if name == "dropout":
        bound = _bind(node, ("p", "training", "inplace"), p=0.5, training=True, inplace=False)
        return Op("same", (x,)) if bound and bound["training"] is False else None
    if name in ("flatten", "view", "reshape"):
        return _flatten(node, x)
    if name == "contiguous":
        return Op("same", (x,))
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


# Functions are matched by identity, not by name: a user may define another `relu`.
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
