"""Attention and the KV cache on the GPU against their float64 definitions, over the cases that the CPU tests use.

The tests of rope, denoise and modulate run on a GPU by themselves; ``pytest -m gpu`` runs all that need one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest
import torch
from cases import (
    ATTENTION_CASES,
    DTYPES,
    LARGE_ATTENTION_CASES,
    MASKS,
    PAGED_CASES,
    ROLLOUT_CASES,
    AttentionCase,
    PagedCase,
    RolloutCase,
)
from compare import SUM_ROUNDING, assert_as_accurate, assert_close, assert_same_bits
from small_model import LATENT, model
from test_attention import LSE_CASES, leaves, plain_attention, torch_attention
from test_graphs import BATCH, CACHES, FRAMES, block_inputs, denoising_of
from test_kv_cache import TOLERANCE
from torch import Tensor

from python_ref.ops.attention import block_causal_attention as reference
from python_ref.ops.attention import masked_softmax_attention
from python_ref.ops.kv_cache import PagedKVCache as ReferenceCache
from selfforcing_ext import BlockCausalMask, GraphedBlock, PagedKVCache, block_causal_attention
from selfforcing_ext.attention import Past, attention_over_spans, full_table
from selfforcing_ext.library import HAS_CUDA
from selfforcing_ext.mask import make_span_table

DEVICE = torch.device("cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

#: Whether calls that fit go to the kernels for Hopper.
ON_HOPPER = os.environ.get("SELFFORCING_HOPPER") == "1" and torch.cuda.get_device_capability() == (9, 0)

#: More tiles than the thread blocks of a GPU do in three rounds.
MANY_TILES = [
    AttentionCase(BlockCausalMask(12, 260, 3), heads=30, kv_heads=30, head_dim=64),
    AttentionCase(BlockCausalMask(12, 260, 3), heads=30, kv_heads=15, head_dim=128),
]

#: lse is float32 whatever the inputs are.
LSE_TOLERANCE = 2e-6


def test_this_build_has_cuda_ops():
    assert HAS_CUDA, "there is a CUDA device, but the CUDA ops were not built"


def on_device(tensor: Tensor) -> Tensor:
    """The same view of the same memory, NaN around it included, on the GPU."""
    memory = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return memory.to(DEVICE).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def gpu_leaves(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(on_device(tensor).requires_grad_() for tensor in tensors)


def gradients(outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    grads = tuple(grad.to(output.dtype) for grad, output in zip(grads, outputs, strict=True))
    return torch.autograd.grad(outputs, inputs, grads)


def dense(case: AttentionCase) -> Tensor | None:
    return None if case.mask is None else case.mask.dense(DEVICE)


def check_accuracy(case: AttentionCase, dtype: torch.dtype, sum_rounding: float) -> None:
    ours = gpu_leaves(case.inputs(dtype))
    torchs, exact = leaves(ours), leaves(ours, torch.float64)
    out = block_causal_attention(*ours, case.mask, case.softmax_scale)
    torch_out = torch_attention(*torchs, dense(case), case.softmax_scale)
    exact_out = reference(*exact, case.mask, case.softmax_scale)
    assert_as_accurate(out, torch_out, exact_out, "out", sum_rounding)
    grad = (torch.randn(out.shape, device=DEVICE).to(dtype),)
    for name, mine, theirs, true in zip(
        "qkv",
        gradients((out,), ours, grad),
        gradients((torch_out,), torchs, grad),
        gradients((exact_out,), exact, grad),
        strict=True,
    ):
        assert_as_accurate(mine, theirs, true, f"grad_{name}", sum_rounding)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_any_shape_and_layout(case: AttentionCase, dtype: torch.dtype):
    check_accuracy(case, dtype, SUM_ROUNDING)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGE_ATTENTION_CASES, ids=str)
def test_as_accurate_as_torch(case: AttentionCase, dtype: torch.dtype):
    check_accuracy(case, dtype, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", MANY_TILES, ids=str)
def test_rounds_of_tiles(case: AttentionCase, dtype: torch.dtype):
    check_accuracy(case, dtype, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LSE_CASES, ids=str)
def test_logsumexp_and_its_gradient(case: AttentionCase, dtype: torch.dtype):
    ours = gpu_leaves(case.inputs(dtype))
    plain, exact = leaves(ours), leaves(ours, torch.float64)
    outputs = block_causal_attention(*ours, case.mask, case.softmax_scale, return_lse=True)
    plain_outputs = plain_attention(*plain, dense(case), case.softmax_scale)
    exact_outputs = reference(*exact, case.mask, case.softmax_scale, return_lse=True)
    assert_close(outputs[1], exact_outputs[1], LSE_TOLERANCE, "lse")
    grads = (torch.randn(outputs[0].shape, device=DEVICE).to(dtype), torch.randn(outputs[1].shape, device=DEVICE))
    for name, mine, theirs, true in zip(
        "qkv",
        gradients(outputs, ours, grads),
        gradients(plain_outputs, plain, grads),
        gradients(exact_outputs, exact, grads),
        strict=True,
    ):
        assert_as_accurate(mine, theirs, true, f"grad_{name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PAGED_CASES, ids=str)
def test_past_in_pages(case: PagedCase, dtype: torch.dtype):
    block, past = case.inputs(dtype)
    ours = gpu_leaves(block)
    table = full_table(case.num_queries, case.num_queries, DEVICE)
    out, lse = attention_over_spans(*ours, table, Past(*(on_device(tensor) for tensor in past[:4])))
    grad = torch.randn(out.shape, device=DEVICE).to(dtype)
    grads = torch.autograd.grad(out, ours, grad)
    for stream, tensors in enumerate(case.gathered(block, past)):
        on_gpu = tuple(tensor.to(DEVICE) for tensor in tensors)
        torchs, exact = leaves(on_gpu), leaves(on_gpu, torch.float64)
        torch_out = torch_attention(*torchs, None, None)
        exact_out, exact_lse = masked_softmax_attention(*exact, None)
        mine = slice(stream, stream + 1)
        assert_as_accurate(out[mine], torch_out, exact_out, f"stream {stream}: out")
        assert_close(lse[mine], exact_lse, LSE_TOLERANCE, f"stream {stream}: lse")
        for name, grad_mine, theirs, true in zip(
            "qkv",
            grads,
            gradients((torch_out,), torchs, (grad[mine],)),
            gradients((exact_out,), exact, (grad[mine],)),
            strict=True,
        ):
            own = slice(-case.num_queries, None)
            assert_as_accurate(grad_mine[mine], theirs[:, own], true[:, own], f"stream {stream}: grad_{name}")


def test_rows_without_keys_are_zero():
    table = make_span_table([0, 3, 8, 10], [[(0, 4)], [], [(2, 9)]], num_keys=9).to(DEVICE)
    q, k, v = (torch.randn(1, length, 2, 16, device=DEVICE, requires_grad=True) for length in (10, 9, 9))
    out, lse = attention_over_spans(q, k, v, table)
    assert not out[:, 3:8].any()
    assert (lse[:, :, 3:8] == -torch.inf).all()
    exact = leaves((q, k, v), torch.float64)
    exact_outputs = masked_softmax_attention(*exact, table.dense(DEVICE))
    grads = (torch.randn(out.shape, device=DEVICE), torch.randn(lse.shape, device=DEVICE))
    for name, mine, true in zip(
        "qkv", gradients((out, lse), (q, k, v), grads), gradients(exact_outputs, exact, grads), strict=True
    ):
        assert_close(mine, true, 1e-6, f"grad_{name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_inputs_same_bits(dtype: torch.dtype):
    case = AttentionCase(BlockCausalMask(6, 50, 2, window_frames=4), batch=2, heads=4, kv_heads=2)
    tensors = case.inputs(dtype)
    grad = torch.randn(tensors[0].shape, device=DEVICE).to(dtype)

    def run() -> list[Tensor]:
        inputs = gpu_leaves(tensors)
        out, lse = block_causal_attention(*inputs, case.mask, return_lse=True)
        return [out, lse, *torch.autograd.grad(out, inputs, grad)]

    first = run()
    for _ in range(5):
        for name, again, once in zip(("out", "lse", "grad_q", "grad_k", "grad_v"), run(), first, strict=True):
            assert_same_bits(again, once, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [*ROLLOUT_CASES, RolloutCase((2,) * 9, window_frames=4, page_size=16, batch=2, head_dim=64)], ids=str
)
def test_rollout_matches_the_reference(case: RolloutCase, dtype: torch.dtype):
    """Attend, write and commit over wrapped rings and recycled pages."""
    arguments = case.cache_arguments()
    ours = PagedKVCache(**arguments, dtype=dtype, device=DEVICE)
    if case.window_frames is None and case.max_frames is None:
        arguments["max_frames"] = sum(case.block_frames)  # the reference must end somewhere
    exact = ReferenceCache(**arguments, dtype=torch.float64)
    with torch.no_grad():
        for index, num_frames in enumerate(case.block_frames):
            for layer, (q, k, v) in enumerate(case.block(num_frames, dtype, seed=index)):
                out = ours.attend(layer, on_device(q), on_device(k), on_device(v))
                wanted = exact.attend(layer, q.double(), k.double(), v.double())
                assert_close(out, wanted, TOLERANCE[dtype], f"block {index}, layer {layer}")
                ours.write(layer, on_device(k), on_device(v))
                exact.write(layer, k.double(), v.double())
            ours.commit(num_frames)
            exact.commit(num_frames)


CACHE_OPTIONS = {
    "plain": {},
    "on_read": {"rope": "on_read", "rope_grid": (2, 3)},
    "biased": {"past_bias": (1.0, -0.5, 0.25)},
    "int8": {"quantization": "int8"},
    "fp8_e4m3": {"quantization": "fp8_e4m3"},
    "int4": {"quantization": "int4"},
    "all": {"quantization": "int4", "rope": "on_read", "rope_grid": (2, 3), "past_bias": (-1.0, 0.5, 0.0)},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("head_dim", "page_size"), [(32, 4), (64, 4), (96, 4), (128, 4), (256, 4), (64, 16), (96, 16), (128, 16)]
)
@pytest.mark.parametrize("options", CACHE_OPTIONS.values(), ids=CACHE_OPTIONS)
def test_every_way_to_read_the_past(options: dict[str, object], head_dim: int, page_size: int, dtype: torch.dtype):
    """Outputs of a rollout over a wrapped ring, and the gradients that flow through the cache to every block."""
    generator = torch.Generator().manual_seed(0)
    arguments = {"num_layers": 1, "num_heads": 2, "head_dim": head_dim, "frame_seqlen": 6, "batch_size": 2}
    arguments |= {"window_frames": 5, "sink_frames": 1, "page_size": page_size, "grad_through_cache": True, **options}
    if "quantization" in options:
        arguments["key_offset"] = torch.randn(1, 2, head_dim, generator=generator)
    ours = PagedKVCache(**arguments, dtype=dtype, device=DEVICE)
    exact = ReferenceCache(**arguments, dtype=torch.float64)
    all_ours, all_exact, outs, exact_outs, grads = [], [], [], [], []
    for num_frames in (1, 2, 3, 2, 2):
        block = tuple(
            torch.randn(2, 6 * num_frames, heads, head_dim, generator=generator).to(dtype) for heads in (4, 2, 2)
        )
        mine, theirs = gpu_leaves(block), leaves(block, torch.float64)
        outs.append(ours.attend(0, *mine))
        exact_outs.append(exact.attend(0, *theirs))
        for cache, (_, k, v) in ((ours, mine), (exact, theirs)):
            cache.write(0, k, v)
            cache.commit(num_frames)
        all_ours += mine
        all_exact += theirs
        grads.append(torch.randn(block[0].shape, generator=generator).to(dtype))
    for index, (out, wanted) in enumerate(zip(outs, exact_outs, strict=True)):
        assert_close(out, wanted, TOLERANCE[dtype], f"block {index}")
    found = torch.autograd.grad(outs, all_ours, [grad.to(DEVICE) for grad in grads])
    wanted_grads = torch.autograd.grad(exact_outs, all_exact, [grad.double() for grad in grads])
    for index, (grad, wanted) in enumerate(zip(found, wanted_grads, strict=True)):
        assert_close(grad, wanted, 2 * TOLERANCE[dtype], f"block {index // 3}: grad_{'qkv'[index % 3]}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", ["int8", "fp8_e4m3", "int4"])
def test_quantised_bits(format: str, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 18, 3, 96, generator=generator).to(dtype) for _ in range(2))
    pages = []
    for device in ("cpu", DEVICE):
        cache = PagedKVCache(
            1, 3, 96, 6, batch_size=2, max_frames=3, page_size=7, dtype=dtype, quantization=format, device=device
        )
        cache.write(0, k.to(device), v.to(device))
        cache.commit(3)
        places = [stream.places([(0, 3)]) for stream in cache.streams]
        pages.append(
            [tensor.cpu()[page.cpu(), offset.cpu()] for tensor in cache.pool.layers[0][:4] for page, offset in places]
        )
    for index, (cpu, cuda) in enumerate(zip(*pages, strict=True)):
        assert torch.equal(cpu.view(torch.uint8), cuda.view(torch.uint8)), index


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_graph_replays_with_new_positions(dtype: torch.dtype):
    """What changes from block to block reaches the kernels through device memory alone."""
    case = PAGED_CASES[0]
    block, past = case.inputs(dtype)
    q, k, v = (on_device(tensor) for tensor in block)
    past = Past(*(on_device(tensor) for tensor in past[:4]))
    recorded = past.spans.clone()
    table = full_table(case.num_queries, case.num_queries, DEVICE)

    def attend() -> Tensor:
        return attention_over_spans(q, k, v, table, past)[0]

    attend()  # warm-up outside of the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend()
    for spans in (recorded, torch.zeros_like(recorded), recorded // 2):
        past.spans.copy_(spans)
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(captured, attend(), "replayed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", CACHES.values(), ids=CACHES)
@torch.no_grad()
def test_a_whole_block_is_one_graph(options: dict[str, object], dtype: torch.dtype):
    """Four steps and the clean pass, bit for bit as without a graph, over evictions; the host waits for nothing."""
    generator = model().to(DEVICE, dtype)
    limits = {"max_frames": None, "page_size": 5, **options}
    caches = [generator.make_cache((BATCH, 1, *LATENT), **limits) for _ in range(2)]
    eager, graphed = (
        denoising_of(generator, caches[0]),
        GraphedBlock(caches[1], FRAMES, denoising_of(generator, caches[1])),
    )
    for index in range(8):
        inputs = [x.to(DEVICE, dtype) for x in block_inputs(index)]
        replays = index > 1  # the first call runs as it is, the second captures
        torch.cuda.set_sync_debug_mode("error" if replays else "default")
        try:
            found = graphed(*inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert_same_bits(found, eager(*inputs), f"block {index}")
    assert caches[1].num_frames == caches[0].num_frames


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ops_run_on_the_current_stream(dtype: torch.dtype):
    case = AttentionCase(BlockCausalMask(4, 64, 2), batch=2)
    q, k, v = (on_device(tensor) for tensor in case.inputs(dtype))
    expected = block_causal_attention(q, k, v, case.mask)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        late = torch.zeros_like(q)
        torch.cuda._sleep(50_000_000)  # q arrives after some 30 ms: an op on another stream would read zeros
        late.copy_(q)
        out = block_causal_attention(late, k, v, case.mask)
    side.synchronize()
    assert_same_bits(out, expected)


def test_the_first_call_of_a_thread():
    """No call has bound a CUDA context to it, and memory comes from torch's cache: the kernels' host code must."""
    q, k, v = (on_device(tensor) for tensor in MANY_TILES[0].inputs(torch.bfloat16))
    expected = block_causal_attention(q, k, v)
    block_causal_attention(q, k, v)  # leaves memory for the thread
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(block_causal_attention(q, k, v)))
    thread.start()
    thread.join()
    assert_same_bits(found[0], expected)


def kernels_of(call: Callable[[], object]) -> str:
    """The names of the kernels that ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return " ".join(event.key for event in profiler.key_averages())


@pytest.mark.skipif(not ON_HOPPER, reason="needs SELFFORCING_HOPPER=1 and a Hopper GPU")
@pytest.mark.parametrize("options", [{}, {"quantization": "int4"}, {"rope": "on_read", "rope_grid": (4, 4)}], ids=str)
def test_calls_that_fit_go_to_the_kernels_for_hopper(options: dict[str, object]):
    """The choice is silent: without this, all tests could pass on the other kernels."""
    q, k, v = gpu_leaves(AttentionCase(MASKS[0]).inputs(torch.bfloat16))
    ran = kernels_of(lambda: block_causal_attention(q, k, v, MASKS[0]).sum().backward())
    for kernel in ("hopper_forward_kernel", "hopper_grad_q_kernel", "hopper_grad_kv_kernel"):
        assert kernel in ran
    cache = PagedKVCache(1, 2, 64, 16, max_frames=4, page_size=16, dtype=torch.bfloat16, device=DEVICE, **options)
    block = [torch.randn(1, 16, 2, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)]
    cache.write(0, *block[1:])
    cache.commit(1)
    assert "hopper_forward_kernel" in kernels_of(lambda: cache.attend(0, *block))
