"""The CUDA kernels without a GPU: nvcc compiles them, they fit the registers, and on a modelled device the tests of
tests/test_gpu.py pass. (The kernels against their definitions, and mutants of them: csrc/tests/test_cuda.cpp.)"""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from isolated import NOT_EDITABLE

from correctnet import cuda, native

ROOT = Path(__file__).parent.parent
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
TABLE = ROOT / "csrc" / "cuda" / "ptxas.csv"
ARCHITECTURES = ("80", "90")

pytestmark = pytest.mark.slow
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")


def run(command: list[str | Path], **options: object) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    assert done.returncode == 0, done.stdout
    return done.stdout


def resources(output: str) -> dict[tuple[str, str], dict[str, int]]:
    """By kernel and architecture, what `ptxas -v` said: registers, static shared memory, bytes of spills and stack."""
    demangled = run([shutil.which("c++filt") or "c++filt"], input=output)
    found = {}
    pattern = re.compile(
        r"Compiling entry function '(?P<kernel>[^']+)' for 'sm_(?P<arch>\d+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    for match in pattern.finditer(demangled):
        name = re.search(r"cuda::(\w+(?:<[^>]*>)?)", match["kernel"].replace("correctnet::", ""))
        kernel = (name[1] if name else match["kernel"]).replace("unsigned short", "bfloat16").replace(" ", "")
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        found[kernel, match["arch"]] = {
            "registers": int(match["registers"]),
            "shared": int(shared[1]) if shared else 0,
            "spills": int(match["stores"]) + int(match["loads"]) + int(match["stack"]),
        }
    return found


@needs_nvcc
def test_kernels_compile_without_warnings_and_fit(tmp_path: Path) -> None:
    """For each architecture and as PTX. The table is the most that each kernel may take; spills are never allowed."""
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    code += [f"-gencode=arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}"]
    flags = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-Wall,-Wextra,-ffp-contract=off", "-Werror=all-warnings"]
    command = [NVCC, *flags, "-Xptxas=-v", *code, "-c", ROOT / "csrc/cuda/engine.cu", "-o", tmp_path / "engine.o"]
    output = run([*command, "--threads", "2"])
    found = resources(output)
    with TABLE.open() as file:
        allowed = {(row["kernel"], row["arch"]): row for row in csv.DictReader(file)}
    assert set(found) == set(allowed), "write the new kernels into csrc/cuda/ptxas.csv"
    for key, used in found.items():
        assert used["spills"] == 0, key
        assert used["registers"] <= int(allowed[key]["registers"]), key
        assert used["shared"] <= int(allowed[key]["shared"]), key


@needs_nvcc
def test_no_contraction_reaches_the_noise(tmp_path: Path) -> None:
    """In the PTX every fused multiply-add is one that the source asks for: `fma.rn` by name, and none contracted."""
    source = tmp_path / "noise.cu"
    source.write_text(
        '#include "cuda/noise.cuh"\n'
        "__global__ void one(float* p) { p[0] = correctnet::noise::multiply(p[1], p[2]) + p[3]; }\n"
    )
    command = [NVCC, "-std=c++17", "-fmad=false", "-I", ROOT / "csrc", "-arch=compute_90", "-ptx", source]
    run([*command, "-o", tmp_path / "noise.ptx"])
    ptx = (tmp_path / "noise.ptx").read_text()
    (body,) = re.findall(r"\.entry \w*one\w*\(.*?\n}", ptx, re.DOTALL)
    assert "mul.rn.f32" in body
    assert "fma" not in body


@pytest.mark.skipif(
    NVCC is None or os.environ.get("CORRECTNET_CUDA") == "0", reason="no nvcc, or it was not to be used"
)
def test_this_installation_has_them() -> None:
    if not native.status().built:
        pytest.skip("the C++ core was not built")
    status = cuda.status()
    assert status.built, status.reason
    assert status.usable or status.reason == "torch sees no CUDA device" or "GPU" in status.reason


@pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("ninja") is None, reason="no CMake or Ninja")
def test_python_on_a_modelled_device(tmp_path: Path) -> None:
    """tests/test_gpu.py in a copy of the package whose kernels run on the host."""
    import pybind11

    settings = {
        "CORRECTNET_CUDA": "SHIM",
        "CORRECTNET_PYTHON": "ON",
        "CORRECTNET_BASELINE": "ON",
        "BUILD_TESTING": "OFF",
        "PYBIND11_FINDPYTHON": "ON",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": tmp_path / "correctnet",
    }
    options = [f"-D{name}={value}" for name, value in settings.items()]
    build = ROOT / "build" / "shim"
    run(["cmake", "-S", ROOT / "csrc", "-B", build, "-G", "Ninja", *options])
    run(["cmake", "--build", build])
    shutil.copytree(
        ROOT / "correctnet",
        tmp_path / "correctnet",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
        dirs_exist_ok=True,
    )
    for name in ("test_gpu.py", "conftest.py", "workflows.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path)
    code = NOT_EDITABLE + "import pytest; sys.exit(pytest.main(['-q', 'test_gpu.py', '-p', 'no:cacheprovider']))"
    output = run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    passed = int(re.search(r"(\d+) passed", output)[1])
    assert passed >= 40, output
