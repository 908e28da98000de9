"""All measures of a set of videos, by frame and in summary, and the table that shows them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from python_ref.data.moving_digits import MovingDigits, MovingDigitsConfig, direction_vector
from python_ref.measures.identity import digit_reader
from python_ref.measures.motion import angles_by_frame, start_angles
from python_ref.measures.sharpness import gradient_energy, ink_amount
from python_ref.measures.straightness import bounce_triples, straightness
from python_ref.measures.tracking import ink_centres


@dataclass
class Measures:
    """What was measured on one set of videos."""

    identity: list[float]  # [F] share of videos that read as the digit asked for
    motion_angle: list[float]  # [F - 1] degrees between the step from frame f to f + 1 and the caption, signs left out
    bend: list[float]  # [F - 2] pixels per frame squared
    sharpness: list[float]  # [F] gradient energy, 1: as sharp as real videos
    ink: list[float]  # [F] mean ink, 1: as much as real videos
    start_angle: float  # degrees between the first steps and the caption's direction, mean
    start_within_45: float  # share of videos that start within 45 degrees of the caption's direction
    bend_inside: float
    bend_border: float
    jump_ratio: float  # bend at block borders over bend inside blocks
    summary: dict[str, float] = field(default_factory=dict)  # identity at first and last block, and in the mean

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON can hold it: a number that could not be measured becomes null."""
        return {name: _without_nan(value) for name, value in vars(self).items()}


def _without_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def parse_prompts(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Digits [B] int64 and directions [B, 2] of prompts such as "a 3 moving up and left"."""
    labels, directions = [], []
    for prompt in prompts:
        words, _, direction = prompt.partition(" moving ")
        digit = words.split()[-1] if words.split() else ""
        if not digit.isdigit() or len(digit) > 1 or " moving " in direction or not direction:
            raise ValueError(
                f"prompt {prompt!r} cannot be measured; accepted: one digit, as in 'a 3 moving up and left'"
            )
        labels.append(int(digit))
        directions.append(direction_vector(direction))
    return torch.tensor(labels), torch.tensor(directions)


class Judge:
    """Measures videos of one digit each against their prompts.

    Args:
        digits: how the real videos look that the model learned from; `held_out` scans give the reference.
        frames_per_block: where the borders lie.
        reference_videos: real videos that sharpness and ink are compared with.
    """

    def __init__(self, digits: MovingDigitsConfig, frames_per_block: int, reference_videos: int = 200) -> None:
        self.digits, self.frames_per_block = digits, frames_per_block
        self.reader = digit_reader(digits.digit_size, digits.frame_size)
        video, _ = self.real_videos(reference_videos, digits.num_frames)
        self._real_sharpness = gradient_energy(video).mean()
        self._real_ink = ink_amount(video).mean()

    def real_videos(self, count: int, num_frames: int) -> tuple[Tensor, list[str]]:
        """Held-out real videos [count, num_frames, 1, H, W] and their prompts."""
        settings = {**vars(self.digits), "num_frames": num_frames, "num_digits": 1, "split": "held_out"}
        batch = MovingDigits(MovingDigitsConfig(**{**settings, "omit_motion_probability": 0.0})).batch(0, count)
        return batch.video, batch.captions

    def measure(self, video: Tensor, prompts: Sequence[str]) -> Measures:
        """Measures videos [B, F, 1, H, W] in -1..1; F >= 4."""
        labels, directions = parse_prompts(prompts)
        centres = ink_centres(video)
        touched = bounce_triples(centres, self.digits.frame_size, self.digits.digit_size)
        path = straightness(centres, touched, self.frames_per_block)
        identity = self.reader.identity(video, labels)
        start = start_angles(centres, directions, self.digits.straight_frames)
        block = self.frames_per_block
        return Measures(
            identity=identity.tolist(),
            motion_angle=angles_by_frame(centres, directions, touched.any(-1)).tolist(),
            bend=path.by_frame.tolist(),
            sharpness=(gradient_energy(video) / self._real_sharpness).tolist(),
            ink=(ink_amount(video) / self._real_ink).tolist(),
            start_angle=start.mean().item(),
            start_within_45=(start <= 45).float().mean().item(),
            bend_inside=path.inside,
            bend_border=path.border,
            jump_ratio=path.jump_ratio,
            summary={
                "identity": identity.mean().item(),
                "identity_first_block": identity[:block].mean().item(),
                "identity_last_block": identity[-block:].mean().item(),
                "identity_lowest": identity.min().item(),
            },
        )


def print_table(results: Mapping[str, Measures], title: str) -> None:
    """One row per set of videos on the terminal."""
    table = Table(title=title)
    for column in ("videos", "frames", "identity", "first block", "last block", "lowest frame", "start angle",
                   "within 45°", "bend inside", "bend at borders", "jump ratio", "sharpness", "ink"):  # fmt: skip
        table.add_column(column, justify="left" if column == "videos" else "right", no_wrap=column == "videos")
    for name, m in results.items():
        s = m.summary
        table.add_row(
            name,
            str(len(m.identity)),
            *(f"{s[k]:.3f}" for k in ("identity", "identity_first_block", "identity_last_block", "identity_lowest")),
            f"{m.start_angle:.1f}°",
            f"{m.start_within_45:.2f}",
            f"{m.bend_inside:.3f}",
            f"{m.bend_border:.3f}",
            f"{m.jump_ratio:.2f}",
            f"{sum(m.sharpness) / len(m.sharpness):.2f}",
            f"{sum(m.ink) / len(m.ink):.2f}",
        )
    Console(width=150).print(table)
