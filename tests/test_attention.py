"""Block-causal attention: as accurate as torch's own kernel, in values and gradients, wherever the inputs lie."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import ATTENTION_CASES, DTYPES, LARGE_ATTENTION_CASES, LAYOUTS, MASKS, PAGED_CASES, AttentionCase
from compare import SUM_ROUNDING, assert_as_accurate, assert_close, assert_same_bits
from elementwise import num_threads
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from python_ref.ops.attention import block_causal_attention as reference
from python_ref.ops.attention import masked_softmax_attention
from selfforcing_ext import BlockCausalMask, block_causal_attention
from selfforcing_ext.attention import attention_over_spans, full_table, span_records
from selfforcing_ext.mask import make_span_table

#: lse is float32 whatever the inputs are: a few roundings of its sums.
LSE_TOLERANCE = 1e-6


# Not one key alone: out is then v itself, and what should cancel in the gradient of q is all that there is.
LSE_CASES = [case for case in (*ATTENTION_CASES[:7], *ATTENTION_CASES[-4:]) if case.num_keys != 1]


def leaves(tensors: tuple[Tensor, ...], dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    return tuple(t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors)


def torch_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float | None) -> Tensor:
    """torch's own kernel on the same inputs, [B, L, H, D]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return scaled_dot_product_attention(q, k, v, visible, scale=scale, enable_gqa=True).transpose(1, 2)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """out and lse by torch's plain ops: matrix products in the dtype of the inputs, softmax in float32."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    scores = (q @ k.mT).float() * (q.shape[-1] ** -0.5 if scale is None else scale)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2), scores.logsumexp(-1)


def check_accuracy(
    case: AttentionCase, dtype: torch.dtype, sum_rounding: float, tensors: tuple[Tensor, ...] | None = None
) -> None:
    """out and all gradients against torch's kernel, both measured against float64. ``tensors``: q, k and v other than
    the normal random ones of the case."""
    tensors = case.inputs(dtype) if tensors is None else tensors
    ours, torchs, exact = leaves(tensors), leaves(tensors), leaves(tensors, torch.float64)
    scale = case.softmax_scale
    out = block_causal_attention(*ours, case.mask, scale)
    torch_out = torch_attention(*torchs, None if case.mask is None else case.mask.dense(), scale)
    exact_out = reference(*exact, case.mask, scale)

    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_as_accurate(out, torch_out, exact_out, "out", sum_rounding)
    grad = torch.randn(out.shape).to(dtype)
    for name, mine, theirs, true in zip(
        "qkv",
        torch.autograd.grad(out, ours, grad),
        torch.autograd.grad(torch_out, torchs, grad),
        torch.autograd.grad(exact_out, exact, grad.double()),
        strict=True,
    ):
        assert mine.dtype == dtype
        assert_as_accurate(mine, theirs, true, f"grad_{name}", sum_rounding)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_any_shape_and_layout(case: AttentionCase, dtype: torch.dtype):
    check_accuracy(case, dtype, SUM_ROUNDING)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGE_ATTENTION_CASES, ids=str)
def test_as_accurate_as_torch(case: AttentionCase, dtype: torch.dtype):
    check_accuracy(case, dtype, 0)


def random_case(seed: int) -> AttentionCase:
    """Any mask or none, any heads, head dim, layout and scale."""
    choose = random.Random(seed)
    kv_heads, group = choose.choice((1, 2, 3)), choose.choice((1, 1, 2, 4))
    common = {
        "batch": choose.choice((1, 2, 3)),
        "heads": kv_heads * group,
        "kv_heads": kv_heads,
        "head_dim": 8 * choose.randint(1, 20),
        "layout": choose.choice(LAYOUTS),
        "softmax_scale": choose.choice((None, None, 0.3, -0.2)),
    }
    if choose.random() < 0.4:
        return AttentionCase(None, choose.randint(1, 300), choose.randint(1, 500), **common)
    per_block, blocks, alone = choose.randint(1, 3), choose.randint(1, 5), choose.random() < 0.3
    sink = choose.randint(0, 2)
    window = choose.choice((None, sink + per_block + choose.randint(0, 3)))
    mask = BlockCausalMask(
        per_block * blocks + alone, choose.randint(1, 40), per_block, window, sink, alone, choose.random() < 0.3
    )
    return AttentionCase(mask, **common)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(20))
