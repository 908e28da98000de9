"""Reads spans off masks that are given token by token.

A mask has *span form* when every query sees a few contiguous runs of keys. Consecutive queries that see the same keys
become one block. The mask is looked at in full, a few rows at a time, so that memory stays bounded at any length.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from selfforcing_ext.intervals import Interval
from selfforcing_ext.mask import SpanTable, make_span_table

#: A query that sees more runs of keys than this is taken for one of a mask that has no span form.
MAX_SPANS = 16
#: With fewer queries per block on average, torch's scaled_dot_product_attention is faster on the CPU.
FEW_QUERIES_PER_BLOCK = 8

_CHUNK = 1 << 22  # positions of the mask that are held at a time
_SMALL = 256  # queries up to which the shape of the blocks does not matter
_WORD = torch.int64.itemsize


@torch.compiler.disable(reason="a mask is read value by value")  # type: ignore[no-untyped-call]
def read_spans(
    rows: Callable[[int, int], Tensor],
    num_queries: int,
    num_keys: int,
    name: str,
    max_spans: int = MAX_SPANS,
) -> SpanTable:
    """The span table of a mask, exact for every query and key.

    Args:
        rows: gives the rows ``[start, end)`` of the mask, bool [end - start, num_keys], True where the query sees the
            key.
        num_queries, num_keys: size of the mask.
        name: what the mask is called in messages.
        max_spans: the most runs of keys that a query may see.

    Returns:
        The table, on the CPU.

    Raises:
        ValueError: a query sees more runs of keys; the message names the query and the key.

    Warns:
        UserWarning: blocks hold so few queries that other attention is faster.
    """
    borders: list[int] = []
    spans_of_block: list[list[Interval]] = []
    step = max(1, _CHUNK // max(1, num_keys))
    previous: Tensor | None = None
    for start in range(0, num_queries, step):
        # Rows are compared eight keys at a time: padded to whole words.
        visible = pad(rows(start, min(start + step, num_queries)), (0, -num_keys % _WORD))
        words = visible.view(torch.int64)
        begins = torch.ones(words.shape[0], dtype=torch.bool, device=words.device)
        begins[1:] = (words[1:] != words[:-1]).any(dim=1)
        begins[0] = previous is None or not torch.equal(words[0], previous)
        previous = words[-1].clone()
        firsts = begins.nonzero()[:, 0]
        borders += (firsts + start).tolist()
        spans_of_block += _runs(visible[firsts], firsts + start, name, max_spans)
    borders.append(num_queries)
    queries_per_block = num_queries / max(1, len(spans_of_block))
    if num_queries > _SMALL and queries_per_block < FEW_QUERIES_PER_BLOCK:
        warnings.warn(
            f"{name} has {queries_per_block:.1f} queries per block of queries that see the same keys; with fewer than "
            f"{FEW_QUERIES_PER_BLOCK} this attention is exact, but slower than scaled_dot_product_attention",
            stacklevel=4,
        )
    return make_span_table(borders, spans_of_block, num_keys)


def _runs(visible: Tensor, queries: Tensor, name: str, max_spans: int) -> list[list[Interval]]:
    """The runs of keys of each row of ``visible``, bool [rows, keys]; ``queries`` are the rows' own numbers."""
    framed = pad(visible, (1, 1))
    edges = (framed[:, 1:] != framed[:, :-1]).nonzero()  # row by row, and in a row start, end, start, end, ...
    counts = torch.bincount(edges[:, 0], minlength=visible.shape[0]) // 2
    if bool((counts > max_spans).any()):
        row = int((counts > max_spans).nonzero()[0, 0])
        keys = edges[edges[:, 0] == row, 1]
        raise ValueError(
            f"{name} is not of span form: query {int(queries[row])} sees {int(counts[row])} separate runs of keys, but "
            f"at most {max_spans} are accepted; run {max_spans + 1} starts at key {int(keys[2 * max_spans])}"
        )
    intervals = [(start, end) for start, end in edges[:, 1].view(-1, 2).tolist()]
    ends = counts.cumsum(0).tolist()
    return [intervals[end - count : end] for count, end in zip(counts.tolist(), ends, strict=True)]
