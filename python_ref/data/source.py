"""The one form in which training meets its data, whatever they are made from."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor

from python_ref.batch_share import BatchShare
from python_ref.config import DataConfig
from python_ref.data.moving_digits import MovingDigits, caption_words
from python_ref.data.video_files import VideoFiles


@dataclass
class TrainingSource:
    """An endless sequence of captioned videos; `batch(first, size)` depends on nothing but its arguments.

    Where processes share the batches (`of_share`), a batch is named by its place among all videos, and `share.noise`
    and `share.rows` give the random draws that belong to the part that comes.
    """

    batch: Callable[[int, int], tuple[Tensor, list[str]]]  # video [B, F, C, H, W] in -1..1, B captions
    words: list[str]  # every word of every caption
    num_frames: int
    channels: int
    frame_size: int
    share: BatchShare = field(default_factory=BatchShare)

    def of_share(self, share: BatchShare) -> "TrainingSource":
        """The same batches, of each of which only this process's part is made."""
        return replace(self, batch=lambda first, size: self.batch(*share.place(first, size)), share=share)


def open_source(config: DataConfig) -> TrainingSource:
    """The source that `config.source` names."""
    if config.source == "video_files":
        files = VideoFiles(config.video_files)
        words = sorted({word for clip in files.clips for word in clip.caption.lower().replace(",", " ").split()})
        settings = config.video_files
        return TrainingSource(files.batch, words, settings.num_frames, settings.channels, settings.frame_size)
    digits = MovingDigits(config.moving_digits)

    def batch(first: int, size: int) -> tuple[Tensor, list[str]]:
        videos = digits.batch(first, size)
        return videos.video, videos.captions

    return TrainingSource(
        batch, list(caption_words()), config.moving_digits.num_frames, 1, config.moving_digits.frame_size
    )
