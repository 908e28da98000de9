"""What `pip install` says when something lacks, and what gets into the distributions.

With stand-ins for torch, nvcc and cmake: nothing is compiled here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import selfforcing_ext

ROOT = Path(__file__).parents[1]
SOURCES = (
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
    "CMakeLists.txt",
    "requirements.txt",
)
BUILD_SETTINGS = ("CXX", "CUDA_HOME", "CUDA_PATH", "SELFFORCING_CUDA", "TORCH_CUDA_ARCH_LIST")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what a distribution is made from."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, tree)
    for folder in ("csrc", "selfforcing_ext", "python_ref"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tree


@pytest.fixture
def setup(tree: Path, tmp_path: Path):
    """Runs setup.py there; packages without a version are hidden, torch is a stand-in of the version given."""

    def run(
        *arguments: str, hidden: tuple[str, ...] = (), torch: str | None = None, cuda: str | None = None, **env: str
    ) -> subprocess.CompletedProcess[str]:
        stand_ins = tmp_path / "stand_ins"
        stand_ins.mkdir(exist_ok=True)
        lines = [f"import sys; sys.modules[{name!r}] = None" for name in hidden]
        (stand_ins / "sitecustomize.py").write_text("\n".join(lines))
        if torch is not None:
            (stand_ins / "torch").mkdir(exist_ok=True)
            (stand_ins / "torch" / "__init__.py").touch()
            (stand_ins / "torch" / "version.py").write_text(f"__version__ = {torch!r}\ncuda = {cuda!r}\n")
        environment = {name: value for name, value in os.environ.items() if name not in BUILD_SETTINGS}
        return subprocess.run(
            [sys.executable, "setup.py", "-q", *(arguments or ("build_ext",))],
            env=environment | {"PYTHONPATH": str(stand_ins)} | env,
            capture_output=True,
            text=True,
            cwd=tree,
            check=False,
        )

    return run


def program(folder: Path, name: str, body: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(body)
    (folder / name).chmod(0o755)
    return folder


def nvcc(home: Path, release: str) -> str:
    """A toolkit that says it is of this release, as CUDA_HOME."""
    program(home / "bin", "nvcc", f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    return str(home)


def assert_said(result: subprocess.CompletedProcess[str], sentence: str) -> None:
    """The build ended with this one sentence and nothing else."""
    assert result.returncode == 1, result.stdout
    assert result.stderr.splitlines()[-1] == f"selfforcing_ext: {sentence}"
    assert "Traceback" not in result.stderr


def test_no_torch(setup):
    sentence = "torch was not found; install it, then build with --no-build-isolation, so that the build sees it"
    assert_said(setup(hidden=("torch",)), sentence)


def test_old_torch(setup):
    sentence = "torch is 2.10.0+cu128, but must be 2.11 or newer (the stable ABI it is built against)"
    assert_said(setup(torch="2.10.0+cu128"), sentence)


def test_no_compiler(setup, tmp_path):
    sentence = "no C++ compiler ({}) was found; install g++ 11 or newer, or set CXX"
    assert_said(setup(PATH=str(tmp_path)), sentence.format("c++"))
    assert_said(setup(CXX="no-such-compiler -m64"), sentence.format("no-such-compiler -m64"))


@pytest.mark.parametrize(
    ("lacking", "sentence"),
    [
        (("cmake",), "cmake not found; run `pip install cmake` first"),
        (("ninja",), "ninja not found; run `pip install ninja` first"),
        (("pybind11",), "pybind11 not found; run `pip install pybind11` first"),
        (
            ("pybind11", "cmake", "ninja"),
            "pybind11, cmake, ninja not found; run `pip install pybind11 cmake ninja` first",
        ),
    ],
)
def test_no_tool(setup, tmp_path, lacking, sentence):
    for name in {"c++", "cmake", "ninja"} - set(lacking):
        program(tmp_path / "bin", name, "#!/bin/sh\n")
    assert_said(setup(hidden=lacking, PATH=str(tmp_path / "bin")), sentence)


def test_unknown_cuda_setting(setup):
    assert_said(setup(SELFFORCING_CUDA="2"), "SELFFORCING_CUDA is '2', but must be 0 or 1")


def test_cuda_wanted_under_a_cpu_torch(setup):
    sentence = "SELFFORCING_CUDA is 1, but this torch was built without CUDA; install a CUDA build of torch"
    assert_said(setup(torch="2.13.0+cpu", SELFFORCING_CUDA="1"), sentence)


def test_no_nvcc(setup, tmp_path):
    sentence = (
        f"SELFFORCING_CUDA is 1, but nvcc was not found in {tmp_path}/bin; "
        "set CUDA_HOME to the folder of a CUDA 13.0 toolkit"
    )
    assert_said(setup(torch="2.13.0", cuda="13.0", SELFFORCING_CUDA="1", CUDA_HOME=str(tmp_path)), sentence)


@pytest.mark.parametrize("release", ["12.8", "14.0"])
def test_toolkit_of_another_major(setup, tmp_path, release):
    home = nvcc(tmp_path / "cuda", release)
    sentence = (
        "SELFFORCING_CUDA is 1, but torch was built for CUDA 13.0 and the toolkit at "
        f"{home}/bin/nvcc is {release}; the major must match"
    )
    assert_said(setup(torch="2.13.0", cuda="13.0", SELFFORCING_CUDA="1", CUDA_HOME=home), sentence)


def test_unknown_architecture(setup, tmp_path):
    environment = {"CUDA_HOME": nvcc(tmp_path / "cuda", "13.0"), "TORCH_CUDA_ARCH_LIST": "8.0;Hopper"}
    sentence = "TORCH_CUDA_ARCH_LIST is '8.0;Hopper', but must list architectures such as 8.0;9.0a"
    assert_said(setup(torch="2.13.0", cuda="13.0", **environment), sentence)


# Writes what a build would, and its arguments.
CMAKE = f"""#!{sys.executable}
import sys
from pathlib import Path
settings = dict(argument[2:].split("=", 1) for argument in sys.argv if argument.startswith("-D"))
if settings:
    output = Path(settings["SELFFORCING_OUTPUT_DIR"])
    output.mkdir(parents=True, exist_ok=True)
    for name in ("_C.so", "_ops_cpu.so", *(["_ops_cuda.so"] if settings["SELFFORCING_CUDA"] == "ON" else [])):
        (output / name).write_text("new")
