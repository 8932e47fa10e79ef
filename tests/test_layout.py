"""Paths, inputs and parameters of the workflow's jobs, and what its head process prints, without Snakemake."""

import io
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml
from workflows import ROOT, configuration

from correctnet.errors import UserError
from correctnet.pipeline import head, provenance, resources
from correctnet.pipeline.config import Config
from correctnet.pipeline.layout import Layout
from correctnet.progress import PREFIX, ProgressBar, progress_lines
from correctnet.settings import Settings


def job(**wildcards: str) -> SimpleNamespace:
    return SimpleNamespace(**wildcards)


def layout(**changes) -> Layout:
    """The layout of the tests' configuration with changed settings of pair `one`, and further rows."""
    config = configuration()
    rows = changes.pop("rows", {})
    config["rows"] |= rows
    config["pairs"]["one"]["rows"] += list(rows)
    for section, values in changes.items():
        config["pairs"]["one"][section] = {**config["pairs"]["one"].get(section, {}), **values}
    return Layout(Config.check(config))


MEAN = {"variation": {"centre": "mean"}}
FURTHER = {
    "direct": {"evaluate": "inject", "label": "d", "set": MEAN},
    "other": {"evaluate": "compensate", "label": "o", "set": {**MEAN, "inject": {"epochs": 77}}},
    "tight": {"evaluate": "compensate", "label": "t", "set": {"search": {"limits": [0.01]}}},
}


def test_a_run_ends_with_its_table_figures_and_pages():
    names = ["table1.md", *(f"figure-{n}.png" for n in ("2", "rows", "yield", "7", "9", "10", "sensitivity"))]
    folder = "results/summary/quick"
    expected = [f"{folder}/{name}" for name in (*names, "search.html", "provenance.html")]
    assert layout().targets("quick") == expected
    assert layout().targets("absent") == []


def test_requested_runs_are_those_among_the_targets():
    here = layout()
    assert here.requested_runs(set()) == ["paper"]
    assert here.requested_runs({"quick", "results/one/samples.csv", "all"}) == ["paper", "quick"]
    assert here.requested_runs(["results/one/samples.csv"]) == []
    assert here.target_runs() == ["quick", "both"]


def test_a_row_shares_a_stage_or_has_a_variant_of_it():
    here = layout(rows=FURTHER)
    assert here.folder("one", "correctnet", "suppress") == "results/one/suppress"
    assert here.folder("one", "direct", "inject") == "results/one/inject@variation.centre-mean"
    assert here.folder("one", "tight", "compensate") == "results/one/compensate@search.limits-0.01"
    assert here.folder("one", "tight", "search") == "results/one/search"


def test_a_variant_is_made_with_the_settings_of_a_row_that_has_the_stage():
    """Two rows share the name of a variant; the one without the stage says other things of it."""
    here = layout(rows=FURTHER)
    wildcards = job(pair="one", variant="@variation.centre-mean")
    settings = json.loads(here.canonical("inject")(wildcards))
    assert settings["variation"]["centre"] == "mean"
    assert settings["inject"]["epochs"] != 77
    assert here.row_of(wildcards, "inject") == "direct"
    assert here.row_of(job(pair="one", variant="")) is None
    with pytest.raises(UserError, match="no row has a stage that differs in nothing"):
        here.row_of(job(pair="one", variant="@nothing"))


@pytest.mark.parametrize(
    ("strategy", "limits"),
    [("reinforce", (0.02, 0.03)), ("random", (0.02, 0.03)), ("all", (1.0,)), ("greedy", (0.03,))],
)
def test_limits_that_are_searched(strategy, limits):
    here = layout(search={"strategy": strategy, "limits": [0.02, 0.03]})
    wildcards = job(pair="one", variant="")
    assert here.limits(here.settings_of(wildcards)) == limits
    assert here.found_states(wildcards) == [f"results/one/search/limit-{x:g}/best.json" for x in limits]


