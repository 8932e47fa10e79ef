"""The command line as a user meets it: the chain by hand, and bad input, each a one-line error that loses nothing."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from by_hand import every_stage, run, succeed

from correctnet import machine
from correctnet.crossbar.convert import convert
from correctnet.datasets import DATASETS, loading
from correctnet.devices.lognormal import LogNormalVariation
from correctnet.evaluation.montecarlo import clean_accuracy, evaluate
from correctnet.files import storage
from correctnet.methods import candidates as sweep
from correctnet.methods import compensation, placement
from correctnet.noise import core, device, streams
from correctnet.pipeline import stages
from correctnet.pipeline.models import read_network
from correctnet.pipeline.specs import STAGES
from correctnet.pipeline.stages import evaluation as evaluation_stages
from correctnet.pipeline.stages import training as training_stages
from correctnet.training import loop as training

FAST = ["--quiet", "--threads", "1", "--batch", "64"]
# Stages that train with variation, and what each begins with.
WITH_VARIATION = [
    ("inject", "--pretrained", "pretrain"),
    ("distil", "--pretrained", "pretrain"),
    ("finetune", "--compensated", "compensate"),
]


def fail(*arguments):
    """Run a command that must fail as users' errors do, and give its only line."""
    result = run(*arguments)
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    lines = [line for line in result.output.splitlines() if line.startswith(("error:", "Error:"))]
    assert len(lines) == 1, result.output
    assert "Traceback" not in result.output
    return lines[0]


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Every stage by hand on digits, with tiny budgets."""
    folder = tmp_path_factory.mktemp("chain")
    every_stage(folder)
    return folder


def test_help_names_every_setting_with_its_default():
    for stage in STAGES:
        text = succeed(stage, "--help").output
        assert "--seed" in text
        assert "default:" in text
    text = " ".join(succeed("suppress", "--help").output.split())
    assert "--beta FLOAT weight of the regulariser in the loss [suppress.beta; default: 0.0001]" in text
    for name in (*STAGES, "table", "figure", "merge", "collect", "fetch", "check", "show"):
        assert name in succeed("--help").output


@pytest.mark.parametrize("batchnorm", ["updated", "frozen"])
@pytest.mark.parametrize(("stage", "given", "before"), WITH_VARIATION)
def test_training_with_variation_keeps_or_updates_batchnorm(
    chain, tmp_path, monkeypatch, stage, given, before, batchnorm
):
    passed = []
    monkeypatch.setattr(training_stages, "fit", lambda *_, hooks, **__: passed.append(hooks.update_batchnorm) or [])
    succeed(stage, *FAST, "--batchnorm", batchnorm, given, chain / before, "--out", tmp_path / "out")
    assert passed == [batchnorm == "updated"]


@pytest.mark.slow
def test_trials_of_compensators_are_compared_on_the_same_chips(chain, tmp_path):
    """docs/trials.py, whose tables stand in docs/reproduction.md."""
    script, out = Path(__file__).parents[1] / "docs" / "trials.py", tmp_path / "trials.csv"
    command = [sys.executable, script, chain / "suppress", "--dataset", "digits", "--filters", "conv1.layer=3"]
    command += ["--images", "64", "--validation", "50", "--chips", "3", "--out", out, "learning_rate=1e-9", "epochs=2"]
    subprocess.run(command, check=True, timeout=300)
    table = pd.read_csv(out)
    assert list(table["trial"]) == ["not compensated", "learning_rate=1e-9", "epochs=2"]
    assert table["mean"][1] == pytest.approx(table["mean"][0], abs=0.011), "it starts as the identity"
    assert table["overhead"][1] > 0


def test_all_candidates_get_the_largest_ratio(chain):
    # LeNet-5 has 6 and 16 filters.
    for name, filters in (("all", [6, 16]), ("half", [3, 8])):
        best = json.loads((chain / name / "best.json").read_text())
        assert list(best["filters"].values()) == filters
        assert best["limit"] is None


def test_the_chain_leaves_what_it_says(chain):
    for stage in ("pretrain", "suppress", "inject", "compensate", "finetune"):
        names = {path.name for path in (chain / stage).iterdir()}
        assert names == {"model.safetensors", "model.json", "log.csv"}
    assert not (chain / "work").exists(), "a finished training leaves no checkpoint behind"
    assert not (chain / ".resume").exists()
    description = storage.read_json(chain / "compensate" / "model.json")
    assert [h["stage"] for h in description["history"]] == ["pretrain", "suppress", "compensate"]
    assert [h["epochs"] for h in description["history"]] == [4, 1, 1]
    judged = description["history"][-1]["judged"]
    assert judged["kept"] == ("with" if judged["with"] >= judged["without"] else "without")
    assert (judged["chips"], judged["images"]) == (10, len(loading.load("digits").validation))
    log = pd.read_csv(chain / "search" / "log.csv")
    best = json.loads((chain / "search" / "best.json").read_text())
    assert best["mean"] == log["mean"].max()
    assert best["overhead"] <= 0.02
    model, _ = read_network(chain / "compensate")
    assert description["compensation"]["filters"] == {"conv1.layer": 6, "conv2.layer": 16}
    expected = sum(p.numel() for p in compensation.compensation_parameters(model)) / 61706
    assert description["overhead"] == pytest.approx(expected)


def test_training_the_compensators_leaves_the_network_as_it_was(chain):
    suppressed, _ = storage.read_model(chain / "suppress")
    compensated, _ = storage.read_model(chain / "compensate")
    kept = {k.replace(".original", ""): v for k, v in compensated.items()}
    assert all(torch.equal(kept[k], v) for k, v in suppressed.items())


def test_fine_tuning_trains_the_network_and_its_compensators(chain):
    before, described = storage.read_model(chain / "compensate")
    after, tuned = storage.read_model(chain / "finetune")
    assert [h["stage"] for h in tuned["history"]] == ["pretrain", "suppress", "compensate", "finetune"]
    assert (tuned["compensation"], tuned["overhead"]) == (described["compensation"], described["overhead"])
    assert all(not torch.equal(after[k], v) for k, v in before.items())
    assert {"conv1.layer.original.weight", "conv1.layer.generator.weight", "linear3.layer.weight"} <= set(after)
    read_network(chain / "finetune")


@pytest.mark.parametrize(("stage", "given", "before"), WITH_VARIATION)
def test_training_with_variation_programs_a_chip_a_batch(chain, tmp_path, monkeypatch, stage, given, before):
    chips = []
    monkeypatch.setattr(training_stages, "program", lambda analog, sample: chips.append(sample))
    succeed(stage, *FAST, "--batch", 500, "--epochs", 1, given, chain / before, "--out", tmp_path / "out")
    assert chips == list(streams.chips(f"train-{stage}", 3))


def test_the_sweep_is_about_validation_images(chain):
    summary = storage.read_json(chain / "sweep" / "candidates.json")
    model, _ = read_network(chain / "pretrain")
    validation = loading.load("digits").validation.take(50)
    with torch.no_grad():
        correct = model(validation.images).argmax(1) == validation.labels
    assert summary["original"] == correct.sum().item() / 50
    table = pd.read_csv(chain / "sweep" / "accuracy.csv")
    assert table.groupby("layer").size().to_dict() == dict.fromkeys(range(1, 6), 3)
    assert set(table["sample"]) == set(streams.chips("sweep", 3))


def test_chunks_of_an_evaluation_merge_to_the_whole(chain):
    notes = [a for note in ("pair=p", "row=r") for a in ("--note", note)]
    common = ["--quiet", "--threads", "1", "--model", chain / "compensate", *notes, "--images", 100]
    succeed("evaluate", *common, "--chips", 5, "--out", chain / "whole.csv")
    succeed("evaluate", *common, "--chips", 3, "--out", chain / "a.csv")
    succeed("evaluate", *common, "--chips", 2, "--start", 3, "--out", chain / "b.csv")
    succeed("merge", chain / "b.csv", chain / "a.csv", "--out", chain / "merged.csv")
    assert (chain / "merged.csv").read_text() == (chain / "whole.csv").read_text()
    fail("merge", chain / "a.csv", chain / "a.csv", "--out", chain / "twice.csv")
    table = pd.read_csv(chain / "whole.csv")
    assert set(table["epochs"]) == {"4 pretrain + 1 suppress + 1 compensate"}
    assert set(table["dataset"]) == {"digits"}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--sigma", "-0.1"], "error: command line: variation.sigma: Input should be greater than or equal to 0"),
        (["--beta", "-1"], "error: command line: suppress.beta: Input should be greater than or equal to 0"),
        (["--settings", "{"], "error: --settings: not JSON"),
        (["--settings", '{"supress": {}}'], "supress: unknown key (did you mean 'suppress'?)"),
        (["--config", "config.yaml"], "error: --config and --pair"),
        (["--dataset", "mnits"], "'mnits' is not one of"),
        (["--pretrained", "nowhere"], "nowhere/model.json: no such file"),
        (["--sizes", "16"], "error: suppress.sizes: lenet5 takes images of 32 x 32 pixels only"),
    ],
)
def test_bad_options(chain, tmp_path, arguments, line):
    given = ["--pretrained", chain / "pretrain", "--out", tmp_path / "out", "--quiet", *arguments]
    assert line in fail("suppress", *given)
    assert not (tmp_path / "out").exists()


def test_unknown_network_and_pair(tmp_path):
    assert "'resnet' is not one of" in fail("pretrain", "--network", "resnet", "--out", tmp_path)
    options = ["--config", "config.yaml", "--out", tmp_path]
    assert "no pair 'lenet'" in fail("pretrain", *options, "--pair", "lenet")
    assert "no row 'best'" in fail("pretrain", *options, "--pair", "lenet5-digits", "--row", "best")


@pytest.mark.parametrize("limit", ["0", "-0.01", "1.5"])
def test_a_limit_of_zero(chain, tmp_path, limit):
    given = ["--base", chain / "suppress", "--candidates", chain / "candidates.json", "--out", tmp_path]
    assert "--limit is a fraction above 0" in fail("search", *given, "--limit", limit)


def test_candidates_of_another_network(chain, tmp_path):
    (tmp_path / "c.json").write_text('{"candidates": ["conv7"]}')
    given = ["--base", chain / "suppress", "--candidates", tmp_path / "c.json", "--out", tmp_path, "--quiet"]
    line = fail("search", *given)
    assert "c.json: candidates: the network has no layer 'conv7' (layers: conv1.layer, conv2.layer, " in line


def test_files_of_another_stage(chain, tmp_path):
    (tmp_path / "list.json").write_text('["conv1.layer"]')
    given = ["--base", chain / "suppress", "--out", tmp_path / "out", "--quiet"]
    line = fail("search", *given, "--candidates", tmp_path / "list.json")
    assert "list.json: names no candidate layers (candidates.json of `sweep` is expected)" in line
    for path in (tmp_path / "list.json", chain / "sweep" / "candidates.json"):
        assert f"{path.name}: not what a search found (its best.json)" in fail("compensate", *given, "--found", path)
    given += ["--candidates", chain / "sweep" / "candidates.json", "--strategy", "all", "--state", 0]
    assert "strategy all trains no states" in fail("search", *given)


@pytest.mark.parametrize("name", ["sigma", "split", "sample", "chips", "seed"])
def test_notes_of_a_name_that_is_taken(chain, tmp_path, name, monkeypatch):
    monkeypatch.setattr(evaluation_stages, "simulate", lambda *a, **k: pytest.fail("chips were evaluated"))
    given = ["--model", chain / "pretrain", "--quiet", "--out", tmp_path / "e.csv", "--note", f"{name}=0.5"]
    if name == "chips":  # no column of an evaluation
        monkeypatch.undo()
        succeed("evaluate", *given, "--chips", 1, "--images", 10)
        assert list(pd.read_csv(tmp_path / "e.csv")["chips"]) == [0.5]
    else:
        assert f"--note {name}: the evaluation has a column of that name" in fail("evaluate", *given)


def test_missing_and_truncated_data(tmp_path, monkeypatch):
    import pooch

    def no_network(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(pooch, "retrieve", no_network)
    options = ["--dataset", "mnist", "--data-dir", tmp_path, "--out", tmp_path / "out", "--quiet"]
    line = fail("pretrain", *options)
    assert "train-images-idx3-ubyte" in line
    assert str(tmp_path) in line
    assert "CORRECTNET_DATA" in line
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for file in (*DATASETS["mnist"].source().train, *DATASETS["mnist"].source().test):
        (folder / file.name).write_bytes(b"\0" * 1000)
    assert "train-images-idx3-ubyte: 1000 bytes, 47040016 expected" in fail("pretrain", *options)
    assert not (tmp_path / "out").exists()


def test_a_corrupt_model(chain, tmp_path):
    for name in ("model.safetensors", "model.json"):
        (tmp_path / name).write_bytes((chain / "pretrain" / name).read_bytes())
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    line = fail("evaluate", "--model", tmp_path, "--out", tmp_path / "e.csv", "--quiet")
    assert "model.safetensors: damaged" in line
    assert not (tmp_path / "e.csv").exists()


def test_an_unwritable_results_folder(chain):
    line = fail("evaluate", "--model", chain / "pretrain", "--chips", 1, "--out", "/proc/nothing/e.csv", "--quiet")
    assert "/proc/nothing/e.csv: cannot be written" in line


def test_a_disk_that_fills_in_mid_training_loses_nothing(tmp_path, monkeypatch):
    options = [*FAST, "--epochs", 3, "--out", tmp_path / "out", "--work", tmp_path / "work"]
    fsync, written = os.fsync, []

    def full(handle):
        written.append(handle)
        if len(written) == 3:  # the checkpoint and the log of the first epoch, then no more
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    line = fail("pretrain", *options)
    assert "pretrain.safetensors: cannot be written: No space left on device" in line
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["pretrain.safetensors"]
    succeed("pretrain", *options)
    assert list(pd.read_csv(tmp_path / "out" / "log.csv")["process"]) == [1, 2, 2]
    succeed("pretrain", *FAST, "--epochs", 3, "--out", tmp_path / "whole")
    resumed, whole = (storage.read_model(tmp_path / name)[0] for name in ("out", "whole"))
    assert all(torch.equal(resumed[k], v) for k, v in whole.items())


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_killed_stage_goes_on(tmp_path, sent):
    command = [sys.executable, "-m", "correctnet.cli", "pretrain", *FAST, "--epochs", "12"]
    command += ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    # A shell starts background jobs with SIGINT ignored, and children inherit that: undo it, as a terminal would.
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **quiet)
    log = tmp_path / "out" / "log.csv"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not log.exists() or len(pd.read_csv(log)) < 2):
        time.sleep(0.02)
    process.send_signal(sent)
    assert process.wait(30) != 0
    done = len(pd.read_csv(log))
    assert 2 <= done < 12
    assert not (tmp_path / "out" / "model.safetensors").exists()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    rows = pd.read_csv(log)
    assert list(rows["epoch"]) == list(range(1, 13))
    counts = rows["process"].value_counts().to_dict()
    assert counts[1] in (done, done + 1), "an epoch may have ended between the look and the signal"
    assert counts[1] + counts[2] == 12
    succeed("pretrain", *FAST, "--epochs", 12, "--out", tmp_path / "whole")
    resumed, whole = (storage.read_model(tmp_path / name)[0] for name in ("out", "whole"))
    assert all(torch.equal(resumed[k], v) for k, v in whole.items())


@pytest.mark.parametrize("stage", ["evaluate", "sweep"])
def test_only_what_kept_its_work_promises_to_go_on(chain, tmp_path, monkeypatch, stage):
    def stopped(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    for module in (evaluation_stages, sweep):
        monkeypatch.setattr(module, "simulate", stopped)
    models = {"evaluate": ["--model", chain / "pretrain"]}
    models["sweep"] = ["--pretrained", chain / "pretrain", "--base", chain / "suppress"]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        result = run(stage, "--quiet", "--images", 20, *models[stage], "--out", tmp_path / "out")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert result.exit_code == 128 + signal.SIGTERM
    goes_on = "; the same command goes on from what is done" if stage == "evaluate" else ""
    assert result.output.splitlines()[-1] == f"stopped by SIGTERM{goes_on}"


@pytest.mark.parametrize(
    ("quota", "wanted"),
    [("max 100000", [3, 2, 1]), ("200000 100000", [2, 2, 1]), ("50000 100000", [1, 1, 1]), (None, [3, 2, 1])],
)
def test_threads_stay_within_the_process_s_cpus(monkeypatch, quota, wanted):
    """Those of its affinity, here three, and of its control group, if there is one."""
    asked, read_text = [], Path.read_text

    def control_group(path, *args, **kwargs):
        if str(path) != "/sys/fs/cgroup/cpu.max":
            return read_text(path, *args, **kwargs)
        if quota is None:
            raise FileNotFoundError(path)
        return quota

    monkeypatch.setattr(Path, "read_text", control_group)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    for threads in (64, 2, 0):
        machine.set_threads(threads)
    assert asked == wanted


def test_cuda_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda: torch sees no CUDA device" in fail("pretrain", "--device", "cuda", "--out", tmp_path)


def test_the_way_of_a_gpu_reaches_every_stage_that_simulates_chips(chain, tmp_path, monkeypatch):
    seen = []
    for module in (evaluation_stages, placement, sweep):

        def simulate(model, images, chips, simulation, simulate=module.simulate, **options):
            seen.append(simulation.gpu_method)
            return simulate(model, images, chips, replace(simulation, gpu_method="auto"), **options)

        monkeypatch.setattr(module, "simulate", simulate)
    few = ["--quiet", "--threads", "1", "--images", 20, "--gpu-method", "library"]
    model = ("--model", chain / "pretrain")
    succeed("evaluate", *few, *model, "--chips", 1, "--out", tmp_path / "e.csv")
    assert seen == ["library"]
    succeed("sensitivity", *few, *model, "--chips", 1, "--out", tmp_path / "s.csv")
    base = ("--base", chain / "suppress")
    succeed("sweep", *few, "--pretrained", chain / "pretrain", *base, "--chips", 1, "--out", tmp_path / "sweep")
    assert seen == ["library"] * 11, "five layers each"
    small = ["--train-images", 50, "--evaluations", 2, "--candidates", chain / "candidates.json", "--chips", 2]
    succeed("search", *few, *small, *base, "--out", tmp_path / "search")
    assert set(seen) == {"library"}
    assert len(seen) > 11


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("built", [True, False])
def test_a_gpu_without_kernels_is_said_once(stage, built, tmp_path, monkeypatch):
    class Kernels:
        device_type, architectures = "cuda", "90"
        problem = staticmethod(lambda index: "the driver is too old; update it")

    ran = []
    function = "evaluate_chips" if stage == "evaluate" else stage
    monkeypatch.setattr(stages, function, lambda *args, **kwargs: ran.append(args) or sys.exit(0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(device, "_problem", Kernels.problem)
    monkeypatch.setattr(device, "kernels", lambda: Kernels if built else None)
    inputs = {"sweep": ["--pretrained", "p", "--base", "b"], "search": ["--base", "b", "--candidates", "c"]}
    inputs |= {name: ["--pretrained", "p"] for name in ("suppress", "inject", "distil", "moments")}
    inputs |= {name: ["--model", "m"] for name in ("sensitivity", "evaluate")}
    inputs |= {"compensate": ["--base", "b", "--found", "f"], "finetune": ["--compensated", "c"]}
    inputs |= {"sidepath": ["--base", "b"]}
    lines = succeed(stage, "--device", "cuda", "--quiet", *inputs.get(stage, []), "--out", tmp_path / "o").output
    assert len(ran) == 1
    said = [line for line in lines.splitlines() if "torch computes everything" in line]
    assert len(said) == 1
    assert ("the driver is too old; update it" if built else "the CUDA kernels were not built") in said[0]
    assert lines.startswith("provenance: "), "the log's first line stays what the report reads"


def test_the_engine_does_not_say_again_that_there_are_no_kernels(tmp_path):
    reason = device.status().reason
    code = f"""
