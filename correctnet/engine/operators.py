"""Linear and convolutional layers on many chip samples, as PyTorch operators.

y = noisy_linear(x, weight, bias, seed=0, layer=3, sigma=0.5, samples=range(8))       # (8, N, out)

Three operators, `torch.ops.correctnet.noisy_weight`, `.noisy_linear` and `.noisy_conv2d`, known to autograd and to
torch.compile: seed and samples are tensors in them, so that another seed or other chips do not compile again. The noise
is a function of its address (`correctnet.noise.specification`), so a backward pass draws it again; none is stored.

Seed and samples on a GPU stay there: what the operators do can be captured in a CUDA graph and replayed with others.
Products that torch computes (the gradient with respect to the weights, and all of them where a gradient is wanted) are
torch's in every respect, so that its switches for TF32 hold for them: on a GPU convolutions round their float32 inputs
to ten bits unless `torch.backends.cudnn.allow_tf32` is False.

On the CPU, in float32 and bfloat16, the C++ core computes the layers (csrc/engine.h) and draws the weights of a chip
while it packs them, panel by panel: no noisy weight tensor ever exists. Elsewhere, and in float64, the weights of one
chip after the other are made as a tensor, and torch multiplies. So do the functions where a gradient is wanted, see
`_noisy_layer`.
"""

from __future__ import annotations

import contextlib
import functools
import numbers
import operator
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from correctnet.noise import core as native
from correctnet.noise import device as cuda
from correctnet.noise import specification as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
EXTENT = 1 << 31  # the core counts pixels, padding included, in 32 bits

_NOISE = "Tensor seed, Tensor samples, int layer, float sigma, float shift"
_LAYER = f"Tensor x, Tensor weight, Tensor? bias, {_NOISE}=0."
_GEOMETRY = "int[2] stride=1, int[2] padding=0, int[2] dilation=1, int groups=1"
_TAGS = torch.Tag.pt2_compliant_tag
_SCHEMAS = {
    "noisy_weight": f"(Tensor weight, {_NOISE}) -> Tensor",
    "noisy_linear": f"({_LAYER}) -> Tensor",
    "noisy_conv2d": f"({_LAYER}, {_GEOMETRY}) -> Tensor",
}


class Noise(NamedTuple):
    """Which noise: that of one layer on the chips `samples`; see `noisy_linear`."""

    seed: Tensor  # 0-d int64
    samples: Tensor  # (S,) int64
    layer: int
    sigma: float
    shift: float = 0.0


class Geometry(NamedTuple):
    """Of a convolution, pairs (vertical, horizontal); as in torch."""

    stride: Sequence[int] = (1, 1)
    padding: Sequence[int] = (0, 0)
    dilation: Sequence[int] = (1, 1)
    groups: int = 1