def test_the_states_of_a_search_with_a_population():
    here = layout(search={"population": 2, "evaluations": 4})
    wildcards = {"pair": "one", "variant": "", "limit": "0.02"}
    folder = "results/one/search/limit-0.02"
    states = [f"{folder}/round-{r}/state-{k}.json" for r, k in ((0, 0), (1, 0), (1, 1), (2, 0), (2, 1))]
    assert here.all_states(job(**wildcards)) == states
    for number, before in enumerate((0, 1, 3)):
        assert here.earlier_states(job(**wildcards, round=str(number))) == states[:before]
    assert layout().all_states(job(**wildcards)) == []


def test_chunks_cover_every_chip_once():
    here = layout(evaluate={"chips": 5, "chunk": 2})
    wildcards = job(pair="one", row="correctnet", sigma="0.5")
    folder = "results/one/evaluate/correctnet/sigma-0.5"
    assert here.chunks(wildcards) == [f"{folder}/chips-{a}.csv" for a in ("0-2", "2-4", "4-5")]
    assert here.chunk_chips(job(start="4", stop="5")) == 1
    assert [here.sigmas("one", row) for row in ("correctnet", "suppressed")] == [
        {0.0: 1, 0.2: 2, 0.5: 5},
        {0.0: 1, 0.5: 5},
    ]
    with pytest.raises(UserError, match=r"row correctnet is not evaluated at sigma 0\.7 \(0, 0\.2, 0\.5\)"):
        here.chunks(job(pair="one", row="correctnet", sigma="0.7"))


def test_chips_of_curves_may_see_fewer_images():
    here = layout(evaluate={"curve_images": 20})
    at = {s: json.loads(here.chunk_settings(job(pair="one", row="correctnet", sigma=s))) for s in ("0", "0.2", "0.5")}
    assert {s: v["evaluate"]["images"] for s, v in at.items()} == {"0": 50, "0.2": 20, "0.5": 50}
    assert {s: v["variation"]["sigma"] for s, v in at.items()} == {"0": 0.0, "0.2": 0.2, "0.5": 0.5}


def test_the_clean_accuracy_is_also_counted_on_the_images_of_other_rows():
    rows = {"few": {"evaluate": "pretrain", "label": "f", "set": {"evaluate": {"images": 30}}}}
    here = layout(rows=rows)
    assert here.prefixes(job(pair="one", row="unprotected", sigma="0")) == "--prefix 30"
    for row, sigma in (("unprotected", "0.5"), ("few", "0"), ("suppressed", "0")):
        assert here.prefixes(job(pair="one", row=row, sigma=sigma)) == ""


def test_figures_leave_out_the_pairs_without_their_row():
    here = layout()
    inputs = {name: here.figure_inputs(job(run="both", name=name)) for name in here.figures("both")}
    pairs = {name: {path.split("/")[1] for path in paths} for name, paths in inputs.items()}
    of_all = {name: {"one", "two"} for name in ("2", "rows", "yield")}
    assert pairs == of_all | {name: {"one"} for name in ("7", "9", "10", "sensitivity")}
    assert here.figure_options(job(run="both", name="yield")) == "--sigma 0.5"
    assert here.figure_options(job(run="both", name="9")) == ""


def test_a_table_has_one_sigma():
    config = configuration()
    config["pairs"]["two"]["variation"] = {"sigma": 0.4}
    here = Layout(Config.check(config))
    with pytest.raises(UserError, match=r"runs\.both: its pairs are one table"):
        here.table_inputs(job(run="both"))
    assert here.table_inputs(job(run="quick")) == ["results/one/samples.csv"]


def test_input_files_are_options_by_their_names():
    files = {"data": "x.ready", "base": "a b/model", "known": ["k1", "k2"], "found": []}
    assert Layout.command("sweep")(job(), files) == "sweep --base 'a b/model' --known k1 --known k2"
    assert Layout.command("search")(job(limit="0.02", state="3"), files).endswith("--known k2 --limit 0.02 --state 3")
    assert Layout.output_folder(job(), ["results/one/sweep/accuracy.csv", "x"]) == "results/one/sweep"


