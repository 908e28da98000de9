#!/usr/bin/env bash
# Builds one wheel against the torch of .venv and runs the CPU tests of the ops with it under the newer torch of the
# second environment: the stable ABI keeps its promise.
#
#   scripts/check_wheel.sh
#
# VENV names the environment that builds (default .venv), SELFFORCING_CUDA_VENV the one that runs (default
# build/venv-cuda, made when missing).
set -euo pipefail
cd "$(dirname "$0")/.."

builder=$(realpath "${VENV:-.venv}")
environment=${SELFFORCING_CUDA_VENV:-build/venv-cuda}
scripts/setup_cuda_env.sh "$environment"
environment=$(realpath "$environment")

wheels=build/wheels
tree=build/wheel-check # the wheel and the tests, without the sources beside them
rm -rf "$wheels" "$tree"
MAX_JOBS=${MAX_JOBS:-2} SELFFORCING_CUDA=0 PATH=$builder/bin:$PATH \
  python -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir "$wheels" .
mkdir -p "$tree"
"$environment/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$tree" "$wheels"/*.whl
cp -r tests pyproject.toml "$tree"
cd "$tree"
echo "$(basename ../wheels/*.whl), built with torch $("$builder/bin/python" -c 'import torch; print(torch.__version__)')," \
  "under torch $("$environment/bin/python" -c 'import torch; print(torch.__version__)')"
PYTHONPATH=$PWD "$environment/bin/python" -m pytest -q -p no:cacheprovider \
  tests/test_attention.py tests/test_kv_cache.py tests/test_rope.py tests/test_denoise.py tests/test_modulate.py
