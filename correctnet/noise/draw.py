"""Draw device noise into torch tensors: on the GPU by the CUDA kernels, on the CPU by the C++ core or by numpy.

All three compute the bits of `correctnet.noise.specification`.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from correctnet.noise import arrays, core, device, specification
from correctnet.noise.arrays import ArrayNoise


def lognormal(
    seed: int,
    layer: int,
    sample: int,
    count: int,
    sigma: float,
    shift: float = 0.0,
    start: int = 0,
    purpose: int = 0,
) -> Tensor:
    """Draw the factors exp(sigma z + shift) of elements start, ..., start + count - 1, on as many threads as torch has.

    The fast twin of `specification.lognormal`, which documents the arguments.

    Returns:
        float32, (count,), on the CPU.

    Raises:
        ValueError, UserError: see `specification.lognormal` and `core.status`.
    """
    extension = core.checked()
    if extension is None:
        return torch.from_numpy(specification.lognormal(seed, layer, sample, count, sigma, shift, start, purpose))
    noise = _checked_noise(extension, seed, layer, sample, count, sigma, shift, start, purpose)
    out = torch.empty(count, dtype=torch.float32)
    extension.lognormal(*noise, start, count, out.data_ptr(), torch.get_num_threads())
    return out


def noisy_weight(
    weight: Tensor,
    seed: int | Tensor,
    layer: int,
    sample: int | Tensor,
    sigma: float,
    shift: float = 0.0,
    order: Literal["contiguous", "channels_last"] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Draw weight * exp(sigma z + shift), rounded once from float32: (1) and (2) of the paper at shift 0.

    z of a weight belongs to its position in the order (out, *kernel, in), in any memory order. The result carries no
    gradient: the gradient with respect to `weight` is `noisy_weight` of the gradient with respect to the result.

    Args:
        weight: (out, in, *kernel), floating point. On a GPU the CUDA kernels draw; where they cannot be used, the
            factors are made on the CPU and copied to the GPU.
        seed, layer, sample, sigma, shift: see `specification.lognormal`. Seed and sample may be 0-d int64 tensors; on a
            GPU those are read when the kernel runs, so that a CUDA graph can be replayed with other values.
        order: memory order of the result, that of `weight` by default. "channels_last" requires four dimensions.
        dtype: of the result, that of `weight` by default.

    Returns:
        The shape and device of `weight`.

    Raises:
        ValueError, UserError: an argument is outside its range, and see `core.status`.
    """
    if weight.dim() < 2 or not weight.is_floating_point():
        raise ValueError(f"weight must be floating point, (out, in, ...), not {weight.dtype} {tuple(weight.shape)}")
    if order is None:
        contiguous = weight.dim() != 4 or not weight.is_contiguous(memory_format=torch.channels_last)
        order = "contiguous" if weight.is_contiguous() or contiguous else "channels_last"
    if order not in ("contiguous", "channels_last") or (order == "channels_last" and weight.dim() != 4):
        raise ValueError(f"order must be 'contiguous', or 'channels_last' in four dimensions, not {order!r}")
    dtype = weight.dtype if dtype is None else dtype
    layout = torch.channels_last if order == "channels_last" else torch.contiguous_format
    weight = weight.detach().float().contiguous(memory_format=layout)
    out, channels, *kernel = weight.shape

    extension = core.checked()
    if weight.device.type != "cpu" and device.reaches(weight.device):
        rounded = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        if not isinstance(seed, Tensor) and not isinstance(sample, Tensor):
            specification.address(seed, layer, sample, weight.numel(), 0, 0)
        address = device.on_device(seed, weight.device), device.on_device(sample, weight.device).view(1), layer
        return device.noisy_weight(weight, *address, sigma, shift, rounded)[0].to(dtype)
    seed, sample = int(seed), int(sample)
    if extension is None or weight.device.type != "cpu":
        flat = lognormal(seed, layer, sample, weight.numel(), sigma, shift).to(weight.device)
        factor = flat.view(out, *kernel, channels).movedim(-1, 1)
        noisy = weight * factor
        if dtype == torch.bfloat16:  # as the core rounds: subnormal numbers are zeros
            noisy = torch.where(noisy.abs() < torch.finfo(torch.float32).tiny, 0 * noisy, noisy)
        return noisy.to(dtype).contiguous(memory_format=layout)
    noise = _checked_noise(extension, seed, layer, sample, weight.numel(), sigma, shift)
    bfloat16 = dtype == torch.bfloat16
    result = torch.empty_like(weight, dtype=torch.bfloat16 if bfloat16 else torch.float32)
    extension.noisy_weight(
        *noise,
        rows=out,
        taps=weight[0, 0].numel() if out and channels else 1,
        channels=channels,
        channels_last=order == "channels_last",
        weight=weight.data_ptr(),
        out=result.data_ptr(),
        bfloat16=bfloat16,
        threads=torch.get_num_threads(),
    )
    return result.to(dtype)


