#!/usr/bin/env bash
# Makes the project's Python environment, or checks one that the user brings.
#
#   scripts/setup_env.sh .venv              makes or updates .venv from requirements.txt (exact versions)
#   scripts/setup_env.sh /my/environment    only looks whether it has what is needed
#
# PYTHON names the interpreter for a new environment (default python3). A stamp file in the environment holds the checksum
# of the requirements that were installed, so a second call does nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

environment=${1:?usage: scripts/setup_env.sh ENVIRONMENT}
python=${PYTHON:-python3}
requirements=requirements.txt

stop() {
  echo "selfforcing_ext: $*" >&2
  exit 1
}

compiler=${CXX:-c++}
command -v "$compiler" >/dev/null ||
  stop "no C++ compiler ($compiler) was found; install g++ 11 or newer, or set CXX to one"

if [ "$environment" != .venv ]; then
  [ -x "$environment/bin/python" ] || stop "VENV is $environment, but there is no $environment/bin/python"
  missing=$("$environment/bin/python" - <<'PYTHON'
import importlib.util
needed = ["torch", "setuptools", "pybind11", "cmake", "ninja", "nvtx", "numpy", "safetensors", "sklearn", "omegaconf",
          "rich", "tqdm", "tensorboard", "matplotlib", "av", "imageio", "pytest", "hypothesis"]
print(" ".join(name for name in needed if importlib.util.find_spec(name) is None))
PYTHON
  )
  [ -z "$missing" ] || stop "VENV is $environment, which lacks: $missing (requirements.txt lists tried versions)"
  exit 0
fi

stamp=$environment/.requirements.sha256
wanted=$(sha256sum <"$requirements")
[ -x "$environment/bin/python" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && exit 0

command -v "$python" >/dev/null || stop "Python ($python) was not found; install Python 3.10 or newer, or set PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  stop "$python is $("$python" -V 2>&1), but must be Python 3.10 or newer; set PYTHON to one, such as PYTHON=python3.12"
if [ ! -x "$environment/bin/python" ]; then
  "$python" -m venv "$environment" ||
    stop "$python could not make an environment; install its venv module (python3-venv on Debian and Ubuntu)"
fi
echo "Installing the pinned packages into $environment (once)"
"$environment/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements" ||
  stop "pip could not install $requirements into $environment (its message stands above)"
echo "$wanted" >"$stamp"
