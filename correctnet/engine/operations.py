"""Nodes of a traced network as operations that a plan of the C++ core can express."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from correctnet.crossbar.kinds import derives, plain_type
from correctnet.crossbar.layers import AnalogModule, trained_weight
from correctnet.devices.base import drawn_by_kernels
from correctnet.engine.activations import ACTIVATIONS, function_activation, module_activation
from correctnet.engine.attention import heads_of, unmoved, window_heads
from correctnet.engine.expansion import window_attention
from correctnet.engine.moves import PADS, UPSAMPLINGS, Moves, of_function, of_module, of_padding
from correctnet.engine.op import Op, constant, only_moves
from correctnet.engine.pieces import joined, part_of, reshaped, shifted
from correctnet.engine.trace import bind, changed_by, hooked, shape_of


def layer_of(op: Op) -> nn.Module | None:
    """Return the layer whose weights an operation multiplies with; None for other operations."""
    return {"conv": lambda: op.detail[0], "linear": lambda: op.detail}.get(op.kind, lambda: None)()


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
    if op is None and only_moves(node):
        op = heads_of(root, node) or unmoved(root, node)
    if changed_by(root, node):
        return None  # other steps may rely on the change
    return op if op and all(shape_of(n) for n in op.inputs) else None


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def in_row(value: Any, above: int = 1) -> tuple[int, int]:
    """Return a number of an operation of one dimension as those of one on a row, with `above` for the height."""
    return (above, value if isinstance(value, int) else value[0])


LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


def layer_type(module: nn.Module) -> type[nn.Module] | None:
    """Return which of `LAYERS` a module is, also where its weight is derived from others; None for other modules.

    Derived by a parametrization, pruning, weight_norm or spectral_norm. Other hooks and subclasses may do anything.
    """
    kind = plain_type(module)
    if parametrize.is_parametrized(module):
        kind = kind.__bases__[0]
    known = not module._forward_hooks and all(derives(module, hook) for hook in module._forward_pre_hooks.values())
    return kind if kind in LAYERS and known else None


def _module_op(node: fx.Node, module: nn.Module) -> Op | None:
    if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
        return None
    x, kind, layer = node.args[0], type(module), layer_type(module)
    shape = shape_of(x)
    if layer is not None:
        return _layer(x, module, layer)
    if hooked(module):
        return None
    if kind is nn.LayerNorm:
        return _layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)
    if kind is nn.GroupNorm:
        return _group_norm(x, module.num_groups, module.weight, module.bias, module.eps)
    if kind in (nn.InstanceNorm1d, nn.InstanceNorm2d) and module.running_mean is None:
        if len(shape) != (3 if kind is nn.InstanceNorm2d else 2):
            return None
        return _group_norm(x, module.num_features, module.weight, module.bias, module.eps)
    if kind in (nn.BatchNorm1d, nn.BatchNorm2d):
        usable = module.running_mean is not None and len(shape) in ((3,) if kind is nn.BatchNorm2d else (1, 2))
        return Op("affine", (x,), _batchnorm(module)) if usable else None
    if activation := module_activation(module):
        return Op("activation", (x,), activation, last=None)
    if kind is nn.ChannelShuffle and len(shape) == 3:
        return _shuffle(x, module.groups)
    if kind in (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout):
        return Op("same", (x,), last=None)
    if kind is nn.Flatten:
        return _flatten(node, x)
    if kind in (*PADS, *UPSAMPLINGS):
        return _pixels(x, of_module(module, shape)) if len(shape) == 3 else None
    if kind in (nn.MaxPool1d, nn.MaxPool2d):
        return _pool("max_pool", x, vars(module))
    if kind in (nn.AvgPool1d, nn.AvgPool2d):
        return _pool("average_pool", x, vars(module))
    if kind in (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d):
        return _adaptive(node, x)
    return None


def _layer(x: fx.Node, module: nn.Module, kind: type[nn.Module]) -> Op | None:
    """Return a layer, one of `LAYERS`."""
    rank = len(shape_of(x))
    analog = isinstance(module, AnalogModule)
    own = module.crossbar("weight") if analog else None
    # A module with weights of another kind on crossbars, such as a bias, is not a layer of a plan.
    if (own is not None and not drawn_by_kernels(own.variation)) or (analog and module.crossbars() != [own]):
        return None
    if trained_weight(module).numel() == 0:
        return None
    if kind is nn.Linear:
        return Op("linear", (x,), module, last=rank > 1) if rank <= 3 else None
    return _conv(x, module) if rank == {nn.Conv1d: 2, nn.Conv2d: 3}[kind] else None


def _conv(x: fx.Node, conv: nn.Conv1d | nn.Conv2d) -> Op | None:
    """Return a convolution with (layer, zeros on each side, moves of the pixels before it or None)."""
    left, right, top, bottom = (*conv._reversed_padding_repeated_twice, 0, 0)[:4]
    if conv.padding_mode == "zeros" and left == right and top == bottom:
        return Op("conv", (x,), (conv, (top, left), None))
    moved = of_padding(conv, shape_of(x))
    return Op("conv", (x,), (conv, (0, 0), moved)) if moved else None


def _pixels(x: fx.Node, moved: Moves | None) -> Op | None:
    return Op("pixels", (x,), moved) if moved else None


def _resized(node: fx.Node, x: fx.Node, name: str) -> Op | None:
    """Return a padding or an upsampling of maps, (N, C, H, W), or a padding of (N, H, W, C) by zeros."""
    shape = shape_of(x)
    if shape is None or len(shape) != 3:
        return None
    sides = node.args[1] if name == "pad" and len(node.args) == 2 else ()
    zeros = node.kwargs.get("mode", "constant") == "constant" and not node.kwargs.get("value")
    if len(sides) != 6 or any(sides[:2]) or not zeros:
        return _pixels(x, of_function(node, shape))
    _, _, left, right, top, bottom = sides
    if not all(isinstance(n, int) and n >= 0 for n in sides):
        return None
    rows, cols = ((*(-1,) * a, *range(n), *(-1,) * b) for a, n, b in ((top, shape[0], bottom), (left, shape[1], right)))
    return Op("pixels", (x,), (rows, cols), last=True)


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
    if shape is not None and len(shape) > 1 and result == shape[-1:]:
        return Op("same", (x,), last=True)  # one token or pixel
    if shape is None or len(result) > 1:
        return None if shape is None else reshaped(shape, node, x)
    return Op("flatten", (x,)) if result == (math.prod(shape),) and len(shape) <= 3 else None


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


def _pool(kind: Any, x: fx.Node, options: dict[str, Any]) -> Op | None:
    shape = shape_of(x)
    include_padding = bool(options.get("count_include_pad", True))
    plain = (
        not options.get("return_indices")
        and options.get("divisor_override") is None
        and options.get("dilation", 1) in (1, (1,), (1, 1))
    )
    if not plain or shape is None or len(shape) not in (2, 3):
        return None

    def pair(value: Any, above: int = 1) -> tuple[int, int]:
        return _pair(value) if len(shape) == 3 else in_row(value, above)

    kernel, padding = pair(options["kernel_size"]), pair(options.get("padding", 0), 0)
    stride = options.get("stride")
    stride = kernel if stride in (None, ()) else pair(stride)
    # ceil_mode makes no difference where the windows end with the map.
    size = shape[1:] if len(shape) == 3 else (1, shape[1])
    rests = [(n + 2 * p - k) % s for n, p, k, s in zip(size, padding, kernel, stride, strict=True)]
    ceil = bool(options.get("ceil_mode")) and any(rests)
    if kind == "average_pool" and include_padding and ceil:
        return None  # its last windows count a part of the padding
    return Op(kind, (x,), (kernel, stride, padding, ceil, include_padding))


def _adaptive(node: fx.Node, x: fx.Node) -> Op | None:
    shape, result = shape_of(x), shape_of(node)
    if shape is None or result is None or len(shape) not in (2, 3) or len(result) != len(shape):
        return None
    return Op("adaptive", (x,), (*(1,) * (3 - len(shape)), *result[1:]))


def _mean(node: fx.Node, x: fx.Node) -> Op | None:
    """Return a mean over height and width, or over tokens, as an average pool."""
    bound, shape = bind(node, ("dim", "keepdim"), dim=None, keepdim=False), shape_of(x)
    if bound is None or shape is None or bound["dim"] is None:
        return None
    rank = len(shape) + 1
    dims = {d % rank for d in ((bound["dim"],) if isinstance(bound["dim"], int) else bound["dim"])}
    if (rank, dims) in ((4, {2, 3}), (3, {2})):
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
    if shape is None or len(shape) > 3 or shape[0] % groups:
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
            found[name] = constant(root, found[name])
            if found[name] is None:
                return None
    if any(isinstance(v, fx.Node) for v in found.values()) or not isinstance(found["normalized_shape"], list | tuple):
        return None
    return _layer_norm(x, found["normalized_shape"], found["weight"], found["bias"], found["eps"])


def _permuted(node: fx.Node, x: fx.Node) -> Op | None:
    """Return a permutation that puts the channels last or first."""
    axes, shape = node.args[1:], shape_of(x)
    axes = tuple(axes[0]) if len(axes) == 1 and isinstance(axes[0], list | tuple) else axes
    if node.kwargs or not all(isinstance(a, int) for a in axes) or shape is None or len(shape) not in (2, 3):
        return None
    if len(shape) == 2:
        return Op("same", (x,), last=None, turns=True) if tuple(a % 3 for a in axes) == (0, 2, 1) else None
    last = {(0, 2, 3, 1): False, (0, 3, 1, 2): True}.get(tuple(a % 4 for a in axes))
    return None if last is None else Op("same", (x,), last=last, turns=True)


def _transposed(node: fx.Node, x: fx.Node) -> Op | None:
    """Return an exchange of tokens and channels."""
    shape = shape_of(x)
    exchanged = len(node.args) == 3 and not node.kwargs and all(isinstance(a, int) for a in node.args[1:])
    if not exchanged or shape is None or len(shape) != 2 or {a % 3 for a in node.args[1:]} != {1, 2}:
        return None
    return Op("same", (x,), last=None, turns=True)


def _scaled(root: nn.Module, node: fx.Node) -> Op | None:
    """Return the product of a value and a parameter with a number a channel."""
    if len(node.args) != 2 or node.kwargs:
        return None
    for x, other in (node.args, node.args[::-1]):
        parameter, shape = constant(root, other), shape_of(x) if isinstance(x, fx.Node) else None
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
    bound = bind(node, ("dim",), dim=0)
    parts = node.args[0] if node.args else None
    if bound is None or not isinstance(parts, (list, tuple)) or not parts:
        return None
    if not all(isinstance(p, fx.Node) and shape_of(p) for p in parts):
        return None
    ranks = {len(shape_of(p)) for p in parts}
    if len(ranks) != 1:
        return None
    (rank,) = ranks
    if rank <= 3 and bound["dim"] in (1, -rank):
        return Op("concat", tuple(parts))
    return Op("concat", tuple(parts), last=True) if rank in (2, 3) and bound["dim"] in (rank, -1) else None


def _function(target: Any) -> str | None:
    """Return the name under which `_function_op` knows a function."""
    torchvision = sys.modules.get("torchvision.ops.stochastic_depth")
    if torchvision is not None and target is torchvision.stochastic_depth:
        return "stochastic_depth"
    return _FUNCTIONS.get(target)


def _function_op(root: nn.Module, node: fx.Node, name: str) -> Op | None:
    if name == "cat":
        return joined(root, node) or _concat(node)
    if name in ("add", "sub", "mul", "div"):
        with_parameter = {"mul": _scaled, "add": shifted}.get(name, lambda root, node: None)
        return with_parameter(root, node) or _arithmetic(node, name)
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    x = node.args[0]
    if name in ACTIVATIONS:
        activation = function_activation(node, name)
        return Op("activation", (x,), activation, last=None) if activation else None
    if name == "getitem":
        return part_of(node)
    if name == "permute":
        return _permuted(node, x)
    if name == "transpose":
        return _transposed(node, x)
    if name == "matmul":
        return heads_of(root, node)
    if name == "window_attention":
        return window_heads(root, node)
    if name == "layer_norm":
        return _function_layer_norm(root, node, x)
    if name == "dropout":
        bound = bind(node, ("p", "training", "inplace"), p=0.5, training=True, inplace=False)
        return Op("same", (x,), last=None) if bound and bound["training"] is False else None
    if name == "stochastic_depth":
        bound = bind(node, ("p", "mode", "training"), training=True)
        return Op("same", (x,), last=None) if bound and bound["training"] is False else None
    if name in ("flatten", "unflatten", "view", "reshape"):
        return heads_of(root, node) or _flatten(node, x)
    if name in ("pad", "interpolate"):
        return _resized(node, x, name)
    if name == "contiguous":
        return Op("same", (x,), last=None)
    if name in ("max_pool1d", "max_pool2d"):
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        bound = bind(node, names, stride=None)
        return _pool("max_pool", x, bound) if bound else None
    if name in ("avg_pool1d", "avg_pool2d"):
        names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
        bound = bind(node, names, stride=None, divisor_override=None)
        return _pool("average_pool", x, bound) if bound else None
    if name in ("adaptive_avg_pool1d", "adaptive_avg_pool2d"):
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
        "transpose": (torch.transpose, torch.swapaxes),
        "matmul": (operator.matmul, torch.matmul, torch.bmm),
        "window_attention": (window_attention,),
        "layer_norm": (F.layer_norm,),
        "dropout": (F.dropout,),
        "pad": (F.pad,),
        "interpolate": (F.interpolate,),
        "flatten": (torch.flatten,),
        "unflatten": (torch.unflatten,),
        "reshape": (torch.reshape,),
        "max_pool2d": (F.max_pool2d, torch.max_pool2d),
        "avg_pool2d": (F.avg_pool2d,),
        "max_pool1d": (F.max_pool1d, torch.max_pool1d),
        "avg_pool1d": (F.avg_pool1d, torch.avg_pool1d),
        "adaptive_avg_pool1d": (F.adaptive_avg_pool1d, torch.adaptive_avg_pool1d),
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
_PLAIN_METHODS = "flatten unflatten view reshape contiguous mean permute transpose matmul"
_METHODS = {
    **{name: name for name in _PLAIN_METHODS.split()},
    "bmm": "matmul",
    **{
        name + end: name
        for name in ("relu", "sigmoid", "tanh", "clamp", "add", "sub", "mul", "div")
        for end in ("", "_")
    },
    "clip": "clamp",
    "clip_": "clamp",
}
