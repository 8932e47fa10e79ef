"""Load the C++ extension, check the bits that it computes, and report its instruction set.

The extension is the module `correctnet._native`, built when correctnet is installed. Without it the noise is computed
in numpy (`correctnet.noise.specification`): the same bits, on one thread and about a hundred times slower; `status`
reports which. An extension that was built but does not load raises an error rather than being ignored. So does one that
computes other bits than specified, as some compiler flags cause: each instruction set answers known questions before
it is first used.

The environment variable CORRECTNET_ISA (portable, avx2, avx512, avx512bf16, amx) selects an instruction set.
"""

from __future__ import annotations

import functools
import os
import zlib
from dataclasses import dataclass
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from correctnet.errors import UserError

if TYPE_CHECKING:
    from correctnet.noise.arrays import ArrayNoise


def keeps_subnormals() -> bool:
    """Return whether this thread computes with subnormal numbers, and does not flush them to zero."""
    return bool(np.float32(1e-40) * np.float32(1) != 0)


extension: ModuleType | None = None
_flushes = keeps_subnormals()  # whether loading the extension has changed that
if find_spec("correctnet._native") is not None:
    from correctnet import _native as extension
_flushes = _flushes and not keeps_subnormals()

# Known answers, from tests/kat_lognormal.txt: (seed, layer, sample, purpose, sigma, shift, first element), the bits of
# the first factors, a number of factors, and the CRC-32 of the bits of that many.
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
# Known answers of noise that arrays describe: (kind, whether there are faults), and the CRC-32 of the bits that a chip
# has of the weights of `array_question`.
KNOWN_ARRAYS = {
    ("gaussian", False): 0x70A77C13,
    ("gaussian", True): 0xD9EF61CD,
    ("lognormal", False): 0x43B4CC45,
    ("lognormal", True): 0x2CEEA910,
}
KNOWN_FAULTS = {
    "thresholds": (-1, 300000000, 700000000, 1000000000, 1400000000),
    "keep": (1.0, 0.0, 0.0, 0.0, 0.5, 1.0),
    "move": (0.0, 0.0, 1.0, -1.0, 0.5, 0.0),
    "signed": True,
    "chip_gain": 0.0625,
    "column_gain": 0.125,
}
# float32 bits and the bfloat16 bits that they round to: ties to even, overflow to infinity, subnormal numbers to zero.
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
    """State of the C++ core.

    Attributes:
        built: whether the C++ core is installed.
        isa: its instruction set; "numpy" without the core.
        available: instruction sets that both this machine and the core have, the best last.
        reason: why that instruction set is used, in one line.
        compiled: instruction sets that the core was compiled for.
        problem: why its bits are not those specified, in one line, or None.
    """

    built: bool
    isa: str
    available: tuple[str, ...]
    reason: str
    compiled: tuple[str, ...] = ()
    problem: str | None = None


def status(check: bool = True) -> Status:
    """Report what computes the noise, and why.

    Args:
        check: raise where the core computes other bits than specified, instead of reporting it as `problem`.

    Raises:
        UserError: CORRECTNET_ISA is set without a core, or to an instruction set that is unknown or that this machine
            lacks; or the core computes other bits than specified.
    """
    core = checked() if check else loaded()
    if core is None:
        reason = (
            "the C++ core was not built: no compiler when correctnet was installed, or CORRECTNET_PURE_PYTHON was 1"
        )
        return Status(False, "numpy", (), _hidden_package() or reason)
    available = tuple(core.supported_isas())
    reason = "CORRECTNET_ISA asks for it" if os.environ.get("CORRECTNET_ISA") else "the best that this machine has"
    return Status(True, core.isa(), available, reason, tuple(core.built_isas()), _problem(core))


def multiplies_bfloat16() -> bool:
    """Return whether the core in use has instructions for products in bfloat16; True without a core."""
    core = loaded()
    return core is None or core.isa() in ("avx512bf16", "amx")


def _hidden_package() -> str | None:
    """Explain that the sources shadow an installed package that has the core, in one line; None where they do not."""
    here = Path(__file__).resolve().parents[1]
    for distribution in distributions(name="correctnet"):
        package = Path(str(distribution.locate_file("correctnet")))
        if package.resolve() != here and any(package.glob("_native*")):
            return (
                f"the sources in {here} were imported, which have no C++ core, and not the installed package in "
                f"{package}; run from another folder, or install with `pip install -e`"
            )
    return None


def as_int64(seed: int) -> int:
    """Return the int64 with the bits of an unsigned 64-bit seed."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def checked() -> ModuleType | None:
    """Return the extension, or None if it was not built. Raises UserError if it computes other bits than specified."""
    core = loaded()
    problem = None if core is None else _problem(core)
    if problem is not None:
        raise UserError(f"the C++ core computes {problem}")
    return core


def _problem(core: ModuleType) -> str | None:
    """Explain why the core's bits are not those specified, in one line, or None."""
    wrong = _wrong_answer(core, core.isa())
    if wrong is None:
        return None
    return (
        f"other bits than specified ({wrong}): it was built with flags that change arithmetic; install correctnet "
        "again without CXXFLAGS, LDFLAGS and CMAKE_ARGS, or without the core: CORRECTNET_PURE_PYTHON=1"
    )


