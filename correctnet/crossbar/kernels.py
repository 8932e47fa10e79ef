"""Layers on several chip samples: by the CUDA kernels, by a plan of one layer in the C++ core, or by torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from correctnet.crossbar.arguments import Geometry, Noise, check_address, read_address
from correctnet.noise import core, draw
from correctnet.noise import device as gpu


def on_cuda(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    noise: Noise,
    geometry: Geometry | None,
    size: Sequence[int] | None = None,
) -> Tensor:
    """Compute a layer, or with `size` (of its input) the gradient with respect to its input, by the CUDA kernels."""
    if geometry is None:
        x, weight, geometry = x[..., None, None], weight[..., None, None], Geometry()
    return convolve(x, weight, bias, *noise, geometry, size)


def kernels_draw(tensor: Tensor) -> bool:
    """Return whether the CUDA kernels compute layers of such tensors."""
    return gpu.reaches(tensor.device) and tensor.dtype != torch.float64


def drawn_on_device(weight: Tensor, noise: Noise) -> Tensor:
    """Draw `chip_weights` on the device, (S, *weight.shape), in one launch."""
    check_address(weight, noise)
    return gpu.noisy_weight(weight.contiguous(), *noise)


def chip_weights(weight: Tensor, noise: Noise) -> Iterator[Tensor]:
    """Yield each chip's weights, (1) and (2) of the paper, in the dtype of `weight`; the factors are float32."""
    if kernels_draw(weight):
        yield from drawn_on_device(weight, noise)
        return
    seed, chips = read_address(weight, noise)
    for chip in chips:
        address = seed, noise.layer, chip, noise.sigma, noise.shift
        if weight.dtype == torch.float64:
            yield weight * draw.noisy_weight(torch.ones_like(weight, dtype=torch.float32), *address)
        else:
            yield draw.noisy_weight(weight, *address, order="contiguous")


def fused(x: Tensor, weight: Tensor, bias: Tensor | None, noise: Noise, geometry: Geometry) -> Tensor:
    """Compute a convolution as a plan of one layer in the C++ core."""
    seed, chips = read_address(weight, noise)
    stride, padding, dilation, groups = geometry
    plan = core.extension.Plan("bfloat16" if x.dtype == torch.bfloat16 else "float32", *x.shape[-3:])
    output = plan.conv(
        0,
        _array(weight.permute(0, 2, 3, 1)),
        stride=tuple(stride),
        padding=tuple(padding),
        dilation=tuple(dilation),
        groups=groups,
        noise=core.layer_noise(noise.layer, noise.sigma, noise.shift),
        pointwise=core.extension.Pointwise(shift=None if bias is None else _array(bias)),
    )
    plan.finish(output)
    # One run for all chips where they share their images, otherwise one run a chip.
    runs = [(x, chips)] if x.dim() == 4 else [(images, [chip]) for images, chip in zip(x, chips, strict=True)]
    outputs = []
    for images, samples in runs:
        threads = torch.get_num_threads()
        out, _ = plan.outputs(_array(images), seed=seed & 0xFFFFFFFFFFFFFFFF, samples=samples, threads=threads)
        outputs.append(torch.from_numpy(out).to(x.dtype))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _array(tensor: Tensor) -> np.ndarray:
    """Return a tensor as the core reads it: contiguous float32, to which bfloat16 converts exactly."""
    return tensor.detach().float().contiguous().numpy()


def each_chip(x: Tensor, weights: Iterable[Tensor], bias: Tensor | None, geometry: Geometry | None) -> Tensor:
    """Compute a layer by torch, given the weights of each chip."""
    outputs = []
    with contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
        for s, weight in enumerate(weights):
            own = x if x.dim() == weight.dim() else x[s]
            outputs.append(F.linear(own, weight, bias) if geometry is None else F.conv2d(own, weight, bias, *geometry))
    return torch.stack(outputs).contiguous()


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor,
    samples: Tensor,
    layer: int,
    sigma: float,
    shift: float,
    geometry: Sequence[Any],
    size: Sequence[int] | None = None,
) -> Tensor:
    """Compute a convolution on many chips in one launch, or its gradient with respect to the input.

    Args:
        x: (N, C, H, W), shared by all chips, or (S, N, C, H, W); float32 or bfloat16. With `size`, the gradient of the
            output, (S, N, O, H', W').
        weight: nominal weights (O, C / groups, kh, kw), in the dtype of x; a linear layer's with two dimensions of 1.
        bias: (O,) or None; None with `size`.
        seed, samples, layer, sigma, shift: see `correctnet.noise.device.noisy_weight`.
        geometry: stride, padding, dilation (pairs) and groups.
        size: (H, W) of the input, for the gradient.

    Returns:
        (S, N, O, H', W'), or with `size` (S, N, C, H, W); the dtype of x.

    Raises:
        UserError: the device runs out of memory.
        ValueError: more pixels at once than the kernels can index.
    """
    stride, padding, dilation, groups = geometry
    outputs, inputs, *kernel = weight.shape
    shared = x.dim() == 4
    what = "convolution", f"memory left for {x.shape[-4]} images on {len(samples)} chips"
    with gpu.memory_errors(*what):
        pixels = _aligned(x.movedim(-3, -1).contiguous())  # (..., H, W, C)
    height, width = x.shape[-2:] if size is None else size
    if size is None:
        reach = [
            n + 2 * p - d * (k - 1) - 1 for n, p, d, k in zip((height, width), padding, dilation, kernel, strict=True)
        ]
        out = (*(r // s + 1 for r, s in zip(reach, stride, strict=True)), outputs)
    else:
        out = (height, width, inputs * groups)
    chips = gpu.on_device(samples, x.device).to(torch.uint32)
    seed = gpu.on_device(seed, x.device)
    added = None if bias is None else bias.detach().float().contiguous()
    with gpu.memory_errors(*what):
        nominal = _aligned(weight.detach().float().permute(0, 2, 3, 1).contiguous())
        y = torch.empty(len(chips), x.shape[-4], *out, dtype=x.dtype, device=x.device)
    gpu.kernels().convolve(
        precision="bfloat16" if x.dtype == torch.bfloat16 else "float32",
        x=pixels.data_ptr(),
        x_shared=shared,
        weight=nominal.data_ptr(),
        channels_last=True,
        y=y.data_ptr(),
        images=x.shape[-4],
        channels=inputs * groups,
        outputs=outputs,
        size=(height, width),
        kernel=tuple(kernel),
        stride=tuple(stride),
        padding=tuple(padding),
        dilation=tuple(dilation),
        groups=groups,
        shift=0 if added is None else added.data_ptr(),
        seed=seed.data_ptr(),
        samples=chips.data_ptr(),
        sample_count=len(chips),
        noise=core.layer_noise(layer, sigma, shift),
        backward=size is not None,
        device=gpu.number(x.device),
        cuda_stream=gpu.stream(x.device),
    )
    with gpu.memory_errors(*what):
        return y.movedim(-1, 2).contiguous()


def _aligned(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy where its first element is not aligned to 16 bytes, the width of a kernel's load."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
