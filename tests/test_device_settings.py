"""Devices in the configuration: which settings they are, what they leave of the lognormal's, what a change reruns."""

import json
import re
from types import SimpleNamespace

import pandas as pd
import pytest
from by_hand import run, succeed
from workflows import ROOT, configuration, prepare, snakemake, stats

from correctnet import devices
from correctnet.crossbar.convert import convert
from correctnet.datasets.loading import load
from correctnet.devices.configuration import DeviceSettings, VariationSettings
from correctnet.devices.device import Device, Faults, Gain
from correctnet.devices.lognormal import LogNormalVariation
from correctnet.errors import UserError
from correctnet.evaluation.montecarlo import evaluate
from correctnet.files.storage import sha256
from correctnet.pipeline import provenance
from correctnet.pipeline.config import Config
from correctnet.pipeline.layout import Layout
from correctnet.pipeline.models import read_network
from correctnet.pipeline.specs import STAGES
from correctnet.report import figures, tables
from correctnet.sections import validate
from correctnet.settings import Settings, layered

LOGNORMAL = {"model": "lognormal", "sigma": 0.5, "centre": "median"}
WAN = {"device": "rram-wan-2022", "time": "1d"}
LEVELS = "level,mean_uS,std_uS\n0,10,0.1\n1,20,0.3\n2,40,0.6\n"


def settings(over, under=None):
    values = {"variation": over} if under is None else layered({"variation": under}, {"variation": over})
    return validate(Settings, values, "file").identified().variation


def test_the_lognormal_s_strings_and_folders_are_what_they_were():
    text = STAGES["suppress"].canonical(Settings())
    section = (
        '"variation": {"centre": "median", "model": "lognormal", "on": "weight", "resample": "chip", "sigma": 0.5}'
    )
    assert section in text
    assert json.loads(text)["version"] == 5
    config = configuration()
    config["rows"]["mean"] = {"evaluate": "suppress", "label": "m", "set": {"variation": {"centre": "mean"}}}
    config["pairs"]["one"]["rows"] += ["mean"]
    assert Config.check(config).variant("one", "mean", "suppress") == "@variation.centre-mean"


def test_a_device_leaves_nothing_of_the_lognormal():
    found = settings(WAN, LOGNORMAL)
    assert isinstance(found, DeviceSettings)
    assert found.model_dump() == WAN, "what is not given is no part of the values"
    assert settings({"time": "2d"}, WAN).model_dump() == {"device": "rram-wan-2022", "time": "2d"}
    assert settings({"device": "rram-milo-2021"}, WAN).model_dump() == {"device": "rram-milo-2021"}
    back = settings({"model": "lognormal"}, {**WAN, "centre": "mean"})
    assert back == VariationSettings()


def test_settings_make_the_device():
    values = {"scale": "output", "clip_rms": 2.5, "levels": 16, "cell": "two-sided", "g_min": 1, "g_max": 30}
    noisy = {"stuck_off": 0.01, "stuck_on": 0.002, "chip_gain": 0.02, "column_gain": 0.01, "level": 0.5}
    made = devices.make(settings({**WAN, **values, **noisy, "centre": "mean"}))
    faults, gain = Faults(0.01, 0.002), Gain(0.02, 0.01)
    assert made == Device.preset("rram-wan-2022", "1d", **values, centre="mean", noise=0.5, faults=faults, gain=gain)
    assert devices.make(settings({"device": "rram-wan-2022", "time": 86400})) == Device.preset("rram-wan-2022", "1d")
    assert devices.make(settings({"sigma": 0.25})) == LogNormalVariation(0.25)


