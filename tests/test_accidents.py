"""Real accidents: kills, lost and truncated files, a second run, a full disk, a folder that moves."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
import yaml
from workflows import ROOT, configuration, configure, environment, prepare, results, short, snakemake, start, stats

from correctnet import LogNormalVariation, UserError, convert, evaluate

pytest.importorskip("snakemake", reason="the workflow extra is not installed")

EPOCHS = 25
EXIT = {signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGINT: 128 + signal.SIGINT, signal.SIGKILL: -signal.SIGKILL}


def stage(*arguments: object, **options: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "correctnet.cli", *map(str, arguments), "--threads", "1", "--quiet"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment()} | options
    return subprocess.Popen(command, **options)


def pretrain(out: Path, **options: object) -> subprocess.Popen:
    return stage("pretrain", "--dataset", "digits", "--epochs", EPOCHS, "--out", out, **options)


def finished(process: subprocess.Popen) -> str:
    """The output of a process that must succeed."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def wait_for(condition, process: subprocess.Popen | None = None, seconds: float = 120) -> None:
    """Wait until `condition()`; `process` must not end before."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        assert process is None or process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def rows(path: Path) -> int:
    return len(pd.read_csv(path)) if path.exists() else 0


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def leftovers(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.name.endswith(".tmp") or p.name == "lock"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The folder of an uninterrupted training."""
    out = tmp_path_factory.mktemp("undisturbed") / "p"
    finished(pretrain(out))
    return out


def check_continued(out: Path, before: int, undisturbed: Path) -> None:
    """Check that a training killed after at least `before` epochs resumed, with the result of an uninterrupted one."""
    log = pd.read_csv(out / "log.csv")
    assert list(log["epoch"]) == list(range(1, EPOCHS + 1)), "every epoch once"
    first = (log["process"] == 1).sum()
    assert before <= first <= before + 1, "what was done was not done again"  # one may have ended with the signal
    assert set(log["process"][first:]) == {2}
    assert digest(out / "model.safetensors") == digest(undisturbed / "model.safetensors")
    assert (out / "model.json").read_text() == (undisturbed / "model.json").read_text()
    assert not leftovers(out.parent)


