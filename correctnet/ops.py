"""Linear and convolutional layers on many chip samples, as PyTorch operators.

y = noisy_linear(x, weight, bias, seed=0, layer=3, sigma=0.5, samples=range(8))       # (8, N, out)

Three operators, `torch.ops.correctnet.noisy_weight`, `.noisy_linear` and `.noisy_conv2d`, known to autograd and to
torch.compile: seed and samples are tensors in them, so that another seed or other chips do not compile again. Nothing
random is stored for the backward pass: the noise is a function of its address (`correctnet.reference`), so it is drawn
again.

On the CPU, in float32 and bfloat16, the C++ core computes the layers (csrc/engine.h) and draws the weights of a chip
while it packs them, panel by panel; no noisy weight tensor ever exists. Elsewhere the weights of a chip are drawn as a
tensor and torch multiplies.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from correctnet import native, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
EXTENT = 1 << 31  # the core counts pixels, padding included, in 32 bits

_NOISE = "Tensor seed, Tensor samples, int layer, float sigma, float shift"
_LAYER = f"Tensor x, Tensor weight, Tensor? bias, {_NOISE}=0."
_GEOMETRY = "int[2] stride=1, int[2] padding=0, int[2] dilation=1, int groups=1"
torch.library.define("correctnet::noisy_weight", f"(Tensor weight, {_NOISE}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
torch.library.define("correctnet::noisy_linear", f"({_LAYER}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
torch.library.define("correctnet::noisy_conv2d", f"({_LAYER}, {_GEOMETRY}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


class Geometry(NamedTuple):
    """Of a convolution, (vertical, horizontal); as in torch."""

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
    and (2) of the paper at shift 0. The bias is digital. The result is differentiable in x, weight and bias.

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
    _check_types(x, weight, bias)
    if not _needs_gradient(x, weight, bias):
        return torch.ops.correctnet.noisy_linear(x, weight, bias, *noise)
    _check_linear(x, weight, bias, noise[1])
    weights = torch.ops.correctnet.noisy_weight(weight, *noise)
    return _each_chip(functools.partial(F.linear, bias=bias), x, weights, x.dim() == 2)


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
    geometry = Geometry(
        _pair("stride", stride), _pair("padding", padding), _pair("dilation", dilation), _integer("groups", groups)
    )
    _check_types(x, weight, bias)
    if not _needs_gradient(x, weight, bias):
        return torch.ops.correctnet.noisy_conv2d(x, weight, bias, *noise, *geometry)
    _check_conv2d(x, weight, bias, noise[1], geometry)
    weights = torch.ops.correctnet.noisy_weight(weight, *noise)
    return _each_chip(_convolution(bias, geometry), x, weights, x.dim() == 4)


def _needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether to let torch multiply, by weights made once, because a backward pass follows.

    By measurement (one chip, one core, batch 128, float32): a training step of VGG's 128 -> 128 convolution at 16 x 16
    takes TODO ms this way and TODO ms through the fused operator, LeNet-5's second convolution TODO and TODO ms. The
    backward pass wants the noisy weights anyway, and the core's layout of images costs two transpositions a layer.
    """
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _each_chip(
    multiply: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: Iterable[Tensor], shared: bool
) -> Tensor:
    """multiply(x, weights of a chip) for all chips, by torch in the dtype of x."""
    with _no_autocast(x):
        return torch.stack([multiply(x if shared else x[s], w) for s, w in enumerate(weights)])


def _convolution(bias: Tensor | None, geometry: Geometry) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, weight: F.conv2d(x, weight, bias, *geometry)


def _no_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


# ---- arguments ------------------------------------------------------------------------------------------------------


def _noise(
    seed: int | Tensor, samples: Sequence[int] | Tensor, layer: int, sigma: float, shift: float
) -> tuple[Tensor, Tensor, int, float, float]:
    """The noise's arguments as the operators take them."""
    if not isinstance(seed, Tensor):
        number = _integer("seed", seed, -(1 << 63), (1 << 64) - 1)
        seed = torch.tensor(number - (1 << 64) if number >= 1 << 63 else number, dtype=torch.int64, device="cpu")
    if not isinstance(samples, Tensor):
        if isinstance(samples, (str, bytes)) or not isinstance(samples, Iterable):
            raise TypeError(f"samples must be a sequence of integers or a tensor, not {samples!r}")
        numbers = [_integer("samples", s, 0, (1 << 32) - 1) for s in samples]
        samples = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    layer = _integer("layer", layer, 0, (1 << 32) - 1)
    return seed, samples, layer, _real("sigma", sigma), _real("shift", shift)


