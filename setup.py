"""Builds the compiled part: finds torch, pybind11 and (if wanted) nvcc, then drives CMakeLists.txt with ninja.

SELFFORCING_CUDA=1 builds the CUDA part, SELFFORCING_CUDA=0 leaves it out; unset: built when a CUDA torch and a toolkit
of its major version are there. A GPU need not be present. TORCH_CUDA_ARCH_LIST names the architectures, MAX_JOBS limits
the number of compilers at work.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = "8.0;9.0a"


def stop(sentence: str) -> None:
    raise SystemExit(f"selfforcing_ext: {sentence}")


def find_torch() -> tuple[Path, str, str | None]:
    """Folder of the torch package, its version and the CUDA version it was built for."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        stop("torch is not installed in this Python; install torch first, then build with --no-build-isolation")
    version: dict[str, str | None] = {}
    folder = Path(spec.origin).parent
    exec((folder / "version.py").read_text(), version)  # importing torch itself would take seconds
    number = re.match(r"(\d+)\.(\d+)", str(version["__version__"]))
    if number is None or (int(number[1]), int(number[2])) < (2, 11):
        stop(f"torch is {version['__version__']}, but must be 2.11 or newer (the stable ABI it is built against)")
    return folder, str(version["__version__"]), version.get("cuda")


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [Path(home) / "bin" / "nvcc"] if home else []
    on_path = shutil.which("nvcc")
    candidates += [Path(on_path)] if on_path else [Path("/usr/local/cuda/bin/nvcc")]
    return next((str(path) for path in candidates if path.exists()), None)


def cuda_arguments(torch_cuda: str | None) -> list[str]:
    """CMake arguments for the CUDA part, or for leaving it out."""
    wanted = os.environ.get("SELFFORCING_CUDA", "")
    if wanted not in ("", "0", "1"):
        stop(f"SELFFORCING_CUDA is {wanted!r}, but must be 0 or 1")
    off = ["-DSELFFORCING_CUDA=OFF"]
    if wanted == "0" or (wanted == "" and torch_cuda is None):
        return off
    if torch_cuda is None:
        stop("SELFFORCING_CUDA is 1, but this torch was built without CUDA; install a CUDA build of torch")
    nvcc = find_nvcc()
    if nvcc is None:
        if wanted == "":
            return off
        stop("SELFFORCING_CUDA is 1, but nvcc was not found; set CUDA_HOME to the toolkit's folder")
    release = re.search(r"release (\d+)\.(\d+)", subprocess.check_output([nvcc, "--version"], text=True))
    if release is None or release[1] != torch_cuda.split(".")[0]:
        found = f"{release[1]}.{release[2]}" if release else "of unknown version"
        sentence = f"torch was built for CUDA {torch_cuda}, but the toolkit at {nvcc} is {found}; the major must match"
        if wanted == "1":
            stop(sentence)
        print(f"selfforcing_ext: building without CUDA: {sentence}", file=sys.stderr)
        return off
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES).replace(" ", ";")
    names = [name.lower().removesuffix("+ptx") for name in listed.split(";") if name]
    if not names or not all(re.fullmatch(r"\d+\.\d[af]?", name) for name in names):
        stop(f"TORCH_CUDA_ARCH_LIST is {listed!r}, but must list architectures such as 8.0;9.0a")
    architectures = ";".join(name.replace(".", "") for name in names)
    return ["-DSELFFORCING_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={architectures}"]


def changes_cuda_compiler(cache: Path, arguments: list[str]) -> bool:
    """Whether the arguments name another nvcc than the one that the cache was made with."""
    prefix = "-DCMAKE_CUDA_COMPILER="
    nvcc = next((argument.removeprefix(prefix) for argument in arguments if argument.startswith(prefix)), None)
    if nvcc is None or not cache.exists():
        return False
    return re.search(rf"^CMAKE_CUDA_COMPILER:\w+={re.escape(nvcc)}$", cache.read_text(), re.MULTILINE) is None


class CMakeBuild(build_ext):
    """One CMake run makes every shared object; the extensions listed below only tell setuptools their names."""

    def run(self) -> None:
        self.into_source = bool(self.inplace)  # setuptools clears `inplace` while it builds
        super().run()

    def build_extension(self, extension: Extension) -> None:
        built = Path(self.get_ext_fullpath(extension.name)).resolve().parent
        output = ROOT / "selfforcing_ext" if self.into_source else built
        if shutil.which(os.environ.get("CXX", "c++")) is None:
            stop(f"no C++ compiler ({os.environ.get('CXX', 'c++')}) was found; install g++ 11 or newer, or set CXX")
        try:
            import pybind11
        except ImportError:
            stop("pybind11 is not installed in this Python; run `pip install pybind11 cmake ninja` first")
        for tool in ("cmake", "ninja"):
            if shutil.which(tool) is None:
                stop(f"{tool} was not found; run `pip install {tool}` first")
        torch, torch_version, torch_cuda = find_torch()
        build = ROOT / "build" / f"{'inplace' if self.into_source else 'wheel'}-{sys.implementation.cache_tag}"
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSELFFORCING_TORCH_DIR={torch}",
            f"-DSELFFORCING_TORCH_VERSION={torch_version}",
            f"-DSELFFORCING_OUTPUT_DIR={output}",
            *cuda_arguments(torch_cuda),
        ]
        if changes_cuda_compiler(build / "CMakeCache.txt", configure):
            configure.append("--fresh")  # else CMake starts anew by itself and forgets the arguments
        jobs = os.environ.get("MAX_JOBS")
        for command in (configure, ["cmake", "--build", str(build), *(["-j", jobs] if jobs else [])]):
            if subprocess.run(command).returncode:
                stop(f"the build failed (its messages stand above): {' '.join(command[:4])} ...")

    def copy_extensions_to_source(self) -> None:
        """In-place builds already wrote into the package's folder."""


if int(setuptools.__version__.split(".")[0]) < 77:  # older ones cannot read pyproject.toml
    stop(f"setuptools is {setuptools.__version__}, but must be 77 or newer; run `pip install --upgrade setuptools`")
setup(ext_modules=[Extension("selfforcing_ext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
