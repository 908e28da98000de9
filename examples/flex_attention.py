"""FlexAttention masks on our kernels, and what happens to masks that are not of span form.

    python examples/flex_attention.py

Masks as models for video and text write them for FlexAttention go through ``flex_attention`` and through our stand-in:
same numbers, and a backward pass on the CPU, which flex_attention does not have. Lengths are multiples of nothing.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

sys.path.insert(0, str(Path(__file__).parents[1]))

from selfforcing_ext.integrations.flex_attention import flex_attention_compatible, span_table_of

FRAME, BLOCK = 50, 150  # tokens of a frame, and of a block of three
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64


def causal(b, h, q, k):
    return q >= k


def block_causal(b, h, q, k):
    return k < (q // BLOCK + 1) * BLOCK


def local(b, h, q, k):
    """Block-causal, but only the first frame and the newest six frames."""
    end = (q // BLOCK + 1) * BLOCK
    return (k < end) & ((k >= end - 6 * FRAME) | (k < FRAME))


def teacher_forcing(b, h, q, k):
    """[clean; noisy] of 750 tokens each: a noisy block sees the clean blocks before it, and itself."""
    block_q, block_k = q % 750 // BLOCK, k % 750 // BLOCK
    clean = (k < 750) & torch.where(q < 750, block_k <= block_q, block_k < block_q)
    return clean | ((q >= 750) & (k >= 750) & (block_q == block_k))


def documents(b, h, q, k):
    """Five documents of 100 to 500 tokens in one sequence."""
    ends = torch.tensor([300, 400, 900, 1100, 1500])
    return torch.searchsorted(ends, q, right=True) == torch.searchsorted(ends, k, right=True)


def checkerboard(b, h, q, k):
    return (q + k) % 2 == 0


def inputs(length: int) -> list[Tensor]:
    """query, key, value [1, heads, length, 64], as a projection leaves them in memory."""
    return [torch.randn(1, length, heads, HEAD_DIM).transpose(1, 2) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def main() -> None:
    warnings.filterwarnings("ignore", message=".*flex_attention called without torch.compile")
    torch.manual_seed(0)
    print(f"{'mask':>16s}  blocks   spans  difference")
    for mask_mod in (causal, block_causal, local, teacher_forcing, documents):
        block_mask = create_block_mask(mask_mod, None, None, 1500, 1500, device="cpu")
        table = span_table_of(block_mask)  # made once; a warning says that token-causal masks are slow
        query, key, value = inputs(1500)
        theirs = flex_attention(query, key, value, block_mask=block_mask, enable_gqa=True)
        ours = flex_attention_compatible(query, key, value, block_mask=block_mask, enable_gqa=True)
        difference = float((ours - theirs).norm() / theirs.norm())
        print(f"{mask_mod.__name__:>16s}  {len(table.block_starts) - 1:6d}  {len(table.spans):6d}  {difference:10.1e}")

    trained = [tensor.requires_grad_() for tensor in inputs(1500)]
    block_mask = create_block_mask(teacher_forcing, None, None, 1500, 1500, device="cpu")
    flex_attention_compatible(*trained, block_mask=block_mask, enable_gqa=True).square().mean().backward()
    print("\ngradients:", *(f"{tensor.grad.norm():.2e}" for tensor in trained))

    try:
        span_table_of(create_block_mask(checkerboard, None, None, 1500, 1500, device="cpu"))
    except ValueError as error:
        print(f"\ncheckerboard: {error}")


if __name__ == "__main__":
    main()
