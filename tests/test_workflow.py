"""The workflow: a real run with tiny budgets, then what reruns after one key of the configuration is changed."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from workflows import EXPERIMENTS, PAIR, ROOT, configuration, configure, ended, prepare, short, snakemake, start, stats

from correctnet.pipeline import provenance

pytest.importorskip("snakemake", reason="the workflow extra is not installed")


@pytest.fixture
def changed(folder):
    """A function that changes one key (a path with slashes) for one test and gives the rules that would rerun."""
    path = folder / "config.yaml"
    before = path.read_text()

    def change(key, value, target="quick"):
        config = yaml.safe_load(before)
        *groups, leaf = key.split("/")
        place = config
        for group in groups:
            place = place.setdefault(group, {})
        place[leaf] = value
        configure(folder, config)
        return stats(snakemake(folder, "-n", target))

    yield change
    path.write_text(before)


def test_a_small_run_from_data_to_table_1(tmp_path):
    """Every stage of CorrectNet once, and what one changed key reruns: the end-to-end test of the fast suite."""
    config = configuration()
    config["pairs"]["one"] |= {"rows": ["unprotected", "correctnet"]}
    config["pairs"]["one"]["evaluate"] |= {"sigmas": [], "chunk": 3}
    folder = prepare(tmp_path / "small", config)
    target = Path("results") / "summary" / "quick" / "table1.csv"
    snakemake(folder, target)
    table = pd.read_csv(folder / target).set_index("row")
    assert list(table.index) == ["unprotected", "correctnet"]
    assert set(table["chips"]) == {3}
    assert set(table["images"]) == {50}
    assert table["clean"].between(0.5, 1).all()
    assert table["overhead"].between(0, 0.02).all()
    assert stats(snakemake(folder, "-n", target)) == {}
    config["pairs"]["one"]["suppress"]["beta"] = 0.01
    configure(folder, config)
    again = {"suppress": 1, "sweep": 1, "search": 1, "compensate": 1, "evaluate": 2, "gather": 2}
    assert stats(snakemake(folder, "-n", target)) == again | {"collect": 1, "table1": 1}


@pytest.mark.e2e
def test_everything_is_there(folder):
    summary = folder / "results" / "summary" / "quick"
    figures = (2, 7, 9, 10, "rows", "yield", "sensitivity")
    names = {f"figure-{n}.{kind}" for n in figures for kind in ("png", "svg")}
    names |= {"table1.csv", "table1.md", "table1.html", "search.html", "provenance.csv", "provenance.html"}
    names |= {"config.yaml"}
    assert {p.name for p in summary.iterdir()} == names
    table = pd.read_csv(summary / "table1.csv").set_index("row")
    assert list(table.index) == PAIR["rows"]
    assert set(table["chips"]) == {3}
    assert set(table["images"]) == {50}
    assert table.loc["correctnet", "label"] == "CorrectNet"
    assert re.fullmatch(r"3 pretrain \+ 1 suppress \+ [01] compensate", table.loc["correctnet", "epochs"])
    assert (table["overhead"] <= 0.02).all()
    samples = pd.read_csv(folder / "results" / "one" / "samples.csv")
    # sigma 0 (1 chip) and 0.5 (3 chips) for all rows, 0.2 (2 chips) for the two that are curves
    assert samples.groupby("row").size().to_dict() == dict(zip(PAIR["rows"], (6, 4, 6, 4), strict=True))
    assert not list((folder / "results").rglob("chips-*.csv")), "chunks are temporary"


@pytest.mark.e2e
def test_chunks_give_what_one_evaluation_gives(folder, tmp_path):
    one = folder / "results" / "one"
    log = json.loads((one / "compensate" / "model.json").read_text())["history"][0]["settings"]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert log["pretrain"]["epochs"] == config["pairs"]["one"]["pretrain"]["epochs"]
    command = ["correctnet", "evaluate", "--config", folder / "config.yaml", "--pair", "one", "--chips", "3"]
    command += ["--model", one / "compensate", "--out", tmp_path / "e.csv", "--note", "pair=one", "--threads", "1"]
    command += ["--note", "row=correctnet", "--quiet"]
    subprocess.run([sys.executable, "-m", "correctnet.cli", *map(str, command[1:])], check=True)
    gathered = (one / "evaluate" / "correctnet" / "sigma-0.5.csv").read_text()
    assert (tmp_path / "e.csv").read_text() == gathered


@pytest.mark.e2e
def test_nothing_reruns_when_nothing_changed(folder):
    assert stats(snakemake(folder, "-n", "quick")) == {}


@pytest.mark.e2e
def test_another_wording_of_a_command_reruns_nothing(folder, tmp_path):
    copied = tmp_path / "reworded"
    shutil.copytree(folder, copied)
    rules = copied / "workflow" / "rules" / "train.smk"
    rules.write_text(rules.read_text().replace('"correctnet {params.command}', '"exec correctnet {params.command}'))
    assert stats(snakemake(copied, "-n", "quick")) == {}
    by_code = stats(snakemake(copied, "-n", "quick", "--rerun-triggers", "code"))
    assert {"pretrain", "suppress", "compensate"} <= set(by_code), "the wording did change"


# What follows the results of any row.
END = {"collect": 1, "table1": 1, "provenance": 1}
# The networks from the suppressed one on, and the search of the compensated one.
FROM_SUPPRESS = {"suppress": 1, "sweep": 1, "search": 1, "compensate": 1, "explore": 1, "figure": 7}
FROM_SEARCH = {"search": 1, "compensate": 1, "explore": 1, "sensitivity": 1, "evaluate": 4, "gather": 3}


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        # the regulariser: everything of the suppressed network and what stands on it, nothing of the original
        (
            "pairs/one/suppress/beta",
            0.01,
            {**FROM_SUPPRESS, "evaluate": 7, "gather": 5, "sensitivity": 2, **END},
        ),
        # the original network: everything
        (
            "pairs/one/pretrain/epochs",
            4,
            {"pretrain": 1, **FROM_SUPPRESS, "evaluate": 14, "gather": 10, "sensitivity": 3, **END},
        ),
        # training of the compensators, which the search does too; all figures but the sweep's
        ("pairs/one/compensate/learning_rate", 0.002, {**FROM_SEARCH, "figure": 6, **END}),
        # a further limit: its search alone, and what stands on the best state
        ("pairs/one/search/limits", [0.02, 0.01], {**FROM_SEARCH, "figure": 6, **END}),
        ("pairs/one/sweep/threshold", 0.9, {"sweep": 1, **FROM_SEARCH, "figure": 7, **END}),
        # sigma: all but the original network and its clean accuracy
        (
            "pairs/one/variation",
            {"sigma": 0.4},
            {**FROM_SUPPRESS, "evaluate": 11, "gather": 7, "sensitivity": 3, **END},
        ),
        # more chips: only chunks that are not there; the chunks before were temporary, so those of 0.5 all rerun
        ("pairs/one/evaluate/chips", 4, {"evaluate": 8, "gather": 4, "figure": 4, **END}),
        ("pairs/one/evaluate/sigmas", [0.2, 0.3], {"evaluate": 2, "gather": 2, "figure": 4, **END}),
        ("pairs/one/evaluate/curve_images", 20, {"evaluate": 2, "gather": 2, "figure": 4, **END}),
        ("pairs/one/sensitivity/chips", 3, {"sensitivity": 3, "figure": 1, "provenance": 1}),
        # a row's name for people: the table, and the figure of all rows
        ("rows/correctnet/label", "our method", {"table1": 1, "figure": 1, "provenance": 1}),
        ("pairs/one/rows", ["unprotected", "suppressed", "correctnet"], {"figure": 4, **END}),
        ("rows/finetuned/label", "of a row that the run has not", {}),
        # a row that needs one more stage, after all others
        (
            "pairs/one/rows",
            [*PAIR["rows"], "finetuned"],
            {"finetune": 1, "evaluate": 3, "gather": 2, "figure": 4, **END},
        ),
        # compensation on other weights: they are trained, and everything from the sweep on is made again
        ("pairs/one/base", "inject", {"inject": 1, "sweep": 1, **FROM_SEARCH, "figure": 7, **END}),
        # settings of other stages, other pairs, and of where things run
        ("pairs/one/inject", {"epochs": 7}, {}),
        ("pairs/two/pretrain/epochs", 9, {}),
        ("device", "cpu", {}),
        ("data_dir", "elsewhere", {}),
    ],
)  # fmt: skip
def test_one_changed_key_reruns_exactly_what_reads_it(changed, key, value, expected):
    assert changed(key, value) == expected


def jobs_of_a_run(plan):
    """The jobs that the page of provenance is told of, as a dry run prints its command."""
    command = re.search(r"correctnet provenance .*", plan)[0]
    options = shlex.split(command)
    return provenance.unfold(options[options.index("--jobs") + 1])


@pytest.mark.e2e
def test_provenance_is_of_the_jobs_of_the_run_as_it_is_configured_now(folder, tmp_path):
    benchmarks = folder / "results" / ".benchmarks"
    all_jobs = {str(path.relative_to(benchmarks)).removesuffix(".tsv") for path in benchmarks.rglob("*.tsv")}
    listed = pd.read_csv(folder / "results" / "summary" / "quick" / "provenance.csv")["job"]
    assert set(listed) == all_jobs
    assert len(listed) == len(all_jobs) > 20
    copied = tmp_path / "less"
    shutil.copytree(folder, copied)
    config = yaml.safe_load((copied / "config.yaml").read_text())
    config["pairs"]["one"] |= {"rows": ["unprotected", "suppressed"], "suppress": {"epochs": 1, "beta": 0.5}}
    config["pairs"]["one"]["evaluate"] |= {"chunk": 3}
    configure(copied, config)
    jobs = jobs_of_a_run(snakemake(copied, "-n", "-p", "quick"))
    chunks = {
        "unprotected": [("0", "0-1"), ("0.2", "0-2"), ("0.5", "0-3")],
        "suppressed": [("0", "0-1"), ("0.5", "0-3")],
    }
    expected = [f"one/evaluate/{row}/sigma-{s}/chips-{c}" for row, each in chunks.items() for s, c in each]
    assert sorted(jobs) == sorted(["one/pretrain", "one/suppress", *expected])


# Names, numbers and texts that are odd, and right.
ODD = r"""
runs: {paper: [p.1_a], all-of-it.v1: [p.1_a]}
rows:
  unprotected: {evaluate: pretrain, label: "$x^{$ | <b> σ 'q' \"dq\" \\ & `a` {b}\nsecond line", curve: yes}
  nan: &nan {evaluate: pretrain, label: "{wildcards.pair}"}
  "1": {<<: *nan, set: {variation: {centre: mean}}}
  correctnet: {evaluate: pretrain, label: c, set: {base: pretrain, suppress: {beta: 9.5}, sweep: {threshold: 0.1}}}
