#!/usr/bin/env bash
# Everything that needs a GPU, in one go, for a machine with a GPU, nvcc and a CUDA torch, without internet: builds for this
# GPU alone, runs the GPU tests, the benchmarks beside their targets, ncu on the attention kernels and compute-sanitizer on
# small shapes, and writes benchmarks/results/<device>-<commit>.json and .md, and the logs of all parts as -logs.tar.gz. The
# report is written anew after every part, and each part has its own limit: what a failed or interrupted run has found is
# there. The last line counts.
#
#   scripts/gpu_check.sh             PYTHON names the interpreter (default python3), MAX_JOBS the compilers at work,
#                                    TEST_JOBS the tests at a time, COMMIT the commit where there is no git, LIMIT the
#                                    seconds in all (default 570), RESULTS and WORK the folders of reports and of logs;
#                                    PYTHONPATH is kept (a folder with packages that the machine lacks)
#   PARTS="sanitizers ncu" ...       some parts alone, on what an earlier call has built and beside what it has found: of
#                                    instructions, build, tests, benchmarks, ncu, sanitizers
#
# On a machine that is lent for single commands, without git and with a folder whose files come back:
#   RESULTS=$OUT COMMIT=<commit> scripts/gpu_check.sh
#   scripts/gpu_check.sh --dry-run   prints the commands of each part and runs none
#   scripts/gpu_check.sh --rehearse  runs what runs without a GPU, the benchmarks on small shapes: proves this script
set -euo pipefail
cd "$(dirname "$0")/.."

mode=${1:-}
python=${PYTHON:-python3}
limit=${LIMIT:-570}
all_parts="instructions build tests benchmarks ncu sanitizers"
parts=${PARTS:-$all_parts}

stop() {
  echo "selfforcing_ext: $*" >&2
  exit 1
}

case $mode in '' | --dry-run | --rehearse) ;; *) stop "$mode is unknown; accepted: --dry-run, --rehearse" ;; esac

for name in $parts; do
  [[ " $all_parts " == *" $name "* ]] || stop "PARTS has $name, but accepted are: $all_parts"
done
wanted() { [[ " $parts " == *" $1 "* ]]; }

