"""What the command lines share: options, the names of files, and how a command ends."""

import argparse
import re
import sys
from collections.abc import Callable


def exit_status(command: Callable[[], object], if_interrupted: str | None = None) -> int:
    """Runs a command: 0, or 2 after a line on what its user can mend.

    Args:
        command: the work, and what it prints.
        if_interrupted: what to say, before 130, of a command that goes on where Ctrl-C has stopped it.
    """
    try:
        command()
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if if_interrupted is None:
            raise
        print(f"interrupted; {if_interrupted}", file=sys.stderr)
        return 130
    return 0


def add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")


def add_computing_options(parser: argparse.ArgumentParser) -> None:
    """How a model is computed."""
    parser.add_argument("--backend", default="ext", choices=("ext", "reference"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))


def add_prompts(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument("--prompt", action="append", default=[], help=f"such as {example!r}; may be repeated")
    parser.add_argument("--prompts-file", help="text file with one prompt a line")


def add_window(parser: argparse.ArgumentParser) -> None:
    """What blocks see of the past, in place of what the model was trained with."""
    parser.add_argument("--window-frames", type=int, help="frames that stay visible, the block and the sink included")
    parser.add_argument("--sink-frames", type=int, help="first frames that stay visible for ever")


def file_stem(number: int, prompt: str) -> str:
    """Of the files of a prompt: its number and what its words leave of it."""
    words = re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")[:60]
    return f"{number:03d}_{words}"
