"""rope, denoise and modulate against the same formulas in eager torch: time, ratio, and share of the copy bandwidth.

    python benchmarks/elementwise.py [--size demo|wan ...] [--dtype float32|bfloat16 ...] [--op NAME] [--threads N]

Ours and eager run in turns in one process; times are medians. GB/s counts every input and output once, as if each were
moved through memory one time; "of copy" divides it by what a copy of as many bytes reaches in the same turns. "passes"
is what eager moves (the inputs and outputs of all its operations) over what ours moves: the ratio that can be had by
moving less, if both move equally fast. It can be exceeded where eager computes (sines and cosines) or waits; where all
fits into the caches, the calls themselves take the time.

glibc hands large freed buffers back to the kernel, and every call, ours or eager, would pay for fresh pages; that is
switched off here (MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_MAX_ do it from outside).
"""

from __future__ import annotations

import argparse
import ctypes
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from timing import median_times

import selfforcing_ext as ours
from python_ref.ops import denoise, modulate, rope


@dataclass(frozen=True)
class Size:
    batch: int
    grid: tuple[int, int, int]  # frames, rows, columns
    num_heads: int
    head_dim: int
    latents: tuple[int, int, int]  # C, H, W

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


SIZES = {
    # configs/demo.yaml in training, and one block of Wan2.1 1.3B at 480x832 (arXiv 2503.20314)
    "demo": Size(16, (12, 4, 4), 3, 32, (1, 16, 16)),
    "wan": Size(1, (3, 30, 52), 12, 128, (16, 60, 104)),
}


@dataclass(frozen=True)
class Problem:
    name: str
    ours: Callable[..., Tensor | tuple[Tensor, ...]]
    eager: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: list[Tensor]
    constants: list[Tensor] = field(default_factory=list)  # arguments after the inputs, without gradient
    differentiable: bool = True
    passed_on: int = 0  # so many first inputs get the gradient of the output as it is


def problems(size: Size, dtype: torch.dtype) -> Iterator[Problem]:
    frames, channels = size.grid[0], size.num_heads * size.head_dim

    def features() -> Tensor:
        return torch.randn(size.batch, size.tokens, channels).to(dtype)

    def modulation() -> Tensor:
        return torch.randn(size.batch, frames, channels)

    def latents() -> Tensor:
        return torch.randn(size.batch, frames, *size.latents).to(dtype)

    heads = features().unflatten(-1, (size.num_heads, size.head_dim))
    position = torch.tensor([3], dtype=torch.int32)
    sigma, sigma_next = torch.rand(size.batch, frames), torch.rand(size.batch, frames)
    yield Problem(
        "rope_3d",
        lambda x: ours.rope_3d(x, size.grid, position),
        lambda x: rope.rope_3d(x, size.grid, position),
        [heads],
    )
    yield Problem(
        "qk_norm_rope",
        lambda x, weight: ours.qk_norm_rope(x, weight, size.num_heads, size.grid, position),
        lambda x, weight: rope.qk_norm_rope(x, weight, size.num_heads, size.grid, position),
        [features(), torch.rand(channels)],
    )
    yield Problem(
        "modulated_layer_norm",
        ours.modulated_layer_norm,
        modulate.modulated_layer_norm,
        [features(), modulation(), modulation()],
    )
    yield Problem(
        "gated_residual",
        ours.gated_residual,
        modulate.gated_residual,
        [features(), features(), modulation()],
        passed_on=1,
    )
    yield Problem("denoise_x0", _x0(ours.denoise_step), _x0(denoise.denoise_step), [latents(), latents()], [sigma])
    yield Problem(
        "denoise_step",
        lambda flow, x, noise, *levels: ours.denoise_step(flow, x, *levels, noise),
        lambda flow, x, noise, *levels: denoise.denoise_step(flow, x, *levels, noise),
        [latents(), latents(), latents()],
        [sigma, sigma_next],
    )
    yield Problem(
        "guided_denoise_step",
        lambda cond, uncond, x, noise, *levels: ours.guided_denoise_step(cond, uncond, 3.0, x, *levels, noise),
        lambda cond, uncond, x, noise, *levels: denoise.guided_denoise_step(cond, uncond, 3.0, x, *levels, noise),
        [latents(), latents(), latents(), latents()],
        [sigma, sigma_next],
    )
    yield Problem("add_noise", ours.add_noise, denoise.add_noise, [latents(), latents()], [sigma])
    yield Problem(
        "dmd_gradient",
        lambda *x: ours.dmd_gradient(*x, guidance_scale=3.0),
        lambda *x: denoise.dmd_gradient(*x, guidance_scale=3.0),
        [latents() for _ in range(4)],
        differentiable=False,
    )