# ---- functions ------------------------------------------------------------------------------------------------------


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
    """A linear layer on the crossbars of several chip samples.

        y[s, n] = W_s x[n] + bias    or    W_s x[s, n] + bias,    W_s = weight * exp(sigma z_s + shift)

    z_s is standard normal, independent for every weight, and a function of (seed, layer, sample, element) alone: (1)
    and (2) of the paper at shift 0. The bias is digital. Reverse-mode differentiable in x, weight and bias.

    Args:
        x: (N, in), shared by all chips, or (S, N, in), one batch for each; float32, bfloat16 or float64. In bfloat16 a
            noisy weight is rounded once, sums are float32 and the result is rounded at the end. Autocast does not reach
            in here: the dtype of the arguments is that of the layer.
        weight: nominal weights, (out, in), in the dtype and on the device of x, any memory order.
        bias: (out,), likewise, or None.
        seed: 64-bit seed of the simulation; as a tensor 0-d int64 (its bits), which torch.compile does not fix.
        layer: index among all conv and linear layers of the network, in [0, 2^32).
        sigma: standard deviation of the logarithm of a factor (no unit), finite, >= 0.
        shift: mean of that logarithm, finite; -sigma^2 / 2 keeps the mean weight nominal.
        samples: numbers of the S >= 1 chips, each in [0, 2^32); as a tensor (S,) int64.

    Returns:
        (S, N, out), the dtype of x.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a tensor's shape, dtype or device does not fit or it is empty, a number is outside its range, or the
            factors could leave that of float32; the message names the argument. What a compiled function is given
            raises a RuntimeError of the same words while it is compiled.
        UserError: see `native.status`.
    """
    noise = _noise(seed, samples, layer, sigma, shift)
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
    """A convolution on the crossbars of several chip samples.

        y[s, n] = W_s * x[n] + bias    or    W_s * x[s, n] + bias,    W_s = weight * exp(sigma z_s + shift)

    `*` before x is the cross-correlation of torch.nn.functional.conv2d with zeros as padding. Elements of z_s count in
    the order (out, kh, kw, in / groups). For all else see `noisy_linear`.

    Args:
        x: (N, C, H, W), shared by all chips, or (S, N, C, H, W), one batch for each; pixels.
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
    noise = _noise(seed, samples, layer, sigma, shift)
    pairs = _pair("stride", stride), _pair("padding", padding), _pair("dilation", dilation)
    geometry = Geometry(*pairs, _integer("groups", groups))
    return _noisy_layer(torch.ops.correctnet.noisy_conv2d, x, weight, bias, noise, geometry)


def _noisy_layer(
    op: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, noise: Noise, geometry: Geometry | None
) -> Tensor:
    for name, value in (("x", x), ("weight", weight), ("bias", bias)):
        if not isinstance(value, Tensor) and not (name == "bias" and value is None):
            raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))):
        return op(x, weight, bias, *noise, *(geometry or ()))
    # A backward pass follows: the weights are made once, and torch multiplies. By measurement (one chip, batch 128, one
    # Zen 4 core) a training step then takes 290 ms instead of the 340 through `op` for a convolution 128 -> 128 at
    # 16 x 16, and 142 instead of 207 in bfloat16; for LeNet-5's second 5.2 instead of 6.3, and 2.5 instead of 3.2. The
    # core turns the layout of images around twice, and the backward pass of `op` has to draw the weights again. The
    # price: autograd holds the noisy weights of all chips.
    _check_layer(x, weight, bias, noise.samples, geometry)
    return _each_chip(x, torch.ops.correctnet.noisy_weight(weight, *noise), bias, geometry)


def _each_chip(x: Tensor, weights: Iterable[Tensor], bias: Tensor | None, geometry: Geometry | None) -> Tensor:
    """The layer by torch, given the weights of each chip."""
    outputs = []
    with contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
        for s, weight in enumerate(weights):
            own = x if x.dim() == weight.dim() else x[s]
            outputs.append(F.linear(own, weight, bias) if geometry is None else F.conv2d(own, weight, bias, *geometry))
    return torch.stack(outputs).contiguous()


# ---- arguments ------------------------------------------------------------------------------------------------------


def _noise(seed: int | Tensor, samples: Sequence[int] | Tensor, layer: int, sigma: float, shift: float) -> Noise:
    """The noise's arguments as the operators take them; the rest of the checks is theirs."""
    if not isinstance(seed, Tensor):
        number = _integer("seed", seed, -(1 << 63), (1 << 64) - 1)
        seed = torch.tensor(number - (1 << 64) if number >= 1 << 63 else number, dtype=torch.int64, device="cpu")
    if not isinstance(samples, Tensor):
        if not isinstance(samples, Iterable) or isinstance(samples, str):
            raise TypeError(f"samples must be a sequence of integers or a tensor, not {samples!r}")
        chips = [_integer("samples", s, 0, (1 << 32) - 1) for s in samples]
        samples = torch.tensor(chips, dtype=torch.int64, device="cpu")
    return Noise(
        seed, samples, _integer("layer", layer, 0, (1 << 32) - 1), _real("sigma", sigma), _real("shift", shift)
    )


def _integer(name: str, value: Any, low: int = -(1 << 63), high: int = (1 << 63) - 1) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {value!r}") from None
    if not low <= number <= high:
        raise ValueError(f"{name} must be between {low} and {high}, not {number}")
    return number


