"""FlexAttention masks as spans: against flex_attention itself, and against dense softmax in float64."""

from __future__ import annotations

import gc
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cases import MASKS
from compare import assert_close, assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    and_masks,
    create_block_mask,
    create_mask,
    flex_attention,
    or_masks,
)
from torch.nn.functional import scaled_dot_product_attention

from selfforcing_ext import block_causal_attention
from selfforcing_ext.integrations import span_form
from selfforcing_ext.integrations.flex_attention import flex_attention_compatible, span_table_of

TOLERANCE = 2e-6  # of float32, relative to float64


def causal(b, h, q, k):
    return q >= k


def shows_all(b, h, q, k):
    return q >= 0


def window(size: int):
    return and_masks(causal, lambda b, h, q, k: q - k < size)


def prefix(length: int):
    return or_masks(causal, lambda b, h, q, k: k < length)


def documents(lengths: list[int], inside=shows_all):
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return and_masks(inside, lambda b, h, q, k: document[q] == document[k])


def blocks(tokens: int, first: int = 0, local: int | None = None):
    """Block-causal as Self-Forcing's training builds it: for each token the end of its block, in a tensor.

    ``first``: tokens of a first frame that stands alone; ``local``: tokens before the block's end that stay visible.
    """

    def end(index: Tensor) -> Tensor:
        return torch.where(index < first, first, first + ((index - first) // tokens + 1) * tokens)

    def mask_mod(b, h, q, k):
        seen = k < end(q)
        return seen if local is None else seen & (k >= end(q) - local)

    return mask_mod


def teacher_forcing(length: int, tokens: int):
    """[clean; noisy]: clean tokens are block-causal; noisy ones see those before their own, and it."""

    def mask_mod(b, h, q, k):
        block_q, block_k = q % length // tokens, k % length // tokens
        clean = (k < length) & torch.where(q < length, block_k <= block_q, block_k < block_q)
        return clean | ((q >= length) & (k >= length) & (block_q == block_k))

    return mask_mod


@dataclass(frozen=True)
class Case:
    name: str
    mask_mod: Callable[..., Tensor]
    num_queries: int
    num_keys: int | None = None
    tile: int | tuple[int, int] = 128
    num_blocks: int | None = None  # of queries that see the same keys

    def mask(self) -> BlockMask:
        keys = self.num_keys or self.num_queries
        return create_block_mask(self.mask_mod, None, None, self.num_queries, keys, device="cpu", BLOCK_SIZE=self.tile)

    def dense(self) -> Tensor:
        return create_mask(self.mask_mod, 1, 1, self.num_queries, self.num_keys or self.num_queries, device="cpu")[0, 0]

    def inputs(self, heads: int = 2, kv_heads: int = 2, dim: int = 16) -> list[Tensor]:
        """query, key, value [B, H, L, D]; in memory [B, L, H, D], as a projection leaves them."""
        keys = self.num_keys or self.num_queries
        shapes = ((self.num_queries, heads), (keys, kv_heads), (keys, kv_heads))
        return [torch.randn(2, length, count, dim).transpose(1, 2) for length, count in shapes]


CASES = (
    Case("everything", shows_all, 100, num_blocks=1),
    Case("everything, other keys", shows_all, 50, 170, 64, num_blocks=1),
    Case("causal", causal, 130, num_blocks=130),
    Case("causal, odd tiles", causal, 77, tile=(7, 10), num_blocks=77),
    Case("sliding window", window(20), 150, tile=32, num_blocks=150),
    Case("prefix", prefix(90), 140, tile=16, num_blocks=51),
    Case("documents", documents([30, 1, 69, 128, 12]), 240, num_blocks=5),
    Case("causal documents", documents([30, 1, 69], causal), 100, tile=16),
    Case("block-causal", blocks(36), 180, num_blocks=5),
    Case("block-causal, a multiple of 128", blocks(32), 256, num_blocks=8),
    Case("first frame alone", blocks(36, first=12), 156, num_blocks=5),
    Case("local window", blocks(24, local=72), 192, tile=64, num_blocks=8),
    Case("teacher forcing", teacher_forcing(108, 36), 216, num_blocks=6),
    Case("some see nothing", lambda b, h, q, k: (q >= 40) & (k < 30), 100, 60, num_blocks=2),
)


def find(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_spans_are_the_mask(case: Case):
    table = span_table_of(case.mask())
    assert torch.equal(table.dense(), case.dense())
    if case.num_blocks is not None:
        assert len(table.block_starts) - 1 == case.num_blocks


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2)])
def test_against_float64(case: Case, heads: int, kv_heads: int):
    inputs = case.inputs(heads, kv_heads)
    mine = [tensor.clone().requires_grad_() for tensor in inputs]
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    out = flex_attention_compatible(*mine, block_mask=case.mask(), scale=0.3, enable_gqa=kv_heads != heads)
    dense = case.dense()
    wanted = scaled_dot_product_attention(*exact, attn_mask=dense, scale=0.3, enable_gqa=True)
    wanted = torch.where(dense.any(dim=1)[:, None], wanted, 0)  # a row without keys is NaN in some versions of torch
    assert_close(out, wanted, TOLERANCE, "out")
    weight = torch.randn_like(out)
    grads = torch.autograd.grad(out, mine, weight)
    for name, grad, true in zip("qkv", grads, torch.autograd.grad(wanted, exact, weight.double()), strict=True):
        assert_close(grad, true, TOLERANCE, f"gradient of {name}")


