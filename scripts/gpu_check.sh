#!/usr/bin/env bash
# Everything that needs a GPU, in one go, for a machine with a GPU, nvcc and a CUDA torch, without internet: builds for this
# GPU alone, runs the GPU tests, compute-sanitizer on small shapes and short benchmarks, and writes
# benchmarks/results/<device>-<commit>.json and .md. Parts after a failed one still run; the last line counts them.
#
#   scripts/gpu_check.sh             PYTHON names the interpreter (default python3), MAX_JOBS the compilers at work,
#                                    TEST_JOBS the tests at a time, COMMIT the commit where there is no git
#   scripts/gpu_check.sh --dry-run   prints the commands of each part and runs none
set -euo pipefail
cd "$(dirname "$0")/.."

dry_run=false
[ "${1:-}" != --dry-run ] || dry_run=true
python=${PYTHON:-python3}

stop() {
  echo "selfforcing_ext: $*" >&2
  exit 1
}

nvcc=${CUDA_HOME:+$CUDA_HOME/bin/nvcc}
nvcc=${nvcc:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
[ -x "$nvcc" ] || $dry_run || stop "nvcc was not found; set CUDA_HOME to a toolkit"
if [ -z "${CUDA_HOME:-}" ] && [ -x "$nvcc" ]; then
  CUDA_HOME=$("$nvcc" --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p' | xargs realpath)
  export CUDA_HOME
fi

if $dry_run; then
  device=${DEVICE:-some-gpu} architecture=${TORCH_CUDA_ARCH_LIST:-9.0a}
else
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    stop "$python has no torch that sees a CUDA device; set PYTHON to one that has"
  device=$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-").lower())')
  # The architecture of this GPU; with the instructions that only it has (the a) from Hopper on.
  architecture=${TORCH_CUDA_ARCH_LIST:-$("$python" -c 'import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + ("a" if major >= 9 else ""))')}
fi
export TORCH_CUDA_ARCH_LIST=$architecture SELFFORCING_CUDA=1 PYTHONPATH=$PWD
commit=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
results=benchmarks/results/$device-$commit
work=build/gpu-check
mkdir -p "$work"

passed=0
failed=0
summary=()

# part NAME COMMAND...: runs one part, its output to the terminal and to a log, and notes how it ended and how long it took.
part() {
  local name=$1 log=$work/${1// /-}.log start=$SECONDS
  shift
  printf '\n=== %s  %s\n' "$(date +%H:%M:%S)" "$name"
  if $dry_run; then
    printf '   '
    printf ' %q' "$@"
    printf '\n'
    return
  fi
  local outcome=passed
  if "$@" 2>&1 | tee "$log"; then
    passed=$((passed + 1))
  else
    outcome=FAILED
    failed=$((failed + 1))
  fi
  summary+=("| $name | $outcome | $((SECONDS - start)) s | $(tail -n 1 "$log" | tr '|' '/' | cut -c1-120) |")
}

# The instructions themselves first: what the emulation takes them for is what the kernels are built on.
part instructions bash -c "\"$nvcc\" -x cu -std=c++20 -arch=sm_${architecture/./} tests/cuda_emulation/test_ptx.cpp \
  -o $work/test_ptx && $work/test_ptx"
part build "$python" setup.py -q build_ext --inplace
part "registration" "$python" scripts/check_registration.py .
part "self-test" "$python" -m selfforcing_ext.info
# The tests of ops, which need no more than torch.
part "GPU tests" "$python" -m pytest -q -m gpu -p no:cacheprovider -n "${TEST_JOBS:-4}" \
  tests/test_{cuda,rope,denoise,modulate,kv_cache_write}.py
sanitizer=$CUDA_HOME/bin/compute-sanitizer
[ -x "$sanitizer" ] || sanitizer=$(command -v compute-sanitizer || true)
if [ -n "$sanitizer" ] || $dry_run; then
  for tool in memcheck racecheck; do
    # A few small cases of our own kernels: the tools slow them down a hundredfold, and find hazards in those of libraries
    # that the tests compare with. torch's caching allocator would hide overruns.
    part "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${sanitizer:-compute-sanitizer}" --tool "$tool" \
      --kernel-regex kns=selfforcing --error-exitcode 9 "$python" -m pytest -q -x -m gpu -p no:cacheprovider tests/test_cuda.py \
      -k "rows_without_keys or (past_in_pages and page7) or (any_shape_and_layout and 7x13by2 and (d8 or d72 or d256))"
  done
else
  echo "WARNING: compute-sanitizer was not found; memcheck and racecheck were NOT RUN" >&2
  summary+=("| memcheck, racecheck | NOT RUN | | compute-sanitizer was not found |")
fi
part benchmarks "$python" benchmarks/gpu.py --json "$work/benchmarks.json"

$dry_run && exit 0
mkdir -p benchmarks/results
{
  echo "# $device, commit $commit, $(date +%Y-%m-%d)"
  echo
  "$python" -c 'import torch; print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, architecture '"$architecture"'")'
  printf '\n| part | outcome | time | last line |\n| --- | --- | --- | --- |\n'
  printf '%s\n' "${summary[@]}"
  echo
  grep '^|' "$work/benchmarks.log" || true
} >"$results.md"
"$python" - "$work/benchmarks.json" "$results.json" "$device" "$commit" "$passed" "$failed" <<'PYTHON'
import json
import sys
from pathlib import Path

import torch

rows, target, device, commit, passed, failed = sys.argv[1:]
report = {
    "device": device,
    "commit": commit,
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "parts_passed": int(passed),
    "parts_failed": int(failed),
    "benchmarks": json.loads(Path(rows).read_text()) if Path(rows).exists() else [],
}
Path(target).write_text(json.dumps(report, indent=1) + "\n")
PYTHON
printf '\nWrote %s.md and %s.json\n%d passed, %d failed\n' "$results" "$results" "$passed" "$failed"
[ "$failed" -eq 0 ]
