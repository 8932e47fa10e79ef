"""Converters in settings, stages and results."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from by_hand import run, succeed

from correctnet import Converters, Device, LogNormalVariation, add_converters, clipped, convert, evaluate
from correctnet.crossbar.calibration import most_clipped, ranges_of
from correctnet.datasets.loading import load
from correctnet.errors import UserError
from correctnet.evaluation.results import Result
from correctnet.noise import streams
from correctnet.pipeline.models import read_network
from correctnet.pipeline.specs import STAGES
from correctnet.sections import validate
from correctnet.settings import Settings

EIGHT = ["--dac-bits", 8, "--adc-bits", 7]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converters")
    succeed("pretrain", "--quiet", "--threads", 1, "--epochs", 1, "--batch", 64, "--out", folder / "pretrain")
    return folder / "pretrain"


def evaluated(model: Path, out: Path, *options: object) -> pd.DataFrame:
    few = ["--quiet", "--threads", 1, "--images", 60, "--chips", 2]
    succeed("evaluate", *few, *options, "--model", model, "--out", out)
    return pd.read_csv(out)


def test_settings_without_converters_are_what_they_were() -> None:
    assert "converters" not in Settings().model_dump(mode="json")
    for name, stage in STAGES.items():
        assert "converters" not in json.loads(stage.canonical(Settings())), name
    given = validate(Settings, {"converters": {"dac_bits": 8, "images": 100}}, "x")
    assert given.model_dump(mode="json")["converters"] == {"dac_bits": 8, "images": 100}
    for wrong in (
        {"dac_bits": 1},
        {"adc_bits": 17},
        {"quantile": 0},
        {"quantile": 1.1},
        {"bits": 8},
        {"dac_bits": "8"},
    ):
        with pytest.raises(UserError, match=r"^x: converters"):
            validate(Settings, {"converters": wrong}, "x")


@pytest.mark.filterwarnings("error::correctnet.evaluation.montecarlo.EngineWarning")
def test_results_are_those_of_the_network_with_converters(pretrained: Path, tmp_path: Path) -> None:
    device = ["--device-model", "rram-wan-2022", "--stuck-off", 0.01]
    table = evaluated(pretrained, tmp_path / "e.csv", *device, *EIGHT, "--calibration-images", 100)
    network, _ = read_network(pretrained)
    data = load("digits", validation=0.1, seed=0)
    analog = convert(network, Device.preset("rram-wan-2022").stuck(0.01), 0)
    add_converters(analog, Converters(8, 7), data.train.take(100).images)
    images = data.test.take(60)
    assert evaluate(analog, images, 2).table["correct"].tolist() == table["correct"].tolist()
    assert set(table["dac_bits"]) == {8}
    assert set(table["adc_bits"]) == {7}
    fractions = clipped(analog, images.images, streams.chips("test", 1).start)
    assert table["clipped"].tolist() == pytest.approx([most_clipped(fractions)] * 2)
    assert 0 < table["clipped"][0] < 0.2
    exact = evaluated(pretrained, tmp_path / "exact.csv", *device)
    assert not {"dac_bits", "adc_bits", "clipped"} & set(exact)


def test_chunks_are_one_evaluation(pretrained: Path, tmp_path: Path) -> None:
    parts = []
    for start in (0, 2):
        evaluated(pretrained, tmp_path / f"{start}.csv", "--sigma", 0.4, "--dac-bits", 6, "--start", start)
        parts.append(Result.from_csv(tmp_path / f"{start}.csv"))
    both = Result.concatenate(parts)
    assert both.chips == 4
    assert both.table["adc_bits"].isna().all()


def test_the_nominal_network_is_digital(pretrained: Path, tmp_path: Path) -> None:
    with_converters = evaluated(pretrained, tmp_path / "a.csv", "--sigma", 0, "--dac-bits", 2, "--adc-bits", 2)
    without = evaluated(pretrained, tmp_path / "b.csv", "--sigma", 0)
    pd.testing.assert_frame_equal(with_converters, without)


def test_networks_are_trained_with_converters_and_keep_their_ranges(pretrained: Path, tmp_path: Path) -> None:
    few = ["--quiet", "--threads", 1, "--sigma", 0.3, "--epochs", 1, "--batch", 64]
    for name, options in (("with", EIGHT), ("without", [])):
        succeed("inject", *few, *options, "--pretrained", pretrained, "--out", tmp_path / name)
    saved = json.loads((tmp_path / "with" / "model.json").read_text())
    assert {k: v for k, v in saved["converters"].items() if k != "ranges"} == {"dac_bits": 8, "adc_bits": 7}
    network, _ = read_network(pretrained)
    analog = convert(network, LogNormalVariation(0.3), 0)
    wanted = add_converters(analog, Converters(8, 7), load("digits", validation=0.1, seed=0).train.take(512).images)
    assert saved["converters"]["ranges"] == {name: pytest.approx(pair) for name, pair in wanted.items()}
    other = json.loads((tmp_path / "without" / "model.json").read_text())
    assert "converters" not in other
    assert saved["sha256"] != other["sha256"], "training has seen the converters"

    # The evaluation takes the ranges of the training, and not those of the trained network.
    table = evaluated(tmp_path / "with", tmp_path / "e.csv", "--sigma", 0.3, *EIGHT)
    trained, description = read_network(tmp_path / "with")
    analog = convert(trained, LogNormalVariation(0.3), 0)
    kept = {name: tuple(pair) for name, pair in description["converters"]["ranges"].items()}
    add_converters(analog, Converters(8, 7), ranges=kept)
    images = load("digits", validation=0.1, seed=0).test.take(60)
    assert evaluate(analog, images, 2).table["correct"].tolist() == table["correct"].tolist()
    fractions = clipped(analog, images.images, streams.chips("test", 1).start)
    assert table["clipped"][0] == pytest.approx(most_clipped(fractions))
    # With other converters, those of the trained network.
    few = ["--quiet", "--threads", 1, "--images", 60, "--chips", 2, "--sigma", 0.3, *EIGHT]
    few += ["--calibration-quantile", 0.5]
    said = succeed("evaluate", *few, "--model", tmp_path / "with", "--out", tmp_path / "c.csv").output
    assert "converters clip" in said
    assert pd.read_csv(tmp_path / "c.csv")["clipped"][0] > 0.3
    assert ranges_of(analog) == {name: pytest.approx(pair) for name, pair in kept.items()}


def test_damaged_ranges_are_refused(pretrained: Path, tmp_path: Path) -> None:
    path = pretrained / "model.json"
    before = path.read_text()
    try:
        for wrong in ({"ranges": {"conv1": [1.0]}}, {"ranges": 3}, {"ranges": {"conv1": [1.0, -1.0]}}, 8):
            path.write_text(json.dumps({**json.loads(before), "converters": wrong}))
            result = run("evaluate", "--quiet", "--model", pretrained, "--out", tmp_path / "e.csv")
            assert "converters: converters with two ranges for each layer is expected" in result.output
    finally:
        path.write_text(before)


def test_choices_and_compensation_are_made_with_converters(pretrained: Path, tmp_path: Path) -> None:
    """Each stage computes something else with coarse converters, and what it did without them."""
    few = ["--quiet", "--threads", 1, "--sigma", 0.3]
    coarse = ["--dac-bits", 3, "--adc-bits", 3]
    for name, options in (("exact", []), ("coarse", coarse)):
        out = tmp_path / name
        own = [*few, *options]
        base = ["--base", pretrained]
        chips = ["--chips", 2, "--images", 60]
        succeed("sweep", *own, *chips, *base, "--pretrained", pretrained, "--out", out / "sweep")
        (out / "sweep" / "candidates.json").write_text(json.dumps({"candidates": ["conv1.layer"]}))
        found = ["--candidates", out / "sweep" / "candidates.json", "--limit", 0.1]
        train = ["--train-epochs", 1, "--train-images", 200, "--evaluations", 1, "--ratios", "0,0.5"]
        succeed("search", *own, *base, *found, *chips, *train, "--out", out / "search")
        best = json.loads((out / "search" / "best.json").read_text())
        (out / "search" / "best.json").write_text(json.dumps({**best, "filters": {"conv1.layer": 2}}))
        with_filters = ["--found", out / "search" / "best.json", "--epochs", 1]
        succeed("compensate", *own, *base, *with_filters, "--out", out / "compensate")
        succeed("sensitivity", *own, *chips, "--model", pretrained, "--out", out / "sensitivity.csv")
    exact, with_converters = tmp_path / "exact", tmp_path / "coarse"
    for path in ("sweep/accuracy.csv", "search/log.csv", "sensitivity.csv"):
        column = "mean" if path.startswith("search") else "accuracy"
        before, after = (pd.read_csv(folder / path)[column] for folder in (exact, with_converters))
        assert len(before) == len(after)
        assert not before.equals(after), path
    described = json.loads((with_converters / "compensate" / "model.json").read_text())
    assert described["converters"]["dac_bits"] == 3
    assert "converters" not in json.loads((exact / "compensate" / "model.json").read_text())
    network, _ = read_network(with_converters / "compensate")
    names = set(described["converters"]["ranges"])
    analog = convert(network, LogNormalVariation(0.3), 0)
    kept = {name: tuple(pair) for name, pair in described["converters"]["ranges"].items()}
    assert set(add_converters(analog, Converters(3, 3), ranges=kept)) == names
    table = evaluated(with_converters / "compensate", tmp_path / "e.csv", "--sigma", 0.3, *coarse)
    images = load("digits", validation=0.1, seed=0).test.take(60)
    assert evaluate(analog, images, 2).table["correct"].tolist() == table["correct"].tolist()
