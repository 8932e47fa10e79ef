"""The specification of the noise, against published vectors, exact fractions and scipy."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis_profile import examples
from scipy import stats
from scipy.special import ndtri

from correctnet.noise import normal_table, specification

# A correct generator fails a two-sided test at this limit once in 10^6 seeds.
SIGMAS = -ndtri(0.5e-6)

# Error of the quintics, 5.7e-6 (octave 0), and of float32 at |z| = 6, 2.4e-7.
NORMAL_ERROR = 6e-6

# The first error is the polynomial's, 1.0e-7 / 2^-0.5; two roundings add at most 6e-8 each.
EXP2_ERROR = 1.0e-7 * 2**0.5 + 2 * 2.0**-24

# m = word div 2 around the borders of the octaves (powers of two) and at both ends, 1/2 being one border.
BORDERS = np.unique([(1 << k) + d for k in range(32) for d in range(-300, 301)]).clip(0, 2**31 - 1).astype(np.uint32)


def round_to_float32(x: Fraction) -> float:
    """Nearest float32, ties to even: `round` of a Fraction is that."""
    if x == 0:
        return 0.0
    numerator, denominator = abs(x).numerator, abs(x).denominator
    exponent = numerator.bit_length() - denominator.bit_length()
    exponent -= abs(x) < Fraction(2) ** exponent
    quantum = Fraction(2) ** max(exponent - 23, -149)
    return float(round(x / quantum) * quantum)


float32 = st.floats(-(2.0**60), 2.0**60, width=32)


@examples(1000)
@given(float32, float32, float32)
@example(1 + 2.0**-12, 1 + 2.0**-12, 2.0**-80)  # the product is half way between two float32,
@example(1 + 2.0**-12, 1 + 2.0**-12, -(2.0**-80))  # and float64 would lose the addend that decides
@example(1 + 2.0**-12, 1 + 2.0**-12, 0.0)
@example(-1 - 2.0**-12, 1 + 2.0**-12, 2.0**-80)
@example(2.0**-100, 2.0**-49, 2.0**-149)  # subnormal
@example(1 + 2.0**-23, 1 - 2.0**-24, -1.0)  # cancels
def test_fma_rounds_once(a: float, b: float, c: float) -> None:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    assert specification.fma(np.float32(a), np.float32(b), np.float32(c)) == round_to_float32(exact)


def test_fma_on_arrays_near_ties() -> None:
    rng = np.random.default_rng(0)
    a = (1 + rng.integers(0, 4096, 2000) * 2.0**-12).astype(np.float32)
    b = (1 + rng.integers(0, 4096, 2000) * 2.0**-12).astype(np.float32)
    c = (rng.choice([-1, 0, 1], 2000) * 2.0 ** rng.integers(-120, 0, 2000)).astype(np.float32)
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    np.testing.assert_array_equal(specification.fma(a, b, c), [round_to_float32(x) for x in exact])


def test_philox_known_answers() -> None:
    lines = (Path(__file__).parent / "kat_philox.txt").read_text().splitlines()
    vectors = np.array([[int(word, 16) for word in line.split()] for line in lines if not line.startswith("#")])
    assert vectors.shape == (3, 10)
    for vector in vectors:
        block = specification.philox4x32(list(vector[:4].astype(np.uint64)), vector[4:6].tolist())
        np.testing.assert_array_equal(np.stack(block), vector[6:])


def test_words_are_philox_of_the_address() -> None:
    seed, layer, sample, purpose = 0x299F31D0A4093822, 0x13198A2E, 0x85A308D3, 0x03707344
    expected = [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]  # the vector of the digits of pi
    got = specification.words(seed, layer, sample, 4, start=4 * 0x243F6A88, purpose=purpose)
    np.testing.assert_array_equal(got, expected)


def test_last_element() -> None:
    counter = [np.uint64(word) for word in (0xFFFFFFFF, 2, 1, 0)]
    assert specification.words(3, 1, 2, 1, start=2**34 - 1)[0] == specification.philox4x32(counter, [3, 0])[3]


def test_negative_seed_is_its_twos_complement() -> None:
    np.testing.assert_array_equal(specification.words(-5, 1, 2, 9), specification.words(2**64 - 5, 1, 2, 9))


@given(
    st.integers(0, 2**34 - 40_000) | st.integers(0, 100),
    st.lists(st.integers(0, 13), max_size=6) | st.lists(st.integers(0, 9000), max_size=4),
)
def test_any_split_of_a_range_gives_the_same_numbers(start: int, counts: list[int]) -> None:
    whole = specification.lognormal(1, 2, 3, sum(counts), 0.5, start=start)
    pieces = []
    for count in counts:
        pieces.append(specification.lognormal(1, 2, 3, count, 0.5, start=start))
        start += count
    np.testing.assert_array_equal(whole, np.concatenate([*pieces, np.empty(0, np.float32)]))


def test_committed_table_is_the_fit() -> None:
    # Another LAPACK may round a coefficient the other way; 1 ulp of the smallest changes z by less than 1e-9.
    np.testing.assert_array_max_ulp(normal_table.fit_normal(), specification.NORMAL, maxulp=1)
    np.testing.assert_array_max_ulp(normal_table.fit_exp2(), specification.EXP2, maxulp=1)


@pytest.mark.skipif(not normal_table.CSRC_PATH.parent.exists(), reason="an installed package has no csrc/")
def test_both_copies_of_the_table_are_equal() -> None:
    assert normal_table.CSRC_PATH.read_bytes() == specification.NORMAL_PATH.read_bytes()


def test_normal_is_accurate_at_the_borders_and_between() -> None:
    dense = np.random.default_rng(0).integers(0, 2**31, 500_000).astype(np.uint32)
    small = (2.0 ** np.random.default_rng(1).uniform(0, 31, 100_000)).astype(np.uint32)  # as many in every octave
    for m in (BORDERS, dense, small):
        exact = ndtri((m + 0.5) * 2.0**-32)
        np.testing.assert_allclose(specification.standard_normal(m << np.uint32(1)), exact, rtol=0, atol=NORMAL_ERROR)


def test_normal_is_antisymmetric() -> None:
    even = BORDERS << np.uint32(1)
    lower, upper = specification.standard_normal(even), specification.standard_normal(even | np.uint32(1))
    assert (lower < 0).all()
    np.testing.assert_array_equal(upper, -lower)


def test_normal_ascends_across_the_borders() -> None:
    assert (np.diff(specification.standard_normal(BORDERS << np.uint32(1))) >= 0).all()


def test_normal_at_the_ends() -> None:
    word = np.array([0, 1, 2**32 - 2, 2**32 - 1], np.uint32)
    tail, centre = ndtri(2.0**-33), ndtri(0.5 - 2.0**-33)
    exact = [tail, -tail, centre, -centre]
    np.testing.assert_allclose(specification.standard_normal(word), exact, rtol=0, atol=NORMAL_ERROR)
    # float32(m) is 2^31 for the last 64 values of m: a p of 1/2 would leave the table.
    last = np.arange(2**31 - 200, 2**31, dtype=np.uint32) << np.uint32(1)
    z = specification.standard_normal(last)
    assert (z < 0).all()
    assert (z > -1e-6).all()


def test_exp2_is_accurate() -> None:
    x = np.linspace(-126, 126, 1_000_001).astype(np.float32)
    np.testing.assert_allclose(specification.exp2(x), np.exp2(x.astype(np.float64)), rtol=EXP2_ERROR)
    whole = np.arange(-126, 127)
    np.testing.assert_array_equal(specification.exp2(whole), 2.0**whole)


def test_exp2_ascends() -> None:
    for centre in (-0.5, 0, 0.5, 1):
        near = (centre + np.arange(-2000, 2000) * 2.0**-22).astype(np.float32)
        assert (np.diff(specification.exp2(near)) >= 0).all()


@pytest.mark.parametrize("x", [126.1, -127, math.inf, math.nan])
def test_exp2_refuses_what_overflows(x: float) -> None:
    with pytest.raises(ValueError, match="x must be"):
        specification.exp2([0.0, x])


@pytest.mark.parametrize("seed", [0, 1, 2**63, -1])
def test_distribution(seed: int) -> None:
    n = 1 << 20
    z = specification.standard_normal(specification.words(seed, 3, 4, n)).astype(np.float64)
    assert stats.kstest(z, "norm").pvalue > 1e-6
    # Moments 1 to 4 of N(0, 1) and the variances of z^k.
    for power, (moment, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], start=1):
        assert abs((z**power).mean() - moment) < SIGMAS * math.sqrt(variance / n)
    for limit in (3.0, 4.0):
        expected = n * 2 * stats.norm.sf(limit)
        assert abs((np.abs(z) > limit).sum() - expected) < SIGMAS * math.sqrt(expected) + SIGMAS**2 / 2


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 8},
        {"seed": 7 + 2**32},
        {"layer": 1},
        {"sample": 1},
        {"purpose": 1},
        {"start": 1},
        {"start": 2},
        {"start": 4},
    ],
)
def test_neighbouring_addresses_are_uncorrelated(other: dict[str, int]) -> None:
    n = 1 << 18
    address = {"seed": 7, "layer": 0, "sample": 0, "count": n, "start": 0, "purpose": 0}
    a = specification.standard_normal(specification.words(**address)).astype(np.float64)
    b = specification.standard_normal(specification.words(**(address | other))).astype(np.float64)
    assert abs((a * b).mean()) < SIGMAS / math.sqrt(n)
    assert abs(((a**2 - 1) * (b**2 - 1)).mean()) < SIGMAS * 2 / math.sqrt(n)


def test_lognormal_is_the_exponential_of_the_normal() -> None:
    z = specification.standard_normal(specification.words(7, 1, 2, 100_000)).astype(np.float64)
    for sigma, shift in [(0.5, 0.0), (0.1, -0.005), (2.0, 3.0), (0.0, 0.0), (0.0, 1.0)]:
        got = specification.lognormal(7, 1, 2, 100_000, sigma, shift)
        exact = np.exp(sigma * z + shift)
        # sigma log2(e) and the exponent are rounded to float32: an error of some 2^-24 in an exponent of up to 30.
        np.testing.assert_allclose(got, exact, rtol=EXP2_ERROR + 2 * (6.34 * sigma + abs(shift)) * 2.0**-24)


def test_lognormal_without_variation_is_one() -> None:
    np.testing.assert_array_equal(specification.lognormal(1, 2, 3, 100, 0.0), 1)


def test_noise_of_earlier_results_holds() -> None:
    """kat_lognormal.txt is frozen on purpose: if this fails, published results can no longer be replayed."""
    lines = (Path(__file__).parent / "kat_lognormal.txt").read_text().splitlines()
    for line in lines:
        if line.startswith("#"):
            continue
        seed, layer, sample, purpose, sigma, shift, start, *bits = line.split()
        expected = np.array([int(word, 16) for word in bits], np.uint32)
        address = {"seed": int(seed), "layer": int(layer), "sample": int(sample), "purpose": int(purpose)}
        got = specification.lognormal(
            **address, start=int(start), count=len(expected), sigma=float(sigma), shift=float(shift)
        )
        np.testing.assert_array_equal(got.view(np.uint32), expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 2**64),
        ("seed", -(2**63) - 1),
        ("seed", 1.0),
        ("layer", -1),
        ("layer", 2**32),
        ("sample", -1),
        ("sample", 2**32),
        ("sample", "0"),
        ("count", -1),
        ("count", 2**34 + 1),
        ("start", -1),
        ("start", 2**34 - 1),
        ("purpose", 2**32),
        ("sigma", -0.1),
        ("sigma", math.nan),
        ("sigma", math.inf),
        ("sigma", 14.0),
        ("shift", math.nan),
        ("shift", -math.inf),
    ],
)
def test_bad_arguments_are_named(name: str, value: object) -> None:
    arguments = {"seed": 0, "layer": 0, "sample": 0, "count": 4, "sigma": 0.5}
    # With start at the end of the range it is the count that does not fit.
    with pytest.raises(ValueError, match="count" if (name, value) == ("start", 2**34 - 1) else name):
        specification.lognormal(**(arguments | {name: value}))
