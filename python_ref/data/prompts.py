"""Prompts: the fixed set of evaluation, and prompts given by the user."""

from collections.abc import Sequence
from pathlib import Path

from python_ref.data.moving_digits import DIRECTIONS


def evaluation_prompts(count: int) -> list[str]:
    """The first `count` prompts of a fixed cycle over all 80 pairs of digit and direction, one digit each.

    Neighbours differ in both, so a short prefix is balanced too: ten prompts show ten digits.
    """
    if count < 1:
        raise ValueError(f"count is {count}; accepted: 1 or more")
    pairs = ((i % 10, (i + i // 10) % len(DIRECTIONS)) for i in range(count))
    return [f"a {digit} moving {DIRECTIONS[direction]}" for digit, direction in pairs]


def read_prompts(prompts: Sequence[str], file: str | Path | None = None) -> list[str]:
    """Prompts of the command line, then those of a text file, one a line; empty lines and `#` comments are skipped."""
    found = list(prompts)
    if file is not None:
        path = Path(file)
        if not path.is_file():
            raise FileNotFoundError(f"prompt file {path} does not exist; accepted: a text file with one prompt a line")
        lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
        found += [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise ValueError("no prompt given; accepted: at least one prompt, or a file with one a line")
    return found
