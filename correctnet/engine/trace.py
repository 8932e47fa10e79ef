"""Trace of a network with torch.fx: a graph whose nodes carry the shapes of their values."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.fx.passes.shape_prop import _extract_tensor_metadata
from torch.utils._pytree import tree_map

from correctnet.crossbar.convert import programmed
from correctnet.crossbar.kinds import kind_of
from correctnet.crossbar.layers import AnalogModule, OnCrossbar, analog_layers, analog_names
from correctnet.datasets.inputs import Inputs, tensors_of
from correctnet.engine.expansion import expanded
from correctnet.errors import UserError, one_line
from correctnet.metrics import chosen
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

    def __init__(self, example: Tensor | Inputs):
        super().__init__(autowrap_modules=())  # math's functions take the numbers that sizes are
        self._recording = True
        self._values = [_Values(_repeated(example, n)) for n in (2, 3)]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        analog = isinstance(m, AnalogModule) and kind_of(m) is not None  # others only hold parameters on crossbars
        return analog or hooked(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if not self._recording:
            return forward(*args, **kwargs)
        found = NotImplemented if hooked(m) else expanded(self, m, self.path_of_module(m), args, kwargs)
        return super().call_module(m, forward, args, kwargs) if found is NotImplemented else found

    def path_of_module(self, mod: nn.Module) -> str:
        if mod not in self.submodule_paths:  # made by `expanded`
            self.submodule_paths = {module: name for name, module in self.root.named_modules()}
        return super().path_of_module(mod)

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

    def __index__(self) -> int:
        return self.tracer.known(self.node, operator.index)

    def __float__(self) -> float:
        return self.tracer.known(self.node, float)


class _Values:
    """Values of a graph that is being built, for some images."""

    def __init__(self, images: Tensor | Inputs):
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
                self._values[n] = argument(self._images) if n.op == "placeholder" else call(root, n, self._values)
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


def hooked(module: nn.Module) -> bool:
    """Return whether a module has forward hooks, which may do anything."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


@survives_reload
@dataclass(frozen=True)
class Traced:
    """A network as a graph whose nodes carry the shapes of their values.

    Attributes:
        root: the graph, over copies of the network's modules that share its tensors.
        input, output: the graph's first and last value. Several inputs are one tuple, whose parts are values. Of a
            network that returns several, the last is the one that `correctnet.metrics.main_output` chooses.
        unused: names of the analog layers that the graph does not use.
        prefix: of the names that the modules have in the graph.
    """

    root: fx.GraphModule
    input: fx.Node
    output: fx.Node
    unused: tuple[str, ...] = ()
    prefix: str = ""


def argument(images: Tensor | Inputs) -> Any:
    """Return the value of a graph's input: a copy of the images, which the network may change in place."""
    return images.clone() if isinstance(images, Tensor) else tuple(images.clone().tensors.values())


def _repeated(example: Tensor | Inputs, count: int) -> Tensor | Inputs:
    """Return `count` images, all the first of the example."""
    if isinstance(example, Tensor):
        return example[:1].expand(count, *example.shape[1:]).contiguous()
    return example.each(lambda tensor: tensor[:1].expand(count, *tensor.shape[1:]).contiguous())


def trace(model: nn.Module, example: Tensor | Inputs) -> Traced:
    """Trace a network with the shapes of `example`, (N >= 1, ...).

    Raises:
        Unsupported: the core can compute nothing of the network.
        UserError: no images.
    """
    if not core.status().built:
        raise Unsupported("the C++ core was not built")
    if len(example) == 0:
        raise UserError("engine: no images")
    inputs = [tensor for _, tensor in tensors_of(example)]
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers(), *inputs)}
    if len(devices) > 1:
        raise Unsupported(f"model and images are on several devices ({', '.join(sorted(map(str, devices)))})")
    (device,) = devices
    if device.type != "cpu" and not gpu.reaches(device):
        raise Unsupported(f"the model is on {device}, and {gpu.status().reason}")
    floats = [t for t in inputs if t.is_floating_point()]
    if any(tensor.dtype != torch.float32 for tensor in (*model.parameters(), *floats)):
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
        if isinstance(module, AnalogModule):
            shared |= {id(module.chip): module.chip}
            shared |= {id(own.variation): own.variation for own in module.crossbars()}
    return copy.deepcopy(model, shared).eval()


