"""Linear and convolutional layers on several chip samples, as PyTorch operators.

y = noisy_linear(x, weight, bias, seed=0, layer=3, sigma=0.5, samples=range(8))       # (8, N, out)

The three operators `torch.ops.correctnet.noisy_weight`, `.noisy_linear` and `.noisy_conv2d` support autograd and
torch.compile. Seed and samples are tensors, so that other values do not recompile. The noise is a function of its
address (`correctnet.noise.specification`), so a backward pass draws it again instead of storing it.

Seed and samples on a GPU are not copied to the host: the operators can be captured in a CUDA graph and replayed with
other values. Products that torch computes (gradients with respect to weights, and everything where a gradient is
required) follow torch's settings: on a GPU, convolutions of float32 use TF32 unless
`torch.backends.cudnn.allow_tf32` is False.

On the CPU, in float32 and bfloat16, the C++ core computes the layers and draws a chip's weights while it packs them, so
that no noisy weight tensor is stored. In float64, and where the kernels are not available, the weights are drawn chip
by chip and torch multiplies; likewise in the functions below where a gradient is required.

Analog layers (`correctnet.crossbar.layers`) call the functions when several chips share a batch, see
`correctnet.program`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from correctnet.crossbar import kernels
from correctnet.crossbar.arguments import (
    Geometry,
    Noise,
    check_address,
    check_layer,
    check_noise,
    integer,
    noise_of,
    pair,
)
from correctnet.noise import core

_NOISE = "Tensor seed, Tensor samples, int layer, float sigma, float shift"
_LAYER = f"Tensor x, Tensor weight, Tensor? bias, {_NOISE}=0."
_GEOMETRY = "int[2] stride=1, int[2] padding=0, int[2] dilation=1, int groups=1"
_TAGS = torch.Tag.pt2_compliant_tag
_SCHEMAS = {
    "noisy_weight": f"(Tensor weight, {_NOISE}) -> Tensor",
    "noisy_linear": f"({_LAYER}) -> Tensor",
    "noisy_conv2d": f"({_LAYER}, {_GEOMETRY}) -> Tensor",
}


def noisy_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    seed: int | Tensor,
    layer: int,
    sigma: float,
    shift: float = 0.0,
    samples: Sequence[int] | Tensor = (0,),
) -> Tensor:
    """Apply a linear layer on the crossbars of several chip samples.

        y[s, n] = W_s x[n] + bias    or    W_s x[s, n] + bias,    W_s = weight * exp(sigma z_s + shift)

    z_s is standard normal, independent for every weight, and a function of (seed, layer, sample, element): (1) and (2)
    of the paper at shift 0. The bias is digital. Differentiable in x, weight and bias (reverse mode).

    Args:
        x: (N, in), shared by all chips, or (S, N, in), one batch a chip; float32, bfloat16 or float64. In bfloat16 a
            noisy weight is rounded once, sums are float32 and the result is rounded at the end. Autocast has no effect:
            the layer computes in the dtype of its arguments.
        weight: nominal weights, (out, in), in the dtype and on the device of x, any memory order.
        bias: (out,), likewise, or None.
        seed: 64-bit seed of the simulation; or its bits as a 0-d int64 tensor, which torch.compile does not specialise.
        layer: index of the layer's crossbar among those of the network, in [0, 2^32).
        sigma: standard deviation of the logarithm of a factor (no unit), finite, >= 0.
        shift: mean of that logarithm, finite; -sigma^2 / 2 keeps the mean weight nominal.
        samples: numbers of the S >= 1 chips, each in [0, 2^32); as a tensor (S,) int64.

    Returns:
        (S, N, out), the dtype of x.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a tensor is empty or its shape, dtype or device does not fit; a number is outside its range; or the
            factors could leave the range of float32. torch.compile raises a RuntimeError with the same message.
        UserError: see `correctnet.noise.core.status`.
    """
    noise = noise_of(seed, samples, layer, sigma, shift)
    return _noisy_layer(torch.ops.correctnet.noisy_linear, x, weight, bias, noise, None)


def noisy_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    seed: int | Tensor,
    layer: int,
    sigma: float,
    shift: float = 0.0,
    samples: Sequence[int] | Tensor = (0,),
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Apply a convolution on the crossbars of several chip samples.

        y[s, n] = W_s * x[n] + bias    or    W_s * x[s, n] + bias,    W_s = weight * exp(sigma z_s + shift)

    `*` before x is the cross-correlation of torch.nn.functional.conv2d with zeros as padding. Elements of z_s count in
    the order (out, kh, kw, in / groups). Otherwise as `noisy_linear`.

    Args:
        x: (N, C, H, W), shared by all chips, or (S, N, C, H, W), one batch a chip.
        weight: nominal weights, (O, C / groups, kh, kw), in the dtype and on the device of x, any memory order.
        bias: (O,), likewise, or None.
        seed, layer, sigma, shift, samples: see `noisy_linear`.
        stride, dilation: one number or (vertical, horizontal), >= 1, pixels.
        padding: likewise, >= 0, on each side.
        groups: a divisor of C and of O.

    Returns:
        (S, N, O, H', W') with H' = (H + 2 padding - dilation (kh - 1) - 1) div stride + 1, W' likewise; the dtype of x.

    Raises:
        TypeError, ValueError, UserError: see `noisy_linear`.
    """
    noise = noise_of(seed, samples, layer, sigma, shift)
    pairs = pair("stride", stride), pair("padding", padding), pair("dilation", dilation)
    geometry = Geometry(*pairs, integer("groups", groups))
    return _noisy_layer(torch.ops.correctnet.noisy_conv2d, x, weight, bias, noise, geometry)


