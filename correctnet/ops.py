"""PyTorch operators on chip samples: `noisy_linear` and `noisy_conv2d`, and the `noisy_weight` behind their gradients.

y = noisy_conv2d(x, weight, bias, seed=seed, samples=samples, layer=3, sigma=0.5)     # (samples, N, out, H', W')

They are torch.library operators: autograd, torch.compile without graph breaks, and fake tensors work. The seed and the
samples may be int64 tensors; then a new chip compiles nothing anew.

On the CPU in float32 and bfloat16 the C++ core computes them, drawing the noise while it packs the weights. Elsewhere
(float64, other devices, no core) the noisy weights are made first and multiplied by torch. No gradient stores noise:
backward draws it again from its address.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from correctnet import native, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float64)

_ADDRESS = "Tensor seed, Tensor samples, int layer, float sigma, float shift"
_CONV = "int[2] stride, int[2] padding, int[2] dilation, int groups"
torch.library.define("correctnet::noisy_weight", f"(Tensor weight, {_ADDRESS}) -> Tensor")
torch.library.define("correctnet::noisy_weight_backward", f"(Tensor gradient, {_ADDRESS}) -> Tensor")
torch.library.define("correctnet::noisy_linear", f"(Tensor x, Tensor weight, Tensor? bias, {_ADDRESS}) -> Tensor")
torch.library.define(
    "correctnet::noisy_conv2d", f"(Tensor x, Tensor weight, Tensor? bias, {_ADDRESS}, {_CONV}) -> Tensor"
)


def noisy_weight(
    weight: Tensor,
    *,
    seed: int | Tensor = 0,
    samples: Sequence[int] | Tensor = (0,),
    layer: int = 0,
    sigma: float = 0.5,
    shift: float = 0.0,
) -> Tensor:
    """W_s = W exp(sigma z_s + shift) for every chip sample s: (1) and (2) of the paper at shift 0.

    Args:
        weight: (out, in, ...), float32, bfloat16 or float64. Its element order is (out, kh, kw, in).
        seed, samples, layer, sigma, shift: as for `noisy_linear`.

    Returns:
        (samples, *weight.shape), differentiable in `weight`.
    """
    seed, samples = _address(seed, samples, weight.device)
    return torch.ops.correctnet.noisy_weight(weight, seed, samples, layer, float(sigma), float(shift))


def noisy_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    seed: int | Tensor = 0,
    samples: Sequence[int] | Tensor = (0,),
    layer: int = 0,
    sigma: float = 0.5,
    shift: float = 0.0,
) -> Tensor:
    """y_s = x_s W_s^T + b with W_s = W exp(sigma z_s + shift), for every chip sample s.

    Args:
        x: (N, in), the same for all samples, or (samples, N, in). N >= 1.
        weight: (out, in), of the same dtype: float32, bfloat16 (the noisy weight is rounded once, sums are float32) or
            float64. `bias`: (out,), free of noise, or None.
        seed: 64 bits, an int or a 0-dimensional int64 tensor that holds them.
        samples: numbers of the chip samples, each in [0, 2^32), at least one: a sequence or an int64 tensor.
        layer: index of the layer, in [0, 2^32).
        sigma: standard deviation of the weight's logarithm, >= 0 and small enough for float32 factors.
        shift: added to the logarithm; -sigma^2 / 2 keeps the mean weight.

    Returns:
        (samples, N, out), differentiable in x, weight and bias.

    Raises:
        ValueError: an argument, by name, that is outside its range or does not fit another.
    """
    seed, samples = _address(seed, samples, x.device)
    return torch.ops.correctnet.noisy_linear(x, weight, bias, seed, samples, layer, float(sigma), float(shift))


def noisy_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    seed: int | Tensor = 0,
    samples: Sequence[int] | Tensor = (0,),
    layer: int = 0,
    sigma: float = 0.5,
    shift: float = 0.0,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """y_s = x_s * W_s + b (a convolution) with W_s = W exp(sigma z_s + shift), for every chip sample s.

    Args:
        x: (N, in, H, W), the same for all samples, or (samples, N, in, H, W). N >= 1.
        weight: (out, in / groups, kh, kw); `bias`: (out,) or None.
        stride, padding, dilation, groups: as for torch.nn.functional.conv2d, padding by zeros.
        seed, samples, layer, sigma, shift: as for `noisy_linear`.

    Returns:
        (samples, N, out, H', W'), differentiable in x, weight and bias.

    Raises:
        ValueError: an argument, by name, that is outside its range or does not fit another.
    """
    seed, samples = _address(seed, samples, x.device)
    shape = _pair(stride, "stride"), _pair(padding, "padding"), _pair(dilation, "dilation"), groups
    return torch.ops.correctnet.noisy_conv2d(x, weight, bias, seed, samples, layer, float(sigma), float(shift), *shape)


def _address(seed: int | Tensor, samples: Sequence[int] | Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    if not isinstance(seed, Tensor):
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed: in [0, 2^64), not {seed}")
        seed = torch.tensor(seed - (seed >> 63 << 64), dtype=torch.int64)
    if not isinstance(samples, Tensor):
        samples = torch.tensor([*samples], dtype=torch.int64)
    return seed, samples


def _pair(value: int | tuple[int, int], name: str) -> list[int]:
    pair = [value, value] if isinstance(value, int) else list(value)
    if len(pair) != 2:
        raise ValueError(f"{name}: one number or two, not {value!r}")
    return pair


# ---- checks, in the operators themselves, so that no way to call them goes past --------------------------------------


def _check_weight(weight: Tensor, seed: Tensor, samples: Tensor, layer: int, sigma: float, shift: float) -> None:
    if weight.dim() < 2 or weight.dtype not in DTYPES:
        raise ValueError(
            f"weight: (out, in, ...) in float32, bfloat16 or float64, not {tuple(weight.shape)} in {weight.dtype}"
        )
    if seed.dim() != 0 or seed.dtype != torch.int64:
        raise ValueError(f"seed: a single int64, not {tuple(seed.shape)} in {seed.dtype}")
    if samples.dim() != 1 or samples.dtype != torch.int64 or samples.shape[0] == 0:
        raise ValueError(f"samples: at least one int64 in a row, not {tuple(samples.shape)} in {samples.dtype}")
    if not 0 <= layer < 2**32:
        raise ValueError(f"layer: in [0, 2^32), not {layer}")
    reference.log2_scale(sigma, shift)


def _check_layer(x: Tensor, weight: Tensor, bias: Tensor | None, samples: Tensor, dims: int, inputs: int) -> None:
    """x (N, in, ...) of `dims` dimensions or (S, N, in, ...), with `inputs` channels; bias (out,)."""
    if weight.dim() != dims or 0 in weight.shape:
        raise ValueError(f"weight: {dims} dimensions, none of them 0, are expected, not {tuple(weight.shape)}")
    if x.dim() not in (dims, dims + 1):
        raise ValueError(f"x: {dims} dimensions, or {dims + 1} with the samples in front, not {tuple(x.shape)}")
    if x.dim() == dims + 1 and x.shape[0] != samples.shape[0]:
        raise ValueError(f"x: {x.shape[0]} in front for {samples.shape[0]} samples")
    if x.shape[-dims] == 0:
        raise ValueError(f"x: an empty batch, {tuple(x.shape)}")
    if x.shape[1 - dims] != inputs:
        raise ValueError(f"x: {x.shape[1 - dims]} inputs for a weight that takes {inputs}")
    if x.dtype != weight.dtype or x.device != weight.device:
        raise ValueError(f"x: {x.dtype} on {x.device}, and weight {weight.dtype} on {weight.device}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype or bias.device != x.device):
        raise ValueError(f"bias: {weight.shape[0]} numbers in {x.dtype}, not {tuple(bias.shape)} in {bias.dtype}")


def _check_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    samples: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> list[int]:
    """The height and width of the result."""
    if weight.dim() != 4:
        raise ValueError(f"weight: (out, in / groups, kh, kw) is expected, not {tuple(weight.shape)}")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups: at least 1 and a divisor of the {weight.shape[0]} outputs, not {groups}")
    _check_layer(x, weight, bias, samples, 4, weight.shape[1] * groups)
    size = []
    for i in range(2):
        if stride[i] < 1 or dilation[i] < 1 or padding[i] < 0 or max(stride[i], dilation[i], padding[i]) >= 2**15:
            raise ValueError(
                f"stride, dilation: at least 1, padding: at least 0, all below 2^15; not {list(stride)}, "
                f"{list(dilation)}, {list(padding)}"
            )
        span = x.shape[i - 2] + 2 * padding[i] - dilation[i] * (weight.shape[i + 2] - 1) - 1
        if span < 0:
            raise ValueError(f"x: {tuple(x.shape[-2:])} with padding {list(padding)} is smaller than the kernel")
        size.append(span // stride[i] + 1)
    return size


def _chips(samples: Tensor) -> list[int]:
    chips = samples.tolist()
    for sample in chips:
        if not 0 <= sample < 2**32:
            raise ValueError(f"samples: in [0, 2^32), not {sample}")
    return chips


def _seed(seed: Tensor) -> int:
    return int(seed.item()) & (2**64 - 1)


# ---- noisy_weight ----------------------------------------------------------------------------------------------------


def _drawn(weight: Tensor, seed: int, layer: int, sample: int, sigma: float, shift: float) -> Tensor:
    """The weights of one chip; the product is rounded to float32, and once more to bfloat16, or is float64's."""
    weight = weight.detach()
    if weight.dtype != torch.float64:
        return native.noisy_weight(weight, seed, layer, sample, sigma, shift, order="contiguous")
    out, channels, *kernel = weight.shape
    factor = native.lognormal(seed, layer, sample, weight.numel(), sigma, shift)
    return weight * factor.to(weight).view(out, *kernel, channels).movedim(-1, 1)


