"""What several test files use."""

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import nn
from workflows import prepare, snakemake

from correctnet import machine
from correctnet.datasets.base import Split
from correctnet.networks.blocks import Block
from correctnet.networks.building import build
from correctnet.noise import core as native


def pytest_report_header() -> list[str]:
    """How far each of the C++ core's code paths is tested on this machine."""
    status = native.status()
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


# How long an example takes says something of the machine, and nothing of the code.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


def pytest_configure() -> None:
    torch.set_num_interop_threads(1)  # may be said once a process


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    # Before each test: a command that ran in this process leaves as many threads as the machine has cores. Two pools of
    # threads on two cores are slower than none, and one thread's sums are reproducible.
    torch.set_num_threads(1)


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
def folder(tmp_path_factory) -> Path:
    """A copy of the workflow with tiny budgets in which `quick` has run; whoever changes it puts it back."""
    folder = prepare(tmp_path_factory.mktemp("workflow"))
    snakemake(folder, "quick")
    return folder
