"""Attention on whatever Hypothesis thinks of: shapes, strides, spans, pages, extreme logits, thread counts; and tables
that are none, which must be refused before a kernel reads where they point.

HYPOTHESIS_PROFILE=thorough looks at many more examples than the tests do otherwise (conftest.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from cases import DTYPES, LAYOUTS, strided
from compare import assert_same_bits, assert_within_terms
from elementwise import num_threads
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from python_ref.ops.attention import masked_softmax_attention
from selfforcing_ext import BlockCausalMask
from selfforcing_ext.attention import Past, attention_over_spans, full_table, span_records
from selfforcing_ext.mask import SpanTable, make_span_table

Interval = tuple[int, int]
FLOAT32 = torch.finfo(torch.float32).eps

# In units in the last place of the dtype: a probability or a gradient of a score rounded on its way into a product, and
# the result rounded; float32 is rounded in every step of its sums instead.
OUT_UNITS = {torch.float32: 16, torch.bfloat16: 1, torch.float16: 1}
GRAD_UNITS = {torch.float32: 32, torch.bfloat16: 2, torch.float16: 2}
# lse is float32 whatever the inputs are: a few roundings of its sums, and of the polynomials of exp2 and log.
LSE_TOLERANCE = 4e-6
# Probabilities, gradients of scores and results that are smaller may become 0.
UNDERFLOW = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-24}
# Roundings of a score's terms; exp turns the error of a score into a relative one of its probability.
SCORE_UNITS = 4


@dataclass(frozen=True)
class DrawnPast:
    """Keys in pages: per stream the visible positions and the pages, drawn from a pool that holds more."""

    page_size: int
    spans: tuple[tuple[Interval, ...], ...]
    pool: tuple[int, ...]  # page numbers in random order

    def pages_per_stream(self) -> int:
        return len(self.pool) // (len(self.spans) + 1)


@dataclass(frozen=True)
class Problem:
    dtype: torch.dtype
    table: SpanTable
    heads: tuple[int, int]
    head_dim: int
    layouts: tuple[str, str, str, str]  # of q, k, v and the gradient of out
    past: DrawnPast | None
    batch: int
    scale: float | None
    size: float  # of q and k
    grad_lse: bool
    threads: int
    seed: int

    def __repr__(self) -> str:
        table = [t.tolist() for t in self.table.tensors()[:3]]
        return (
            f"{self.dtype} B{self.batch} H{self.heads} D{self.head_dim} {table} of {self.table.num_keys} keys, "
            f"{self.layouts}, {self.past}, scale {self.scale}, size {self.size}, grad_lse {self.grad_lse}, "
            f"{self.threads} threads, seed {self.seed}"
        )


@st.composite
def intervals(draw: st.DrawFn, end: int, most: int) -> list[Interval]:
    """Sorted and disjoint, within [0, end); some may be empty or touch."""
    count = draw(st.integers(0, most))
    borders = sorted(draw(st.lists(st.integers(0, end), min_size=2 * count, max_size=2 * count)))
    return list(zip(borders[::2], borders[1::2], strict=True))


@st.composite
def masks(draw: st.DrawFn) -> SpanTable:
    frames_per_block, sink = draw(st.integers(1, 3)), draw(st.integers(0, 2))
    alone = draw(st.booleans())
    return BlockCausalMask(
        draw(st.integers(1, 4)) * frames_per_block + alone,
        draw(st.integers(1, 40)),
        frames_per_block,
        draw(st.none() | st.integers(sink + frames_per_block, sink + frames_per_block + 4)),
        sink,
        alone,
        draw(st.booleans()),
    ).spans()


@st.composite
def span_tables(draw: st.DrawFn) -> SpanTable:
    """Any blocks, empty ones too, that see anything; as make_span_table writes it, or with the spans as drawn."""
    queries, keys = draw(st.integers(0, 90)), draw(st.integers(0, 150))
    starts = [0, *sorted(draw(st.lists(st.integers(0, queries), max_size=4))), queries]
    spans = [draw(intervals(keys, 3)) for _ in pairwise(starts)]
    table = make_span_table(starts, spans, keys)
    if draw(st.booleans()):
        return table
    offsets = [0]
    for of_block in spans:
        offsets.append(offsets[-1] + len(of_block))
    drawn = torch.tensor([span for of_block in spans for span in of_block], dtype=torch.int32).reshape(-1, 2)
    return SpanTable(table.block_starts, torch.tensor(offsets, dtype=torch.int32), drawn, *table.tensors()[3:])


@st.composite
def pasts(draw: st.DrawFn, batch: int) -> DrawnPast:
    page_size, row = draw(st.integers(1, 40)), draw(st.integers(1, 5))
    count = draw(st.integers(1, 3))
    spans = []
    for _ in range(batch):
        some = draw(intervals(page_size * row, count))
        spans.append(tuple(some + [(0, 0)] * (count - len(some))))
    return DrawnPast(page_size, tuple(spans), tuple(draw(st.permutations(range((batch + 1) * row)))))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    batch = draw(st.integers(1, 3))
    kv_heads = draw(st.integers(1, 3))
    full = st.builds(full_table, st.integers(1, 200), st.integers(1, 300), st.just(torch.device("cpu")))
    return Problem(
        dtype=draw(st.sampled_from(DTYPES)),
        table=draw(masks() | span_tables() | full),
        heads=(kv_heads * draw(st.integers(1, 3)), kv_heads),
        head_dim=8 * draw(st.sampled_from((1, 2, 3, 4, 5, 8, 12, 16, 17, 32)) | st.integers(1, 32)),
        layouts=draw(st.tuples(*[st.sampled_from(LAYOUTS)] * 4)),
        past=draw(st.none() | pasts(batch)),
        batch=batch,
        scale=draw(st.none() | st.sampled_from((0.0, 0.125, -0.5, 1.0, 30.0))),
        size=draw(st.sampled_from((1.0, 0.0, 0.001, 10.0))),
        grad_lse=draw(st.booleans()),
        threads=draw(st.sampled_from((1, 2, 8))),
        seed=draw(st.integers(0, 2**20)),
    )


def visible_keys(table: SpanTable) -> Tensor:
    """bool [Lq, Lk]."""
    return table.dense() if table.num_queries else torch.zeros(0, table.num_keys, dtype=torch.bool)


def draw_tensors(p: Problem) -> tuple[list[Tensor], Tensor, Tensor]:
    """(q, k, v), the gradient of out, and that of lse. Keys that nobody sees are NaN."""
    generator = torch.Generator().manual_seed(p.seed)
    lengths = (p.table.num_queries, p.table.num_keys, p.table.num_keys, p.table.num_queries)
    heads = (p.heads[0], p.heads[1], p.heads[1], p.heads[0])
    tensors = [
        strided((p.batch, length, count, p.head_dim), layout, p.dtype, generator)
        for length, count, layout in zip(lengths, heads, p.layouts, strict=True)
    ]
    unseen = ~visible_keys(p.table).any(dim=0)
    for stream in range(p.batch):  # one by one: all may be one in memory
        for tensor in tensors[:2]:
            tensor[stream].copy_(p.size * torch.randn(tensor.shape[1:], generator=generator))
        for tensor in tensors[1:3]:
            tensor[stream, unseen] = torch.nan
    return tensors[:3], tensors[3], torch.randn(p.batch, p.heads[0], lengths[0], generator=generator)


def draw_pages(p: Problem) -> Past | None:
    """Pages hold NaN where nothing visible lies."""
    if p.past is None:
        return None
    generator = torch.Generator().manual_seed(p.seed + 1)
    row = p.past.pages_per_stream()
    table = torch.tensor(p.past.pool[: p.batch * row], dtype=torch.int32).view(p.batch, row)
    # A view with gaps between tokens and between heads.
    whole = torch.full((2, len(p.past.pool), p.past.page_size, p.heads[1] + 1, p.head_dim + 8), torch.nan)
    pools = whole.to(p.dtype)[:, :, :, : p.heads[1], : p.head_dim]
    for stream, spans in enumerate(p.past.spans):
        for position in (position for span in spans for position in range(*span)):
            page, offset = table[stream, position // p.past.page_size], position % p.past.page_size
            values = torch.randn(2, *pools.shape[3:], generator=generator)
            pools[:, page, offset] = (values * torch.tensor([p.size, 1.0]).view(2, 1, 1)).to(p.dtype)
    return Past(pools[0], pools[1], table, span_records(torch.tensor(p.past.spans).unsqueeze(1)))


def past_of_stream(p: Problem, pages: Past | None, stream: int) -> tuple[Tensor, Tensor]:
    """Its visible keys and values in one piece, [positions, H_kv, D]."""
    if p.past is None or pages is None:
        nothing = torch.empty(0, p.heads[1], p.head_dim, dtype=p.dtype)
        return nothing, nothing
    at = torch.tensor([x for span in p.past.spans[stream] for x in range(*span)], dtype=torch.long)
    rows, offsets = pages[2][stream].long()[at // p.past.page_size], at % p.past.page_size
    return pages[0][rows, offsets], pages[1][rows, offsets]


def check_stream(
    p: Problem, inputs: list[Tensor], past: tuple[Tensor, Tensor], grads: tuple[Tensor, Tensor], results: list[Tensor]
) -> None:
    """One stream, [L, H, D] each: out, lse and the gradients of q, k, v against float64."""
    q, k, v = (tensor.double().nan_to_num()[None].requires_grad_() for tensor in inputs)
    grad_out, grad_lse = grads[0].double()[None], grads[1].double()[None]
    # One more key that nobody sees: there is always one.
    padding = torch.zeros(1, 1, p.heads[1], p.head_dim, dtype=torch.float64)
    keys, values = (torch.cat([old.double()[None], own, padding], 1) for old, own in zip(past, (k, v), strict=True))
    visible = visible_keys(p.table)
    visible = torch.cat(
        [torch.ones(len(visible), len(past[0]), dtype=torch.bool), visible, torch.zeros(len(visible), 1).bool()], 1
    )
    scale = p.head_dim**-0.5 if p.scale is None else p.scale
    out, lse = masked_softmax_attention(q, keys, values, visible, scale)
    exact = torch.autograd.grad((out, lse), (q, k, v), (grad_out, grad_lse))

    # How large the terms are whose sums these are.
    with torch.no_grad():
        group = p.heads[0] // p.heads[1]
        wide_k, wide_v = (t.abs().repeat_interleave(group, 2) for t in (keys, values))
        score_terms = abs(scale) * torch.einsum("bqhd,bkhd->bhqk", q.abs(), wide_k)
        scores = scale * torch.einsum("bqhd,bkhd->bhqk", q, keys.repeat_interleave(group, 2))
        weights = (scores - lse[..., None]).exp().where(visible, 0)
        grad_weights = torch.einsum("bqhd,bkhd->bhqk", grad_out.abs(), wide_v)
        delta = torch.einsum("bqhd,bqhd->bhq", grad_out.abs(), out.abs()) + grad_lse.abs()
        grad_scores = abs(scale) * weights * (grad_weights + delta[..., None])
        lost = UNDERFLOW[p.dtype] / (OUT_UNITS[p.dtype] * torch.finfo(p.dtype).eps)
        weights, grad_scores = weights + lost * visible, grad_scores + lost * max(1.0, abs(scale)) * visible
        own = slice(len(past[0]), -1)
        terms = {
            "out": torch.einsum("bhqk,bkhd->bqhd", weights, wide_v),
            "grad_q": torch.einsum("bhqk,bkhd->bqhd", grad_scores, wide_k),
            "grad_k": torch.einsum("bhqk,bqhd->bkhd", grad_scores, q.abs())[:, own].unflatten(2, (-1, group)).sum(3),
            "grad_v": torch.einsum("bhqk,bqhd->bkhd", weights, grad_out.abs())[:, own].unflatten(2, (-1, group)).sum(3),
        }
        largest = float(score_terms.where(visible, 0).max()) if score_terms.numel() else 0.0
    of_scores = SCORE_UNITS * FLOAT32 * largest
    unit = torch.finfo(p.dtype).eps
    out, lse = out.detach(), lse.detach()
    for name, result, true in zip(terms, (results[0], *results[2:]), (out, *exact), strict=True):
        units = (OUT_UNITS if name == "out" else GRAD_UNITS)[p.dtype]
        assert_within_terms(result[None], true, terms[name] + lost, units * unit + of_scores, name)
    empty = lse == -torch.inf
    assert bool((results[1][None][empty] == -torch.inf).all())
    assert not results[0][None].transpose(1, 2)[empty].any()
    finite = ~empty
    assert_within_terms(results[1][None][finite], lse[finite], 1 + lse[finite].abs(), LSE_TOLERANCE + of_scores, "lse")


@given(problems())
def test_any_problem(p: Problem):
    inputs, grad_out, grad_lse = draw_tensors(p)
    pages = draw_pages(p)

    def run() -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        out, lse = attention_over_spans(*leaves, p.table, pages, p.scale)
        outputs, grads = ((out, lse), (grad_out, grad_lse)) if p.grad_lse else ((out,), (grad_out,))
        return [out.detach(), lse.detach(), *torch.autograd.grad(outputs, leaves, grads)]

    with num_threads(p.threads):
        results = run()
        for name, result, again in zip(("out", "lse", "grad_q", "grad_k", "grad_v"), results, run(), strict=True):
            assert_same_bits(again, result, name)
    if not p.grad_lse:
        grad_lse = torch.zeros_like(grad_lse)
    for stream in range(p.batch):
        check_stream(
            p,
            [tensor[stream] for tensor in inputs],
            past_of_stream(p, pages, stream),
            (grad_out[stream], grad_lse[stream]),
            [result[stream] for result in results],
        )


# ---- Tables that are none

Q, K, PAGES, PAGE_SIZE = 12, 17, 5, 4


def is_table(starts: list[int], offsets: list[int], spans: list[Interval], rows: int, columns: int) -> bool:
    """Whether the op may follow it."""
    if len(starts) == 0 or len(offsets) != len(starts):
        return False
    if starts[0] != 0 or starts[-1] != rows or offsets[0] != 0 or offsets[-1] != len(spans):
        return False
    if any(a > b for a, b in pairwise(starts)) or any(a > b for a, b in pairwise(offsets)):
        return False
    for first, last in pairwise(offsets):
        end = 0
        for start, next_end in spans[first:last]:
            if not end <= start <= next_end <= columns:
                return False
            end = next_end
    return True


def is_past(page_table: list[int], spans: list[Interval]) -> bool:
    end = 0
    for start, next_end in spans:
        if start == next_end:
            continue
        if not end <= start <= next_end <= len(page_table) * PAGE_SIZE:
            return False
        if any(not 0 <= page_table[position // PAGE_SIZE] < PAGES for position in range(start, next_end)):
            return False
        end = next_end
    return True


def small(end: int) -> st.SearchStrategy[int]:
    """Mostly near what is right, rarely where a read would crash."""
    return st.integers(0, end) | st.sampled_from((-1, end + 1, 2**31 - 1, -(2**31)))


@st.composite
def tables(draw: st.DrawFn, rows: int, columns: int) -> tuple[list[int], list[int], list[Interval]]:
    """Often a table, with one number changed or none; else anything."""
    blocks = draw(st.integers(0, 3))
    inner = sorted(draw(st.lists(st.integers(0, rows), min_size=blocks, max_size=blocks)))
    spans = [draw(intervals(columns, 2)) for _ in range(blocks + 1)]
    starts, flat, offsets = [0, *inner, rows], [list(span) for of_block in spans for span in of_block], [0]
    for of_block in spans:
        offsets.append(offsets[-1] + len(of_block))
    for numbers, end in ((starts, rows), (offsets, len(flat)), *((span, columns) for span in flat)):
        if draw(st.integers(0, 9)) == 0:
            numbers[draw(st.integers(0, len(numbers) - 1))] = draw(small(end))
    if draw(st.integers(0, 9)) == 0:
        draw(st.sampled_from((starts, offsets))).pop()
    return starts, offsets, [(start, end) for start, end in flat]


@given(
    tables(Q, K),
    tables(K, Q),
    st.lists(small(PAGES - 1), min_size=3, max_size=3),
    intervals(3 * PAGE_SIZE, 2) | st.lists(st.tuples(small(3 * PAGE_SIZE), small(3 * PAGE_SIZE)), max_size=2),
    st.sampled_from(DTYPES),
)
def test_wrong_tables_are_refused(forward, backward, page_table, past_spans, dtype):
    """Right tables give finite results, wrong ones the error that says so, and never a read of what they point to."""

    def int32(values: list[int] | list[Interval], *shape: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32).reshape(shape)

    q = torch.randn(1, Q, 2, 8).to(dtype)
    k, v = torch.randn(2, 1, K, 1, 8).to(dtype)
    pools = torch.randn(2, PAGES, PAGE_SIZE, 1, 8).to(dtype)
    shapes = ((-1,), (-1,), (-1, 2))
    geometry = [
        *(int32(values, *shape) for table in (forward, backward) for values, shape in zip(table, shapes, strict=True)),
        *pools,
        int32(page_table, 1, 3),
        span_records(int32(past_spans, 1, 1, -1, 2)),
        *(None,) * 4,
        [],
        0.25,
    ]
    ops = torch.ops.selfforcing
    right_forward = is_table(*forward, Q, K) and is_past(page_table, past_spans)
    if right_forward:
        out, lse = ops.attention(q, k, v, *geometry)
        assert bool(out.isfinite().all())
        assert not bool(lse.isnan().any())
    else:
        with pytest.raises(RuntimeError, match=r"attention: .*(must|ends before it starts)"):
            ops.attention(q, k, v, *geometry)
        out, lse = torch.zeros_like(q), torch.zeros(1, 2, Q)
    if right_forward and is_table(*backward, K, Q):
        assert len(ops.attention_backward(torch.ones_like(out), lse, q, k, v, out, lse, *geometry)) == 3
    else:
        with pytest.raises(RuntimeError, match=r"attention(_backward)?: .*(must|ends before it starts)"):
            ops.attention_backward(torch.ones_like(out), lse, q, k, v, out, lse, *geometry)
