"""The C++ core against the specification, on every instruction set that is there, and its noise against statistics."""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
import sys
import sysconfig
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from hypothesis_profile import examples
from instruction_sets import ISAS
from isolated import NOT_EDITABLE
from scipy import stats
from scipy.special import ndtri
from torch import nn

from correctnet import LogNormalVariation, convert, evaluate
from correctnet.cli import main
from correctnet.crossbar.operators import noisy_linear
from correctnet.errors import UserError
from correctnet.noise import core, draw, specification

_native = core.extension

PACKAGE = Path(core.__file__).parents[1]

needs_core = pytest.mark.skipif(not core.status().built, reason="the C++ core was not built")

# A correct generator fails a two-sided test at this limit once in 10^6 seeds.
SIGMAS = -ndtri(0.5e-6)

seeds = st.integers(-(2**63), 2**64 - 1)
indices = st.integers(0, 2**32 - 1)
once_per_isa = examples(60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def expected_factor(shape: tuple[int, ...], *address: int, sigma: float, shift: float) -> torch.Tensor:
    """By the definition: the elements of (out, in, *kernel) count in the order (out, *kernel, in)."""
    out, channels, *kernel = shape
    flat = torch.from_numpy(specification.lognormal(*address, math.prod(shape), sigma, shift))
    return flat.view(out, *kernel, channels).movedim(-1, 1)


@once_per_isa
@given(
    seed=seeds,
    layer=indices,
    sample=indices,
    purpose=indices,
    start=st.integers(0, 1000) | st.integers(0, 2**34 - 700),
    count=st.integers(0, 700),
    sigma=st.floats(0, 3),
    shift=st.floats(-2, 2),
    flush=st.booleans(),
)
def test_bits_of_the_specification(
    isa: str,
    seed: int,
    layer: int,
    sample: int,
    purpose: int,
    start: int,
    count: int,
    sigma: float,
    shift: float,
    flush: bool,
) -> None:
    expected = specification.lognormal(seed, layer, sample, count, sigma, shift, start, purpose)
    if flush:
        torch.set_flush_denormal(True)
    try:
        got = draw.lognormal(seed, layer, sample, count, sigma, shift, start, purpose)
    finally:
        torch.set_flush_denormal(False)
    np.testing.assert_array_equal(got.numpy().view(np.uint32), expected.view(np.uint32))


def test_last_elements(isa: str) -> None:
    got = draw.lognormal(1, 2, 3, 100, 0.5, start=2**34 - 100)
    np.testing.assert_array_equal(got.numpy(), specification.lognormal(1, 2, 3, 100, 0.5, start=2**34 - 100))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("order", [None, "contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape", [(6, 1, 5, 5), (16, 6, 5, 5), (70, 67, 3, 3), (8, 16, 1, 1), (3, 4, 1, 7), (0, 4, 3, 3)]
)
def test_noisy_weight_of_a_convolution(isa: str, shape: tuple[int, ...], order: str | None, dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = (weight.float() * expected_factor(shape, 5, 6, 7, sigma=0.5, shift=-0.125)).to(dtype)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        got = draw.noisy_weight(weight.contiguous(memory_format=memory_format), 5, 6, 7, 0.5, -0.125, order)
        assert got.dtype == dtype
        assert torch.equal(got, expected)
        if order is not None:
            memory_format = torch.channels_last if order == "channels_last" else torch.contiguous_format
        assert got.is_contiguous(memory_format=memory_format) or not got.numel()


@pytest.mark.parametrize("shape", [(10, 84), (1, 1), (500, 401), (5, 3, 7), (2, 3, 2, 2, 2)])
def test_noisy_weight_of_other_layers(isa: str, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = weight * expected_factor(shape, 5, 6, 7, sigma=0.5, shift=0.0)
    assert torch.equal(draw.noisy_weight(weight, 5, 6, 7, 0.5), expected)
    assert torch.equal(draw.noisy_weight(weight, 5, 6, 7, 0.5, dtype=torch.bfloat16), expected.bfloat16())


def test_bfloat16_results_below_the_normal_numbers_are_zero(isa: str) -> None:
    weight = torch.tensor([[1e-39, -1.1e-38, 0.0, 1.2e-38, -1.2e-38, 1e-42, -1.0]])
    expected = torch.tensor([[0.0, -0.0, 0.0, 1.2e-38, -1.2e-38, 0.0, -1.0]]).bfloat16()
    got = draw.noisy_weight(weight, 1, 2, 3, 0.0, dtype=torch.bfloat16)
    assert torch.equal(got.view(torch.int16), expected.view(torch.int16))


def test_strided_weights_are_taken_as_they_look(isa: str) -> None:
    whole = torch.randn(12, 10, 3, 3, generator=torch.Generator().manual_seed(0))
    for weight in (whole[::2, 1::3], whole[:, :, 0, 0].t(), whole.transpose(2, 3), whole[:1].expand(4, -1, -1, -1)):
        expected = draw.noisy_weight(weight.clone(memory_format=torch.contiguous_format), 1, 2, 3, 0.5)
        assert torch.equal(draw.noisy_weight(weight, 1, 2, 3, 0.5), expected)


def test_gradient_is_the_same_multiplication() -> None:
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    noisy = draw.noisy_weight(weight, 1, 2, 3, 0.5)
    assert not noisy.requires_grad
    assert torch.equal(draw.noisy_weight(noisy.sign(), 1, 2, 3, 0.5).sign(), weight.sign())


@needs_core
def test_any_number_of_threads_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(256, 128, 3, 3, generator=torch.Generator().manual_seed(0))
    one = draw.noisy_weight(weight, 1, 2, 3, 0.5), draw.lognormal(1, 2, 3, 300_001, 0.5, start=3)
    for threads in (2, 3, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(draw.noisy_weight(weight, 1, 2, 3, 0.5), one[0])
        assert torch.equal(draw.lognormal(1, 2, 3, 300_001, 0.5, start=3), one[1])


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 2**64),
        ("layer", -1),
        ("sample", 2**32),
        ("sample", 1.5),
        ("count", -1),
        ("start", 2**34),
        ("purpose", -1),
        ("sigma", -0.5),
        ("sigma", math.nan),
        ("sigma", 20.0),
        ("shift", math.inf),
    ],
)
def test_bad_arguments_are_named(isa: str, name: str, value: float) -> None:
    arguments = {"seed": 0, "layer": 0, "sample": 0, "count": 4, "sigma": 0.5}
    with pytest.raises(ValueError, match="count" if name == "start" else name):
        draw.lognormal(**(arguments | {name: value}))


def test_bad_weights_are_refused(isa: str) -> None:
    with pytest.raises(ValueError, match="weight must be floating point"):
        draw.noisy_weight(torch.zeros(3), 1, 2, 3, 0.5)
    with pytest.raises(ValueError, match="weight must be floating point"):
        draw.noisy_weight(torch.zeros(3, 3, dtype=torch.int32), 1, 2, 3, 0.5)
    with pytest.raises(ValueError, match="order must be"):
        draw.noisy_weight(torch.zeros(3, 3), 1, 2, 3, 0.5, order="channels_last")
    with pytest.raises(ValueError, match="order must be"):
        draw.noisy_weight(torch.zeros(3, 3, 1, 1), 1, 2, 3, 0.5, order="nhwc")
    with pytest.raises(ValueError, match="sigma"):
        draw.noisy_weight(torch.zeros(3, 3), 1, 2, 3, -0.5)


# ---- the choice of code ---------------------------------------------------------------------------------------------


STATUS = "from correctnet.noise import core, draw; print(core.status())"


def run(code: str, package: Path = PACKAGE, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python code in a process of its own that imports correctnet from the folder of `package`."""
    keep = {name: value for name, value in os.environ.items() if name != "CORRECTNET_ISA"}
    environment = keep | environment
    return subprocess.run(
        [sys.executable, "-c", NOT_EDITABLE + code], env=environment, cwd=package.parent, capture_output=True, text=True
    )


@needs_core
def test_environment_variable_forces_an_isa() -> None:
    for isa in ("portable", core.status().available[-1]):
        done = run(STATUS, CORRECTNET_ISA=isa)
        assert f"isa='{isa}'" in done.stdout, done.stderr
        assert "CORRECTNET_ISA asks for it" in done.stdout
    assert f"isa='{core.status().available[-1]}'" in run(STATUS, CORRECTNET_ISA="").stdout


@needs_core
@pytest.mark.parametrize("isa", [*ISAS, "AVX2", "sse9"])
def test_environment_variable_must_name_what_the_machine_has(isa: str) -> None:
    if isa in core.status().available:
        pytest.skip(f"this machine has {isa}")
    done = run(STATUS, CORRECTNET_ISA=isa)
    assert done.returncode
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("correctnet.errors.UserError: CORRECTNET_ISA: instruction set")
    assert isa in last
    assert "portable" in last


def copy_without_core(target: Path) -> Path:
    package = target / "correctnet"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("_native*", "__pycache__"))
    return package


def test_without_the_core_numpy_computes_and_says_so(tmp_path: Path) -> None:
    package = copy_without_core(tmp_path)
    done = run(STATUS + "; print(draw.lognormal(1, 2, 3, 3, 0.5).tolist())", package)
    assert "built=False, isa='numpy'" in done.stdout, done.stderr
    # Where a package with the core is installed, `status` says that the copy hides it.
    assert "was not built" in done.stdout or "have no C++ core" in done.stdout or "has no C++ core" in done.stdout
    assert str(specification.lognormal(1, 2, 3, 3, 0.5).tolist()) in done.stdout
    assert "CORRECTNET_ISA is set, but the C++ core was not built" in run(STATUS, package, CORRECTNET_ISA="avx2").stderr


def test_a_core_that_does_not_load_is_an_error(tmp_path: Path) -> None:
    package = copy_without_core(tmp_path)
    (package / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"no library")
    done = run(STATUS, package)
    assert done.returncode
    assert "ImportError" in done.stderr


def test_isa_without_the_core_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "extension", None)
    monkeypatch.setenv("CORRECTNET_ISA", "avx2")
    with pytest.raises(UserError, match="CORRECTNET_ISA"):
        core.status()


# ---- known answers --------------------------------------------------------------------------------------------------


class Changed:
    """The core, but for one function."""

    def __init__(self, name: str, function: Callable[..., object]) -> None:
        setattr(self, name, function)

    def __getattr__(self, name: str) -> object:
        return getattr(_native, name)


def one_bit_off(noise: object, seed: int, sample: int, first: int, count: int, out: int, threads: int) -> None:
    _native.lognormal(noise, seed, sample, first, count, out, threads)
    bits = np.ctypeslib.as_array(ctypes.cast(out, ctypes.POINTER(ctypes.c_uint32)), (count,))
    bits[count // 2] ^= 1


def truncated(noise: object, seed: int, sample: int, weight: int, out: int, channels: int, **options: object) -> None:
    words = np.ctypeslib.as_array(ctypes.cast(weight, ctypes.POINTER(ctypes.c_uint32)), (channels,))
    np.ctypeslib.as_array(ctypes.cast(out, ctypes.POINTER(ctypes.c_uint16)), (channels,))[:] = words >> 16


def array_bit_off(*arguments: object, out: int, channels: int, spread: int = 0, **options: object) -> None:
    _native.noisy_weight(*arguments, out=out, channels=channels, spread=spread, **options)
    if spread:
        bits = np.ctypeslib.as_array(ctypes.cast(out, ctypes.POINTER(ctypes.c_uint32)), (channels,))
        bits[channels // 2] ^= 1


class WithoutNan:
    def __init__(self, *arguments: object) -> None:
        self.plan = _native.Plan(*arguments)

    def __getattr__(self, name: str) -> object:
        return getattr(self.plan, name)

    def outputs(self, images: np.ndarray, **options: object) -> tuple[np.ndarray, int]:
        outputs, drawn = self.plan.outputs(images, **options)
        return np.nan_to_num(outputs), drawn


WRONG = {
    "factors": ("lognormal", one_bit_off),
    "rounding to bfloat16": ("noisy_weight", truncated),
    "gaussian weights": ("noisy_weight", array_bit_off),
    "NaN and infinity": ("Plan", WithoutNan),
}


@needs_core
@pytest.mark.parametrize("what", WRONG)
def test_a_core_that_computes_other_bits_is_an_error(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "extension", Changed(*WRONG[what]))
    said = rf"the C\+\+ core computes other bits than specified \({what}, {_native.isa()}\): .*install correctnet again"
    weight = torch.ones(3, 4)
    for use in (
        lambda: draw.lognormal(1, 2, 3, 4, 0.5),
        lambda: draw.noisy_weight(weight, 1, 2, 3, 0.5),
        lambda: noisy_linear(weight, torch.ones(3, 4), seed=0, layer=0, sigma=0.5),
        lambda: evaluate(convert(nn.Linear(4, 3), LogNormalVariation(0.5)), (weight, torch.zeros(3).long()), 1),
        core.status,
    ):
        with pytest.raises(UserError, match=said):
            use()
    assert "other bits than specified" in core.status(check=False).problem
    text = CliRunner().invoke(main, ["info"])
    assert text.exit_code == 0
    assert f"  it computes other bits than specified ({what}, " in text.output


@needs_core
def test_a_core_that_makes_subnormal_numbers_zeros_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "_flushes", True)
    core._wrong_answer.cache_clear()
    try:
        with pytest.raises(UserError, match="subnormal numbers are zeros since it was loaded"):
            draw.lognormal(1, 2, 3, 4, 0.5)
    finally:
        core._wrong_answer.cache_clear()


@needs_core
def test_the_core_gives_the_known_answers(isa: str) -> None:
    if isa != "numpy":
        assert core._wrong_answer.__wrapped__(core.extension, isa) is None


def test_known_answers_are_the_specification_s() -> None:
    frozen = (Path(__file__).parent / "kat_lognormal.txt").read_text().splitlines()
    lines = {tuple(line.split()[:7]): line.split()[7:] for line in frozen if not line.startswith("#")}
    for (seed, layer, sample, purpose, sigma, shift, start), first, count, crc in core.KNOWN_FACTORS:
        line = lines[tuple(str(n) for n in (seed, layer, sample, purpose, sigma, shift, start))]
        assert [int(word, 16) for word in line[: len(first)]] == list(first)
        factors = specification.lognormal(seed, layer, sample, count, sigma, shift, start, purpose)
        assert zlib.crc32(factors.astype("<f4").tobytes()) == crc
    numbers = torch.tensor(np.array(list(core._ROUNDED), np.uint32).view(np.float32))
    smallest = torch.finfo(torch.float32).tiny
    wanted = torch.where(numbers.abs() < smallest, 0 * numbers, numbers).bfloat16()
    assert wanted.view(torch.int16).numpy().view(np.uint16).tolist() == list(core._ROUNDED.values())


# ---- statistics: every bound holds for all but one in 10^6 seeds ----------------------------------------------------

DRAWS = 10_000_000


def drawn(count: int = DRAWS, seed: int = 2024, layer: int = 0, sample: int = 0, start: int = 0) -> np.ndarray:
    """Standard normal numbers, as the logarithms of factors at sigma = 1."""
    return np.log(draw.lognormal(seed, layer, sample, count, 1.0, start=start).numpy().astype(np.float64))


@pytest.fixture(scope="module")
def normals() -> np.ndarray:
    if not core.status().built:
        pytest.skip("the C++ core was not built; tests/test_reference.py has a smaller version")
    return drawn()


def test_moments(normals: np.ndarray) -> None:
    # E z^k, and the variance of z^k, from E z^(2k) = 1, 3, 15, 105, 945, 10395 for k = 1, 2, ...
    even = [1, 1, 3, 15, 105, 945, 10395]
    for k in range(1, 7):
        mean = 0 if k % 2 else even[k // 2]
        deviation = math.sqrt((even[k] - mean**2) / len(normals))
        assert abs((normals**k).mean() - mean) < SIGMAS * deviation, k


def test_kolmogorov_smirnov(normals: np.ndarray) -> None:
    assert stats.kstest(normals, "norm").pvalue > 1e-6


def test_chi_square_of_equal_cells(normals: np.ndarray) -> None:
    cells = 4096
    counts = np.histogram(stats.norm.cdf(normals), bins=cells, range=(0, 1))[0]
    assert counts.sum() == len(normals)
    assert stats.chisquare(counts).pvalue > 1e-6


@needs_core
def test_tails() -> None:
    limits = np.array([4.0, 4.5, 5.0, 5.5])
    above, below, draws = np.zeros(4), np.zeros(4), 0
    for sample in range(20):
        z = draw.lognormal(2024, 1, sample, DRAWS, 1.0).numpy()  # compared by factor: exp is monotone
        above += [(z > math.exp(limit)).sum() for limit in limits]
        below += [(z < math.exp(-limit)).sum() for limit in limits]
        draws += len(z)
    expected = draws * stats.norm.sf(limits)  # 6334 of 2 * 10^8 beyond 4, 3.8 beyond 5.5
    for count in (above, below):
        assert (stats.poisson.cdf(count, expected) > 1e-6 / 8).all()
        assert (stats.poisson.sf(count - 1, expected) > 1e-6 / 8).all()


@pytest.mark.parametrize(
    "other",
    [{"layer": 1}, {"layer": 2**31}, {"sample": 1}, {"sample": 2**30}, {"seed": 2025}, {"seed": 2024 + 2**32}]
    + [{"start": start} for start in (1, 2, 3, 4, 5, 8, 64, 2**20, 2**33)],
    ids=str,
)
def test_independence(normals: np.ndarray, other: dict[str, int]) -> None:
    """Of the same element in other layers, samples and seeds, and of other elements."""
    a, b = normals[:2_000_000], drawn(2_000_000, **other)
    assert not np.array_equal(a, b)
    n = len(a)
    assert abs((a * b).mean()) < SIGMAS / math.sqrt(n)
    assert abs(((a**2 - 1) * (b**2 - 1)).mean()) < SIGMAS * 2 / math.sqrt(n)
    # Counts in a 16 x 16 table of equally likely cells.
    u, v = (np.minimum((stats.norm.cdf(z) * 16).astype(int), 15) for z in (a, b))
    assert stats.chisquare(np.bincount(u * 16 + v, minlength=256)).pvalue > 1e-6


def test_sums_over_chips_are_normal(normals: np.ndarray) -> None:
    """Over 1000 chips, the mean of each of 1000 elements: their variance would betray a dependence between samples."""
    sums = sum(drawn(1000, sample=sample) for sample in range(1000)) / math.sqrt(1000)
    assert stats.kstest(sums, "norm").pvalue > 1e-6
    assert abs((sums**2).mean() - 1) < SIGMAS * math.sqrt(2 / 1000)
