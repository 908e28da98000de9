"""The one form in which training meets its data, whatever they are made from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from python_ref.batch_share import BatchShare
from python_ref.config import DataConfig
from python_ref.data.latents import CachedLatents, preview
from python_ref.data.moving_digits import MovingDigits, caption_words
from python_ref.data.video_files import VideoFiles
from python_ref.models.wan_vae import WanVideoAutoencoder


@dataclass
class TrainingSource:
    """An endless sequence of captioned videos; `batch(first, size)` depends on nothing but its arguments.

    Processes that train together work on the same batches: each takes its `part` of them, and from `share.noise` and
    `share.rows` the random draws that belong to it.
    """

    batch: Callable[[int, int], tuple[Tensor, list[str]]]  # video [B, F, C, H, W] in -1..1 or latents, B captions
    captions: Callable[[int, int], list[str]]  # of the same videos, which need not be there
    words: list[str]  # every word of every caption; none if `embed` makes the contexts
    num_frames: int
    channels: int
    frame_size: tuple[int, int]  # rows, columns
    embed: Callable[[Sequence[str]], Tensor] | None = None  # B captions to a context [B, text_len, text_dim]
    show: Callable[[Tensor], Tensor] = lambda video: video  # to what people can look at, [B, F, 1 or 3, H, W] in -1..1
    share: BatchShare = field(default_factory=BatchShare)
    device: torch.device | str = "cpu"  # where this process works on its part

    def for_process(self, share: BatchShare, device: torch.device) -> "TrainingSource":
        """The source as a process sees it that works on a share of every batch, on a device."""
        embed = None if self.embed is None else lambda captions: self.embed(captions).to(device)
        return replace(self, share=share, device=device, embed=embed)

    def part(self, first: int, size: int) -> tuple[Tensor, list[str]]:
        """What this process works on of `batch(first, size)`, on its device; the rest is not made."""
        video, captions = self.batch(*self.share.place(first, size))
        return video.to(self.device), captions

    def captions_of_part(self, first: int, size: int) -> list[str]:
        return self.captions(*self.share.place(first, size))


def video_shape(config: DataConfig) -> tuple[int, int, tuple[int, int]]:
    """Frames, channels and (rows, columns) of the videos of a source, which need not be there."""
    if config.source == "latents":
        latents = config.latents
        return latents.num_frames, latents.channels, (latents.frame_size[0], latents.frame_size[1])
    if config.source == "video_files":
        files = config.video_files
        return files.num_frames, files.channels, files.frame_shape
    digits = config.moving_digits
    return digits.num_frames, 1, (digits.frame_size, digits.frame_size)


def open_source(config: DataConfig) -> TrainingSource:
    """The source that `config.source` names."""
    shape = video_shape(config)
    if config.source == "latents":
        latents = CachedLatents(config.latents)
        show = WanVideoAutoencoder(config.latents.vae).decode if config.latents.vae else preview
        return TrainingSource(latents.batch, latents.captions, [], *shape, latents.embed, show)
    if config.source == "video_files":
        files = VideoFiles(config.video_files)
        words = sorted({word for clip in files.clips for word in clip.caption.lower().replace(",", " ").split()})
        return TrainingSource(files.batch, lambda first, size: files.batch(first, size)[1], words, *shape)
    digits = MovingDigits(config.moving_digits)

    def batch(first: int, size: int) -> tuple[Tensor, list[str]]:
        videos = digits.batch(first, size)
        return videos.video, videos.captions

    return TrainingSource(batch, lambda first, size: batch(first, size)[1], list(caption_words()), *shape)
