"""Rotary position embedding over frame, row and column, alone and fused with the normalisation of queries and keys.

Source: RoFormer (arXiv 2104.09864), section 3.2, with the channels of a head split over three axes as in Wan2.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from selfforcing_ext.checks import check_float_tensor, check_head_dim, check_heads, dtype_name, number_per_entry
from selfforcing_ext.library import call, nvtx_range, ops, register_autograd

ROPE_BASE = 10000.0  # as in csrc/geometry/rope_axes.h


@nvtx_range("rope_3d")
def rope_3d(
    x: Tensor,  # [B, L, H, D]
    grid: Sequence[int],
    start_frame: int | Tensor = 0,
) -> Tensor:
    """Rotates each pair of channels (2j, 2j + 1) by its token's position on one axis times the pair's frequency.

    Of the D / 2 pairs of a head, the last D // 6 belong to the column, the D // 6 before them to the row and the others
    to the frame; the j-th of n pairs of an axis turns by 10000 ** (-j / n) radians per step. Differentiable in x.

    Args:
        x: queries or keys, float32, bfloat16 or float16; L = frames * rows * columns, tokens ordered (frame, row,
            column); D even, up to 256. The last dimension is contiguous, the other strides are free.
        grid: tokens along (frames, rows, columns).
        start_frame: position of the first frame, in frames: an int, or an int32 tensor on the device of x, [1] or [B]
            (every batch entry its own), which is read when the op runs, so that captured graphs replay with new
            positions. Rows and columns start at 0.

    Returns:
        [B, L, H, D], contiguous, in the dtype of x, under autocast too. Angles are as exact as in float64, their
        cosines and sines and the rotation float32.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: ranks, devices or sizes that do not fit each other, or a last dimension that is not contiguous.
    """
    check_float_tensor("x", x)
    check_heads("x", x)
    if x.shape[3] % 2 or not 2 <= x.shape[3] <= 256:
        raise ValueError(f"x has head dim {x.shape[3]}, but must have an even one up to 256")
    _check_grid("x", x, grid)
    start = number_per_entry("start_frame", start_frame, torch.int32, "x", x)
    out: Tensor = call(ops.rope_3d, x, start, list(grid), False)
    return out


@nvtx_range("qk_norm_rope")
def qk_norm_rope(
    x: Tensor,  # [B, L, H * D]
    weight: Tensor,  # [H * D]
    num_heads: int,
    grid: Sequence[int],
    start_frame: int | Tensor = 0,
    eps: float = 1e-6,
) -> Tensor:
    """RMSNorm over all channels (all heads together), split into heads, then ``rope_3d``, in one pass over memory.

    Differentiable in x and weight.

    Args:
        x: projected queries or keys, float32, bfloat16 or float16. The last dimension is contiguous, the other strides
            are free.
        weight: factor per channel after the normalisation; any floating dtype, used as float32.
        num_heads: H; D = channels / H is a multiple of 8 up to 256.
        grid, start_frame: as in ``rope_3d``.
        eps: added to the mean square; not below 0.

    Returns:
        [B, L, H, D], contiguous, in the dtype of x, under autocast too: computed in float32, rounded once at the end.
        The gradient of weight is summed in float32 in an order that depends on sizes alone.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: ranks, devices or sizes that do not fit each other, or a last dimension that is not contiguous.

    Source: RMSNorm (arXiv 1910.07467), equation 4, placed as in Wan2.1.
    """
    check_float_tensor("x", x)
    check_qk_norm_rope("x", x, weight, num_heads, grid, eps)
    y: Tensor
    y, _ = call(
        ops.qk_norm_rope,
        x,
        weight.float().contiguous(),
        number_per_entry("start_frame", start_frame, torch.int32, "x", x),
        num_heads,
        list(grid),
        eps,
    )
    return y


def check_qk_norm_rope(name: str, x: Tensor, weight: Tensor, num_heads: int, grid: Sequence[int], eps: float) -> None:
    """Raises TypeError or ValueError unless these are arguments of ``qk_norm_rope``; ``name`` is that of x."""
    if x.ndim != 3:
        raise ValueError(f"{name} has shape {list(x.shape)}, but must have three dimensions [B, L, H * D]")
    if x.shape[2] > 1 and x.stride(2) != 1:
        raise ValueError(f"{name} has stride {x.stride(2)} in its last dimension, but must have stride 1 there")
    if num_heads < 1 or x.shape[2] % num_heads:
        raise ValueError(f"num_heads is {num_heads}, but must divide the {x.shape[2]} channels of {name}")
    check_head_dim(name, x.shape[2] // num_heads)
    if weight.shape != x.shape[2:]:
        raise ValueError(f"weight has shape {list(weight.shape)}, but must have shape {list(x.shape[2:])}")
    if not weight.is_floating_point():
        raise TypeError(f"weight is {dtype_name(weight.dtype)}, but must be a floating dtype")
    if weight.device != x.device:
        raise ValueError(f"weight is on {weight.device}, but must be on {x.device} like {name}")
    if not eps >= 0:
        raise ValueError(f"eps is {eps}, but must not be below 0")
    _check_grid(name, x, grid)


def rope_table(
    grid: Sequence[int], head_dim: int, device: torch.device | str | None = None
) -> Tensor:  # float32 [entries, 2]
    """Cosine and sine of the angle by which ``rope_3d`` turns every pair of channels at every position of every axis.

    What attention takes to rotate keys when they are read (csrc/geometry/pages.h). The entries of an axis are
    [positions, pairs], first those of the frame, then of the row, then of the column. Angles are float64.

    Args:
        grid: positions along (frames, rows, columns), each from 0 on.
        head_dim: D, even, up to 256.
        device: of the table.

    Raises:
        ValueError: a grid that does not have three sizes, or a head dim that is not accepted.
    """
    _check_grid_sizes(grid)
    if head_dim % 2 or not 2 <= head_dim <= 256:
        raise ValueError(f"head_dim is {head_dim}, but must be even and up to 256")
    spatial = head_dim // 6
    angles = []
    for size, pairs in zip(grid, (head_dim // 2 - 2 * spatial, spatial, spatial), strict=True):
        frequencies = ROPE_BASE ** (-torch.arange(pairs, dtype=torch.float64) / max(pairs, 1))
        angles.append(torch.outer(torch.arange(size, dtype=torch.float64), frequencies).flatten())
    turns = torch.cat(angles)
    return torch.stack([turns.cos(), turns.sin()], dim=-1).float().to(device)


def _check_grid_sizes(grid: Sequence[int]) -> None:
    if len(grid) != 3 or any(size < 0 for size in grid):
        raise ValueError(f"grid is {tuple(grid)}, but must be the numbers of tokens along (frames, rows, columns)")


def _check_grid(name: str, x: Tensor, grid: Sequence[int]) -> None:
    _check_grid_sizes(grid)
    num_tokens = grid[0] * grid[1] * grid[2]
    if x.shape[1] != num_tokens:
        raise ValueError(f"{name} has {x.shape[1]} tokens, but grid {tuple(grid)} has {num_tokens}")


@torch.library.register_fake("selfforcing::rope_3d")
def _rope_3d_fake(x: Tensor, start_frame: Tensor, grid: list[int], inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("selfforcing::qk_norm_rope")
def _qk_norm_rope_fake(
    x: Tensor, weight: Tensor, start_frame: Tensor, num_heads: int, grid: list[int], eps: float
) -> tuple[Tensor, Tensor]:
    batch, tokens, channels = x.shape
    y = x.new_empty((batch, tokens, num_heads, channels // num_heads))
    return y, x.new_empty((batch, tokens), dtype=torch.float32)


@torch.library.register_fake("selfforcing::qk_norm_rope_backward")
def _qk_norm_rope_backward_fake(
    grad_y: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, start_frame: Tensor, grid: list[int]
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _rope_3d_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, start_frame, ctx.grid, ctx.inverse = inputs
    ctx.save_for_backward(start_frame)


def _rope_3d_backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    (start_frame,) = ctx.saved_tensors
    if grad_y.stride(-1) != 1:  # the gradient of a sum is one expanded number
        grad_y = grad_y.contiguous()
    return call(ops.rope_3d, grad_y, start_frame, ctx.grid, not ctx.inverse), None, None, None


def _qk_norm_rope_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, start_frame, _, ctx.grid, _ = inputs
    _, rstd = output
    ctx.save_for_backward(x, weight, rstd, start_frame)
    ctx.mark_non_differentiable(rstd)


def _qk_norm_rope_backward(ctx: Any, grad_y: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, rstd, start_frame = ctx.saved_tensors
    grad_x, grad_weight = call(ops.qk_norm_rope_backward, grad_y, x, weight, rstd, start_frame, ctx.grid)
    return grad_x, grad_weight, None, None, None, None


def _no_second_derivative(*_: Any) -> None:
    raise NotImplementedError("qk_norm_rope can be differentiated once, but not twice")


register_autograd("rope_3d", _rope_3d_backward, _rope_3d_setup_context)
register_autograd("qk_norm_rope", _qk_norm_rope_backward, _qk_norm_rope_setup_context)
register_autograd("qk_norm_rope_backward", _no_second_derivative)
