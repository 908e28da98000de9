"""What the shards of a data set on disk have in common: safetensors files whose settings say what they hold and how
they were made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a shard: "captions", and "recipe", which all shards of a folder share."""
    with safe_open(str(path), framework="pt") as file:
        return json.loads(file.metadata()["settings"])


def is_written(path: Path, recipe: dict[str, Any], captions: Sequence[str]) -> bool:
    """Whether a shard is written already; False if it is but holds fewer items than it now should.

    Raises:
        ValueError: it was made in another way, or from other captions.
    """
    if not path.is_file():
        return False
    found = read_settings(path)
    if found["recipe"] != recipe:
        differing = [name for name, value in recipe.items() if found["recipe"].get(name) != value]
        raise ValueError(
            f"{path} was made with another {' and '.join(differing)}; accepted: a folder of this command's own"
        )
    if any(old != new for old, new in zip(found["captions"], captions, strict=False)):
        raise ValueError(f"{path} was made from other captions; accepted: a folder of this command's own")
    return len(found["captions"]) >= len(captions)
