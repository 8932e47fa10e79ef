"""What a model was made with goes along with it, and what is resumed or read belongs to what was asked."""

import copy
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from by_hand import run, succeed
from test_cli import fail
from workflows import configuration, prepare, short, snakemake

from correctnet.datasets import digits, loading
from correctnet.errors import UserError
from correctnet.evaluation.montecarlo import clean_accuracy
from correctnet.files import storage
from correctnet.pipeline import models, runtime, stages
from correctnet.pipeline.stages import searching, training
from correctnet.sections import merge, validate
from correctnet.settings import Settings

FAST = ["--quiet", "--threads", "1", "--epochs", "0"]
QUIET = ["--quiet", "--threads", "1"]
MADE = {"dataset": "digits", "validation": 0.2, "augment": "crop", "seed": 3}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model of another split than the defaults', and what two stages made of it."""
    folder = tmp_path_factory.mktemp("made")
    of_data = ["--validation", 0.2, "--augment", "crop", "--seed", 3]
    succeed("pretrain", *FAST, "--epochs", 1, *of_data, "--out", folder / "pretrain")
    succeed("suppress", *FAST, "--sigma", 0.3, "--pretrained", folder / "pretrain", "--out", folder / "suppress")
    succeed("inject", *FAST, "--seed", 8, "--pretrained", folder / "suppress", "--out", folder / "inject")
    return folder


def begin(stage, model):
    """The options that name what a stage begins with."""
    return {
        "sweep": ["--pretrained", model, "--base", model],
        "search": ["--base", model, "--candidates", "c.json"],
        "compensate": ["--base", model, "--found", "b.json"],
        "sidepath": ["--base", model],
        "finetune": ["--compensated", model],
        "sensitivity": ["--model", model],
        "evaluate": ["--model", model],
    }.get(stage, ["--pretrained", model])


STAGES = [
    "suppress",
    "inject",
    "distil",
    "moments",
    "sidepath",
    "sweep",
    "search",
    "compensate",
    "finetune",
    "sensitivity",
    "evaluate",
]
FUNCTIONS = {"evaluate": "evaluate_chips"}


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_takes_what_its_model_was_made_with(made, tmp_path, monkeypatch, stage):
    seen = []

    class Seen(Exception):
        pass

    def note(settings, *_, **__):
        seen.append(settings)
        raise Seen

    monkeypatch.setattr(stages, FUNCTIONS.get(stage, stage), note)
    for options in ([], ["--validation", 0.3], ["--settings", "{}"]):
        assert isinstance(
            run(stage, *QUIET, *begin(stage, made / "suppress"), *options, "--out", tmp_path / "o").exception, Seen
        )
    assert {**seen[0].data.model_dump(), "seed": seen[0].seed} == MADE
    assert (seen[1].data.validation, seen[1].data.augment) == (0.3, "crop"), "options come first"
    assert seen[2] == Settings(), "--settings say all"


def test_models_keep_what_the_first_stage_was_made_with(made):
    for stage in ("pretrain", "suppress", "inject"):
        assert storage.read_json(made / stage / "model.json")["data"] == MADE


@pytest.mark.parametrize("stage", ["suppress", "inject", "sweep", "finetune", "sensitivity", "evaluate"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "mnist"], "--dataset mnist: {} was trained on digits"),
        (["--validation", 0.1], "--validation 0.1: {} was trained with 0.2 of the training images held out"),
        (["--settings", '{"data": {"dataset": "cifar10"}}'], "--dataset cifar10: {} was trained on digits"),
        (["--config", "config.yaml", "--pair", "lenet5-mnist"], "--dataset mnist: {} was trained on digits"),
    ],
)
def test_other_images_than_the_model_s_are_refused(made, tmp_path, stage, options, message):
    line = fail(stage, *QUIET, *options, *begin(stage, made / "suppress"), "--out", tmp_path / "o")
    assert message.format(made / "suppress") in line
    assert not (tmp_path / "o").exists()


