"""A causal Wan model of a few thousand parameters on our ops, and inputs for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from python_ref.models.wan import CausalWanModel, WanConfig
from selfforcing_ext import BlockCausalMask

CONFIG = WanConfig(
    dim=32, num_heads=2, num_layers=2, ffn_dim=64, freq_dim=16, text_dim=12, text_len=5, in_dim=4, out_dim=4
)
LATENT = (4, 4, 6)  # C, H, W
FRAME_SEQLEN = 6  # tokens of a frame
MASK = BlockCausalMask(4, FRAME_SEQLEN, 2, window_frames=3, sink_frames=1)


def model(seed: int = 0) -> CausalWanModel:
    torch.manual_seed(seed)
    generator = CausalWanModel(CONFIG, backend="ext")
    nn.init.normal_(generator.head.head.weight, std=0.1)  # it starts at zero, which would hide everything before it
    return generator


def inputs(batch: int = 2, frames: int = 4, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, F, C, H, W], t [B, F] and context [B, text_len, text_dim]."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, frames, *LATENT, generator=generator),
        1000 * torch.rand(batch, frames, generator=generator),
        torch.randn(batch, CONFIG.text_len, CONFIG.text_dim, generator=generator),
    )
