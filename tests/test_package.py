"""The package and its build from outside: what needs no compiled part, and what is said when something lacks."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import selfforcing_ext

ROOT = Path(__file__).parents[1]
HOW_TO_BUILD = "run `make build` in the source tree, or `pip install --no-build-isolation .`"


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.fixture
def without_compiled_part(tmp_path: Path) -> dict[str, str]:
    """An environment in which the package has its Python files alone."""
    shutil.copytree(ROOT / "selfforcing_ext", tmp_path / "selfforcing_ext", ignore=shutil.ignore_patterns("*.so"))
    return {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}


def python(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, cwd="/", check=False
    )


def test_masks_need_no_compiled_part(without_compiled_part):
    code = "import selfforcing_ext as s; print(s.BlockCausalMask(3, 2).dense().sum().item())"
    result = python(code, without_compiled_part)
    assert result.stdout.split() == ["24"], result.stderr


@pytest.mark.parametrize(
    "name", ["block_causal_attention", "PagedKVCache", "rope_3d", "denoise_step", "gated_residual"]
)
def test_a_missing_compiled_part_is_said(name, without_compiled_part):
    result = python(f"from selfforcing_ext import {name}", without_compiled_part)
    assert "ImportError: the compiled part of selfforcing_ext cannot be loaded" in result.stderr
    assert HOW_TO_BUILD in result.stderr


USE = "from selfforcing_ext import rope_3d"


@pytest.fixture
def with_compiled_module(without_compiled_part, tmp_path) -> dict[str, str]:
    """The same with the Python module, and without the ops beside it."""
    module = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    shutil.copy(ROOT / "selfforcing_ext" / module, tmp_path / "selfforcing_ext")
    return without_compiled_part


def test_an_old_torch_is_said():
    result = python(f"import torch; torch.__version__ = '2.10.0+cu128'; {USE}", {"PYTHONPATH": str(ROOT)})
    last = result.stderr.splitlines()[-1]
    assert last == "ImportError: torch is 2.10.0+cu128, but selfforcing_ext needs torch 2.11 or newer"


def test_a_newer_torch_is_not_taken_for_an_old_one():
    result = python(f"import torch; torch.__version__ = '10.0.0a0+git'; {USE}", {"PYTHONPATH": str(ROOT)})
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("content", [None, "no shared object"])
def test_ops_that_cannot_be_loaded_are_said(with_compiled_module, tmp_path, content):
    if content is not None:
        (tmp_path / "selfforcing_ext" / "_ops_cpu.so").write_text(content)
    last = python(USE, with_compiled_module).stderr.splitlines()[-1]
    assert last.startswith("ImportError: _ops_cpu.so of selfforcing_ext cannot be loaded under torch")
    assert last.endswith(HOW_TO_BUILD)


def test_a_torch_of_another_cuda_is_said(with_compiled_module, tmp_path):
    shutil.copy(ROOT / "selfforcing_ext" / "_ops_cpu.so", tmp_path / "selfforcing_ext")
    (tmp_path / "selfforcing_ext" / "_ops_cuda.so").touch()
    setting = "import torch; torch.version.cuda = '12.6'; import selfforcing_ext._C as c; c.cuda_toolkit = '13.0.88'"
    last = python(f"{setting}; {USE}", with_compiled_module).stderr.splitlines()[-1]
    assert last.startswith("ImportError: selfforcing_ext was built with CUDA 13.0.88, but torch")
    assert "brings CUDA 12.6; the major must match" in last


def test_every_public_name_is_there():
    for name in selfforcing_ext.__all__:
        assert getattr(selfforcing_ext, name).__doc__
    with pytest.raises(AttributeError, match="module 'selfforcing_ext' has no attribute 'rope_2d'"):
        _ = selfforcing_ext.rope_2d


@pytest.fixture
def machine(tmp_path: Path):
    """A PATH that holds these programs alone, and scripts under other names."""

    def make(*programs: str, **scripts: str) -> str:
        for program in ("bash", "env", "dirname", "cat", "sha256sum", *programs):
            (tmp_path / program).symlink_to(shutil.which(program))
        for name, body in scripts.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
            (tmp_path / name).chmod(0o755)
        return str(tmp_path)

    return make


SETUP = ROOT / "scripts" / "setup_env.sh"


def test_a_missing_compiler_is_said(machine):
    result = run(SETUP, ".venv", PATH=machine("python3"), CXX="")
    assert result.returncode == 1
    assert result.stderr == (
        "selfforcing_ext: no C++ compiler (c++) was found; install g++ 11 or newer, or set CXX to one\n"
    )


def test_too_old_a_python_is_said(machine, tmp_path):
    old = 'if [ "$1" = -V ]; then echo "Python 3.8.10"; else exit 1; fi'
    tree = tmp_path / "tree"
    (tree / "scripts").mkdir(parents=True)
    shutil.copy(SETUP, tree / "scripts")
    shutil.copy(ROOT / "requirements.txt", tree)
    command = [tree / "scripts" / "setup_env.sh", ".venv"]
    result = run(*command, PATH=machine("c++", python3=old), PYTHON="python3", CXX="c++")
    assert result.returncode == 1
    assert result.stderr.startswith("selfforcing_ext: python3 is Python 3.8.10, but must be Python 3.10 or newer")
    assert result.stderr.count("\n") == 1
    assert not (tree / ".venv").exists()


def test_contributing_is_true():
    """Files, names in them and make targets that the guide speaks of are there; its example, "gain", is not."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    paths = set(re.findall(r"`((?:\.ci|[\w.]+)/[\w./]*|\w+\.(?:txt|md))`", prose)) | set(
        re.findall(r"\]\(([^)]+)\)", prose)
    )
    missing = {
        path for path in paths if "gain" not in path and not path.startswith("build/") and not (ROOT / path).exists()
    }
    assert not missing
    assert len(paths) > 20
    for name, path in re.findall(r"`(\w+)` (?:of|in) `([\w/.]+)`", prose):
        assert name in (ROOT / path).read_text(), (name, path)
    for name in re.findall(r"`(SELFFORCING_[A-Z_]+SOURCES|SELFFORCING_OPS)`", prose):
        assert f"set({name}" in (ROOT / "CMakeLists.txt").read_text(), name
    targets = re.findall(r"^make (\w+)", text, re.MULTILINE)
    assert {f"\n{target}:" in (ROOT / "Makefile").read_text() for target in targets} == {True}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        ast.parse(code)


def test_no_registry_is_named():
    """Packages come from the index that pip is set up with."""
    for path in (
        *ROOT.glob("*.txt"),
        *ROOT.glob("*.toml"),
        ROOT / "Makefile",
        ROOT / "setup.py",
        *ROOT.glob("scripts/*"),
    ):
        if path.is_file():
            text = path.read_text()
            assert "index-url" not in text, path
            assert "pypi.org" not in text, path
