"""Is the digit still the one that was asked for? A classifier trained on the real scans reads every frame."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from sklearn.svm import SVC
from torch import Tensor

from python_ref.data.moving_digits import SCAN_SIZE, MovingDigits, MovingDigitsConfig, scans
from python_ref.measures.tracking import crop_around, ink, ink_centres


class DigitReader:
    """A support vector machine over 8x8 crops around the centre of ink.

    It learns from the scans of the training split, drawn at several subpixel positions just as the videos draw them.

    Args:
        digit_size: pixels of a scan in the videos.
        frame_size: pixels of a frame.
    """

    def __init__(self, digit_size: int = 12, frame_size: int = 24) -> None:
        self.digit_size = digit_size
        self._machine = SVC(kernel="rbf", C=10, gamma=0.05)
        features, labels = self._rendered("train", frame_size, copies=3)
        self._machine.fit(features, labels)
        features, labels = self._rendered("held_out", frame_size, copies=1)
        self.held_out_accuracy = float((self._machine.predict(features) == labels.numpy()).mean())

    def read(self, video: Tensor) -> Tensor:
        """The digit in every frame of [B, F, 1, H, W]: [B, F] int64."""
        batch, frames = video.shape[:2]
        return torch.from_numpy(self._machine.predict(self._features(video))).view(batch, frames).long()

    def identity(self, video: Tensor, labels: Tensor) -> Tensor:
        """Share of the videos whose digit reads as its label [B], per frame: [F]."""
        return (self.read(video) == labels[:, None]).float().mean(0)

    def _features(self, video: Tensor) -> Tensor:
        """[B, F, 1, H, W] to crops of the digit as rows [B * F, 64]."""
        crops = crop_around(ink(video), ink_centres(video), self.digit_size).flatten(0, 1)
        small = F.interpolate(crops[:, None], size=(SCAN_SIZE, SCAN_SIZE), mode="bilinear", antialias=True)
        return small.flatten(1)

    def _rendered(self, split: str, frame_size: int, copies: int) -> tuple[Tensor, Tensor]:
        digits = MovingDigits(MovingDigitsConfig(frame_size=frame_size, digit_size=self.digit_size, split=split))
        images, labels = scans(self.digit_size, split)
        generator = torch.Generator().manual_seed(0)
        room = frame_size - self.digit_size
        corners = torch.rand(len(images), copies, 1, 2, generator=generator) * room
        videos = digits.render(images[:, None], corners)
        return self._features(videos), labels.repeat_interleave(copies)


@lru_cache(maxsize=2)
def digit_reader(digit_size: int, frame_size: int) -> DigitReader:
    """The reader of these sizes, trained once per process (about a second)."""
    return DigitReader(digit_size, frame_size)