def _real(name: str, value: Any) -> float:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number, not {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be within the range of float64") from None


def _pair(name: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, (tuple, list)):
        value = (value, value)
    if len(value) != 2:
        raise ValueError(f"{name} must be one integer or two, not {value!r}")
    return _integer(name, value[0]), _integer(name, value[1])


def _check_tensor(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
        raise ValueError(f"{name} must be dense float32, bfloat16 or float64, not {tensor.layout} {tensor.dtype}")
    if tensor.numel() == 0:
        raise ValueError(f"{name} must not be empty: {tuple(tensor.shape)}")


def _check_noise(weight: Tensor, noise: Noise) -> None:
    """Raises ValueError where the noise, or the weight that it is for, cannot be used. No value in a tensor is read."""
    _check_tensor("weight", weight)
    if weight.dim() < 2:
        raise ValueError(f"weight must be (out, in, ...), not {tuple(weight.shape)}")
    seed, samples, layer, sigma, shift = noise
    if seed.dtype != torch.int64 or seed.dim() != 0:
        raise ValueError(f"seed must be 0-d int64, not {tuple(seed.shape)} {seed.dtype}")
    if samples.dtype != torch.int64 or samples.dim() != 1 or samples.shape[0] == 0:
        raise ValueError(f"samples must be int64, (S,) with S >= 1, not {tuple(samples.shape)} {samples.dtype}")
    reference.address(0, layer, 0, 0, 0, 0)
    reference.log2_scale(sigma, shift)


def _check_layer(
    x: Tensor, weight: Tensor, bias: Tensor | None, samples: Tensor, geometry: Geometry | None
) -> list[int]:
    """The shape of the result for one chip. Raises ValueError where the arguments do not fit together."""
    axes = "N, in" if geometry is None else "N, C, H, W"
    dims, groups = (2, 1) if geometry is None else (4, geometry.groups)
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        _check_tensor(name, tensor)
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f"{name} must have the dtype and device of x, {x.dtype} on {x.device}, "
                f"not {tensor.dtype} on {tensor.device}"
            )
    if weight.dim() != dims:
        raise ValueError(f"weight must have {dims} dimensions, not {tuple(weight.shape)}")
    if x.dim() not in (dims, dims + 1):
        raise ValueError(f"x must be ({axes}) or (S, {axes}), not {tuple(x.shape)}")
    if x.dim() > dims and x.shape[0] != samples.numel():
        raise ValueError(f"x holds {x.shape[0]} batches, one for each chip, but samples {samples.numel()} chips")
    count, channels, *size = x.shape[-dims:]
    outputs, inputs, *kernel = weight.shape
    if groups < 1 or outputs % groups:
        raise ValueError(f"groups must be a divisor of the {outputs} outputs of weight, not {groups}")
    if channels != groups * inputs:
        raise ValueError(
            f"x must have {groups * inputs} channels (features), to fit weight {tuple(weight.shape)} in groups of "
            f"{groups}, not {channels}"
        )
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != outputs):
        raise ValueError(f"bias must be ({outputs},), to fit weight, not {tuple(bias.shape)}")
    return [count, outputs] if geometry is None else [count, outputs, *_output_size(size, kernel, geometry)]


def _output_size(size: list[int], kernel: list[int], geometry: Geometry) -> list[int]:
    stride, padding, dilation, _ = geometry
    for name, pair, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(pair) != 2 or min(pair) < least:
            raise ValueError(f"{name} must be two integers >= {least}, not {tuple(pair)}")
    output = []
    for i in range(2):
        if size[i] + 2 * padding[i] + dilation[i] * kernel[i] + stride[i] >= EXTENT:
            raise ValueError(
                f"stride {stride[i]}, padding {padding[i]} or dilation {dilation[i]} reaches beyond 2^31 pixels"
            )
        span = size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1
        if span < 0:
            raise ValueError(
                f"weight: a kernel of {kernel[i]} at dilation {dilation[i]} is larger than the {size[i]} pixels of x "
                f"with padding {padding[i]}"
            )
        output.append(span // stride[i] + 1)
    return output


# ---- operators ------------------------------------------------------------------------------------------------------
#
# The dispatcher passes arguments by position, and leaves out defaults at the end.


def _weights(weight: Tensor, *noise: Any) -> Tensor:
    """(S, *weight.shape): the weights of each chip."""
    _check_noise(weight, Noise(*noise))
    if _kernels_draw(weight):
        return _drawn_on_device(weight, Noise(*noise))
    return torch.stack(list(_chip_weights(weight, Noise(*noise)))).contiguous()


def _fake_weights(weight: Tensor, *noise: Any) -> Tensor:
    _check_noise(weight, Noise(*noise))
    return weight.new_empty([Noise(*noise).samples.shape[0], *weight.shape])


def _linear_arguments(x: Tensor, weight: Tensor, bias: Tensor | None, *noise: Any) -> tuple[Any, ...]:
    return x, weight, bias, Noise(*noise), None


def _conv2d_arguments(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    return x, weight, bias, Noise(*rest[:5]), Geometry(*rest[5:])


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, noise: Noise, geometry: Geometry | None) -> Tensor:
    _check_noise(weight, noise)
    return x.new_empty([noise.samples.shape[0], *_check_layer(x, weight, bias, noise.samples, geometry)])


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, noise: Noise, geometry: Geometry | None) -> Tensor:
    _check_noise(weight, noise)
    shape = _check_layer(x, weight, bias, noise.samples, geometry)
    if _kernels_draw(x):
        _check_numbers(weight, noise)
        return _on_device(x, weight, bias, noise, geometry).view(-1, *shape)
    if x.device.type != "cpu" or x.dtype == torch.float64 or not native.status().built:
        return _each_chip(x, _chip_weights(weight, noise), bias, geometry)
    if geometry is None:  # a convolution of one pixel: the elements of the noise count alike
        x, weight, geometry = x[..., None, None], weight[..., None, None], Geometry()
    return _fused(x, weight, bias, noise, geometry).view(-1, *shape)


