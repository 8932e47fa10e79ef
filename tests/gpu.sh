#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: the GPU tests, compute-sanitizer over the kernels, and the bench, as one Markdown file
# to send in.
#
#   tests/gpu.sh [FILE]          gpu.md if not given; run in the environment that correctnet is installed in
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu.md}
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "torch sees no CUDA device here" >&2; exit 2; }
card=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -1)
status=0
section() { printf '\n## %s\n\n' "$1" >>"$out"; }
block() { printf '```\n' >>"$out"; tail -n "$1" "$2" >>"$out"; printf '```\n' >>"$out"; }
log=$(mktemp)
trap 'rm -f "$log"' EXIT

printf '# CorrectNet on %s\n\nrevision %s, %s\n' "$card" "$(git rev-parse --short HEAD 2>/dev/null || echo unknown)" "$(date -I)" >"$out"
correctnet info >"$log" 2>&1
block 20 "$log"

section "pytest -m gpu"
python -m pytest -n 0 -m gpu tests/test_gpu*.py -q >"$log" 2>&1 || status=1
block 15 "$log"

section "compute-sanitizer"
if command -v compute-sanitizer >/dev/null; then
    # Every kernel: the noise, the operators, the engine. torch's allocator would hide what lies outside a tensor but
    # inside a block of memory that it keeps; without it no CUDA graph can be captured.
    select='(bits or specification or outputs or agree or librar) and not graph'
    for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
            python -m pytest -n 0 tests/test_gpu.py -q -k "$select" >"$log" 2>&1 || status=1
        printf '%s: %s\n\n' "$tool" "$(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$log" | tail -1)" >>"$out"
    done
else
    echo "compute-sanitizer is not in PATH" >>"$out"
fi

section "correctnet bench --device cuda"
correctnet bench --device cuda --json "${out%.md}.json" >"$log" 2>"$log.err" || { status=1; cat "$log.err" >>"$log"; }
rm -f "$log.err"
cat "$log" >>"$out"

echo "$out"
exit $status