def test_a_search_and_its_compensators_refuse_other_images_too(made, tmp_path):
    (tmp_path / "c.json").write_text('{"candidates": ["conv1.layer"]}')
    best = {"filters": {"conv1.layer": 2}, "mean": 0.5, "overhead": 0.01}
    (tmp_path / "b.json").write_text(json.dumps(best))
    base = ["--base", made / "suppress", "--dataset", "mnist", "--out", tmp_path / "o"]
    for strategy in ("reinforce", "all"):
        line = fail("search", *QUIET, "--strategy", strategy, *base, "--candidates", tmp_path / "c.json")
        assert "was trained on digits" in line
    assert "was trained on digits" in fail("compensate", *FAST, *base, "--found", tmp_path / "b.json")


def test_another_seed_changes_chips_and_not_the_split(made, tmp_path):
    """The accuracy of the nominal network says on which images it was judged."""
    network, _ = models.read_network(made / "suppress")
    held_out = loading.load("digits", validation=0.2, seed=3).validation
    torch.manual_seed(0)
    for seed in (3, 9):
        options = ["--split", "validation", "--sigma", 0, "--seed", seed, "--out", tmp_path / f"{seed}.csv"]
        said = succeed("evaluate", *QUIET, "--model", made / "suppress", *options).output
        assert ("seed 9 is that of chips and batches; the images are split with seed 3" in said) == (seed == 9)
        table = pd.read_csv(tmp_path / f"{seed}.csv")
        assert (table["seed"][0], table["images"][0]) == (seed, len(held_out))
        assert table["accuracy"][0] == clean_accuracy(network, held_out)


def test_older_models_say_it_in_their_history(made, tmp_path):
    tensors, description = storage.read_model(made / "inject")
    del description["data"]
    storage.write_model(tmp_path, tensors, {k: v for k, v in description.items() if k not in ("format", "sha256")})
    assert storage.training_data(storage.read_json(tmp_path / "model.json")) == MADE
    assert "was trained on digits" in fail(
        "evaluate", *QUIET, "--dataset", "mnist", "--model", tmp_path, "--out", tmp_path / "e.csv"
    )
    assert storage.training_data({}) == storage.training_data({"history": [{"stage": "x"}]}) == {}


def test_a_sweep_of_two_networks_of_other_splits_is_refused(made, tmp_path):
    succeed("pretrain", *FAST, "--validation", 0.2, "--seed", 4, "--out", tmp_path / "other")
    both = ["--pretrained", made / "pretrain", "--base", tmp_path / "other"]
    assert "were trained on other splits" in fail("sweep", *QUIET, "--chips", 1, *both, "--out", tmp_path / "o")


@pytest.mark.parametrize(("stage", "sigmas"), [("pretrain", "none"), ("suppress", "0.3"), ("inject", "0.3 + 0.5")])
def test_results_say_for_which_sigma_the_model_was_trained(made, tmp_path, stage, sigmas):
    succeed("evaluate", *QUIET, "--chips", 2, "--images", 20, "--model", made / stage, "--out", tmp_path / "e.csv")
    assert pd.read_csv(tmp_path / "e.csv", dtype=str, keep_default_na=False)["trained_sigma"].tolist() == [sigmas] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": 7}, "network: a network is expected, not 7"),
        ({"network": {"name": "lenet5", "classes": 10.5, "channels": 1}}, "network.classes: a number of them"),
        ({"network": {"name": "lenet5", "classes": 10, "channels": 1, "depth": 3}}, "describes no network"),
        ({"network": {"name": "lenet5", "classes": 10, "channels": 1, "widths": [1]}}, "describes no network"),
        ({"history": [{"stage": "pretrain"}]}, "history: a list of stages, each with its epochs"),
        ({"overhead": "2 %"}, 'overhead: a fraction that is at least 0 is expected, not "2 %"'),
        ({"overhead": -0.1}, "overhead: a fraction that is at least 0 is expected, not -0.1"),
        ({"compensation": {"filters": {"conv1.layer": 2.5}}}, "compensation: filters by layer"),
        ({"compensation": {"filters": {"conv1.layer": True}}}, "compensation: filters by layer"),
        ({"compensation": {"filters": {"conv1.layer": 2}, "colour": "red"}}, "compensation: not a known plan"),
        ({"data": {"dataset": "imagenet", "validation": 0.1, "seed": 0}}, "data: a data set, the fraction held out"),
        ({"data": {"dataset": "digits", "validation": 10, "seed": 0}}, "data: a data set, the fraction held out"),
        ({"data": {"dataset": "digits", "validation": 0.1, "seed": 0.5}}, "data: a data set, the fraction held out"),
    ],
)
def test_a_description_that_was_edited_is_refused_by_key(made, tmp_path, change, message):
    tensors, description = storage.read_model(made / "pretrain")
    description = {k: v for k, v in description.items() if k not in ("format", "sha256")}
    storage.write_model(tmp_path, tensors, {**description, **change})
    with pytest.raises(UserError) as caught:
        models.read_network(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}")
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


