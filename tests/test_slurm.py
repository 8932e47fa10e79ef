"""The workflow on a real Slurm of one node (tests/slurm.sh): same bits, resources, time limits, a killed head process.

It installs Debian packages and starts daemons, so it runs where CORRECTNET_TEST_SLURM=1 says that it may.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

import pandas as pd
import pytest
from filelock import FileLock
from test_accidents import documented, rows, wait_for
from workflows import ROOT, configuration, environment, prepare, results, short, snakemake, start, stats

pytest.importorskip("snakemake_executor_plugin_slurm", reason="the cluster extra is not installed")
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.xdist_group("slurm"),  # one cluster, of one node
    pytest.mark.skipif(
        os.environ.get("CORRECTNET_TEST_SLURM") != "1", reason="CORRECTNET_TEST_SLURM=1 installs and starts a Slurm"
    ),
]
PROFILE = ("--profile", "workflow/profiles/slurm", "--slurm-init-seconds-before-status-checks", 1)
# Rules that run on the machine of snakemake itself.
LOCAL = {"fetch", "gather", "collect", "figure", "explore", "table1", "provenance"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A running Slurm; gives a function that lists the jobs of a folder that have ended.

    A machine has one: who starts it last stops the others' (tests/slurm.sh), so each waits for those before it.
    """
    home = tmp_path_factory.mktemp("slurm")
    with FileLock(Path(tempfile.gettempdir()) / "correctnet-test-slurm.lock"):
        yield from _running(home)


def _running(home):
    script = [ROOT / "tests" / "slurm.sh"]
    variables = {**os.environ, "SLURM_HOME": str(home)}
    up = subprocess.run([*script, "up"], env=variables, capture_output=True, text=True, timeout=300)
    assert up.returncode == 0, up.stdout + up.stderr

    def jobs(folder) -> list[dict[str, str]]:
        path = home / "log" / "jobs.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        found = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines]
        return [job for job in found if job["WorkDir"] == str(folder)]

    yield jobs
    subprocess.run([*script, "down"], env=variables, check=True, timeout=60)


def test_the_same_bits_as_on_this_machine(cluster, folder, tmp_path):
    run = prepare(tmp_path / "run")
    planned = stats(snakemake(run, "-n", "quick"))
    output = snakemake(run, *PROFILE, "--set-resources", "pretrain:gpu=1", "--", "quick", cores=False)
    # The folder may hold other targets' pages by now, which tests before this one asked for.
    local = results(folder)
    assert results(run) == {name: local[name] for name in local if not name.startswith("summary/paper")}
    jobs = cluster(run)
    assert len(jobs) == sum(n for rule, n in planned.items() if rule not in LOCAL), output
    assert {job["JobState"] for job in jobs} == {"COMPLETED"}
    # The one GPU that was asked for went through the scheduler; nothing else asked.
    shown = subprocess.run(["scontrol", "show", "jobs"], capture_output=True, text=True, check=True).stdout
    of_run = [job for job in shown.split("\n\n") if f"WorkDir={run}" in job]
    assert len(of_run) == len(jobs)
    assert sum("gres:gpu:1" in job for job in of_run) == 1
    assert stats(snakemake(run, "-n", "quick")) == {}


def test_device_cuda_asks_for_a_gpu_and_says_where_there_is_none(cluster, tmp_path):
    run = prepare(tmp_path / "run")
    target = "results/one/pretrain/model.safetensors"
    output = snakemake(run, *PROFILE, "--retries", 0, "--config", "device=cuda", "--", target, cores=False, check=False)
    assert "Error in rule pretrain" in output
    shown = subprocess.run(["scontrol", "show", "jobs"], capture_output=True, text=True, check=True).stdout
    (job,) = [job for job in shown.split("\n\n") if f"WorkDir={run}" in job]
    assert "gres:gpu:1" in job
    log = (run / "results" / ".logs" / "one" / "pretrain.log").read_text()
    assert log == "error: --device cuda: torch sees no CUDA device here; use --device cpu\n"


@pytest.fixture(scope="module")
def slow_pretraining(tmp_path_factory):
    """A function that gives a configuration whose pre-training takes about so many seconds on this machine."""
    config = configuration()
    config["pairs"]["one"]["pretrain"]["epochs"] = 12
    probe = prepare(tmp_path_factory.mktemp("probe") / "run", config)
    snakemake(probe, "results/one/pretrain/model.safetensors")
    log = pd.read_csv(probe / "results" / "one" / "pretrain" / "log.csv")
    an_epoch = log["seconds"][2:].mean()

    def configured(seconds: float) -> dict:
        config["pairs"]["one"]["pretrain"]["epochs"] = int(seconds / an_epoch)
        return config

    return configured


def test_a_job_over_its_time_limit_goes_on_in_the_next(cluster, slow_pretraining, tmp_path):
    # Slurm checks time limits twice a minute, and other tests may make the probe's estimate wrong by nearly a factor of
    # two: some 90 s outlast the first job, and the second has time enough.
    config = slow_pretraining(160)
    epochs = config["pairs"]["one"]["pretrain"]["epochs"]
    run = prepare(tmp_path / "run", config)
    limit = ["--set-resources", "pretrain:runtime=1+19*(attempt>1)"]  # minutes
    snakemake(run, *PROFILE, *limit, "--", "results/one/pretrain/model.safetensors", cores=False)
    states = [job["JobState"] for job in cluster(run)]
    assert states == ["TIMEOUT", "COMPLETED"]
    log = pd.read_csv(run / "results" / "one" / "pretrain" / "log.csv")
    assert list(log["epoch"]) == list(range(1, epochs + 1)), "every epoch once"
    assert log["process"].max() == len(states)
    first = (log["process"] == 1).sum()
    assert first > 5, "what the first job did was kept"


def test_the_head_process_is_killed_while_jobs_run(cluster, slow_pretraining, tmp_path):
    config = short(slow_pretraining(25))
    run = prepare(tmp_path / "run", config)
    log = run / "results" / "one" / "pretrain" / "log.csv"
    head = start(run, *PROFILE, "--", "all", stdout=subprocess.DEVNULL)
    wait_for(lambda: rows(log) >= 3, head)
    head.kill()
    head.wait()
    before = rows(log)
    time.sleep(2)
    assert rows(log) > before, "a job on a cluster goes on without the process that submitted it"
    for command in documented("cluster-recovery"):
        done = subprocess.run(
            command, shell=True, cwd=run, env=environment(), capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert (run / "results" / "summary" / "paper" / "table1.csv").exists()
    epochs = pd.read_csv(log)
    assert list(epochs["epoch"]) == list(range(1, len(epochs) + 1))
    assert len(epochs) == config["pairs"]["one"]["pretrain"]["epochs"]
