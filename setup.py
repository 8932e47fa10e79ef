"""Build of the C++ core with CMake; all metadata is in pyproject.toml.

Without a C++ compiler, or with CORRECTNET_PURE_PYTHON=1, correctnet is installed without the core and computes the same
in numpy; `correctnet.noise.core.status()` reports which. With a compiler, a failing build is an error. CXX, CXXFLAGS,
LDFLAGS and CMAKE_ARGS are respected; flags that change arithmetic are overridden or rejected (csrc/arithmetic.cmake).

The CUDA kernels are part of the core where nvcc is found (CUDACXX, PATH, or /usr/local/cuda), with or without a GPU:
CORRECTNET_CUDA=0 leaves them out, 1 requires them (and the core), and CORRECTNET_CUDA_ARCHS lists architectures as in
CMake ("80;90-real;90-virtual").
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configures and builds csrc/ and leaves the module where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11  # a build requirement, absent where nothing is built

        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": module.parent,
            "CORRECTNET_PYTHON": "ON",
            "BUILD_TESTING": "OFF",
            "PYBIND11_FINDPYTHON": "ON",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "CORRECTNET_CUDA": "ON" if nvcc else "OFF",
        }
        if nvcc:
            settings["CMAKE_CUDA_COMPILER"] = nvcc
            if os.environ.get("CORRECTNET_CUDA_ARCHS"):
                settings["CORRECTNET_CUDA_ARCHS"] = os.environ["CORRECTNET_CUDA_ARCHS"]
        options = [f"-D{name}={value}" for name, value in settings.items()]
        options += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        try:
            subprocess.run(["cmake", "-S", ROOT / "csrc", "-B", build, "-G", "Ninja", *options], check=True)
            subprocess.run(["cmake", "--build", build], check=True)
        except subprocess.CalledProcessError:
            if not nvcc:
                raise
            sys.exit(
                f"correctnet: the build with {nvcc} failed, see above: CORRECTNET_CUDA=0 installs without the CUDA "
                "kernels, CORRECTNET_CUDA_ARCHS (e.g. 80;90) says for which GPUs they are compiled"
            )
        if not module.exists():
            raise RuntimeError(f"the build ended without {module}")


class WithWorkflow(build_py):
    """Puts the workflow beside the template of `correctnet new` (correctnet/pipeline/study.py)."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        place = Path(self.build_lib) / "correctnet" / "study"
        self.copy_file(ROOT / "Snakefile", place / "Snakefile")
        for folder in ("workflow/rules", "workflow/report", "profiles/default"):
            shutil.copytree(ROOT / folder, place / folder, dirs_exist_ok=True)


def why_not() -> str | None:
    """Why the core is not to be built, or None."""
    if os.environ.get("CORRECTNET_PURE_PYTHON") == "1":
        return "CORRECTNET_PURE_PYTHON is 1"
    compilers = ["c++", "g++", "clang++"]
    if "CXX" not in os.environ and not any(map(shutil.which, compilers)):
        return f"no C++ compiler found ({', '.join(compilers)}; CXX not set)"
    return None


def find_nvcc() -> str | None:
    """CUDA's compiler, or None where no kernels are to be built. Exits where they are demanded and it is not there."""
    wanted = os.environ.get("CORRECTNET_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"correctnet: CORRECTNET_CUDA is 0 or 1, not {wanted!r}")
    usual = Path("/usr/local/cuda/bin/nvcc")
    found = os.environ.get("CUDACXX") or shutil.which("nvcc") or (str(usual) if usual.exists() else None)
    if wanted == "1" and not found:
        sys.exit("correctnet: CORRECTNET_CUDA is 1, but nvcc is not found; add it to PATH or set CUDACXX")
    return None if wanted == "0" else found


nvcc = find_nvcc()
reason = why_not()
if reason and os.environ.get("CORRECTNET_CUDA") == "1":
    sys.exit(f"correctnet: CORRECTNET_CUDA is 1, but the CUDA kernels are a part of the C++ core, and {reason}")
if reason:
    print(f"correctnet: {reason}: installing without the C++ core", file=sys.stderr)
setup(
    ext_modules=[] if reason else [Extension("correctnet._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": WithWorkflow},
)
