"""How a video is cut into the blocks that are generated one after the other."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class BlockPlan:
    """Frames per block: of the given first frames, which only go through the model to fill the cache, and of the
    frames to generate."""

    given: tuple[int, ...]
    generated: tuple[int, ...]

    @property
    def num_frames(self) -> int:
        return sum(self.given) + sum(self.generated)


def plan_blocks(num_frames: int, frames_per_block: int, first_frame_alone: bool, given_frames: int = 0) -> BlockPlan:
    """Cuts ``num_frames`` frames to generate, after ``given_frames`` given ones, into blocks.

    With ``first_frame_alone`` the first frame of the video, given or generated, is a block of its own. Given frames
    that do not fill blocks (an image that a video starts from) begin with a shorter block.

    Raises:
        ValueError: the frames to generate do not fill blocks, or the given ones do not with ``first_frame_alone``.
    """
    if num_frames < 1:
        raise ValueError(f"noise has {num_frames} frames, but must have at least 1")
    alone = (1,) if first_frame_alone else ()
    given, generated = given_frames, num_frames
    given_blocks: tuple[int, ...] = ()
    generated_blocks: tuple[int, ...] = ()
    if given_frames:
        first = alone or ((given % frames_per_block,) if given % frames_per_block else ())
        given -= sum(first)
        if given % frames_per_block:
            raise ValueError(
                f"initial_latents has {given_frames} frames, but must have one more than a multiple of "
                f"frames_per_block = {frames_per_block}, as first_frame_alone is True"
            )
        given_blocks = first + (frames_per_block,) * (given // frames_per_block)
    else:
        generated_blocks = alone
        generated -= sum(alone)
    if generated % frames_per_block:
        wanted = "one more than a multiple" if generated_blocks else "a multiple"
        raise ValueError(
            f"noise has {num_frames} frames, but must have {wanted} of frames_per_block = {frames_per_block}"
        )
    return BlockPlan(given_blocks, generated_blocks + (frames_per_block,) * (generated // frames_per_block))


def given_frames_of(initial_latents: Tensor | None, noise: Tensor) -> int:
    """Number of given frames, after a check that they fit the noise [B, F, C, H, W]."""
    if initial_latents is None:
        return 0
    if initial_latents.dim() != 5 or initial_latents[:, :0].shape != noise[:, :0].shape:
        raise ValueError(
            f"initial_latents has shape {list(initial_latents.shape)}, but must be [B, F, C, H, W] like noise, "
            f"{list(noise.shape)}, in all but F"
        )
    return initial_latents.shape[1]