@pytest.mark.e2e
@pytest.mark.parametrize("number", EXIT)
def test_a_training_that_is_killed_goes_on(tmp_path, undisturbed, number):
    out = tmp_path / "p"
    process = pretrain(out)
    wait_for(lambda: rows(out / "log.csv") >= 4, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT[number]
    if number != signal.SIGKILL:
        line = f"stopped by {number.name}; the same command goes on from what is done"
        assert output.splitlines()[-1] == line
        assert "Traceback" not in output
        assert not leftovers(tmp_path), "temporary files are removed"
    before = rows(out / "log.csv")
    assert 4 <= before < EPOCHS
    finished(pretrain(out))
    check_continued(out, before, undisturbed)


@pytest.fixture(scope="module")
def searched(folder, tmp_path_factory):
    """The arguments of a search, and the folder of an uninterrupted one."""
    one = folder / "results" / "one"
    arguments = ["search", "--config", folder / "config.yaml", "--pair", "one", "--evaluations", 5, "--episodes", 30]
    arguments += ["--limit", 1.0, "--train-images", 1200, "--train-epochs", 2]
    arguments += ["--base", one / "suppress", "--candidates", one / "sweep" / "candidates.json"]
    out = tmp_path_factory.mktemp("search") / "s"
    finished(stage(*arguments, "--out", out))
    return arguments, out


@pytest.mark.e2e
@pytest.mark.parametrize("number", EXIT)
def test_a_search_that_is_killed_goes_on(tmp_path, searched, number):
    arguments, undisturbed = searched
    out = tmp_path / "s"

    def logged() -> Path:
        return next((tmp_path / ".resume" / "s").glob("search-*.csv"), tmp_path / "none")

    process = stage(*arguments, "--out", out)
    wait_for(lambda: rows(logged()) >= 2, process)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == EXIT[number]
    done = pd.read_csv(logged()).dropna(subset="mean").set_index("filters")["seconds"]
    total = len(pd.read_csv(undisturbed / "log.csv").dropna(subset="mean"))
    assert 2 <= len(done) < total

    finished(stage(*arguments, "--out", out))
    log = pd.read_csv(out / "log.csv")
    pd.testing.assert_frame_equal(
        log.drop(columns="seconds"), pd.read_csv(undisturbed / "log.csv").drop(columns="seconds")
    )
    seconds = log.set_index("filters")["seconds"]
    assert (seconds[done.index] == done).all(), "states that were evaluated are not evaluated again"
    assert (out / "best.json").read_text() == (undisturbed / "best.json").read_text()
    assert not leftovers(tmp_path)


@pytest.mark.e2e
def test_a_stage_is_never_done_by_two_processes(tmp_path, undisturbed):
    out = tmp_path / "p"
    first = pretrain(out)
    wait_for(lambda: rows(out / "log.csv") >= 2, first)
    second = pretrain(out)
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 2
    assert re.search(
        rf"error: .*p: process {first.pid} on \S+ is already running this stage; stop it or wait for it", output
    )
    finished(first)
    assert digest(out / "model.safetensors") == digest(undisturbed / "model.safetensors")


@pytest.mark.e2e
def test_a_checkpoint_that_is_cut_short_is_named_and_made_again(tmp_path, undisturbed):
    out = tmp_path / "p"
    process = pretrain(out)
    wait_for(lambda: rows(out / "log.csv") >= 3, process)
    process.kill()
    process.communicate()
    checkpoint = tmp_path / ".resume" / "p" / "pretrain.safetensors"
    os.truncate(checkpoint, checkpoint.stat().st_size // 2)
    output = finished(pretrain(out))
    assert f"warning: {checkpoint}: not a usable checkpoint; training starts from its beginning" in output
    assert set(pd.read_csv(out / "log.csv")["process"]) == {1}
    assert digest(out / "model.safetensors") == digest(undisturbed / "model.safetensors")


def cut(path: Path) -> None:
    """Cut a CSV short in the middle of its last row's last number."""
    text = path.read_text()
    path.write_text(text.rstrip("\n")[:-2])


@pytest.mark.e2e
def test_a_search_log_that_is_cut_short_is_named_and_made_again(tmp_path, searched):
    arguments, undisturbed = searched
    out = tmp_path / "s"
    process = stage(*arguments, "--out", out)
    folder = tmp_path / ".resume" / "s"
    wait_for(lambda: any(rows(p) >= 2 for p in folder.glob("search-*.csv")), process)
    process.kill()
    process.communicate()
    (log,) = folder.glob("search-*.csv")
    cut(log)
    output = finished(stage(*arguments, "--out", out))
    assert f"warning: {log}: damaged checkpoint, its work is repeated (cut short)" in output
    assert (out / "best.json").read_text() == (undisturbed / "best.json").read_text()


def test_chips_that_are_cut_short_are_named_and_made_again(tmp_path, tiny, blobs):
    analog = convert(tiny, LogNormalVariation(0.5))
    save = tmp_path / "chips.csv"
    expected = evaluate(analog, blobs, 3, save=save, progress=False).table
    edited = save.read_text().replace(",300,", ",many,")
    for damage in (cut, lambda path: path.write_text(""), lambda path: path.write_text(edited)):
        damage(save)
        with pytest.warns(UserWarning, match="chips.csv: damaged checkpoint, its work is repeated"):
            again = evaluate(analog, blobs, 3, save=save, progress=False)
        pd.testing.assert_frame_equal(again.table, expected)


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "notes\n", "notes", "\x89PNG"])
def test_a_file_that_holds_something_else_is_kept(tmp_path, tiny, blobs, text):
    save = tmp_path / "notes"
    save.write_text(text)
    with pytest.raises(UserError, match="holds something else than chips"):
        evaluate(convert(tiny, LogNormalVariation(0.5)), blobs, 3, save=save, progress=False)
    assert save.read_text() == text


# --- the workflow


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    """A copy of the finished run, files with their times."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def long_run(tmp_path: Path) -> Path:
    """A workflow whose pre-training takes a while."""
    config = short(configuration())
    config["pairs"]["one"]["pretrain"]["epochs"] = 40
    return prepare(tmp_path / "run", config)


def killed_in_mid_run(tmp_path: Path) -> tuple[Path, Path]:
    """A workflow whose head process was killed in mid-training, and the training's log."""
    run = long_run(tmp_path)
    log = run / "results" / "one" / "pretrain" / "log.csv"
    head = start(run, "--cores", 2, stdout=subprocess.DEVNULL)
    wait_for(lambda: rows(log) >= 3, head)
    head.kill()
    head.wait()
    # The stage notices, and ends by itself; its log says so.
    said = run / "results" / ".logs" / "one" / "pretrain.log"
    wait_for(lambda: "stopped by SIGTERM" in said.read_text(), seconds=20)
    return run, log


