"""The documentation is true: its Python runs and prints what the pages say, its shell commands exist, its links lead
somewhere.

The Python blocks of a page run in order in one namespace, in an empty folder. Where the lines that print say what in a
comment (``print(1 + 1)  # 2``, or ``# 2: an explanation``), the output must be that. A block that cannot run here has a
comment before it that says why: ``<!-- not run: needs a GPU -->``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import selfforcing_ext

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MOST_NOT_RUN = 6

FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->\s*\Z", re.DOTALL)
PROMISE = re.compile(r"^.*print\(.*\)  # (.+)$", re.MULTILINE)
ENTRY = re.compile(r"^::: (\S+)$", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str
    not_run: str | None  # why

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        indent, language, code = match.groups()
        reason = NOT_RUN.search(text, 0, match.start())
        code = re.sub(rf"^{indent}", "", code, flags=re.MULTILINE)
        line = text.count("\n", 0, match.start()) + 1
        yield Block(page, line, language, code, reason[1] if reason else None)


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def blocks_in(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language and block.not_run is None]


PYTHON = {str(page.relative_to(ROOT)): [block for block in blocks_in("python") if block.page == page] for page in PAGES}


@pytest.mark.parametrize("page", [page for page, blocks in PYTHON.items() if blocks])
def test_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    namespace: dict[str, object] = {"__name__": "documentation"}
    for block in PYTHON[page]:
        printed = io.StringIO()
        # Line numbers of errors are those of the page.
        code = compile("\n" * block.line + block.text, str(block.page), "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        lines, promised = printed.getvalue().splitlines(), PROMISE.findall(block.text)
        if promised:
            assert len(lines) == len(promised), (str(block), lines)
        for line, promise in zip(lines, promised, strict=False):
            assert promise == line or promise.startswith(f"{line}: "), (str(block), line)


@pytest.mark.parametrize("block", blocks_in("bash"), ids=str)
def test_shell_commands_exist(block: Block):
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    targets = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets is not None
    for line in block.text.replace("\\\n", " ").splitlines():
        words = [word for word in shlex.split(line, comments=True) if not re.match(r"[A-Z_]+=", word)]
        match words:
            case ["make", *wanted]:
                assert set(wanted) <= set(targets[1].split()), line
            case ["python", "-m", module, *_]:
                assert importlib.util.find_spec(module) is not None, line
            case ["python" | "bash", script, *_] if not script.startswith("-"):
                assert (ROOT / script).is_file(), line
            case [command, *_] if "/" in command:
                assert (ROOT / command).is_file(), line


def test_every_public_name_has_an_entry():
    entries = {name for page in PAGES for name in ENTRY.findall(page.read_text(encoding="utf-8"))}
    assert {f"selfforcing_ext.{name}" for name in selfforcing_ext.__all__} <= entries


def test_blocks_that_do_not_run_are_few():
    not_run = {str(block): block.not_run for block in BLOCKS if block.not_run is not None}
    assert len(not_run) <= MOST_NOT_RUN, not_run


def test_every_block_says_what_it_is():
    assert {block.language for block in BLOCKS} <= {"python", "bash", "text", "yaml", "diff"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    missing = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if not (page.parent / link).exists()]
    assert not missing


def test_the_checks_see_what_is_wrong(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("<!-- not run: why -->\n\n```bash\nmake\n```\n\n- item\n\n  ```python\n  print(2)  # 3\n  ```\n")
    first, second = blocks_of(page)
    assert (first.not_run, first.language, first.line) == ("why", "bash", 3)
    assert (second.not_run, second.text, PROMISE.findall(second.text)) == (None, "print(2)  # 3\n", ["3"])


SAMPLE = '''
def rotate(
    q: Tensor,  # [B, Lq, D]
    k: Tensor,  # [B, Lk, D]
    v: Tensor,  # [B, Lk, D]
    angle: float = 0.0,
    mask: Tensor | None = None,  # bool [Lq, Lk]
) -> Tensor:  # [B, Lq, D]
    """Rotates.

    Args:
        q, k: of one dtype, float32 [1] for instance.
        {name}: in radians.

    Raises:
        TypeError, ValueError: the arguments do not fit.
    """
'''


def test_shapes_in_comments_are_documented(tmp_path: Path):
    griffe = pytest.importorskip("griffe")
    extensions = griffe.load_extensions(str(ROOT / "scripts" / "docs_shapes.py"))
    (tmp_path / "sample.py").write_text(SAMPLE.format(name="angle"))
    function = griffe.load("sample", search_paths=[tmp_path], extensions=extensions)["rotate"]
    text, parameters, returns, raises = (section.value for section in function.docstring.parsed)
    assert text == "Rotates."
    assert [(entry.name, str(entry.annotation), entry.description) for entry in parameters] == [
        ("q, k", "Tensor", "q `[B, Lq, D]`; k `[B, Lk, D]`; of one dtype, float32 `[1]` for instance."),
        ("angle", "float", "in radians."),
        ("v", "Tensor", "`[B, Lk, D]`"),
        ("mask", "Tensor | None", "bool `[Lq, Lk]`"),
    ]
    assert [entry.description for entry in returns] == ["`[B, Lq, D]`"]
    assert [entry.annotation for entry in raises] == ["TypeError, ValueError"]

    (tmp_path / "sample.py").write_text(SAMPLE.format(name="angel"))
    with pytest.raises(ValueError, match=r"describes \{'angel'\}, but the arguments are"):
        griffe.load("sample", search_paths=[tmp_path], extensions=extensions)
