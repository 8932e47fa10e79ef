"""Published devices against the numbers of their sources, typed in a second time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from correctnet.devices.device import Device
from correctnet.devices.presets import PRESETS, power_moment
from correctnet.devices.programming import rectified, seconds, time_text
from correctnet.errors import UserError

# Name, time, range, unit; standard deviation over range at 0, 0.1, 0.25, 0.5 and 1 of it, in percent.
TABLE = [
    ("pcm-nandakumar-2019", None, 0, 25, "uS", (1.05, 1.79, 2.73, 3.81, 4.22)),
    ("pcm-hermes-1", None, 0, 10.35, "uS", (1.52, 3.57, 5.94, 8.36, 9.73)),
    ("pcm-hermes-2", None, 0, 20.7, "uS", (0.80, 2.69, 4.29, 4.79, 5.28)),
    ("rram-wan-2022", "1s", 0, 40, "uS", (0.87, 3.89, 5.65, 5.06, 2.76)),
    ("rram-wan-2022", "1d", 0, 40, "uS", (1.75, 6.12, 9.30, 9.77, 6.63)),
    ("rram-wan-2022", "2d", 0, 40, "uS", (1.96, 6.03, 9.16, 9.82, 6.69)),
    ("rram-milo-2021", None, 50, 225, "uS", (2.47, 2.38, 2.24, 2.02, 1.56)),
    ("rram-cmo-2025", None, 9, 88.2, "uS", (0.14, 0.26, 0.42, 0.71, 1.27)),
    ("sonos-agrawal-2022", None, 0, 1600, "nA", (0.00, 0.74, 1.11, 1.23, 1.24)),
]
PARTS = torch.tensor([0, 0.1, 0.25, 0.5, 1], dtype=torch.float64)


def states(device: Device, parts: torch.Tensor = PARTS) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation at parts of the range, before rectification."""
    measured = device.programming
    return measured.gaussian(measured.low + (measured.high - measured.low) * parts)


@pytest.mark.parametrize(("name", "time", "low", "high", "unit", "percent"), TABLE)
def test_deviation_over_range(name, time, low, high, unit, percent):
    device = Device.preset(name, time)
    assert (device.programming.low, device.programming.high, device.programming.unit) == (low, high, unit)
    _, std = states(device)
    np.testing.assert_allclose((100 * std / (high - low)).numpy(), percent, atol=0.0051)


def test_every_preset_is_in_the_table_and_has_a_source():
    assert {row[0] for row in TABLE} == set(PRESETS)
    for name, preset in PRESETS.items():
        assert any(year in preset.source for year in ("2019", "2021", "2022", "2023", "2502")), name


def test_means_are_the_targets_right_after_programming():
    for name in PRESETS:
        device = Device.preset(name)
        mean, _ = states(device)
        low, high = device.limits
        np.testing.assert_allclose(mean.numpy(), (low + (high - low) * PARTS).numpy(), atol=1e-12)


def test_sonos_by_day():
    """The limits and scales of saturation, typed in from the source."""
    days = [(19.887, 176.31), (25.591, 186.86), (28.728, 193.57), (31.043, 198.90), (33.762, 204.77), (34.579, 207.34)]
    at = torch.tensor([150.0, 1600.0], dtype=torch.float64)
    for day, (limit, scale) in enumerate(days):
        mean, std = Device.preset("sonos-agrawal-2022", f"{day}d").programming.gaussian(at)
        np.testing.assert_array_equal(mean, at)
        np.testing.assert_allclose(std, limit * (1 - np.exp(-at.numpy() / scale)), rtol=1e-4)
    _, std = Device.preset("sonos-agrawal-2022", "12h").programming.gaussian(at)
    half = (days[0][0] + days[1][0]) / 2, (days[0][1] + days[1][1]) / 2
    np.testing.assert_allclose(std, half[0] * (1 - np.exp(-at.numpy() / half[1])), rtol=1e-4)


def test_cmo_relaxes_as_in_its_source():
    """After a day the mean has moved by -1.01 uS, and the relaxation deviates by 0.89 uS."""
    at = torch.tensor([50.0], dtype=torch.float64)
    mean, std = Device.preset("rram-cmo-2025", "1d").programming.gaussian(at)
    assert (mean - at).item() == pytest.approx(-1.01, abs=0.005)
    read = 0.0277316483 * math.log10(50 - 1.0116) * math.sqrt(math.log(86400 / 2e-6))
    programmed = 0.0112185 + 0.0112903 * 50
    assert std.item() == pytest.approx(math.sqrt(programmed**2 + 0.8894**2 + read**2), rel=1e-3)