import warnings
from correctnet.cli import options
from correctnet.evaluation.montecarlo import EngineWarning
warnings.showwarning = lambda message, *_, **__: print(message)
options.warn_without_kernels()
warnings.warn("everything runs through torch: the model is on cuda:0, and " + {reason!r}, EngineWarning)
warnings.warn("not all of the network runs in the C++ core", EngineWarning)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "not all of the network runs in the C++ core\n"
    assert done.stderr.count(reason) == 1


def test_no_candidates_gives_the_suppressed_network(chain, tmp_path):
    (tmp_path / "c.json").write_text('{"candidates": []}')
    sup = ("--base", chain / "suppress")
    options = ["--quiet", "--threads", "1", "--chips", 2, "--images", 50]
    succeed("search", *options, *sup, "--candidates", tmp_path / "c.json", "--out", tmp_path / "search")
    found = ("--found", tmp_path / "search" / "best.json")
    succeed("compensate", *FAST, *sup, *found, "--out", tmp_path / "compensate")
    before, after = storage.read_model(chain / "suppress")[0], storage.read_model(tmp_path / "compensate")[0]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_info_says_what_computes(chain):
    text = succeed("info").output
    assert f"torch {torch.__version__}" in text
    assert "C++ core: " in text
    if core.status().built:
        assert f"in use: {core.status().isa}" in text
        text = succeed("info", chain / "compensate").output
        assert "lenet5, 5 of 5 analog layers fused" in text
        assert "conv1.layer.original" in text


