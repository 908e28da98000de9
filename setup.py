"""Builds the compiled part: finds torch, pybind11 and (if wanted) nvcc, then drives CMakeLists.txt with ninja.

SELFFORCING_CUDA=1 builds the CUDA part, SELFFORCING_CUDA=0 leaves it out; unset: built when a CUDA torch and a toolkit
of its major version are there. A GPU need not be present. TORCH_CUDA_ARCH_LIST names the architectures, MAX_JOBS limits
the number of compilers at work.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = "8.0;9.0a"


def stop(sentence: str) -> None:
    raise SystemExit(f"selfforcing_ext: {sentence}")


def find_torch() -> tuple[Path, str, str | None]:
    """Folder of the torch package, its version and the CUDA version it was built for."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        stop("torch was not found; install it, then build with --no-build-isolation, so that the build sees it")
    version: dict[str, str | None] = {}
    folder = Path(spec.origin).parent
    exec((folder / "version.py").read_text(), version)  # importing torch itself would take seconds
    number = re.match(r"(\d+)\.(\d+)", str(version["__version__"]))
    if number is None or (int(number[1]), int(number[2])) < (2, 11):
        stop(f"torch is {version['__version__']}, but must be 2.11 or newer (the stable ABI it is built against)")
    return folder, str(version["__version__"]), version.get("cuda")


def find_compiler() -> None:
    compiler = os.environ.get("CXX") or "c++"
    if shutil.which(shlex.split(compiler)[0]) is None:  # it may have arguments
        stop(f"no C++ compiler ({compiler}) was found; install g++ 11 or newer, or set CXX")


def find_tools() -> str:
    """Folder of pybind11's CMake files; cmake and ninja only have to be there."""
    missing = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
    if importlib.util.find_spec("pybind11") is None:
        missing.insert(0, "pybind11")
    if missing:
        stop(f"{', '.join(missing)} not found; run `pip install {' '.join(missing)}` first")
    import pybind11

    return pybind11.get_cmake_dir()


def find_nvcc() -> tuple[str | None, str]:
    """nvcc, and where it was looked for. CUDA_HOME is taken at its word."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=f"{home}/bin"), f"in {home}/bin"
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc"), "on PATH or in /usr/local/cuda"


def wanted_cuda() -> str:
    """SELFFORCING_CUDA: "1", "0", or "" where the build decides."""
    wanted = os.environ.get("SELFFORCING_CUDA", "")
    if wanted not in ("", "0", "1"):
        stop(f"SELFFORCING_CUDA is {wanted!r}, but must be 0 or 1")
    return wanted


def obstacle_to_cuda(torch_cuda: str | None, nvcc: str | None, looked: str) -> str | None:
    """Why the CUDA part cannot be built; None if nothing is in the way."""
    if torch_cuda is None:
        return "this torch was built without CUDA; install a CUDA build of torch"
    if nvcc is None:
        return f"nvcc was not found {looked}; set CUDA_HOME to the folder of a CUDA {torch_cuda} toolkit"
    release = re.search(r"release (\d+)\.(\d+)", subprocess.check_output([nvcc, "--version"], text=True))
    if release is None or release[1] != torch_cuda.split(".")[0]:
        found = f"{release[1]}.{release[2]}" if release else "of unknown version"
        return f"torch was built for CUDA {torch_cuda} and the toolkit at {nvcc} is {found}; the major must match"
    return None


def cuda_arguments(torch_cuda: str | None) -> list[str]:
    """CMake arguments for the CUDA part, or for leaving it out."""
    wanted = wanted_cuda()
    off = ["-DSELFFORCING_CUDA=OFF"]
    if wanted == "0" or (wanted == "" and torch_cuda is None):
        return off
    nvcc, looked = find_nvcc()
    obstacle = obstacle_to_cuda(torch_cuda, nvcc, looked)
    if obstacle is not None:
        if wanted == "1":
            stop(f"SELFFORCING_CUDA is 1, but {obstacle}")
        print(f"selfforcing_ext: building without CUDA: {obstacle}", file=sys.stderr)
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


class CleanBuild(build):
    """A build for a wheel: what an earlier one left in its folder would get into the wheel, too."""

    def run(self) -> None:
        for package in self.distribution.packages or []:
            if "." not in package:
                shutil.rmtree(Path(self.build_lib, package), ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """One CMake run makes every shared object; the extensions listed below only tell setuptools their names."""

    def run(self) -> None:
        self.into_source = bool(self.inplace)  # setuptools clears `inplace` while it builds
        super().run()

    def build_extension(self, extension: Extension) -> None:
        built = Path(self.get_ext_fullpath(extension.name)).resolve().parent
        output = ROOT / "selfforcing_ext" if self.into_source else built
        wanted_cuda()  # a typing error is said first of all
        find_compiler()
        pybind11_cmake = find_tools()
        torch, torch_version, torch_cuda = find_torch()
        cuda = cuda_arguments(torch_cuda)
        if "-DSELFFORCING_CUDA=OFF" in cuda:  # else the package would load the one of an earlier build
            (output / "_ops_cuda.so").unlink(missing_ok=True)
        work = ROOT / "build" / f"{'inplace' if self.into_source else 'wheel'}-{sys.implementation.cache_tag}"
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(work), "-G", "Ninja"),
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11_cmake}",
            f"-DSELFFORCING_TORCH_DIR={torch}",
            f"-DSELFFORCING_TORCH_VERSION={torch_version}",
            f"-DSELFFORCING_OUTPUT_DIR={output}",
            *cuda,
        ]
        if changes_cuda_compiler(work / "CMakeCache.txt", configure):
            configure.append("--fresh")  # else CMake starts anew by itself and forgets the arguments
        jobs = os.environ.get("MAX_JOBS")
        for command in (configure, ["cmake", "--build", str(work), *(["-j", jobs] if jobs else [])]):
            if subprocess.run(command).returncode:
                stop(f"the build failed (its messages stand above): {' '.join(command[:4])} ...")

    def copy_extensions_to_source(self) -> None:
        """In-place builds already wrote into the package's folder."""


if int(setuptools.__version__.split(".")[0]) < 77:  # older ones cannot read pyproject.toml
    stop(f"setuptools is {setuptools.__version__}, but must be 77 or newer; run `pip install --upgrade setuptools`")
setup(
    ext_modules=[Extension("selfforcing_ext._C", sources=[])], cmdclass={"build": CleanBuild, "build_ext": CMakeBuild}
)
