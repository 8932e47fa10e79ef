"""The CUDA kernels: whether they are there and can be used, and what they compute, on torch's tensors and streams.

They are a part of `correctnet._native`, built where nvcc is found (csrc/cuda). Chips are those of the CPU: the noise is
the same function of its address, bit for bit. All work goes to torch's current stream, into memory that torch
allocated, without waiting for the device; a seed and the samples' numbers stand in device memory, so that a CUDA graph
can be replayed with others.

Where they were not built, or cannot run on the device at hand, torch computes everything, and says so
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
from typing import Any, Literal

import torch
from torch import Tensor

from correctnet.errors import UserError
from correctnet.noise import core as native
from correctnet.noise import specification as reference

Method = Literal["fused", "materialise"]
METHODS: tuple[Method, ...] = ("fused", "materialise")


@dataclass(frozen=True)
class Status:
    """Whether the CUDA kernels can be used.

    Attributes:
        built: whether they are in the core.
        usable: whether they run on torch's current CUDA device.
        architectures: that they were compiled for, as CMake counts them ("80-real, 90").
        reason: one line that says why, or what to do.
    """

    built: bool
    usable: bool
    architectures: str
    reason: str


def status() -> Status:
    """Whether the CUDA kernels can be used, and why."""
    kernels = _kernels()
    if kernels is None:
        return Status(
            False,
            False,
            "",
            "the CUDA kernels were not built: no nvcc when correctnet was installed, or CORRECTNET_CUDA was 0",
        )
    built = kernels.architectures
    if kernels.device_type == "cuda" and not torch.cuda.is_available():
        return Status(True, False, built, "torch sees no CUDA device")
    index = torch.cuda.current_device() if kernels.device_type == "cuda" else 0
    problem = _problem(index)
    return Status(True, problem is None, built, problem or f"compiled for {built}")


def _problem(index: int) -> str | None:
    """Why the kernels cannot run on a device, or None."""
    problem = _refusal(index)
    if problem is None and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        problem = _other_bits(index)
    return problem


@functools.cache
def _refusal(index: int) -> str | None:
    """What the runtime says against a device, or None; asking it takes longer than a small layer."""
    return _kernels().problem(index)


@functools.cache
def _other_bits(index: int) -> str | None:
    """Whether the kernels' noise on a device is that of the specification: None, or one line.

    Raises:
        UserError: the device has no memory left for a few numbers.
    """
    device = torch.device(_kernels().device_type, index if _kernels().device_type == "cuda" else None)
    (seed, layer, sample, purpose, sigma, shift, start), _, count, crc = native.KNOWN_FACTORS[0]
    assert purpose == start == 0, "the kernels' noise begins with element 0 and has no other purpose"
    with _memory("known answers", "memory left for a few numbers"):
        ones = torch.ones(1, count, device=device)
    factors = noisy_weight(ones, on_device(seed, device), on_device([sample], device), layer, sigma, shift).cpu()
    if zlib.crc32(factors.numpy().astype("<f4").tobytes()) == crc:
        return None
    return (
        "the CUDA kernels compute other bits than specified: they were built with flags that change arithmetic; "
        "install correctnet again without CUDAFLAGS, NVCC_APPEND_FLAGS, CXXFLAGS and CMAKE_ARGS"
    )


def reaches(device: torch.device) -> bool:
    """Whether the kernels compute on tensors of `device`."""
    kernels = _kernels()
    if kernels is None or device.type != kernels.device_type:
        return False
    return (device.type != "cuda" or torch.cuda.is_available()) and _problem(_number(device)) is None


def _number(device: torch.device) -> int:
    """A device's number; "cuda" alone is torch's current one."""
    if device.index is not None:
        return device.index
    return torch.cuda.current_device() if device.type == "cuda" else 0


def _kernels() -> ModuleType | None:
    """The core's submodule, or None. Its `device_type` is "cuda", or "cpu" in a build that models the device."""
    core = native._loaded_core()
    return getattr(core, "cuda", None)


@contextlib.contextmanager
def _memory(where: str, what: str) -> Iterator[None]:
    """The end of the device's memory, found by torch or by the kernels, as a UserError."""
    try:
        yield
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        raise UserError(
            f"{where}: the device has no {what}; allow less memory, take fewer images or chips at once, or free what "
            "torch keeps in reserve: torch.cuda.empty_cache()"
        ) from error


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it is a view that begins between multiples of 16 bytes, what kernels read at once."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


