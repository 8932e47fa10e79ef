"""Specification of the device noise in numpy, which every kernel matches bit for bit.

The noise of a weight is a function of (seed, layer, sample, element) alone. It does not depend on earlier draws, their
order, the number of threads or the device:

    word   Philox4x32-10, key (seed mod 2^32, seed div 2^32), counter (element div 4, sample, layer, purpose);
           the four words of a block belong to four consecutive elements
    z      inverse normal distribution of p, signed: m = word div 2, p = m (2^-32 - 2^-56) + 2^-33, sign = word mod 2
    w / w_nominal = exp(sigma z + shift) = 2^(z s + h), s = sigma log2(e), h = shift log2(e)

Only integer operations and float32 +, -, * and fused multiply-add are used, each correctly rounded on all hardware, so
that AVX2, AVX-512 and CUDA kernels can be required to give the same bits. numpy has no fused multiply-add: `fma`
emulates one in float64.

Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

LOG2_E = 1.4426950408889634
MAX_NORMAL = 6.34  # the table ends at ndtri(2^-33) = -6.338
MAX_EXPONENT = 126.0  # 2^x is a normal float32 for |x| up to here
ELEMENTS = 1 << 34  # four words a block, 2^32 blocks

# Elements computed at a time, so that the temporaries (some 64 bytes an element) fit a second-level cache.
BLOCK = 1 << 13

# One float below 2^-32. With 2^-32 itself the last 64 values of m, which float32 rounds up to 2^31, would give p = 1/2,
# which lies in no octave; this way they give the largest float32 below 1/2. p remains a monotone function of m, as both
# roundings are, and is smaller by at most 6e-8 of itself, far below the table's error. The sign bit is not involved,
# so the two halves remain mirror images.
UNIFORM_SCALE = np.float32(2.0**-32 - 2.0**-56)
UNIFORM_OFFSET = np.float32(2.0**-33)

OCTAVES = 32
DEGREE = 5
NORMAL_PATH = Path(__file__).with_name("normal_table.inc")


def _hex_floats(text: str) -> NDArray[np.float32]:
    return np.array([float.fromhex(word) for word in text.replace(",", " ").split()], np.float32)


# (DEGREE + 1, OCTAVES): row j holds the coefficients of t^j. Both fits are in `correctnet.noise.normal_table`.
NORMAL = _hex_floats(
    "\n".join(line for line in NORMAL_PATH.read_text(encoding="ascii").splitlines() if not line.startswith("//"))
)
NORMAL.shape = DEGREE + 1, OCTAVES
EXP2 = _hex_floats("0x1p+0 0x1.62e43p-1 0x1.ebf9b2p-3 0x1.c6afb0p-5 0x1.3ced86p-7 0x1.5eeceep-10")


def fma(a: ArrayLike, b: ArrayLike, c: ArrayLike) -> NDArray[np.float32]:
    """Compute a * b + c of finite float32 numbers, rounded once (ties to even), as the hardware instruction does.

    The product of two float32 is exact in float64. Its sum with c is rounded to *odd* (Boldo and Melquiond, 2008):
    where the sum is inexact, which its error (Knuth's TwoSum) tells, the last bit is set. With 29 bits to spare,
    rounding that to float32 is correct, whereas a sum rounded to nearest could be rounded twice.
    """
    c = np.asarray(c, np.float64)
    product = np.multiply(a, b, dtype=np.float64)
    total = np.asarray(product + c)
    part = total - product
    error = (product - (total - part)) + (c - part)
    # The exact sum lies between `total` and its neighbour in the direction of the error; one of the two is odd.
    # As integers the bits of floats count away from zero.
    bits = total.view(np.int64)
    even = (error != 0) & ((bits & 1) == 0)
    if even.any():
        bits += np.where((error > 0) == (total > 0), even, -even.astype(np.int8))
    return total.astype(np.float32)


def horner(coefficients: NDArray[np.float32], x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Evaluate the sum of coefficients[j] x^j by Horner's rule in float32 `fma`; axes after the first broadcast."""
    result = coefficients[-1]
    for coefficient in coefficients[-2::-1]:
        result = fma(result, x, coefficient)
    return result


def philox4x32(counter: list[NDArray[np.uint64]], key: list[int]) -> list[NDArray[np.uint32]]:
    """Philox4x32-10, a bijection of the 128-bit counters for every 64-bit key.

    Args:
        counter: four arrays of 32-bit words in uint64, the lowest word first, that broadcast against each other.
        key: two 32-bit words, the low one first.

    Returns:
        The four words of each block.
    """
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ np.uint64(k0), p1 & low, (p0 >> shift) ^ c3 ^ np.uint64(k1), p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [word.astype(np.uint32) for word in (c0, c1, c2, c3)]


def words(seed: int, layer: int, sample: int, count: int, start: int = 0, purpose: int = 0) -> NDArray[np.uint32]:
    """Return the random words of elements start, ..., start + count - 1.

    Args:
        seed: 64-bit seed; a negative int64 is read as its two's complement.
        layer: index of the layer's crossbar among those of the network, in [0, 2^32).
        sample: number of the chip, in [0, 2^32).
        count: how many, >= 0.
        start: the first element, >= 0; start + count <= 2^34.
        purpose: separates independent uses of one address, in [0, 2^32); 0 is the programming of weights.

    Returns:
        uint32, (count,).

    Raises:
        ValueError: an argument is no integer or outside its range.
    """
    key, upper = address(seed, layer, sample, count, start, purpose)
    result = np.empty(count, np.uint32)
    for part in _blocks(start, count):
        result[part] = _words(key, upper, start + part.start, start + part.stop)
    return result


def standard_normal(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Map random words to standard normal numbers, bounded by 6.34, with an error below 6e-6.

    word ^ 1 gives the negative of word's value, and for even words the value ascends with word / 2.
    """
    words = np.asarray(words, np.uint32)
    p = fma((words >> np.uint32(1)).astype(np.float32), UNIFORM_SCALE, UNIFORM_OFFSET)
    # Octave k holds p in [2^-(k+2), 2^-(k+1)); t in [-1/2, 1/2) is the position within it, exact.
    bits = p.view(np.uint32)
    octave = (np.uint32(0x3EFFFFFF) - bits) >> np.uint32(23)
    t = ((bits & np.uint32(0x7FFFFF)) | np.uint32(0x3F800000)).view(np.float32) - np.float32(1.5)
    lower = horner(NORMAL.take(octave, axis=1), t)
    return (lower.view(np.uint32) ^ (words << np.uint32(31))).view(np.float32)


def exp2(x: ArrayLike) -> NDArray[np.float32]:
    """Compute 2^x in float32 with a relative error below 2e-7; 2^0 is 1.

    Raises:
        ValueError: |x| above 126, where the result would not be a normal float32, or not a number.
    """
    x = np.asarray(x, np.float32)
    if not (np.abs(x) <= MAX_EXPONENT).all():
        raise ValueError(f"x must be between -{MAX_EXPONENT:g} and {MAX_EXPONENT:g}")
    # Adding 1.5 * 2^23 rounds x to the nearest integer, which the low bits of the sum then hold.
    magic = np.float32(1.5 * 2**23)
    rounded = x + magic
    power = horner(EXP2, x - (rounded - magic))
    return (power.view(np.uint32) + (rounded.view(np.uint32) << np.uint32(23))).view(np.float32)


def lognormal(
    seed: int,
    layer: int,
    sample: int,
    count: int,
    sigma: float,
    shift: float = 0.0,
    start: int = 0,
    purpose: int = 0,
) -> NDArray[np.float32]:
    """Return the factors exp(sigma z + shift) of elements start, ..., start + count - 1.

    These are (1) and (2) of the paper at shift 0.

    Args:
        sigma: standard deviation of the factor's logarithm, finite, >= 0.
        shift: mean of the factor's logarithm, finite.
        seed, layer, sample, count, start, purpose: see `words`.

    Returns:
        float32, (count,).

    Raises:
        ValueError: an argument is outside its range, or the factors could leave that of float32.
    """
    scale, offset = log2_scale(sigma, shift)
    key, upper = address(seed, layer, sample, count, start, purpose)
    result = np.empty(count, np.float32)
    for part in _blocks(start, count):
        z = standard_normal(_words(key, upper, start + part.start, start + part.stop))
        result[part] = exp2(fma(z, scale, offset))
    return result


def log2_scale(sigma: float, shift: float) -> tuple[np.float32, np.float32]:
    """Return (sigma log2(e), shift log2(e)), rounded to float32: the two parameters of the kernels' noise.

    Raises:
        ValueError: see `lognormal`.
    """
    sigma, shift = float(sigma), float(shift)
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"sigma must be a finite number >= 0, not {sigma!r}")
    if not math.isfinite(shift):
        raise ValueError(f"shift must be a finite number, not {shift!r}")
    if (sigma * MAX_NORMAL + abs(shift)) * LOG2_E > MAX_EXPONENT:
        raise ValueError(f"sigma {sigma!r} with shift {shift!r} gives factors outside the range of float32")
    return np.float32(sigma * LOG2_E), np.float32(shift * LOG2_E)


def address(
    seed: int, layer: int, sample: int, count: int, start: int, purpose: int
) -> tuple[list[int], list[NDArray[np.uint64]]]:
    """Check the arguments of `words`; return the two words of the key and the upper three of the counter, (1,) each.

    Raises:
        ValueError: see `words`.
    """
    seed = _integer("seed", seed, -(1 << 63), (1 << 64) - 1) & 0xFFFFFFFFFFFFFFFF
    _integer("start", start, 0, ELEMENTS)
    _integer("count", count, 0, ELEMENTS - start)
    upper = [("sample", sample), ("layer", layer), ("purpose", purpose)]
    counter = [np.array([_integer(name, value, 0, 0xFFFFFFFF)], np.uint64) for name, value in upper]
    return [seed & 0xFFFFFFFF, seed >> 32], counter


def _words(key: list[int], upper: list[NDArray[np.uint64]], start: int, stop: int) -> NDArray[np.uint32]:
    """Return the words of elements start, ..., stop - 1; `upper` is (sample, layer, purpose)."""
    blocks = np.arange(start // 4, -(-stop // 4), dtype=np.uint64)
    flat = np.stack(philox4x32([blocks, *upper], key), axis=-1).reshape(-1)
    return flat[start % 4 : start % 4 + stop - start]


def _blocks(start: int, count: int) -> Iterator[slice]:
    """Yield slices that cover range(count) and whose inner borders, as elements, are multiples of BLOCK."""
    stop = start + count
    borders = [start, *range(start - start % BLOCK + BLOCK, stop, BLOCK), stop]
    for first, last in itertools.pairwise(borders):
        yield slice(first - start, last - start)


def _integer(name: str, value: int, low: int, high: int) -> int:
    """Return `value` as an int. Raises ValueError where it is no integer between `low` and `high`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, not {value!r}") from None
    if not low <= number <= high:
        raise ValueError(f"{name} must be between {low} and {high}, not {number}")
    return number
