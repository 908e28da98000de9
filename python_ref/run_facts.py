"""What a run was: settings, seed, command, code and machine, so that its numbers can be told apart later."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from python_ref.config import Config
from python_ref.processes import process_count
from selfforcing_ext.info import compiled_part, environment

FILE = "run.json"


def record_run(folder: Path, config: Config, first_step: int) -> None:
    """Adds this start of a run to `folder/run.json`, a list; a run from step 0 begins the list anew."""
    path = folder / FILE
    earlier = json.loads(path.read_text(encoding="utf-8")) if first_step and path.is_file() else []
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".writing")
    temporary.write_text(json.dumps([*earlier, run_facts(config, first_step)], indent=1), encoding="utf-8")
    temporary.rename(path)


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Every start of every run below a folder."""
    return [facts for path in sorted(folder.rglob(FILE)) for facts in json.loads(path.read_text(encoding="utf-8"))]


def run_facts(config: Config, first_step: int) -> dict[str, Any]:
    """As JSON can hold them. Every random draw of a run derives from its seed, see `python_ref.randomness`."""
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "first_step": first_step,
        "seed": config.seed,
        "git": git_state(Path(__file__).parent),
        "threads": torch.get_num_threads(),
        "processes": process_count(),
        "environment": environment() | _compiled(),
        "config": asdict(config),
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and whether files differ from it; None where there is no repository, or no git."""
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(folder), *arguments],
                capture_output=True,
                text=True,
                check=True,
                env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            ).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "changed": bool(changes)}


def _compiled() -> dict[str, Any]:
    try:
        return compiled_part()
    except (ImportError, RuntimeError) as error:  # the reference runs without it
        return {"compiled_part": str(error)}
