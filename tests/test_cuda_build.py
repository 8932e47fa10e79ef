"""The CUDA kernels without a GPU: nvcc compiles them, they fit the registers, and tests/test_gpu.py passes on a
modelled device. (csrc/tests/test_cuda.cpp compares the kernels, and mutants of them, with definitions.)"""

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

from correctnet.noise import core, device

ROOT = Path(__file__).parent.parent
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
TABLE = ROOT / "csrc" / "cuda" / "ptxas.csv"
ARCHITECTURES = ("80", "90")

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


def dynamic_shared(tmp_path: Path) -> dict[str, int]:
    """By kernel, the bytes of shared memory that a launch asks for: conv at least, the others at most."""
    source = tmp_path / "shared.cpp"
    lines = [f'std::printf("conv<%s,{n}> %zu\\n", type, conv_shared_bytes({n}, kStages));' for n in (16, 64)]
    lines.append('std::printf("noisy_weight_in_order<%s> %zu\\n", type, in_order_shared_bytes());')
    most = "transposed_shared_bytes(kMostTile, kMostTile)"
    lines.append('std::printf("array_weight<%s> %zu\\n", type, in_order_shared_bytes());')
    lines.append(f'std::printf("noisy_weight_transposed<%s> %zu\\n", type, {most});')
    body = "\n".join(f"    {line}" for line in lines)
    source.write_text(
        '#include "cuda/conv.cuh"\n#include <cstdio>\n'
        "int main() {\n  using namespace correctnet::cuda;\n"
        f'  for (const char* type : {{"float", "bfloat16"}}) {{\n{body}\n  }}\n}}\n'
    )
    program = tmp_path / "shared"
    flags = ["-std=c++17", "-DCORRECTNET_SHIM", "-Wno-unknown-pragmas", "-I", ROOT / "csrc"]
    run([os.environ.get("CXX", "c++"), *flags, source, "-o", program])
    return {kernel: int(size) for kernel, size in map(str.split, run([program]).splitlines())}


@pytest.mark.build
@needs_nvcc
def test_kernels_compile_without_warnings_and_fit(tmp_path: Path) -> None:
    """For each architecture and as PTX. The table is the most that each kernel may take; spills are never allowed.

    Shared memory is what ptxas sees and what a launch asks for besides. Conv takes more where a device has more: the
    table's number is what it cannot do without, and it and all others fit the 99 KiB of compute capability 8.6 and 8.9.
    """
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    code += [f"-gencode=arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}"]
    flags = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-Wall,-Wextra,-ffp-contract=off", "-Werror=all-warnings"]
    sources = ["-I", ROOT / "csrc", "-c", ROOT / "csrc/cuda/engine.cu", "-o", tmp_path / "engine.o"]
    command = [NVCC, *flags, "-Xptxas=-v", *code, *sources]
    output = run([*command, "--threads", "2"])
    found = resources(output)
    with TABLE.open() as file:
        allowed = {(row["kernel"], row["arch"]): row for row in csv.DictReader(file)}
    assert set(found) == set(allowed), "write the new kernels into csrc/cuda/ptxas.csv"
    dynamic = dynamic_shared(tmp_path)
    assert {kernel for kernel, _ in found} > set(dynamic)
    for key, used in found.items():
        assert used["spills"] == 0, key
        assert used["registers"] <= int(allowed[key]["registers"]), key
        assert used["shared"] + dynamic.get(key[0], 0) <= int(allowed[key]["shared"]) <= 99 << 10, key


@pytest.mark.build
@needs_nvcc
def test_no_contraction_reaches_the_noise(tmp_path: Path) -> None:
    """In the PTX every fused multiply-add of the noise is one that the source asks for, with nvcc's contraction and
    without: one of the uniform, five of each polynomial, one of the scale. Nor is a product of weight and factor fused.

    `plain` shows that nvcc contracts where it may. (The kernels are built with -fmad=false besides.)
    """
    source = tmp_path / "noise.cu"
    source.write_text(
        '#include "noise/noise.h"\n'
        "using namespace correctnet;\n"
        "__global__ void noisy(float* p, const float* table) {\n"
        "  const Noise layer = {0, 0, 0, 0, p[1], p[2]};\n"
        "  const float factor = noise::lognormal(__float_as_uint(p[0]), layer, table);\n"
        "  p[0] = noise::multiply(p[3], factor) + p[4];\n"
        "}\n"
        "__global__ void plain(float* p) { p[0] = p[1] * p[2] + p[3]; }\n"
    )
    for contraction, noisy, plain in ("true", 12, 1), ("false", 12, 0):
        ptx = tmp_path / f"{contraction}.ptx"
        flags = ["-std=c++17", f"-fmad={contraction}", "-I", ROOT / "csrc", "-arch=compute_90", "-ptx"]
        run([NVCC, *flags, source, "-o", ptx])
        kernels = re.finditer(r"\.entry \w*?(noisy|plain)\w*\(.*?\n}", ptx.read_text(), re.DOTALL)
        found = {kernel[1]: len(re.findall(r"\bfma\.", kernel[0])) for kernel in kernels}
        assert found == {"noisy": noisy, "plain": plain}, contraction


@pytest.mark.skipif(
    NVCC is None or os.environ.get("CORRECTNET_CUDA") == "0", reason="no nvcc, or it was not to be used"
)
def test_this_installation_has_them() -> None:
    if not core.status().built:
        pytest.skip("the C++ core was not built")
    status = device.status()
    assert status.built, status.reason
    assert status.usable or status.reason == "torch sees no CUDA device" or "GPU" in status.reason


@pytest.mark.build
@pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("ninja") is None, reason="no CMake or Ninja")
def test_python_on_a_modelled_device(tmp_path: Path) -> None:
    """tests/test_gpu.py and test_gpu_tensors.py in a copy of the package whose kernels run on the host."""
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
    tests = ["test_gpu.py", "test_gpu_tensors.py"]
    for name in (*tests, "conftest.py", "instruction_sets.py", "workflows.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path)
    code = NOT_EDITABLE + f"import pytest; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *{tests}]))"
    output = run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    passed = int(re.search(r"(\d+) passed", output)[1])
    assert passed >= 40, output
