"""The C++ core: whether it is there, which instructions it takes, and its noise in torch tensors.

The core is the module `correctnet._native`, built when correctnet is installed. Where it was not built, the functions
here compute the same bits in numpy (`correctnet.reference`), on one thread and about a hundred times slower; `status`
says so. A core that was built but does not load is an error, never a reason to do without it.

The environment variable CORRECTNET_ISA (portable, avx2, avx512, avx512bf16, amx) forces one set of instructions.
"""

from __future__ import annotations

import contextlib
import os
import platform
from dataclasses import dataclass
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from correctnet import reference
from correctnet.errors import UserError

_core: ModuleType | None = None
if find_spec("correctnet._native") is not None:
    from correctnet import _native as _core


@dataclass(frozen=True)
class Status:
    """What computes the noise.

    Attributes:
        built: whether the C++ core is there.
        isa: the instructions it takes; "numpy" if it is not there.
        available: all that this machine has and the core knows, the best last.
        compiled: all that the core was compiled for.
        reason: one line that says why.
    """

    built: bool
    isa: str
    available: tuple[str, ...]
    reason: str
    compiled: tuple[str, ...] = ()


def status() -> Status:
    """What computes the noise, and why.

    Raises:
        UserError: CORRECTNET_ISA names no instructions, some that this machine lacks, or any without the core.
    """
    core = _checked_core()
    if core is None:
        reason = (
            "the C++ core was not built: no compiler when correctnet was installed, or CORRECTNET_PURE_PYTHON was 1"
        )
        return Status(False, "numpy", (), _hidden_package() or reason)
    available = tuple(core.supported_isas())
    reason = "CORRECTNET_ISA asks for it" if os.environ.get("CORRECTNET_ISA") else "the best that this machine has"
    return Status(True, core.isa(), available, reason, tuple(core.built_isas()))


def _hidden_package() -> str | None:
    """That the sources were imported in place of an installed package, which has the core; None where they were not."""
    here = Path(__file__).resolve().parent
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
        from correctnet import cuda

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