def test_levels_of_both_kinds():
    lognormal, device = settings({"sigma": 0.3, "centre": "mean"}), settings(WAN)
    assert (lognormal.level, device.level) == (0.3, 1.0)
    assert devices.make(lognormal.at(0.2)) == devices.make(lognormal).at(0.2)
    assert devices.make(device.at(0.5)) == devices.make(device).at(0.5)
    assert device.at(0.0) == VariationSettings(sigma=0.0), "the nominal network, whatever the device"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"device": "rram-wan-2021"}, "variation: there is no preset 'rram-wan-2021'; there are pcm-nandakumar-2019"),
        ({"device": "absent.csv"}, "variation: absent.csv: no such file"),
        ({"device": None}, "file: variation.device: a published device or a file of measurements is expected"),
        ({"time": "1d"}, "variation: device: a published device or a file of measurements is expected; none is named"),
        ({**WAN, "time": "3d"}, "variation: the device was measured after 1s, 1d, 2d, not after 3d"),
        ({**WAN, "g_max": 50}, "variation: g_max 50 uS is outside of what was measured, 0 to 40 uS"),
        ({**WAN, "g_min": 30, "g_max": 20}, "variation: g_max must be above g_min; they are 20 and 30 uS"),
        ({**WAN, "unit": "uS"}, "variation: unit: rram-wan-2022 is a published device, whose unit is known"),
        ({**WAN, "levels": 1}, "variation: levels must be 0 or at least 2, not 1"),
        ({**WAN, "stuck_off": 0.6, "stuck_on": 0.6}, "variation: stuck off 0.6 and stuck on 0.6 sum to more than 1"),
        ({**WAN, "stuck_off": 2}, "file: variation.stuck_off: Input should be less than or equal to 1, not 2"),
        ({**WAN, "sigma": 0.5}, "file: variation: sigma goes with the lognormal and not with a device"),
        ({**WAN, "model": "lognormal"}, "file: variation: one of model, device is expected, not both"),
        ({**LOGNORMAL, "time": "1d"}, "file: variation: time goes with variation.device, and no device is named"),
        ({**WAN, "levle": 2}, "file: variation.levle: unknown key (did you mean 'level'?)"),
        ({**WAN, "centre": "median"}, "file: variation.centre: Input should be 'target' or 'mean', not 'median'"),
        ({**WAN, "level": "2"}, "file: variation.level: a number is expected (write 2), not '2'"),
        ({**WAN, "level": 0}, "file: variation.level: Input should be greater than 0, not 0"),
    ],
)
def test_mistakes_are_one_line_each(values, message):
    with pytest.raises(UserError) as caught:
        settings(values)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def own(tmp_path, text=LEVELS):
    path = tmp_path / "own.csv"
    path.write_text(text)
    return {"device": str(path)}


def test_mistakes_in_a_file_are_found_when_the_configuration_is_checked(tmp_path):
    config = configuration()
    config["pairs"]["one"]["variation"] = own(tmp_path, LEVELS.replace("0.3", "-0.3"))
    with pytest.raises(UserError) as caught:
        Config.check(config)
    (line,) = set(str(caught.value).splitlines())
    assert line.startswith("config.yaml: pairs.one: variation: ")
    assert line.endswith("own.csv: standard deviations: -0.3 is negative")


def test_a_changed_file_changes_what_uses_it_and_no_other(tmp_path):
    config = configuration()
    config["pairs"]["one"]["variation"] = own(tmp_path)

    def strings():
        here = Layout(Config.check(config))
        found = {}
        for pair in ("one", "two"):
            for stage in STAGES:
                found[pair, stage] = STAGES[stage].canonical(here.config.settings(pair, "unprotected"))
            for level in here.sigmas(pair, "unprotected"):
                job = SimpleNamespace(pair=pair, row="unprotected", sigma=str(level))
                found[pair, level] = here.chunk_settings(job)
        return here.config.variant("one", "correctnet", "compensate"), found

    folder, before = strings()
    own(tmp_path, LEVELS.replace("0.3", "0.4"))
    after_folder, after = strings()
    assert folder == after_folder
    changed = {key for key in before if before[key] != after[key]}
    at = {("one", level) for level in (0.2, 1.0) if ("one", level) in before}
    assert ("one", 1.0) in at
    assert changed == {("one", stage) for stage in STAGES if stage != "pretrain"} | at
    text = before["one", "inject"]
    with pytest.raises(UserError, match="the file has changed since the settings were made"):
        devices.make(STAGES["inject"].parse(text, "inject").variation)


def test_the_file_is_an_input_of_what_uses_it(tmp_path):
    config = configuration()
    config["pairs"]["one"]["variation"] = own(tmp_path)
    here = Layout(Config.check(config))
    path = [str(tmp_path / "own.csv")]
    assert here.measurements(SimpleNamespace(pair="one", variant="")) == path
    assert here.measurements(SimpleNamespace(pair="one", row="unprotected", sigma="1")) == path
    assert here.measurements(SimpleNamespace(pair="one", row="unprotected", sigma="0")) == []
    assert here.measurements(SimpleNamespace(pair="two", variant="")) == []
    command = here.command("inject")(SimpleNamespace(), {"device": path, "pretrained": "m", "data": "x"})
    assert command == "inject --pretrained m"