def test_random_cases(seed: int, dtype: torch.dtype):
    check_accuracy(random_case(seed), dtype, SUM_ROUNDING)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("what", ["large logits", "equal keys", "equal rows"])
def test_extreme_logits(what: str, dtype: torch.dtype):
    """Logits of some hundreds, where one key takes all; keys that are all the same, where all take the same."""
    large = AttentionCase(BlockCausalMask(6, 60, 2, window_frames=4, sink_frames=1), softmax_scale=30.0)
    q, k, v = large.inputs(dtype)
    if what == "large logits":
        check_accuracy(large, dtype, SUM_ROUNDING, (q / 2, k / 2, v))
        return
    equal = (q, k[:, :1].expand(k.shape).contiguous(), v if what == "equal keys" else v[:, :1].expand(v.shape))
    # Gradients of q and k are sums that cancel to 0: no error is small beside that. Values alone are compared.
    out, lse = block_causal_attention(*equal, large.mask, return_lse=True)
    exact = [t.double() for t in equal]
    exact_out, exact_lse = reference(*exact, large.mask, return_lse=True)
    assert_as_accurate(out, torch_attention(*equal, large.mask.dense(), None), exact_out, "out")
    assert_close(lse, exact_lse, LSE_TOLERANCE, "lse")


# Heads, units of queries and keys are all shared out among threads: alone, few, more than threads; with and without
# a mask, grouped, and with so few keys that some threads get none.
THREAD_CASES = (
    AttentionCase(num_queries=1, num_keys=3000, heads=1, kv_heads=1),
    AttentionCase(num_queries=40, num_keys=1000, heads=1, kv_heads=1, head_dim=32),
    AttentionCase(num_queries=64, num_keys=900, heads=6, kv_heads=2, head_dim=24),
    AttentionCase(num_queries=300, num_keys=130, heads=3, kv_heads=3),
    AttentionCase(num_queries=300, num_keys=200, heads=8, kv_heads=1, head_dim=16),
    AttentionCase(num_queries=30, num_keys=20, batch=20, head_dim=16),
    AttentionCase(BlockCausalMask(6, 50, 2), heads=1, kv_heads=1),
    AttentionCase(MASKS[3], heads=4, kv_heads=2, batch=2),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", THREAD_CASES, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3, 8, 64])
def test_any_number_of_threads(threads: int, case: AttentionCase, dtype: torch.dtype):
    """Right on each, and the same bits again: no result depends on which thread was faster."""
    tensors = case.inputs(dtype)
    grads = torch.randn(tensors[0].shape).to(dtype), torch.randn(case.batch, case.heads, tensors[0].shape[1])

    def run() -> list[Tensor]:
        inputs = leaves(tensors)
        outputs = block_causal_attention(*inputs, case.mask, return_lse=True)
        return [*outputs, *torch.autograd.grad(outputs, inputs, grads)]

    exact = leaves(tensors, torch.float64)
    outputs = reference(*exact, case.mask, return_lse=True)
    wanted = [*outputs, *torch.autograd.grad(outputs, exact, [g.double() for g in grads])]
    tolerance = 2e-6 if dtype == torch.float32 else 5e-3
    with num_threads(threads):
        first, again = run(), run()
    for name, a, b, c in zip(("out", "lse", "grad_q", "grad_k", "grad_v"), first, again, wanted, strict=True):
        assert_close(a, c, tolerance, name)
        assert_same_bits(b, a, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LSE_CASES, ids=str)
def test_logsumexp_and_its_gradient(case: AttentionCase, dtype: torch.dtype):
    tensors = case.inputs(dtype)
    ours, exact = leaves(tensors), leaves(tensors, torch.float64)
    outputs = block_causal_attention(*ours, case.mask, case.softmax_scale, return_lse=True)
    exact_outputs = reference(*exact, case.mask, case.softmax_scale, return_lse=True)
    assert outputs[1].dtype == torch.float32
    assert_close(outputs[1], exact_outputs[1], LSE_TOLERANCE, "lse")

    # The gradient of lse alone, then of both at once. torch has no such kernel; its plain ops give the baseline.
    rounded = leaves(tensors)
    rounded_outputs = plain_attention(*rounded, None if case.mask is None else case.mask.dense(), case.softmax_scale)
    grads = (torch.randn(outputs[0].shape).to(dtype), torch.randn(outputs[1].shape))
    for some in (slice(1, 2), slice(0, 2)):
        mine, baseline, true = (
            torch.autograd.grad(
                o[some],
                i,
                tuple(g.to(x) for g, x in zip(grads[some], o[some], strict=True)),
                retain_graph=True,
                allow_unused=True,
            )
            for o, i in ((outputs, ours), (rounded_outputs, rounded), (exact_outputs, exact))
        )
        for name, a, b, c in zip("qkv", mine, baseline, true, strict=True):
            if c is None:  # lse does not depend on v
                assert not a.any()
            else:
                assert_as_accurate(a, b, c, f"grad_{name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PAGED_CASES, ids=str)
def test_past_in_pages(case, dtype: torch.dtype):
    """Keys in pages and keys in one piece are the same keys; nothing else in the pages is looked at."""
    block, past = case.inputs(dtype)
    ours = leaves(block)
    table = full_table(case.num_queries, case.num_queries, torch.device("cpu"))
    out, lse = attention_over_spans(*ours, table, past)
    grad = torch.randn(out.shape).to(dtype)
    grads = torch.autograd.grad(out, ours, grad)
    for stream, (q, k, v) in enumerate(case.gathered(block, past)):
        torchs, exact = leaves((q, k, v)), leaves((q, k, v), torch.float64)
        torch_out = torch_attention(*torchs, None, None)
        exact_out, exact_lse = masked_softmax_attention(*exact, None)
        name = f"stream {stream}: "
        assert_as_accurate(out[stream : stream + 1], torch_out, exact_out, name + "out")
        assert_close(lse[stream : stream + 1], exact_lse, LSE_TOLERANCE, name + "lse")
        own = slice(-case.num_queries, None)
        for letter, mine, theirs, true in zip(
            "qkv",
            grads,
            torch.autograd.grad(torch_out, torchs, grad[stream : stream + 1]),
            torch.autograd.grad(exact_out, exact, grad[stream : stream + 1].double()),
            strict=True,
        ):
            assert_as_accurate(mine[stream : stream + 1], theirs[:, own], true[:, own], f"{name}grad_{letter}")


def test_rows_without_keys_are_zero():
    """A query that sees nothing gives 0 and -inf, and takes no part in any gradient."""
    table = make_span_table([0, 3, 8, 10], [[(0, 4)], [], [(2, 9)]], num_keys=9)
    q, k, v = (torch.randn(1, length, 2, 16, requires_grad=True) for length in (10, 9, 9))
    out, lse = attention_over_spans(q, k, v, table)
    assert not out[:, 3:8].any()
    assert (lse[:, :, 3:8] == -torch.inf).all()
    exact = leaves((q, k, v), torch.float64)
    exact_out, exact_lse = masked_softmax_attention(*exact, table.dense())
    assert_close(out, exact_out, 1e-6, "out")
    assert_close(lse, exact_lse, LSE_TOLERANCE, "lse")
    grad_out, grad_lse = torch.randn(out.shape), torch.randn(lse.shape)
    wanted = torch.autograd.grad((exact_out, exact_lse), exact, (grad_out.double(), grad_lse.double()))
    for name, mine, true in zip(
        "qkv", torch.autograd.grad((out, lse), (q, k, v), (grad_out, grad_lse)), wanted, strict=True
    ):
        assert_close(mine, true, 1e-6, f"grad_{name}")
    assert not torch.autograd.grad(attention_over_spans(q, k, v, table)[0][:, 3:8].sum(), q)[0].any()


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_nothing_to_do(lengths):
    q, k, v = (torch.randn(2, length, 2, 8, requires_grad=True) for length in (lengths[0], lengths[1], lengths[1]))
    out, lse = block_causal_attention(q, k, v, return_lse=True)
    assert out.shape == (2, lengths[0], 2, 8)
    assert not out.any()
    assert (lse == -torch.inf).all()
    for tensor, grad in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert grad.shape == tensor.shape
        assert not grad.any()


def test_large_scores_do_not_overflow():
    q, k, v = (100 * torch.randn(1, 40, 2, 32) for _ in range(3))
    assert_close(block_causal_attention(q, k, v), reference(q.double(), k.double(), v.double(), None), 1e-5, "out")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_inputs_same_bits(dtype: torch.dtype):
    case = AttentionCase(BlockCausalMask(6, 50, 2, window_frames=4), batch=2, heads=4, kv_heads=2)
    tensors = case.inputs(dtype)
    grad = torch.randn(tensors[0].shape).to(dtype)

    def run() -> list[Tensor]:
        inputs = leaves(tensors)
        out, lse = block_causal_attention(*inputs, case.mask, return_lse=True)
        return [out, lse, *torch.autograd.grad(out, inputs, grad)]

    first = run()
    for _ in range(3):
        for name, a, b in zip(("out", "lse", "grad_q", "grad_k", "grad_v"), first, run(), strict=True):
            assert_same_bits(b, a, name)


def test_gradients_of_other_strides():
    """Autograd hands over what it likes: the expanded gradient of a sum, the permuted one of a transpose."""
    q, k, v = AttentionCase(MASKS[0], head_dim=16).inputs()
    exact = leaves((q, k, v), torch.float64)
    ours = leaves((q, k, v))
    weight = torch.randn(q.shape).transpose(1, 3).contiguous().transpose(1, 3)
    for reduce in (lambda out: out.sum(), lambda out: (out * weight.to(out.dtype)).sum()):
        mine = torch.autograd.grad(reduce(block_causal_attention(*ours, MASKS[0])), ours)
        true = torch.autograd.grad(reduce(reference(*exact, MASKS[0])), exact)
        for name, a, b in zip("qkv", mine, true, strict=True):
            assert_close(a, b, 1e-5, f"grad_{name}")


def test_autocast_casts_as_torch_does():
    q, k, v = AttentionCase(MASKS[0], head_dim=16).inputs()
    ours = leaves((q, k, v))
    with torch.autocast("cpu", torch.bfloat16):
        out = block_causal_attention(*ours, MASKS[0])
        assert torch_attention(q, k, v, None, None).dtype == out.dtype == torch.bfloat16
    assert_same_bits(out, block_causal_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), MASKS[0]))
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(out.sum(), ours))


