"""Arguments of the operators for several chip samples: their types and checks."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from correctnet.noise import core, specification

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
EXTENT = 1 << 31  # the core counts pixels, padding included, in 32 bits


class Noise(NamedTuple):
    """Address and parameters of the noise of one layer on the chips `samples`; see `noisy_linear`.

    Attributes:
        seed: 0-d int64.
        samples: (S,) int64.
        layer, sigma, shift: numbers.
    """

    seed: Tensor
    samples: Tensor
    layer: int
    sigma: float
    shift: float = 0.0


class Geometry(NamedTuple):
    """Geometry of a convolution, in pairs (vertical, horizontal), as in torch."""

    stride: Sequence[int] = (1, 1)
    padding: Sequence[int] = (0, 0)
    dilation: Sequence[int] = (1, 1)
    groups: int = 1


def noise_of(seed: int | Tensor, samples: Sequence[int] | Tensor, layer: int, sigma: float, shift: float) -> Noise:
    """Convert the noise's arguments to those of the operators, which make the remaining checks."""
    if not isinstance(seed, Tensor):
        number = integer("seed", seed, -(1 << 63), (1 << 64) - 1)
        seed = torch.tensor(core.as_int64(number), dtype=torch.int64, device="cpu")
    if not isinstance(samples, Tensor):
        if not isinstance(samples, Iterable) or isinstance(samples, str):
            raise TypeError(f"samples must be a sequence of integers or a tensor, not {samples!r}")
        chips = [integer("samples", s, 0, (1 << 32) - 1) for s in samples]
        samples = torch.tensor(chips, dtype=torch.int64, device="cpu")
    return Noise(seed, samples, integer("layer", layer, 0, (1 << 32) - 1), _real("sigma", sigma), _real("shift", shift))


def integer(name: str, value: Any, low: int = -(1 << 63), high: int = (1 << 63) - 1) -> int:
    """Return `value` as an int. Raises TypeError where it is none, ValueError outside [low, high]."""
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


def pair(name: str, value: Any) -> tuple[int, int]:
    """Return one integer twice, or two integers as a tuple."""
    if not isinstance(value, (tuple, list)):
        value = (value, value)
    if len(value) != 2:
        raise ValueError(f"{name} must be one integer or two, not {value!r}")
    return integer(name, value[0]), integer(name, value[1])


def _check_tensor(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
        raise ValueError(f"{name} must be dense float32, bfloat16 or float64, not {tensor.layout} {tensor.dtype}")
    if tensor.numel() == 0:
        raise ValueError(f"{name} must not be empty: {tuple(tensor.shape)}")


def check_noise(weight: Tensor, noise: Noise) -> None:
    """Check the noise and its weight without reading the values of tensors. Raises ValueError."""
    _check_tensor("weight", weight)
    if weight.dim() < 2:
        raise ValueError(f"weight must be (out, in, ...), not {tuple(weight.shape)}")
    seed, samples, layer, sigma, shift = noise
    if seed.dtype != torch.int64 or seed.dim() != 0:
        raise ValueError(f"seed must be 0-d int64, not {tuple(seed.shape)} {seed.dtype}")
    if samples.dtype != torch.int64 or samples.dim() != 1 or samples.shape[0] == 0:
        raise ValueError(f"samples must be int64, (S,) with S >= 1, not {tuple(samples.shape)} {samples.dtype}")
    specification.address(0, layer, 0, 0, 0, 0)
    specification.log2_scale(sigma, shift)


def check_layer(
    x: Tensor, weight: Tensor, bias: Tensor | None, samples: Tensor, geometry: Geometry | None
) -> list[int]:
    """Return the shape of one chip's result. Raises ValueError where the arguments do not fit together."""
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


def read_address(weight: Tensor, noise: Noise) -> tuple[int, list[int]]:
    """Return the values of seed and samples. Raises ValueError where one is outside its range."""
    seed, chips = int(noise.seed), noise.samples.tolist()
    for chip in (min(chips), max(chips)):
        specification.address(seed, noise.layer, chip, weight.numel(), 0, 0)
    return seed, chips


def check_address(weight: Tensor, noise: Noise) -> None:
    """Check what `read_address` checks, unless seed or samples are on a device.

    To read them there would wait for all of the device's work, and cannot be captured in a CUDA graph. A chip's number
    then counts modulo 2^32.
    """
    if noise.seed.device.type == noise.samples.device.type == "cpu":
        read_address(weight, noise)
