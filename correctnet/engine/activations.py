"""Activations that the core computes, found in a traced network."""

from __future__ import annotations

import math

from torch import fx, nn

from correctnet.engine.trace import bind

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


def module_activation(module: nn.Module) -> Activation | None:
    """Return a module as an activation of the core; None for another."""
    kind = type(module)
    if kind in _PLAIN_MODULES:
        return _PLAIN[_PLAIN_MODULES[kind]]
    if kind is nn.Hardtanh:
        return _clamp(module.min_val, module.max_val)
    if kind is nn.LeakyReLU:
        return _leaky(module.negative_slope)
    return _gelu(module.approximate) if kind is nn.GELU else None


def function_activation(node: fx.Node, name: str) -> Activation | None:
    """Return the call of a function, one of `ACTIVATIONS`, as an activation; None where an argument is computed."""
    if name in _PLAIN:
        return _PLAIN[name] if bind(node, ("inplace",), inplace=False) else None
    if name == "hardtanh":
        bound = bind(node, ("min_val", "max_val", "inplace"), min_val=-1.0, max_val=1.0, inplace=False)
        return _clamp(bound["min_val"], bound["max_val"]) if bound else None
    if name == "clamp":
        bound = bind(node, ("min", "max"), min=None, max=None)
        numbers = bound and all(v is None or isinstance(v, int | float) for v in bound.values())
        return _clamp(bound["min"], bound["max"]) if numbers else None
    if name == "leaky_relu":
        bound = bind(node, ("negative_slope", "inplace"), negative_slope=0.01, inplace=False)
        return _leaky(bound["negative_slope"]) if bound else None
    if name == "gelu":
        bound = bind(node, ("approximate",), approximate="none")
        return _gelu(bound["approximate"]) if bound else None
    return None


ACTIVATIONS = (*_PLAIN, "hardtanh", "clamp", "leaky_relu", "gelu")