def _noisy_layer(
    op: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, noise: Noise, geometry: Geometry | None
) -> Tensor:
    for name, value in (("x", x), ("weight", weight), ("bias", bias)):
        if not isinstance(value, Tensor) and not (name == "bias" and value is None):
            raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))):
        return op(x, weight, bias, *noise, *(geometry or ()))
    # For a backward pass the weights are drawn once and torch multiplies, although autograd then stores the noisy
    # weights of all chips: `op` would convert the layout of images twice and draw the weights again. A training step of
    # a convolution 128 -> 128 at 16 x 16 took 290 ms instead of 340 (one chip, batch 128, float32, one Zen 4 core).
    check_layer(x, weight, bias, noise.samples, geometry)
    return kernels.each_chip(x, torch.ops.correctnet.noisy_weight(weight, *noise), bias, geometry)


# ---- operators ------------------------------------------------------------------------------------------------------
#
# The dispatcher passes arguments by position and omits trailing defaults.


def _weights(weight: Tensor, *noise: Any) -> Tensor:
    """Return the weights of each chip, (S, *weight.shape)."""
    check_noise(weight, Noise(*noise))
    if kernels.kernels_draw(weight):
        return kernels.drawn_on_device(weight, Noise(*noise))
    return torch.stack(list(kernels.chip_weights(weight, Noise(*noise)))).contiguous()


def _fake_weights(weight: Tensor, *noise: Any) -> Tensor:
    check_noise(weight, Noise(*noise))
    return weight.new_empty([Noise(*noise).samples.shape[0], *weight.shape])


def _linear_arguments(x: Tensor, weight: Tensor, bias: Tensor | None, *noise: Any) -> tuple[Any, ...]:
    return x, weight, bias, Noise(*noise), None


def _conv2d_arguments(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    return x, weight, bias, Noise(*rest[:5]), Geometry(*rest[5:])


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, noise: Noise, geometry: Geometry | None) -> Tensor:
    check_noise(weight, noise)
    return x.new_empty([noise.samples.shape[0], *check_layer(x, weight, bias, noise.samples, geometry)])


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, noise: Noise, geometry: Geometry | None) -> Tensor:
    check_noise(weight, noise)
    shape = check_layer(x, weight, bias, noise.samples, geometry)
    if kernels.kernels_draw(x):
        check_address(weight, noise)
        return kernels.on_cuda(x, weight, bias, noise, geometry).view(-1, *shape)
    if x.device.type != "cpu" or x.dtype == torch.float64 or not core.status().built:
        return kernels.each_chip(x, kernels.chip_weights(weight, noise), bias, geometry)
    if geometry is None:  # a 1 x 1 convolution of one pixel, whose noise has the same elements
        x, weight, geometry = x[..., None, None], weight[..., None, None], Geometry()
    return kernels.fused(x, weight, bias, noise, geometry).view(-1, *shape)


# ---- gradients ------------------------------------------------------------------------------------------------------
#
# The gradient of a noisy weight is its factor, so `noisy_weight` of one chip is its own backward pass. Sums over chips
# are accumulated in float32 or wider and rounded once.


def _weights_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, samples, *ctx.numbers = inputs
    ctx.save_for_backward(seed, samples)


def _weights_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    chips = _single_chips(*ctx.saved_tensors, ctx.numbers)
    parts = [_times_factor(g, chip) for g, chip in zip(gradient, chips, strict=True)]
    return _sum(parts, gradient.dtype), *[None] * 5


