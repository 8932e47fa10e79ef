"""The C++ tests (csrc/tests), as they are and under sanitizers, and the ways to install correctnet."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from isolated import NOT_EDITABLE

ROOT = Path(__file__).parent.parent
COMPILER = any(map(shutil.which, [os.environ.get("CXX", "c++"), "g++", "clang++"]))

pytestmark = pytest.mark.slow
needs_compiler = pytest.mark.skipif(
    not (COMPILER and shutil.which("cmake") and shutil.which("ninja")), reason="no C++ compiler, CMake or Ninja"
)


def run(command: list[str | Path], **options: object) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    assert done.returncode == 0, done.stdout
    return done.stdout


@needs_compiler
@pytest.mark.parametrize("preset", ["release", "asan", "tsan"])
def test_cpp(preset: str) -> None:
    run(["cmake", "--preset", preset], cwd=ROOT / "csrc")
    build = ROOT / "build" / preset
    run(["cmake", "--build", build])
    parallel = str(len(os.sched_getaffinity(0)))
    print(run(["ctest", "--test-dir", build, "--output-on-failure", "--no-tests=error", "--parallel", parallel]))


@pytest.mark.skipif(shutil.which("clang++") is None, reason="no clang++")
def test_clang() -> None:
    """The other compiler; what only depends on the source (symbols, all 2^32 words) is left to the first."""
    run(["cmake", "--preset", "clang"], cwd=ROOT / "csrc")
    build = ROOT / "build" / "clang"
    run(["cmake", "--build", build, "--target", "test_lanes", "test_engine"])
    print(run(["ctest", "--test-dir", build, "--output-on-failure", "--tests-regex", "^(lanes|engine)$"]))


def wheel(tmp_path: Path, **environment: str) -> tuple[Path, str]:
    """The wheel of a copy of the sources, and what its build said."""
    source = tmp_path / "source"
    for name in ("correctnet", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    output = run(command, env=os.environ | {"CORRECTNET_CUDA": "0"} | environment)
    (path,) = tmp_path.glob("*.whl")
    return path, output


def status_of(wheel: Path, tmp_path: Path) -> str:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = NOT_EDITABLE + "from correctnet import native; print(native.status()); native.lognormal(1, 2, 3, 100, 0.5)"
    return run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path / "site")})


@needs_compiler
def test_wheel(tmp_path: Path) -> None:
    path, _ = wheel(tmp_path)
    assert not path.name.endswith("none-any.whl")
    assert "built=True" in status_of(path, tmp_path)


def test_pure_wheel_on_request(tmp_path: Path) -> None:
    path, output = wheel(tmp_path, CORRECTNET_PURE_PYTHON="1")
    assert "correctnet: CORRECTNET_PURE_PYTHON is 1: installing without the C++ core" in output
    assert path.name.endswith("py3-none-any.whl")
    assert "built=False" in status_of(path, tmp_path)


def test_pure_wheel_without_a_compiler(tmp_path: Path) -> None:
    empty = tmp_path / "bin"
    empty.mkdir()
    path, output = wheel(tmp_path, PATH=str(empty))
    assert "correctnet: no C++ compiler found" in output
    assert path.name.endswith("py3-none-any.whl")
    assert "was not built" in status_of(path, tmp_path)


@needs_compiler
def test_a_build_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no such compiler"):
        wheel(tmp_path, CXX="/no such compiler")
