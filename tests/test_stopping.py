"""Evaluations that stop at a stated precision, and comparisons of two networks."""

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from scipy import stats
from torch import nn

from correctnet import compare
from correctnet.cli import main
from correctnet.crossbar.convert import convert
from correctnet.devices.lognormal import LogNormalVariation
from correctnet.errors import UserError
from correctnet.evaluation.montecarlo import evaluate
from correctnet.evaluation.results import Result
from correctnet.evaluation.stopping import PILOT, chips_for, half_width
from correctnet.metrics import mean_squared_error
from correctnet.pipeline.layout import Layout
from correctnet.pipeline.specs import STAGES
from correctnet.settings import Settings


@pytest.fixture
def analog(tiny):
    return convert(tiny, LogNormalVariation(0.5), seed=2)


def test_the_number_of_chips_is_stein_s():
    # -1 and 1 in turns have no positive excess kurtosis: t has 63 degrees of freedom, t(0.975, 63) = 1.99834.
    pilot = np.tile([-1.0, 1.0], PILOT // 2)
    deviation = np.sqrt(64 / 63)
    assert half_width(pilot, 100) == pytest.approx(1.99834 * deviation / 10, rel=1e-5)
    assert chips_for(pilot, 0.1) == np.ceil((1.99834 * deviation / 0.1) ** 2) == 406
    assert chips_for(pilot, 5.0) == PILOT
    assert chips_for(np.full(PILOT, 0.7), 1e-9) == PILOT
    assert chips_for([0.3], 0.1) == 1


def test_long_tails_make_it_larger():
    # 63 zeros and a one: the sample's excess kurtosis is 64 exactly (g2 of n - 1 equal values and another is n).
    pilot = np.zeros(PILOT)
    pilot[5] = 1
    assert stats.kurtosis(pilot, bias=False) == pytest.approx(PILOT)
    freedom = 2 / (PILOT / PILOT + 2 / (PILOT - 1))
    expected = stats.t.ppf(0.975, freedom) * pilot.std(ddof=1) / 10
    assert half_width(pilot, 100) == pytest.approx(expected)
    assert half_width(pilot, 100) > 1.5 * stats.t.ppf(0.975, PILOT - 1) * pilot.std(ddof=1) / 10


def test_intervals_of_normal_values_cover_what_they_say():
    # Of 1,000 runs the fraction of a true 95 % has a standard deviation of 0.007.
    rng, covered, h = np.random.default_rng(0), 0, 0.15
    for _ in range(1000):
        pilot = rng.standard_normal(PILOT)
        n = chips_for(pilot, h)
        mean = (pilot.sum() + np.sqrt(n - PILOT) * rng.standard_normal()) / n
        covered += abs(mean) <= half_width(pilot, n) <= h * (1 + 1e-9)
    assert covered / 1000 == pytest.approx(0.953, abs=0.02)  # the correction for tails never makes t smaller


def test_an_evaluation_stops_when_the_interval_is_narrow(analog, blobs):
    every = evaluate(analog, blobs, 400, progress=False)
    pilot = every.values[:PILOT]
    until = half_width(pilot, 150)
    found = evaluate(analog, blobs, 400, until=until, progress=False)
    assert found.chips == 150
    assert found.table.drop(columns="pilot").equals(every.table[:150])
    interval = found.interval()
    assert interval.high - interval.estimate == pytest.approx(until)
    assert interval.estimate == pytest.approx(every.values[:150].mean())
    assert evaluate(analog, blobs, 120, until=until, progress=False).chips == 120
    assert evaluate(analog, blobs, 40, until=until, progress=False).chips == 40
    assert evaluate(analog, blobs, 1, until=until, progress=False).chips == 1
    assert evaluate(analog, blobs, 400, until=1.0, progress=False).chips == PILOT


def test_the_file_of_a_run_that_was_stopped(analog, blobs, tmp_path):
    every = evaluate(analog, blobs, 200, progress=False)
    until, path = half_width(every.values[:PILOT], 100), tmp_path / "chips.csv"
    evaluate(analog, blobs, 20, save=path, progress=False)
    found = evaluate(analog, blobs, 200, until=until, save=path, progress=False)
    assert len(pd.read_csv(path)) == found.chips == 100
    evaluate(analog, blobs, 200, save=path, progress=False)
    again = evaluate(analog, blobs, 200, until=until, save=path, progress=False)
    pd.testing.assert_frame_equal(again.table, found.table)
    found.to_csv(tmp_path / "result.csv")
    assert Result.from_csv(tmp_path / "result.csv").interval() == found.interval()
    with pytest.raises(UserError, match="stopped early cannot be put together"):
        Result.concatenate([found, evaluate(analog, blobs, 5, start=100, progress=False)])


def test_other_metrics_are_measured_in_their_own_units():
    torch.manual_seed(0)
    network = convert(nn.Linear(4, 1), LogNormalVariation(0.5))
    rows, prices = torch.randn(50, 4), torch.randn(50, 1)
    metric = mean_squared_error()
    every = evaluate(network, (rows, prices), 300, metric=metric, progress=False)
    until = half_width(every.values[:PILOT], 123)
    assert evaluate(network, (rows, prices), 300, metric=metric, until=until, progress=False).chips == 123


@pytest.mark.parametrize("until", [0, -0.1, float("nan"), float("inf"), True, "0.1"])
def test_widths_that_are_none(analog, blobs, until):
    with pytest.raises(UserError, match="until is the half-width of the interval, a number above 0, not"):
        evaluate(analog, blobs, 4, until=until, progress=False)
    with pytest.raises(UserError, match="compare: until is the half-width"):
        compare(analog, analog, blobs, 4, until=until, progress=False)


def test_two_networks_are_compared_on_the_same_chips(tiny, analog, blobs):
    with torch.no_grad():
        other = convert(tiny, LogNormalVariation(0.5), seed=2)
        for parameter in other.parameters():
            parameter.mul_(1.05)
    results = [evaluate(each, blobs, 300, start=7, progress=False) for each in (analog, other)]
    differences = results[0].values - results[1].values
    plain = compare(analog, other, blobs, 100, start=7, progress=False)
    assert plain.difference == results_of(results, 100)
    until = half_width(differences[:PILOT], 130)
    found = compare(analog, other, blobs, 300, until=until, start=7, progress=False)
    assert found.first.chips == found.second.chips == 130
    assert found.difference.estimate == pytest.approx(differences[:130].mean())
    assert found.difference.high - found.difference.estimate == pytest.approx(until)
    assert str(found.difference) in str(found)
    assert found.first.chips < evaluate(analog, blobs, 5000, until=until, progress=False).chips
    assert compare(analog, other, blobs, 300, until=1.0, progress=False).first.chips == PILOT


def results_of(results, chips):
    first, second = (Result(each.table[:chips]) for each in results)
    return first.minus(second)


def test_networks_that_cannot_be_compared(tiny, analog, blobs):
    with pytest.raises(UserError, match="of seed 2 against"):
        compare(analog, convert(tiny, LogNormalVariation(0.5), seed=3), blobs, 4, progress=False)
    with pytest.raises(UserError, match="device is"):
        compare(analog, convert(tiny, LogNormalVariation(0.4), seed=2), blobs, 100, until=0.1, progress=False)
    with pytest.raises(UserError, match="save is of one evaluation"):
        compare(analog, analog, blobs, 4, save="rows.csv", progress=False)


def test_settings_without_it_are_what_they_were():
    assert "until" not in STAGES["evaluate"].canonical(Settings())
    with_it = Settings.model_validate({"evaluate": {"until": 0.01}})
    text = STAGES["evaluate"].canonical(with_it)
    assert '"until": 0.01' in text
    assert STAGES["evaluate"].parse(text, "evaluate").evaluate.until == 0.01


def test_the_command_line_stops_too(tmp_path):
    def run(*arguments):
        found = CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)
        assert found.exit_code == 0, found.output
        return found

    model = tmp_path / "model"
    run("pretrain", "--dataset", "digits", "--epochs", 1, "--out", model, "--quiet")
    rows = {}
    for name, options in {"every": ["--chips", 150], "until": ["--chips", 150, "--until", 0.02]}.items():
        out = tmp_path / f"{name}.csv"
        run("evaluate", "--model", model, "--images", 60, *options, "--out", out, "--quiet")
        rows[name] = pd.read_csv(out)
    enough = min(150, chips_for(rows["every"]["accuracy"][:PILOT], 0.02))
    assert enough >= PILOT
    assert rows["until"]["accuracy"].tolist() == rows["every"]["accuracy"][:enough].tolist()
    assert set(rows["until"]["pilot"]) == {PILOT}
    assert "pilot" not in rows["every"]


def test_rows_of_a_workflow_that_may_stop_are_one_job():
    whole, cut = (Settings.model_validate({"evaluate": {"chunk": 100, **more}}) for more in ({}, {"until": 0.01}))
    assert Layout.chunk_names(whole, 250) == ["chips-0-100", "chips-100-200", "chips-200-250"]
    assert Layout.chunk_names(cut, 250) == ["chips-0-250"]
