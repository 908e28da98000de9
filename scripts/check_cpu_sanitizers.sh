#!/usr/bin/env bash
# The CPU kernels under sanitizers: the C++ tests of every op with AddressSanitizer and UndefinedBehaviorSanitizer, and
# with ThreadSanitizer, on every instruction set of this machine; and the Python parity tests on an extension built with
# the first two, where torch calls the same kernels.
#   scripts/check_cpu_sanitizers.sh PYTHON        PYTHON: with torch and what the tests need
# Needs g++, cmake and ninja.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$1")

# build NAME SANITIZERS ARGUMENT...
build() {
  local folder=build/$1 sanitizers=$2
  shift 2
  {
    cmake -S . -B "$folder" -G Ninja -DSELFFORCING_BUILD_TESTS=ON -DSELFFORCING_SANITIZE="$sanitizers" "$@"
    cmake --build "$folder" -j "${MAX_JOBS:-2}"
  } >"$folder.log" 2>&1 || { cat "$folder.log" && exit 1; }
}

package=$PWD/build/asan/package
torch=$("$python" -c 'import torch; print(torch.__path__[0])')
build asan address,undefined -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" \
  -Dpybind11_DIR="$("$python" -c 'import pybind11; print(pybind11.get_cmake_dir())')" \
  -DSELFFORCING_TORCH_DIR="$torch" -DSELFFORCING_OUTPUT_DIR="$package/selfforcing_ext"
ctest --test-dir build/asan -j "${MAX_JOBS:-2}" --output-on-failure --timeout 600 --quiet

build tsan thread -DSELFFORCING_TEST_LIMIT=1000000
ctest --test-dir build/tsan -j "${MAX_JOBS:-2}" --output-on-failure --timeout 600 --quiet

# A package of its own with the sanitized extension. Python is not built with the sanitizers, so their run-time is loaded
# before it; it is not asked about Python's own memory.
cp -r pyproject.toml python_ref tests "$package/"
cp -r selfforcing_ext/*.py selfforcing_ext/integrations "$package/selfforcing_ext/"
cd "$package"
LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
  UBSAN_OPTIONS=print_stacktrace=1 "$python" -m pytest -q -p no:cacheprovider -k "not every_instruction_set and not opcheck" \
  tests/test_attention.py tests/test_attention_past.py tests/test_fuzz_attention.py tests/test_kv_cache.py \
  tests/test_rope.py tests/test_denoise.py tests/test_modulate.py