pairs:
  p.1_a:
    variation: {sigma: 0.4723807270774388}
    search: {limits: [0.00005, 0.02, 0.0200000001]}
    evaluate: {sigmas: [0.00001, 0.2, 0.20000001], chips: 3}
"""
REFUSED = {
    "no text": ("", "# \udce9", "config.yaml: cannot be read: not UTF-8 text (byte 3)"),
    "a key that stands twice": (
        "    search:",
        "    variation: {}\n    search:",
        "pairs.p.1_a.variation: is listed twice",
    ),
    "no default run": ("runs: {paper: [p.1_a], ", "runs: {", "runs.paper: missing"),
}


@pytest.mark.parametrize("mistake", [None, *REFUSED])
def test_check_accepts_what_runs_and_nothing_else(tmp_path, mistake):
    old, new, line = REFUSED.get(mistake, ("", "", "no mistakes"))
    folder = prepare(tmp_path / "odd")
    (folder / "config.yaml").write_text(ODD.replace(old, new, 1), "utf-8", "surrogateescape")
    check = subprocess.run(
        [sys.executable, "-m", "correctnet.cli", "check"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    dry = start(folder, "-n", "-p", "--cores", 1)
    said = ended(dry)
    assert (check.returncode == 0) == (dry.returncode == 0) == (mistake is None), said[-3000:]
    assert line in check.stdout + check.stderr
    assert "Traceback" not in said
    if mistake is not None:
        assert line in said
        assert "Job stats" not in said
        return
    assert stats(said)["evaluate"] == 5 + 2 + 2 + 2
    folders = {"limit-5e-05", "limit-0.02", "limit-0.0200000001"}
    assert set(re.findall(r"limit-[0-9.e+-]+(?=/best)", said)) == folders
    for sigma in ("0", "1e-05", "0.2", "0.20000001", "0.4723807270774388"):
        assert f"results/p.1_a/evaluate/unprotected/sigma-{sigma}/chips-0-" in said
        assert f'"sigma": {0.0 if sigma == "0" else sigma}' in said
    assert "--sigma 0.4723807270774388 " in said
    assert "p.1_a/evaluate/nan/sigma-0.4723807270774388/chips-0-3" in jobs_of_a_run(said)


@pytest.mark.e2e
def test_an_empty_variable_is_not_set_and_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    """What jobs are told of where the data sets lie."""
    monkeypatch.setenv("CORRECTNET_DATA", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # no network
    config = short(configuration()) | {"data_dir": "~/data", "results": "my results/"}
    config["pairs"]["one"]["data"]["dataset"] = "mnist"
    folder = prepare(tmp_path / "run", config)
    snakemake(folder, "my results/.data/mnist.ready", check=False)
    said = (folder / "my results" / ".logs" / "fetch" / "mnist.log").read_text(encoding="utf-8")
    assert str(tmp_path / "home" / "data") in said
    assert not (folder / "~").exists()
    assert not (folder / "data").exists()


@pytest.mark.e2e
def test_a_search_spread_over_jobs_is_the_search_of_one_job(folder, tmp_path):
    copied = tmp_path / "spread"
    shutil.copytree(folder, copied)
    config = yaml.safe_load((copied / "config.yaml").read_text())
    config["pairs"]["one"]["search"] |= {"population": 2, "evaluations": 4}
    configure(copied, config)
    place = Path("results") / "one" / "search" / "limit-0.02"
    planned = stats(snakemake(copied, "-n", place / "best.json"))
    assert planned == {"search": 1, "search_state": 1 + 2 * 2}
    snakemake(copied, place / "best.json")
    states = [json.loads(p.read_text()) for p in sorted((copied / place).glob("round-*/state-*.json"))]
    trained = [s for s in states if s]
    assert len(states) == 5
    assert 2 <= len(trained) <= 5, "four, and the state without compensation, which trains nothing"

    command = ["correctnet.cli", "search", "--config", "config.yaml", "--pair", "one", "--limit", "0.02"]
    command += ["--base", "results/one/suppress", "--candidates", "results/one/sweep/candidates.json"]
    command += ["--threads", "1", "--quiet", "--out", tmp_path / "alone"]
    subprocess.run([sys.executable, "-m", *map(str, command)], cwd=copied, check=True)
    assert (tmp_path / "alone" / "best.json").read_text() == (copied / place / "best.json").read_text()
    logs = [pd.read_csv(f / "log.csv").drop(columns="seconds") for f in (tmp_path / "alone", copied / place)]
    pd.testing.assert_frame_equal(*logs)


@pytest.mark.e2e
def test_another_pair_reruns_nothing_of_the_first(changed):
    found = changed("pairs/two/sweep/chips", 2, target="both")
    assert {k: found[k] for k in ("pretrain", "evaluate", "gather", "collect", "table1")} == {
        "pretrain": 1,
        "evaluate": 4,
        "gather": 3,
        "collect": 1,
        "table1": 1,
    }
    assert "suppress" not in found
    assert "compensate" not in found


@pytest.mark.e2e
def test_mistakes_in_the_configuration_stop_before_anything_runs(folder):
    path = folder / "config.yaml"
    before = path.read_text()
    try:
        path.write_text(before.replace("threshold: 1.0", "treshold: 1.0", 1))
        output = snakemake(folder, "-n", "quick", check=False)
    finally:
        path.write_text(before)
    assert "config.yaml: pairs.one.sweep.treshold: unknown key (did you mean 'threshold'?)" in output
    assert "Traceback" not in output


@pytest.mark.e2e
def test_one_pair_may_have_another_sigma_but_no_table_with_the_others(folder):
    path = folder / "config.yaml"
    before = path.read_text()
    config = yaml.safe_load(before)
    config["pairs"]["two"]["variation"] = {"sigma": 0.4}
    try:
        configure(folder, config)
        refused = snakemake(folder, "-n", "both", check=False)
        alone = stats(snakemake(folder, "-n", "results/two/evaluate/unprotected/sigma-0.4.csv"))
        command = [sys.executable, "-m", "correctnet.cli", "check", path]
        check, check_both = (
            subprocess.run([*command, *run], capture_output=True, text=True) for run in ([], ["--run", "both"])
        )
    finally:
        path.write_text(before)
    mistake = "runs.both: its pairs are one table, but their variation.sigma differ (0.4, 0.5)"
    assert mistake in refused
    assert "Job stats" not in refused
    assert alone["evaluate"] == 2
    assert mistake in check.stdout
    assert check.returncode == 0
    assert check_both.returncode == 2
    assert check_both.stderr.strip() == f"error: {mistake}"


@pytest.mark.e2e
def test_rows_whose_folders_are_named_alike_are_made_with_their_own_settings(tmp_path):
    config = configuration()
    mean = {"variation": {"centre": "mean"}}
    config["rows"] |= {
        "direct": {"evaluate": "inject", "label": "d", "set": mean},
        "other": {"evaluate": "compensate", "label": "o", "set": {**mean, "inject": {"epochs": 77}}},
        "tight": {"evaluate": "compensate", "label": "t", "set": {"search": {"limits": [0.01]}}},
    }
    config["pairs"]["one"]["rows"] = ["unprotected", "correctnet", "direct", "other", "tight"]
    folder = prepare(tmp_path / "rows", config)
    injected = snakemake(folder, "-n", "-p", "results/one/inject@variation.centre-mean/model.safetensors")
    assert '"centre": "mean"' in injected
    assert '"epochs": 77' not in injected, "what the other row says of a stage that it does not have"
    tight = snakemake(folder, "-n", "-p", "results/one/compensate@search.limits-0.01/model.safetensors")
    assert "--found results/one/search/limit-0.01/best.json" in tight
    assert "limit-0.02" not in tight
    drawn = snakemake(folder, "-n", "-p", "results/summary/quick/figure-rows.png")
    assert "correctnet figure rows results/one/samples.csv --sigma 0.5" in drawn


@pytest.mark.e2e
def test_a_full_run_begins_with_its_estimate_and_ends_with_its_table(folder):
    assert "Table I" not in snakemake(folder, "-n", "all")
    output = snakemake(folder, "all")
    estimate = re.search(r"paper: about \d+ (s|min) on \d+ cores", output)
    assert re.search(r"one: about \d+ (s|min) \(pretrain", output)
    table = re.search(r"paper, Table I at sigma = 0.5:\n\npair +row +clean +mean ± std +ratio +overhead\n", output)
    assert output.index("Building DAG") < estimate.start() < output.index("rule table1") < table.start()
    assert "Report:   snakemake --report report.html\n" in output[table.end() :]
    assert "quick, Table I" not in output, "of the requested run alone"


def test_the_shipped_workflow_plans_the_whole_paper():
    found = stats(snakemake(ROOT, "-n", "--forceall", "all"))
    config = yaml.safe_load((ROOT / "config.yaml").read_text())
    assert found["pretrain"] == len(config["runs"]["paper"]) == 4
    assert found["suppress"] == 4
    assert found["compensate"] == 4 * 2, "CorrectNet, and all candidates"
    assert not {"inject", "finetune"} & set(found), "the paper's rows alone"
    assert found["table1"] == 1
    assert found["figure"] == 7
    assert found["sensitivity"] == 4 * 3
    assert found["search"] == (3 + 2 + 2 + 2) + 4, "each limit is a job of its own"


@pytest.mark.e2e
def test_jobs_ask_for_more_than_they_take(folder):
    """The same of the jobs that have just run here: a stage that has become hungrier is found without a new table."""
    planned = snakemake(folder, "-n", "--forceall", "quick")
    memory = [int(m) for m in re.findall(r"wildcards: pair=one\b.*?mem_mb=(\d+)", planned, re.DOTALL)]
    taken = {}
    for file in (folder / "results" / ".benchmarks" / "one").rglob("*.tsv"):
        row = pd.read_csv(file, sep="\t").iloc[0]
        if row["max_rss"] == row["max_rss"]:  # short jobs end before they are looked at
            taken[file.relative_to(folder / "results" / ".benchmarks" / "one").parts[0]] = float(row["max_rss"])
    assert len(taken) > 3
    assert 100 < max(taken.values()) <= min(memory) / 1.35, taken


@pytest.mark.parametrize(
    ("storage", "expected"),
    [
        ("accounting_storage/slurmdbd", {"slurm-status-command": "sacct", "slurm-no-account": False}),
        ("accounting_storage/none", {"slurm-status-command": "squeue", "slurm-no-account": True}),
        ("(null)", {"slurm-status-command": "squeue", "slurm-no-account": True}),
    ],
)
def test_the_slurm_profile_finds_out_about_accounting(tmp_path, monkeypatch, storage, expected):
    yte = pytest.importorskip("yte")
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        f"#!/bin/sh\necho 'AccountStorageUser      = root'\necho 'AccountingStorageType   = {storage}'\n"
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    profile = ROOT / "workflow" / "profiles" / "slurm" / "profile.yaml"
    with open(profile) as file:
        values = yte.process_yaml(file, require_use_yte=True)
    assert {key: values[key] for key in expected} == expected
    assert values["executor"] == "slurm"


@pytest.mark.e2e
def test_the_gpu_profile_asks_for_one_gpu_at_a_time(folder):
    profile = ROOT / "workflow" / "profiles" / "gpu"
    output = snakemake(folder, "--profile", profile, "-n", "--forceall", "quick", cores=False)
    assert stats(output)["pretrain"] == 1
    assert yaml.safe_load((profile / "profile.yaml").read_text())["resources"] == {"gpu": 1}
    heavy = re.findall(r"^rule (\w+):.*?gpu=(\d)", output, re.DOTALL | re.MULTILINE)
    assert {gpu for _, gpu in heavy} == {"1"}


@pytest.mark.slow
def test_every_run_that_ships_can_be_planned(tmp_path):
    """In one plan: a pair of several runs is planned once."""
    config = yaml.safe_load((ROOT / "config.yaml").read_text())
    runs = ["all" if run == "paper" else run for run in config["runs"]]
    planned = stats(snakemake(prepare(tmp_path, config), "-n", *runs))
    assert planned["table1"] == len(runs)
    assert planned["collect"] == planned["pretrain"] == len(config["pairs"])


@pytest.mark.slow
@pytest.mark.parametrize("run", sorted(path.stem for path in EXPERIMENTS.glob("*.yaml")))
def test_every_experiment_that_ships_can_be_planned(tmp_path, run):
    config = yaml.safe_load((ROOT / "config.yaml").read_text())
    experiment = EXPERIMENTS / f"{run}.yaml"
    planned = stats(snakemake(prepare(tmp_path, config), "-n", run, "--configfile", experiment))
    assert planned["pretrain"] >= 1
    assert planned["evaluate"] >= 2
    assert planned["table1"] == 1


def test_what_is_drawn_of_a_row_leaves_out_the_pairs_without_it(tmp_path):
    """Pair two has the original network alone."""
    plan = snakemake(prepare(tmp_path), "-n", "both")
    drawn = re.findall(r"rule figure:\n +input: (.*)\n +output: \S*?figure-(\w+)\.png", plan)
    pairs = {name: set(re.findall(r"results/(one|two)/", files)) for files, name in drawn}
    of_all, of_one = ("2", "rows", "yield"), ("7", "9", "10", "sensitivity")
    assert pairs == {name: {"one", "two"} for name in of_all} | {name: {"one"} for name in of_one}
    config = configuration()
    config["runs"]["both"] = ["two"]
    plan = snakemake(prepare(tmp_path / "without", config), "-n", "both")
    assert set(re.findall(r"figure-(\w+)\.png", plan)) == {"2", "rows", "yield"}
    assert "search" not in stats(plan)