def test_function_transforms_differentiate():
    """torch.func.grad and vjp, which look for a derivative in another place than autograd does."""
    q, k, v = AttentionCase(MASKS[0], head_dim=16).inputs()
    weight = torch.randn(q.shape)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (block_causal_attention(q, k, v, MASKS[0]) * weight).sum()

    ours = leaves((q, k, v))
    wanted = torch.autograd.grad(loss(*ours), ours)
    _, pull = torch.func.vjp(lambda *inputs: block_causal_attention(*inputs, MASKS[0]), q, k, v)
    for grads in (torch.func.grad(loss, argnums=(0, 1, 2))(q, k, v), pull(weight)):
        for name, mine, true in zip("qkv", grads, wanted, strict=True):
            assert_same_bits(mine, true, f"grad_{name}")


def test_second_derivative_is_refused():
    q, k, v = leaves(AttentionCase(MASKS[0], head_dim=16).inputs())
    (grad,) = torch.autograd.grad(block_causal_attention(q, k, v, MASKS[0]).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention can be differentiated once, but not twice"):
        grad.sum().backward()


Q, KV = (2, 120, 4, 16), (2, 120, 2, 16)


def bad_inputs():
    mask = MASKS[0]  # 120 tokens
    q, k, v = torch.zeros(Q), torch.zeros(KV), torch.zeros(KV)
    yield "no tensor", (1.0, k, v, mask), TypeError, r"q is a float, but must be a torch\.Tensor"
    yield "dtype", (q.double(), k, v, mask), TypeError, "q is float64, but must be float32, bfloat16 or float16"
    yield "other dtype", (q, k.half(), v, mask), TypeError, "k is float16, but must be float32 like q"
    yield "other dtype of v", (q, k, v.bfloat16(), mask), TypeError, "v is bfloat16, but must be float32 like q"
    yield "device", (q, k.to("meta"), v, mask), ValueError, "k is on meta, but must be on cpu like q"
    yield "rank", (q[0], k, v, mask), ValueError, r"q has shape \[120, 4, 16\], but must have four dimensions \[B, Lq"
    yield (
        "rank of v",
        (q, k, v[0], mask),
        ValueError,
        r"v has shape \[120, 2, 16\], but must have four dimensions \[B, Lk",
    )
    yield (
        "head dim",
        (q[..., :12], k[..., :12], v[..., :12], mask),
        ValueError,
        "head dim 12, but must have a multiple of 8",
    )
    large = torch.zeros(1, 120, 1, 264)
    yield (
        "large head dim",
        (large, large, large, mask),
        ValueError,
        "head dim 264, but must have a multiple of 8 up to 256",
    )
    yield (
        "stride",
        (q.transpose(2, 3).contiguous().transpose(2, 3), k, v, mask),
        ValueError,
        "q has stride 4 in its last",
    )
    yield "batch", (q, k[:1], v[:1], mask), ValueError, "k has shape .* must have the batch size 2 and head dim 16 of q"
    yield "head dims", (q, k[..., :8], v[..., :8], mask), ValueError, "k has shape .* head dim 16 of q"
    yield (
        "heads",
        (q[:, :, :3], k, v, mask),
        ValueError,
        "k has 2 heads, but must have a number of heads that divides the 3",
    )
    yield (
        "shape of v",
        (q, k, v[:, 1:], mask),
        ValueError,
        r"v has shape \[2, 119, 2, 16\], but must have shape \[2, 120",
    )
    yield "length", (q[:, 1:], k, v, mask), ValueError, r"q has 119 tokens, but mask\.seqlen is 120"
    yield "key length", (q, k[:, 1:], v[:, 1:], mask), ValueError, r"k has 119 tokens, but mask\.seqlen is 120"
    yield "mask", (q, k, v, torch.ones(120, 120)), TypeError, "mask is a Tensor, but must be a BlockCausalMask or None"


@pytest.mark.parametrize(
    ("arguments", "error", "message"), [b[1:] for b in bad_inputs()], ids=[b[0] for b in bad_inputs()]
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        block_causal_attention(*arguments)


def bad_op_arguments():
    """Changes to a good call of the op itself, which trusts nobody: (argument, its value, message)."""
    k_pages = torch.zeros(5, 8, 2, 16)

    def records(spans: object) -> Tensor:
        return span_records(torch.tensor([[spans]]))

    good = {
        "q": torch.zeros(1, 6, 4, 16),
        "k": torch.zeros(1, 6, 2, 16),
        "v": torch.zeros(1, 6, 2, 16),
        **dict(
            zip(
                ("block_starts", "span_offsets", "spans", "key_starts", "query_span_offsets", "query_spans"),
                full_table(6, 6, torch.device("cpu")).tensors(),
                strict=True,
            )
        ),
        "k_pages": k_pages,
        "v_pages": k_pages.clone(),
        "page_table": torch.tensor([[3, 1]], dtype=torch.int32),
        "past_spans": records([[0, 2], [5, 16]]),
        **dict.fromkeys(("k_scales", "v_scales", "k_offset", "rope_table")),
        "rope_grid": [],
        "softmax_scale": 0.25,
    }

    def i32(values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    for name, value, message in (
        ("q", torch.zeros(1, 6, 4, 12), "q has head dim 12, but must have a multiple of 8 up to 256"),
        ("q", torch.zeros(1, 6, 4, 16, dtype=torch.float64), "q is float64, but must be float32, bfloat16 or float16"),
        ("q", torch.zeros(6, 4, 16), r"q has shape \[6, 4, 16\], but must be \[B, Lq, H, D\]"),
        ("k", torch.zeros(1, 6, 3, 16), "k has 3 heads, but must have a number that divides the 4 heads of q"),
        ("v", torch.zeros(1, 5, 2, 16), r"v has shape \[1, 5, 2, 16\], but must be"),
        ("v", torch.zeros(1, 6, 2, 32)[..., ::2], "v has stride 2 in its last dimension"),
        ("block_starts", i32([0, 5]), r"cover queries \[0, 5\), but must cover \[0, 6\)"),
        ("block_starts", torch.tensor([0, 6]), "block_starts is int64, but must be int32"),
        ("span_offsets", i32([0]), r"span_offsets has shape \[1\]"),
        ("span_offsets", i32([0, 2]), "offsets of the span table run to 2"),
        ("spans", i32([[0, 7]]), r"is \[0, 7\), but spans must be sorted, disjoint and within \[0, 6\)"),
        ("v_pages", None, "must be given together or not at all"),
        ("v_pages", torch.zeros(5, 8, 2, 16, dtype=torch.half), "v_pages is float16, but must be float32 like k_pages"),
        ("k_pages", torch.zeros(5, 8, 1, 16), r"k_pages has shape \[5, 8, 1, 16\], but must be"),
        ("page_table", i32([[3, 5]]), r"page_table\[0, 1\] is 5, but must be in \[0, 5\)"),
        ("past_spans", records([[0, 2], [5, 17]]), r"past_spans\[0, 0, 1\] is \[5, 17\), but spans must be"),
        ("past_spans", records([[0, 6], [5, 16]]), r"past_spans\[0, 0, 1\] is \[5, 16\), but spans must be"),
        ("softmax_scale", float("nan"), "softmax_scale is nan, but must be finite"),
    ):
        yield f"{name}: {message}", good | {name: value}, message


@pytest.mark.parametrize(
    ("arguments", "message"), [b[1:] for b in bad_op_arguments()], ids=[b[0][:30] for b in bad_op_arguments()]
)
def test_op_refuses_bad_arguments(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.selfforcing.attention(**arguments)


def test_op_refuses_offsets_beyond_the_spans():
    """The first and the last offset are right; nothing may be read where the one between points."""
    good = next(iter(bad_op_arguments()))[1] | {"q": torch.zeros(1, 6, 4, 16)}
    wrong = {
        "block_starts": torch.tensor([0, 3, 6], dtype=torch.int32),
        "span_offsets": torch.tensor([0, 2**31 - 1, 0], dtype=torch.int32),
        "spans": torch.empty(0, 2, dtype=torch.int32),
    }
    with pytest.raises(RuntimeError, match="block 1 of the span table ends before it starts"):
        torch.ops.selfforcing.attention(**good | wrong)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set(isa):
    """The accuracy tests again in a process of their own, where SELFFORCING_CPU_ISA holds."""
    environment = os.environ | {"SELFFORCING_CPU_ISA": isa}
    probe = [sys.executable, "-c", "from selfforcing_ext import _C; print(_C.cpu_isa())"]
    found = subprocess.run(probe, env=environment, capture_output=True, text=True)
    if "which this machine lacks" in found.stderr:
        pytest.skip(f"this machine lacks {isa}")
    assert found.stdout.strip() == isa, found.stderr
    tests = (
        "test_any or test_past or test_every_code or test_rows_without_keys or test_extreme or test_random "
        "or test_as_accurate"
    )
    files = [__file__, str(Path(__file__).with_name("test_attention_past.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, "-k", tests]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]


def test_an_unknown_instruction_set_is_refused():
    environment = os.environ | {"SELFFORCING_CPU_ISA": "sse9"}
    probe = [sys.executable, "-c", "from selfforcing_ext import _C; _C.cpu_isa()"]
    found = subprocess.run(probe, env=environment, capture_output=True, text=True)
    assert "SELFFORCING_CPU_ISA is 'sse9', but must be one of baseline, avx2, avx512, avx512_bf16" in found.stderr
