"""Options, profiles and fixtures that several test files use."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings
from instruction_sets import ISAS
from torch import nn
from workflows import prepare, snakemake

from correctnet import machine
from correctnet.datasets.base import Split
from correctnet.networks.blocks import Block
from correctnet.networks.building import build
from correctnet.noise import core


def pytest_report_header() -> list[str]:
    """How far each of the C++ core's code paths is tested on this machine."""
    status = core.status()
    if not status.built:
        return [f"code paths: numpy only, {status.reason}"]
    lines = [f"code paths ({machine.cpu_name()}):"]
    for isa in status.compiled:
        if isa in status.available:
            how = "run natively"
        elif isa == "amx":
            how = "its body run with modelled tiles (C++ tests); native run skipped: this CPU has no AMX"
        else:
            how = f"skipped: this CPU has no {isa}"
        lines.append(f"  {isa:11s} built, {how}")
    emulated = "run" if shutil.which("qemu-x86_64") else "skipped: no qemu-x86_64"
    return [*lines, f"  portable on an emulated Nehalem (C++ tests): {emulated}"]


# No deadlines: how long an example takes depends on the machine's load. `dev` draws the same few examples each time.
settings.register_profile("full", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", parent=settings.get_profile("full"), max_examples=20, derandomize=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    help = "all tests, slow, build and e2e ones too, with every hypothesis example (as -m '')"
    parser.addoption("--full", action="store_const", const="", dest="markexpr", help=help)


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_interop_threads(1)  # can be set once per process
    settings.load_profile("dev" if config.option.markexpr else "full")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    # One per CPU that this process may use, but no more than a laptop's memory holds: each imports PyTorch.
    return min(len(os.sched_getaffinity(0)), 8)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # pytest-xdist names groups in the identifiers. Where it cannot, two processes would start one Slurm.
    if hasattr(config, "workerinput"):
        lost = [i.nodeid for i in items if i.get_closest_marker("xdist_group") and "@" not in i.nodeid]
        assert not lost, f"this pytest-xdist loses the groups of this pytest: {lost[0]}"
    # Long tests first, so that no worker is left with one at the end.
    items.sort(key=lambda item: not any(item.get_closest_marker(mark) for mark in ("build", "e2e", "slow")))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    # Before each test: a command that ran in this process leaves as many threads as the machine has cores. Two pools of
    # threads on two cores are slower than none, and one thread's sums are reproducible.
    torch.set_num_threads(1)


@pytest.fixture
def on_isa():
    """Function that selects an instruction set until the end of the test."""
    from correctnet import _native

    before = _native.isa()
    yield _native.select_isa
    _native.select_isa(before)


@pytest.fixture(params=["numpy", *ISAS])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each set of instructions in turn, and the functions as they are without the core."""
    if request.param == "numpy":
        monkeypatch.setattr(core, "extension", None)
        yield request.param
        return
    if not core.status().built:
        pytest.skip("the C++ core was not built")
    if request.param not in core.status().available:
        pytest.skip(f"this machine has no {request.param}")
    before = core.status().isa
    core.extension.select_isa(request.param)
    yield request.param
    core.extension.select_isa(before)


@pytest.fixture
def lenet() -> nn.Module:
    return build("lenet5", classes=10, channels=1, seed=1).eval()


@pytest.fixture
def tiny() -> nn.Module:
    """A small network with a convolution, BatchNorm and two linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        Block(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        Block(nn.Linear(64, 8)),
        nn.Linear(8, 3),
    ).eval()


@pytest.fixture
def blobs() -> Split:
    """300 images of 3 classes that a small network can tell apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    patterns = torch.randn(3, 1, 8, 8, generator=generator)
    images = patterns[labels] + 0.7 * torch.randn(300, 1, 8, 8, generator=generator)
    return Split(images, labels)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the workflow with tiny budgets in which `quick` has run; a test that changes it restores it.

    Under pytest-xdist the first worker that needs it runs it, and each worker gets a copy.
    """
    base = tmp_path_factory.getbasetemp()
    finished = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "finished-workflow"
    with FileLock(f"{finished}.lock"):
        if not finished.exists():
            folder = prepare(tmp_path_factory.mktemp("workflow") / "run")
            snakemake(folder, "quick")
            folder.rename(finished)
    return Path(shutil.copytree(finished, tmp_path_factory.mktemp("workflow") / "run", symlinks=True))
