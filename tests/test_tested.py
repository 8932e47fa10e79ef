"""Networks that are evaluated under another variation than they are trained for, and over time."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from by_hand import run, succeed
from workflows import configuration

from correctnet.devices.configuration import DeviceSettings, VariationSettings
from correctnet.errors import UserError
from correctnet.files.storage import sha256
from correctnet.pipeline.config import Config
from correctnet.pipeline.layout import Layout
from correctnet.pipeline.specs import STAGES
from correctnet.report import figures
from correctnet.sections import validate
from correctnet.settings import Settings

WAN = {"device": "rram-wan-2022", "time": "1d"}
LEVELS = "level,mean_uS,std_uS\n0,10,0.1\n1,20,0.3\n2,40,0.6\n"


def settings(**values: object) -> Settings:
    return validate(Settings, values, "file").identified()


def test_the_tested_variation_is_that_of_training_with_what_differs() -> None:
    assert settings().tested == VariationSettings()
    assert "variation" not in settings().model_dump(mode="json")["evaluate"]
    other = settings(variation={"sigma": 0.3, "centre": "mean"}, evaluate={"variation": {"sigma": 0.4}})
    assert other.tested == VariationSettings(sigma=0.4, centre="mean")
    later = settings(variation={**WAN, "clip_rms": 2.5}, evaluate={"variation": {"time": "2d", "level": 0.5}})
    assert later.tested.model_dump() == {**WAN, "time": "2d", "clip_rms": 2.5, "level": 0.5}
    assert later.variation.model_dump() == {**WAN, "clip_rms": 2.5}
    another = settings(variation={"sigma": 0.3}, evaluate={"variation": WAN})
    assert another.tested == DeviceSettings(**WAN)
    assert settings(variation=WAN, evaluate={"variation": {"model": "lognormal"}}).tested == VariationSettings()
    assert another.identified() == another


def test_mistakes_are_one_line_each() -> None:
    for variation, wrong, message in (
        ({}, {"sigma": -1}, "file: evaluate.variation: variation.sigma: Input should be greater than or equal to 0"),
        ({}, {"device": "rram-wan-2022", "sigma": 0.5}, "sigma goes with the lognormal"),
        ({}, {"clip": 3}, "variation.clip: unknown key"),
        (
            {},
            {"time": "1d"},
            "variation: time goes with variation.device, and no device is named",
        ),
        (WAN, {"time": "1h"}, "variation: the device was measured after 1s, 1d, 2d, not after 1h"),
        (WAN, {"g_max": 50}, "variation: g_max 50 uS is outside of what was measured"),
    ):
        with pytest.raises(UserError) as found:
            settings(variation=variation or {"sigma": 0.5}, evaluate={"variation": wrong})
        assert message in str(found.value)
        assert "\n" not in str(found.value)


def test_evaluations_alone_are_under_the_tested_variation() -> None:
    config = configuration()
    config["rows"] |= {
        "later": {"evaluate": "suppress", "label": "l", "set": {"evaluate": {"variation": {"time": "2d"}}}},
        "lognormal": {
            "evaluate": "inject",
            "label": "trained for the lognormal",
            "set": {"variation": {"model": "lognormal", "sigma": 0.3}, "evaluate": {"variation": WAN}},
        },
    }
    config["pairs"]["one"] |= {"variation": WAN, "rows": ["unprotected", "suppressed", "later", "lognormal"]}
    checked = Config.check(config)
    here = Layout(checked)
    assert checked.level_of("quick") == 1
    assert here.folder("one", "later", "suppress") == here.folder("one", "suppressed", "suppress"), "one training"
    assert here.sigmas("one", "lognormal") == here.sigmas("one", "suppressed")

    def tested(row: str, sigma: str) -> dict:
        job = SimpleNamespace(pair="one", row=row, sigma=sigma)
        return json.loads(here.chunk_settings(job))["variation"]

    assert tested("later", "1") == {**WAN, "time": "2d"}
    assert tested("later", "0.5") == {**WAN, "time": "2d", "level": 0.5}
    assert tested("lognormal", "1") == tested("suppressed", "1") == WAN
    assert tested("later", "0")["sigma"] == 0
    trained = json.loads(STAGES["inject"].canonical(checked.settings("one", "lognormal")))["variation"]
    assert trained["sigma"] == 0.3
    config["rows"]["lognormal"]["set"]["evaluate"] = {}
    with pytest.raises(UserError, match=r"'lognormal' has variation\.device none and the pair rram-wan-2022"):
        Config.check(config)


def test_a_tested_file_is_an_input_of_evaluations(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text(LEVELS)
    config = configuration()
    config["pairs"]["one"] |= {"rows": ["unprotected", "suppressed"], "evaluate": {"variation": {"device": str(path)}}}
    checked = Config.check(config)
    here = Layout(checked)
    assert here.measurements(SimpleNamespace(pair="one", row="unprotected", sigma="1")) == [str(path)]
    assert here.measurements(SimpleNamespace(pair="one", row="unprotected", sigma="0")) == []
    assert here.measurements(SimpleNamespace(pair="one", variant="")) == []
    assert checked.settings("one").tested.digest == sha256(path)
    before = here.chunk_settings(SimpleNamespace(pair="one", row="unprotected", sigma="1"))
    path.write_text(LEVELS.replace("0.3", "0.4"))
    again = Layout(Config.check(config))
    assert again.chunk_settings(SimpleNamespace(pair="one", row="unprotected", sigma="1")) != before
    path.write_text(LEVELS.replace("0.3", "-0.4"))
    with pytest.raises(UserError, match=r"variation: .*own\.csv: standard deviations: -0\.4 is negative"):
        Config.check(config)


def test_a_pair_that_is_tested_elsewhere_has_the_network_of_the_pair_that_it_is_like() -> None:
    config = configuration()
    config["pairs"]["elsewhere"] = {"like": "one", "evaluate": {"variation": WAN}}
    checked = Config.check(config)
    assert checked.pretrains("elsewhere") == "one"
    assert checked.pretrains("two") == "two"


@pytest.fixture(scope="module")
def aged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of two networks at three times after programming, and of one at a single time."""
    folder = tmp_path_factory.mktemp("aged")
    few = ["--quiet", "--threads", 1]
    for name, epochs in (("a", 1), ("b", 2)):
        succeed("pretrain", *few, "--epochs", epochs, "--batch", 64, "--out", folder / name)
    files = []
    for name, time, level in [(n, t, 1) for n in "ab" for t in ("1s", "1d", "2d")] + [("a", "2d", 2)]:
        files.append(folder / f"{name}-{time}-{level}.csv")
        device = ["--device-model", "rram-wan-2022", "--time", time, "--level", level]
        notes = ["--note", "pair=p", "--note", f"row={name}-{time}"]
        succeed(
            "evaluate",
            *few,
            "--images",
            60,
            "--chips",
            3,
            *device,
            *notes,
            "--model",
            folder / name,
            "--out",
            files[-1],
        )
    succeed("collect", *files, "--out", folder / "samples.csv")
    succeed("collect", files[0], "--out", folder / "one.csv")
    return folder