def test_rows_of_a_table_are_under_one_device():
    config = configuration()
    config["rows"]["other"] = {"evaluate": "pretrain", "label": "o", "set": {"variation": {"device": "rram-milo-2021"}}}
    config["rows"]["clipped"] = {"evaluate": "pretrain", "label": "c", "set": {"variation": {"clip_rms": 2.5}}}
    config["pairs"]["one"] |= {"variation": WAN, "rows": ["unprotected", "clipped"]}
    checked = Config.check(config)
    assert checked.settings("one", "clipped").variation.model_dump() == {**WAN, "clip_rms": 2.5}
    assert checked.level_of("both") is None, "1 of the device, and sigma of the other pair"
    assert Layout(checked).table_level(SimpleNamespace(run="both")) == "--level one=1 --level two=0.5"
    assert Layout(checked).table_level(SimpleNamespace(run="quick")) == "--sigma 1"
    config["pairs"]["one"]["rows"] += ["other"]
    with pytest.raises(UserError, match=r"'other' has variation\.device rram-milo-2021 and the pair rram-wan-2022"):
        Config.check(config)


def test_pairs_under_devices_have_the_network_of_the_pair_that_they_are_like(tmp_path):
    config = configuration()
    config["pairs"]["device"] = {"like": "one", "variation": WAN}
    config["pairs"]["longer"] = {"like": "one", "variation": WAN, "pretrain": {"epochs": 4}}
    config["pairs"]["alike"] = {"like": "one"}
    config["runs"]["devices"] = ["device"]
    here = Layout(Config.check(config))
    folders = {pair: here.folder(pair, "suppressed", "pretrain") for pair in ("device", "longer", "alike")}
    assert folders == {
        "device": "results/one/pretrain",
        "longer": "results/longer/pretrain",
        "alike": "results/alike/pretrain",
    }
    assert here.folder("device", "suppressed", "suppress") == "results/device/suppress"
    job = SimpleNamespace(pair="device", variant="")
    assert here.result("pretrain")(job) == "results/one/pretrain/model.safetensors"
    names = provenance.unfold(here.run_jobs(SimpleNamespace(run="devices")))
    assert "one/pretrain" in names
    for name in ("one/pretrain", "one/suppress", "device/suppress"):
        path = tmp_path / ".benchmarks" / f"{name}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("s\tmax_rss\tcpu_time\n1\t2\t3\n")
    found = provenance.jobs(tmp_path, ["device"], names)["job"]
    assert sorted(found) == ["device/suppress", "one/pretrain"]


def test_the_configuration_of_the_page_is_right(tmp_path, monkeypatch):
    texts = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "devices.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "levels.csv").write_text(LEVELS.replace("mean_uS", "mean").replace("std_uS", "std"))
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.yaml").write_text(text)
    config = Config.load(ROOT / "config.yaml", *sorted(tmp_path.glob("*.yaml")))
    made = devices.make(config.settings("lenet5-mnist-rram", "correctnet").variation)
    assert made == Device.preset("rram-wan-2022", "1d", clip_rms=2.5).stuck(0.01)
    assert devices.make(config.settings("lenet5-mnist-own").variation).name == "levels.csv"
    assert config.settings("lenet5-mnist-own").converters.adc_bits == 8


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("device")
    succeed("pretrain", "--quiet", "--threads", 1, "--epochs", 1, "--batch", 64, "--out", folder / "pretrain")
    return folder / "pretrain"


def evaluated(model, out, *options):
    few = ["--quiet", "--threads", 1, "--images", 40, "--chips", 2]
    said = succeed("evaluate", *few, *options, "--model", model, "--out", out).output
    return pd.read_csv(out), said


@pytest.mark.filterwarnings("error::correctnet.evaluation.montecarlo.EngineWarning")
def test_results_say_the_device(pretrained, tmp_path):
    options = ["--device-model", "rram-wan-2022", "--time", "1d", "--clip-rms", 2.5, "--stuck-off", 0.01]
    table, said = evaluated(pretrained, tmp_path / "e.csv", *options, "--level", 0.5)
    assert "rram-wan-2022 weights, level 0.5, centre target" in said
    first = table.iloc[0]
    shown = (
        "variation",
        "level",
        "time",
        "cell",
        "clip_rms",
        "stuck_off",
        "stuck_on",
        "g_max",
        "unit",
    )
    assert [first[key] for key in shown] == ["rram-wan-2022", 0.5, "1d", "pair", 2.5, 0.01, 0.0, 40.0, "uS"]
    assert len(first["measurement"]) == 16
    assert "sigma" not in table
    network, _ = read_network(pretrained)
    made = Device.preset("rram-wan-2022", "1d", clip_rms=2.5, noise=0.5).stuck(0.01)
    images = load("digits", validation=0.1, seed=0).test.take(40)
    assert evaluate(convert(network, made, 0), images, 2).table["correct"].tolist() == table["correct"].tolist()


