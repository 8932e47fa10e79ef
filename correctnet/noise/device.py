"""Load the CUDA kernels, report whether they can be used, and draw noise on the GPU.

The kernels are part of `correctnet._native`, built where nvcc is found (csrc/cuda). The noise is that of the CPU, bit
for bit. All work goes to torch's current stream, into memory that torch allocated, without waiting for the device;
seeds and chip numbers are read from device memory, so that a CUDA graph can be replayed with other values.

Where the kernels were not built or cannot run on the device, torch computes everything, with a warning
(`correctnet.evaluation.montecarlo.EngineWarning`).
"""

from __future__ import annotations

import contextlib
import functools
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from correctnet.errors import UserError
from correctnet.noise import core, specification
from correctnet.noise.arrays import ArrayNoise, in_order


@dataclass(frozen=True)
class Status:
    """State of the CUDA kernels.

    Attributes:
        built: whether the C++ core contains them.
        usable: whether they run on torch's current CUDA device.
        architectures: those that they were compiled for, in CMake's notation ("80-real, 90").
        reason: why they are usable or not, or what to do about it, in one line.
    """

    built: bool
    usable: bool
    architectures: str
    reason: str


def status() -> Status:
    """Report whether the CUDA kernels can be used, and why."""
    loaded = kernels()
    if loaded is None:
        return Status(
            False,
            False,
            "",
            "the CUDA kernels were not built: no nvcc when correctnet was installed, or CORRECTNET_CUDA was 0",
        )
    built = loaded.architectures
    if loaded.device_type == "cuda" and not torch.cuda.is_available():
        return Status(True, False, built, "torch sees no CUDA device")
    index = torch.cuda.current_device() if loaded.device_type == "cuda" else 0
    problem = _problem(index)
    return Status(True, problem is None, built, problem or f"compiled for {built}")


def _problem(index: int) -> str | None:
    """Explain why the kernels cannot run on a device, in one line, or None."""
    problem = _refusal(index)
    if problem is None and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        problem = _other_bits(index)
    return problem


@functools.cache
def _refusal(index: int) -> str | None:
    """The CUDA runtime's objection to a device, or None; cached, since asking takes longer than a small layer."""
    return kernels().problem(index)


@functools.cache
def _other_bits(index: int) -> str | None:
    """Explain why the kernels' noise on a device is not that of the specification, in one line, or None.

    Raises:
        UserError: the device has no memory left for a few numbers.
    """
    device = torch.device(kernels().device_type, index if kernels().device_type == "cuda" else None)
    (seed, layer, sample, purpose, sigma, shift, start), _, count, crc = core.KNOWN_FACTORS[0]
    assert purpose == start == 0, "the kernels' noise begins with element 0 and has no other purpose"
    with memory_errors("known answers", "memory left for a few numbers"):
        ones = torch.ones(1, count, device=device)
    factors = noisy_weight(ones, on_device(seed, device), on_device([sample], device), layer, sigma, shift).cpu()
    if zlib.crc32(factors.numpy().astype("<f4").tobytes()) == crc:
        return None
    return (
        "the CUDA kernels compute other bits than specified: they were built with flags that change arithmetic; "
        "install correctnet again without CUDAFLAGS, NVCC_APPEND_FLAGS, CXXFLAGS and CMAKE_ARGS"
    )


def reaches(device: torch.device) -> bool:
    """Return whether the kernels compute on tensors of `device`."""
    loaded = kernels()
    if loaded is None or device.type != loaded.device_type:
        return False
    return (device.type != "cuda" or torch.cuda.is_available()) and _problem(number(device)) is None


def number(device: torch.device) -> int:
    """Return a device's index; that of torch's current device for "cuda" without one."""
    if device.index is not None:
        return device.index
    return torch.cuda.current_device() if device.type == "cuda" else 0


def kernels() -> ModuleType | None:
    """Return the extension's CUDA module, or None. Its `device_type` is "cpu" in a build that models the device."""
    return getattr(core.loaded(), "cuda", None)


@contextlib.contextmanager
def memory_errors(where: str, what: str) -> Iterator[None]:
    """Turn out-of-memory errors, of torch or of the kernels, into a UserError."""
    try:
        yield
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        raise UserError(
            f"{where}: the device has no {what}; allow less memory, take fewer images or chips at once, or free what "
            "torch keeps in reserve: torch.cuda.empty_cache()"
        ) from error