@torch.library.impl("correctnet::noisy_weight", "default")
def _noisy_weight(weight: Tensor, seed: Tensor, samples: Tensor, layer: int, sigma: float, shift: float) -> Tensor:
    _check_weight(weight, seed, samples, layer, sigma, shift)
    address = _seed(seed), layer
    return torch.stack([_drawn(weight, *address, s, sigma, shift) for s in _chips(samples)]).contiguous()


@torch.library.register_fake("correctnet::noisy_weight")
def _noisy_weight_fake(weight: Tensor, seed: Tensor, samples: Tensor, layer: int, sigma: float, shift: float) -> Tensor:
    _check_weight(weight, seed, samples, layer, sigma, shift)
    return weight.new_empty((samples.shape[0], *weight.shape))


@torch.library.impl("correctnet::noisy_weight_backward", "default")
def _noisy_weight_backward(
    gradient: Tensor, seed: Tensor, samples: Tensor, layer: int, sigma: float, shift: float
) -> Tensor:
    _check_weight(gradient[0], seed, samples, layer, sigma, shift)
    total = torch.zeros(gradient.shape[1:], dtype=gradient.dtype, device=gradient.device)
    for part, sample in zip(gradient, _chips(samples), strict=True):
        total += _drawn(part, _seed(seed), layer, sample, sigma, shift)
    return total