def _integer(name: str, value: Any, low: int = -(1 << 63), high: int = (1 << 63) - 1) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {value!r}") from None
    if not low <= number <= high:
        raise ValueError(f"{name} must be between {low} and {high}, not {number}")
    return number


def _real(name: str, value: Any) -> float:
    if isinstance(value, (str, Tensor)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a real number, not {value!r}")
    return float(value)


def _pair(name: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, (tuple, list)):
        value = (value, value)
    if len(value) != 2:
        raise ValueError(f"{name} must be one number or two, not {value!r}")
    return _integer(name, value[0]), _integer(name, value[1])


def _check_types(x: Any, weight: Any, bias: Any) -> None:
    for name, value in (("x", x), ("weight", weight), ("bias", bias)):
        if not isinstance(value, Tensor) and not (name == "bias" and value is None):
            raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")


def _check_noise(weight: Tensor, seed: Tensor, samples: Tensor, layer: int, sigma: float, shift: float) -> None:
    """Raises ValueError where an argument of the noise, or the weight that it is for, cannot be used."""
    _check_tensor("weight", weight)
    if weight.dim() < 2:
        raise ValueError(f"weight must be (out, in, ...), not {tuple(weight.shape)}")
    if seed.dtype != torch.int64 or seed.dim() != 0:
        raise ValueError(f"seed must be a 0-d int64 tensor, not {seed.dtype} {tuple(seed.shape)}")
    if samples.dtype != torch.int64 or samples.dim() != 1 or samples.shape[0] == 0:
        raise ValueError(f"samples must be int64, (S,) with S >= 1, not {samples.dtype} {tuple(samples.shape)}")
    reference.address(0, layer, 0, 0, 0, 0)
    reference.log2_scale(sigma, shift)


def _check_tensor(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
        raise ValueError(f"{name} must be dense float32, bfloat16 or float64, not {tensor.layout} {tensor.dtype}")
    if tensor.numel() == 0:
        raise ValueError(f"{name} is empty: {tuple(tensor.shape)}")


def _check_layer(x: Tensor, weight: Tensor, bias: Tensor | None, samples: Tensor, axes: str, groups: int) -> None:
    """What linear layers and convolutions have in common. `axes` are those of a batch, for messages."""
    others = [("x", x), ("weight", weight)] + ([] if bias is None else [("bias", bias)])
    for name, tensor in others:
        _check_tensor(name, tensor)
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f"{name} must be of the dtype and on the device of x, {x.dtype} on {x.device}, "
                f"not {tensor.dtype} on {tensor.device}"
            )
    dims = axes.count(",") + 1
    if weight.dim() != dims:
        raise ValueError(f"weight must have {dims} dimensions, not {tuple(weight.shape)}")
    if x.dim() not in (dims, dims + 1):
        raise ValueError(f"x must be ({axes}) or (S, {axes}), not {tuple(x.shape)}")
    if x.dim() == dims + 1 and samples.dim() == 1 and x.shape[0] != samples.shape[0]:
        raise ValueError(f"x holds {x.shape[0]} batches, one for each chip, but samples {samples.shape[0]} chips")
    channels = x.shape[x.dim() - dims + 1]
    if channels != groups * weight.shape[1]:
        raise ValueError(
            f"x must have {groups * weight.shape[1]} channels (or features) to fit weight {tuple(weight.shape)}, "
            f"not {channels}"
        )
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        raise ValueError(f"bias must be ({weight.shape[0]},) to fit weight, not {tuple(bias.shape)}")


def _check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, samples: Tensor) -> list[int]:
    """The shape of a result for one chip. Raises ValueError where the tensors do not fit together."""
    _check_layer(x, weight, bias, samples, "N, in", groups=1)
    return [x.shape[-2], weight.shape[0]]