def test_every_stage_takes_a_device_from_a_file(pretrained, tmp_path):
    path = own(tmp_path)["device"]
    few = ["--quiet", "--threads", 1, "--device-model", path, "--level", 0.5]
    train = [*few, "--epochs", 1, "--batch", 64, "--pretrained", pretrained]
    for stage in ("suppress", "inject"):
        succeed(stage, *train, "--out", tmp_path / stage)
        history = json.loads((tmp_path / stage / "model.json").read_text())["history"]
        variation = history[-1]["settings"]["variation"]
        assert variation == {"device": path, "level": 0.5, "digest": sha256(tmp_path / "own.csv")}
        assert history[-1]["measurement"] == Device.from_csv(path).describe()["measurement"]
        assert "measurement" not in history[0], "of pre-training"
    table, _ = evaluated(tmp_path / "inject", tmp_path / "e.csv", *few[3:])
    assert set(table["trained_sigma"]) == {f"{path}, level 0.5"}
    assert set(table["variation"]) == {"own.csv"}
    out = tmp_path / "s.csv"
    succeed("sensitivity", *few, "--chips", 1, "--images", 20, "--model", tmp_path / "inject", "--out", out)
    layers = pd.read_csv(out)
    assert set(layers["variation"]) == {f"{path}, level 0.5"}
    assert set(layers["level"]) == {0.5}


def test_mistakes_on_the_command_line(pretrained, tmp_path):
    path = own(tmp_path)["device"]
    for options, message in (
        (["--time", "1d"], "command line: variation: time goes with variation.device, and no device is named"),
        (["--device-model", "rram-wan-2022", "--sigma", 0.5], "command line: variation: sigma goes with the lognormal"),
        (["--device-model", "rram-wan-2022", "--prefix", 3], "--prefix: the nominal network alone"),
        (["--device-model", path, "--unit", "V"], "variation: unit: there is no 'V'"),
        (["--device-model", path, "--out", path], "own.csv"),
    ):
        out = [] if "--out" in options else ["--out", tmp_path / "e.csv"]
        result = run("evaluate", "--quiet", "--chips", 1, "--model", pretrained, *options, *out)
        assert result.exit_code == 2, (options, result.output)
        (line,) = (text for text in result.output.splitlines() if text.lower().startswith("error"))
        assert message in line
    assert (tmp_path / "own.csv").read_text() == LEVELS


@pytest.fixture(scope="module")
def collected(pretrained, tmp_path_factory):
    """Samples of a pair under a device, at three levels, and of one under the lognormal."""
    folder = tmp_path_factory.mktemp("collected")
    device = ["--device-model", "rram-wan-2022", "--time", "1d"]
    jobs = [("one", [*device, "--level", level]) for level in (0.5, 1)] + [("two", ["--sigma", 0.5])]
    jobs += [(pair, ["--sigma", 0]) for pair in ("one", "two")]
    for number, (pair, options) in enumerate(jobs):
        evaluated(pretrained, folder / f"{number}.csv", *options, "--note", f"pair={pair}", "--note", "row=unprotected")
    files = [folder / f"{number}.csv" for number in range(len(jobs))]
    succeed("collect", *files, "--out", folder / "samples.csv")
    succeed("collect", files[2], files[4], "--out", folder / "lognormal.csv")
    return folder


def test_files_of_the_lognormal_have_the_columns_that_they_had(collected):
    assert "level" not in pd.read_csv(collected / "lognormal.csv")
    mixed = pd.read_csv(collected / "samples.csv")
    assert "sigma" not in mixed
    assert mixed.groupby("pair")["level"].unique().map(sorted).to_dict() == {"one": [0, 0.5, 1], "two": [0, 0.5]}


