#!/usr/bin/env bash
# Makes the source distribution, builds one wheel from it against the torch of .venv, lets auditwheel judge it, and runs the
# op tests with it under that torch and under the newer one of the second environment: the stable ABI keeps its promise.
#
#   scripts/check_wheel.sh
#
# VENV names the environment that builds (default .venv), SELFFORCING_CUDA_VENV the newer one (default build/venv-cuda, made
# when missing). More environments of the same Python, with another torch, can be given as arguments.
set -euo pipefail
cd "$(dirname "$0")/.."

stop() {
  echo "selfforcing_ext: $*" >&2
  exit 1
}

builder=$(realpath "${VENV:-.venv}")
newer=${SELFFORCING_CUDA_VENV:-build/venv-cuda}
scripts/setup_cuda_env.sh "$newer"
export PATH=$builder/bin:$PATH

# From the source distribution, so that a file which it lacks is missed.
work=build/wheel-check
rm -rf "$work"
python -m build --sdist --no-isolation --outdir "$work" . >"$work.log" 2>&1 || { cat "$work.log" && exit 1; }
MAX_JOBS=${MAX_JOBS:-2} SELFFORCING_CUDA=0 python -m pip wheel --quiet --disable-pip-version-check --no-build-isolation \
  --no-deps --wheel-dir "$work" "$work"/*.tar.gz

# torch stays outside; so would CUDA's libraries, of which a CPU wheel needs none.
auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' --wheel-dir "$work/repaired" "$work"/*.whl \
  >>"$work.log" 2>&1 || { cat "$work.log" && exit 1; }
wheel=$(realpath "$work"/repaired/*.whl)
[[ $wheel == *manylinux_* ]] || stop "$(basename "$wheel") has no manylinux tag: $(auditwheel show "$wheel")"
shared_objects=$(python -m zipfile --list "$wheel" | grep -o '^[^ ]*\.so[^ ]*' | sort | xargs)
wanted='^selfforcing_ext/_C\.[^ ]* selfforcing_ext/_ops_cpu\.so$'
[[ $shared_objects =~ $wanted ]] ||
  stop "$(basename "$wheel") should hold _C and _ops_cpu.so, but holds $shared_objects"
size=$(stat -c %s "$wheel")
[ "$size" -lt 5000000 ] || stop "$(basename "$wheel") has $size bytes, but should have less than 5000000"
echo "$(basename "$wheel"), $size bytes, holds $shared_objects"

tree=$work/tree # the wheel and the tests, without the sources beside them
mkdir -p "$tree"
python -m pip install --quiet --disable-pip-version-check --no-deps --target "$tree" "$wheel"
cp -r tests pyproject.toml "$tree"
for environment in "$builder" "$newer" "$@"; do
  python=$(realpath "$environment")/bin/python
  printf '\n%s under torch %s\n' "$(basename "$wheel")" "$("$python" -c 'import torch; print(torch.__version__)')"
  (
    cd "$tree"
    export PYTHONPATH=$PWD
    "$python" -m selfforcing_ext.info
    "$python" -m pytest -q -p no:cacheprovider tests/test_{attention,kv_cache,rope,denoise,modulate}.py
  )
done