def _check_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, samples: Tensor, geometry: Geometry) -> list[int]:
    """As `_check_linear`."""
    stride, padding, dilation, groups = geometry
    for name, pair, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(pair) != 2 or min(pair) < least:
            raise ValueError(f"{name} must be two integers >= {least}, not {tuple(pair)}")
    if groups < 1 or weight.dim() == 4 and weight.shape[0] % groups:
        raise ValueError(f"groups must be a divisor of the {weight.shape[0]} outputs of weight, not {groups}")
    _check_layer(x, weight, bias, samples, "N, C, H, W", groups)
    shape = [x.shape[-4], weight.shape[0]]
    for i in range(2):
        size, kernel = x.shape[i - 2], weight.shape[i + 2]
        if size + 2 * padding[i] + dilation[i] * kernel + stride[i] >= EXTENT:
            raise ValueError(
                f"stride {stride[i]}, padding {padding[i]} and dilation {dilation[i]} reach beyond 2^31 pixels"
            )
        span = size + 2 * padding[i] - dilation[i] * (kernel - 1) - 1
        if span < 0:
            raise ValueError(
                f"weight: a kernel of {kernel} at dilation {dilation[i]} is larger than x with its padding, "
                f"{size} + 2 * {padding[i]}"
            )
        shape.append(span // stride[i] + 1)
    return shape


# ---- operators ------------------------------------------------------------------------------------------------------


@torch.library.impl("correctnet::noisy_weight", "default")
def _(weight: Tensor, seed: Tensor, samples: Tensor, layer: int, sigma: float, shift: float) -> Tensor:
    """(S, *weight.shape): the weights of each chip."""
    _check_noise(weight, seed, samples, layer, sigma, shift)
    number, chips = _address(weight, seed, samples, layer)
    return torch.stack([_chip_weight(weight, number, layer, chip, sigma, shift) for chip in chips])


@torch.library.register_fake("correctnet::noisy_weight")
def _(weight: Tensor, seed: Tensor, samples: Tensor, layer: int, sigma: float, shift: float) -> Tensor:
    _check_noise(weight, seed, samples, layer, sigma, shift)
    return weight.new_empty([samples.shape[0], *weight.shape])


@torch.library.impl("correctnet::noisy_linear", "default")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor,
    samples: Tensor,
    layer: int,
    sigma: float,
    shift: float = 0.0,
) -> Tensor:
    _check_noise(weight, seed, samples, layer, sigma, shift)
    shape = _check_linear(x, weight, bias, samples)
    number, chips = _address(weight, seed, samples, layer)
    if _core_computes(x):
        # On one pixel the elements of a convolution count as those of a linear layer.
        images, kernel = x[..., None, None], weight[..., None, None]
        return _fused(images, kernel, bias, number, chips, layer, sigma, shift, Geometry()).view(-1, *shape)
    weights = (_chip_weight(weight, number, layer, chip, sigma, shift) for chip in chips)
    return _each_chip(functools.partial(F.linear, bias=bias), x, weights, x.dim() == 2)


@torch.library.register_fake("correctnet::noisy_linear")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor,
    samples: Tensor,
    layer: int,
    sigma: float,
    shift: float = 0.0,
) -> Tensor:
    _check_noise(weight, seed, samples, layer, sigma, shift)
    return x.new_empty([samples.shape[0], *_check_linear(x, weight, bias, samples)])


@torch.library.impl("correctnet::noisy_conv2d", "default")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor,
    samples: Tensor,
    layer: int,
    sigma: float,
    shift: float = 0.0,
    *geometry: Any,
) -> Tensor:
    geometry = Geometry(*geometry)
    _check_noise(weight, seed, samples, layer, sigma, shift)
    _check_conv2d(x, weight, bias, samples, geometry)
    number, chips = _address(weight, seed, samples, layer)
    if _core_computes(x):
        return _fused(x, weight, bias, number, chips, layer, sigma, shift, geometry)
    weights = (_chip_weight(weight, number, layer, chip, sigma, shift) for chip in chips)
    return _each_chip(_convolution(bias, geometry), x, weights, x.dim() == 4)


@torch.library.register_fake("correctnet::noisy_conv2d")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor,
    samples: Tensor,
    layer: int,
    sigma: float,
    shift: float = 0.0,
    *geometry: Any,
) -> Tensor:
    _check_noise(weight, seed, samples, layer, sigma, shift)
    return x.new_empty([samples.shape[0], *_check_conv2d(x, weight, bias, samples, Geometry(*geometry))])


def _address(weight: Tensor, seed: Tensor, samples: Tensor, layer: int) -> tuple[int, list[int]]:
    """The values of seed and samples. Raises ValueError where one is outside its range."""
    number, chips = int(seed), samples.tolist()
    for chip in (min(chips), max(chips)):
        reference.address(number, layer, chip, weight.numel(), 0, 0)
    return number, chips


def _chip_weight(weight: Tensor, seed: int, layer: int, sample: int, sigma: float, shift: float) -> Tensor:
    """(1) and (2) of the paper in the dtype of `weight`; the factors are float32 in any dtype."""
    if weight.dtype == torch.float64:
        ones = torch.ones_like(weight, dtype=torch.float32)
        return weight * native.noisy_weight(ones, seed, layer, sample, sigma, shift)
    return native.noisy_weight(weight, seed, layer, sample, sigma, shift, order="contiguous")