def test_accuracy_over_time_is_a_curve_for_each_network(aged: Path, tmp_path: Path) -> None:
    samples = pd.read_csv(aged / "samples.csv")
    (ax,) = figures.over_time([aged / "samples.csv"], {"a-1s": "first", "b-1s": "second"}, sigma=1.0).axes
    assert ax.get_legend_handles_labels()[1] == ["first", "second"]
    for line, name in zip(ax.get_lines(), "ab", strict=True):
        assert line.get_xdata().tolist() == [1, 86400, 172800]
        own = samples[(samples["level"] == 1) & samples["row"].str.startswith(name)]
        assert line.get_ydata().tolist() == pytest.approx(
            [own["accuracy"][own["time"] == time].mean() for time in ("1s", "1d", "2d")]
        )
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1s", "1d", "2d"]
    assert ax.get_xlabel() == "time after programming rram-wan-2022"
    out = tmp_path / "figure-time.png"
    options = ["--sigma", 1, "--labels", '{"a-1s": "first"}']
    succeed("figure", "time", aged / "samples.csv", *options, "--out", out)
    assert out.stat().st_size > 10_000
    refused = run("figure", "time", aged / "one.csv", "--out", out).output
    assert "figure: no network is evaluated at two times after programming" in refused


def test_tables_say_the_time_of_each_row(aged: Path) -> None:
    files = [aged / f"a-{time}-1.csv" for time in ("1s", "1d")]
    for time in ("1s", "1d"):
        files.append(aged / f"a-{time}-0.csv")
        few = ["--quiet", "--threads", 1, "--images", 60, "--sigma", 0, "--note", "pair=p", "--note", f"row=a-{time}"]
        succeed("evaluate", *few, "--chips", 1, "--model", aged / "a", "--out", files[-1])
    succeed("collect", *files, "--out", aged / "two.csv")
    succeed("table", aged / "two.csv", "--sigma", 1, "--out", aged / "table1.csv")
    table = pd.read_csv(aged / "table1.csv").set_index("row")["variation"]
    assert table.to_dict() == {f"a-{time}": f"rram-wan-2022 after {time}, level 1" for time in ("1s", "1d")}


def test_runs_with_several_times_have_the_figure() -> None:
    config = configuration()
    config["rows"]["later"] = {
        "evaluate": "pretrain", "label": "l", "set": {"evaluate": {"variation": {"time": "2d"}}},
    }  # fmt: skip
    config["pairs"]["one"] |= {"variation": WAN, "rows": ["unprotected", "suppressed", "later"]}
    here = Layout(Config.check(config))
    assert "time" in here.figures("quick")
    job = SimpleNamespace(run="quick", name="time")
    assert here.figure_inputs(job) == ["results/one/samples.csv"]
    assert here.figure_options(job).startswith("--sigma 1 --labels ")
    config["rows"]["later"]["evaluate"] = "suppress"  # each network at one time but that of suppress
    assert "time" in Layout(Config.check(config)).figures("quick")
    config["pairs"]["one"]["rows"] = ["unprotected", "later"]
    assert "time" not in Layout(Config.check(config)).figures("quick")
    assert "time" not in Layout(Config.check(configuration())).figures("quick")
