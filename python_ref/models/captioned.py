"""A video model together with the text encoder it was trained with: what a weights file holds."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from python_ref.checkpoint import load_weights, save_weights
from python_ref.config import FlowConfig, ModelConfig
from python_ref.models.lora import merged_weights
from python_ref.models.text import TextEncoder, TextEncoderConfig
from python_ref.models.wan import CausalWanModel, WanConfig, WanModel
from python_ref.schedule import FlowMatchSchedule

Embed = Callable[[Sequence[str]], Tensor]  # B captions to a context [B, text_len, text_dim]


class GivenTexts(nn.Module):
    """Stands for a text encoder that is neither trained nor saved with the model: embeddings that were cached, or a
    large pretrained encoder. Copies share it.

    Args:
        embed: makes the contexts; the empty caption is the unconditional one. None: there is no encoder yet.
    """

    def __init__(self, embed: Embed | None) -> None:
        super().__init__()
        self.embed = embed

    def forward(self, captions: Sequence[str]) -> Tensor:
        """Context [B, text_len, text_dim] of B captions."""
        if self.embed is None:
            raise ValueError(
                "these weights come without a text encoder; accepted: data.source=latents, where captions are embedded"
            )
        return self.embed(captions)

    def uncond(self, batch: int) -> Tensor:
        return self(("",)).expand(batch, -1, -1)

    def __deepcopy__(self, memo: dict[int, Any]) -> "GivenTexts":
        return self


class CaptionedModel(nn.Module):
    """`model` (bidirectional or causal) and `text`, built from the settings that travel with the weights.

    Args:
        settings: "model" and "flow" (ModelConfig and FlowConfig as dicts), "words", "num_frames", "channels" and
            "frame_size" (one number for squares, or rows and columns); JSON can hold it all. Without words the model
            has no text encoder of its own.
        causal: whether `model` is a CausalWanModel or a WanModel; both have the same weights.
        backend: "ext" or "reference".
        embed: makes the contexts of captions, where the model has no text encoder of its own.

    Raises:
        ValueError: `embed` is given, but the model has a text encoder.
    """

    def __init__(self, settings: dict[str, Any], causal: bool, backend: str, embed: Embed | None = None) -> None:
        super().__init__()
        self.settings = settings
        sizes = ModelConfig(**settings["model"])
        config = wan_config(sizes, settings["channels"], rows_and_columns(settings["frame_size"]))
        self.model = (CausalWanModel if causal else WanModel)(config, backend)
        if not settings["words"]:
            self.text: nn.Module = GivenTexts(embed)
            return
        if embed is not None:
            raise ValueError("embed is given, but these weights have a text encoder of their own; accepted: None")
        self.text = TextEncoder(
            TextEncoderConfig(settings["words"], sizes.text_len, sizes.text_dim, sizes.text_heads, sizes.text_layers)
        )

    def schedule(self, num_steps: int | None = None) -> FlowMatchSchedule:
        """The noise levels it was trained with, or `num_steps` of them for sampling."""
        flow = FlowConfig(**self.settings["flow"])
        return FlowMatchSchedule(flow.shift, flow.num_train_timesteps, num_steps or flow.num_train_timesteps)

    def latent_shape(self, batch: int, num_frames: int | None = None) -> tuple[int, int, int, int, int]:
        """[B, F, C, H, W] of this model's videos, of the length it was trained on unless told."""
        s = self.settings
        return batch, num_frames or s["num_frames"], s["channels"], *rows_and_columns(s["frame_size"])

    @torch.no_grad()
    def contexts(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Context of the captions and of as many empty ones, [B, text_len, text_dim] each, without gradient."""
        return self.text(captions), self.text.uncond(len(captions))

    def frozen(self) -> "CaptionedModel":
        """The same module with every weight fixed."""
        return self.requires_grad_(False).eval()

    def average_copy(self) -> "CaptionedModel":
        """A fixed copy, to become the moving average of this module's weights."""
        return copy.deepcopy(self).frozen()

    def save(self, path: str | Path, **facts: Any) -> None:
        """Writes weights (adapters merged into them) and settings to one safetensors file, with further facts such as
        stage and step."""
        save_weights(path, merged_weights(self), {**self.settings, **facts})

    @classmethod
    def load(cls, path: str | Path, causal: bool, backend: str, embed: Embed | None = None) -> "CaptionedModel":
        """Rebuilds a model from a file made by `save`; `embed` as for the class."""
        tensors, settings = load_weights(path)
        loaded = cls(settings, causal, backend, embed)
        loaded.load_state_dict(tensors)
        return loaded


def rows_and_columns(frame_size: int | Sequence[int]) -> tuple[int, int]:
    """Of frames of `frame_size`: one number for squares, or both."""
    if isinstance(frame_size, int):
        return frame_size, frame_size
    rows, columns = frame_size
    return rows, columns


def wan_config(sizes: ModelConfig, channels: int, frame: tuple[int, int]) -> WanConfig:
    """The sizes of the video model of a configuration, for videos of `channels` and frames of (rows, columns)."""
    _, patch_rows, patch_columns = sizes.patch_size
    return WanConfig(
        dim=sizes.dim,
        num_heads=sizes.num_heads,
        num_layers=sizes.num_layers,
        ffn_dim=sizes.ffn_dim,
        freq_dim=sizes.freq_dim,
        text_dim=sizes.text_dim,
        text_len=sizes.text_len,
        in_dim=channels,
        out_dim=channels,
        patch_size=tuple(sizes.patch_size),
        position_grid=(frame[0] // patch_rows, frame[1] // patch_columns) if sizes.position_embedding else None,
    )
