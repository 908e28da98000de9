"""Rotary position embedding over frame, row and column, and its fusion with query/key normalisation.

Source: RoFormer (arXiv 2104.09864), section 3.2, with the channels split over three axes as in Wan2.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROPE_BASE = 10000.0


def rope_3d(
    x: Tensor,  # [B, L, H, D]
    grid: tuple[int, int, int],
    start_frame: int | Tensor = 0,
) -> Tensor:
    """Rotates each pair of channels (2j, 2j + 1) by its token's position on one axis times the pair's frequency.

    Args:
        x: queries or keys, L = frames * rows * columns, tokens ordered (frame, row, column); D even.
        grid: tokens along (frames, rows, columns).
        start_frame: position of the first frame, an int or an int32 tensor [1] or [B]; rows and columns start at 0.

    Returns:
        [B, L, H, D] in the dtype of x; the rotation is computed in float32 (float64 for float64).
    """
    if x.shape[1] != grid[0] * grid[1] * grid[2]:
        raise ValueError(f"x has {x.shape[1]} tokens, but grid {tuple(grid)} has {grid[0] * grid[1] * grid[2]}")
    dtype = torch.promote_types(x.dtype, torch.float32)
    angles = rope_angles(x.shape[-1], grid, start_frame, x.device).unsqueeze(2)  # [1 or B, L, 1, D / 2]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    real, imaginary = x.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def qk_norm_rope(
    x: Tensor,  # [B, L, H * D]
    weight: Tensor,  # [H * D]
    num_heads: int,
    grid: tuple[int, int, int],
    start_frame: int | Tensor = 0,
    eps: float = 1e-6,
) -> Tensor:
    """RMSNorm over all channels (all heads together), split into heads, then ``rope_3d``.

    Args:
        x: projected queries or keys.
        weight: factor per channel after the normalisation.
        num_heads: H.
        grid, start_frame: as in ``rope_3d``.
        eps: added to the mean square.

    Returns:
        [B, L, H, D] in the dtype of x; computed in float32 (float64 for float64), rounded once at the end.

    Source: RMSNorm (arXiv 1910.07467), equation 4, placed as in Wan2.1.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(dtype)
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight.to(dtype)
    return rope_3d(normed.unflatten(-1, (num_heads, -1)), grid, start_frame).to(x.dtype)


def rope_angles(
    head_dim: int, grid: tuple[int, int, int], start_frame: int | Tensor, device: torch.device
) -> Tensor:  # float64 [1 or B, F * H * W, D / 2]
    """Angle of every token and channel pair, in radians; of every batch entry where start_frame has them.

    Of the D / 2 pairs, D // 6 belong to the row, D // 6 to the column and the rest, first, to the frame.
    """
    pairs = head_dim // 2
    spatial = pairs // 3
    positions = [torch.arange(length, dtype=torch.float64, device=device).unsqueeze(0) for length in grid]
    positions[0] = positions[0] + torch.as_tensor(start_frame, device=device).view(-1, 1)
    starts = positions[0].shape[0]
    axes = []
    for axis, (position, count) in enumerate(zip(positions, (pairs - 2 * spatial, spatial, spatial), strict=True)):
        exponent = torch.arange(count, dtype=torch.float64, device=device) / max(count, 1)
        shape = [position.shape[0], 1, 1, 1, count]
        shape[1 + axis] = grid[axis]
        turns = position.unsqueeze(-1) * ROPE_BASE**-exponent
        axes.append(turns.view(shape).expand(starts, *grid, count))
    return torch.cat(axes, dim=-1).flatten(1, 3)
