"""FlexAttention masks on our kernels: ``flex_attention_compatible`` stands in for torch's ``flex_attention``.

A ``BlockMask`` is turned into spans once, from its ``mask_mod`` at every query and every key, and keeps them. Lengths
need not be multiples of 128, nothing is padded, and nothing is compiled.

Source of the masks: FlexAttention (arXiv 2412.05496).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import (
    AuxOutput,
    AuxRequest,
    BlockMask,
    FlexKernelOptions,
    create_mask,
    noop_mask,
)

from selfforcing_ext.attention import attention_over_spans, check_shapes, full_table, op_inputs
from selfforcing_ext.integrations.span_form import MAX_SPANS, read_spans
from selfforcing_ext.library import nvtx_range
from selfforcing_ext.mask import SpanTable

# The table lives on the mask itself and not in a dictionary with weak keys: torch.compile puts no guard on which key
# was looked up, and would hand the table of one mask to all.
_ATTRIBUTE = "_selfforcing_span_table"

_HIDDEN, _PARTIAL, _FULL = 0, 1, 2  # what the lists of a BlockMask say of a tile


@torch.compiler.disable(  # type: ignore[no-untyped-call]
    reason="span_table_of reads the values of a mask; call it once before the compiled function"
)
def span_table_of(block_mask: BlockMask, max_spans: int = MAX_SPANS) -> SpanTable:
    """The spans of a BlockMask: of any mask function and any BLOCK_SIZE, as long as all batches and heads share it.

    Every query and key is looked at, and the lists of full and partial tiles must agree with the mask function: where
    they do not, FlexAttention itself gives one result compiled and another uncompiled. A mask without a mask function
    (``BlockMask.from_kv_blocks``) is what its lists say. The table is computed once and kept on the mask; a mask
    function whose captured tensors change needs a new BlockMask.

    A mask that was made for one batch and one head (``B=None``, ``H=None``) is taken at its word: its function is asked
    about batch 0 and head 0.

    Args:
        block_mask: a mask in which every query sees a few contiguous runs of keys. It takes one evaluation of the mask
            function at each of its positions, a few million at a time.
        max_spans: the most runs that a query may see.

    Returns:
        The table, on the device of the mask.

    Raises:
        TypeError: not a BlockMask.
        ValueError: a query sees more runs, batches or heads have different masks, or the lists contradict the mask
            function. The message names the query and the key.

    Warns:
        UserWarning: so few consecutive queries share their keys (one, for a token-causal mask) that other attention is
            faster.
    """
    _check_type(block_mask)
    kept: SpanTable | None = getattr(block_mask, _ATTRIBUTE, None)
    if kept is not None:
        return kept
    reader = _Reader(block_mask)
    table: SpanTable = read_spans(reader.rows, *block_mask.seq_lengths, name="block_mask", max_spans=max_spans)
    table = table.to(block_mask.kv_indices.device)
    setattr(block_mask, _ATTRIBUTE, table)
    return table


@nvtx_range("flex_attention_compatible")
def flex_attention_compatible(
    query: Tensor,  # [B, H, Lq, D]
    key: Tensor,  # [B, H_kv, Lk, D]
    value: Tensor,  # [B, H_kv, Lk, D]
    score_mod: BlockMask | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: FlexKernelOptions | None = None,
    *,
    return_aux: AuxRequest | None = None,
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, AuxOutput]:
    """Stands in for ``torch.nn.attention.flex_attention.flex_attention``, with its arguments in its order.

    Forward and backward on the CPU and on CUDA; the inputs are read where they lie, without copies.

    Args:
        query, key, value: float32, bfloat16 or float16. D is a multiple of 8 up to 256 and the same for all three, and
            the last dimension is contiguous.
        score_mod: None. The mask may stand here as well, so that ``(query, key, value, block_mask)`` is a call.
        block_mask: who sees whom, in span form (see span_table_of); None: every query sees every key. Lq and Lk are the
            lengths it was made for.
        scale: factor on query.key before the softmax; None: D ** -0.5.
        enable_gqa: H may be a multiple of H_kv.
        return_lse: also return the logarithm of the softmax denominator, float32 [B, H, Lq].
        kernel_options: ignored, since they tune the kernels of FlexAttention.
        return_aux: ``AuxRequest(lse=True)``: also return ``AuxOutput(lse)``. Maximal scores are not available.

    Returns:
        [B, H, Lq, D] in the dtype of query, in memory [B, Lq, H, D]; with the logarithm if asked. A query that sees no
        key gets 0 and -inf.

    Raises:
        TypeError, ValueError: what span_table_of and block_causal_attention raise, and for a score_mod, maximal scores
            or lengths that are not those of the mask.
    """
    if isinstance(score_mod, BlockMask) and block_mask is None:
        score_mod, block_mask = None, score_mod
    if score_mod is not None:
        raise ValueError("score_mod is given, but must be None: spans show or hide keys and cannot change scores")
    if return_aux is not None and return_aux.max_scores:
        raise ValueError("return_aux asks for max_scores, but only lse is available")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, but must have four dimensions [B, H, L, D]")
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"key has {key.shape[1]} heads and query {query.shape[1]}, but both must have the same number unless "
            "enable_gqa is True"
        )
    q, k, v = op_inputs(query=query.transpose(1, 2), key=key.transpose(1, 2), value=value.transpose(1, 2))
    check_shapes(q, k, v)
    table = full_table(q.shape[1], k.shape[1], q.device) if block_mask is None else table_for(block_mask, q, k)
    out, lse = attention_over_spans(q, k, v, table, softmax_scale=scale)
    out = out.transpose(1, 2)
    if return_aux is not None:
        return out, AuxOutput(lse=lse if return_aux.lse else None)
    return (out, lse) if return_lse else out


def table_for(block_mask: BlockMask, q: Tensor, k: Tensor) -> SpanTable:
    """The table, if the mask was made for the lengths and the device of q and k [B, L, H, D]."""
    _check_type(block_mask)
    for name, tensor, wanted in (("query", q, block_mask.seq_lengths[0]), ("key", k, block_mask.seq_lengths[1])):
        if tensor.shape[1] != wanted:
            raise ValueError(
                f"{name} has {tensor.shape[1]} tokens, but block_mask was made for {wanted}; make it with Q_LEN and "
                f"KV_LEN = {q.shape[1]} and {k.shape[1]}: no padding is needed"
            )
    if block_mask.kv_indices.device != q.device:
        raise ValueError(f"block_mask is on {block_mask.kv_indices.device}, but must be on {q.device} like query")
    table: SpanTable | None = getattr(block_mask, _ATTRIBUTE, None)  # read here, where torch.compile can follow
    return span_table_of(block_mask) if table is None else table


def _check_type(block_mask: object) -> None:
    if not isinstance(block_mask, BlockMask):
        raise TypeError(f"block_mask is a {type(block_mask).__name__}, but must be a BlockMask")


class _Reader:
    """Rows of a BlockMask, checked against its lists and between its batches and heads."""

    def __init__(self, block_mask: BlockMask) -> None:
        self.mask = block_mask
        self.num_queries, self.num_keys = block_mask.seq_lengths
        self.batches, self.heads = (1, 1, *block_mask.kv_indices.shape[:-2])[-2:]
        marks = _marks(block_mask.kv_num_blocks, block_mask.kv_indices, _PARTIAL)
        if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
            full = _marks(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, _FULL)
            marks = torch.maximum(marks, full)
        self.marks = marks.view(self.batches * self.heads, *marks.shape[-2:])  # of each tile

    def rows(self, start: int, end: int) -> Tensor:
        """bool [end - start, keys]."""
        first: Tensor | None = None
        for batch in range(self.batches):
            for head in range(self.heads):
                visible = self._rows_of(batch, head, start, end)
                if first is None:
                    first = visible
                elif not torch.equal(visible, first):
                    query, key = (visible != first).nonzero()[0].tolist()
                    raise ValueError(
                        "block_mask must be the same for all batches and heads, but query "
                        f"{start + query} {_sees(visible[query, key])} key {key} in batch {batch}, head {head}, and "
                        f"{_sees(first[query, key])} it in batch 0, head 0"
                    )
        assert first is not None
        return first

    def _rows_of(self, batch: int, head: int, start: int, end: int) -> Tensor:
        device, (tile_queries, tile_keys) = self.marks.device, self.mask.BLOCK_SIZE
        tiles = torch.arange(start, end, device=device) // tile_queries
        marks = self.marks[batch * self.heads + head, tiles]
        listed = marks.repeat_interleave(min(tile_keys, self.num_keys), dim=-1)[:, : self.num_keys]
        if self.mask.mask_mod is noop_mask:
            return listed != _HIDDEN

        def shifted(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return self.mask.mask_mod(b + batch, h + head, q_idx + start, kv_idx)

        visible = create_mask(shifted, 1, 1, end - start, self.num_keys, device=device)[0, 0]
        for mark, wrong in ((_FULL, ~visible), (_HIDDEN, visible)):
            contradiction = wrong & (listed == mark)
            if bool(contradiction.any()):
                query, key = contradiction.nonzero()[0].tolist()
                tile = (start + query) // tile_queries, key // tile_keys
                raise ValueError(
                    f"block_mask contradicts itself: its mask_mod {'hides' if mark == _FULL else 'shows'} key {key} to "
                    f"query {start + query}, but its lists have tile {list(tile)} as "
                    f"{'full' if mark == _FULL else 'hidden'}; make it with create_block_mask"
                )
        return visible


def _sees(visible: Tensor) -> str:
    return "sees" if bool(visible) else "does not see"


def _marks(num_blocks: Tensor, indices: Tensor, mark: int) -> Tensor:
    """int8 [..., rows, columns] from the lists of a BlockMask: ``mark`` where the tile is listed."""
    columns = indices.shape[-1]
    counted = torch.arange(columns, device=indices.device) < num_blocks[..., None]
    # What stands behind the counted entries means nothing, and goes to a column that is cut off.
    targets = torch.where(counted, indices, columns).long()
    marks = torch.zeros((*indices.shape[:-1], columns + 1), dtype=torch.int8, device=indices.device)
    return marks.scatter_(-1, targets, mark)[..., :columns]
