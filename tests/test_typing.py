"""Type hints from a user's point of view: a program under a strict checker, and the stub of the compiled module."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import mypy.api
import pytest

from selfforcing_ext import _C

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "tests" / "typed_program.py"
STUB = ast.parse((ROOT / "selfforcing_ext" / "_C.pyi").read_text())


def check(program: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What mypy has to say about a program of someone who has the package installed."""
    monkeypatch.setenv("MYPYPATH", str(ROOT))
    report, errors, _ = mypy.api.run(
        ["--strict", "--config-file=", f"--cache-dir={ROOT / '.mypy_cache' / 'user'}", str(program)]
    )
    assert not errors, errors
    return report


def test_a_users_program(monkeypatch: pytest.MonkeyPatch):
    assert check(PROGRAM, monkeypatch).startswith("Success")


def test_wrong_use_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The type: ignore comments of the program each stand for an error."""
    program = tmp_path / "program.py"
    text = PROGRAM.read_text()
    program.write_text(text.replace("  # type: ignore", "  # was ignored"))
    lines = [number for number, line in enumerate(text.splitlines(), 1) if "type: ignore[" in line]
    reported = re.findall(r"^.*?:(\d+): error", check(program, monkeypatch), re.MULTILINE)
    assert list(map(int, reported)) == lines


def members(body: list[ast.stmt]) -> dict[str, list[str] | None]:
    """Names that a stub declares, functions with the names of their arguments."""
    names: dict[str, list[str] | None] = {}
    for node in body:
        if isinstance(node, ast.AnnAssign):
            assert isinstance(node.target, ast.Name)
            names[node.target.id] = None
        elif isinstance(node, ast.FunctionDef):
            is_property = any(isinstance(decorator, ast.Name) for decorator in node.decorator_list)
            names[node.name] = None if is_property else [argument.arg for argument in node.args.args]
        elif isinstance(node, ast.ClassDef):
            names[node.name] = None
    return names


def test_the_stub_declares_what_is_there():
    (page_table,) = (node for node in STUB.body if isinstance(node, ast.ClassDef))
    for declared, present in ((members(STUB.body), _C), (members(page_table.body), _C.PageTable)):
        assert declared.keys() - {"__init__"} == {name for name in vars(present) if not name.startswith("_")}
        for name, arguments in declared.items():
            if arguments is not None:  # pybind11 writes the signature into the docstring
                signature = getattr(present, name).__doc__.splitlines()[0].rpartition(" -> ")[0]
                assert re.findall(r"[(,] ?(\w+): ", signature) == arguments, name
