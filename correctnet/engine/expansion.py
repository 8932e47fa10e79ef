"""torch's modules with attention, traced as the layers and operations that they compute with.

In torch they are one operation each, which reads the weights of several layers. Traced as here, their layers are single
steps, and what is between those is an attention (`correctnet.engine.attention`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from correctnet.crossbar.kinds import Crossbar, plain_type
from correctnet.crossbar.layers import AnalogModule, OnCrossbar
from correctnet.crossbar.modules import AnalogAttention, make_analog


def expanded(tracer: fx.Tracer, module: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what a module computes from traced values in evaluation mode, by the layers that it consists of.

    Returns NotImplemented for other modules, and where masks or options ask for more than self-attention of a batch.

    Args:
        tracer: that which traces the network.
        module: of the network, which may be changed.
        name: the module's name in the network.
        args, kwargs: of its forward.
    """
    kind = plain_type(module)
    if not any(isinstance(m, AnalogModule) for m in module.modules()):
        return NotImplemented  # the same on all chips
    if isinstance(module, AnalogAttention) and kind is nn.MultiheadAttention:
        return _attention(module, name, args, kwargs)
    if kind in (nn.TransformerEncoderLayer, nn.TransformerEncoder):
        return _encoder(module, args, kwargs)
    x, *others = (*args, *kwargs.values())
    if others:
        return NotImplemented
    swin = sys.modules.get("torchvision.models.swin_transformer")
    if swin is None:
        return NotImplemented
    if kind is swin.ShiftedWindowAttention:
        return _shifted(tracer, module, name, x)
    if kind is swin.PatchMerging:
        return module.reduction(module.norm(_merged(x)))
    if kind is swin.PatchMergingV2:
        return module.norm(module.reduction(_merged(x)))
    return NotImplemented


