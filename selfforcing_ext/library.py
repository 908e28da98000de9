"""Loads the compiled ops. Importing this module makes ``torch.ops.selfforcing`` complete.

The CPU ops and the CUDA ops are two shared objects, since the second can only be loaded under a CUDA build of torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import nvtx
import torch

try:
    from selfforcing_ext._C import PageTable
except ImportError as error:
    raise ImportError(
        f"the compiled part of selfforcing_ext cannot be loaded ({error}); run `make build` in the source tree, or "
        "`pip install --no-build-isolation .`"
    ) from error

__all__ = ["HAS_CUDA", "PageTable", "nvtx_range", "ops"]

P = ParamSpec("P")
R = TypeVar("R")

_FOLDER = Path(__file__).parent


def _load(name: str) -> bool:
    path = _FOLDER / f"{name}.so"
    if path.exists():
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    return path.exists()


_load("_ops_cpu")
#: Whether this build has CUDA ops and this torch can load them.
HAS_CUDA = torch.version.cuda is not None and _load("_ops_cuda")

ops = torch.ops.selfforcing


def nvtx_range(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Puts an NVTX range around every call of a function, except where torch.compile traces it."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling():
                return function(*args, **kwargs)
            with nvtx.annotate(name, domain="selfforcing"):
                return function(*args, **kwargs)

        return wrapper

    return decorate
