"""What an installation needs; and where what was asked for cannot be built: one line that says what to set."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER = any(map(shutil.which, [os.environ.get("CXX", "c++"), "g++", "clang++"]))


def setup(*arguments: str | Path, **environment: str) -> list[str]:
    """The lines that a setup which must fail leaves on the error stream."""
    ours = ("CORRECTNET_CUDA", "CORRECTNET_CUDA_ARCHS", "CORRECTNET_PURE_PYTHON", "CUDACXX")
    env = {k: v for k, v in os.environ.items() if k not in ours} | environment
    command = [sys.executable, ROOT / "setup.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode != 0, done.stdout
    return done.stderr.splitlines()


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CORRECTNET_PURE_PYTHON": "1", "CUDACXX": "nvcc"}, "CORRECTNET_PURE_PYTHON is 1"),
        ({"PATH": "/nowhere", "CUDACXX": "nvcc"}, "no C++ compiler found (c++, g++, clang++; CXX not set)"),
    ],
)
def test_kernels_that_are_demanded_without_the_core(environment: dict[str, str], reason: str) -> None:
    lines = setup("--name", CORRECTNET_CUDA="1", **environment)
    wanted = "correctnet: CORRECTNET_CUDA is 1, but the CUDA kernels are a part of the C++ core, and "
    assert lines == [wanted + reason]


def test_kernels_that_are_demanded_without_nvcc() -> None:
    if Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("nvcc is where setup.py looks for it last")
    (line,) = setup("--name", CORRECTNET_CUDA="1", PATH="/nowhere")
    assert line == "correctnet: CORRECTNET_CUDA is 1, but nvcc is not found; add it to PATH or set CUDACXX"


@pytest.mark.build
@pytest.mark.skipif(not (COMPILER and shutil.which("cmake") and shutil.which("ninja")), reason="no C++ compiler, CMake")
def test_an_nvcc_that_fails_names_the_ways_out(tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'nvcc fatal: broken' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    out = ["--build-temp", tmp_path / "temp", "--build-lib", tmp_path / "lib"]
    lines = setup("build_ext", *out, CORRECTNET_CUDA="1", CUDACXX=str(nvcc))
    assert lines[-1].startswith(f"correctnet: the build with {nvcc} failed, see above: CORRECTNET_CUDA=0 installs")
    assert "CORRECTNET_CUDA_ARCHS" in lines[-1]


def test_the_workflow_brings_what_its_report_asks_for() -> None:
    # Snakemake's report needs it without depending on it, and pytest hides that: it brings it into every test's venv.
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(requirement.startswith("pygments") for requirement in extras["workflow"])


def output(*command: str | Path, **environment: str) -> str:
    """What a command that must succeed prints."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, cwd=ROOT / "csrc", env=os.environ | environment, **options)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.build
def test_an_installation_brings_the_workflow_of_a_new_study(tmp_path: Path) -> None:
    source, built = tmp_path / "source", tmp_path / "built"
    shutil.copytree(ROOT / "correctnet", source / "correctnet", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("workflow", "profiles"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "Snakefile"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "setup.py", "build_py", "--build-lib", built]
    subprocess.run(build, cwd=source, env=os.environ | {"CORRECTNET_PURE_PYTHON": "1"}, check=True, capture_output=True)
    code = (
        "from pathlib import Path; from correctnet.pipeline import study; study.new(Path('s')); print(study.__file__)"
    )
    found = output(sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r}); {code}", PYTHONPATH=str(built))
    assert found.strip().startswith(str(built))
    for name in ("Snakefile", "workflow", "profiles/default", "config.yaml", "network.py"):
        assert (tmp_path / "s" / name).exists(), name
    rules = {path.name for path in (ROOT / "workflow" / "rules").iterdir()}
    assert {path.name for path in (tmp_path / "s" / "workflow" / "rules").iterdir()} == rules


@pytest.mark.build
@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a manylinux wheel is for Linux")
@pytest.mark.skipif(not (COMPILER and find_spec("auditwheel")), reason="no C++ compiler or auditwheel")
def test_manylinux_wheel(tmp_path: Path) -> None:
    """The wheel of tools/wheel.sh, which runs the installed package with no compiler on PATH."""
    printed = output(ROOT / "tools" / "wheel.sh", "--offline", tmp_path, PYTHON=sys.executable)
    (wheel,) = tmp_path.iterdir()
    assert re.search(r"-manylinux_2_\d+_\w+\.whl$", wheel.name)
    assert re.search(r"^  in use: ", printed, re.MULTILINE)
    assert re.search(r"^\d+ passed", printed, re.MULTILINE)


@pytest.mark.build
@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(shutil.which, ["aarch64-linux-gnu-g++", "qemu-aarch64", "cmake", "ninja"])),
    reason="no aarch64-linux-gnu-g++, qemu-aarch64, CMake or Ninja",
)
def test_cpp_on_aarch64() -> None:
    """The C++ tests, compiled for another architecture and emulated."""
    build = ROOT / "build" / "aarch64"
    output("cmake", "--preset", "aarch64")
    output("cmake", "--build", build)
    # The engine's take ten minutes in emulation; docs/install.md has the command for all.
    print(output("ctest", "--test-dir", build, "--output-on-failure", "--no-tests=error", "--exclude-regex", "engine"))