class Plan:
    """A plan of the core (csrc/engine.h) on a CUDA device.

    Args:
        plan: a finished `correctnet._native.Plan`; its weights are copied to the device.
        device: where.
        method: "fused": weights become noisy while a kernel loads them; "materialise": the noisy weights of some chips
            are made in memory first, which is the better plan where a chip sees very many images. Same results.

    Raises:
        UserError: a device that the kernels cannot use, or without memory for the weights.
    """

    def __init__(self, plan: Any, device: torch.device, method: Method = "fused"):
        if method not in METHODS:
            raise UserError(f"engine: method must be one of {', '.join(METHODS)}, not {method!r}")
        kernels = _kernels()
        if kernels is None or not reaches(device):
            raise UserError(f"the CUDA kernels do not compute on {device}: {status().reason}")
        self.device, self._materialise = device, method == "materialise"
        with _memory("engine", "memory left for the network's weights"):
            self._engine = kernels.Engine(plan, _number(device))

    def workspace(self, count: int, samples: int) -> int:
        """Bytes that a run of `count` images on `samples` chips takes at once."""
        return self._engine.workspace(count, samples, self._materialise)

    def outputs(self, images: Tensor, seed: int | Tensor, samples: Sequence[int] | Tensor, memory: int) -> Tensor:
        """The plan's output (samples, N, C, H, W), float32, for images (N, C, H, W) of the same device.

        Seed and samples as int64 tensors () and (S,) on the device are read there and then: a CUDA graph that captured
        this is replayed with what stands in them. At most about `memory` bytes are taken beside it: chips are done in
        as many groups as that needs.
        """
        shape = self._engine.output_shape
        with _memory("engine", "memory left for the outputs"):
            outputs = torch.empty(len(samples), len(images), *shape, device=images.device)
        self._run(images, seed, samples, memory, outputs=outputs)
        return outputs

    def count_correct(
        self, images: Tensor, labels: Tensor, seed: int | Tensor, samples: Sequence[int] | Tensor, memory: int
    ) -> Tensor:
        """(samples,) int64 on the device, the first of `count`."""
        return self.count(images, labels, seed, samples, memory)[0]

    def count(
        self, images: Tensor, labels: Tensor, seed: int | Tensor, samples: Sequence[int] | Tensor, memory: int
    ) -> Tensor:
        """(2, samples) int64 on the device: see `correctnet.engine.lowering.PlanStep.count`."""
        counts = torch.zeros(2, len(samples), dtype=torch.int64, device=images.device)
        labels = labels.to(device=images.device, dtype=torch.int64).contiguous()
        self._run(images, seed, samples, memory, labels=labels, correct=counts[0], nonfinite=counts[1])
        return counts

    def _run(
        self, images: Tensor, seed: int | Tensor, samples: Sequence[int] | Tensor, memory: int, **tensors: Tensor
    ) -> None:
        with _memory("engine", f"{4 * images.numel() >> 20} MiB left"):
            images = images.detach().contiguous()
        least, all_of_them = self.workspace(len(images), 1), self.workspace(len(images), len(samples))
        if least > memory:
            raise UserError(
                f"engine: {len(images)} images on one chip take {least >> 20} MiB on the device, more than the "
                f"{memory >> 20} MiB allowed; allow more memory"
            )
        size = min(all_of_them, memory)
        with _memory("engine", f"{size >> 20} MiB left"):
            workspace = torch.empty(size, dtype=torch.uint8, device=images.device)
        numbers = on_device(seed, images.device)
        chips = on_device(samples, images.device).to(torch.uint32)
        self._engine.run(
            images=images.data_ptr(),
            count=len(images),
            seed=numbers.data_ptr(),
            samples=chips.data_ptr(),
            sample_count=len(samples),
            workspace=workspace.data_ptr(),
            workspace_bytes=size,
            stream=stream(images.device),
            materialise=self._materialise,
            **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        )