@functools.cache
def _wrong_answer(core: ModuleType, isa: str) -> str | None:
    """Name the first known answer that the core, which runs with `isa`, gets wrong; None if there is none."""
    if _flushes:
        return "subnormal numbers are zeros since it was loaded"
    for (seed, layer, sample, purpose, sigma, shift, start), first, count, crc in KNOWN_FACTORS:
        factors = np.zeros(count, np.float32)
        noise = core.Noise(layer, sigma, shift, purpose)
        core.lognormal(noise, seed, sample, start, count, factors.ctypes.data, 1)
        bits = factors.view(np.uint32).astype("<u4")
        if tuple(bits[: len(first)].tolist()) != first or zlib.crc32(bits.tobytes()) != crc:
            return f"factors, {isa}"
    # At sigma 0 every factor is 1.
    weight = np.array([*_ROUNDED, 0x7FC00000], np.uint32)
    rounded = np.zeros(len(weight), np.uint16)
    shape = {"rows": 1, "taps": 1, "channels": len(weight), "channels_last": True, "threads": 1}
    core.noisy_weight(
        core.Noise(0, 0.0, 0.0), 0, 0, **shape, weight=weight.ctypes.data, out=rounded.ctypes.data, bfloat16=True
    )
    if rounded[:-1].tolist() != list(_ROUNDED.values()) or rounded[-1] & 0x7FFF <= 0x7F80:
        return f"rounding to bfloat16, {isa}"
    for (kind, faults), crc in KNOWN_ARRAYS.items():
        if _array_answer(core, kind, faults) != crc:
            return f"{kind} weights, {isa}"
    plan = core.Plan("float32", 1, 2, 2)
    value = plan.conv(0, np.ones((1, 1, 1, 1), np.float32), pointwise=core.Pointwise(activation="relu"), pool=True)
    plan.finish(value)
    images = np.array([[1, np.nan, 2, 3], [-1, -np.inf, -2, -3], [1, 2, 3, 4]], np.float32).reshape(3, 1, 2, 2)
    outputs = plan.outputs(images, seed=0, samples=[0])[0].ravel()
    if not np.array_equal(outputs, np.array([np.nan, 0, 4], np.float32), equal_nan=True):
        return f"NaN and infinity, {isa}"
    return None


def array_question(kind: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return mean and spread of the weights that `KNOWN_ARRAYS` is about, one row."""
    i = np.arange(333, dtype=np.float32)
    mean, spread = (i - 166) / 64, i % 7 / 8
    if kind == "lognormal":
        spread = (spread > 0).astype(np.float32)
    return mean, np.where(i % 11 == 0, np.float32(-0.0), spread)


def _array_answer(core: ModuleType, kind: str, faults: bool) -> int:
    """The CRC-32 of the core's answer to `array_question`."""
    (mean, spread), reach = array_question(kind), np.full(1, 1.5, np.float32)
    drawn = np.zeros(len(mean), np.float32)
    given = core.Faults(**KNOWN_FAULTS) if faults else None
    noise = core.Noise.gaussian(3, given) if kind == "gaussian" else core.Noise.spread(3, 0.5, -0.125, given)
    addresses = {"weight": mean, "out": drawn, "spread": spread, "reach": reach}
    core.noisy_weight(
        *(noise, 42, 7),
        **{"rows": 1, "taps": 1, "channels": len(mean), "channels_last": True, "threads": 1, "bfloat16": False},
        **{name: array.ctypes.data for name, array in addresses.items()},
    )
    return zlib.crc32(drawn.astype("<f4").tobytes())


def loaded() -> ModuleType | None:
    """Return the extension unchecked, or None if it was not built. Raises UserError for an unusable CORRECTNET_ISA."""
    if extension is None:
        if os.environ.get("CORRECTNET_ISA"):
            raise UserError(
                "CORRECTNET_ISA is set, but the C++ core was not built; unset it or install with a compiler"
            )
        return None
    try:
        extension.isa()
    except RuntimeError as error:
        raise UserError(str(error)) from None
    return extension


def array_noise(layer: int, noise: ArrayNoise) -> object:
    """Make the extension's description of one layer's noise that reads arrays, without the arrays."""
    faults, t = None, noise.faults
    if t is not None:
        faults = extension.Faults(t.thresholds, t.keep, t.move, t.signed, t.chip_gain, t.column_gain)
    if noise.sigma is None:
        return extension.Noise.gaussian(layer, faults)
    return extension.Noise.spread(layer, noise.sigma, noise.shift, faults)


def layer_noise(layer: int, sigma: float, shift: float) -> object:
    """Make the extension's description of one layer's noise; the chips are named when it is drawn."""
    return extension.Noise(layer, sigma, shift)