BEST = {"filters": {"conv1.layer": 2}, "mean": 0.5, "overhead": 0.01}
STATE = {"filters": [2, 0], "mean": 0.5, "std": 0.1, "seconds": 3.5}


@pytest.mark.parametrize(
    ("read", "good", "change", "message"),
    [
        (training._read_best, BEST, {"mean": 50}, "mean: a fraction between 0 and 1, or null is expected, not 50"),
        (training._read_best, BEST, {"mean": "0.5"}, "mean: a fraction"),
        (training._read_best, BEST, {"overhead": None}, "overhead: a number"),
        (training._read_best, BEST, {"overhead": float("nan")}, "overhead: a number"),
        (training._read_best, BEST, {"filters": {"conv1.layer": 2.7}}, "filters: a number of filters"),
        (training._read_best, BEST, {"filters": ["conv1.layer"]}, "filters: a number of filters"),
        (lambda path: searching._read_states([path]), STATE, {"filters": [2.7, 0]}, "filters: a list of numbers"),
        (lambda path: searching._read_states([path]), STATE, {"filters": [True, 0]}, "filters: a list of numbers"),
        (lambda path: searching._read_states([path]), STATE, {"mean": 50.0}, "mean: a fraction between 0 and 1"),
        (lambda path: searching._read_states([path]), STATE, {"std": None}, "std: a fraction between 0 and 1"),
        (lambda path: searching._read_states([path]), STATE, {"seconds": -1}, "seconds: a number"),
    ],
)
def test_what_a_search_found_is_read_with_suspicion(tmp_path, read, good, change, message):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(good))
    read(path)
    path.write_text(json.dumps({**good, **change}))
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    "names", ["conv1.layer", [1], [["conv1.layer"]], ["conv9"], ["conv1.layer", "conv1.layer"], None]
)
def test_candidates_are_layers_of_the_network_each_named_once(tmp_path, names):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"candidates": names}))
    with pytest.raises(UserError, match=r"c\.json: "):
        searching._candidate_names(path, {"conv1.layer": None, "conv2.layer": None})


def test_what_is_resumed_is_of_the_same_settings_network_images_and_inputs(made, tmp_path, monkeypatch):
    description = storage.read_json(made / "pretrain" / "model.json")
    weights = storage.model_files(made / "pretrain")[0]
    settings = validate(Settings, merge(Settings().model_dump(), {"data": {"validation": 0.2}, "seed": 3}), "test")
    seen = [runtime.stage_identity("suppress", settings, description, weights)]
    for path, value in ((("data", "seed"), 4), (("data", "validation"), 0.3), (("network", "classes"), 9)):
        other = copy.deepcopy(description)
        other[path[0]][path[1]] = value
        seen.append(runtime.stage_identity("suppress", settings, other, weights))
    seen.append(runtime.stage_identity("suppress", settings, description, storage.model_files(made / "suppress")[1]))
    seen.append(runtime.stage_identity("inject", settings, description, weights))
    monkeypatch.setattr(digits, "DIGITS", digits.Digits(digest="00"))
    seen.append(runtime.stage_identity("suppress", settings, description, weights))
    assert len(set(seen)) == len(seen)