def documented(mark: str) -> list[str]:
    """The commands of the block after <!-- mark --> in docs/cluster.md, without comments."""
    text = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    block = re.search(rf"<!-- {mark} -->\n```sh\n(.*?)```", text, re.DOTALL)
    return [line.split("#")[0].strip() for line in block[1].splitlines() if line.split("#")[0].strip()]


@pytest.mark.e2e
def test_the_head_process_is_killed_and_the_documented_recovery_works(tmp_path):
    run, log = killed_in_mid_run(tmp_path)
    before = rows(log)
    assert before < 40
    commands = documented("recovery")
    assert len(commands) <= 5
    for command in commands:
        done = subprocess.run(command, shell=True, cwd=run, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (run / "results" / "summary" / "paper" / "table1.csv").exists()
    epochs = pd.read_csv(log)
    assert list(epochs["epoch"]) == list(range(1, 41))
    assert list(epochs["process"][:before]) == [1] * before
    assert epochs["process"].iloc[-1] == 2


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in files}


@pytest.mark.e2e
def test_a_second_run_in_the_same_folder_refuses_and_touches_nothing(tmp_path):
    run = long_run(tmp_path)
    first = start(run, "--cores", 2, "results/one/pretrain/model.safetensors")
    wait_for(lambda: rows(run / "results" / "one" / "pretrain" / "log.csv") >= 2, first)
    os.killpg(first.pid, signal.SIGSTOP)  # whatever changes now was changed by the second
    try:
        before = snapshot(run / "results")
        for options, message in (([], "IncompleteFilesException"), (["--rerun-incomplete"], "LockException")):
            second = start(run, "--cores", 2, *options, "quick")
            output, _ = second.communicate(timeout=120)
            assert second.returncode != 0
            assert message in output
            assert snapshot(run / "results") == before
    finally:
        os.killpg(first.pid, signal.SIGCONT)
    finished(first)
    assert set(pd.read_csv(run / "results" / "one" / "pretrain" / "log.csv")["process"]) == {1}


@pytest.mark.e2e
def test_a_lost_chunk_alone_is_made_again(copied):
    place = Path("results") / "one" / "evaluate" / "correctnet"
    gathered = place / "sigma-0.5.csv"
    before = (copied / gathered).read_bytes()
    (copied / gathered).unlink()
    snakemake(copied, "--notemp", gathered)
    chunks = {p.name: p.stat().st_mtime_ns for p in (copied / place / "sigma-0.5").iterdir()}
    assert set(chunks) == {"chips-0-2.csv", "chips-2-3.csv"}
    (copied / place / "sigma-0.5" / "chips-2-3.csv").unlink()
    (copied / gathered).unlink()
    assert stats(snakemake(copied, "-n", "--notemp", gathered)) == {"evaluate": 1, "gather": 1}
    snakemake(copied, "--notemp", gathered)
    assert (copied / place / "sigma-0.5" / "chips-0-2.csv").stat().st_mtime_ns == chunks["chips-0-2.csv"]
    assert (copied / gathered).read_bytes() == before


@pytest.mark.e2e
def test_a_model_that_is_cut_short_is_refused_and_made_again(copied, folder):
    model = copied / "results" / "one" / "pretrain" / "model.safetensors"
    os.truncate(model, 1000)
    target = "results/one/suppress/model.safetensors"
    assert "Error in rule suppress" in snakemake(copied, target, check=False)
    log = (copied / "results" / ".logs" / "one" / "suppress.log").read_text()
    error = "error: results/one/pretrain/model.safetensors: damaged, or not the file that model.json describes"
    assert log.splitlines()[-1] == f"{error}; delete both to remake them"
    for path in model.parent.glob("model.*"):
        path.unlink()
    assert stats(snakemake(copied, "-n", target)) == {"pretrain": 1, "suppress": 1}
    snakemake(copied, target)
    made, before = results(copied), results(folder)
    for stage_name in ("pretrain", "suppress"):
        name = f"one/{stage_name}/model.safetensors"
        assert made[name] == before[name]


@pytest.mark.e2e
def test_a_folder_that_is_moved_goes_on(copied, tmp_path):
    moved = tmp_path / "elsewhere" / "moved"
    moved.parent.mkdir()
    shutil.move(copied, moved)
    assert stats(snakemake(moved, "-n", "quick")) == {}
    config = configuration()
    config["pairs"]["one"]["evaluate"]["sigmas"] = [0.2, 0.3]
    configure(moved, config)
    planned = stats(snakemake(moved, "-n", "quick"))
    assert (planned["evaluate"], planned["gather"]) == (2, 2), "the new sigma of two rows, and nothing else"
    assert "pretrain" not in planned