@pytest.mark.parametrize("name", ["everything, other keys", "sliding window", "teacher forcing", "some see nothing"])
@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
def test_against_flex_attention(name: str):
    case = find(name)
    inputs, mask = case.inputs(heads=4), case.mask()
    wanted, aux = flex_attention(*inputs, block_mask=mask, enable_gqa=True, scale=0.2, return_aux=AuxRequest(lse=True))
    out, mine = flex_attention_compatible(
        *inputs, block_mask=mask, enable_gqa=True, scale=0.2, return_aux=AuxRequest(lse=True)
    )
    assert out.shape == wanted.shape
    assert_close(out, wanted, TOLERANCE)
    assert_close(mine.lse, aux.lse, TOLERANCE, "lse")
    assert mine.max_scores is None


def test_without_a_mask():
    case = find("everything, other keys")
    inputs = case.inputs()
    assert_same_bits(flex_attention_compatible(*inputs), flex_attention_compatible(*inputs, block_mask=case.mask()))


def test_arguments_in_the_order_of_flex_attention():
    case = find("block-causal")
    inputs, mask = case.inputs(heads=4), case.mask()
    wanted = flex_attention_compatible(*inputs, block_mask=mask, scale=0.2, enable_gqa=True, return_lse=True)
    assert wanted[1].shape == (2, 4, 180)
    for arguments in ((None, mask, 0.2, True, True, {"BLOCK_M": 64}), (mask, None, 0.2, True, True)):
        for mine, true in zip(flex_attention_compatible(*inputs, *arguments), wanted, strict=True):
            assert_same_bits(mine, true)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_our_own_masks_come_back(mask):
    """A dense mask as mask_mod, once around: the same table, and the same bits of attention."""
    dense = mask.dense()
    block_mask = create_block_mask(
        lambda b, h, q, k: dense[q, k], None, None, mask.seqlen, mask.seqlen, device="cpu", BLOCK_SIZE=32
    )
    for mine, true in zip(span_table_of(block_mask).tensors(), mask.spans().tensors(), strict=True):
        assert torch.equal(mine, true)
    q, k, v = (torch.randn(1, mask.seqlen, 2, 8) for _ in range(3))
    out = flex_attention_compatible(*(x.transpose(1, 2) for x in (q, k, v)), block_mask)
    assert_same_bits(out.transpose(1, 2), block_causal_attention(q, k, v, mask))


@st.composite
def span_masks(draw: st.DrawFn) -> tuple[Tensor, tuple[int, int]]:
    """A bool mask in which blocks of queries see at most three runs of keys, and the size of tiles."""
    num_keys = draw(st.integers(1, 40))
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        edges = sorted(draw(st.lists(st.integers(0, num_keys), max_size=6)))
        row = torch.zeros(num_keys, dtype=torch.bool)
        for start, end in zip(edges[::2], edges[1::2], strict=False):
            row[start:end] = True
        rows += [row] * draw(st.integers(1, 12))
    return torch.stack(rows), (draw(st.integers(1, 50)), draw(st.integers(1, 50)))


