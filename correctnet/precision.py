"""The arithmetic of torch's products: which precision a CPU has, and a faster gradient of convolutions' weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

Precision = Literal["float32", "bfloat16"]

# With larger maps or fewer channels torch's own gradient of the weights was faster (AMD Zen 3, batch 128, 2 cores).
LARGEST_MAP = 8
FEWEST_CHANNELS = 128


@cache
def _has_bfloat16(device: str) -> bool:
    """Whether torch has fast products in bfloat16 there; a GPU is taken to have them."""
    if device != "cpu":
        return True
    return hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported") and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@cache
def _say_once(text: str) -> None:
    tqdm.write(text)


def available(precision: Precision, device: torch.device | str) -> Precision:
    """`precision`, or float32 where it is bfloat16 and the CPU lacks instructions for it (and a line says so, once).

    torch would emulate bfloat16 one number at a time there, many times slower than float32, which is the more precise.
    """
    if precision == "bfloat16" and not _has_bfloat16(torch.device(device).type):
        _say_once("note: this CPU has no instructions for bfloat16; torch's products are computed in float32 instead")
        return "float32"
    return precision


@contextmanager
def products(precision: Precision, device: torch.device | str) -> Iterator[None]:
    """Forward passes in here, and the backward passes of what they gave, multiply in `available(precision, device)`.

    bfloat16 is autocast: parameters stay float32. In float32 on a CPU, convolutions get the gradient of their weights
    from `weight_gradient` where that is faster.
    """
    kind, precision = torch.device(device).type, available(precision, device)
    faster = kind == "cpu" and precision == "float32" and torch.is_grad_enabled()
    with (
        torch.autocast(kind, torch.bfloat16, enabled=precision == "bfloat16"),
        _Convolutions() if faster else nullcontext(),
    ):
        yield


def weight_gradient(x: Tensor, gradient: Tensor, kernel: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """d loss / d W of y = x * W with stride 1, without dilation and groups.

        G[o, i, a, b] = sum over n, r, s of gradient[n, o, r, s] x[n, i, r + a - p, s + b - q],   padding (p, q)

    A product of matrices for each (a, b), of the pixels that are inside the image alone. In maps of 2 x 2 pixels 20 of
    the 36 terms of a 3 x 3 kernel lie outside, and oneDNN's kernels reach a tenth of a processor's rate there.

    Args:
        x: (N, in, H, W), channels_last for speed.
        gradient: d loss / d y, (N, out, H', W'), likewise.
        kernel, padding: (vertical, horizontal), pixels.

    Returns:
        (out, in, kh, kw), channels_last.
    """
    height, width, rows, columns = *x.shape[2:], *gradient.shape[2:]
    inputs, outputs = x.permute(0, 2, 3, 1), gradient.permute(0, 2, 3, 1)
    found = x.new_zeros(gradient.shape[1], *kernel, x.shape[1])
    for a in range(kernel[0]):
        up, down = a - padding[0], min(rows, height - a + padding[0])
        top = max(0, -up)
        for b in range(kernel[1]):
            left, end = b - padding[1], min(columns, width - b + padding[1])
            start = max(0, -left)
            if top < down and start < end:
                own = outputs[:, top:down, start:end].reshape(-1, gradient.shape[1])
                seen = inputs[:, top + up : down + up, start + left : end + left].reshape(-1, x.shape[1])
                torch.mm(own.t(), seen, out=found[:, a, b])
    return found.permute(0, 3, 1, 2)


class _Convolutions(TorchFunctionMode):
    """Takes the place of F.conv2d where `weight_gradient` is faster."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_conv2d if func is F.conv2d else func)(*args, **(kwargs or {}))


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """F.conv2d, with its arguments' names."""
    if (
        weight.requires_grad
        and input.dtype == weight.dtype == torch.float32
        and input.dim() == 4
        and max(input.shape[2:]) <= LARGEST_MAP
        and min(weight.shape[:2]) >= FEWEST_CHANNELS
        and tuple(weight.shape[2:]) != (1, 1)  # a product of matrices for torch, too
        and all(v in (1, (1, 1), [1, 1]) for v in (stride, dilation))
        and groups == 1
        and (isinstance(padding, int) or len(padding) == 2)
    ):
        return _Convolution.apply(input, weight, bias, (padding,) * 2 if isinstance(padding, int) else tuple(padding))
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


class _Convolution(torch.autograd.Function):
    """F.conv2d with stride 1, no dilation, one group; the gradient of its weights from `weight_gradient`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        return F.conv2d(x, weight, bias, padding=padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            geometry = [1, 1], list(ctx.padding), [1, 1], False, [0, 0], 1
            of_x = torch.ops.aten.convolution_backward(gradient, x, weight, None, *geometry, [True, False, False])[0]
        if ctx.needs_input_grad[1]:
            of_weight = weight_gradient(x, gradient, tuple(weight.shape[2:]), ctx.padding)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum((0, 2, 3))
        return of_x, of_weight, of_bias, None
