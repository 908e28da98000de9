"""Is the path straight between bounces, inside blocks and across their borders?"""

from dataclasses import dataclass

import torch
from torch import Tensor

BOUNCE_ZONE = 0.25  # of the room the digit has: nearer than this to the middle no bounce is believed


@dataclass
class Straightness:
    """Bends of the path, |c[f] - 2 c[f+1] + c[f+2]| per axis, in pixels per frame squared, bounces left out."""

    by_frame: Tensor  # [F - 2] mean bend of the triple whose middle is frame f + 1
    inside: float  # mean over the triples that lie in one block
    border: float  # mean over the triples that cross a border between blocks
    jump_ratio: float  # border / inside; 1: borders cannot be told


def bounce_triples(centres: Tensor, frame_size: int, digit_size: int) -> Tensor:
    """Which triples of frames touch a wall, per axis: [B, F - 2, 2] bool, from the path [B, F, 2] alone.

    A bounce is a change of sign of the velocity near the wall that the digit was moving to. Because the wall is met
    between two frames, the triples before and after bend too and count as touched.
    """
    middle = (frame_size - 1) / 2
    zone = BOUNCE_ZONE * (frame_size - digit_size)
    velocity = centres.diff(dim=1)
    before, after = velocity[:, :-1], velocity[:, 1:]
    position = centres[:, 1:-1]
    turned = (before > 0) & (after < 0) & (position > middle + zone)
    turned |= (before < 0) & (after > 0) & (position < middle - zone)
    touched = turned.clone()
    touched[:, 1:] |= turned[:, :-1]
    touched[:, :-1] |= turned[:, 1:]
    return touched


def straightness(centres: Tensor, touched: Tensor, frames_per_block: int) -> Straightness:
    """Bends of the paths centres [B, F, 2] where `touched` [B, F - 2, 2] says that no wall was met."""
    bend = centres.diff(n=2, dim=1).abs().masked_fill(touched, float("nan"))
    first = torch.arange(bend.shape[1])
    crosses = first // frames_per_block != (first + 2) // frames_per_block
    inside, border = bend[:, ~crosses].nanmean().item(), bend[:, crosses].nanmean().item()
    return Straightness(bend.nanmean(dim=(0, 2)), inside, border, border / max(inside, 1e-9))
