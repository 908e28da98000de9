"""A video model together with the text encoder it was trained with: what a weights file holds."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from python_ref.checkpoint import load_weights, save_weights
from python_ref.config import FlowConfig, ModelConfig
from python_ref.models.text import TextEncoder, TextEncoderConfig
from python_ref.models.wan import CausalWanModel, WanConfig, WanModel
from python_ref.schedule import FlowMatchSchedule


class CaptionedModel(nn.Module):
    """`model` (bidirectional or causal) and `text`, built from the settings that travel with the weights.

    Args:
        settings: "model" and "flow" (ModelConfig and FlowConfig as dicts), "words", "num_frames", "channels" and
            "frame_size"; JSON can hold it all.
        causal: whether `model` is a CausalWanModel or a WanModel; both have the same weights.
        backend: "ext" or "reference".
    """

    def __init__(self, settings: dict[str, Any], causal: bool, backend: str) -> None:
        super().__init__()
        self.settings = settings
        sizes = ModelConfig(**settings["model"])
        config = WanConfig(
            dim=sizes.dim,
            num_heads=sizes.num_heads,
            num_layers=sizes.num_layers,
            ffn_dim=sizes.ffn_dim,
            freq_dim=sizes.freq_dim,
            text_dim=sizes.text_dim,
            text_len=sizes.text_len,
            in_dim=settings["channels"],
            out_dim=settings["channels"],
            patch_size=tuple(sizes.patch_size),
            position_grid=self._token_grid(settings) if sizes.position_embedding else None,
        )
        self.model = (CausalWanModel if causal else WanModel)(config, backend)
        self.text = TextEncoder(
            TextEncoderConfig(settings["words"], sizes.text_len, sizes.text_dim, sizes.text_heads, sizes.text_layers)
        )

    @staticmethod
    def _token_grid(settings: dict[str, Any]) -> tuple[int, int]:
        _, patch_rows, patch_columns = settings["model"]["patch_size"]
        return settings["frame_size"] // patch_rows, settings["frame_size"] // patch_columns

    def schedule(self, num_steps: int | None = None) -> FlowMatchSchedule:
        """The noise levels it was trained with, or `num_steps` of them for sampling."""
        flow = FlowConfig(**self.settings["flow"])
        return FlowMatchSchedule(flow.shift, flow.num_train_timesteps, num_steps or flow.num_train_timesteps)

    def latent_shape(self, batch: int, num_frames: int | None = None) -> tuple[int, int, int, int, int]:
        """[B, F, C, H, W] of this model's videos, of the length it was trained on unless told."""
        s = self.settings
        return batch, num_frames or s["num_frames"], s["channels"], s["frame_size"], s["frame_size"]

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
        """Writes weights and settings to one safetensors file, with further facts such as stage and step."""
        save_weights(path, self.state_dict(), {**self.settings, **facts})

    @classmethod
    def load(cls, path: str | Path, causal: bool, backend: str) -> "CaptionedModel":
        """Rebuilds a model from a file made by `save`."""
        tensors, settings = load_weights(path)
        loaded = cls(settings, causal, backend)
        loaded.load_state_dict(tensors)
        return loaded
