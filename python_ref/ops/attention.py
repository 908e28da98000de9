"""Block-causal attention: softmax attention under a span mask.

Source: Self-Forcing (arXiv 2506.08009), section 3; softmax attention as in arXiv 1706.03762, equation 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from python_ref.precision import autocast_dtype
from selfforcing_ext.mask import BlockCausalMask


def block_causal_attention(
    q: Tensor,  # [B, Lq, H, D]
    k: Tensor,  # [B, Lk, H_kv, D]
    v: Tensor,  # [B, Lk, H_kv, D]
    mask: BlockCausalMask | None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of each query over the keys that the mask shows it.

    Args:
        q, k, v: one dtype. H_kv divides H; query head h reads key head h // (H / H_kv). Under autocast they are cast
            to the autocast dtype.
        mask: who sees whom; None: every query sees every key.
        softmax_scale: factor on q.k before the softmax; None: D ** -0.5.
        return_lse: also return the logarithm of the softmax denominator.

    Returns:
        out [B, Lq, H, D] in the dtype of q, and if asked lse [B, H, Lq], natural logarithm, float32 (float64 for
        float64 inputs). A query that sees no key gets 0 and -inf.

    Raises:
        ValueError: the mask's sequence length is not that of q and k.
    """
    q, k, v = cast_to_autocast_dtype(q, k, v)
    visible = None
    if mask is not None:
        for name, tensor in (("q", q), ("k", k)):
            if tensor.shape[1] != mask.seqlen:
                raise ValueError(f"{name} has {tensor.shape[1]} tokens, but mask.seqlen is {mask.seqlen}")
        visible = mask.spans().dense(q.device)
    out, lse = masked_softmax_attention(q, k, v, visible, softmax_scale)
    return (out, lse) if return_lse else out


@torch.autocast("cpu", enabled=False)
@torch.autocast("cuda", enabled=False)
def masked_softmax_attention(
    q: Tensor,  # [B, Lq, H, D]
    k: Tensor,  # [B, Lk, H_kv, D]
    v: Tensor,  # [B, Lk, H_kv, D]
    visible: Tensor | None,  # bool [Lq, Lk]
    softmax_scale: float | None = None,
    bias: Tensor | None = None,  # [Lk]
) -> tuple[Tensor, Tensor]:
    """out [B, Lq, H, D] and lse [B, H, Lq] under a dense mask (None: everything is visible).

    ``bias``: added to the scaled scores of each key.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = scale * torch.einsum("bqhd,bkhd->bhqk", q.to(dtype), k.to(dtype))
    if bias is not None:
        scores = scores + bias.to(dtype)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    # A row without keys has maximum -inf and sum 0; both are replaced before they can make a NaN, also in backward.
    maximum = scores.detach().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(dtype).min)
    weights = torch.exp(scores - maximum)
    total = weights.sum(dim=-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1)
    out = torch.einsum("bhqk,bkhd->bqhd", weights / total, v.to(dtype))
    lse = (total.log() + maximum).masked_fill(empty, -torch.inf)
    return out.to(q.dtype), lse.squeeze(-1)


def cast_to_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as scaled_dot_product_attention would see them: cast under autocast, float64 left alone."""
    dtype = autocast_dtype(tensors[0].device.type)
    if dtype is None:
        return tensors
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)
