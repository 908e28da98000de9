"""Measures of videos that were learned from a few video files: how far each frame is from a real one, and how crisp and
how lively the video is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from python_ref.data.video_files import VideoFiles


@dataclass
class ClipMeasures:
    """What was measured on one set of videos."""

    distance: list[float]  # [F] to the nearest frame of the file asked for: root mean square over pixels, of -1..1
    sharpness: list[float]  # [F] gradient energy over variance, 1: as sharp as the files
    motion: list[float]  # [F - 1] mean absolute difference between frames f and f + 1, 1: as much as in the files
    jump_ratio: float  # the differences at block borders over those inside blocks

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


class ClipJudge:
    """Measures videos against the frames of the files that their captions belong to.

    Args:
        files: what the model learned from. A caption stands for all files that have it.
        frames_per_block: where the borders lie.
    """

    def __init__(self, files: VideoFiles, frames_per_block: int) -> None:
        self.frames_per_block = frames_per_block
        self.real = {caption: [video.float() / 127.5 - 1 for video in videos]
                     for caption, videos in files.videos_by_caption().items()}  # fmt: skip
        every = [video for videos in self.real.values() for video in videos]
        self._sharpness = torch.stack([crispness(video[:, None]).mean() for video in every]).mean()
        self._motion = torch.stack([liveliness(video[None]).mean() for video in every]).mean()

    def measure(self, video: Tensor, prompts: Sequence[str]) -> ClipMeasures:
        """Measures videos [B, F, C, H, W] in -1..1 that were asked for by captions of the files; F >= 2."""
        unknown = sorted(set(prompts) - set(self.real))
        if unknown:
            raise ValueError(f"prompt {unknown[0]!r} cannot be measured; accepted: {', '.join(map(repr, self.real))}")
        distances = torch.stack(
            [nearest_distance(one, torch.cat(self.real[prompt])) for one, prompt in zip(video, prompts, strict=True)]
        )
        motion = liveliness(video)
        borders = torch.arange(1, video.shape[1]) % self.frames_per_block == 0
        return ClipMeasures(
            distance=distances.mean(0).tolist(),
            sharpness=(crispness(video.transpose(0, 1)) / self._sharpness).tolist(),
            motion=(motion / self._motion).tolist(),
            jump_ratio=(motion[borders].mean() / motion[~borders].mean().clamp_min(1e-9)).item(),
        )

    def neighbour_distance(self) -> float:
        """Between a frame of a file and the next one: what is as near as the files themselves can tell."""
        return (
            torch.cat([_rms(video[1:] - video[:-1]) for videos in self.real.values() for video in videos]).mean().item()
        )

    def stranger_distance(self) -> float:
        """Between a frame of a file and the nearest one of files with another caption."""
        found = []
        for caption, videos in self.real.items():
            others = [video for other, theirs in self.real.items() if other != caption for video in theirs]
            if others:
                found += [nearest_distance(video, torch.cat(others)) for video in videos]
        return torch.cat(found).mean().item() if found else float("nan")


def nearest_distance(frames: Tensor, real: Tensor) -> Tensor:
    """Root mean square over pixels between each of frames [F, C, H, W] and the nearest of real [N, C, H, W]: [F]."""
    return torch.cdist(frames.flatten(1), real.flatten(1)).amin(1) / frames[0].numel() ** 0.5


def crispness(images: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels over the variance within frames: [F], of [F, B, C, H, W].

    Blurring lowers it, noise raises it.
    """
    gradient = images.diff(dim=-1).square().mean((1, 2, 3, 4)) + images.diff(dim=-2).square().mean((1, 2, 3, 4))
    return gradient / images.var((-2, -1)).mean((1, 2)).clamp_min(1e-6)


def liveliness(video: Tensor) -> Tensor:
    """Mean absolute difference between successive frames: [F - 1], of [B, F, C, H, W]."""
    return video.diff(dim=1).abs().mean((0, 2, 3, 4))


def _rms(images: Tensor) -> Tensor:
    return images.square().mean((1, 2, 3)).sqrt()
