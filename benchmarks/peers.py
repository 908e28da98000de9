"""Block-causal attention with what torch offers: the ways one would write it without this package.

Every function here takes and returns [B, L, H, D], as block_causal_attention does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from selfforcing_ext import BlockCausalMask

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Block = tuple[slice, list[slice]]  # queries, and the runs of keys they see


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def with_backend(attention: Attention, backend: SDPBackend) -> Attention:
    """The same by one kernel of torch's; it raises RuntimeError where that does not run."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return attention(q, k, v)

    return attend


def flash_attn(version: int) -> Attention:
    """The flash-attn package, 2 or 3, without a mask. Raises ImportError if it is not installed."""
    if version == 2:
        from flash_attn import flash_attn_func
    else:
        from flash_attn_interface import flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Any = flash_attn_func(q, k, v)
        return out[0] if isinstance(out, tuple) else out

    return attend


def blocks_of(mask: BlockCausalMask) -> list[Block]:
    table = mask.spans()
    starts, offsets, spans = (x.tolist() for x in (table.block_starts, table.span_offsets, table.spans))
    return [
        (slice(first, end), [slice(*span) for span in spans[offsets[block] : offsets[block + 1]]])
        for block, (first, end) in enumerate(itertools.pairwise(starts))
    ]


def sdpa_per_block(mask: BlockCausalMask) -> Attention:
    """A loop over the blocks; keys that do not lie together are copied together first."""
    blocks = blocks_of(mask)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outputs = []
        for queries, runs in blocks:
            keys, values = (x[:, runs[0]] if len(runs) == 1 else torch.cat([x[:, i] for i in runs], 1) for x in (k, v))
            outputs.append(sdpa(q[:, queries], keys, values))
        return torch.cat(outputs, 1)

    return attend


class MergedSpans(torch.autograd.Function):
    """SDPA on every span, merged by lse (FlashAttention, arXiv 2205.14135, algorithm 1). Backward calls torch's kernel
    with the merged output and lse, for which the gradients of the spans add up."""

    @staticmethod
    def forward(ctx, blocks: list[Block], q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        outputs, lses = [], []
        for queries, runs in blocks:
            parts = [
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q[:, :, queries], k[:, :, i], v[:, :, i])
                for i in runs
            ]
            out, lse = parts[0]
            for more, more_lse in parts[1:]:
                both = torch.logaddexp(lse, more_lse)
                weights = (torch.exp(x - both).unsqueeze(-1).to(q.dtype) for x in (lse, more_lse))
                out, lse = sum(w * x for w, x in zip(weights, (out, more), strict=True)), both
            outputs.append(out)
            lses.append(lse)
        out, lse = torch.cat(outputs, 2), torch.cat(lses, 2)
        ctx.blocks = blocks
        ctx.save_for_backward(q, k, v, out, lse)
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        q, k, v, out, lse = ctx.saved_tensors
        grad = grad.transpose(1, 2)
        grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q, k, v))
        for queries, runs in ctx.blocks:
            for i in runs:
                parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    *(x[:, :, queries] if x is q or x is grad else x[:, :, i] for x in (grad, q, k, v)),
                    out[:, :, queries],
                    lse[:, :, queries],
                    0.0,
                    False,
                )
                for total, part in zip((grad_q[:, :, queries], grad_k[:, :, i], grad_v[:, :, i]), parts, strict=True):
                    total += part
        return None, *(x.transpose(1, 2) for x in (grad_q, grad_k, grad_v))


def sdpa_per_span(mask: BlockCausalMask) -> Attention:
    """A loop over the blocks and their spans; no key is copied."""
    return partial(MergedSpans.apply, blocks_of(mask))


def flex(mask: BlockCausalMask) -> Attention:
    """FlexAttention, compiled; on the CPU it has no backward."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    visible = mask.dense()
    block_mask = create_block_mask(lambda b, h, i, j: visible[i, j], None, None, mask.seqlen, mask.seqlen, device="cpu")
    return _flex(torch.compile(flex_attention), block_mask)


def flex_block_causal(mask: BlockCausalMask, device: str, compiled: bool = True) -> Attention:
    """The same without window and sink, where a formula says who sees whom: what one would write for a long video."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tokens = mask.frames_per_block * mask.frame_seqlen
    length = mask.seqlen
    block_mask = create_block_mask(lambda b, h, i, j: j // tokens <= i // tokens, None, None, length, length, device)
    return _flex(torch.compile(flex_attention) if compiled else flex_attention, block_mask)


def _flex(attention: Callable[..., Any], block_mask: object) -> Attention:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out: Tensor = attention(q, k, v, block_mask=block_mask)
        return out.transpose(1, 2)

    return attend
