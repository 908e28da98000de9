"""Loads the compiled ops. Importing this module makes ``torch.ops.selfforcing`` complete.

The CPU ops and the CUDA ops are two shared objects, since the second can only be loaded under a CUDA build of torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import nvtx
import torch
from torch.autograd import forward_ad

OLDEST_TORCH = (2, 11)  # whose stable ABI the ops are built against
if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
    raise ImportError(f"torch is {torch.__version__}, but selfforcing_ext needs torch 2.11 or newer")

_HOW_TO_BUILD = "run `make build` in the source tree, or `pip install --no-build-isolation .`"
try:
    from selfforcing_ext import _C
except ImportError as error:
    raise ImportError(f"the compiled part of selfforcing_ext cannot be loaded ({error}); {_HOW_TO_BUILD}") from error

__all__ = ["BUILT_ARCHITECTURES", "HAS_CUDA", "PageTable", "call", "nvtx_range", "ops", "register_autograd"]

P = ParamSpec("P")
R = TypeVar("R")

PageTable = _C.PageTable
#: What the CUDA ops were built for, in CMake's names (selfforcing_ext/gpu.py).
BUILT_ARCHITECTURES: tuple[str, ...] = tuple(_C.cuda_architectures.split())

_FOLDER = Path(__file__).parent


def _load(path: Path) -> None:
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ImportError(
            f"{path.name} of selfforcing_ext cannot be loaded under torch {torch.__version__} ({error}); "
            f"{_HOW_TO_BUILD}"
        ) from error


def _load_cuda_ops(path: Path) -> bool:
    if torch.version.cuda is None or not path.exists():
        return False
    if torch.version.cuda.split(".")[0] != _C.cuda_toolkit.split(".")[0]:
        raise ImportError(
            f"selfforcing_ext was built with CUDA {_C.cuda_toolkit}, but torch {torch.__version__} brings CUDA "
            f"{torch.version.cuda}; the major must match, so build it again: {_HOW_TO_BUILD}"
        )
    _load(path)
    return True


_load(_FOLDER / "_ops_cpu.so")
#: Whether this build has CUDA ops and this torch can load them.
HAS_CUDA = _load_cuda_ops(_FOLDER / "_ops_cuda.so")

ops = torch.ops.selfforcing


# How autograd is told of an op's derivative, by the op; and the same in the form that torch.func transforms take.
_functions: dict[torch._ops.OpOverload, type[torch.autograd.Function]] = {}
_transformable: dict[torch._ops.OpOverload, type[torch.autograd.Function]] = {}


def register_autograd(
    name: str, backward: Callable[..., Any], setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None = None
) -> None:
    """As ``torch.library.register_autograd``, and for ``call`` a shorter way to the same derivative."""
    torch.library.register_autograd(f"selfforcing::{name}", backward, setup_context=setup_context)
    op = getattr(ops, name).default

    def forward(ctx: Any, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            result = op(*arguments)
        if setup_context is not None:
            setup_context(ctx, arguments, result)
        return result

    members: dict[str, Any] = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    _functions[op] = type(f"{name}_function", (torch.autograd.Function,), members)
    members |= {"forward": staticmethod(lambda *arguments: op(*arguments)), "generate_vmap_rule": True}
    members |= {"setup_context": staticmethod(setup_context or (lambda ctx, inputs, output: None))}
    _transformable[op] = type(f"{name}_transformable", (torch.autograd.Function,), members)


def call(op: torch._ops.OpOverloadPacket, *arguments: Any) -> Any:
    """Calls an op whose derivative is registered here, past the kernel that torch.library registers for autograd: on
    small tensors that takes longer than the op itself, gradient or not. Compilers get the op as it is."""
    if torch.compiler.is_compiling():
        return op.default(*arguments)
    if torch._C._are_functorch_transforms_active():
        transformable = _transformable.get(op.default)
        return op.default(*arguments) if transformable is None else transformable.apply(*arguments)  # type: ignore[no-untyped-call]
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
        return _functions[op.default].apply(*arguments)  # type: ignore[no-untyped-call]
    with torch._C._AutoDispatchBelowAutograd():
        return op.default(*arguments)


def nvtx_range(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Puts an NVTX range around every call of a public function, except where torch.compile traces it.

    A call whose arguments have forward-mode tangents is refused: torch's custom ops drop them without a word.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling():
                return function(*args, **kwargs)
            if forward_ad._current_level >= 0:
                _refuse_tangents(name, *args, *kwargs.values())
            with nvtx.annotate(name, domain="selfforcing"):
                return function(*args, **kwargs)

        return wrapper

    return decorate


def _refuse_tangents(name: str, *arguments: object) -> None:
    for argument in arguments:
        if not isinstance(argument, torch.Tensor):
            continue
        if forward_ad.unpack_dual(argument).tangent is not None:  # type: ignore[no-untyped-call]
            raise NotImplementedError(f"{name} has no forward-mode derivative, but an argument has a tangent")
