"""``torch.library.opcheck`` on every op in every form in which it can be called: schema, autograd registration, fake
implementation, and AOTAutograd with dynamic shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import MASKS, PAGED_CASES, AttentionCase
from elementwise import padded
from torch import Tensor

import selfforcing_ext.denoise
import selfforcing_ext.modulate
import selfforcing_ext.rope  # noqa: F401
from selfforcing_ext import PagedKVCache
from selfforcing_ext.attention import NO_PAST, Past, full_table, span_records
from selfforcing_ext.library import ops
from selfforcing_ext.mask import make_span_table

#: They change the page table of a cache, which is no tensor: a second call does not do what the first did, as opcheck
#: expects. Graphs of whole rollouts (test_compile.py) check them.
BOOKKEEPING = {"kv_cache_reserve", "kv_cache_commit"}
CPU = torch.device("cpu")
CACHE = PagedKVCache(1, 2, 8, 4, batch_size=2, window_frames=3)


def attention_calls() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Arguments of ``attention`` but the scale."""
    for case in (
        AttentionCase(MASKS[3], batch=2, head_dim=16),
        AttentionCase(MASKS[5], heads=4, kv_heads=2, head_dim=16, layout="packed"),
        AttentionCase(MASKS[2], heads=3, kv_heads=1, head_dim=8, layout="heads_first"),
    ):
        yield str(case), (*case.inputs(), *case.mask.spans().tensors(), *NO_PAST)
    for queries, keys in ((5, 7), (0, 7), (5, 0)):
        q, k, v = AttentionCase(None, queries, keys, head_dim=8).inputs()
        yield f"{queries} queries on {keys} keys", (q, k, v, *full_table(queries, keys, CPU).tensors(), *NO_PAST)
    rows_without_keys = make_span_table([0, 2, 5], [[], [(1, 4)]], 6)
    q, k, v = AttentionCase(None, 5, 6, head_dim=8).inputs()
    yield "rows without keys", (q, k, v, *rows_without_keys.tensors(), *NO_PAST)
    for case in (PAGED_CASES[0], next(case for case in PAGED_CASES if case.heads != case.kv_heads)):
        block, past = case.inputs()
        # opcheck compares what it computes with what it was given, and NaN is not equal to NaN.
        past = past._replace(k_pages=past.k_pages.nan_to_num(), v_pages=past.v_pages.nan_to_num())
        table = full_table(case.num_queries, case.num_queries, CPU)
        yield f"past {case}", (*block, *table.tensors(), *past)
    for form, dtype, dim, groups in (("int8", torch.int8, 32, 1), ("int4", torch.uint8, 16, 1)):
        pages = torch.zeros(2, 4, 3, 2, dim, dtype=dtype)
        scales = torch.rand(2, 4, 3, 2, groups).bfloat16()
        spans = span_records(torch.tensor([[[0, 4]], [[5, 9]]])[None], 0.5, 2)  # one list per head
        rope_table = torch.randn(2 * 6 + 2 * 5 + 3 * 5, 2)  # pairs of 32 channels
        past = Past(*pages, _int32([[2, 0, 3]]), spans, *scales, torch.randn(2, 32), rope_table, [2, 2, 3])
        yield f"{form}, rotated", (*torch.randn(3, 1, 5, 2, 32), *full_table(5, 5, CPU).tensors(), *past)