@torch.library.register_fake("correctnet::noisy_weight_backward")
def _noisy_weight_backward_fake(
    gradient: Tensor, seed: Tensor, samples: Tensor, layer: int, sigma: float, shift: float
) -> Tensor:
    return gradient.new_empty(gradient.shape[1:])


def _save_address(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, samples, *ctx.scalars = inputs
    ctx.save_for_backward(seed, samples)


def _noisy_weight_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    back = torch.ops.correctnet.noisy_weight_backward(gradient, *ctx.saved_tensors, *ctx.scalars)
    return back, None, None, None, None, None


torch.library.register_autograd("correctnet::noisy_weight", _noisy_weight_gradient, setup_context=_save_address)


# ---- noisy_linear ----------------------------------------------------------------------------------------------------


def _fused(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype != torch.float64 and native.status().built


def _run_plan(x: Tensor, shared: bool, precision: torch.dtype, seed: int, samples: list[int], append: Any) -> Tensor:
    """A plan of one layer on x (N, C, H, W) or (S, N, C, H, W); (S, N, ...) in float32. `append` adds the layer."""
    from correctnet import _native

    name = "bfloat16" if precision == torch.bfloat16 else "float32"
    plan = _native.Plan(name, *x.shape[-3:])
    plan.finish(append(plan))
    threads = torch.get_num_threads()

    def outputs(images: Tensor, chips: list[int]) -> np.ndarray:
        return plan.outputs(images.numpy(), seed=seed, samples=chips, threads=threads)[0]

    x = x.detach().float().contiguous()
    if shared:
        return torch.from_numpy(outputs(x, samples))
    return torch.from_numpy(np.concatenate([outputs(part, [s]) for part, s in zip(x, samples, strict=True)]))


def _layer(
    weight: Tensor, bias: Tensor | None, layer: int, sigma: float, shift: float
) -> tuple[np.ndarray, dict[str, Any]]:
    """A layer's weights in the order (out, ..., in), its noise and its bias, as a plan takes them."""
    from correctnet import _native

    array = weight.detach().float().movedim(1, -1).contiguous().numpy()
    shifts = None if bias is None else bias.detach().float().contiguous().numpy()
    noise = _native.LayerNoise(layer, sigma, shift) if sigma or shift else None
    return array, {"noise": noise, "pointwise": _native.Pointwise(shift=shifts)}


@torch.library.impl("correctnet::noisy_linear", "default")
def _noisy_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor,
    samples: Tensor,
    layer: int,
    sigma: float,
    shift: float,
) -> Tensor:
    _check_weight(weight, seed, samples, layer, sigma, shift)
    _check_layer(x, weight, bias, samples, 2, weight.shape[1])
    chips, shared = _chips(samples), x.dim() == 2
    if _fused(x):
        array, options = _layer(weight, bias, layer, sigma, shift)
        out = _run_plan(
            x[..., None, None], shared, x.dtype, _seed(seed), chips, lambda plan: plan.linear(0, array, **options)
        )
        return out.flatten(2).to(x.dtype)
    parts = [
        F.linear(x if shared else x[i], _drawn(weight, _seed(seed), layer, s, sigma, shift), bias)
        for i, s in enumerate(chips)
    ]
    return torch.stack(parts)


@torch.library.register_fake("correctnet::noisy_linear")
def _noisy_linear_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor,
    samples: Tensor,
    layer: int,
    sigma: float,
    shift: float,
) -> Tensor:
    _check_weight(weight, seed, samples, layer, sigma, shift)
    _check_layer(x, weight, bias, samples, 2, weight.shape[1])
    return x.new_empty((samples.shape[0], x.shape[-2], weight.shape[0]))