@given(span_masks(), st.integers(1, 100))
def test_random_masks_of_span_form(drawn, chunk):
    dense, tile = drawn
    block_mask = create_block_mask(
        lambda b, h, q, k: dense[q, k], None, None, *dense.shape, device="cpu", BLOCK_SIZE=tile
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(span_form, "_CHUNK", chunk)  # rows are read in pieces that end anywhere
        table = span_table_of(block_mask)
    assert torch.equal(table.dense(), dense)
    starts = table.block_starts[1:-1].long()
    assert (dense[starts] != dense[starts - 1]).any(dim=1).all(), "neighbouring blocks see the same keys"


@given(st.integers(0, 79), st.integers(0, 79), st.sampled_from((8, 32, 128)))
def test_one_token_is_enough_to_tell(query, key, tile):
    """One position that the lists do not show: the mask function alone knows it."""
    wanted = find("block-causal").mask_mod

    def flipped(b, h, q, k):
        return wanted(b, h, q, k) ^ ((q == query) & (k == key))

    block_mask = create_block_mask(flipped, None, None, 80, 80, device="cpu", BLOCK_SIZE=tile)
    difference = span_table_of(block_mask).dense() != create_mask(wanted, 1, 1, 80, 80, device="cpu")[0, 0]
    assert difference.nonzero().tolist() == [[query, key]]


def test_masks_are_converted_once():
    calls = []

    def counted(b, h, q, k):
        calls.append(1)
        return q >= k

    mask = create_block_mask(counted, None, None, 64, 64, device="cpu")
    table = span_table_of(mask)
    before = len(calls)
    inputs = [torch.randn(1, 1, 64, 8) for _ in range(3)]
    flex_attention_compatible(*inputs, block_mask=mask)
    assert span_table_of(mask) is table
    assert len(calls) == before
    forgotten = weakref.ref(mask)
    del mask
    gc.collect()
    assert forgotten() is None


def test_masks_that_are_alike_for_all_batches_and_heads():
    alike = documents([30, 50])
    mask = create_block_mask(lambda b, h, q, k: alike(b, h, q, k) & (b + h >= 0), 2, 3, 80, 80, device="cpu")
    assert torch.equal(span_table_of(mask).dense(), create_mask(alike, 1, 1, 80, 80, device="cpu")[0, 0])


def test_a_mask_of_lists_alone():
    """Without a mask function, the lists are the mask; entries behind the counted ones mean nothing."""
    counts = torch.tensor([1, 0, 2], dtype=torch.int32)
    indices = torch.tensor([[1, 2, 0], [0, 1, 2], [2, 0, 1]], dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(counts[None, None], indices[None, None], BLOCK_SIZE=(2, 3), seq_lengths=(5, 8))
    wanted = torch.zeros(5, 8, dtype=torch.bool)
    wanted[:2, 3:6] = True
    wanted[4:, :3] = wanted[4:, 6:] = True
    assert torch.equal(span_table_of(mask).dense(), wanted)


def test_sliced_masks_say_that_they_are():
    mask = create_block_mask(causal, 2, 1, 64, 64, device="cpu")
    with pytest.raises(RuntimeError, match="sliced BlockMask"):
        span_table_of(mask[0])


def test_lists_that_contradict_the_function():
    good = create_block_mask(causal, None, None, 64, 64, device="cpu", BLOCK_SIZE=16)
    lists = good.kv_num_blocks, good.kv_indices, good.full_kv_num_blocks, good.full_kv_indices
    hides_more = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=16, mask_mod=window(20), seq_lengths=(64, 64))
    with pytest.raises(
        ValueError,
        match=r"its mask_mod hides key 0 to query 20, but its lists have tile \[1, 0\] as full; make it with create",
    ):
        span_table_of(hides_more)
    shows_more = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=16, mask_mod=shows_all, seq_lengths=(64, 64))
    with pytest.raises(ValueError, match=r"shows key 16 to query 0, but its lists have tile \[0, 1\] as hidden"):
        span_table_of(shows_more)


@pytest.mark.parametrize(
    ("mask_mod", "batches", "heads", "message"),
    [
        (
            lambda b, h, q, k: (q + k) % 2 == 0,
            None,
            None,
            r"block_mask is not of span form: query 0 sees 50 separate runs of keys, but at most 16 are accepted; run "
            r"17 starts at key 32",
        ),
        (
            lambda b, h, q, k: (q < 70) | (k % 3 == 0),
            None,
            None,
            r"query 70 sees 34 separate runs of keys, but at most 16 are accepted; run 17 starts at key 48",
        ),
        (
            lambda b, h, q, k: q - k >= 7 * h,
            None,
            2,
            r"must be the same for all batches and heads, but query 0 does not see key 0 in batch 0, head 1, and sees "
            r"it in batch 0, head 0",
        ),
        (
            lambda b, h, q, k: k < 50 + b * (q == 9),
            3,
            2,
            r"query 9 sees key 50 in batch 1, head 0, and does not see it in batch 0, head 0",
        ),
    ],
    ids=["checkerboard", "stripes", "per head", "per batch"],
)
def test_masks_without_span_form(mask_mod, batches, heads, message):
    mask = create_block_mask(mask_mod, batches, heads, 100, 100, device="cpu", BLOCK_SIZE=32)
    with pytest.raises(ValueError, match=message):
        span_table_of(mask)