def programmed(noise: ArrayNoise, seed: int, layer: int, sample: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw a chip's weights whose noise arrays describe, rounded once from float32.

    The fast twin of `correctnet.noise.arrays.programmed`. The result carries no gradient.

    Args:
        noise: of the layer.
        seed, layer, sample: see `specification.words`.
        dtype: of the result.

    Returns:
        The shape and device of `noise.mean`, contiguous.

    Raises:
        ValueError, UserError: an argument is outside its range, and see `core.status`.
    """
    extension, place = core.checked(), noise.mean.device
    specification.address(seed, layer, sample, noise.mean.numel(), 0, 0)
    bfloat16 = dtype == torch.bfloat16
    if noise.mean.numel() == 0:
        return noise.mean.to(dtype)
    if place.type != "cpu" and device.reaches(place):
        address = device.on_device(seed, place), device.on_device([sample], place), layer
        drawn = device.programmed(noise, *address, torch.bfloat16 if bfloat16 else torch.float32)[0]
        return drawn.to(dtype).contiguous()
    if extension is None or place.type != "cpu":
        drawn = torch.from_numpy(arrays.programmed(noise, seed, layer, sample)).to(place)
        if bfloat16:  # as the core rounds: subnormal numbers are zeros
            drawn = torch.where(drawn.abs() < torch.finfo(torch.float32).tiny, 0 * drawn, drawn)
        return drawn.movedim(-1, 1).to(dtype).contiguous()
    mean, spread = arrays.in_order(noise.mean), arrays.in_order(noise.spread)
    out = torch.empty(mean.shape, dtype=torch.bfloat16 if bfloat16 else torch.float32)
    rows, *kernel, channels = mean.shape
    reach = None if noise.reach is None else noise.reach.contiguous()  # kept as long as the core reads it
    extension.noisy_weight(
        core.array_noise(layer, noise),
        seed & 0xFFFFFFFFFFFFFFFF,
        sample,
        rows=rows,
        taps=math.prod(kernel),
        channels=channels,
        channels_last=True,
        weight=mean.data_ptr(),
        out=out.data_ptr(),
        bfloat16=bfloat16,
        threads=torch.get_num_threads(),
        spread=spread.data_ptr(),
        reach=0 if reach is None else reach.data_ptr(),
    )
    return out.movedim(-1, 1).to(dtype).contiguous()


def _checked_noise(
    extension: ModuleType,
    seed: int,
    layer: int,
    sample: int,
    count: int,
    sigma: float,
    shift: float,
    start: int = 0,
    purpose: int = 0,
) -> tuple[object, int, int]:
    """The extension's first arguments: noise of the layer, seed and sample. Raises ValueError outside their ranges."""
    specification.log2_scale(sigma, shift)
    (low, high), _ = specification.address(seed, layer, sample, count, start, purpose)
    return extension.Noise(layer, sigma, shift, purpose), low | high << 32, sample
