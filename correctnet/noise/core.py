"""The C++ core: whether it is there, which instructions it takes, and its noise in torch tensors.

The core is the module `correctnet._native`, built when correctnet is installed. Where it was not built, the functions
here compute the same bits in numpy (`correctnet.noise.specification`), on one thread and about a hundred times slower; `status`
says so. A core that was built but does not load is an error, never a reason to do without it; so is one
that gives other bits than specified, which compiler flags can bring about: each set of instructions answers some known
questions before it is first used.

The environment variable CORRECTNET_ISA (portable, avx2, avx512, avx512bf16, amx) forces one set of instructions.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import zlib
from dataclasses import dataclass
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from correctnet.errors import UserError
from correctnet.noise import specification as reference


def _keeps_subnormals() -> bool:
    """Whether this thread computes with subnormal numbers instead of zeros."""
    return bool(np.float32(1e-40) * np.float32(1) != 0)


_core: ModuleType | None = None
_flushes = _keeps_subnormals()  # whether loading the core has changed that
if find_spec("correctnet._native") is not None:
    from correctnet import _native as _core
_flushes = _flushes and not _keeps_subnormals()

# Some lines of tests/kat_lognormal.txt: seed, layer, sample, purpose, sigma, shift, first element; the bits of the
# first factors; a number of factors, and the CRC-32 of the bits of so many.
KNOWN_FACTORS = (
    ((0, 0, 0, 0, 0.5, 0.0, 0), (0x3FC322AC, 0x3F89FD84, 0x3F583E75, 0x3F45BB69), 333, 0xF4D31D78),
    ((42, 1, 2, 0, 0.5, 0.0, 3), (0x3FDDBFC2, 0x3F24EC0B, 0x40045A2E, 0x3F56ED6F), 333, 0x07AFCE87),
    (
        (2**64 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1, 0.5, 0.0, 17179869176),
        (0x3E815119, 0x3F893372, 0x3F989EF5, 0x3F497778),
        8,
        0x0395088F,
    ),
)
# Numbers, and how they are rounded to bfloat16: ties to even, upwards to infinity, subnormal numbers to zeros.
_ROUNDED = {
    0x3F808000: 0x3F80,
    0x3F818000: 0x3F82,
    0x3F808001: 0x3F81,
    0xBF817FFF: 0xBF81,
    0x7F7FFFFF: 0x7F80,
    0x7F800000: 0x7F80,
    0x007FFFFF: 0x0000,
    0x80000001: 0x8000,
    0x00800000: 0x0080,
}


@dataclass(frozen=True)
class Status:
    """What computes the noise.

    Attributes:
        built: whether the C++ core is there.
        isa: the instructions it takes; "numpy" if it is not there.
        available: all that this machine has and the core knows, the best last.
        compiled: all that the core was compiled for.
        reason: one line that says why.
        problem: what is wrong with the bits that it computes, in one line, or None.
    """

    built: bool
    isa: str
    available: tuple[str, ...]
    reason: str
    compiled: tuple[str, ...] = ()
    problem: str | None = None


def status(check: bool = True) -> Status:
    """What computes the noise, and why.

    Args:
        check: whether a core that computes other bits than specified is an error; else it is the status's `problem`.

    Raises:
        UserError: CORRECTNET_ISA names no instructions, some that this machine lacks, or any without the core; or the
            core computes other bits than specified.
    """
    core = _checked_core() if check else _loaded_core()
    if core is None:
        reason = (
            "the C++ core was not built: no compiler when correctnet was installed, or CORRECTNET_PURE_PYTHON was 1"
        )
        return Status(False, "numpy", (), _hidden_package() or reason)
    available = tuple(core.supported_isas())
    reason = "CORRECTNET_ISA asks for it" if os.environ.get("CORRECTNET_ISA") else "the best that this machine has"
    return Status(True, core.isa(), available, reason, tuple(core.built_isas()), _problem(core))


def _hidden_package() -> str | None:
    """That the sources were imported in place of an installed package, which has the core; None where they were not."""
    here = Path(__file__).resolve().parents[1]
    for distribution in distributions(name="correctnet"):
        package = Path(str(distribution.locate_file("correctnet")))
        if package.resolve() != here and any(package.glob("_native*")):
            return (
                f"the sources in {here} were imported, which have no C++ core, and not the installed package in "
                f"{package}; run from another folder, or install with `pip install -e`"
            )
    return None


def cpu_name() -> str:
    """The processor as it names itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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
    """Factors exp(sigma z + shift) of elements start, ..., start + count - 1; the fast twin of `reference.lognormal`.

    Returns:
        float32, (count,), on the CPU; as many threads as torch has were used.

    Raises:
        ValueError, UserError: see `reference.lognormal` and `status`.
    """
    core = _checked_core()
    if core is None:
        return torch.from_numpy(reference.lognormal(seed, layer, sample, count, sigma, shift, start, purpose))
    noise = _noise(core, seed, layer, sample, count, sigma, shift, start, purpose)
    out = torch.empty(count, dtype=torch.float32)
    core.lognormal(noise, start, count, out.data_ptr(), torch.get_num_threads())
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
    """weight * exp(sigma z + shift), rounded once from float32: (1) and (2) of the paper at shift 0.

    z of a weight belongs to its place in the order (out, *kernel, in), whatever the order in memory is. The result
    carries no gradient; that of a loss with respect to `weight` is `noisy_weight` of that with respect to the result.

    Args:
        weight: (out, in, *kernel), floating point. On a GPU the CUDA kernels draw; where they cannot be used, the
            factors are made on the CPU and copied there.
        seed, layer, sample, sigma, shift: see `reference.lognormal`. Seed and sample may be 0-d int64 tensors; on a GPU
            those are read when the kernel runs, so that a CUDA graph can be replayed with others.
        order: memory order of the result; that of `weight` if not given. "channels_last" takes four dimensions.
        dtype: of the result; that of `weight` if not given.

    Returns:
        The shape and device of `weight`.

    Raises:
        ValueError, UserError: an argument is outside its range, and see `status`.
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

    core = _checked_core()
    if weight.device.type != "cpu":
        from correctnet.noise import device as cuda

        if cuda.reaches(weight.device):
            rounded = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
            if not isinstance(seed, Tensor) and not isinstance(sample, Tensor):
                reference.address(seed, layer, sample, weight.numel(), 0, 0)
            address = cuda.on_device(seed, weight.device), cuda.on_device(sample, weight.device).view(1), layer
            return cuda.noisy_weight(weight, *address, sigma, shift, rounded)[0].to(dtype)
    seed, sample = int(seed), int(sample)
    if core is None or weight.device.type != "cpu":
        flat = lognormal(seed, layer, sample, weight.numel(), sigma, shift).to(weight.device)
        factor = flat.view(out, *kernel, channels).movedim(-1, 1)
        noisy = weight * factor
        if dtype == torch.bfloat16:  # as the core rounds: subnormal numbers are zeros
            noisy = torch.where(noisy.abs() < torch.finfo(torch.float32).tiny, 0 * noisy, noisy)
        return noisy.to(dtype).contiguous(memory_format=layout)
    noise = _noise(core, seed, layer, sample, weight.numel(), sigma, shift, 0, 0)
    bfloat16 = dtype == torch.bfloat16
    result = torch.empty_like(weight, dtype=torch.bfloat16 if bfloat16 else torch.float32)
    core.noisy_weight(
        noise,
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


def _as_int64(seed: int) -> int:
    """The int64 of the same bits."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def _checked_core() -> ModuleType | None:
    """The core, or None if it was not built. Raises UserError where it computes other bits than specified."""
    core = _loaded_core()
    problem = None if core is None else _problem(core)
    if problem is not None:
        raise UserError(f"the C++ core computes {problem}")
    return core