def test_more_spans_can_be_asked_for():
    stripes = Case("stripes", lambda b, h, q, k: k % 3 == 0, 60)
    mask = stripes.mask()
    with pytest.raises(ValueError, match="20 separate runs of keys, but at most 16"):
        span_table_of(mask)
    assert torch.equal(span_table_of(mask, max_spans=20).dense(), stripes.dense())


def test_slow_masks_warn_with_the_number():
    with pytest.warns(UserWarning, match=r"block_mask has 1\.0 queries per block .* fewer than 8"):
        span_table_of(create_block_mask(causal, None, None, 300, 300, device="cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        span_table_of(create_block_mask(causal, None, None, 100, 100, device="cpu"))  # too small to matter
        span_table_of(create_block_mask(blocks(10), None, None, 300, 300, device="cpu"))


def test_bad_arguments():
    case = find("block-causal")
    query, key, value = case.inputs()
    mask = case.mask()
    with pytest.raises(TypeError, match="block_mask is a Tensor, but must be a BlockMask"):
        flex_attention_compatible(query, key, value, block_mask=case.dense())
    slopes = torch.tensor([0.5, 0.25])
    with pytest.raises(ValueError, match="score_mod is given, but must be None: spans show or hide keys"):
        flex_attention_compatible(query, key, value, lambda s, b, h, q, k: s - slopes[h] * (q - k), mask)
    with pytest.raises(ValueError, match="max_scores, but only lse is available"):
        flex_attention_compatible(query, key, value, mask, return_aux=AuxRequest(max_scores=True))
    with pytest.raises(
        ValueError,
        match="query has 170 tokens, but block_mask was made for 180; make it with Q_LEN and KV_LEN = 170 and 180: no",
    ):
        flex_attention_compatible(query[:, :, :170], key, value, mask)
    with pytest.raises(ValueError, match="key has 100 tokens, but block_mask was made for 180"):
        flex_attention_compatible(query, key[:, :, :100], value[:, :, :100], mask)
    with pytest.raises(ValueError, match=r"key has shape \[180, 16\], but must have four dimensions \[B, H, L, D\]"):
        flex_attention_compatible(query, key[0, 0], value, mask)
    with pytest.raises(ValueError, match="key has 1 heads and query 2, but both must have the same number unless"):
        flex_attention_compatible(query, key[:, :1], value[:, :1], mask)
    with pytest.raises(TypeError, match="query is float64, but must be float32, bfloat16 or float16"):
        flex_attention_compatible(query.double(), key, value, mask)
    with pytest.raises(ValueError, match="block_mask is on meta, but must be on cpu like query"):
        flex_attention_compatible(query, key, value, mask.to("meta"))


def test_compiled_graphs_tell_masks_apart():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(flex_attention_compatible, backend=counter, fullgraph=True)
    inputs = [tensor.requires_grad_() for tensor in find("block-causal").inputs()]
    for tokens in (36, 45, 60):
        mask = create_block_mask(blocks(tokens), None, None, 180, 180, device="cpu")
        span_table_of(mask)
        out, wanted = (function(*inputs, block_mask=mask) for function in (compiled, flex_attention_compatible))
        assert_same_bits(out, wanted)
        weight = torch.randn_like(out)
        for mine, true in zip(*(torch.autograd.grad(x, inputs, weight) for x in (out, wanted)), strict=True):
            assert_same_bits(mine, true)
    assert counter.frame_count <= 2  # the second graph has symbols for the table's sizes


def test_a_mask_met_inside_a_compiled_function():
    torch._dynamo.reset()
    case = find("block-causal")
    inputs, mask = case.inputs(), case.mask()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="call it once before the compiled function"):
        torch.compile(flex_attention_compatible, backend="eager", fullgraph=True)(*inputs, block_mask=mask)
    out = torch.compile(flex_attention_compatible, backend="eager")(*inputs, block_mask=mask)
    assert_same_bits(out, flex_attention_compatible(*inputs, block_mask=mask))


def test_example():
    example = Path(__file__).parents[1] / "examples" / "flex_attention.py"
    result = subprocess.run([sys.executable, example], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for promised in ("teacher_forcing", "gradients:", "checkerboard: block_mask is not of span form"):
        assert promised in result.stdout