def _traced(model: nn.Module, example: Tensor | Inputs) -> Traced:
    # A root module is always traced through, which would lose the variation of an analog layer.
    wrapped = isinstance(model, AnalogModule) or hooked(model) or fx.Tracer().is_leaf_module(model, "")
    root = nn.Sequential(model) if wrapped else model
    layers, names = analog_layers(model), analog_names(model)  # before tracing, which adds parts of modules
    graph = _Tracer(example).trace(_of_one_value(root, example))
    nodes = list(graph.nodes)
    inputs = [n for n in nodes if n.op == "placeholder"]
    (last,) = (n for n in nodes if n.op == "output")
    if len(inputs) != 1 or not isinstance(last.args[0], fx.Node):
        raise Unsupported("it has more than one input or output")
    module = fx.GraphModule(root, graph)
    _keep_layers(module, root)
    with torch.no_grad():
        # Two images, since a batch of 1 could not be told from a feature dimension of 1.
        _Shapes(module).run(argument(_repeated(example, 2)))
    reached = {own.layer_index for node in graph.nodes for own in read_by(module, node).values()}
    unused = tuple(names[id(own)] for own in layers if own.layer_index not in reached)
    return Traced(module, inputs[0], last.args[0], unused, "0." if wrapped else "")


def _of_one_value(root: nn.Module, example: Tensor | Inputs) -> nn.Module:
    """Let a network be called with its first argument only, where others are optional, and return its main output.

    Of several inputs that argument is the tuple.
    """
    kind = type(root)
    first, *others = inspect.signature(root.forward).parameters.values()
    optional = all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in others)
    if isinstance(example, Inputs):
        places = example.arguments(root, range(len(example.tensors)))

        def outputs_of(self: nn.Module, x: Any) -> Any:
            args, kwargs = tree_map(lambda i: x[i], places)
            return kind.forward(self, *args, **kwargs)

    elif optional and first.kind in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD):
        outputs_of = kind.forward
    else:
        return root

    def forward(self: nn.Module, x: Any) -> Any:
        outputs = outputs_of(self, x)
        return outputs if isinstance(outputs, fx.Proxy) else chosen(outputs)

    root.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    return root


def _keep_layers(module: fx.GraphModule, root: nn.Module) -> None:
    """Put analog layers back where a graph reads their weights without calling them.

    GraphModule keeps only bare parameters there, which are nominal on every chip.
    """
    for node in module.graph.nodes:
        name = node.target.rpartition(".")[0] if node.op == "get_attr" else ""
        layer = root.get_submodule(name) if name else None
        if isinstance(layer, AnalogModule):
            parent, _, child = name.rpartition(".")
            module.get_submodule(parent)._modules[child] = layer


def read_by(root: nn.Module, node: fx.Node) -> dict[str, OnCrossbar]:
    """Return, by name within the module that a node calls, the weights on crossbars that it reads.

    For a node that reads a weight without calling its module, that weight under the parameter's name.
    """
    if node.op == "get_attr":
        owner, _, name = node.target.rpartition(".")
        module = root.get_submodule(owner)
        own = module.crossbar(name) if isinstance(module, AnalogModule) else None
        return {} if own is None else {name: own}
    if node.op != "call_module":
        return {}
    return {
        f"{name}.{own.parameter}" if name else own.parameter: own
        for name, module in root.get_submodule(node.target).named_modules()
        if isinstance(module, AnalogModule)
        for own in module.crossbars()
    }


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
        return next(iter(weights.values())) if weights else operator.attrgetter(node.target)(root)
    return node.target(*args, **kwargs)


def bind(node: fx.Node, names: Sequence[str], **defaults: Any) -> dict[str, Any] | None:
    """Return a function's arguments by name; None where one is unknown or is itself computed."""
    found = {**defaults, **dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
    if len(node.args) - 1 > len(names) or not set(found) <= set(names):
        return None
    if any(isinstance(v, fx.Node) and "size" not in v.meta for v in found.values()):
        return None
    found = {k: v.meta["size"] if isinstance(v, fx.Node) else v for k, v in found.items()}
    return None if any(found[k] is None and k not in defaults for k in found) else found
