"""What is for a GPU where there is none: it says so, and leaves nothing half done."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def test_the_script_ends_with_one_line(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    out = tmp_path / "gpu.md"
    done = subprocess.run(
        ["bash", ROOT / "tests" / "gpu.sh", out], env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "torch sees no CUDA device here\n"
    assert done.stdout == ""
    assert not out.exists()


def test_its_tests_are_skipped_with_the_reason() -> None:
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_gpu*.py"))
    command = [sys.executable, "-m", "pytest", "-n", "0", "-m", "gpu", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert "passed" not in lines[-1]
    assert "failed" not in lines[-1]
    skipped = [line for line in lines if line.startswith("SKIPPED")]
    assert {line.split()[2].partition(":")[0] for line in skipped} == set(files)
    reasons = ("torch sees no CUDA device", "CUDA kernels were not built", "only a modelled device")
    assert all(any(reason in line for reason in reasons) for line in skipped), skipped
