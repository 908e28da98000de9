"""Attention over everything that a past may be (csrc/geometry/pages.h), against float64: lists of spans per head,
biases, quantised pages, keys that are rotated when read, and the gradients of cached keys and values."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from cases import DTYPES
from compare import assert_same_bits, assert_within_terms
from elementwise import num_threads
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from python_ref.ops.rope import rope_3d, rope_angles
from selfforcing_ext.attention import Past, attention_over_spans, full_table, span_records
from selfforcing_ext.library import ops

FORMATS = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn, "int4": torch.uint8}
GROUP = 32  # channels of int4 that share a scale
Interval = tuple[int, int]

# In units in the last place of the dtype, as in test_fuzz_attention.py; a rotated key that lies between two numbers may
# be rounded to either.
OUT_UNITS = {torch.float32: 16, torch.bfloat16: 1, torch.float16: 1}
GRAD_UNITS = {torch.float32: 32, torch.bfloat16: 2, torch.float16: 2}


@dataclass(frozen=True)
class Problem:
    lists: tuple[tuple[tuple[Interval, ...], ...], ...]  # per stream, and per K/V head or for all: visible positions
    biases: tuple[float, ...] = (0.0, 0.0)  # of the intervals of every list
    page_size: int = 7
    queries: int = 20  # and keys of the block
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 32
    dtype: torch.dtype = torch.float32
    format: str | None = None
    offset: bool = False
    grid: tuple[int, int, int] | None = None  # keys are rotated when read
    first_token: int = 0
    scale: float = 0.25
    threads: int = 2
    seed: int = 0


@dataclass
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    past: Past
    grad_out: Tensor
    grad_lse: Tensor
    grad_pages: tuple[Tensor, Tensor]
    grad_page_table: Tensor


def rope_table(head_dim: int, grid: tuple[int, int, int]) -> Tensor:
    spatial = head_dim // 6
    angles = [
        torch.outer(torch.arange(size).double(), 10000.0 ** -(torch.arange(pairs).double() / max(pairs, 1))).flatten()
        for size, pairs in zip(grid, (head_dim // 2 - 2 * spatial, spatial, spatial), strict=True)
    ]
    return torch.cat([torch.stack((a.cos(), a.sin()), -1) for a in angles]).float()


def draw(p: Problem) -> Inputs:
    """Pages hold NaN, or a scale of NaN, where nothing visible lies."""
    generator = torch.Generator().manual_seed(p.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    batch, (heads, kv_heads) = len(p.lists), p.heads
    row = max(end for stream in p.lists for spans in stream for _, end in spans) // p.page_size + 1
    num_pages = batch * row + 1
    page_table = torch.randperm(num_pages, generator=generator)[: batch * row].view(batch, row).int()
    visible = torch.zeros(num_pages, p.page_size, kv_heads, dtype=torch.bool)
    for stream, lists in enumerate(p.lists):
        for head in range(kv_heads):
            for start, end in lists[head % len(lists)]:
                at = torch.arange(start, end)
                visible[page_table[stream].long()[at // p.page_size], at % p.page_size, head] = True
    shape = (*visible.shape, p.head_dim)
    scales: list[Tensor | None] = [None, None]
    if p.format is None:
        pages = [normal(*shape).where(visible[..., None], torch.nan).to(p.dtype) for _ in range(2)]
    else:
        groups = p.head_dim // GROUP if p.format == "int4" else 1
        size = {"int8": 0.02, "fp8_e4m3": 0.5, "int4": 0.3}[p.format]
        pages = [draw_elements(p.format, shape, generator) for _ in range(2)]
        for i in range(2):
            scale = size * (0.5 + torch.rand(*visible.shape, groups, generator=generator))
            scales[i] = scale.where(visible[..., None], torch.nan).bfloat16()
    counts = torch.tensor([[[end - start for start, end in spans] for spans in lists] for lists in p.lists])
    tokens = p.first_token + counts.cumsum(-1) - counts
    past = Past(
        *pages,
        page_table,
        span_records(torch.tensor(p.lists), torch.tensor(p.biases), tokens if p.grid else 0),
        *scales,
        normal(kv_heads, p.head_dim) if p.offset else None,
        rope_table(p.head_dim, p.grid) if p.grid else None,
        p.grid or (),
    )
    q, grad_out = (normal(batch, p.queries, heads, p.head_dim).to(p.dtype) for _ in range(2))
    k, v = (normal(batch, p.queries, kv_heads, p.head_dim).to(p.dtype) for _ in range(2))
    # Two rows of three get a page of gradients, in another order.
    wanted = torch.arange(batch * row) % 3 != 1
    grad_page_table = torch.full((batch * row,), -1, dtype=torch.int32)
    grad_page_table[wanted] = torch.randperm(int(wanted.sum()), generator=generator).int()
    grad_pages = (torch.zeros(int(wanted.sum()) + 1, *shape[1:]), torch.zeros(int(wanted.sum()) + 1, *shape[1:]))
    grad_lse = normal(batch, heads, p.queries)
    return Inputs(q, k, v, past, grad_out, grad_lse, grad_pages, grad_page_table.view(batch, row))


def draw_elements(form: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if form == "int4":
        return torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8, generator=generator)
    if form == "int8":
        return torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
    return torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)


def values_of(pages: Tensor, scales: Tensor | None, offset: Tensor | None, head_dim: int) -> Tensor:
    """What pages hold, float64 [P, page_size, H_kv, D]; exact in float32 but for the offset."""
    if scales is None:
        return pages.double()
    if pages.dtype == torch.uint8:
        groups = pages.unflatten(-1, (-1, GROUP // 2)).int()
        elements = (torch.cat((groups & 15, groups >> 4), -1) - 8).flatten(-2)
        scales = scales.repeat_interleave(GROUP, -1)
    else:
        elements = pages.float()
    values = elements * scales.float()
    return (values if offset is None else values + offset).double()


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """[n, D] rotated by [n, D / 2]."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), -1).flatten(-2)