@pytest.mark.parametrize(("name", "t0"), [("pcm-nandakumar-2019", 20), ("pcm-hermes-1", 200), ("pcm-hermes-2", 300)])
@pytest.mark.parametrize("part", [0.02, 0.2, 0.5, 1.0])
def test_drift_against_samples(name, t0, part):
    """A literal simulation of programming, drift and reading, as the tools do it, against the closed form."""
    random = np.random.default_rng(7)
    n, t = 400_000, 3600.0
    programming = Device.preset(name, t).programming
    target = torch.tensor([part * programming.high], dtype=torch.float64)
    _, std = programming.gaussian(target)
    m, s = (v.item() for v in programming.exponent(torch.tensor([part], dtype=torch.float64)))
    q = programming.reading(torch.tensor([part], dtype=torch.float64)).item()
    g = np.maximum(random.normal(target.item(), std.item(), n), 0)
    g = g * ((t + t0) / t0) ** -np.abs(random.normal(m, s, n))
    read = {"pcm-nandakumar-2019": 250e-9}.get(name, 512e-9)
    g = g * (1 + q * math.sqrt(math.log((t + t0 + read) / (2 * read))) * random.normal(size=n))
    mean, variance = (v.item() for v in programming.moments(target))
    assert g.mean() == pytest.approx(mean, abs=5 * g.std() / math.sqrt(n))
    assert g.std() == pytest.approx(math.sqrt(variance), rel=5 * math.sqrt(stats.kurtosis(g) + 2) / 2 / math.sqrt(n))


def test_reading_noise_of_an_hour():
    """After an hour 1/f noise is 4.2 % of the largest state and 12 % of a fifth of it."""
    programming = Device.preset("pcm-nandakumar-2019").programming
    q = programming.reading(torch.tensor([1.0, 0.2], dtype=torch.float64)) * math.sqrt(math.log(3620 / 500e-9))
    np.testing.assert_allclose(q.numpy(), [0.042, 0.12], rtol=0.02)


@pytest.mark.parametrize(("mean", "std"), [(0.05, 0.01), (0.05, 0.045), (0.1, 0.0), (0.02, 0.2)])
def test_moment_of_a_power(mean, std):
    """E[exp(-c |nu|)] against quadrature."""
    c = 5.2
    found = power_moment(*(torch.tensor(v, dtype=torch.float64) for v in (mean, std)), c).item()
    if std == 0:
        assert found == pytest.approx(math.exp(-c * mean))
        return
    exact = integrate.quad(
        lambda v: stats.norm.pdf(v, mean, std) * math.exp(-c * abs(v)), mean - 10 * std, mean + 10 * std, points=[0]
    )[0]
    assert found == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize(("mean", "std"), [(1.0, 0.2), (0.1, 0.2), (0.0, 0.3), (-0.5, 0.3), (0.4, 0.0), (-0.4, 0.0)])
def test_rectified_moments(mean, std):
    first, variance = (v.item() for v in rectified(*(torch.tensor(v, dtype=torch.float64) for v in (mean, std))))
    if std == 0:
        assert (first, variance) == (max(mean, 0), 0)
        return

    def moment(power: int) -> float:
        return integrate.quad(lambda x: x**power * stats.norm.pdf(x, mean, std), 0, max(0, mean) + 10 * std)[0]

    assert first == pytest.approx(moment(1), rel=1e-7)
    assert variance == pytest.approx(moment(2) - moment(1) ** 2, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "what"),
    [
        ("pcm", {}, "no preset 'pcm'"),
        ("rram-wan-2022", {"time": "1h"}, "measured after 1s, 1d, 2d, not after 1h"),
        ("rram-milo-2021", {"time": "1d"}, "measured at one time"),
        ("rram-cmo-2025", {"time": 0.5}, "from 1 s on"),
        ("sonos-agrawal-2022", {"time": "6d"}, "for 5 days"),
        ("rram-wan-2022", {"time": "1 week"}, "units s, min, h, d"),
        ("rram-wan-2022", {"time": -1}, ">= 0"),
        ("rram-wan-2022", {"g_max": 50.0}, "outside of what was measured, 0 to 40 uS"),
        ("rram-milo-2021", {"g_min": 10.0}, "outside of what was measured"),
        ("rram-wan-2022", {"g_min": 30.0, "g_max": 20.0}, "g_max must be above g_min"),
        ("rram-wan-2022", {"gmax": 20.0}, "no 'gmax'"),
        ("rram-wan-2022", {"cell": "triple"}, "cell must be"),
        ("rram-wan-2022", {"levels": 1}, "levels must be"),
        ("rram-wan-2022", {"clip_rms": 0}, "clip_rms must be"),
        ("rram-wan-2022", {"noise": -1}, "noise must be"),
    ],
)
def test_bad_requests_are_one_line(name, options, what):
    with pytest.raises(UserError, match=what) as refused:
        Device.preset(name, **options)
    assert "\n" not in str(refused.value)


def test_deviations_do_not_move_with_a_smaller_range():
    """A fit in microsiemens stays one: half of the range has the deviations that its states have in the whole range."""
    whole, half = Device.preset("rram-wan-2022"), Device.preset("rram-wan-2022", g_max=20.0)
    x = torch.tensor([0.5], dtype=torch.float64)
    # 20 uS is 1 of the half range and 1/2 of the whole one; relative to the range it deviates twice as much.
    np.testing.assert_allclose(half.curve(2 * x).std.numpy(), 2 * whole.curve(x).std.numpy(), rtol=1e-12)


def test_times():
    assert [seconds(t) for t in ("90 s", "10min", "1h", "2d", 5, 0.5)] == [90, 600, 3600, 172800, 5, 0.5]
    assert [time_text(t) for t in (90, 600, 3600, 172800, 0.5)] == ["90s", "10min", "1h", "2d", "0.5s"]
    assert Device.preset("rram-wan-2022").at("1d") == Device.preset("rram-wan-2022", "1d")
    assert Device.preset("rram-wan-2022").at(0.5).level == 0.5
