"""What losses share that run a causal model on a whole video at once, each block at a noise level of its own."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor

from python_ref.models.wan import WanConfig
from selfforcing_ext.mask import BlockCausalMask


class Blockwise:
    """Masks, and values that are the same within a block, as the options of an objective with these fields say."""

    frames_per_block: int
    first_frame_alone: bool
    window_frames: int | None
    sink_frames: int
    teacher_forcing: bool

    def _mask(self, config: WanConfig, latents: Tensor) -> BlockCausalMask:
        """The mask for latents of this shape, kept because its span table is."""
        frames, rows, columns = config.grid(latents.shape)
        if (frames, rows * columns) not in self._masks:
            self._masks[frames, rows * columns] = BlockCausalMask(
                frames,
                rows * columns,
                self.frames_per_block,
                self.window_frames,
                self.sink_frames,
                self.first_frame_alone,
                self.teacher_forcing,
            )
        return self._masks[frames, rows * columns]

    @cached_property
    def _masks(self) -> dict[tuple[int, int], BlockCausalMask]:
        return {}


def per_block(mask: BlockCausalMask, values: Tensor) -> Tensor:
    """Values [B, F], of which each block takes that of its first frame."""
    return values[:, [start for start, end in mask.frame_blocks for _ in range(start, end)]]


def pick_steps(trajectory: Tensor, index: Tensor) -> Tensor:
    """Latents [B, F, C, H, W] from a trajectory [B, T, F, C, H, W] and the step of each frame, int64 [B, F]."""
    where = index[:, None, :, None, None, None].expand(-1, 1, -1, *trajectory.shape[3:])
    return trajectory.gather(1, where).squeeze(1)
