"""Attention, found in a traced network, as an operation of a plan."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from correctnet.engine.expansion import Windows
from correctnet.engine.op import Op, constant
from correctnet.engine.trace import call, shape_of


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


# Operations that only move numbers, by their names as methods of tensors.
_MOVES = {
    *("view", "reshape", "permute", "transpose", "swapaxes", "contiguous", "flatten", "unflatten"),
    *("chunk", "split", "unbind", "squeeze", "unsqueeze", "movedim"),
}


def _moves(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _MOVES
    target = node.target
    return node.op == "call_function" and (
        (target.__name__ == "getitem" and getattr(target, "__module__", "") == "_operator")
        or any(target is getattr(torch, name, None) for name in _MOVES)
    )


def _chain(node: fx.Node) -> list[fx.Node]:
    """Return the steps that only move numbers and end with a node, last first, and the value whose numbers they are."""
    chain = [node]
    while _moves(chain[-1]) and chain[-1].args and isinstance(chain[-1].args[0], fx.Node):
        chain.append(chain[-1].args[0])
    return chain


def _order(root: nn.Module, chain: list[fx.Node]) -> Tensor | None:
    """Return which numbers, by their places, the first node of a `_chain` shows; None where more than sizes decide."""
    *steps, source = chain
    meta = source.meta.get("tensor_meta")
    if not hasattr(meta, "shape") or len(meta.shape) < 2 or meta.shape[0] != 2:
        return None
    values: dict[fx.Node, Any] = {source: torch.arange(math.prod(meta.shape)).view(meta.shape)}
    for step in reversed(steps):
        for n in step.all_input_nodes:
            if n not in values and "size" not in n.meta:
                return None
            values.setdefault(n, n.meta.get("size"))
        try:
            values[step] = call(root, step, values)
        except RuntimeError:  # a view of numbers that are not adjacent
            return None
    return values[chain[0]]


def _heads(root: nn.Module, node: Any) -> tuple[fx.Node, int, int, int] | None:
    """Return (source, first channel, heads, channels a head) of a value (N, heads, T, D) of tokens (N, T, C)."""
    chain = _chain(node) if isinstance(node, fx.Node) else []
    source, numbers = (chain[-1], _order(root, chain)) if chain else (None, None)
    shape = None if numbers is None else shape_of(source)
    if shape is None or len(shape) not in (2, 3) or numbers.dim() != 4 or numbers.shape[0] != 2:
        return None
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

    It is a call of F.scaled_dot_product_attention on (N, heads, T, D), each of whose arguments is a number of channels
    of tokens (N, T, ...), however these are put into that order.
    """
    chain = _chain(node)
    inner = chain[-1]
    if inner.target is not F.scaled_dot_product_attention:
        return None
    shape, numbers = shape_of(inner), _order(root, chain)
    if shape is None or len(shape) != 3 or numbers is None:
        return None
    heads, tokens, width = shape
    wanted = torch.arange(2 * math.prod(shape)).view(2, *shape).transpose(1, 2).flatten(2)
    names = ("key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = dict(zip(names, inner.args[1:], strict=False)) | dict(inner.kwargs)
    values = [inner.args[0], given.pop("key", None), given.pop("value", None)] if inner.args else [None]
    parts = [_heads(root, value) for value in values]
    if not torch.equal(numbers, wanted) or None in parts or width % 2 or any(p[1] % 2 for p in parts):
        return None
    if any(p[2:] != (heads, width) or math.prod(shape_of(p[0])[:-1]) != tokens for p in parts):
        return None
    bias = None
    if given.get("attn_mask") is not None:
        added = constant(root, given.pop("attn_mask"))
        if added is None or added.dim() < 2 or tuple(added.shape[:-3]) not in ((), (1,)):
            return None
        bias = added.detach().cpu().reshape(-1, *added.shape[-2:]).expand(heads, tokens, tokens).numpy()
    if any(isinstance(v, fx.Node) for v in given.values()) or given.get("dropout_p") or given.get("enable_gqa"):
        return None
    if given.get("is_causal"):
        bias = np.broadcast_to(np.triu(np.full((tokens, tokens), -np.inf, np.float32), 1), (heads, tokens, tokens))
    detail = {
        "heads": heads,
        "width": width,
        "first": tuple(p[1] for p in parts),
        "scale": width**-0.5 if given.get("scale") is None else float(given["scale"]),
        "tokens": list(range(tokens)),
        "length": tokens,
        "bias": bias,
    }
    return Op("attention", tuple(p[0] for p in parts), detail, last=True)