def test_choices_are_evaluated_on_validation_images(chain):
    options = ["--quiet", "--threads", "1", "--model", chain / "pretrain", "--sigma", 0, "--chips", 1]
    succeed("evaluate", *options, "--split", "validation", "--out", chain / "v.csv")
    table = pd.read_csv(chain / "v.csv")
    assert set(table["split"]) == {"validation"}
    assert table["images"][0] == len(loading.load("digits").validation)
    options = ["--quiet", "--threads", "1", "--model", chain / "pretrain", "--images", 20, "--split", "validation"]
    succeed("evaluate", *options, "--chips", 2, "--start", 3, "--out", chain / "v.csv")
    assert list(pd.read_csv(chain / "v.csv")["sample"]) == list(streams.chips("validation", 2, 3))
    line = fail("evaluate", *options, "--chips", 2, "--start", 2**28 - 1, "--out", chain / "v.csv")
    assert "for validation: there are 268435456 for each purpose" in line


def test_without_variation_one_network_is_evaluated_once(chain):
    options = [
        "--quiet",
        "--threads",
        "1",
        "--model",
        chain / "pretrain",
        "--images",
        20,
        "--out",
        chain / "nominal.csv",
    ]
    succeed("evaluate", *options, "--sigma", 0, "--chips", 3)
    assert list(pd.read_csv(chain / "nominal.csv")["sample"]) == [0]


