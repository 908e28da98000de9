#!/usr/bin/env bash
# Builds the whole extension with CUDA against a CUDA build of torch, imports it, and checks that every op has a CPU and a
# CUDA kernel and that the CPU ones run there. Needs nvcc but no GPU.
#
#   scripts/check_cuda_build.sh
#
# SELFFORCING_CUDA_VENV names the environment (default build/venv-cuda, made when missing); MAX_JOBS the number of
# compilers at work. Without nvcc this is skipped with a warning, and fails where CI=true.
set -euo pipefail
cd "$(dirname "$0")/.."

nvcc=${CUDA_HOME:+$CUDA_HOME/bin/nvcc}
nvcc=${nvcc:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
if [ ! -x "$nvcc" ]; then
  echo "selfforcing_ext: WARNING: nvcc was not found, so the CUDA build was NOT CHECKED; set CUDA_HOME to a toolkit" >&2
  [ "${CI:-}" != true ] || exit 1
  exit 0
fi
# Named, not guessed: torch's own search may find the folder of a wrapper script or of another version.
CUDA_HOME=${CUDA_HOME:-$("$nvcc" --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p' | xargs realpath)}
export CUDA_HOME

environment=${SELFFORCING_CUDA_VENV:-build/venv-cuda}
scripts/setup_cuda_env.sh "$environment"
environment=$(realpath "$environment")
site=$PWD/build/cuda-check
rm -rf "$site"
export PATH=$environment/bin:$PATH MAX_JOBS=${MAX_JOBS:-2} SELFFORCING_CUDA=1
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-8.0;9.0a}
echo "Building with $("$nvcc" --version | sed -n 's/.*release \([0-9.]*\).*/nvcc \1/p') for $TORCH_CUDA_ARCH_LIST"
python setup.py -q build --build-base build/cuda-check-base --build-lib "$site"
python scripts/check_registration.py "$site"
echo "_ops_cuda.so has $(stat -c %s "$site"/selfforcing_ext/_ops_cuda.so) bytes, the package compressed" \
  "$(tar -cz -C "$site/selfforcing_ext" . | wc -c)"