"""


@pytest.fixture
def cmake(tmp_path: Path) -> str:
    """A PATH with a cmake that compiles nothing."""
    folder = program(tmp_path / "bin", "cmake", CMAKE)
    program(folder, "ninja", "#!/bin/sh\n")
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def test_cuda_left_out_is_said(setup, tmp_path, cmake):
    home = nvcc(tmp_path / "cuda", "12.8")
    result = setup(torch="2.13.0", cuda="13.0", CUDA_HOME=home, PATH=cmake)
    assert result.returncode == 0, result.stderr
    assert "selfforcing_ext: building without CUDA: torch was built for CUDA 13.0 and the toolkit" in result.stderr


def test_a_failed_build_is_said(setup, tmp_path, cmake):
    program(tmp_path / "bin", "cmake", "#!/bin/sh\nexit 3\n")
    result = setup(torch="2.13.0", PATH=cmake)
    assert result.returncode == 1
    assert "selfforcing_ext: the build failed (its messages stand above): cmake -S" in result.stderr
    assert "Traceback" not in result.stderr


def test_pip_shows_the_sentence(tree):
    command = ["pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(tree / "out"), str(tree)]
    result = subprocess.run(
        [sys.executable, "-m", *command],
        env=os.environ | {"CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "selfforcing_ext: no C++ compiler (no-such-compiler) was found" in result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr


def test_a_cpu_wheel_holds_what_its_build_made(setup, tree, cmake):
    """Neither what a CUDA build left in the source folder, nor what an earlier wheel left in the build folder."""
    (tree / "selfforcing_ext" / "_ops_cuda.so").write_text("stale")
    assert setup("bdist_wheel", torch="2.13.0", cuda="13.0", SELFFORCING_CUDA="0", PATH=cmake).returncode == 0
    built = next(tree.glob("build/lib*")) / "selfforcing_ext"
    for name in ("_ops_cuda.so", "an_old_module.py"):
        (built / name).write_text("stale")
    result = setup("bdist_wheel", torch="2.13.0", cuda="13.0", SELFFORCING_CUDA="0", PATH=cmake)
    assert result.returncode == 0, result.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        shared_objects = {name: archive.read(name) for name in names if name.endswith(".so")}
    assert shared_objects == {"selfforcing_ext/_C.so": b"new", "selfforcing_ext/_ops_cpu.so": b"new"}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "selfforcing_ext").rglob("*.py*")}
    assert {name for name in names if name.startswith("selfforcing_ext/")} - set(shared_objects) == {
        name for name in modules if "__pycache__" not in name
    } | {"selfforcing_ext/py.typed"}
    assert f"-{selfforcing_ext.__version__}-" in wheel.name


def test_a_cpu_build_in_place_takes_the_cuda_ops_away(setup, tree, cmake):
    stale = tree / "selfforcing_ext" / "_ops_cuda.so"
    stale.write_text("stale")
    result = setup("build_ext", "--inplace", torch="2.13.0", PATH=cmake)
    assert result.returncode == 0, result.stderr
    assert not stale.exists()
    assert (tree / "selfforcing_ext" / "_ops_cpu.so").read_text() == "new"


def test_the_source_distribution_holds_all_sources(setup, tree):
    (tree / "selfforcing_ext" / "_ops_cuda.so").write_text("stale")
    result = setup("sdist")
    assert result.returncode == 0, result.stderr
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    sources = {
        path.relative_to(tree).as_posix()
        for folder in ("csrc", "selfforcing_ext", "python_ref")
        for path in (tree / folder).rglob("*")
        if path.is_file() and path.suffix != ".so"
    }
    assert sources | set(SOURCES) <= names
    assert not [name for name in names if name.endswith(".so")]