def _on_device(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    noise: Noise,
    geometry: Geometry | None,
    size: Sequence[int] | None = None,
) -> Tensor:
    """The layer by the CUDA kernels, or with `size`, of its input, the gradient with respect to that."""
    if geometry is None:
        x, weight, geometry = x[..., None, None], weight[..., None, None], Geometry()
    return cuda.convolve(x, weight, bias, *noise, geometry, size)


def _address(weight: Tensor, noise: Noise) -> tuple[int, list[int]]:
    """The values of seed and samples. Raises ValueError where one is outside its range."""
    seed, chips = int(noise.seed), noise.samples.tolist()
    for chip in (min(chips), max(chips)):
        reference.address(seed, noise.layer, chip, weight.numel(), 0, 0)
    return seed, chips


def _check_numbers(weight: Tensor, noise: Noise) -> None:
    """What `_address` checks, where no number stands on the device: to read one there would wait for all that the
    device has to do, and cannot be captured in a CUDA graph. There a chip's number counts modulo 2^32."""
    if noise.seed.device.type == noise.samples.device.type == "cpu":
        _address(weight, noise)


def _kernels_draw(tensor: Tensor) -> bool:
    """Whether the CUDA kernels compute a layer of such tensors."""
    return cuda.reaches(tensor.device) and tensor.dtype != torch.float64


def _drawn_on_device(weight: Tensor, noise: Noise) -> Tensor:
    """`_chip_weights` in one tensor and one launch."""
    _check_numbers(weight, noise)
    return cuda.noisy_weight(weight.contiguous(), *noise)


def _chip_weights(weight: Tensor, noise: Noise) -> Iterator[Tensor]:
    """(1) and (2) of the paper for each chip, in the dtype of `weight`; the factors are float32 in any dtype."""
    if _kernels_draw(weight):
        yield from _drawn_on_device(weight, noise)
        return
    seed, chips = _address(weight, noise)
    for chip in chips:
        address = seed, noise.layer, chip, noise.sigma, noise.shift
        if weight.dtype == torch.float64:
            yield weight * native.noisy_weight(torch.ones_like(weight, dtype=torch.float32), *address)
        else:
            yield native.noisy_weight(weight, *address, order="contiguous")


def _fused(x: Tensor, weight: Tensor, bias: Tensor | None, noise: Noise, geometry: Geometry) -> Tensor:
    """The convolution as a plan of one layer in the core."""
    from correctnet import _native

    seed, chips = _address(weight, noise)
    stride, padding, dilation, groups = geometry
    plan = _native.Plan("bfloat16" if x.dtype == torch.bfloat16 else "float32", *x.shape[-3:])
    output = plan.conv(
        0,
        _array(weight.permute(0, 2, 3, 1)),
        stride=tuple(stride),
        padding=tuple(padding),
        dilation=tuple(dilation),
        groups=groups,
        noise=_native.LayerNoise(noise.layer, noise.sigma, noise.shift),
        pointwise=_native.Pointwise(shift=None if bias is None else _array(bias)),
    )
    plan.finish(output)
    # One run for all chips where they share their images, and one a chip otherwise.
    runs = [(x, chips)] if x.dim() == 4 else [(images, [chip]) for images, chip in zip(x, chips, strict=True)]
    outputs = []
    for images, samples in runs:
        threads = torch.get_num_threads()
        out, _ = plan.outputs(_array(images), seed=seed & 0xFFFFFFFFFFFFFFFF, samples=samples, threads=threads)
        outputs.append(torch.from_numpy(out).to(x.dtype))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _array(tensor: Tensor) -> np.ndarray:
    """As the core takes it: float32, to which bfloat16 converts exactly, one element after the other."""
    return tensor.detach().float().contiguous().numpy()


# ---- gradients ------------------------------------------------------------------------------------------------------
#
# The gradient of a noisy weight is its factor, so `noisy_weight` of one chip is its own backward pass. Sums over chips
# are taken in float32 at least, and rounded once.


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
    if x_wanted and _kernels_draw(x):
        # One launch for all chips; the noise is drawn again while weights are loaded.
        geometry = Geometry(*ctx.geometry) if ctx.geometry else None
        size = x.shape[-2:] if geometry else (1, 1)
        whole = _on_device(gradient, weight, None, Noise(seed, samples, *ctx.numbers), geometry, size)
        of_x = [_wide(g) if shared else g for g in whole.view(len(samples), *x.shape[-weight.dim() :])]
    for s, chip in enumerate(_single_chips(seed, samples, ctx.numbers)):
        missing = x_wanted and len(of_x) <= s
        noisy = torch.ops.correctnet.noisy_weight(weight, *chip)[0] if missing else weight  # or its shape alone
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
    """Of one chip's layer, with respect to x and to its noisy weights; None, or anything, where it is not wanted."""
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
    """The function of that name as the module has it when it is called: registered once, it may be reloaded."""

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
    """Make the operators known to torch, once a process; after a reload they are the module's new functions."""
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
