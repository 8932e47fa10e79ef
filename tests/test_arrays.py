"""Noise that arrays describe: its specification, frozen answers, and the kernels of every instruction set."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from hypothesis_profile import examples

from correctnet.devices.device import Faults
from correctnet.noise import arrays, core, draw, specification
from correctnet.noise.arrays import ArrayNoise, FaultTable, Outcome

HERE = Path(__file__).parent
once_per_isa = examples(40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def noise_of(
    shape: tuple[int, ...], kind: str, faults: tuple[float, float] | None = None, cell: str = "pair"
) -> ArrayNoise:
    """Arrays with exact, spared and varying weights."""
    random = torch.Generator().manual_seed(1)
    mean = torch.randn(shape, generator=random)
    spread = torch.rand(shape, generator=random) + 0.01 if kind == "gaussian" else torch.ones(shape)
    chosen = torch.rand(shape, generator=random)
    spread = torch.where(chosen < 0.2, 0.0, torch.where(chosen < 0.4, -0.0, spread))
    mean = arrays.rounded(mean, spread.abs())[0]
    factor = {} if kind == "gaussian" else {"sigma": 0.5, "shift": -0.125}
    if faults is None:
        return ArrayNoise(mean, spread, **factor)
    table = FaultTable.of(*Faults(*faults).outcomes(cell), gains=(0.03, 0.05))
    return ArrayNoise(mean, spread, **factor, faults=table, reach=torch.linspace(0.5, 3, shape[0]))


def by_element(noise: ArrayNoise, seed: int, layer: int, sample: int) -> torch.Tensor:
    """The definition, weight by weight."""
    size = noise.mean.numel()
    z = specification.standard_normal(specification.words(seed, layer, sample, size))
    u = specification.words(seed, layer, sample, size, purpose=1) >> np.uint32(1)
    _, channels, *kernel = noise.mean.shape
    taps, found = int(np.prod(kernel)), torch.empty(noise.mean.shape)
    for o, c, *k in np.ndindex(noise.mean.shape):
        tap = int(np.ravel_multi_index(k, kernel)) if kernel else 0
        i, place = (o * taps + tap) * channels + c, (o, c, *k)
        mean, spread = (np.float32(t[place].item()) for t in (noise.mean, noise.spread))
        if noise.sigma is None:
            value = specification.fma(z[i], spread, mean)
        else:
            a, b = specification.log2_scale(noise.sigma, noise.shift)
            value = mean * specification.exp2(specification.fma(z[i], a * spread, b * spread))
        if noise.faults is not None and not np.signbit(spread):
            outcome = sum(int(u[i]) > t for t in noise.faults.thresholds)
            reach = np.float32(noise.reach[o].item())
            factor = gain(noise.faults, seed, layer, sample, o)
            keep, move = (np.float32(v[outcome]) for v in (noise.faults.keep, noise.faults.move))
            moved = move * reach * factor
            moved = -moved if noise.faults.signed and np.signbit(mean) else moved
            value = specification.fma(keep * factor, value, moved)
        found[place] = float(value)
    return found


def gain(table: FaultTable, seed: int, layer: int, sample: int, output: int) -> np.float32:
    """The gain of an output by its definition."""
    words = [
        specification.words(seed, 0, sample, 1, purpose=6),
        specification.words(seed, layer, sample, 1, start=output, purpose=4),
    ]
    chip, column = (specification.standard_normal(word)[0] for word in words)
    one = np.float32(1)
    scaled = (
        specification.fma(chip, np.float32(table.chip_gain), one),
        specification.fma(column, np.float32(table.column_gain), one),
    )
    return scaled[0] * scaled[1]


KINDS = [("gaussian", None), ("lognormal", None), ("gaussian", (0.3, 0.2)), ("lognormal", (0.3, 0.2))]


@pytest.mark.parametrize("shape", [(3, 5, 2, 4), (7, 6), (2, 3, 5)])
@pytest.mark.parametrize(("kind", "faults"), KINDS)
@pytest.mark.parametrize("cell", ["pair", "two-sided", "offset", "direct"])
def test_specification_weight_by_weight(shape, kind, faults, cell):
    noise = noise_of(shape, kind, faults, cell)
    found = torch.from_numpy(arrays.programmed(noise, 9, 2, 11)).movedim(-1, 1)
    assert torch.equal(found, by_element(noise, 9, 2, 11))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(6, 1, 5, 5), (70, 67, 3, 3), (500, 401), (1, 1), (0, 4, 3, 3), (5, 3, 7)])
@pytest.mark.parametrize(("kind", "faults"), KINDS)
def test_bits_of_the_specification(isa, shape, kind, faults, dtype):
    noise = noise_of(shape, kind, faults)
    wanted = torch.from_numpy(arrays.programmed(noise, 5, 6, 7)).movedim(-1, 1)
    found = draw.programmed(noise, 5, 6, 7, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, wanted.to(dtype))


@once_per_isa
@given(
    seed=st.integers(-(2**63), 2**64 - 1),
    layer=st.integers(0, 2**32 - 1),
    sample=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 9),
    columns=st.integers(1, 200),
    kind=st.sampled_from(KINDS),
    cell=st.sampled_from(["pair", "two-sided", "offset", "direct"]),
    flush=st.booleans(),
)
def test_any_address_and_any_rows(isa, seed, layer, sample, rows, columns, kind, cell, flush):
    noise = noise_of((rows, columns), *kind, cell)
    if flush:
        torch.set_flush_denormal(True)
    try:
        found = draw.programmed(noise, seed, layer, sample)
    finally:
        torch.set_flush_denormal(False)
    assert np.array_equal(found.numpy().view(np.uint32), arrays.programmed(noise, seed, layer, sample).view(np.uint32))


def test_any_number_of_threads_gives_the_same(monkeypatch):
    noise = noise_of((256, 128, 3, 3), "gaussian", (0.1, 0.1))
    one = draw.programmed(noise, 1, 2, 3)
    for threads in (2, 3, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(draw.programmed(noise, 1, 2, 3), one)


def test_spread_1_is_the_factor_of_the_lognormal():
    """An array of ones changes no chip."""
    weight = torch.randn(20, 30, 3, 3)
    noise = ArrayNoise(weight, torch.ones_like(weight), 0.5, -0.125)
    assert torch.equal(draw.programmed(noise, 1, 2, 3), draw.noisy_weight(weight, 1, 2, 3, 0.5, -0.125))


@pytest.mark.parametrize("name", ["kat_gaussian.txt", "kat_faults.txt"])
def test_noise_of_earlier_results_holds(name):
    """The files are frozen on purpose: if this fails, published results can no longer be replayed."""
    count = 0
    for line in (HERE / name).read_text().splitlines():
        if line.startswith("#"):
            continue
        seed, layer, sample, kind, sigma, shift, start, stuck, signed, reach, chip, column, *rest = line.split()
        thresholds, keep, move = (
            tuple(map(int, rest[:5])),
            tuple(map(float, rest[5:11])),
            tuple(map(float, rest[11:17])),
        )
        mean, spread, wanted = np.array([int(word, 16) for word in rest[17:]], np.uint32).reshape(-1, 3).T.copy()
        mean, spread = mean.view(np.float32), spread.view(np.float32)
        address = int(seed), int(layer), int(sample)
        table = FaultTable(thresholds, keep, move, signed == "1", float(chip), float(column))
        found = arrays.values(
            *(*address, mean, spread),
            factor=None if kind == "gaussian" else (float(sigma), float(shift)),
            faults=table if stuck == "1" else None,
            reach=np.full(len(mean), float(reach), np.float32),
            gain=np.full(len(mean), arrays.gains(*address, 1, table)[0]),  # all of them are of output 0
            start=int(start),
        )
        assert np.array_equal(found.view(np.uint32), wanted), line[:60]
        count += len(wanted)
    assert count > 90


def test_rounding_of_moments():
    mean, spread = arrays.rounded(
        torch.tensor([[-0.0, 1e-40, 0.1]], dtype=torch.float64), torch.tensor([[2.0**-65, 2.0**-64, 3.0]])
    )
    assert torch.equal(mean, torch.tensor([[0.0, 0.0, 0.1]]))
    assert not mean.signbit().any()
    assert spread.tolist() == [[0, 2.0**-64, 3]]


ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"spread": torch.ones(3, 2)}, "differ in shape"),
        ({"mean": torch.ones(3), "spread": torch.ones(3)}, "differ in shape"),
        ({"mean": ONES.double()}, "must be float32"),
        ({"mean": ONES * float("inf")}, "not finite"),
        ({"spread": ONES * 2.0**65}, "a spread is neither 0 nor"),
        ({"spread": ONES * 2.0**-65}, "a spread is neither 0 nor"),
        ({"spread": ONES * float("nan")}, "a spread is neither 0 nor"),
        ({"spread": ONES / 2, "sigma": 0.5}, "must be 0 or 1"),
        ({"sigma": -1.0}, "sigma must be"),
        ({"reach": torch.ones(2)}, "belong together"),
        ({"faults": FaultTable.of([Outcome(1, 1, 0)], False)}, "belong together"),
        ({"faults": FaultTable.of([Outcome(1, 1, 0)], False), "reach": torch.ones(3)}, "reach must be"),
        ({"faults": FaultTable.of([Outcome(1, 1, 0)], False), "reach": -torch.ones(2)}, "reach must be"),
    ],
)
def test_arrays_that_cannot_be_drawn(change, what):
    with pytest.raises(ValueError, match=what):
        replace(ArrayNoise(ONES, ONES), **change)


@pytest.mark.parametrize(
    ("outcomes", "what"),
    [([], "one to 6"), ([Outcome(0.5, 1, 0)], "sum to"), ([Outcome(-0.5, 1, 0), Outcome(1.5, 1, 0)], ">= 0")],
)
def test_outcomes_that_are_none(outcomes, what):
    with pytest.raises(ValueError, match=what):
        FaultTable.of(outcomes, False)


def test_bad_addresses_are_named(isa):
    with pytest.raises(ValueError, match="sample"):
        draw.programmed(ArrayNoise(ONES, ONES), 0, 0, 2**32)


@pytest.mark.parametrize(("kind", "faults"), core.KNOWN_ARRAYS)
def test_known_answers_are_those_of_the_specification(kind, faults):
    """What the core is asked before it is used."""
    mean, spread = core.array_question(kind)
    table = FaultTable(**core.KNOWN_FAULTS)
    factor = None if kind == "gaussian" else (0.5, -0.125)
    reach, gain = np.full(len(mean), 1.5, np.float32), np.repeat(arrays.gains(42, 3, 7, 1, table), len(mean))
    answer = arrays.values(42, 3, 7, mean, spread, factor, table if faults else None, reach, gain)
    assert zlib.crc32(answer.astype("<f4").tobytes()) == core.KNOWN_ARRAYS[kind, faults]