def noisy_weight(
    weight: Tensor,
    seed: Tensor,
    samples: Tensor,
    layer: int,
    sigma: float,
    shift: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """weight * exp(sigma z + shift) on each chip: the twin of `native.noisy_weight` for tensors on the device.

    Args:
        weight: (out, in, *kernel), float32 or bfloat16, contiguous or channels_last.
        seed, samples: () and (S,) int64, on the device or not.
        layer, sigma, shift: see `native.noisy_weight`.
        dtype: of the result, float32 or bfloat16; that of `weight` if not given.

    Returns:
        (S, *weight.shape) in the memory order of `weight`, rounded once from float32.

    Raises:
        UserError: the device's memory does not hold them.
    """
    reference.log2_scale(sigma, shift)
    kernels = _kernels()
    dtype = weight.dtype if dtype is None else dtype
    last = weight.dim() == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
    order = torch.channels_last if last else torch.contiguous_format
    chips = on_device(samples, weight.device).to(torch.uint32)
    seed = on_device(seed, weight.device)
    out, inputs, *kernel = weight.shape
    taps = math.prod(kernel)
    memory = (len(chips), out, *kernel, inputs) if last else (len(chips), *weight.shape)
    with _memory("noisy weights", f"memory left for those of {len(chips)} chips"):
        nominal = weight.detach().float().contiguous(memory_format=order)
        result = torch.empty(memory, dtype=dtype, device=weight.device)
    kernels.noisy_weight(
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
        noise=native._core.LayerNoise(layer, sigma, shift),
        device=_number(weight.device),
        stream=stream(weight.device),
    )
    return result.movedim(-1, 2) if last else result


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
    """A convolution on many chips in one launch, or its gradient with respect to the input.

    Args:
        x: (N, C, H, W), shared by all chips, or (S, N, C, H, W); float32 or bfloat16. With `size` the gradient of the
            output, (S, N, O, H', W').
        weight: nominal weights (O, C / groups, kh, kw), in the dtype of x; a linear layer's with two dimensions of 1.
        bias: (O,) or None; None with `size`.
        seed, samples, layer, sigma, shift: see `noisy_weight`.
        geometry: stride, padding, dilation (pairs) and groups.
        size: (H, W) of the input, for the gradient.

    Returns:
        (S, N, O, H', W'), or with `size` (S, N, C, H, W); the dtype of x.

    Raises:
        UserError: the device's memory does not hold it.
        ValueError: more pixels at once than the kernels count.
    """
    stride, padding, dilation, groups = geometry
    outputs, inputs, *kernel = weight.shape
    shared = x.dim() == 4
    what = "convolution", f"memory left for {x.shape[-4]} images on {len(samples)} chips"
    with _memory(*what):
        pixels = _aligned(x.movedim(-3, -1).contiguous())  # (..., H, W, C)
    height, width = x.shape[-2:] if size is None else size
    if size is None:
        reach = [
            n + 2 * p - d * (k - 1) - 1 for n, p, d, k in zip((height, width), padding, dilation, kernel, strict=True)
        ]
        out = (*(r // s + 1 for r, s in zip(reach, stride, strict=True)), outputs)
    else:
        out = (height, width, inputs * groups)
    chips = on_device(samples, x.device).to(torch.uint32)
    seed = on_device(seed, x.device)
    added = None if bias is None else bias.detach().float().contiguous()
    with _memory(*what):
        nominal = _aligned(weight.detach().float().permute(0, 2, 3, 1).contiguous())
        y = torch.empty(len(chips), x.shape[-4], *out, dtype=x.dtype, device=x.device)
    _kernels().convolve(
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
        noise=native._core.LayerNoise(layer, sigma, shift),
        backward=size is not None,
        device=_number(x.device),
        cuda_stream=stream(x.device),
    )
    with _memory(*what):
        return y.movedim(-1, 2).contiguous()


def on_device(numbers: int | Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """A seed or the numbers of chips as a tensor on the device; int64, or what the tensor was.

    What is there already stays. The rest is written by a kernel or copied from pinned memory: a copy from memory that
    is not pinned would wait until the device has done all that it was given before.
    """
    if isinstance(numbers, int):
        return torch.full((), native._as_int64(numbers), dtype=torch.int64, device=device)
    if not isinstance(numbers, Tensor):
        numbers = torch.tensor(list(numbers), dtype=torch.int64)
    if numbers.device.type == "cpu" and device.type == "cuda":
        return numbers.pin_memory().to(device, non_blocking=True)
    return numbers.to(device)


def stream(device: torch.device) -> int:
    """Torch's current stream as the runtime's handle; 0 where the device is modelled."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