def test_each_pair_of_a_table_is_at_its_own_level(collected, tmp_path):
    out = collected / "table1.csv"
    levels = ["--level", "one=1", "--level", "two=0.5"]
    succeed("table", collected / "samples.csv", *levels, "--out", out)
    table, samples = pd.read_csv(out).set_index("pair"), pd.read_csv(collected / "samples.csv")
    assert table["variation"].to_dict() == {
        "one": "rram-wan-2022 after 1d, level 1",
        "two": "lognormal, sigma 0.5",
    }
    for pair, level in (("one", 1.0), ("two", 0.5)):
        of_pair = samples[(samples["pair"] == pair) & (samples["level"] == level)]
        assert table["mean"][pair] == pytest.approx(of_pair["accuracy"].mean())
    said = "under rram-wan-2022 after 1d, level 1 (one); lognormal, sigma 0.5 (two); mean"
    assert said in (collected / "table1.md").read_text()
    assert "rram-wan-2022 after 1d, level 1 (one)" in (collected / "table1.html").read_text()
    succeed("table", collected / "lognormal.csv", "--out", out)
    assert "variation" not in pd.read_csv(out)
    succeed("figure", "yield", collected / "samples.csv", *levels, "--out", tmp_path / "f.png")
    for options, message in (
        (["--sigma", 0.7], "table: pair one has no results at level 0.7"),
        (["--level", "two=0.7"], "table: pair two has no results at sigma 0.7"),
        (["--level", "two=x"], "--level two=x: a number is expected"),
    ):
        assert message in run("table", collected / "samples.csv", *options, "--out", out).output
    refused = run("figure", "2", collected / "samples.csv", *levels, "--out", tmp_path / "f.png").output
    assert "--level: figure 2 does not show one of several" in refused


def test_axes_are_called_by_what_the_level_is(collected):
    axes = figures.figure2([collected / "samples.csv"]).axes
    device = "multiple of the measured deviations of rram-wan-2022"
    assert [ax.get_xlabel() for ax in axes] == [device, "device variation σ"]
    assert axes[0].get_lines()[0].get_xdata().tolist() == [0, 0.5, 1]
    texts = [[text.get_text() for text in ax.texts] for ax in figures.yield_curve([collected / "samples.csv"]).axes]
    assert texts == [["rram-wan-2022 after 1d, level 1, 2 chips"], ["σ = 0.5, 2 chips"]]
    titles = [ax.get_title() for ax in figures.rows([collected / "samples.csv"]).axes]
    assert titles == ["one: rram-wan-2022 after 1d, level 1", "two"]


def test_the_paper_s_values_stand_beside_the_lognormal_only(collected):
    samples = tables.read_samples([collected / "samples.csv"]).assign(network="lenet5", dataset="cifar10")
    table = tables.table1(samples.assign(row="correctnet"), 0.5).set_index("pair")
    assert table["paper"].notna().to_dict() == {"one": False, "two": True}


@pytest.mark.e2e
def test_a_run_under_devices_and_what_a_changed_file_reruns(tmp_path):
    """A table of a pair under measurements, one under a published device and one under the lognormal."""
    config = configuration()
    few = {
        "evaluate": {"chips": 2, "sigmas": [], "curve_chips": 2, "chunk": 2, "images": 50},
        "pretrain": {"epochs": 1},
    }
    rows = ["unprotected", "suppressed", "correctnet", "injected", "clipped"]
    config["rows"]["clipped"] = {"evaluate": "pretrain", "label": "c", "set": {"variation": {"clip_rms": 2.5}}}
    config["defaults"] |= {"variation": LOGNORMAL, "inject": {"epochs": 1}}
    config["pairs"]["one"] |= {**few, "rows": rows, "variation": {"device": "my levels.csv"}}
    config["pairs"]["two"] |= {**few, "variation": WAN}
    config["pairs"]["three"] = {"like": "two", "variation": {"model": "lognormal"}}
    config["runs"] = {"paper": ["one", "two", "three"]}
    folder = prepare(tmp_path / "run", config)
    (folder / "my levels.csv").write_text(LEVELS)
    plan = ["results/summary/paper/table1.csv", "results/summary/paper/figure-rows.png"]
    snakemake(folder, *plan)
    table = pd.read_csv(folder / plan[0]).set_index(["pair", "row"])
    assert table["variation"].to_dict() == {
        **{("one", row): "my levels.csv, level 1" for row in rows},
        ("two", "unprotected"): "rram-wan-2022 after 1d, level 1",
        ("three", "unprotected"): "lognormal, sigma 0.5",
    }
    assert (folder / "results/one/evaluate/clipped/sigma-1.csv").exists()
    assert stats(snakemake(folder, "-n", *plan)) == {}
    (folder / "my levels.csv").touch()
    assert stats(snakemake(folder, "-n", *plan)) == {}, "the same content"
    (folder / "my levels.csv").write_text(LEVELS.replace("0.3", "0.4"))
    rerun = stats(snakemake(folder, "-n", *plan))
    trained = ("pretrain", "suppress", "inject", "sweep", "search", "compensate")
    assert {name: rerun.get(name, 0) for name in trained} == {name: int(name != "pretrain") for name in trained}
    # Each row at level 1, and the three whose networks have changed at level 0.
    assert rerun["evaluate"] == 8
    assert rerun["collect"] == 1, "of pair one alone"
