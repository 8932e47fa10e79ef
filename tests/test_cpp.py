"""The C++ tests (csrc/tests), plain and under sanitizers, and the ways to install correctnet."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from isolated import NOT_EDITABLE

ROOT = Path(__file__).parent.parent
COMPILER = any(map(shutil.which, [os.environ.get("CXX", "c++"), "g++", "clang++"]))

pytestmark = pytest.mark.build
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
    """The other compiler, without the tests that depend on the source alone (symbols, all 2^32 words)."""
    run(["cmake", "--preset", "clang"], cwd=ROOT / "csrc")
    build = ROOT / "build" / "clang"
    run(["cmake", "--build", build, "--target", "test_lanes", "test_attention", "test_engine"])
    print(run(["ctest", "--test-dir", build, "--output-on-failure", "--tests-regex", "^(lanes|attention|engine)$"]))


# Flags that users and distributions set. Neither the noise nor the processors that it runs on may depend on them.
HARMLESS = [
    "-O2 -march=native -mfpmath=387 -funsafe-math-optimizations -fno-trapping-math -fno-signed-zeros",
    "-Ofast -ffast-math -ffinite-math-only -fassociative-math -freciprocal-math -fsingle-precision-constant "
    "-ffp-contract=fast -fno-math-errno -DNDEBUG",
    "-march=nocona -mtune=haswell -ftree-vectorize -fno-plt -O2 -ffunction-sections",
]


def configure(build: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["cmake", "-S", ROOT / "csrc", "-B", build, "-G", "Ninja", *options]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


@needs_compiler
@pytest.mark.parametrize("flags", HARMLESS)
def test_flags_from_outside_that_are_undone(flags: str, tmp_path: Path) -> None:
    """The noise on every instruction set against the known answers and the scalar code, and subnormal numbers."""
    ours = {"CXXFLAGS": flags, "CFLAGS": flags, "LDFLAGS": "-Ofast -ffast-math -funsafe-math-optimizations"}
    if "march" in flags:
        environment, options = ours, ["-DCMAKE_BUILD_TYPE=None"]
    else:
        environment, options = {"LDFLAGS": ours["LDFLAGS"]}, [f"-DCMAKE_CXX_FLAGS={flags}"]
    done = configure(tmp_path, *options, **environment)
    assert done.returncode == 0, done.stderr
    run(["cmake", "--build", tmp_path, "--target", "test_noise"])
    assert "all checks passed" in run([tmp_path / "tests" / "test_noise", ROOT / "tests", "200003"])
    if platform.machine() == "x86_64" and shutil.which("objdump"):
        # Vector instructions of later processors must not be in files that run on every processor.
        objects = [path for target in ("core", "noise_*") for path in tmp_path.glob(f"CMakeFiles/{target}.dir/**/*.o")]
        names = [f"{path.relative_to(tmp_path / 'CMakeFiles').parts[0]}/{path.name}" for path in objects]
        code = {name: run(["objdump", "-d", path]) for name, path in zip(names, objects, strict=True)}
        assert len(code) == 7
        vectors = {name: ("%ymm" in body, "%zmm" in body) for name, body in code.items()}
        assert vectors.pop("noise_avx2.dir/noise.cpp.o") == (True, False)
        assert vectors.pop("noise_avx512.dir/noise.cpp.o")[1]
        assert vectors.pop("noise_avx512bf16.dir/noise.cpp.o")[1]
        assert set(vectors.values()) == {(False, False)}, vectors
        assert not any(re.search(r"\tv[a-z0-9]+ ", code[name]) for name in vectors)


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86-64")
@pytest.mark.parametrize("flags", ["-mfma", "-mavx512f", "-msse4.2", "-mno-sse2", "-m32"])
def test_flags_from_outside_that_are_refused(flags: str, tmp_path: Path) -> None:
    done = configure(tmp_path, CXXFLAGS=flags)
    assert done.returncode
    if flags == "-m32" and "simple test program" in done.stderr:
        return  # CMake's own refusal, where there are no libraries of 32 bits
    said = " ".join(done.stderr.split())
    assert f"correctnet: the compiler's flags ({flags}" in said
    assert "would change results or ask for a processor" in said


def wheel(tmp_path: Path, undo: bool = True, **environment: str) -> tuple[Path, str]:
    """Build a wheel from a copy of the sources; its path and output. `undo=False` lets flags change arithmetic."""
    source = tmp_path / "source"
    for name in ("correctnet", "csrc", "workflow", "profiles"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "Snakefile"):
        shutil.copy(ROOT / name, source)
    if not undo:
        (source / "csrc" / "arithmetic.cmake").write_text("")
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    output = run(command, env=os.environ | {"CORRECTNET_CUDA": "0"} | environment)
    (path,) = tmp_path.glob("*.whl")
    return path, output


def status_of(wheel: Path, tmp_path: Path) -> str:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        NOT_EDITABLE
        + "from correctnet.noise import core, draw; print(core.status()); draw.lognormal(1, 2, 3, 100, 0.5)"
    )
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


BITS = (
    NOT_EDITABLE
    + """
import numpy as np
kept = np.float32(1e-40) * np.float32(1) != 0
from correctnet.noise import core, draw, specification
address = 3, 2, 7, 100003, 0.5
print((draw.lognormal(*address).numpy() != specification.lognormal(*address)).sum(), kept, core.keeps_subnormals())
"""
)


@needs_compiler
def test_a_wheel_with_flags_that_change_arithmetic(tmp_path: Path) -> None:
    flags = "-O2 -march=native -funsafe-math-optimizations -fno-trapping-math"
    settings = {"CXXFLAGS": flags, "LDFLAGS": flags, "CMAKE_ARGS": "-DCORRECTNET_BASELINE=ON"}  # compiled in less time
    path, _ = wheel(tmp_path, **settings)
    zipfile.ZipFile(path).extractall(tmp_path / "site")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    assert run([sys.executable, "-c", BITS], cwd=tmp_path, env=environment).split() == ["0", "True", "True"]


@needs_compiler
def test_a_wheel_that_computes_other_bits_says_so(tmp_path: Path) -> None:
    """The same without what undoes the flags: an error where noise is first asked for, and a line of `info`."""
    flags = "-march=native -funsafe-math-optimizations -fno-trapping-math"
    settings = {"CXXFLAGS": flags, "LDFLAGS": flags, "CMAKE_ARGS": "-DCORRECTNET_BASELINE=ON"}
    path, _ = wheel(tmp_path, undo=False, **settings)
    zipfile.ZipFile(path).extractall(tmp_path / "site")
    options = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(tmp_path / "site")}}
    done = subprocess.run([sys.executable, "-c", BITS], capture_output=True, text=True, **options)
    assert done.returncode
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("correctnet.errors.UserError: the C++ core computes other bits than specified")
    code = NOT_EDITABLE + "from correctnet.cli import main; main(['info'])"
    assert "it computes other bits than specified" in run([sys.executable, "-c", code], **options)


@needs_compiler
def test_a_build_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no such compiler"):
        wheel(tmp_path, CXX="/no such compiler")
