"""Arithmetic of torch's products: the precision that is available, TF32, and a faster gradient of convolutions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

Precision = Literal["float32", "bfloat16"]

# With larger maps or fewer channels torch's own gradient of the weights is faster (AMD Zen 3, batch 128, 2 cores).
LARGEST_MAP = 8
FEWEST_CHANNELS = 128


@cache
def _has_bfloat16(device: str) -> bool:
    """Return whether torch has fast products in bfloat16 on a device type; every GPU is assumed to have them."""
    if device != "cpu":
        return True
    return hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported") and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@cache
def say_once(text: str) -> None:
    """Write a line for the user, above a progress bar if there is one, and only once in a process."""
    tqdm.write(text)


def available(precision: Precision, device: torch.device | str) -> Precision:
    """Return `precision`, or float32 with a note where the CPU has no instructions for bfloat16.

    Torch would emulate bfloat16 one number at a time there, many times slower than the more precise float32.
    """
    if precision == "bfloat16" and not _has_bfloat16(torch.device(device).type):
        say_once("note: this CPU has no instructions for bfloat16; torch's products are computed in float32 instead")
        return "float32"
    return precision


@contextmanager
def products(precision: Precision, device: torch.device | str) -> Iterator[None]:
    """Compute forward passes in the block, and their backward passes, in `available(precision, device)`.

    For bfloat16 this is autocast: parameters stay float32. In float32 on a CPU, `weight_gradient` computes the
    gradients of convolutions' weights where it is faster.
    """
    kind, precision = torch.device(device).type, available(precision, device)
    faster = kind == "cpu" and precision == "float32" and torch.is_grad_enabled()
    with (
        torch.autocast(kind, torch.bfloat16, enabled=precision == "bfloat16"),
        _Convolutions() if faster else nullcontext(),
    ):
        yield


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Disable TF32, whose products have ten bits and which cuDNN uses by default, for the length of a block."""
    if device.type != "cuda":
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [*_turn_tf32_off(matmul, matmul), *_turn_tf32_off(cudnn, getattr(cudnn, "conv", None))]
    try:
        yield
    finally:
        for where, name, value in reversed(before):
            setattr(where, name, value)


def _turn_tf32_off(old: Any, new: Any) -> list[tuple[Any, str, Any]]:
    """Disable TF32 and return what was changed: object, attribute and previous value.

    Torch has two generations of switches. Reading the old one raises where only the new one was set, and the old one
    does not override the new one's setting for all of torch.
    """
    before = []
    with suppress(RuntimeError):
        before.append((old, "allow_tf32", old.allow_tf32))
        old.allow_tf32 = False
    if getattr(new, "fp32_precision", None) == "tf32":
        before.append((new, "fp32_precision", "tf32"))
        new.fp32_precision = "ieee"
    return before


def weight_gradient(x: Tensor, gradient: Tensor, kernel: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """Return d loss / d W of y = x * W with stride 1, without dilation and groups.

        G[o, i, a, b] = sum over n, r, s of gradient[n, o, r, s] x[n, i, r + a - p, s + b - q],   padding (p, q)

    Computed as one matrix product for each (a, b), over the pixels inside the image only. In maps of 2 x 2 pixels 20 of
    the 36 terms of a 3 x 3 kernel lie outside, and oneDNN's kernels reach a tenth of a processor's peak.

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
    """Replaces F.conv2d where `weight_gradient` is faster."""

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
    """Compute F.conv2d, with the same signature."""
    if (
        weight.requires_grad
        and input.dtype == weight.dtype == torch.float32
        and input.dim() == 4
        and max(input.shape[2:]) <= LARGEST_MAP
        and min(weight.shape[:2]) >= FEWEST_CHANNELS
        and tuple(weight.shape[2:]) != (1, 1)  # torch computes this as a matrix product too
        and all(v in (1, (1, 1), [1, 1]) for v in (stride, dilation))
        and groups == 1
        and (isinstance(padding, int) or len(padding) == 2)
    ):
        return _Convolution.apply(input, weight, bias, (padding,) * 2 if isinstance(padding, int) else tuple(padding))
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


class _Convolution(torch.autograd.Function):
    """F.conv2d with stride 1, no dilation and one group, whose weight gradient is `weight_gradient`."""

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