def _save_layer(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, seed, samples, *ctx.scalars = inputs
    ctx.save_for_backward(x, weight, seed, samples)


def _each_sample(ctx: Any, gradient: Tensor, backward: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, one chip at a time: no more than one chip's weights are made."""
    x, weight, seed, samples = ctx.saved_tensors
    address = ctx.scalars[:3]
    shared = x.dim() == weight.dim()
    dx: list[Tensor] = []
    dw = None
    for i in range(samples.shape[0]):
        chip = samples[i : i + 1]
        drawn = torch.ops.correctnet.noisy_weight(weight, seed, chip, *address)[0]
        dx_i, dw_i = backward(gradient[i], x if shared else x[i], drawn)
        if ctx.needs_input_grad[0]:
            dx.append(dx_i)
        if ctx.needs_input_grad[1]:
            part = torch.ops.correctnet.noisy_weight_backward(dw_i[None], seed, chip, *address)
            dw = part if dw is None else dw + part
    total = None
    if dx:
        total = torch.stack(dx).sum(0) if shared else torch.stack(dx)
    db = None
    if ctx.needs_input_grad[2]:
        db = gradient.sum([d for d in range(gradient.dim()) if d != 2])
    return total, dw, db


def _noisy_linear_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    grads = _each_sample(ctx, gradient, lambda g, x, w: (g @ w, g.transpose(0, 1) @ x))
    return *grads, None, None, None, None, None


torch.library.register_autograd("correctnet::noisy_linear", _noisy_linear_gradient, setup_context=_save_layer)


# ---- noisy_conv2d ----------------------------------------------------------------------------------------------------


@torch.library.impl("correctnet::noisy_conv2d", "default")
def _noisy_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor,
    samples: Tensor,
    layer: int,
    sigma: float,
    shift: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    _check_weight(weight, seed, samples, layer, sigma, shift)
    _check_conv(x, weight, bias, samples, stride, padding, dilation, groups)
    chips, shared = _chips(samples), x.dim() == 4
    if _fused(x):
        array, options = _layer(weight, bias, layer, sigma, shift)
        options |= {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        out = _run_plan(x, shared, x.dtype, _seed(seed), chips, lambda plan: plan.conv(0, array, **options))
        return out.to(x.dtype)
    parts = [
        F.conv2d(
            x if shared else x[i],
            _drawn(weight, _seed(seed), layer, s, sigma, shift),
            bias,
            stride,
            padding,
            dilation,
            groups,
        )
        for i, s in enumerate(chips)
    ]
    return torch.stack(parts).contiguous()


@torch.library.register_fake("correctnet::noisy_conv2d")
def _noisy_conv2d_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor,
    samples: Tensor,
    layer: int,
    sigma: float,
    shift: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    _check_weight(weight, seed, samples, layer, sigma, shift)
    size = _check_conv(x, weight, bias, samples, stride, padding, dilation, groups)
    return x.new_empty((samples.shape[0], x.shape[-4], weight.shape[0], *size))


def _noisy_conv2d_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    stride, padding, dilation, groups = ctx.scalars[3:]
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]

    def backward(g: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        dx, dw, _ = torch.ops.aten.convolution_backward(
            g.contiguous(), x, w, None, stride, padding, dilation, False, [0, 0], groups, wanted
        )
        return dx, dw

    return *_each_sample(ctx, gradient, backward), *[None] * 9


torch.library.register_autograd("correctnet::noisy_conv2d", _noisy_conv2d_gradient, setup_context=_save_layer)
