#!/usr/bin/env bash
# The CPU kernels' C++ tests on machines that this one is not, under qemu's user emulation: x86-64 of several ages, where
# the best instruction set must be chosen, no other may be run and a forced one that is missing must be refused; and
# aarch64, where the kernels are plain C++. Problems are small: an emulated machine is slow.
#   scripts/check_cpu_emulated.sh BUILD PYTHON
# BUILD is a build of the C++ tests for this machine (an x86-64), PYTHON has torch and the built package can be imported.
# Needs cmake, ninja, qemu-user and g++-aarch64-linux-gnu (Debian's names).
set -euo pipefail
cd "$(dirname "$0")/.."
build=$1
python=$(realpath -s "$2")
readonly most_multiplications=30000
readonly tests="attention kv_cache rope denoise modulate"

# run_tests ISA FOLDER EMULATOR...: every test passes on the emulated machine, with this instruction set.
run_tests() {
  local isa=$1 folder=$2 test output
  shift 2
  for test in $tests; do
    if ! output=$("$@" "$folder/test_${test}_cpu" "$most_multiplications" 2>&1); then
      printf '%s\n%s fails under %s\n' "$output" "$test" "$*"
      return 1
    fi
    if ! grep -qx "instruction set: $isa" <<<"$output"; then
      printf '%s\n%s should have run with %s under %s\n' "$output" "$test" "$isa" "$*"
      return 1
    fi
  done
  printf '%-9s %s: %s\n' "$isa" "$*" "$tests"
}

# refused ISA EMULATOR...: forcing the instruction set on the emulated machine is an error that says so.
refused() {
  local isa=$1 output
  shift
  output=$(SELFFORCING_CPU_ISA=$isa "$@" "$build/test_rope_cpu" 2>&1) || true
  if ! grep -qx "skipped: SELFFORCING_CPU_ISA is $isa, which this machine lacks" <<<"$output"; then
    printf '%s\n%s should have been refused under %s\n' "$output" "$isa" "$*"
    return 1
  fi
}

# run_python ISA EMULATOR...: torch calls attention, forward and backward, with this instruction set.
run_python() {
  local isa=$1 found
  shift
  # The interpreter's path is that of a link: it finds its environment by the name it is called by.
  found=$(OMP_NUM_THREADS=1 PYTHONPATH=$PWD "$@" -0 "$python" "$(readlink -f "$python")" - <<'EOF'
import torch
from selfforcing_ext import _C, block_causal_attention

q, k, v = (torch.randn(1, 40, 2, 16, requires_grad=True) for _ in range(3))
torchs = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
ours = block_causal_attention(q, k, v)
torch.testing.assert_close(ours, torchs)
for mine, theirs in zip(torch.autograd.grad(ours.sum(), (q, k, v)), torch.autograd.grad(torchs.sum(), (q, k, v))):
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
print(_C.cpu_isa())
EOF
  )
  if [ "$found" != "$isa" ]; then
    printf 'Python: %s should have run, not "%s", under %s\n' "$isa" "$found" "$*"
    return 1
  fi
  printf '%-9s %s: torch\n' "$isa" "$*"
}

# x86-64: before AVX; AVX alone; AVX2; AVX2 without FMA, which our AVX2 code needs. qemu has no AVX-512.
readonly sandy_bridge=SandyBridge,-x2apic,-tsc-deadline
readonly haswell=Haswell-noTSX,-pcid,-x2apic,-tsc-deadline,-invpcid
run_tests baseline "$build" qemu-x86_64 -cpu Nehalem
run_tests baseline "$build" qemu-x86_64 -cpu $sandy_bridge
run_tests avx2 "$build" qemu-x86_64 -cpu $haswell
run_tests baseline "$build" qemu-x86_64 -cpu $haswell,-fma
SELFFORCING_CPU_ISA=baseline run_tests baseline "$build" qemu-x86_64 -cpu $haswell
for isa in avx2 avx512 avx512_bf16; do refused $isa qemu-x86_64 -cpu Nehalem; done
for isa in avx512 avx512_bf16; do refused $isa qemu-x86_64 -cpu $haswell; done
# torch 2.13 itself needs AVX, so none of it before Sandy Bridge.
run_python baseline qemu-x86_64 -cpu $sandy_bridge
run_python avx2 qemu-x86_64 -cpu $haswell

log=build/cpp-aarch64.log
{
  cmake -S . -B build/cpp-aarch64 -G Ninja -DSELFFORCING_BUILD_TESTS=ON -DCMAKE_COMPILE_WARNING_AS_ERROR=ON \
    -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
  # shellcheck disable=SC2086
  cmake --build build/cpp-aarch64 -j "${MAX_JOBS:-2}" --target $(printf 'test_%s_cpu ' $tests)
} >$log 2>&1 || { cat $log && exit 1; }
run_tests baseline build/cpp-aarch64 qemu-aarch64 -L /usr/aarch64-linux-gnu
