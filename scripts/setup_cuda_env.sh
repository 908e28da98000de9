#!/usr/bin/env bash
# Makes the second Python environment, with the CUDA build of a torch newer than the one in requirements.txt: for checking
# the CUDA build and that one wheel serves every newer torch. Needs no GPU. Prints nothing when it is up to date.
#
#   scripts/setup_cuda_env.sh build/venv-cuda
#
# PYTHON names the interpreter for a new environment (default python3). It takes 5 GB and a minute or two.
set -euo pipefail
cd "$(dirname "$0")/.."

environment=${1:?usage: scripts/setup_cuda_env.sh ENVIRONMENT}
python=${PYTHON:-python3}
torch=torch==2.14.1
packages=(pybind11 cmake ninja setuptools wheel nvtx numpy pytest pytest-xdist hypothesis safetensors)

stop() {
  echo "selfforcing_ext: $*" >&2
  exit 1
}

stamp=$environment/.selfforcing-cuda-env
wanted="$torch $(sha256sum <requirements.txt)"
[ -x "$environment/bin/python" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && exit 0

[ -x "$environment/bin/python" ] || "$python" -m venv "$environment" || stop "$python could not make an environment"
echo "Installing $torch (its CUDA build, 5 GB) into $environment (once)"
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
grep -v '^torch==' requirements.txt >"$constraints"
"$environment/bin/python" -m pip install --quiet --disable-pip-version-check "$torch" "${packages[@]}" \
  --constraint "$constraints" ||
  stop "pip could not install $torch with ${packages[*]} into $environment (its message stands above)"
"$environment/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' ||
  stop "$torch installed without CUDA from this package index; the CUDA build cannot be checked with it"
echo "$wanted" >"$stamp"