def _encoder(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    single = isinstance(module, nn.TransformerEncoderLayer)
    name = "src_mask" if single else "mask"
    values = dict(zip(("src", name, "src_key_padding_mask", "is_causal"), args, strict=False)) | kwargs
    x, mask = values.get("src"), values.get(name)
    if values.get("src_key_padding_mask") is not None or (mask is None and values.get("is_causal")):
        return NotImplemented
    if int(x.dim()) != 3:
        return NotImplemented
    if single:
        return _encoder_layer(module, x, mask)
    for layer in module.layers:
        x = layer(x, src_mask=mask)
    return x if module.norm is None else module.norm(x)


def _encoder_layer(layer: nn.TransformerEncoderLayer, x: Any, mask: Any) -> Any:
    first = layer.self_attn.batch_first
    if not first:  # (T, N, C); plans know the batch where it is first
        x = x.transpose(0, 1)

    def attend(x: Any) -> Any:
        x = x if first else x.transpose(0, 1)
        y = layer.self_attn(x, x, x, attn_mask=mask, need_weights=False)[0]
        return y if first else y.transpose(0, 1)

    def feed(x: Any) -> Any:
        return layer.linear2(layer.activation(layer.linear1(x)))

    if layer.norm_first:
        x = x + attend(layer.norm1(x))
        x = x + feed(layer.norm2(x))
    else:
        x = layer.norm1(x + attend(x))
        x = layer.norm2(x + feed(x))
    return x if first else x.transpose(0, 1)


def _attention(module: AnalogAttention, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = (
        "query",
        "key",
        "value",
        "key_padding_mask",
        "need_weights",
        "attn_mask",
        "average_attn_weights",
        "is_causal",
    )
    values = dict(zip(names, args, strict=False)) | kwargs
    query, mask = values.get("query"), values.get("attn_mask")
    # Buffers are read while the network is traced: a mask that is computed is none of them.
    masked = values.get("key_padding_mask") is not None or (mask is None and values.get("is_causal"))
    masked = masked or not (mask is None or (isinstance(mask, Tensor) and mask.dim() == 2))
    itself = query is values.get("key") and query is values.get("value")
    if (
        masked
        or not itself
        or module._parameters.get("in_proj_weight") is None
        or module._parameters.get("bias_k") is not None
        or module.add_zero_attn
        or "weight" not in module.out_proj._parameters
        or int(query.dim()) != 3
    ):
        return NotImplemented
    if "in_proj" not in module._modules:
        first, last = module.crossbar("in_proj_weight"), module.out_proj
        module.in_proj = _linear(module, "in_proj_weight", "in_proj_bias", first, f"{name}.in_proj_weight")
        own = last if isinstance(last, OnCrossbar) else None
        module.out_proj = _linear(last, "weight", "bias", own, f"{name}.out_proj")
    if mask is not None and mask.dtype == torch.bool:  # true where there is no attention
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(mask, -math.inf)
    if not module.batch_first:
        query = query.transpose(0, 1)
    projected = module.in_proj(query).unflatten(-1, (3, module.num_heads, module.head_dim)).permute(2, 0, 3, 1, 4)
    queries, keys, products = projected[0], projected[1], projected[2]
    summed = F.scaled_dot_product_attention(queries, keys, products, attn_mask=mask)
    output = module.out_proj(summed.transpose(1, 2).flatten(2))
    output = output if module.batch_first else output.transpose(0, 1)
    if not values.get("need_weights", True):
        return output, None
    scores = queries @ keys.transpose(-2, -1) / module.head_dim**0.5
    weights = (scores if mask is None else scores + mask).softmax(-1)
    return output, weights.mean(1) if values.get("average_attn_weights", True) else weights


def _linear(owner: nn.Module, weight: str, bias: str, own: OnCrossbar | None, name: str) -> nn.Linear:
    """Return a linear layer with parameters of a module, and their crossbar, that reports call `name`."""
    layer = nn.Linear(1, 1)
    # Not by their attributes, which are traced.
    layer._parameters.update(weight=owner._parameters[weight], bias=owner._parameters.get(bias))
    layer.out_features, layer.in_features = owner._parameters[weight].shape
    if own is not None:
        make_analog(layer, [Crossbar(name, layer, "weight", own.layer_index)], own.variation, own.chip, layer)
        layer.known_as = name
    return layer.eval()


def _merged(x: Any) -> Any:
    """Return maps (N, H, W, C) with the channels of 2 x 2 pixels in one, (N, H / 2, W / 2, 4 C), as in Swin."""
    height, width = int(x.shape[1]), int(x.shape[2])
    if height % 2 or width % 2:
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
    return torch.cat([x[..., i::2, j::2, :] for j in (0, 1) for i in (0, 1)], -1)


def _shifted(tracer: fx.Tracer, module: nn.Module, name: str, x: Any) -> Any:
    """Return torchvision's shifted-window attention of maps (N, H, W, C)."""
    if any(type(m) is not nn.Linear and plain_type(m) is not nn.Linear for m in (module.qkv, module.proj)):
        return NotImplemented
    size, window = (int(x.shape[1]), int(x.shape[2])), module.window_size
    padded = tuple(-(-n // w) * w for n, w in zip(size, window, strict=True))
    if padded != size:
        x = F.pad(x, (0, 0, 0, padded[1] - size[1], 0, padded[0] - size[0]))
    shift = [0 if w >= n else s for s, w, n in zip(module.shift_size, window, padded, strict=True)]
    parameters = module._parameters, module._buffers  # not by attributes, which are traced
    table, index = parameters[0]["relative_position_bias_table"], parameters[1]["relative_position_index"]
    tokens = window[0] * window[1]
    bias = table.detach()[index].view(tokens, tokens, -1).permute(2, 0, 1).contiguous()
    module.register_buffer("added_to_scores", bias)
    added = tracer.create_proxy("get_attr", f"{name}.added_to_scores", (), {})
    how = (module.num_heads, *window, *shift)
    y = tracer.create_proxy("call_function", window_attention, (module.qkv(x), added, *how), {})
    y = module.proj(y)
    return y if padded == size else y[:, : size[0], : size[1], :]


@dataclass(frozen=True)
class Windows:
    """The windows of a map, moved by `shift`, as in Swin.

    Attributes:
        tokens: the pixels (i * W + j) of each window, (windows, tokens a window).
        mask: what is added to the scores, (windows, tokens, tokens): -100 where two pixels are neighbours only because
            the map was moved; None where it was not.
    """

    tokens: Tensor
    mask: Tensor | None

    @staticmethod
    def of(size: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> Windows:
        """Return the windows (h, w) of a map (H, W), which they divide."""

        def parts(grid: Tensor) -> Tensor:
            (h, w), (height, width) = window, grid.shape
            return grid.view(height // h, h, width // w, w).transpose(1, 2).reshape(-1, h * w)

        tokens = torch.arange(math.prod(size)).view(*size).roll([-s for s in shift], (0, 1))
        if not any(shift):
            return Windows(parts(tokens), None)
        # Of each row and column of the moved map: 0, or 1 in the last window, or 2 where it came from the other side.
        rows, cols = (
            (torch.arange(n) >= n - w).long() + (torch.arange(n) >= n - s).long()
            for n, w, s in zip(size, window, shift, strict=True)
        )
        region = parts(3 * rows[:, None] + cols)
        return Windows(parts(tokens), -100.0 * (region[:, None] != region[:, :, None]))


def window_attention(x: Tensor, bias: Tensor, heads: int, *how: int) -> Tensor:
    """Return the attention of the tokens of each window with each other.

    Args:
        x: queries, keys and values of all heads, (N, H, W, 3 C).
        bias: what is added to the scores, (heads, tokens, tokens).
        heads: their number.
        how: the windows' height and width, and how far they are moved down and right.
    """
    windows = Windows.of(x.shape[1:3], how[:2], how[2:])
    tokens = windows.tokens.to(x.device)
    # (3, N, windows, heads, tokens, channels)
    q, k, v = x.flatten(1, 2)[:, tokens].unflatten(-1, (3, heads, -1)).permute(3, 0, 1, 4, 2, 5)
    added = bias if windows.mask is None else bias + windows.mask.to(x)[:, None]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=added).transpose(2, 3).flatten(3).flatten(1, 2)
    return y[:, tokens.flatten().argsort()].unflatten(1, x.shape[1:3])
