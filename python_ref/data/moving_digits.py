"""Handwritten digits in motion: real scans that bounce in a frame, with a caption for each video.

The scans are the 1797 handwritten digits that ship with scikit-learn (`load_digits`, 8x8 pixels, 43 writers, from
E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI), so nothing is downloaded. The idea of
bouncing digits is that of Moving MNIST (Srivastava et al., arXiv 1502.04681).

Every video is a function of (seed, index) alone: a counter-based hash gives its random numbers, so batches can be
made in any order, by any number of workers, on any platform, and a resumed run sees the same data.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

SCAN_SIZE = 8
HELD_OUT_EVERY = 5  # scans 0, 5, 10, ... are kept away from training

# The compass, counter-clockwise from "right"; image rows grow downwards, so "up" is a negative row velocity.
DIRECTIONS = ("right", "up and right", "up", "up and left", "left", "down and left", "down", "down and right")


def direction_vector(direction: str) -> tuple[float, float]:
    """Unit vector (row, column) of a compass direction in the wording of the captions."""
    if direction not in DIRECTIONS:
        raise ValueError(f"direction is {direction!r}; accepted: {', '.join(DIRECTIONS)}")
    angle = DIRECTIONS.index(direction) * np.pi / 4
    return -float(np.sin(angle)), float(np.cos(angle))


@dataclass
class MovingDigitsConfig:
    """How the videos look. Lengths are pixels, speeds are pixels per frame."""

    frame_size: int = 24
    digit_size: int = 12
    num_frames: int = 12
    num_digits: int = 1  # digits in every video, 1 or 2
    min_speed: float = 1.0
    max_speed: float = 2.0
    straight_frames: int = 3  # first steps that never bounce, so that the caption's direction can be seen
    omit_motion_probability: float = 0.1  # how often the caption names the digits alone
    split: str = "train"  # "train" or "held_out": which scans
    seed: int = 0

    def __post_init__(self) -> None:
        room = self.frame_size - self.digit_size
        if self.digit_size < SCAN_SIZE or room < 1:
            raise ValueError(
                f"digit_size is {self.digit_size} in frames of frame_size {self.frame_size}; "
                f"accepted: {SCAN_SIZE} <= digit_size < frame_size"
            )
        if self.num_frames < 1:
            raise ValueError(f"num_frames is {self.num_frames}; accepted: 1 or more")
        if self.num_digits not in (1, 2):
            raise ValueError(f"num_digits is {self.num_digits}; accepted: 1 or 2")
        if self.split not in ("train", "held_out"):
            raise ValueError(f"split is {self.split!r}; accepted: 'train' or 'held_out'")
        if not 0 <= self.min_speed <= self.max_speed:
            raise ValueError(f"min_speed is {self.min_speed}, max_speed {self.max_speed}; accepted: 0 <= min <= max")
        if self.max_speed * self.straight_frames > room:
            raise ValueError(
                f"max_speed {self.max_speed} over straight_frames {self.straight_frames} leaves the frame; "
                f"accepted: a product of at most {room} pixels (frame_size - digit_size)"
            )
        if not 0 <= self.omit_motion_probability <= 1:
            raise ValueError(f"omit_motion_probability is {self.omit_motion_probability}; accepted: 0 to 1")


@dataclass
class VideoBatch:
    """Videos with all that is known about them."""

    video: torch.Tensor  # [B, F, 1, H, W] float32, -1 (background) to 1 (ink)
    captions: list[str]  # B
    labels: torch.Tensor  # [B, N] int64, the digit shown by each of the N moving scans
    centres: torch.Tensor  # [B, F, N, 2] float32, (row, column) of each scan's middle, in pixels
    velocities: torch.Tensor  # [B, N, 2] float32, (row, column) pixels per frame at frame 0
    bounces: torch.Tensor  # [B, F, N] bool, whether the step from the frame before touched a wall


@lru_cache(maxsize=4)
def scans(size: int, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The scans of a split, smoothly resized: images [S, size, size] float32 in 0..1, labels [S] int64."""
    data = load_digits()
    held_out = np.arange(len(data.target)) % HELD_OUT_EVERY == 0
    chosen = held_out if split == "held_out" else ~held_out
    images = torch.tensor(data.images[chosen] / 16.0, dtype=torch.float32)
    if size != SCAN_SIZE:
        resized = F.interpolate(images[:, None], size=(size, size), mode="bicubic", antialias=True)
        images = resized[:, 0].clamp(0, 1)  # bicubic overshoots at edges
    return images, torch.tensor(data.target[chosen], dtype=torch.int64)