def _x0(step: Callable[..., tuple[Tensor, Tensor | None]]) -> Callable[..., Tensor]:
    return lambda flow, x_t, sigma: step(flow, x_t, sigma)[0]


def nbytes(tensors: Iterable[Tensor | None]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


class BytesMoved(TorchDispatchMode):
    """Counts the bytes of the inputs and outputs of every operation that is no view."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_view = any(returned.alias_info and not returned.alias_info.is_write for returned in func._schema.returns)
        if not is_view and "empty" not in func.__name__:
            leaves = torch.utils._pytree.tree_leaves((args, kwargs, result))
            self.count += sum(distinct_bytes(leaf) for leaf in leaves if isinstance(leaf, Tensor))
        return result


def distinct_bytes(tensor: Tensor) -> int:
    """A dimension with stride 0 is one element in memory."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0]
    return math.prod(sizes) * tensor.element_size()


def report(name: str, mine: Callable[[], object], eager: Callable[[], object], moved: int, seconds: float) -> None:
    source = torch.empty(moved // 2, dtype=torch.uint8)
    target = torch.empty_like(source)
    with BytesMoved() as eager_moved:
        eager()
    time_mine, time_eager, time_copy = median_times([mine, eager, lambda: target.copy_(source)], seconds)
    times = f"{time_mine * 1e6:9.1f} {time_eager * 1e6:9.1f} {time_eager / time_mine:7.2f}"
    speed = f"{moved / time_mine / 1e9:8.1f} {time_copy / time_mine:8.2f}"
    print(f"{name:44s} {times} {eager_moved.count / moved:7.2f} {speed}", flush=True)


def run(problem: Problem, label: str, seconds: float) -> None:
    def forward(op: Callable[..., Tensor | tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        return as_tuple(op(*problem.inputs, *problem.constants))

    with torch.no_grad():
        moved = nbytes([*problem.inputs, *problem.constants]) + nbytes(forward(problem.ours))
        calls = (lambda: forward(problem.ours)), (lambda: forward(problem.eager))
        report(f"{problem.name} {label} forward", *calls, moved, seconds)
    if not problem.differentiable:
        return
    leaves = [x.requires_grad_() for x in problem.inputs]
    backward, gradients = [], []
    for op in (problem.ours, problem.eager):
        outputs = forward(op)
        gradients = [torch.randn_like(output) for output in outputs]

        def call(outputs: tuple[Tensor, ...] = outputs, gradients: list[Tensor] = gradients) -> object:
            return torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)

        backward.append(call)
    # Read: the gradients of the outputs and what the formula needs of the inputs; written: the gradients of the inputs,
    # without those that are the gradient of the output itself.
    needed = [] if problem.name in LINEAR else problem.inputs[problem.passed_on :]
    moved = nbytes(gradients) + nbytes(needed) + nbytes(leaves[problem.passed_on :])
    report(f"{problem.name} {label} backward", *backward, moved, seconds)


LINEAR = {"rope_3d", "denoise_x0", "denoise_step", "guided_denoise_step", "add_noise"}  # backward reads no input


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory: M_TRIM_THRESHOLD (-1) at its largest, M_MMAP_MAX (-4) 0. Nothing elsewhere."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-1, 2**31 - 1)
        mallopt(-4, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument(
        "--dtype", nargs="+", choices=["float32", "bfloat16", "float16"], default=["float32", "bfloat16"]
    )
    parser.add_argument("--op", nargs="+", help="names; all if not given")
    parser.add_argument("--threads", type=int, help="of torch; its default if not given")
    parser.add_argument("--seconds", type=float, default=0.2, help="per line")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    columns = f"{'ours us':>9s} {'eager us':>9s} {'ratio':>7s} {'passes':>7s} {'GB/s':>8s} {'of copy':>8s}"
    print(f"{'op, size, dtype':44s} {columns}")
    for name in arguments.size:
        for dtype in arguments.dtype:
            for problem in problems(SIZES[name], getattr(torch, dtype)):
                if not arguments.op or problem.name in arguments.op:
                    run(problem, f"{name} {dtype}", arguments.seconds)


if __name__ == "__main__":
    main()
