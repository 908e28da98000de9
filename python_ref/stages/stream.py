"""A KV cache that outlives a training step and a killed run."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from python_ref.config import RolloutConfig
from python_ref.models.wan_layers import WanConfig

NO_STREAM = -1


class KeptCache(nn.Module):
    """A cache with a window whose visible keys and values are kept in buffers too, beside the newest frames of the
    videos, so that checkpoints hold them. A stream that was resumed reads the same keys and values as one that was not.

    To a pipeline it is a cache like any other.

    Args:
        make_cache: makes an empty cache with the rollout's window and sink, for any number of frames.
        config: of the model.
        latents: shape [B, F, C, H, W] of the videos; the newest F frames are kept.
        rollout: gives window and sink.
        precision: "bf16" or "fp32": what keys and values are.
    """

    batch_dims: ClassVar[dict[str, int]] = {"keys": 1, "values": 1, "video": 0}

    def __init__(
        self,
        make_cache: Callable[[], Any],
        config: WanConfig,
        latents: Sequence[int],
        rollout: RolloutConfig,
        precision: str,
    ) -> None:
        super().__init__()
        self._make_cache, self._cache = make_cache, None
        self.sink_frames, self.slots = rollout.sink_frames, rollout.window_frames
        _, rows, columns = config.grid(latents)
        self.frame_seqlen = rows * columns
        shape = (config.num_layers, latents[0], self.slots, self.frame_seqlen, config.num_heads, config.head_dim)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(shape, dtype=dtype))
        self.register_buffer("video", torch.zeros(tuple(latents)))
        self.register_buffer("counts", torch.tensor([NO_STREAM, 0]))  # which stream, and its frames
        self.register_load_state_dict_post_hook(lambda module, _: module._forget_cache())

    # ---- The stream

    def go_on_with(self, stream: int) -> None:
        """Begins anew unless this stream is the current one."""
        if int(self.counts[0]) != stream:
            self.counts.copy_(torch.tensor([stream, 0]))
            self._forget_cache()

    def newest_frames(self) -> Tensor:
        """[B, frames, C, H, W], as many as there are, up to what is kept."""
        return self.video[:, self.video.shape[1] - min(self.num_frames, self.video.shape[1]) :].clone()

    def keep_newest(self, video: Tensor) -> None:
        """Remembers the end of a video [B, F, C, H, W]."""
        newest = video.detach()[:, -self.video.shape[1] :]
        self.video[:, self.video.shape[1] - newest.shape[1] :] = newest

    # ---- A cache

    @property
    def num_frames(self) -> int:
        return int(self.counts[1])

    @property
    def position(self) -> Tensor:
        return self._live().position

    @property
    def rope(self) -> str:
        return self._live().rope

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._live().attend(layer, q, k, v)

    def view(self) -> Any:
        return self._live().view()

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        self._live().write(layer, k, v)
        for kept, new in ((self.keys, k), (self.values, v)):
            frames = new.detach().to(kept.dtype).unflatten(1, (-1, self.frame_seqlen))
            for number, frame in enumerate(frames.unbind(1), start=self.num_frames):
                kept[layer, :, self._slot(number)] = frame

    def commit(self, num_frames: int) -> None:
        self._live().commit(num_frames)
        self.counts[1] += num_frames

    def _slot(self, frame: int) -> int:
        """The sink stays; the others take turns."""
        if frame < self.sink_frames:
            return frame
        return self.sink_frames + (frame - self.sink_frames) % (self.slots - self.sink_frames)

    def _live(self) -> Any:
        """The cache itself, refilled from the buffers after a resume."""
        if self._cache is None:
            self._cache = self._make_cache()
            for frame in range(self.num_frames):  # those that have left the window are never read, whatever they are
                slot = self._slot(frame)
                for layer in range(len(self.keys)):
                    self._cache.write(layer, self.keys[layer, :, slot], self.values[layer, :, slot])
                self._cache.commit(1)
        return self._cache

    def _forget_cache(self) -> None:
        self._cache = None