def _core_computes(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype != torch.float64 and native.status().built


def _fused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: int,
    chips: list[int],
    layer: int,
    sigma: float,
    shift: float,
    geometry: Geometry,
) -> Tensor:
    """The convolution as a plan of one layer in the core."""
    from correctnet import _native

    def array(tensor: Tensor) -> Any:
        return tensor.detach().float().contiguous().numpy()

    stride, padding, dilation, groups = geometry
    plan = _native.Plan(str(x.dtype).removeprefix("torch."), *x.shape[-3:])
    output = plan.conv(
        0,
        array(weight.permute(0, 2, 3, 1)),
        stride=tuple(stride),
        padding=tuple(padding),
        dilation=tuple(dilation),
        groups=groups,
        noise=_native.LayerNoise(layer, sigma, shift),
        pointwise=_native.Pointwise(shift=None if bias is None else array(bias)),
    )
    plan.finish(output)

    def run(images: Tensor, samples: list[int]) -> Tensor:
        seed_bits = seed & 0xFFFFFFFFFFFFFFFF
        outputs, _ = plan.outputs(array(images), seed=seed_bits, samples=samples, threads=torch.get_num_threads())
        return torch.from_numpy(outputs).to(x.dtype)

    if x.dim() == 4:
        return run(x, chips)
    return torch.cat([run(images, [chip]) for images, chip in zip(x, chips, strict=True)])


# ---- gradients ------------------------------------------------------------------------------------------------------
#
# Of the noise itself the gradient is the factor, so that `noisy_weight` of one chip is its own backward pass. Sums over
# chips are taken in float32 at least.


def _weight_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, samples, *ctx.noise = inputs
    ctx.save_for_backward(seed, samples)


def _weight_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    seed, samples = ctx.saved_tensors
    parts = [_times_factor(g, seed, samples, s, ctx.noise) for s, g in enumerate(gradient)]
    return _sum(parts, gradient.dtype), None, None, None, None, None


def _times_factor(weight: Tensor, seed: Tensor, samples: Tensor, chip: int, noise: list[Any]) -> Tensor:
    """`weight` times the factors of one of the chips, in float32 at least."""
    return torch.ops.correctnet.noisy_weight(_wide(weight), seed, samples[chip : chip + 1], *noise)[0]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _sum(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    return functools.reduce(torch.add, parts).to(dtype)


def _layer_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, seed, samples, layer, sigma, shift, *geometry = inputs
    ctx.noise, ctx.geometry = [layer, sigma, shift], geometry
    ctx.save_for_backward(x, weight, seed, samples)


def _layer_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, seed, samples = ctx.saved_tensors
    wants_x, wants_weight, wants_bias, *_ = ctx.needs_input_grad
    shared = x.dim() == weight.dim()
    of_x, of_weight = [], []
    with _no_autocast(x):
        for s, g in enumerate(gradient):
            noisy = weight
            if wants_x:
                noisy = torch.ops.correctnet.noisy_weight(weight, seed, samples[s : s + 1], *ctx.noise)[0]
            dx, dw = _gradients(g, x if shared else x[s], noisy, wants_x, wants_weight, ctx.geometry)
            if wants_x:
                of_x.append(_wide(dx) if shared else dx)
            if wants_weight:
                of_weight.append(_times_factor(dw, seed, samples, s, ctx.noise))
    dx = dw = db = None
    if wants_x:
        dx = _sum(of_x, x.dtype) if shared else torch.stack(of_x)
    if wants_weight:
        dw = _sum(of_weight, weight.dtype)
    if wants_bias:
        db = gradient.sum([i for i in range(gradient.dim()) if i != 2])
    return dx, dw, db, *[None] * (5 + len(ctx.geometry))


def _gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, wants_x: bool, wants_weight: bool, geometry: Sequence[Any]
) -> tuple[Tensor | None, Tensor | None]:
    """Those of one chip's layer with respect to x and to its noisy weights."""
    if not geometry:
        return gradient @ weight if wants_x else None, gradient.mT @ x if wants_weight else None
    stride, padding, dilation, groups = geometry
    return torch.ops.aten.convolution_backward(
        gradient, x, weight, None, stride, padding, dilation, False, [0, 0], groups, [wants_x, wants_weight, False]
    )[:2]


torch.library.register_autograd("correctnet::noisy_weight", _weight_backward, setup_context=_weight_context)
torch.library.register_autograd("correctnet::noisy_linear", _layer_backward, setup_context=_layer_context)
torch.library.register_autograd("correctnet::noisy_conv2d", _layer_backward, setup_context=_layer_context)