def calls() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """Op, what is special about the call, arguments."""
    for name, arguments in attention_calls():
        yield "attention", name, (*arguments, 0.25)
        out, lse = ops.attention(*arguments, 0.25)
        q, k, v, *geometry = arguments  # six tensors of the table, then the past
        for grads in ("out", "out and lse"):
            grad_lse = torch.randn_like(lse) if grads == "out and lse" else None
            backward = (torch.randn_like(out), grad_lse, q, k, v, out, lse.nan_to_num(), *geometry, 0.25)
            yield "attention_backward", f"{name}, gradient of {grads}", backward
            if geometry[6] is not None:
                pages, page_size, heads = geometry[8].numel(), *geometry[6].shape[1:3]
                grad_pages = torch.zeros(2, pages, page_size, heads, q.shape[-1])
                rows = torch.arange(-1, pages - 1, dtype=torch.int32).view_as(geometry[8])
                yield "attention_backward_through_past", f"{name}, {grads}", (*backward, *grad_pages, rows)

    pages = torch.zeros(5, 4, 2, 8), torch.zeros(5, 4, 2, 8)
    where = _int32([[3, 1], [0, 4]]), _int32([1, 2])
    yield "kv_cache_write", "", (*pages, *where, torch.randn(2, 6, 2, 8), torch.randn(2, 6, 2, 8))
    fused = torch.randn(2, 6, 16), torch.randn(2, 6, 2, 8), torch.randn(16), _int32([4, 9]), [1, 2, 3], 1e-6
    yield "kv_cache_norm_rope_write", "", (*pages, *where, *fused)
    # Not float8_e4m3fn, with which opcheck itself cannot compute.
    for storage, dim, groups in ((torch.int8, 64, 1), (torch.uint8, 32, 2)):
        pages = [torch.zeros(5, 4, 2, dim, dtype=storage) for _ in range(2)]
        scales = [torch.zeros(5, 4, 2, groups, dtype=torch.bfloat16) for _ in range(2)]
        block = torch.randn(2, 2, 6, 2, 64).unbind()
        for offset in (None, torch.randn(2, 64)):
            name = f"{storage}{'' if offset is None else ' offset'}"
            yield "kv_cache_write", name, (*pages, *where, *block, *scales, offset)
    yield "kv_cache_position", "", (_int32([3]),)
    yield "kv_cache_pin", "", (CACHE._page_table, CACHE._past_spans, CACHE._handle)

    x4, x3 = torch.randn(2, 12, 2, 8), torch.randn(2, 12, 16)
    weight, start, grid = torch.randn(16), _int32([3]), [2, 2, 3]
    rstd = torch.rand(2, 12)
    for name, like in (("", torch.clone), ("strided", padded)):
        yield "rope_3d", name, (like(x4), start, grid, False)
        yield "rope_3d", f"{name} inverse", (like(x4), start, grid, True)
        yield "qk_norm_rope", name, (like(x3), weight, start, 2, grid, 1e-6)
        yield "qk_norm_rope_backward", name, (like(x4), like(x3), weight, rstd, start, grid)
    starts = _int32([3, 70])
    yield "rope_3d", "ragged", (x4, starts, grid, False)
    yield "qk_norm_rope", "ragged", (x3, weight, starts, 2, grid, 1e-6)
    yield "qk_norm_rope_backward", "ragged", (x4, x3, weight, rstd, starts, grid)
    yield "rope_3d", "empty", (x4[:, :0], start, [0, 2, 3], False)
    yield "qk_norm_rope", "empty", (x3[:, :0], weight, start, 2, [0, 2, 3], 1e-6)

    seed, seeds = torch.tensor([3]), torch.tensor([4, 5])
    for name, latents in (("", (2, 3, 2, 3, 4)), ("empty", (0, 3, 2, 3, 4))):
        flow, uncond, x_t, noise = (torch.randn(latents) for _ in range(4))
        sigma, sigma_next = torch.rand(latents[:2]), torch.rand(latents[:2])
        for guidance, flow_uncond, scale in (("", None, 1.0), (" guided", uncond, 2.0)):
            yield "denoise_x0", name + guidance, (flow, flow_uncond, x_t, sigma, scale)
            step = flow, flow_uncond, x_t, sigma, sigma_next
            yield "denoise_step", name + guidance, (*step, noise, None, None, scale)
            yield "denoise_step", f"{name}{guidance} drawn", (*step, None, seed, seeds[: len(sigma)], scale)
            yield "dmd_gradient", name + guidance, (x_t, flow, noise, flow_uncond, scale)
        yield "add_noise", name, (x_t, noise, None, None, sigma)
        yield "add_noise", f"{name} drawn", (x_t, None, seeds[: len(sigma)], seed, sigma)
        for needs in ((True,) * 4, (False, False, True, True), (True, False, False, False)):
            for grads in ((flow, x_t), (None, x_t)):
                yield "denoise_backward", f"{name} {needs}", (*grads, sigma, sigma_next, 2.0, *needs)
        yield "denoise_backward", f"{name} of x0", (flow, None, sigma, None, 2.0, True, True, False, False)

    for name, tokens in (("", 12), ("empty", 0)):
        x, y = torch.randn(2, tokens, 8), torch.randn(2, tokens, 8)
        shift, scale = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
        mean, rstd = torch.randn(2, tokens), torch.rand(2, tokens)
        yield "modulated_layer_norm", name, (x, shift, scale, 1e-6)
        yield "modulated_layer_norm_backward", name, (y, x, scale, mean, rstd)
        yield "gated_residual", name, (x, y, scale)
        yield "gated_residual_backward", name, (y, x, scale)
        if tokens:
            yield "modulated_layer_norm", "strided", (padded(x), shift, scale, 1e-6)
            yield "gated_residual", "strided", (padded(x), padded(y), scale)


def _int32(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


CALLS = list(calls())


def differentiable(op: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"selfforcing::{op}", "Autograd")


@pytest.mark.parametrize(
    ("op", "arguments"), [pytest.param(op, arguments, id=f"{op} {name}") for op, name, arguments in CALLS]
)
def test_opcheck(op: str, arguments: tuple[Any, ...]):
    if differentiable(op) and "backward" not in op:
        arguments = tuple(
            a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments
        )
    torch.library.opcheck(getattr(ops, op).default, arguments)


def test_no_op_is_left_out():
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("selfforcing::")
    }
    assert {op for op, _, _ in CALLS} | BOOKKEEPING == registered
