"""Context parallelism: the tokens of a video split over processes, for windows that are long or large.

Outside attention a process holds its share of the tokens of every frame; inside, all tokens and its share of the heads.
An all-to-all leads from one to the other and back, so that attention and cache run unchanged, each on fewer heads, and
a cache holds its process's heads only. Positions, noise levels and masks go by frames and never notice.

Source: DeepSpeed-Ulysses (arXiv 2309.14509), section 3; the split within frames is ours.

Every process of a group is given the same latents, and gets the same flow. In backward the collectives are their own
adjoints, so each process ends up with the gradient of the sum of all their losses with respect to its copy of a weight.
As in data parallelism, the mean over the processes is then the gradient of the loss that they share.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class ContextParallel:
    """What the processes of a group exchange. All must make the same calls in the same order.

    Args:
        group: the processes that work on the same videos; None: all.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def check(self, num_heads: int) -> None:
        """Raises ValueError unless the heads can be split evenly."""
        if num_heads % self.size:
            raise ValueError(f"num_heads is {num_heads}, but must be a multiple of the {self.size} processes' number")

    def own_tokens(self, x: Tensor, frames: int) -> Tensor:
        """This process's tokens [B, frames * S / size, ...] of x [B, frames * S, ...]: the same part of every frame.

        Raises:
            ValueError: the tokens of a frame cannot be split evenly.
        """
        frame_seqlen = x.shape[1] // frames
        if frame_seqlen % self.size:
            raise ValueError(
                f"a frame has {frame_seqlen} tokens, but must have a multiple of the {self.size} processes' number"
            )
        return x.unflatten(1, (frames, self.size, -1))[:, :, self.rank].flatten(1, 2)

    def all_tokens(self, x: Tensor, frames: int) -> Tensor:
        """The inverse of ``own_tokens``, from what each process made of its own."""
        mine = x.unflatten(1, (frames, -1))
        parts = _AllToAll.apply(mine.expand(self.size, *mine.shape), self.group)  # [size, B, frames, S / size, ...]
        return parts.movedim(0, 2).flatten(1, 3)

    def tokens_to_heads(self, frames: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Own tokens and all heads [B, frames * S / size, H, D] to all tokens and own heads [B, frames * S, H / size,
        D], for several tensors at once."""
        # [size, tensors, B, frames, S / size, H / size, D], first by where it goes, then by where it came from
        split = torch.stack(tensors).unflatten(3, (self.size, -1)).unflatten(2, (frames, -1)).movedim(4, 0)
        parts = _AllToAll.apply(split, self.group)
        return parts.movedim(0, 3).flatten(2, 4).unbind(0)

    def heads_to_tokens(self, frames: int, x: Tensor) -> Tensor:
        """The inverse of ``tokens_to_heads``."""
        # [size, B, frames, S / size, H / size, D]
        parts = _AllToAll.apply(x.unflatten(1, (frames, self.size, -1)).movedim(2, 0), self.group)
        return parts.movedim(0, 3).flatten(3, 4).flatten(1, 2)


class _AllToAll(torch.autograd.Function):
    """Sends part i of the first dimension to process i; part i of the result is from process i."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(grad, ctx.group), None