def noisy_weight(
    weight: Tensor,
    seed: Tensor,
    samples: Tensor,
    layer: int,
    sigma: float,
    shift: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Draw weight * exp(sigma z + shift) for each chip: the twin of `draw.noisy_weight` for tensors on the device.

    Args:
        weight: (out, in, *kernel), float32 or bfloat16, contiguous or channels_last.
        seed, samples: () and (S,) int64, on any device.
        layer, sigma, shift: see `draw.noisy_weight`.
        dtype: of the result, float32 or bfloat16; that of `weight` by default.

    Returns:
        (S, *weight.shape) in the memory order of `weight`, rounded once from float32.

    Raises:
        UserError: the device runs out of memory.
    """
    specification.log2_scale(sigma, shift)
    dtype = weight.dtype if dtype is None else dtype
    last = weight.dim() == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
    order = torch.channels_last if last else torch.contiguous_format
    chips = on_device(samples, weight.device).to(torch.uint32)
    seed = on_device(seed, weight.device)
    out, inputs, *kernel = weight.shape
    taps = math.prod(kernel)
    shape = (len(chips), out, *kernel, inputs) if last else (len(chips), *weight.shape)
    with memory_errors("noisy weights", f"memory left for those of {len(chips)} chips"):
        nominal = weight.detach().float().contiguous(memory_format=order)
        result = torch.empty(shape, dtype=dtype, device=weight.device)
    kernels().noisy_weight(
        weight=nominal.data_ptr(),
        out=result.data_ptr(),
        bfloat16=dtype == torch.bfloat16,
        rows=out,
        taps=taps,
        channels=inputs,
        channels_last=last,
        seed=seed.data_ptr(),
        samples=chips.data_ptr(),
        sample_count=len(chips),
        noise=core.layer_noise(layer, sigma, shift),
        device=number(weight.device),
        stream=stream(weight.device),
    )
    return result.movedim(-1, 2) if last else result


def programmed(
    noise: ArrayNoise, seed: Tensor, samples: Tensor, layer: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Draw each chip's weights from arrays: the twin of `draw.programmed` for tensors on the device.

    Args:
        noise: of the layer, on the device.
        seed, samples: () and (S,) int64, on any device.
        layer: see `draw.programmed`.
        dtype: of the result, float32 or bfloat16.

    Returns:
        (S, *noise.mean.shape), rounded once from float32.

    Raises:
        UserError: the device runs out of memory.
    """
    place = noise.mean.device
    chips = on_device(samples, place).to(torch.uint32)
    seed = on_device(seed, place)
    with memory_errors("noisy weights", f"memory left for those of {len(chips)} chips"):
        mean, spread = in_order(noise.mean), in_order(noise.spread)
        result = torch.empty((len(chips), *mean.shape), dtype=dtype, device=place)
    rows, *kernel, channels = mean.shape
    reach = None if noise.reach is None else noise.reach.contiguous()
    kernels().noisy_weight(
        weight=mean.data_ptr(),
        out=result.data_ptr(),
        bfloat16=dtype == torch.bfloat16,
        rows=rows,
        taps=math.prod(kernel),
        channels=channels,
        channels_last=True,
        seed=seed.data_ptr(),
        samples=chips.data_ptr(),
        sample_count=len(chips),
        noise=core.array_noise(layer, noise),
        device=number(place),
        stream=stream(place),
        spread=spread.data_ptr(),
        reach=0 if reach is None else reach.data_ptr(),
    )
    return result.movedim(-1, 2)


def on_device(numbers: int | Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """Put a seed or chip numbers on the device, as int64 or in the tensor's own dtype.

    Tensors on the device are returned unchanged. Others are written by a kernel or copied from pinned memory: a copy
    from pageable memory would wait for all work queued on the device.
    """
    if isinstance(numbers, int):
        return torch.full((), core.as_int64(numbers), dtype=torch.int64, device=device)
    if not isinstance(numbers, Tensor):
        numbers = torch.tensor(list(numbers), dtype=torch.int64)
    if numbers.device.type == "cpu" and device.type == "cuda":
        return numbers.pin_memory().to(device, non_blocking=True)
    return numbers.to(device)


def stream(device: torch.device) -> int:
    """Return torch's current stream as the CUDA runtime's handle; 0 where the device is modelled."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