def test_the_jobs_of_a_run():
    jobs = provenance.unfold(layout(search={"population": 2, "evaluations": 2}).run_jobs(job(run="quick")))
    assert len(jobs) == len(set(jobs))
    search = [
        "one/search-0.02",
        "one/search-0.02/round-0-state-0",
        *(f"one/search-0.02/round-1-state-{k}" for k in (0, 1)),
    ]
    assert {name for name in jobs if "search" in name} == set(search)
    assert {"one/pretrain", "one/suppress", "one/sweep", "one/compensate", "one/sensitivity/pretrain"} <= set(jobs)
    assert "one/evaluate/mean-preserving/sigma-0.5/chips-2-3" in jobs


def test_results_under_another_name_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = layout()
    here.check_place()
    here.note_place()
    here.check_place()
    Path("results").rename("elsewhere")
    moved = Layout(here.config.model_copy(update={"results": "elsewhere"}))
    with pytest.raises(UserError, match="elsewhere holds what was made as 'results'"):
        moved.check_place()


# --- resources


@pytest.fixture(scope="module")
def shipped() -> Config:
    return Config.load(ROOT / "config.yaml")


def test_jobs_ask_for_more_than_was_measured(shipped):
    """A third more memory and half as much time again as benchmark files of real runs say."""
    measured = pd.read_csv(ROOT / "results" / "reference" / "resources.csv")
    here, compared = Layout(shipped), 0
    for row in measured.to_dict("records"):
        pair, stage = row["pair"], row["rule"].replace("search_state", "search")
        if pair not in shipped.pairs:
            continue
        compared += 1
        asked = here.resources(stage, state=row["rule"] == "search_state")
        jobs = [job(pair=pair, row=name, start="0", stop="125") for name in shipped.rows_of(pair)]
        assert min(asked["mem_mb"](each, 1) for each in jobs) >= 1.35 * row["memory_mib"], row
        if row["seconds"] > 0:
            assert max(60 * asked["runtime"](each, 1) for each in jobs) >= 1.5 * row["seconds"], row
    assert compared > 20


VGG16 = {"network": {"name": "vgg16"}, "data": {"dataset": "cifar10"}}


@pytest.mark.parametrize(
    ("network", "threads"),
    [
        (VGG16["network"], 8),
        ({"name": "vgg16", "widths": [8, 8, 16, 16, 32, 32, 32, 64, 64, 64, 64, 64, 64, 64]}, 1),
        ({"name": "lenet5", "widths": [64, 128, 384, 192]}, 1),
    ],
)
def test_only_a_vgg16_of_the_usual_widths_asks_for_more_threads_than_one(network, threads):
    assert resources.training_threads(Settings.model_validate({**VGG16, "network": network})) == threads


def test_a_retry_asks_for_more():
    settings = Settings.model_validate({**VGG16, "pretrain": {"epochs": 40}})
    memory = [resources.memory_mib(settings, attempt) for attempt in (1, 2, 3)]
    assert memory == pytest.approx([2800, 4200, 5600], rel=0.01)
    assert resources.memory_mib(settings, cuda=True) == memory[0] + resources.CUDA
    first, second, third = (resources.minutes("pretrain", settings, attempt) for attempt in (1, 2, 3))
    assert (second, third) == (2 * first, 3 * first)
    # An epoch of 45,000 images took 281 s on two threads of the machine of `resources`.
    assert 1.5 < 60 * first / (40 * 281) < 15


def test_a_state_asks_for_less_time_than_its_search():
    settings = Settings.model_validate(VGG16)
    assert resources.minutes("search", settings, state=True) < resources.minutes("search", settings) / 4


# --- the head process