def hashed_uniform(seed: int, index: np.ndarray, draws: int) -> np.ndarray:
    """`draws` uniform numbers in [0, 1) for every index, by SplitMix64 (Steele et al., OOPSLA 2014).

    index: [B] integers. Returns [B, draws] float64 that depend on (seed, index, draw) alone.
    """

    def mix(z: np.ndarray) -> np.ndarray:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is the point
        stream = mix(np.asarray([seed % 2**64], dtype=np.uint64) + golden)
        video = mix(stream + golden * (index.astype(np.uint64) + np.uint64(1)))
        state = video[:, None] + golden * np.arange(1, draws + 1, dtype=np.uint64)
        return (mix(state) >> np.uint64(11)).astype(np.float64) / 2**53


class MovingDigits:
    """Deterministic source of moving-digit videos; `batch(first, size)` gives videos first .. first + size - 1."""

    def __init__(self, config: MovingDigitsConfig) -> None:
        self.config = config
        self.images, self.image_labels = scans(config.digit_size, config.split)

    def batch(self, first: int, size: int) -> VideoBatch:
        """Videos `first` to `first + size - 1` of the endless sequence that config.seed names."""
        if first < 0 or size < 1:
            raise ValueError(f"first is {first}, size {size}; accepted: first >= 0 and size >= 1")
        c = self.config
        room = c.frame_size - c.digit_size
        draws = hashed_uniform(c.seed, np.arange(first, first + size), 5 * c.num_digits + 1)
        omit = draws[:, -1] < c.omit_motion_probability
        which, angle, speed, row, column = np.moveaxis(draws[:, :-1].reshape(size, c.num_digits, 5), 2, 0)

        scan = (which * len(self.images)).astype(np.int64)  # [B, N]
        labels = self.image_labels[torch.from_numpy(scan)]
        angle = 2 * np.pi * angle
        speed = c.min_speed + (c.max_speed - c.min_speed) * speed
        velocity = np.stack([-np.sin(angle), np.cos(angle)], axis=-1) * speed[..., None]  # [B, N, 2]

        # Start where the first straight_frames steps stay inside, then unfold the walls into a straight line.
        reach = velocity * c.straight_frames
        low, high = np.maximum(0, -reach), np.minimum(room, room - reach)
        start = low + (high - low) * np.stack([row, column], axis=-1)
        unfolded = start[:, None] + velocity[:, None] * np.arange(c.num_frames)[None, :, None, None]  # [B, F, N, 2]
        corner = room - np.abs(unfolded % (2 * room) - room)
        cell = np.floor(unfolded / room)
        bounces = np.zeros(cell.shape[:3], dtype=bool)
        bounces[:, 1:] = (cell[:, 1:] != cell[:, :-1]).any(axis=-1)

        corner = torch.from_numpy(corner).float()
        return VideoBatch(
            video=self.render(self.images[torch.from_numpy(scan)], corner),
            captions=[caption(*row) for row in zip(labels.tolist(), angle, omit, strict=True)],
            labels=labels,
            centres=corner + (c.digit_size - 1) / 2,
            velocities=torch.from_numpy(velocity).float(),
            bounces=torch.from_numpy(bounces),
        )

    def render(self, images: torch.Tensor, corner: torch.Tensor) -> torch.Tensor:
        """Pastes images [B, N, S, S] with their top left at corner [B, F, N, 2]; returns [B, F, 1, H, W].

        A bilinear paste at a subpixel position is separable: tent weights for rows times tent weights for columns.
        """
        pixel = torch.arange(self.config.frame_size, dtype=torch.float32)
        texel = torch.arange(self.config.digit_size, dtype=torch.float32)
        offset = pixel[:, None] - texel  # [H, S]
        tent = (1 - (offset - corner[..., None, None]).abs()).clamp_min_(0)  # [B, F, N, 2, H, S]
        rows, columns = tent[:, :, :, 0], tent[:, :, :, 1]
        pasted = rows @ images[:, None] @ columns.transpose(-1, -2)  # [B, F, N, H, W]
        return pasted.amax(dim=2, keepdim=True) * 2 - 1


def caption(labels: list[int], angles: np.ndarray, omit_motion: bool) -> str:
    """The words for one video: labels [N], angles [N] in radians, counter-clockwise from "right"."""
    if omit_motion:
        return " and ".join(f"a {label}" for label in labels)
    compass = np.round(angles / (np.pi / 4)).astype(int) % len(DIRECTIONS)
    return " and ".join(f"a {label} moving {DIRECTIONS[c]}" for label, c in zip(labels, compass, strict=True))


def caption_words() -> tuple[str, ...]:
    """Every word that a caption of moving digits can hold, for the vocabulary of the text encoder."""
    return ("a", "and", "moving", "up", "down", "left", "right", *(str(d) for d in range(10)))
