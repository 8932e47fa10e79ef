"""Attention, found in a traced network, as an operation of a plan."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from correctnet.engine.expansion import Windows
from correctnet.engine.op import Op, constant, known, moved, only_moves
from correctnet.engine.trace import shape_of


def window_heads(root: nn.Module, node: fx.Node) -> Op | None:
    """Return a call of `window_attention` as an operation of a plan."""
    x, added, heads, *how = node.args
    shape, bias = shape_of(x), constant(root, added)
    channels = shape[-1] // 3
    if bias is None or channels // heads % 2:
        return None
    windows = Windows.of(shape[:2], how[:2], how[2:])
    detail = {
        "heads": heads,
        "width": channels // heads,
        "first": (0, channels, 2 * channels),
        "scale": (channels // heads) ** -0.5,
        "tokens": windows.tokens.flatten().tolist(),
        "length": windows.tokens.shape[1],
        "bias": bias.detach().float().cpu().numpy(),
        "mask": None if windows.mask is None else windows.mask.numpy(),
    }
    return Op("attention", (x, x, x), detail, last=True)


def _chain(node: fx.Node) -> list[fx.Node]:
    """Return the steps that only move numbers and end with a node, last first, and the value whose numbers they are."""
    chain = [node]
    while only_moves(chain[-1]) and chain[-1].args and isinstance(chain[-1].args[0], fx.Node):
        chain.append(chain[-1].args[0])
    return chain


def _order(root: nn.Module, chain: list[fx.Node]) -> Tensor | None:
    """Return which numbers, by their places, the first node of a `_chain` shows; None where more than sizes decide."""
    *steps, source = chain
    meta = source.meta.get("tensor_meta")
    if not hasattr(meta, "shape") or len(meta.shape) < 2 or meta.shape[0] != 2:
        return None
    values: dict[fx.Node, Any] = {source: torch.arange(math.prod(meta.shape)).view(meta.shape)}
    return values[chain[0]] if moved(root, steps[::-1], values) else None


def unmoved(root: nn.Module, node: fx.Node) -> Op | None:
    """Return a value that moves brought back to where it was, such as one whose tokens were first, as the same."""
    chain = _chain(node)
    numbers = _order(root, chain) if len(chain) > 1 and shape_of(chain[-1]) == shape_of(node) else None
    same = numbers is not None and torch.equal(numbers.flatten(), torch.arange(numbers.numel()))
    return Op("same", (chain[-1],), last=None) if same else None


@dataclass(frozen=True)
class _Product:
    """softmax(scale q k' + added) v of values (N, heads, T, D), or (N, T, D).

    Attributes:
        q, k, v: the values.
        scale: the number.
        added: what is added to the scores on every image, (heads, T, T) or (1, T, T); None: nothing.
        turned: whether k is (N, heads, D, T).
    """

    q: Any
    k: Any
    v: Any
    scale: float
    added: Tensor | None = None
    turned: bool = False


def _product(root: nn.Module, node: fx.Node) -> _Product | None:
    """Return what a node computes as an attention; None where it is none."""
    if node.target is F.scaled_dot_product_attention:
        return _called(root, node)
    return _written(root, node) if _name(node) == "matmul" else None


def _called(root: nn.Module, node: fx.Node) -> _Product | None:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    (*_, tokens, width), mask = node.meta["tensor_meta"].shape, given.pop("attn_mask", None)
    q, k, v = (given.pop(name, None) for name in names[:3])
    if any(isinstance(value, fx.Node) for value in given.values()):
        return None
    if given.get("dropout_p") or given.get("enable_gqa"):
        return None
    added = None
    if mask is not None and (added := _mask(root, mask)) is None:
        return None
    if given.get("is_causal"):
        added = torch.full((1, tokens, tokens), -math.inf).triu(1)
    scale = width**-0.5 if given.get("scale") is None else float(given["scale"])
    return _Product(q, k, v, scale, added)


def _mask(root: nn.Module, node: Any) -> Tensor | None:
    """Return what a parameter or buffer (T, T), (heads, T, T) or (1, heads, T, T) adds to scores, three dimensions.

    Of booleans, minus infinity where they are false, as for F.scaled_dot_product_attention.
    """
    mask = known(root, node)
    if mask is None or mask.dim() < 2 or tuple(mask.shape[:-3]) not in ((), (1,)):
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    return mask.reshape(-1, *mask.shape[-2:]) if mask.dtype == torch.float32 else None


_NAMES = {
    **dict.fromkeys((operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm", "__matmul__"), "matmul"),
    **dict.fromkeys((torch.softmax, F.softmax, "softmax"), "softmax"),
    **dict.fromkeys((operator.mul, torch.mul, "mul"), "mul"),
    **dict.fromkeys((operator.truediv, torch.div, "div"), "div"),
    **dict.fromkeys((operator.add, torch.add, "add"), "add"),
    **dict.fromkeys((torch.masked_fill, "masked_fill"), "masked_fill"),
    **dict.fromkeys((F.dropout,), "dropout"),
}


def _name(node: Any) -> str | None:
    known = isinstance(node, fx.Node) and node.op in ("call_function", "call_method")
    return _NAMES.get(node.target) if known else None


def _numbered(node: Any) -> tuple[Any, float]:
    """Return a value and the number that a node multiplies it with; the node itself and 1 where it does not."""
    factor = 1.0
    while _name(node) in ("mul", "div") and len(node.args) == 2:
        x, number = node.args
        if _name(node) == "mul" and isinstance(x, int | float):
            x, number = number, x
        if not isinstance(number, int | float) or number == 0:
            break
        factor, node = factor * (number if _name(node) == "mul" else 1 / number), x
    return node, factor


def _written(root: nn.Module, node: fx.Node) -> _Product | None:
    """Return an attention that is written as softmax(q @ k') @ v."""
    weights, v = node.args if len(node.args) == 2 else (None, None)
    while _dropped(root, weights):
        weights = weights.args[0]
    if not _softmax(root, weights):
        return None
    scores, added = _masked(root, weights.args[0])
    scores, scale = _numbered(scores)
    if _name(scores) != "matmul" or len(scores.args) != 2:
        return None
    (q, by_q), (k, by_k) = map(_numbered, scores.args)
    return _Product(q, k, v, scale * by_q * by_k, added, turned=True)


def _masked(root: nn.Module, node: Any) -> tuple[Any, Tensor | None]:
    """Return scores without what is added to them on every image, and that; the node itself where nothing is."""
    if _name(node) == "add" and len(node.args) == 2:
        for x, mask in (node.args, node.args[::-1]):
            if (added := _mask(root, mask)) is not None:
                return x, added
    if _name(node) == "masked_fill" and len(node.args) == 3:
        x, mask, value = node.args
        hidden = known(root, mask)
        # A number as large as that is minus infinity for a softmax, unless all are hidden.
        if hidden is not None and hidden.dtype == torch.bool and isinstance(value, float) and value <= -1e8:
            added = _mask(root, mask)
            if added is not None and not hidden.all(-1).any():
                return x, torch.zeros(added.shape).masked_fill(added == 0, -math.inf)
    return node, None


def _dropped(root: nn.Module, node: Any) -> bool:
    """Return whether a node is a dropout, which does nothing in evaluation mode."""
    if isinstance(node, fx.Node) and node.op == "call_module":
        return type(root.get_submodule(node.target)) is nn.Dropout
    training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True) if _name(node) else True
    return _name(node) == "dropout" and training is False


def _softmax(root: nn.Module, node: Any) -> bool:
    """Return whether a node is a softmax over its last dimension."""
    if not isinstance(node, fx.Node) or not hasattr(node.meta.get("tensor_meta"), "shape"):
        return False
    last = (-1, len(node.meta["tensor_meta"].shape) - 1)
    if node.op == "call_module":
        module = root.get_submodule(node.target)
        return type(module) is nn.Softmax and module.dim in last and len(node.args) == 1
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    return _name(node) == "softmax" and dim in last and node.kwargs.get("dtype") is None and len(node.args) <= 2


def _heads(root: nn.Module, node: Any, turned: bool = False) -> tuple[fx.Node, int, int, int] | None:
    """Return (source, first channel, heads, channels a head) of a value (N, heads, T, D) of tokens (N, T, C).

    Of (N, heads, D, T) where it is `turned`. A value with three dimensions has one head.
    """
    chain = _chain(node) if isinstance(node, fx.Node) else []
    source, numbers = (chain[-1], _order(root, chain)) if chain else (None, None)
    shape = None if numbers is None else shape_of(source)
    if shape is None or len(shape) not in (2, 3) or numbers.dim() not in (3, 4) or numbers.shape[0] != 2:
        return None
    numbers = numbers if numbers.dim() == 4 else numbers[:, None]
    numbers = numbers.mT if turned else numbers
    _, heads, tokens, width = numbers.shape
    channels, first = shape[-1], int(numbers[0, 0, 0, 0])
    if tokens * channels != math.prod(shape) or first + heads * width > channels:
        return None
    axes = (torch.arange(n) * step for n, step in ((heads, width), (tokens, channels), (width, 1)))
    head, token, channel = axes
    place = first + head[:, None, None] + token[:, None] + channel
    image = torch.arange(2).view(2, 1, 1, 1) * math.prod(shape)
    return (source, first, heads, width) if torch.equal(numbers, place + image) else None


def heads_of(root: nn.Module, node: fx.Node) -> Op | None:
    """Return an attention (N, T, C) of tokens as an operation: `node` puts the heads' results side by side.

    It is a call of F.scaled_dot_product_attention on (N, heads, T, D), or softmax(q @ k') @ v, each of whose arguments
    is a number of channels of tokens (N, T, ...), however these are put into that order.
    """
    chain = _chain(node)
    inner = chain[-1]
    shape, result = shape_of(inner), shape_of(node)
    if shape is None or len(shape) not in (2, 3) or result is None or len(result) != 2:
        return None
    product = _product(root, inner)
    numbers = None if product is None else _order(root, chain)
    if numbers is None:
        return None
    heads, tokens, width = shape if len(shape) == 3 else (1, *shape)
    wanted = torch.arange(2 * math.prod(shape)).view(2, heads, tokens, width).transpose(1, 2).flatten(2)
    parts = [_heads(root, product.q), _heads(root, product.k, product.turned), _heads(root, product.v)]
    if not torch.equal(numbers, wanted) or None in parts or width % 2 or any(p[1] % 2 for p in parts):
        return None
    if any(p[2:] != (heads, width) or math.prod(shape_of(p[0])[:-1]) != tokens for p in parts):
        return None
    if product.added is not None and len(product.added) not in (1, heads):
        return None
    detail = {
        "heads": heads,
        "width": width,
        "first": tuple(p[1] for p in parts),
        "scale": product.scale,
        "tokens": list(range(tokens)),
        "length": tokens,
    }
    if product.added is not None:
        alike = len(product.added) == 1
        added = product.added.expand(1 if alike else heads, tokens, tokens)
        detail["mask" if alike else "bias"] = added.contiguous().numpy()
    return Op("attention", tuple(p[0] for p in parts), detail, last=True)