def _problem(core: ModuleType) -> str | None:
    """Why the bits that the core computes are not those of the specification, or None."""
    wrong = _wrong_answer(core, core.isa())
    if wrong is None:
        return None
    return (
        f"other bits than specified ({wrong}): it was built with flags that change arithmetic; install correctnet "
        "again without CXXFLAGS, LDFLAGS and CMAKE_ARGS, or without the core: CORRECTNET_PURE_PYTHON=1"
    )


@functools.cache
def _wrong_answer(core: ModuleType, isa: str) -> str | None:
    """The first known answer that the core does not give with the instructions `isa`, which it takes; or None."""
    if _flushes:
        return "subnormal numbers are zeros since it was loaded"
    for (seed, layer, sample, purpose, sigma, shift, start), first, count, crc in KNOWN_FACTORS:
        factors = np.zeros(count, np.float32)
        noise = core.Noise(seed, layer, sample, sigma, shift, purpose)
        core.lognormal(noise, start, count, factors.ctypes.data, 1)
        bits = factors.view(np.uint32).astype("<u4")
        if tuple(bits[: len(first)].tolist()) != first or zlib.crc32(bits.tobytes()) != crc:
            return f"factors, {isa}"
    # At sigma 0 every factor is 1.
    weight = np.array([*_ROUNDED, 0x7FC00000], np.uint32)
    rounded = np.zeros(len(weight), np.uint16)
    shape = {"rows": 1, "taps": 1, "channels": len(weight), "channels_last": True, "threads": 1}
    core.noisy_weight(
        core.Noise(0, 0, 0, 0.0, 0.0, 0), **shape, weight=weight.ctypes.data, out=rounded.ctypes.data, bfloat16=True
    )
    if rounded[:-1].tolist() != list(_ROUNDED.values()) or rounded[-1] & 0x7FFF <= 0x7F80:
        return f"rounding to bfloat16, {isa}"
    plan = core.Plan("float32", 1, 2, 2)
    value = plan.conv(0, np.ones((1, 1, 1, 1), np.float32), pointwise=core.Pointwise(relu=True), pool=True)
    plan.finish(value)
    images = np.array([[1, np.nan, 2, 3], [-1, -np.inf, -2, -3], [1, 2, 3, 4]], np.float32).reshape(3, 1, 2, 2)
    outputs = plan.outputs(images, seed=0, samples=[0])[0].ravel()
    if not np.array_equal(outputs, np.array([np.nan, 0, 4], np.float32), equal_nan=True):
        return f"NaN and infinity, {isa}"
    return None


def _loaded_core() -> ModuleType | None:
    """The core, or None if it was not built; CORRECTNET_ISA is heeded in either case."""
    if _core is None:
        if os.environ.get("CORRECTNET_ISA"):
            raise UserError(
                "CORRECTNET_ISA is set, but the C++ core was not built; unset it or install with a compiler"
            )
        return None
    try:
        _core.isa()
    except RuntimeError as error:
        raise UserError(str(error)) from None
    return _core


def _noise(
    core: ModuleType,
    seed: int,
    layer: int,
    sample: int,
    count: int,
    sigma: float,
    shift: float,
    start: int,
    purpose: int,
) -> object:
    """The core's description of the noise, its arguments checked."""
    reference.log2_scale(sigma, shift)
    (low, high), _ = reference.address(seed, layer, sample, count, start, purpose)
    return core.Noise(low | high << 32, layer, sample, sigma, shift, purpose)