nvcc=${CUDA_HOME:+$CUDA_HOME/bin/nvcc}
nvcc=${nvcc:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
[ -x "$nvcc" ] || [ -n "$mode" ] || stop "nvcc was not found; set CUDA_HOME to a toolkit"
if [ -z "${CUDA_HOME:-}" ] && [ -x "$nvcc" ]; then
  CUDA_HOME=$("$nvcc" --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p' | xargs realpath)
  export CUDA_HOME
fi

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# What a bare machine may lack, before minutes are spent on what needs it.
if [ "$mode" != --dry-run ]; then
  missing=$("$python" -c 'import importlib.util
print(*(name for name in ("torch", "numpy", "nvtx", "pytest", "hypothesis", "pybind11", "ninja", "setuptools")
        if importlib.util.find_spec(name) is None))') || stop "$python does not run"
  [ -z "$missing" ] || stop "$python lacks $missing; where there is internet, \`pip download --only-binary=:all: --no-deps" \
    "--python-version $("$python" -c 'import sys; print("{}.{}".format(*sys.version_info))') -d wheels $missing\` brings" \
    "wheels, and here \`pip install --no-index --no-deps --target packages wheels/*.whl\` makes a folder for PYTHONPATH"
fi
if [ -n "$mode" ]; then
  device=${mode#--} architecture=${TORCH_CUDA_ARCH_LIST:-9.0a}
else
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    stop "$python has no torch that sees a CUDA device; set PYTHON to one that has"
  device=$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-").lower())')
  # The architecture of this GPU; with the instructions that only it has (the a) from Hopper on.
  architecture=${TORCH_CUDA_ARCH_LIST:-$("$python" -c 'import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + ("a" if major >= 9 else ""))')}
fi
export TORCH_CUDA_ARCH_LIST=$architecture SELFFORCING_CUDA=1
commit=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
results=${RESULTS:-benchmarks/results}/$device-$commit
work=${WORK:-build/gpu-check}

passed=0
failed=0

report() {
  "$python" benchmarks/gpu_report.py "$work" "$results" || echo "selfforcing_ext: the report could not be written" >&2
  tar -czf "$results-logs.tar.gz" -C "$work" --exclude=test_ptx . || echo "selfforcing_ext: the logs were not packed" >&2
}

note() {
  printf '%s\t%s\t%s\n' "$1" "$2" "$3" >>"$work/parts.tsv"
  report
}

# part NAME SECONDS COMMAND...: runs one part, its output to a log whose end is shown, for so many seconds at most and as
# long as the whole has time, and notes how it ended. (A pipe would stay open for as long as anything that the part has
# started.)
part() {
  local name=$1 seconds=$2 log=$work/${1// /-}.log start=$SECONDS left=$((limit - SECONDS)) outcome=passed status=0
  shift 2
  printf '\n=== %s  %s\n' "$(date +%H:%M:%S)" "$name"
  if [ "$mode" = --dry-run ]; then
    printf '   '
    printf ' %q' "$@"
    printf '\n'
    return
  fi
  if [ "$left" -lt 10 ]; then
    note "$name" "NOT RUN, no time is left" 0
    failed=$((failed + 1))
    return
  fi
  timeout --kill-after=5 "$((left < seconds ? left : seconds))" "$@" >"$log" 2>&1 || status=$?
  tail -n 40 "$log"
  case $status in
  0) passed=$((passed + 1)) ;;
  124 | 137) outcome="TIMED OUT" failed=$((failed + 1)) ;;
  *) outcome=FAILED failed=$((failed + 1)) ;;
  esac
  note "$name" "$outcome" "$((SECONDS - start))"
  [ "$status" -eq 0 ]
}

# The same, for what needs a GPU.
gpu_part() {
  if [ "$mode" = --rehearse ]; then
    note "$1" "NOT RUN, there is no GPU" 0
  else
    part "$@"
  fi
}

# tool NAME: where the toolkit or the path has it.
tool() {
  if [ -x "${CUDA_HOME:-}/bin/$1" ]; then echo "$CUDA_HOME/bin/$1"; else command -v "$1" || true; fi
}

if [ "$mode" != --dry-run ]; then
  mkdir -p "$work"
  [ -n "${PARTS:-}" ] || rm -f "$work"/{facts.json,parts.tsv,ncu.csv} "$work"/*.log "$work"/benchmarks*.json
  "$python" - "$device" "$commit" "$architecture" >"$work/facts.json" <<'PYTHON'
import json
import sys
import time

import torch

names = ("device", "commit", "architecture")
facts = dict(zip(names, sys.argv[1:], strict=True)) | {"torch": torch.__version__, "cuda": torch.version.cuda}
print(json.dumps(facts | {"date": time.strftime("%Y-%m-%d")}))
PYTHON
fi

# The instructions themselves first: what the emulation takes them for is what the kernels are built on.
if wanted instructions; then
  number=${architecture/./}
  gpu_part instructions 40 bash -c "\"$nvcc\" -x cu -std=c++20 -gencode=arch=compute_$number,code=sm_$number \
    tests/cuda_emulation/test_ptx.cpp -o $work/test_ptx && $work/test_ptx" || true
fi
if wanted build; then
  gpu_part build 200 "$python" setup.py -q build_ext --inplace || true
  gpu_part registration 30 "$python" scripts/check_registration.py . || true
  part self-test 40 "$python" -m selfforcing_ext.info || true
fi

# The tests of ops, which need no more than torch. Hopper's own attention kernels are a path beside the others. A test
# that hangs in a driver's call hears no signal: a thread ends its process, and other tests go on in another one.
pytest=("$python" -m pytest -q -m gpu -p no:cacheprovider)
if "$python" -c 'import pytest_timeout' 2>/dev/null; then
  pytest+=(--timeout=60 --timeout-method=thread)
else
  pytest+=(-o faulthandler_timeout=60)
fi
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n "${TEST_JOBS:-4}")
hopper=false
[ "${architecture%a}" != 9.0 ] || hopper=true
hopper_works=$work/hopper-works
if wanted tests; then
  part "GPU tests" 110 "${pytest[@]}" "${workers[@]}" \
    tests/test_{cuda,rope,denoise,modulate,kv_cache_write,kv_cache_stateful}.py || true
  rm -f "$hopper_works"
  if $hopper && gpu_part "GPU tests, Hopper's path" 80 env SELFFORCING_HOPPER=1 "${pytest[@]}" "${workers[@]}" \
    tests/test_cuda.py && [ -z "$mode" ]; then
    touch "$hopper_works"
  fi
fi

# Each path in a process of its own: a kernel that hangs or writes where it must not takes its process with it, and the rows
# of the path that is known to work are safe by then.
benchmarks=("$python" benchmarks/gpu.py)
if wanted benchmarks; then
  if [ "$mode" = --rehearse ]; then
    part benchmarks 120 "${benchmarks[@]}" --rehearse --seconds 0.02 --json "$work/benchmarks.json" || true
  else
    part benchmarks 150 "${benchmarks[@]}" --path mma --json "$work/benchmarks.json" || true
    ! $hopper || part "benchmarks, Hopper's path" 110 "${benchmarks[@]}" --path hopper --attention \
      --json "$work/benchmarks-hopper.json" || true
  fi
fi

# What the attention kernels are bound by. Clocks stay as they are.
ncu=$(tool ncu)
if ! wanted ncu; then
  :
elif [ -n "$ncu" ] || [ -n "$mode" ]; then
  metrics=$(PYTHONPATH=benchmarks "$python" -c 'import gpu_report; print(",".join(gpu_report.NCU_METRICS))')
  paths=(--path mma)
  ! [ -e "$hopper_works" ] || paths+=(hopper)
  gpu_part ncu 90 "${ncu:-ncu}" --csv --page raw --print-units base --log-file "$work/ncu.csv" --metrics "$metrics" \
    --clock-control none --target-processes all --kernel-name "regex:^(mma|hopper)_" --launch-count 28 \
    "${benchmarks[@]}" --once "${paths[@]}" || true
else
  note ncu "NOT RUN, ncu was not found" 0
fi

# A few small cases of our own kernels: the tools slow them down a hundredfold, and find hazards in those of libraries that
# the tests compare with. torch's caching allocator would hide overruns. What racecheck and synccheck say of Hopper's
# barriers is for the reader: they do not know of every order that copies and barriers make.
sanitizer=$(tool compute-sanitizer)
small="rows_without_keys or (past_in_pages and page7) or (any_shape_and_layout and 7x13by2 and (d8 or d72 or d256))"
small_hopper="bfloat16 and ((past_in_pages and page64) or (every_way and all and 64-16) or (any_shape_and_layout and (full65x129 or (7x13by2 and b2))))"
sanitize() {
  local name=$1 path=$2 cases=$3 status=$4
  gpu_part "$name" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 SELFFORCING_HOPPER="$path" "${sanitizer:-compute-sanitizer}" \
    --tool "${name%%,*}" --kernel-name kns=selfforcing --error-exitcode "$status" \
    "${pytest[@]}" -x tests/test_cuda.py -k "$cases" || true
}
if ! wanted sanitizers; then
  :
elif [ -n "$sanitizer" ] || [ -n "$mode" ]; then
  for name in memcheck racecheck synccheck; do
    sanitize "$name" 0 "$small" 9
    if [ -e "$hopper_works" ] || { $hopper && [ -n "$mode" ]; }; then
      if [ "$name" = memcheck ]; then
        sanitize "$name, Hopper's path" 1 "$small_hopper" 9
      else
        sanitize "$name, Hopper's path, for information" 1 "$small_hopper" 0
      fi
    fi
  done
else
  echo "WARNING: compute-sanitizer was not found; memcheck, racecheck and synccheck were NOT RUN" >&2
  note "memcheck, racecheck, synccheck" "NOT RUN, compute-sanitizer was not found" 0
fi

[ "$mode" != --dry-run ] || exit 0
printf '\nWrote %s.md and %s.json\n%d passed, %d failed\n' "$results" "$results" "$passed" "$failed"
[ "$failed" -eq 0 ]
