"""Adaptive layer normalisation and gated residual with one modulation per frame.

Source: DiT (arXiv 2212.09748), adaLN-Zero, with a timestep per frame as in CausVid (arXiv 2412.07772).
"""

from __future__ import annotations

import torch
from torch import Tensor


def modulated_layer_norm(
    x: Tensor,  # [B, L, C], L = F * frame_seqlen
    shift: Tensor,  # [B, F, C]
    scale: Tensor,  # [B, F, C]
    eps: float = 1e-6,
) -> Tensor:
    """layer_norm(x) (1 + scale) + shift over the channels, without other weights.

    Returns:
        [B, L, C] in the dtype of x; computed in float32 (float64 for float64).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    frames = _split_frames("x", x, shift)
    normed = torch.nn.functional.layer_norm(frames.to(dtype), (x.shape[-1],), eps=eps)
    y = normed * (1 + scale.to(dtype).unsqueeze(2)) + shift.to(dtype).unsqueeze(2)
    return y.flatten(1, 2).to(x.dtype)


def gated_residual(
    x: Tensor,  # [B, L, C], L = F * frame_seqlen
    y: Tensor,  # [B, L, C]
    gate: Tensor,  # [B, F, C]
) -> Tensor:
    """x + y gate, y first cast to the dtype of x, computed in float32 (float64 for float64), in the dtype of x."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    gated = _split_frames("y", y.to(x.dtype), gate).to(dtype) * gate.to(dtype).unsqueeze(2)
    return (x.to(dtype) + gated.flatten(1, 2)).to(x.dtype)


def _split_frames(name: str, tokens: Tensor, modulation: Tensor) -> Tensor:  # [B, F, frame_seqlen, C]
    if tokens.shape[1] % modulation.shape[1]:
        raise ValueError(
            f"{name} has {tokens.shape[1]} tokens, but must have a multiple of the {modulation.shape[1]} frames that "
            "are modulated"
        )
    return tokens.unflatten(1, (modulation.shape[1], -1))