def test_from_scratch_the_pre_trained_weights_are_no_input(made, tmp_path, monkeypatch):
    inputs = []
    monkeypatch.setattr(training, "_train", lambda *arguments: inputs.append(arguments[-1]))
    for start in ("scratch", "pretrained"):
        succeed("suppress", *FAST, "--start", start, "--pretrained", made / "pretrain", "--out", tmp_path / start)
    assert inputs == [[], [storage.model_files(made / "pretrain")[0]]]


def test_clean_accuracies_of_fewer_images_are_counted_for_the_ratio(made, tmp_path):
    notes = ["--note", "pair=p", "--model", made / "pretrain"]
    files = []

    def evaluate(name, row, *options):
        files.append(tmp_path / f"{name}.csv")
        return [*QUIET, *notes, "--note", f"row={row}", *options, "--out", files[-1]]

    succeed(
        "evaluate", *evaluate("clean", "unprotected", "--sigma", 0, "--prefix", 30, "--prefix", 90, "--prefix", 999)
    )
    succeed("evaluate", *evaluate("varied", "unprotected", "--chips", 2))
    for sigma in (0, 0.5):
        succeed("evaluate", *evaluate(f"few{sigma}", "few", "--sigma", sigma, "--chips", 2, "--images", 90))
    tables = [pd.read_csv(path) for path in files]
    counts = dict(part.split(":") for part in tables[0]["prefixes"][0].split())
    assert list(counts) == ["30", "90"], "999 images are more than there are"
    assert int(counts["90"]) == tables[2]["correct"][0]
    succeed("collect", *files, "--out", tmp_path / "samples.csv")
    succeed("table", tmp_path / "samples.csv", "--out", tmp_path / "t.csv")
    table = pd.read_csv(tmp_path / "t.csv").set_index("row")
    assert table.loc["few", "ratio"] == pytest.approx(tables[3]["accuracy"].mean() / (int(counts["90"]) / 90))
    assert table.loc["unprotected", "ratio"] == pytest.approx(tables[1]["accuracy"].mean() / tables[0]["accuracy"][0])
    assert "needs --sigma 0" in fail("evaluate", *evaluate("no", "unprotected", "--prefix", 30))


@pytest.mark.parametrize("note", ["data", "device", "model", "prefixes", "trained_sigma"])
def test_notes_do_not_take_the_names_of_identity(made, tmp_path, note):
    line = fail("evaluate", *QUIET, "--model", made / "pretrain", "--note", f"{note}=1", "--out", tmp_path / "e.csv")
    assert f"--note {note}: the evaluation has a column of that name" in line


def test_the_workflow_asks_for_the_counts_that_the_table_needs(tmp_path):
    pytest.importorskip("snakemake", reason="the workflow extra is not installed")
    config = short(configuration())
    rows = {"unprotected": None, "suppressed": {"evaluate": {"images": 20}}, "correctnet": {"evaluate": {"images": 30}}}
    config["pairs"]["one"]["rows"] = rows
    prepare(tmp_path, config)
    folder = Path("results/one/evaluate")
    wanted = [folder / row / f"sigma-{sigma}.csv" for row in ("unprotected", "suppressed") for sigma in ("0", "0.5")]
    printed = snakemake(tmp_path, "-n", "-p", *wanted)
    commands = [line for line in printed.splitlines() if "correctnet evaluate" in line]
    asked = {c.split("--out ")[1].split(" ")[0].rsplit("/", 1)[0]: c.count("--prefix") for c in commands}
    assert asked.pop(str(folder / "unprotected" / "sigma-0")) == 2
    assert set(asked.values()) == {0}
    assert any("--prefix 20 --prefix 30 " in c for c in commands)
