"""Devices of which moments are known: what chips carry against closed forms, samples and naive simulations."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from correctnet.devices.base import Moments
from correctnet.devices.device import Device, Faults, Gain, Mapping
from correctnet.devices.gaussian import GaussianVariation
from correctnet.devices.lognormal import LogNormalVariation
from correctnet.devices.programming import Table
from correctnet.devices.protected import Protected
from correctnet.errors import UserError
from correctnet.methods.suppression import bound, bounds
from correctnet.noise import arrays, specification

CELLS = ["pair", "two-sided", "offset", "direct"]


def flat_weight(*values: float, repeat: int = 40_000) -> Tensor:
    """Each value `repeat` times, one a row; the largest one says what the range is worth."""
    return torch.tensor(values).repeat_interleave(repeat).view(len(values), repeat)


def device(cell: str = "pair", **options: Any) -> Device:
    """A device whose deviation depends on its state, and whose range does not begin at 0."""
    table = Table.of("uS", [2.0, 6.0, 22.0], [2.0, 6.5, 21.0], [1.5, 0.8, 2.0])
    return Device._with(table, {"cell": cell, **options})


# ---- moments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_mean_and_deviation_of_chips(cell):
    """What 40,000 weights of a chip have against the moments, and those against two devices drawn on their own."""
    values = (1.0, -0.6, 0.2, 0.0)
    weight, made = flat_weight(*values), device(cell)
    drawn = made.sample(weight, seed=3, layer=1, sample=7).double()
    mean, std = (m[:, 0] for m in made.moments(weight))
    n = weight.shape[1]
    assert ((drawn.mean(1) - mean).abs() < 5 * std / math.sqrt(n)).all()
    assert ((drawn.std(1) - std).abs() <= 5 * std / math.sqrt(2 * n)).all()

    random, low = np.random.default_rng(5), 2.0

    def state(target: float) -> np.ndarray:
        at = [np.interp(target, (2, 6, 22), column) for column in ((2, 6.5, 21), (1.5, 0.8, 2.0))]
        return np.maximum(random.normal(*at, 400_000), 0)

    for w, m, s in zip(values, mean.tolist(), std.tolist(), strict=True):
        if cell == "offset":
            found = (state(low + 20 * (1 + w) / 2) - 12) / 10
        elif cell == "two-sided":
            found = (state(low + 20 * (1 + w) / 2) - state(low + 20 * (1 - w) / 2)) / 20
        else:
            found = state(low + 20 * abs(w)) - (state(low) if cell == "pair" else low)
            found = math.copysign(1, w) * found / 20
        assert found.mean() == pytest.approx(m, abs=5 * found.std() / math.sqrt(found.size))
        assert found.std() == pytest.approx(s, rel=5 * math.sqrt(stats.kurtosis(found) + 2) / 2 / math.sqrt(found.size))


@pytest.mark.parametrize("cell", CELLS)
def test_an_ideal_device_gives_the_weight_back(cell):
    table = Table.of("relative", [0.0, 1.0], [0.0, 1.0], [0.3, 0.3])
    weight = torch.randn(9, 5, 3, 3)
    made = Device(table, Mapping(cell=cell), noise=0.0)
    drawn = made.sample(weight, 0, 0, 0)
    if cell == "direct":
        assert torch.equal(drawn, weight)
    torch.testing.assert_close(drawn, weight, rtol=3e-7, atol=3e-7)


def test_deviation_in_an_offset_cell_is_twice_that_of_one_device():
    table = Table.of("relative", [0.0, 1.0], [0.0, 1.0], [1e-3, 1e-3])
    at = torch.tensor([0.5], dtype=torch.float64)
    single, pair, offset, both = (
        Device(table, Mapping(cell=cell)).curve(at).std.item() for cell in ("direct", "pair", "offset", "two-sided")
    )
    assert single == pytest.approx(1e-3)
    assert offset == pytest.approx(2e-3)
    assert both == pytest.approx(math.sqrt(2) * 1e-3)
    # The idle device of the pair is at 0, and a normal number that cannot be negative deviates by less.
    idle = 1e-3 * math.sqrt(0.5 - 0.5 / math.pi)
    assert pair == pytest.approx(math.hypot(1e-3, idle))


def test_a_scale_for_each_output():
    weight = torch.tensor([[1.0, 0.5], [0.02, -0.01]])
    whole, each = device().moments(weight), device(scale="output").moments(weight)
    assert torch.equal(whole.std[0], each.std[0])
    torch.testing.assert_close(each.std[1] * 50, each.std[0])
    assert (whole.std[1] > 20 * each.std[1]).all()


def test_clipping():
    weight = torch.tensor([[3.0, -4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])  # root mean square sqrt(25 / 8)
    made = Device(Table.of("relative", [0.0, 1.0], [0.0, 1.0], [0.0, 0.0]), Mapping(clip_rms=2.0))
    top = 2 * math.sqrt(25 / 8)
    torch.testing.assert_close(made.moments(weight).mean[0, :2], torch.tensor([3.0, -top], dtype=torch.float64))
    assert made.mapping.largest(weight).item() == pytest.approx(top)
    assert Mapping(clip_rms=5.0).largest(weight).item() == 4  # above the largest weight it does nothing
    assert Mapping(clip_rms=2.0, scale="output").largest(weight).flatten().tolist() == [4.0, 0.0]


def test_levels():
    ideal = Device(Table.of("relative", [0.0, 1.0], [0.0, 1.0], [0.0, 0.0]), Mapping(levels=5))
    x = torch.tensor([0.0, 0.1, 0.13, -0.4, 0.9, 1.0], dtype=torch.float64)
    assert ideal.curve(x).mean.tolist() == [0, 0, 0.25, -0.5, 1, 1]
    x.requires_grad_()
    ideal.curve(x).mean.sum().backward()
    assert x.grad.tolist() == [1] * 6  # straight through


def test_the_mean_on_the_weight():
    made = device(centre="mean", cell="offset")
    reachable = made.curve(torch.linspace(-1, 1, 3, dtype=torch.float64)).mean  # the means that there are
    x = torch.linspace(-1, 1, 101, dtype=torch.float64)
    mean, std = made.curve(x)
    torch.testing.assert_close(mean, x.clamp(reachable[0].item(), reachable[-1].item()))
    # At the target that the curve of the means says, the deviation is that of the device.
    plain = device(cell="offset")
    for at, wanted in zip(mean[10:90:20], std[10:90:20], strict=True):
        low, high = -1.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            found = plain.curve(torch.tensor([middle], dtype=torch.float64))
            low, high = (middle, high) if found.mean < at else (low, middle)
        assert found.std.item() == pytest.approx(wanted.item(), rel=1e-3)


def test_a_layer_of_zeros_stays_zero():
    assert not device().sample(torch.zeros(4, 3), 0, 0, 0).any()
    with pytest.raises(ValueError, match="all weights are 0"):
        device().bound(torch.zeros(4, 3))


def test_weights_that_are_not_finite():
    with pytest.raises(UserError, match="not finite"):
        device().sample(torch.tensor([[1.0, math.nan]]), 0, 0, 0)


# ---- chips ----------------------------------------------------------------------------------------------------------


def test_chips_have_addresses():
    weight, made = torch.randn(6, 5, 3, 3), device().stuck(0.1, 0.1)
    here = made.sample(weight, 1, 2, 3)
    assert torch.equal(here, made.sample(weight, 1, 2, 3))
    assert here.shape == weight.shape
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not torch.equal(here, made.sample(weight, *other))


def test_elements_count_out_kh_kw_in_with_the_normals_of_the_lognormal():
    weight = torch.randn(3, 5, 2, 4)
    made = device()
    mean, std = (m.float() for m in made.moments(weight))
    z = specification.standard_normal(specification.words(9, 2, 11, weight.numel()))
    drawn = made.sample(weight, 9, 2, 11)
    for out, inp, row, column in np.ndindex(3, 5, 2, 4):
        i = ((out * 2 + row) * 4 + column) * 5 + inp
        place = out, inp, row, column
        assert drawn[place] == specification.fma(z[i], std[place].item(), mean[place].item())


def test_dtypes_see_the_same_chip():
    weight = torch.randn(8, 8).bfloat16()
    made = device().stuck(0.1)
    single = made.sample(weight.float(), 0, 0, 1)
    assert torch.equal(made.sample(weight, 0, 0, 1), single.bfloat16())
    assert torch.equal(made.sample(weight.double(), 0, 0, 1), single.double())


@pytest.mark.parametrize("pair", [(0, 1), (0, 2)])
def test_purposes_are_independent(pair):
    n = 1 << 18
    a, b = (specification.standard_normal(specification.words(7, 0, 0, n, purpose=p)).astype(np.float64) for p in pair)
    assert abs((a * b).mean()) < 5 / math.sqrt(n)


# ---- stuck devices --------------------------------------------------------------------------------------------------


def naive_faults(cell: str, w: float, p: float, q: float, n: int) -> np.ndarray:
    """Weights whose devices are stuck independently and have no other noise, in units of w_max; g from 0 to 1."""
    random = np.random.default_rng(11)

    def device(target: float) -> np.ndarray:
        u = random.random(n)
        return np.where(u < p, 0.0, np.where(u < p + q, 1.0, target))

    if cell == "offset":
        return 2 * device((1 + w) / 2) - 1
    if cell == "two-sided":
        return device((1 + w) / 2) - device((1 - w) / 2)
    found = device(abs(w)) - (device(0.0) if cell == "pair" else 0)
    return math.copysign(1, w) * found


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("p", "q"), [(0.0, 0.0), (1e-4, 0.0), (0.09, 0.0175), (0.0, 0.3), (0.5, 0.5), (1.0, 0.0)])
def test_stuck_devices(cell, p, q):
    """How often each value occurs against devices that are stuck one by one."""
    ideal = Device(Table.of("relative", [0.0, 1.0], [0.0, 1.0], [0.0, 0.0]), Mapping(cell=cell)).stuck(p, q)
    values, n = (1.0, -0.625, 0.25), 60_000
    drawn = ideal.sample(flat_weight(*values, repeat=n), 1, 2, 3)
    for row, w in zip(drawn, values, strict=True):
        naive = naive_faults(cell, w, p, q, n)
        for value in np.unique(np.concatenate([naive, row.numpy()])):
            found = (np.abs(row.numpy() - value) < 1e-6).sum()
            wanted = (np.abs(naive - value) < 1e-6).sum()
            # The difference of two binomial counts.
            rate = (found + wanted) / (2 * n)
            assert abs(found - wanted) <= 5 * math.sqrt(2 * n * rate * (1 - rate)) + 5, (w, value)
    if (p, q) == (0, 0):
        assert ideal.outcomes() is None
    if p == 1:
        assert set(drawn.unique().tolist()) == {-1.0 if cell == "offset" else 0.0}


@pytest.mark.parametrize("cell", CELLS)
def test_moments_with_stuck_devices(cell):
    weight, made = flat_weight(1.0, -0.6, 0.2), device(cell).stuck(0.1, 0.05)
    drawn = made.sample(weight, 4, 5, 6).double()
    mean, std = (m[:, 0] for m in made.chip_moments(weight))
    n = weight.shape[1]
    assert ((drawn.mean(1) - mean).abs() < 5 * std / math.sqrt(n)).all()
    error = 5 * drawn.std(1) * ((torch.tensor(stats.kurtosis(drawn, axis=1)) + 2).clamp(min=0.1) / (4 * n)).sqrt()
    assert ((drawn.std(1) - std).abs() <= error).all()


def test_a_chip_keeps_its_faults():
    """Under another time, another noise and other weights: the same devices are stuck."""
    first = torch.rand(50, 40) + 0.1
    at = [Device.preset("rram-wan-2022", time).stuck(0.2) for time in ("1s", "1d")]
    stuck = [made.sample(weight, 1, 2, 3) == 0 for made in at for weight in (first, first.flip(0))]
    assert 0.1 < stuck[0].float().mean() < 0.3
    assert all(torch.equal(stuck[0], other) for other in stuck)


def test_probabilities_are_divided_exactly():
    table = arrays.FaultTable.of(Faults(0.25, 0.5).outcomes("offset")[0], signed=False)
    assert table.thresholds == (-1, -1, -1, 2**29 - 1, 2**29 + 2**30 - 1)
    never, always = (arrays.FaultTable.of(Faults(off).outcomes("offset")[0], False) for off in (0.0, 1.0))
    assert never.thresholds == (-1,) * 5
    assert always.thresholds[3:] == (2**31 - 1, 2**31 - 1)


@pytest.mark.parametrize(
    ("faults", "what"),
    [((0.6, 0.5), "sum to more than 1"), ((-0.1, 0), "a probability"), ((0, 2), "a probability"), (("1", 0), "a prob")],
)
def test_bad_probabilities(faults, what):
    with pytest.raises(UserError, match=what):
        device().stuck(*faults)


# ---- gains ----------------------------------------------------------------------------------------------------------


def test_gains_of_chips_and_outputs():
    """Every layer of a chip has its gain, and every output one of its own; over chips they have their deviations."""
    ideal = Device(
        Table.of("relative", [0.0, 1.0], [0.0, 1.0], [0.0, 0.0]),
        Mapping(cell="direct"),
        gain=Gain(chip=0.1, column=0.05),
    )
    weight = torch.ones(50, 4)
    drawn = torch.stack([ideal.sample(weight, 1, layer, chip) for chip in range(400) for layer in (0, 1)]).double()
    drawn = drawn.view(400, 2, 50, 4)
    assert (drawn == drawn[..., :1]).all()
    chips = drawn.mean((2, 3))
    assert chips.std() == pytest.approx(0.1, rel=0.15)
    assert np.corrcoef(chips.T.numpy())[0, 1] > 0.98
    columns = (drawn / chips[..., None, None])[..., 0]
    assert columns.std() == pytest.approx(0.05, rel=0.05)
    assert abs(np.corrcoef(columns[:, 0, :2].T.numpy())[0, 1]) < 5 / 20
    mean, std = ideal.chip_moments(weight)
    assert mean[0, 0] == 1
    assert std[0, 0].item() == pytest.approx(math.sqrt(1.01 * 1.0025 - 1))


def test_moments_with_gains_and_faults():
    made = replace(device().stuck(0.1, 0.05), gain=Gain(0.1, 0.1))
    weight = torch.tensor([[1.0, -0.6, 0.2]]).repeat(100, 1)
    drawn = torch.stack([made.sample(weight, 3, 0, chip) for chip in range(1500)]).double()
    mean, std = (m[0] for m in made.chip_moments(weight))
    # One gain for the 100 outputs of a chip: the error of the mean is that of 1,500 chips, at most.
    assert ((drawn.mean((0, 1)) - mean).abs() < 5 * std / math.sqrt(1500)).all()
    assert ((drawn.std((0, 1)) - std).abs() < 0.05 * std).all()


def test_gains_that_could_be_negative():
    with pytest.raises(UserError, match="gain of a chip: a deviation between 0 and"):
        Gain(chip=0.2)


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("gain", [Gain(), Gain(0.1, 0.1)])
@pytest.mark.parametrize("faults", [(0.0, 0.0), (0.2, 0.1)])
def test_gradient_against_differences(cell, faults, gain):
    """dM + z dS, and nothing where devices are stuck, against differences of the chip in float64."""
    made = replace(device(cell).stuck(*faults), gain=gain)
    # Away from the knots of the table, and with the largest weight, which sets the scale, left where it is.
    weight = torch.tensor([[2.0, 0.3, -0.7, 1.1, -1.9, 0.9, -0.35, 1.3]]).repeat(30, 1).requires_grad_()
    made.sample(weight, 1, 2, 3).sum().backward()
    noise = made.array_noise(weight, 2)
    step = 1e-3

    def chip(w: Tensor) -> Tensor:
        """The chip in float64, with its z and its stuck devices from their addresses."""
        z = torch.from_numpy(specification.standard_normal(specification.words(1, 2, 3, w.numel())).copy()).view_as(w)
        mean, std = made.moments(w)
        value = mean + z.double() * std
        if noise.faults is None:
            return value
        u = specification.words(1, 2, 3, w.numel(), purpose=1) >> np.uint32(1)
        k = sum((u.astype(np.int64) > t).astype(int) for t in noise.faults.thresholds).reshape(w.shape)
        keep, move = (torch.from_numpy(np.array(v)[k]) for v in (noise.faults.keep, noise.faults.move))
        reach = made.reach(w).view(-1, 1)
        value = keep * value + move * (torch.where(mean < 0, -reach, reach) if noise.faults.signed else reach)
        return value * torch.from_numpy(arrays.gains(1, 2, 3, len(w), noise.faults)).double().view(-1, 1)

    for column in range(1, weight.shape[1]):
        moved = torch.zeros_like(weight)
        moved[:, column] = step
        up, down = chip(weight.detach() + moved), chip(weight.detach() - moved)
        slope = ((up - down) / (2 * step))[:, column]
        torch.testing.assert_close(weight.grad[:, column].double(), slope, rtol=2e-3, atol=2e-3)


def test_clipped_weights_have_no_gradient():
    made = device(clip_rms=1.0)
    weight = torch.tensor([[3.0, 0.1, -0.2, 0.1]], requires_grad=True)
    made.sample(weight, 0, 0, 0).sum().backward()
    assert weight.grad[0, 0] == 0
    assert (weight.grad[0, 1:] != 0).all()


def test_training_carries_the_device():
    layer = nn.Linear(4, 3)
    drawn = device().sample(layer.weight, 0, 0, 0)
    (drawn @ torch.ones(4)).sum().backward()
    assert layer.weight.grad.isfinite().all()
    assert layer.weight.grad.any()


# ---- lambda and levels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centre", ["median", "mean"])
def test_bound_of_the_lognormal_is_that_of_the_paper(centre):
    model = LogNormalVariation(0.5, centre)
    weight = torch.randn(7, 5, 3, 3)
    assert model.bound(weight, 2.0) == pytest.approx(bound(model, 2.0), rel=1e-12)
    assert LogNormalVariation(0.5).bound(weight) == pytest.approx(0.3396, abs=5e-5)


# Relative deviations of Gaussian weights clipped at 2.5 (4.5) times their root mean square, worked out by hand.
RELATIVE = [
    ("pcm-nandakumar-2019", None, 0.080, 0.115),
    ("pcm-hermes-1", None, 0.17, 0.23),
    ("rram-wan-2022", None, 0.12, 0.21),
    ("rram-wan-2022", "1d", 0.21, 0.34),
    ("rram-milo-2021", None, 0.084, 0.15),
    ("sonos-agrawal-2022", None, 0.026, 0.04),
    ("rram-cmo-2025", "1d", 0.068, 0.12),
]


@pytest.mark.parametrize(("name", "time", "at_25", "at_45"), RELATIVE)
def test_relative_deviation_of_a_layer(name, time, at_25, at_45):
    generator = torch.Generator().manual_seed(0)
    for clip, wanted in ((2.5, at_25), (4.5, at_45)):
        weight = torch.randn(400, 500, generator=generator).clamp(-clip, clip)
        mean, deviation = Device.preset(name, time).relative_moments(weight)
        assert deviation == pytest.approx(wanted, rel=0.07)
        assert Device.preset(name, time).bound(weight) == pytest.approx(1 / (mean + 3 * deviation))


def test_levels_of_devices():
    assert LogNormalVariation(0.5, "mean").at(0.2) == LogNormalVariation(0.2, "mean")
    assert LogNormalVariation(0.5).level == 0.5
    weight = torch.randn(20, 20)
    assert device().at(0.5).noise == device().at(0.5).level == 0.5
    # States that are far from 0 deviate in proportion.
    offset = Device.preset("rram-cmo-2025")
    full, half = offset.moments(weight).std, offset.at(0.5).moments(weight).std
    torch.testing.assert_close(half * 2, full)


# ---- protection -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inner", [LogNormalVariation(0.5), device(), device().stuck(0.3, 0.2), device("offset").stuck(1)]
)
def test_protected_weights_are_exact(inner):
    weight = torch.randn(6, 5, 3, 3)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    made = Protected(inner, {2: mask})
    plain = inner.sample(weight, 1, 2, 3)
    drawn = made.sample(weight, 1, 2, 3)
    assert torch.equal(drawn[mask], weight[mask])
    assert torch.equal(drawn[~mask], plain[~mask])
    assert torch.equal(made.sample(weight, 1, 0, 3), inner.sample(weight, 1, 0, 3))  # a layer without a mask
    # The kernels' arrays give the same chip.
    for layer in (0, 2):
        noise = made.array_noise(weight, layer)
        by_arrays = torch.from_numpy(arrays.programmed(noise, 1, layer, 3)).movedim(-1, 1)
        assert torch.equal(by_arrays, made.sample(weight, 1, layer, 3))


def test_gradient_of_protected_weights_is_one():
    weight = torch.randn(6, 5, requires_grad=True)
    mask = torch.rand(6, 5) < 0.5
    Protected(device().stuck(0.2), {0: mask}).sample(weight, 1, 0, 3).sum().backward()
    assert (weight.grad[mask] == 1).all()
    assert (weight.grad[~mask] != 1).all()


@pytest.mark.parametrize("inner", [LogNormalVariation(0.5), device().stuck(0.3, 0.2)])
def test_moments_beside_protected_weights_are_those_of_the_device(inner):
    weight = torch.randn(6, 5)
    made = Protected(inner, {0: torch.rand(6, 5) < 0.5})
    assert all(map(torch.equal, made.chip_moments(weight), inner.chip_moments(weight)))
    assert made.bound(weight) == inner.bound(weight)
    network = torch.nn.Sequential(torch.nn.Linear(5, 6))
    assert bounds(network, made) == bounds(network, inner)


def test_masks_that_do_not_fit():
    with pytest.raises(UserError, match="must be a bool tensor"):
        Protected(device(), {0: torch.ones(3, 3)})
    with pytest.raises(UserError, match=r"mask of layer 0 is \(3, 4\), but the layer's weight \(4, 3\)"):
        Protected(device(), {0: torch.ones(3, 4, dtype=torch.bool)}).sample(torch.randn(4, 3), 0, 0, 0)


def test_what_masks_say_of_themselves():
    mask = torch.zeros(4, 3, dtype=torch.bool)
    mask[0] = True
    described = Protected(LogNormalVariation(0.5), {1: mask}).describe()
    assert (described["model"], described["protected"]) == ("lognormal", 3)
    assert described["masks"] != Protected(LogNormalVariation(0.5), {1: ~mask}).describe()["masks"]
    assert Protected(LogNormalVariation(0.5), {1: mask}).at(0.1).describe()["sigma"] == 0.1


# ---- what a device says of itself, and devices of one's own ---------------------------------------------------------


def test_descriptions_tell_devices_apart():
    first = Device.preset("rram-wan-2022").describe()
    assert (first["model"], first["unit"], first["g_max"], first["time"]) == ("rram-wan-2022", "uS", 40.0, "1s")
    others = [
        Device.preset("rram-wan-2022", "1d"),
        Device.preset("rram-wan-2022", clip_rms=2.5),
        Device.preset("rram-wan-2022", scale="output"),
        Device.preset("rram-wan-2022", cell="offset"),
        Device.preset("rram-wan-2022").stuck(0.01),
        Device.preset("rram-wan-2022").at(0.5),
    ]
    assert len({str(made.describe()) for made in (Device.preset("rram-wan-2022"), *others)}) == 7
    one, other = (
        Device(Table.of("uS", [0.0, 1.0], [0.0, 1.0], [0.1, std])).describe()["measurement"] for std in (0.1, 0.2)
    )
    assert one != other


@dataclass(frozen=True)
class Proportional(GaussianVariation):
    """w' = w (1 + part z)."""

    part: float = 0.1

    def moments(self, weight: Tensor) -> Moments:
        w = weight.double()
        return Moments(w, self.part * w.abs())

    def describe(self) -> dict[str, Any]:
        return {"model": "proportional", "part": self.part}


def test_moments_make_a_device():
    weight = torch.full((300, 300), -2.0, requires_grad=True)
    drawn = Proportional(0.2).sample(weight, 0, 0, 0)
    assert drawn.mean().item() == pytest.approx(-2, abs=5 * 0.4 / 300)
    assert drawn.std().item() == pytest.approx(0.4, rel=5 / math.sqrt(2 * 90000))
    drawn.sum().backward()
    torch.testing.assert_close(weight.grad * weight.detach(), drawn.detach())
    assert Proportional(0.2).bound(weight) == pytest.approx(1 / 1.6)
