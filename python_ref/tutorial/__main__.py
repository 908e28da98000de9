"""Runs the walk-through of docs/tutorial.md: `python -m python_ref.tutorial --output outputs/tutorial`."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_page(page: Path, folder: Path) -> None:
    """Runs the Python blocks of a page one after the other, in one namespace and in a folder."""
    text = page.read_text(encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    namespace = {"__name__": page.stem}
    before = Path.cwd()
    os.chdir(folder)
    try:
        for block in PYTHON_BLOCK.finditer(text):
            lines_before = text.count("\n", 0, block.start(1))  # errors then name the line of the page
            exec(compile("\n" * lines_before + block[1], str(page), "exec"), namespace)
    finally:
        os.chdir(before)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m python_ref.tutorial", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs/tutorial"), help="where its pictures go")
    run_page(PAGE, parser.parse_args(arguments).output)


if __name__ == "__main__":
    main()