@pytest.mark.e2e
def test_results_that_are_moved_in_mid_run_go_on(tmp_path):
    run, log = killed_in_mid_run(tmp_path)
    elsewhere = tmp_path / "large disk" / "results"
    elsewhere.parent.mkdir()
    shutil.move(run / "results", elsewhere)

    # Under another name nothing would know what they were made with: refused, and the line says what to do.
    config = yaml.safe_load((run / "config.yaml").read_text())
    configure(run, {**config, "results": str(elsewhere)})
    before = snapshot(elsewhere)
    output = snakemake(run, "quick", check=False)
    line = f"results: {elsewhere} holds what was made as 'results', and Snakemake's records go by that name"
    assert line in output
    assert f"ln -s {elsewhere} results" in output
    assert snapshot(elsewhere) == before

    configure(run, config)
    (run / "results").symlink_to(elsewhere)
    snakemake(run, "--unlock")
    snakemake(run, "--rerun-incomplete", "quick")
    epochs = pd.read_csv(log)
    assert list(epochs["epoch"]) == list(range(1, 41))
    assert list(epochs["process"][:3]) == [1] * 3
    assert epochs["process"].iloc[-1] == 2
    assert stats(snakemake(run, "-n", "quick")) == {}
    config["pairs"]["one"]["pretrain"]["batch"] = 99
    configure(run, config)
    assert stats(snakemake(run, "-n", "quick"))["pretrain"] == 1, "what changes later is noticed"


@contextmanager
def mounted(place: Path, *options: str):
    """Something mounted at `place`; the test is skipped where that is not allowed."""
    if subprocess.run(["mount", *options, str(place)], capture_output=True).returncode:
        pytest.skip("no right to mount")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    with mounted(place, "-t", "tmpfs", "-o", "size=16m", "tmpfs"):
        yield place


def fill(disk: Path) -> Path:
    """Leave no byte free."""
    filler = disk / "filler"
    with open(filler, "ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                pass
    return filler


@pytest.mark.e2e
def test_a_disk_that_fills_loses_nothing(small_disk, undisturbed):
    out = small_disk / "p"
    process = pretrain(out)
    wait_for(lambda: rows(out / "log.csv") >= 3, process)
    filler = fill(small_disk)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    expected = r"error: \S+: cannot be written: .*No space left on device.*; what was there before is kept"
    assert re.fullmatch(expected, output.splitlines()[-1])
    assert "Traceback" not in output
    before = rows(out / "log.csv")
    filler.unlink()
    finished(pretrain(out))
    check_continued(out, before, undisturbed)


@pytest.mark.e2e
def test_a_disk_that_fills_in_mid_run_and_is_freed(small_disk, tmp_path, folder):
    config = short(configuration())
    config["results"] = str(small_disk / "results")
    run = prepare(tmp_path / "run", config)
    process = start(run, "--cores", 2, "quick")
    wait_for(lambda: (small_disk / "results" / "one" / "pretrain" / "log.csv").exists(), process)
    filler = fill(small_disk)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Error in rule" in output
    filler.unlink()
    snakemake(run, "--rerun-incomplete", "quick")
    os.symlink(small_disk / "results", run / "results")
    made, before = results(run), results(folder)
    names = [name for name in made if name.startswith(("one/pretrain/", "one/evaluate/unprotected/"))]
    assert len(names) == 5
    assert all(made[name] == before[name] for name in names)
    assert (small_disk / "results" / "summary" / "quick" / "table1.csv").exists()


@pytest.mark.e2e
def test_a_configuration_that_cannot_be_written(tmp_path):
    run = prepare(tmp_path / "run")
    config = run / "config.yaml"
    config.chmod(0o444)
    before = config.read_bytes()
    with mounted(config, "--bind", str(config)):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(config)], check=True)
        with pytest.raises(OSError, match="Read-only"):
            config.write_bytes(b"")
        snakemake(run, "results/one/pretrain/model.safetensors")
    assert config.read_bytes() == before
    assert (run / "results" / "one" / "pretrain" / "model.safetensors").exists()


@pytest.mark.e2e
def test_a_configuration_that_is_not_there_is_named(tmp_path):
    run = prepare(tmp_path / "run")
    (run / "config.yaml").unlink()
    output = snakemake(run, "-n", "quick", check=False)
    assert "config.yaml" in output
    assert "Traceback" not in output
