"""What `python_ref.reproduce` measures videos with, by the kind of videos that the models learned from."""

from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import Any, ClassVar, Protocol

import numpy as np
from torch import Tensor

from python_ref.config import Config
from python_ref.data.prompts import evaluation_prompts
from python_ref.data.video_files import VideoFiles
from python_ref.measures.clips import ClipJudge
from python_ref.measures.report import Judge


class Yardstick(Protocol):
    """Measures videos, and says what its numbers mean. Every set of measures has `quality`, "sharpness" and
    "jump_ratio"."""

    subject: str  # what the videos show
    quality: str  # the measure by frame that tells how good a video is
    quality_means: str  # a whole phrase
    kept_means: str  # what the quality of the last block over that of the first block tells
    jump_means: str

    @property
    def panels(self) -> Mapping[str, str]:
        """Measures by frame to labels."""
        ...

    def prompts(self, count: int) -> list[str]: ...

    def measure(self, video: Tensor, prompts: Sequence[str]) -> dict[str, Any]:
        """Of videos [B, F, C, H, W] in -1..1."""
        ...

    def real(self, count: int, num_frames: int) -> dict[str, Sequence[float]]:
        """Rows for comparison: a name, and the quality by frame."""
        ...


class DigitYardstick:
    """Reads the digits: `python_ref.measures.report`."""

    subject = "moving digits"
    quality = "identity"
    quality_means = "Share of videos that read as the digit asked for"
    kept_means = "share of digits that read right; 1: all of it"
    jump_means = "how much more the digit's path bends at the borders of blocks than inside them"
    panels: ClassVar[Mapping[str, str]] = {
        "identity": "reads as the digit asked for",
        "sharpness": "sharpness (real = 1)",
        "ink": "ink (real = 1)",
    }

    def __init__(self, config: Config) -> None:
        self.judge = Judge(config.data.moving_digits, config.rollout.frames_per_block)

    def prompts(self, count: int) -> list[str]:
        return evaluation_prompts(count)

    def measure(self, video: Tensor, prompts: Sequence[str]) -> dict[str, Any]:
        return self.judge.measure(video, prompts).to_json()

    def real(self, count: int, num_frames: int) -> dict[str, Sequence[float]]:
        return {"real videos": self.judge.measure(*self.judge.real_videos(count, num_frames)).identity}


class ClipYardstick:
    """Compares frames with those of the files: `python_ref.measures.clips`."""

    subject = "clips of real video files"
    quality = "distance"
    quality_means = (
        "Distance of a frame from the nearest frame of the file asked for (root mean square over pixels, from black to "
        "white is 2; less is better)"
    )
    kept_means = "distance; 1: no farther than at the start"
    jump_means = "how much more the picture changes at the borders of blocks than inside them"
    panels: ClassVar[Mapping[str, str]] = {
        "distance": "distance from the nearest real frame",
        "sharpness": "sharpness (real = 1)",
        "motion": "change from frame to frame (real = 1)",
    }

    def __init__(self, config: Config) -> None:
        self.judge = ClipJudge(VideoFiles(config.data.video_files), config.rollout.frames_per_block)

    def prompts(self, count: int) -> list[str]:
        """The captions of the files in turn."""
        return list(islice(cycle(self.judge.real), count))

    def measure(self, video: Tensor, prompts: Sequence[str]) -> dict[str, Any]:
        return self.judge.measure(video, prompts).to_json()

    def real(self, count: int, num_frames: int) -> dict[str, Sequence[float]]:
        rows = {
            "a real frame and the next": self.judge.neighbour_distance(),
            "a real frame and another file": self.judge.stranger_distance(),
        }
        return {name: np.full(num_frames, value).tolist() for name, value in rows.items()}


def open_yardstick(config: Config) -> Yardstick:
    """Of the data of a comparison; ValueError where it cannot be measured."""
    if config.data.source == "moving_digits":
        return DigitYardstick(config)
    if config.data.source == "video_files":
        return ClipYardstick(config)
    raise ValueError(
        f"data.source is {config.data.source!r}; accepted here: 'moving_digits' or 'video_files', which can be measured"
    )