def test_stages_are_told_where_they_run(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = Config.check(configuration() | {"data_dir": "~/data", "device": "cuda", "results": "my results/"})
    told = head.environment(config, "snakemake x", {"CORRECTNET_DATA": ""})
    assert told["CORRECTNET_DATA"] == str(tmp_path / "data"), "an empty variable is not set"
    assert (told["CORRECTNET_DEVICE"], told["CORRECTNET_RESULTS"]) == ("cuda", "my results")
    assert told["CORRECTNET_HEAD"] == str(os.getpid())
    kept = head.environment(config, "snakemake x", {"CORRECTNET_DATA": "/d", "CORRECTNET_COMMAND": "of before"})
    assert (kept["CORRECTNET_DATA"], kept["CORRECTNET_COMMAND"]) == ("/d", "of before")


def test_the_merged_configuration_is_kept_and_can_be_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = configuration() | {"device": "cpu"}
    config["rows"]["correctnet"]["label"] = "CorrectNet, σ = 0.5"
    here = Layout(Config.check(config))
    head.write_configuration(here, "quick", config)
    path = Path("results/summary/quick/config.yaml")
    assert Config.load(path) == here.config
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == config


TABLE = (
    "Accuracies in %.\n\n| pair | clean | epochs | paper |\n|---|---:|---|---:|\n"
    "| a | 99.44% | 3 |  |\n| longer | 8.00% | 3 |  |\n"
)


def test_a_table_is_aligned_for_a_terminal():
    assert head.terminal_table(TABLE) == "pair     clean\n------  ------\na       99.44%\nlonger   8.00%"
    assert "67.01%" in head.terminal_table(TABLE.replace("| 3 |  |", "| 3 | 67.01% |"))


def test_a_run_ends_with_its_table_and_where_everything_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("results/summary/quick")
    folder.mkdir(parents=True)
    (folder / "table1.md").write_text(TABLE)
    (folder / "provenance.html").touch()
    text = head.summary(layout(), ["quick"])
    assert "longer   8.00%\n" in text
    assert f"{folder}/figure-NAME.png and .svg (NAME: 2, rows, yield, 7, 9, 10, sensitivity)" in text
    assert f"{folder}/ (provenance.html)" in text
    assert text.endswith("snakemake --report report.html quick")
    assert head.summary(layout(), ["quick"], ["a b.yaml"]).endswith("report.html quick --configfile 'a b.yaml'")


def write_log(results: Path, name: str, text: str, age: float = 0) -> Path:
    path = results / ".logs" / f"{name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_running_jobs_are_those_whose_log_ends_with_progress(tmp_path):
    write_log(tmp_path, "one/pretrain", f"provenance: {{}}\n{PREFIX}pretrain: 5 %\n{PREFIX}pretrain: 9 %\n")
    write_log(tmp_path, "one/search-0.02", f"{PREFIX}search: 9 %\n", age=3)
    write_log(tmp_path, "one/suppress", f"{PREFIX}suppress: 90 %\nstopped by SIGTERM\n")
    write_log(tmp_path, "one/sweep", "")
    write_log(tmp_path, "one/inject", f"{PREFIX}inject: 1 %\n", age=2 * head.SILENT)
    assert [(name, line) for name, line, _ in head.running(tmp_path)] == [
        ("one/pretrain", "9 %"),
        ("one/search-0.02", "search: 9 %"),
    ]
    assert list(head.running(tmp_path / "absent")) == []


def test_each_line_of_progress_is_shown_once(tmp_path):
    out = io.StringIO()
    write_log(tmp_path, "one/pretrain", f"{PREFIX}of before\n", age=5)
    shown = head.Progress(tmp_path, out)
    shown.show()
    assert out.getvalue() == "", "written before the run began"
    write_log(tmp_path, "one/pretrain", f"{PREFIX}pretrain: 50 %\n")
    shown.show()
    shown.show()
    assert out.getvalue() == "    one/pretrain: 50 %\n"


@pytest.mark.parametrize("on", [False, True])
def test_a_disabled_bar_writes_lines_to_a_log(monkeypatch, capsys, on):
    monkeypatch.setattr("correctnet.progress.FIRST", 0.0)
    with progress_lines(on), ProgressBar(total=4, desc="training", unit="batch", disable=True) as bar:
        bar.set_postfix_str("epoch 1", refresh=False)
        bar.update(2)
        bar.update(2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (2 if on else 0)
    if on:
        assert lines[0].startswith("progress: training: 50 %, epoch 1; about ")
        assert lines[1] == "progress: training: 100 %, epoch 1; about 0 s left"


def test_short_loops_write_no_line(capsys):
    with progress_lines():
        assert list(ProgressBar(range(100), disable=True)) == list(range(100))
    assert capsys.readouterr() == ("", "")


def test_without_progress_lines_a_bar_is_a_bar(capsys):
    with ProgressBar(total=2, desc="shown", mininterval=0) as bar:
        bar.update(2)
    assert "shown: 100%" in capsys.readouterr().err
