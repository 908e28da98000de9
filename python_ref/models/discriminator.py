"""A discriminator on the features of a video model: is a noised video real or generated?

Source: Self-Forcing (arXiv 2506.08009), section 3.3 and its published code, after APT (arXiv 2501.08316):
learned register tokens gather the features of a few layers by cross-attention. Parameter names are the published ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from python_ref.models.wan import EncodedContext, WanModel
from python_ref.models.wan_layers import CrossAttention, LayerNorm, WanConfig, wide
from python_ref.precision import without_autocast

PUBLISHED_LAYERS = (13, 21, 29)  # of 30
TIME_SCALE = 10.0  # of the embedded timestep beside the registers


class RegisterTokens(nn.Module):
    """Learned tokens [num_registers, dim], normalised."""

    def __init__(self, num_registers: int, config: WanConfig) -> None:
        super().__init__()
        self.register_tokens = nn.Parameter(0.02 * torch.randn(num_registers, config.dim))
        self.rms_norm = nn.RMSNorm(config.dim, config.eps)

    def forward(self) -> Tensor:
        return self.rms_norm(self.register_tokens)


class RegisterBlock(nn.Module):
    """A register reads the tokens of a layer by cross-attention; a feed-forward follows."""

    def __init__(self, config: WanConfig, ops: Any) -> None:
        super().__init__()
        self.eps = config.eps
        self.norm3 = LayerNorm(config.dim, config.eps)
        self.cross_attn = CrossAttention(config, ops)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, config.dim)
        )

    def forward(self, register: Tensor, tokens: Tensor) -> Tensor:
        """register [B, 1, dim], tokens [B, L, dim]; the new register."""
        read = register + self.cross_attn(register, *self.cross_attn.keys_and_values(self.norm3(tokens)))
        return read + self.ffn(functional.layer_norm(wide(read), read.shape[-1:], eps=self.eps).to(read.dtype))


class Discriminator(nn.Module):
    """Logits from a video model's features; the model itself is trained along.

    Args:
        model: the fake score, whose weights the discriminator starts from.
        layers: whose outputs the registers read, one register each.
        ffn_dim: of the registers' feed-forward; None: the model's.
        num_classes: logits per video.
        sees_time: the embedded timestep stands beside the registers.

    Raises:
        ValueError: layers that the model does not have.
    """

    def __init__(
        self,
        model: WanModel,
        layers: Sequence[int] = PUBLISHED_LAYERS,
        ffn_dim: int | None = None,
        num_classes: int = 1,
        sees_time: bool = False,
    ) -> None:
        super().__init__()
        config = replace(model.config, ffn_dim=ffn_dim or model.config.ffn_dim)
        if not layers or any(not 0 <= layer < config.num_layers for layer in layers):
            raise ValueError(
                f"layers is {list(layers)}, but must name some of the model's 0 to {config.num_layers - 1}"
            )
        self.model = model
        self.layers = tuple(layers)
        self.sees_time = sees_time
        width = config.dim * (len(layers) + int(sees_time))
        self._cls_pred_branch = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, config.dim), nn.SiLU(), nn.Linear(config.dim, num_classes)
        )
        self._register_tokens = RegisterTokens(len(layers), config)
        self._gan_ca_blocks = nn.ModuleList(RegisterBlock(config, model.ops) for _ in layers)

    def forward(
        self,
        x: Tensor,  # [B, F, C, H, W]
        t: Tensor,  # [B]
        context: Tensor | EncodedContext,  # [B, text_len, text_dim]
    ) -> Tensor:
        """Logits [B, num_classes]: high for real videos. Arguments as of ``WanModel``."""
        features, time = self.model.features(x, t, context, self.layers)
        registers = self._register_tokens().expand(x.shape[0], -1, -1).split(1, dim=1)
        read = [
            block(register, tokens)
            for block, register, tokens in zip(self._gan_ca_blocks, registers, features, strict=True)
        ]
        if self.sees_time:
            read.append(TIME_SCALE * time)
        # In the weights' dtype even under autocast: penalties are differences of logits, which rounding would swamp.
        with without_autocast(x.device.type):
            weight = self._cls_pred_branch[0].weight
            return self._cls_pred_branch(torch.cat(read, dim=1).flatten(1).to(weight.dtype))