def _layer_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, seed, samples, *rest = inputs
    ctx.numbers, ctx.geometry = rest[:3], rest[3:]
    ctx.save_for_backward(x, weight, seed, samples)


def _layer_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, seed, samples = ctx.saved_tensors
    x_wanted, weight_wanted, bias_wanted, *_ = ctx.needs_input_grad
    shared = x.dim() == weight.dim()
    of_x, of_weight = [], []
    if x_wanted and kernels.kernels_draw(x):
        # One launch for all chips; the kernel draws the noise again while it loads the weights.
        geometry = Geometry(*ctx.geometry) if ctx.geometry else None
        size = x.shape[-2:] if geometry else (1, 1)
        whole = kernels.on_cuda(gradient, weight, None, Noise(seed, samples, *ctx.numbers), geometry, size)
        of_x = [_wide(g) if shared else g for g in whole.view(len(samples), *x.shape[-weight.dim() :])]
    for s, chip in enumerate(_single_chips(seed, samples, ctx.numbers)):
        missing = x_wanted and len(of_x) <= s
        noisy = torch.ops.correctnet.noisy_weight(weight, *chip)[0] if missing else weight  # only its shape is used
        wanted = [missing, weight_wanted, False]
        dx, dw = _chip_gradients(gradient[s], x if shared else x[s], noisy, wanted, ctx.geometry)
        if missing:
            of_x.append(_wide(dx) if shared else dx)
        of_weight.append(_times_factor(dw, chip) if weight_wanted else dw)
    dx = dw = db = None
    if x_wanted:
        dx = _sum(of_x, x.dtype) if shared else torch.stack(of_x)
    if weight_wanted:
        dw = _sum(of_weight, weight.dtype)
    if bias_wanted:
        db = gradient.sum([i for i in range(gradient.dim()) if i != 2])
    return dx, dw, db, *[None] * (5 + len(ctx.geometry))


def _chip_gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, wanted: list[bool], geometry: Sequence[Any]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of one chip's layer with respect to x and to its noisy weights; undefined if not wanted."""
    if geometry:
        stride, padding, dilation, groups = geometry
        return torch.ops.aten.convolution_backward(
            gradient, x, weight, None, stride, padding, dilation, False, [0, 0], groups, wanted
        )[:2]
    return gradient @ weight if wanted[0] else None, gradient.mT @ x if wanted[1] else None


def _single_chips(seed: Tensor, samples: Tensor, numbers: list[Any]) -> list[Noise]:
    return [Noise(seed, samples[s : s + 1], *numbers) for s in range(samples.shape[0])]


def _times_factor(weight: Tensor, chip: Noise) -> Tensor:
    return torch.ops.correctnet.noisy_weight(_wide(weight), *chip)[0]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _sum(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    return functools.reduce(torch.add, parts).to(dtype)


# ---- registration ---------------------------------------------------------------------------------------------------


def _current(function: Callable[..., Any]) -> Callable[..., Any]:
    """Look the function up in its module at each call: operators are registered once, the module can be reloaded."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(sys.modules[__name__], function.__name__)(*args, **kwargs)

    return call


def _linear(*args: Any) -> Tensor:
    return _forward(*_linear_arguments(*args))


def _conv2d(*args: Any) -> Tensor:
    return _forward(*_conv2d_arguments(*args))


def _fake_linear(*args: Any) -> Tensor:
    return _fake(*_linear_arguments(*args))


def _fake_conv2d(*args: Any) -> Tensor:
    return _fake(*_conv2d_arguments(*args))


_OPERATORS = {
    "noisy_weight": (_weights, _fake_weights, _weights_backward, _weights_context),
    "noisy_linear": (_linear, _fake_linear, _layer_backward, _layer_context),
    "noisy_conv2d": (_conv2d, _fake_conv2d, _layer_backward, _layer_context),
}


def _register() -> None:
    """Register the operators with torch, once a process; after a reload they call the module's new functions."""
    for name, functions in _OPERATORS.items():
        if hasattr(torch.ops.correctnet, name):
            continue
        forward, fake, backward, context = map(_current, functions)
        qualified = f"correctnet::{name}"
        torch.library.define(qualified, _SCHEMAS[name], tags=_TAGS)
        torch.library.impl(qualified, "default", forward)
        torch.library.register_fake(qualified, fake)
        torch.library.register_autograd(qualified, backward, setup_context=context)


_register()