def test_what_may_be_empty_can_be_said_to_be(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(stages, "pretrain", lambda settings, *_: seen.append(settings))
    files = ["--config", "config.yaml", "--config", "workflow/experiments/ablation-vgg.yaml"]
    of_row = [*files, "--pair", "vgg16-cifar10-ablation", "--row", "v-none", "--out", tmp_path]
    succeed("pretrain", *of_row)
    succeed("pretrain", *of_row, "--clip", "none", "--widths", "none", "--sizes", "none")
    assert [len(s.network.widths) for s in seen] == [14, 0]
    assert [s.pretrain.clip for s in seen] == [1.0, None]
    monkeypatch.undo()
    assert "4 are expected" in fail("pretrain", "--widths", "8,8", "--out", tmp_path)


def test_suppression_from_scratch_may_begin_on_smaller_images(tmp_path, monkeypatch):
    sides, resize = [], training.resize
    monkeypatch.setattr(training, "resize", lambda images, side: sides.append(side) or resize(images, side))
    widths = ["--network", "vgg16", "--widths", ",".join(["4"] * 14)]
    succeed("pretrain", *FAST, "--dataset", "digits", *widths, "--epochs", 0, "--out", tmp_path / "pretrain")
    scratch = ["--start", "scratch", "--epochs", 2, "--sizes", 16, "--pretrained", tmp_path / "pretrain"]
    succeed("suppress", *FAST, "--dataset", "digits", *scratch, "--out", tmp_path / "suppress")
    assert set(sides) == {16}
    assert len(sides) == 21  # of 1,294 images in batches of 64, in the first of two epochs


def test_check_and_show(chain):
    assert "no mistakes" in succeed("check", "config.yaml").output
    assert "config.yaml: 5 pairs, 6 rows, no mistakes" in succeed("check").output
    seeds = succeed("check", "config.yaml", "workflow/experiments/seeds.yaml").output
    assert "config.yaml + workflow/experiments/seeds.yaml: 9 pairs, 9 rows, no mistakes" in seeds
    shown = json.loads(succeed("show", chain / "compensate").output)
    assert shown["network"]["name"] == "lenet5"


def test_checkpoints_are_for_their_settings(tmp_path):
    # A killed run whose settings are then changed starts anew: no weights of the old settings leak into the new.
    options = [*FAST, "--out", tmp_path / "out", "--work", tmp_path / "work"]
    save, saved = training.Checkpoint.save, []

    class Killed(Exception):
        pass

    def once(self, *arguments):
        save(self, *arguments)
        saved.append(1)
        raise Killed

    training.Checkpoint.save = once
    try:
        assert isinstance(run("pretrain", *options, "--epochs", 2).exception, Killed)
    finally:
        training.Checkpoint.save = save
    succeed("pretrain", *options, "--epochs", 2, "--learning-rate", 0.002)
    assert list(pd.read_csv(tmp_path / "out" / "log.csv")["process"]) == [1, 1]


def test_compensators_that_lose_accuracy_are_not_kept(chain, tmp_path):
    options = [*FAST, "--epochs", 1, "--base", chain / "suppress", "--found", chain / "all" / "best.json"]
    said = succeed("compensate", *options, "--learning-rate", 10, "--out", tmp_path / "out").output
    assert "warning: the trained compensators are not kept: over 10 validation chips" in said
    entry = storage.read_json(tmp_path / "out" / "model.json")["history"][-1]
    assert entry["judged"]["with"] < entry["judged"]["without"]
    assert entry["judged"]["kept"] == "without"
    before, after = (read_network(path)[0] for path in (chain / "suppress", tmp_path / "out"))
    validation = loading.load("digits").validation
    with torch.no_grad():
        torch.testing.assert_close(after(validation.images), before(validation.images))
    # The first number is that of the network without compensators, on chips for this comparison alone.
    chips = streams.chips("validate-compensate", 10)
    bare = evaluate(convert(before, LogNormalVariation(0.5)), validation, 10, start=chips.start, progress=False)
    assert entry["judged"]["without"] == pytest.approx(bare.mean, abs=1e-3)
    assert entry["validation"] == clean_accuracy(before, validation)


def test_suppression_from_scratch_goes_on_whatever_weights_were_pretrained(chain, tmp_path, monkeypatch):
    """Its checkpoint is for the architecture; one that starts from the weights is for those."""
    names = []
    other = [*FAST, "--dataset", "digits", "--epochs", 0]  # other weights, trained on the same split
    succeed("pretrain", *other, "--out", tmp_path / "other")
    succeed("pretrain", *other, "--widths", "5,16,120,84", "--out", tmp_path / "narrow")
    monkeypatch.setattr(training_stages, "Checkpoint", lambda path, identity: names.append(identity) or sys.exit(0))
    for start in ("scratch", "pretrained"):
        for network in (chain / "pretrain", tmp_path / "other", tmp_path / "narrow"):
            options = [*FAST, "--start", start, "--pretrained", network, "--work", tmp_path / "work"]
            run("suppress", *options, "--out", tmp_path / "out")
    assert names[0] == names[1]
    assert len(set(names)) == 5


@pytest.mark.parametrize("stage", ["suppress", "inject", "sweep", "search", "compensate"])
def test_stages_before_compensation_refuse_a_compensated_network(chain, tmp_path, stage):
    model = chain / "compensate"
    begin = {
        "sweep": ["--pretrained", chain / "pretrain", "--base", model],
        "search": ["--base", model, "--candidates", chain / "candidates.json"],
        "compensate": ["--base", model, "--found", chain / "all" / "best.json"],
    }.get(stage, ["--pretrained", model])
    line = fail(stage, "--quiet", *begin, "--out", tmp_path / "out")
    assert f"{stage}: {model} is compensated; give the network that it was made from" in line
    assert not (tmp_path / "out").exists()


def test_fine_tuning_begins_with_a_compensated_network(chain, tmp_path):
    line = fail("finetune", *FAST, "--compensated", chain / "suppress", "--out", tmp_path / "out")
    assert f"finetune: {chain / 'suppress'} is no model of `compensate`" in line


def test_help_imports_neither_torch_nor_pandas():
    code = "import sys; from correctnet.cli import main; main(['evaluate', '--help'], standalone_mode=False); "
    code += "print([name for name in ('torch', 'pandas', 'matplotlib') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--chips" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_progress_of_running_jobs(tmp_path):
    assert "no job has reported progress" in succeed("progress", tmp_path).output
    log = tmp_path / ".logs" / "one" / "pretrain.log"
    log.parent.mkdir(parents=True)
    log.write_text("progress: pretrain: 38 %, epoch 15; about 12 min left\n")
    assert succeed("progress", tmp_path).output == "one/pretrain: 38 %, epoch 15; about 12 min left\n"
