"""Latents and embedded captions on disk, made once by `python -m python_ref.data.cache_latents`.

Large pretrained encoders then run once rather than in every step. A folder of `shard_*.safetensors`, each with `texts`
[tokens, text_dim], the embeddings of its captions one after the other, and as settings the captions, how many tokens
each has, and how all was made. Shards of videos also hold `latents` [N, F, C, H, W]; for training on rollouts captions
are enough. `uncond.safetensors` holds the embedding that stands for no caption.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from python_ref.checkpoint import read_tensors
from python_ref.data.order import shuffled
from python_ref.data.shards import read_settings
from python_ref.models.text import pad_texts

UNCOND_FILE = "uncond.safetensors"


@dataclass
class LatentsConfig:
    """Where the latents are and what shape they have: by default Wan2.1's of 81 frames of 480 x 832 pixels."""

    folder: str = ""
    num_frames: int = 21
    channels: int = 16
    frame_size: list[int] = field(default_factory=lambda: [60, 104])  # rows, columns
    vae: str = ""  # folder of an AutoencoderKLWan, to show samples; without it their first channels are shown
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_frames < 1 or self.channels < 1:
            raise ValueError(
                f"num_frames is {self.num_frames} and channels {self.channels}; accepted: 1 or more of each"
            )
        if len(self.frame_size) != 2 or min(self.frame_size) < 1:
            raise ValueError(f"frame_size is {list(self.frame_size)}; accepted: [rows, columns], 1 or more of each")


class CachedLatents:
    """Videos and captions of a folder, in a shuffled order without end, and the embeddings of the captions.

    Raises:
        FileNotFoundError: a folder without shards or without the unconditional embedding.
        ValueError: shards that were not made in the same way, or latents of another shape than the configuration's.
    """

    def __init__(self, config: LatentsConfig) -> None:
        self.config = config
        self._folder = Path(config.folder)
        self._paths = sorted(self._folder.glob("shard_*.safetensors"))
        uncond = self._folder / UNCOND_FILE
        if not config.folder or not self._paths or not uncond.is_file():
            raise FileNotFoundError(
                f"data.latents.folder is {config.folder!r}, which lacks shards or {UNCOND_FILE}; "
                "accepted: a folder written by python_ref.data.cache_latents"
            )
        settings = [read_settings(path) for path in self._paths]
        recipe = settings[0]["recipe"]
        for path, shard in zip((*self._paths, uncond), (*settings, read_settings(uncond)), strict=True):
            if shard["recipe"] != recipe:
                raise ValueError(f"{path} was not made as {self._paths[0]} was; accepted: shards of one recipe")
        self.text_len: int = recipe["text_len"]
        self.captions_of_all: list[str] = [caption for shard in settings for caption in shard["captions"]]
        self._starts = [0, *accumulate(len(shard["captions"]) for shard in settings)]
        self._text_ends = [[0, *accumulate(shard["text_lengths"])] for shard in settings]
        self._number = {caption: number for number, caption in enumerate(self.captions_of_all)}
        self._uncond = read_tensors(uncond)["texts"]
        self.has_videos: bool = recipe["video"] is not None
        if self.has_videos:
            self._check_shapes()

    def __len__(self) -> int:
        return len(self.captions_of_all)

    def batch(self, first: int, size: int) -> tuple[Tensor, list[str]]:
        """Videos `first` to `first + size - 1` of the sequence, float32 [B, F, C, H, W], and their captions.

        ValueError if the folder holds captions alone.
        """
        if not self.has_videos:
            raise ValueError(
                f"{self._folder} holds captions without videos; accepted: for training on rollouts, or the latents of "
                "videos (cache_latents --videos)"
            )
        order = shuffled(first, size, len(self), self.config.seed)
        return torch.stack([self._latents(index) for index in order]), [self.captions_of_all[i] for i in order]

    def captions(self, first: int, size: int) -> list[str]:
        """The captions of `batch(first, size)`."""
        return [self.captions_of_all[index] for index in shuffled(first, size, len(self), self.config.seed)]

    def embed(self, captions: Sequence[str]) -> Tensor:
        """Context float32 [B, text_len, text_dim], zeros after a caption's tokens; "" is the unconditional one.

        ValueError names a caption that was not embedded.
        """
        return pad_texts([self._tokens(caption) for caption in captions], self.text_len)

    def _tokens(self, caption: str) -> Tensor:
        """[tokens, text_dim] of one caption."""
        if not caption:
            return self._uncond
        if caption not in self._number:
            raise ValueError(f"caption {caption!r} is not embedded; accepted: the captions of {self._folder}")
        shard, place = self._find(self._number[caption])
        start, end = self._text_ends[shard][place : place + 2]
        with safe_open(str(self._paths[shard]), framework="pt") as file:  # reads these tokens only
            return file.get_slice("texts")[start:end]

    def _latents(self, index: int) -> Tensor:
        shard, place = self._find(index)
        with safe_open(str(self._paths[shard]), framework="pt") as file:
            return file.get_slice("latents")[place].float()

    def _find(self, index: int) -> tuple[int, int]:
        """In which shard an item is, and where."""
        shard = bisect.bisect_right(self._starts, index) - 1
        return shard, index - self._starts[shard]

    def _check_shapes(self) -> None:
        config = self.config
        expected = [config.num_frames, config.channels, *config.frame_size]
        for path in self._paths:
            with safe_open(str(path), framework="pt") as file:
                found = file.get_slice("latents").get_shape()[1:]
            if found != expected:
                raise ValueError(
                    f"{path} holds latents of shape {found}, but data.latents says [num_frames, channels, *frame_size]"
                    f" = {expected}"
                )


def preview(latents: Tensor) -> Tensor:
    """Something to look at without an autoencoder: the first three channels, three deviations wide."""
    return (latents[:, :, : 3 if latents.shape[2] >= 3 else 1] / 3).clamp(-1, 1)