def define(p: Problem, x: Inputs) -> dict[str, tuple[Tensor, Tensor]]:
    """By name the exact result and the size of the terms it is a sum of, both in float64."""
    past, group, unit = x.past, p.heads[0] // p.heads[1], torch.finfo(p.dtype).eps
    pools = (
        values_of(past.k_pages, past.k_scales, past.k_offset, p.head_dim),
        values_of(past.v_pages, past.v_scales, None, p.head_dim),
    )
    like = {"out": x.q, "grad_q": x.q, "grad_k": x.k, "grad_v": x.v, "lse": x.grad_lse}
    like |= {"grad_k_pages": x.grad_pages[0], "grad_v_pages": x.grad_pages[1]}
    found = {name: (torch.zeros(t.shape).double(), torch.zeros(t.shape).double()) for name, t in like.items()}
    angles = torch.zeros(1, p.head_dim // 2).double()
    if p.grid:
        angles = rope_angles(p.head_dim, p.grid, 0, x.q.device).view(-1, p.head_dim // 2)
    for stream, lists in enumerate(p.lists):
        for kv_head in range(p.heads[1]):
            spans = lists[kv_head % len(lists)]
            at = torch.tensor([position for span in spans for position in range(*span)], dtype=torch.long)
            bias = torch.tensor(
                [b for b, (start, end) in zip(p.biases, spans, strict=True) for _ in range(start, end)]
            ).double()
            rows, slots = at // p.page_size, at % p.page_size
            places = past.page_table[stream].long()[rows], slots, kv_head
            old_k, old_v = (pool[places] for pool in pools)
            turns = angles[p.first_token + torch.arange(len(at))] if p.grid else angles[torch.zeros_like(at)]
            old_k, old_v = (t.float().to(p.dtype).double() for t in (turn(old_k, turns), old_v))
            keys = torch.cat((old_k, x.k[stream, :, kv_head].double()))
            values = torch.cat((old_v, x.v[stream, :, kv_head].double()))
            bias = torch.cat((bias, torch.zeros(p.queries)))
            of_group = slice(kv_head * group, (kv_head + 1) * group)
            q, grad = (t[stream, :, of_group].transpose(0, 1).double() for t in (x.q, x.grad_out))  # [group, L, D]
            scores = p.scale * q @ keys.T + bias
            lse = scores.logsumexp(-1)
            weights = (scores - lse[..., None]).exp()
            out = weights @ values
            grad_weights = grad @ values.T
            delta = (grad * out).sum(-1) - x.grad_lse[stream, of_group].double()
            grad_scores = p.scale * weights * (grad_weights - delta[..., None])
            size_out = weights @ values.abs()
            size_delta = (grad.abs() * size_out).sum(-1) + x.grad_lse[stream, of_group].abs().double()
            size_scores = abs(p.scale) * weights * (grad.abs() @ values.abs().T + size_delta[..., None])
            if p.grid:  # what the neighbouring number, one unit away, does to a score
                size_scores = size_scores * (1 + unit * abs(p.scale) * (q.abs() @ keys.abs().T))
            grad_k, size_k = (torch.einsum("gqk,gqd->kd", a, b) for a, b in ((grad_scores, q), (size_scores, q.abs())))
            grad_v = torch.einsum("gqk,gqd->kd", weights, grad)
            size_v = torch.einsum("gqk,gqd->kd", weights, grad.abs())
            for name, value, size in (
                ("out", out.transpose(0, 1), size_out.transpose(0, 1)),
                ("grad_q", (grad_scores @ keys).transpose(0, 1), (size_scores @ keys.abs()).transpose(0, 1)),
            ):
                found[name][0][stream, :, of_group], found[name][1][stream, :, of_group] = value, size
            found["lse"][0][stream, of_group] = lse
            found["lse"][1][stream, of_group] = 1 + lse.abs() + (abs(p.scale) * q.abs() @ keys.abs().T).amax(-1)
            for name, value, size in (("grad_k", grad_k, size_k), ("grad_v", grad_v, size_v)):
                old = slice(0, len(at))
                found[name][0][stream, :, kv_head], found[name][1][stream, :, kv_head] = (
                    value[len(at) :],
                    size[len(at) :],
                )
                pages = x.grad_page_table[stream].long()[rows]
                kept = pages >= 0
                value, size = value[old], size[old]
                if name == "grad_k":  # of the key as it is stored
                    value = turn(value, -turns)
                    size = (
                        size
                        + size.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
                        * (turns.sin().repeat_interleave(2, -1)).abs()
                    )
                found[name + "_pages"][0][pages[kept], slots[kept], kv_head] = value[kept]
                found[name + "_pages"][1][pages[kept], slots[kept], kv_head] = size[kept]
    return found


def compute(p: Problem, x: Inputs) -> dict[str, Tensor]:
    table = full_table(p.queries, p.queries, x.q.device)
    with num_threads(p.threads):
        out, lse = attention_over_spans(x.q, x.k, x.v, table, x.past, p.scale)
        pages = [t.clone() for t in x.grad_pages]
        arguments = (x.grad_out, x.grad_lse, x.q, x.k, x.v, out, lse, *table.tensors(), *x.past, p.scale)
        grads = ops.attention_backward_through_past(*arguments, *pages, x.grad_page_table)
        for name, with_past, alone in zip("qkv", grads, ops.attention_backward(*arguments), strict=True):
            assert_same_bits(alone, with_past, f"grad_{name} without the gradients of the past")
    names = ("out", "lse", "grad_q", "grad_k", "grad_v", "grad_k_pages", "grad_v_pages")
    return dict(zip(names, (out, lse, *grads, *pages), strict=True))


def check(p: Problem) -> None:
    x = draw(p)
    results = compute(p, x)
    for (name, result), again in zip(results.items(), compute(p, x).values(), strict=True):
        assert_same_bits(again, result, name)
    unit = torch.finfo(p.dtype).eps
    for name, (exact, size) in define(p, x).items():
        units = (OUT_UNITS if name == "out" else GRAD_UNITS)[p.dtype] * unit
        tolerance = units if name != "lse" else 4e-6 + (unit if p.grid and p.dtype != torch.float32 else 0)
        assert_within_terms(results[name], exact, size, tolerance, name)
        assert not results[name][size == 0].any(), f"{name} where there is none"


SHARED = ((((0, 9), (14, 70)),), (((3, 3), (5, 41)),))
PER_HEAD = ((((0, 7), (14, 60)), ((3, 4), (5, 5))), (((0, 0), (0, 0)), ((0, 21), (30, 150))))
PROBLEMS = {
    "lists of spans per head": Problem(PER_HEAD),
    "bias": Problem(SHARED, (1.5, -0.75)),
    "bias per head's list": Problem(PER_HEAD, (-2.0, 0.5), scale=-0.25),
    "one thread": Problem(PER_HEAD, (0.5, 0.5), threads=1, queries=70),
    "one head": Problem(((((0, 50), (60, 700)),),), (3.0, -1.0), page_size=64, heads=(1, 1), threads=3),
    "int8": Problem(SHARED, format="int8", offset=True, head_dim=40),
    "fp8_e4m3": Problem(SHARED, format="fp8_e4m3", head_dim=72, page_size=16),
    "int4": Problem(SHARED, format="int4", offset=True, head_dim=96, page_size=1),
    "rotated": Problem(SHARED, grid=(5, 4, 6), first_token=3, head_dim=64),
    "rotated, few channels": Problem(PER_HEAD, (0.5, 0.0), grid=(160, 1, 1), head_dim=8),
    "all": Problem(PER_HEAD, (1.0, -1.0), format="int8", offset=True, grid=(11, 3, 5), head_dim=128),
    "all, int4": Problem(PER_HEAD, (1.0, -1.0), format="int4", offset=True, grid=(11, 3, 5), head_dim=64),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_past(name: str, dtype: torch.dtype):
    check(replace(PROBLEMS[name], dtype=dtype))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    kv_heads, count = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    end = draw(st.integers(1, 300))
    per_stream = draw(st.sampled_from((1, kv_heads)))

    def intervals() -> tuple[Interval, ...]:
        borders = sorted(draw(st.lists(st.integers(0, end), min_size=2 * count, max_size=2 * count)))
        return tuple(zip(borders[::2], borders[1::2], strict=True))

    form = draw(st.sampled_from((None, *FORMATS)))
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    first = draw(st.integers(0, 50))
    grid = (-(-(first + end) // (rows * columns)), rows, columns)
    return Problem(
        lists=tuple(tuple(intervals() for _ in range(per_stream)) for _ in range(draw(st.integers(1, 3)))),
        biases=tuple(draw(st.sampled_from((0.0, 0.0, 1.0, -3.5))) for _ in range(count)),
        page_size=draw(st.integers(1, 70)),
        queries=draw(st.integers(1, 60)),
        heads=(kv_heads * draw(st.integers(1, 2)), kv_heads),
        head_dim=GROUP * draw(st.integers(1, 4)) if form == "int4" else 8 * draw(st.integers(1, 20)),
        dtype=draw(st.sampled_from(DTYPES)),
        format=form,
        offset=form is not None and draw(st.booleans()),
        grid=draw(st.sampled_from((None, grid))),
        first_token=first,
        scale=draw(st.sampled_from((0.125, -0.25, 0.0))),
        threads=draw(st.sampled_from((1, 2, 5))),
        seed=draw(st.integers(0, 2**20)),
    )


@given(problems())
def test_any_past(p: Problem):
    check(p)


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("form", FORMATS)
def test_every_code_is_read(form: str, flush: bool):
    """Every element there is, whatever becomes of subnormal numbers: all queries see one key, so they return its value,
    and query i its channel i as the logarithm of the denominator."""
    codes = torch.arange(256, dtype=torch.uint8)
    if form == "int4":
        codes = torch.cat((codes, codes.flip(0)))  # of two heads
    finite = codes.where(codes % 128 != 127, 0) if form == "fp8_e4m3" else codes
    shape = (1, 1, -1, 256 if form != "int4" else 128)
    k_pages, v_pages = (x.view(FORMATS[form]).view(shape) for x in (finite, codes))
    heads = v_pages.shape[2]
    scales = torch.full((1, 1, heads, 256 // GROUP if form == "int4" else 1), 0.5, dtype=torch.bfloat16)
    keys, values = (values_of(pages, scales, None, 256).float() for pages in (k_pages, v_pages))
    past = Past(k_pages, v_pages, torch.zeros(1, 1).int(), span_records(torch.tensor([[[[0, 1]]]])), scales, scales)
    q = torch.eye(256).view(1, 256, 1, 256).expand(-1, -1, heads, -1)
    nothing = torch.empty(1, 0, heads, 256)
    assert torch.set_flush_denormal(flush) or not flush
    try:
        out, lse = attention_over_spans(q, nothing, nothing, full_table(256, 0, q.device), past, 1.0)
    finally:
        torch.set_flush_denormal(False)
    torch.testing.assert_close(out, values.expand_as(out), rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(lse, keys[0], rtol=1e-6, atol=0)


def test_one_list_for_all_heads_is_that_list_for_each():
    p = Problem(SHARED, (0.5, -0.5))
    x = draw(p)
    each = x.past._replace(spans=x.past.spans.expand(-1, p.heads[1], -1, -1).contiguous())
    table = full_table(p.queries, p.queries, x.q.device)
    for ours, theirs in zip(
        attention_over_spans(x.q, x.k, x.v, table, x.past),
        attention_over_spans(x.q, x.k, x.v, table, each),
        strict=True,
    ):
        assert_same_bits(ours, theirs)


def test_a_bias_of_log_two_counts_a_key_twice():
    x = draw(Problem((((((0, 30), (30, 60))),),), heads=(2, 2)))
    table = full_table(20, 20, x.q.device)
    past = x.past
    biased = past._replace(spans=span_records(torch.tensor([[[[0, 30]]]]), math.log(2)))
    for pool in past[:2]:  # the second half is the first again
        at = torch.arange(60)
        rows, slots = past.page_table[0].long()[at // 7], at % 7
        pool[rows[30:], slots[30:]] = pool[rows[:30], slots[:30]]
    for ours, theirs in zip(
        attention_over_spans(x.q, x.k, x.v, table, biased),
        attention_over_spans(x.q, x.k, x.v, table, past),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotation_on_reading_is_rope_3d_on_what_is_stored(dtype: torch.dtype):
    grid = (3, 4, 5)
    k_pages, v_pages = torch.randn(2, 6, 10, 2, 64).to(dtype)
    page_table = torch.tensor([[4, 0, 2, 1, 5, 3]]).int()
    stored = k_pages[page_table[0].long()].flatten(0, 1)[None]
    turned = torch.empty_like(k_pages)
    turned[page_table[0].long()] = rope_3d(stored, grid).view(6, 10, 2, 64)
    q, k, v = torch.randn(3, 1, 12, 2, 64).to(dtype)
    spans = span_records(torch.tensor([[[[0, 13], [13, 60]]]]), 0.0, torch.tensor([0, 13]))
    table = full_table(12, 12, q.device)
    on_read = Past(k_pages, v_pages, page_table, spans, rope_table=rope_table(64, grid), rope_grid=grid)
    on_write = Past(turned, v_pages, page_table, spans)
    out, lse = attention_over_spans(q, k, v, table, on_read)
    expected, expected_lse = attention_over_spans(q, k, v, table, on_write)
    # Where rounding is to the neighbour in one of the two, a score differs by a fraction of a unit.
    tolerance = torch.finfo(dtype).eps
    assert float((out.float() - expected.float()).norm()) <= 0.1 * tolerance * float(expected.float().norm()) + 1e-6
    torch.testing.assert_close(lse, expected_lse, rtol=1e-6, atol=0.1 * tolerance + 1e-6)


def test_gradients_are_added():
    p = Problem(PER_HEAD)
    x = draw(p)
    once = compute(p, x)
    doubled = Inputs(**{**vars(x), "grad_pages": (once["grad_k_pages"], once["grad_v_pages"])})
    for name, pages in compute(p, doubled).items():
        if name.endswith("pages"):
            assert_same_bits(pages, 2 * once[name], name)


def through_past(x: Inputs, **changes: object) -> tuple[object, ...]:
    out, lse = torch.zeros_like(x.q), torch.zeros(len(x.q), x.q.shape[2], x.q.shape[1])
    table = full_table(x.q.shape[1], x.k.shape[1], x.q.device)
    given = {"k_grad_pages": x.grad_pages[0], "v_grad_pages": x.grad_pages[1], "grad_page_table": x.grad_page_table}
    past = changes.pop("past", x.past)
    arguments = (x.grad_out, None, x.q, x.k, x.v, out, lse, *table.tensors(), *past, 0.25)
    return (*arguments, *(given | changes).values())


def test_wrong_gradient_pages_are_refused():
    x = draw(Problem(SHARED))
    pages, table = x.grad_pages[0], x.grad_page_table
    twice, beyond = table.clone(), table.clone()
    twice[1, 0] = twice[0, 0]
    beyond[0, 0] = len(pages)
    nothing = Past(*(None,) * 8, ())
    for message, changes in (
        (
            r"grad_page_table\[1, 0\] is \d+ again, but a page of gradients must belong to one page",
            {"grad_page_table": twice},
        ),
        (rf"grad_page_table\[0, 0\] is {len(pages)}, but must be in \[-1, {len(pages)}\)", {"grad_page_table": beyond}),
        ("grad_page_table has shape", {"grad_page_table": table[:, :2]}),
        ("k_grad_pages", {"k_grad_pages": pages.double()}),
        ("v_grad_pages", {"v_grad_pages": pages[:, :3]}),
        ("k_grad_pages are for the gradients of a past", {"past": nothing}),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.attention_backward_through_past(*through_past(x, **changes))
        assert not pages.any()
