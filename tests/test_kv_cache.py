"""The paged KV cache: what a list of all keys and values would give, in values and gradients, and nothing is moved."""

from __future__ import annotations

import gc
from collections import Counter

import pytest
import torch
from cases import DTYPES, ROLLOUT_CASES, RolloutCase
from compare import assert_close, assert_same_bits, relative_error
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from python_ref.ops.kv_cache import PagedKVCache as ReferenceCache
from selfforcing_ext import PagedKVCache

WINDOWED = RolloutCase((1, 3, 3, 3, 3, 3), window_frames=7, sink_frames=1, page_size=4, batch=2)


def caches(case: RolloutCase, dtype: torch.dtype = torch.float32) -> tuple[PagedKVCache, ReferenceCache]:
    arguments = case.cache_arguments()
    ours = PagedKVCache(**arguments, dtype=dtype)
    if case.window_frames is None and case.max_frames is None:
        arguments["max_frames"] = sum(case.block_frames)  # the reference must end somewhere
    return ours, ReferenceCache(**arguments, dtype=torch.float64)


def memory(cache: PagedKVCache) -> list[Tensor]:
    return [tensor for layer in cache.pool.layers for tensor in layer if tensor is not None]


def write_block(cache, layers, num_frames: int) -> None:
    with torch.no_grad():
        for layer, (_, k, v) in enumerate(layers):
            cache.write(layer, k.to(cache.dtype), v.to(cache.dtype))
        cache.commit(num_frames)


TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # units of the dtype's rounding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ROLLOUT_CASES, ids=str)
def test_rollout_matches_the_reference(case: RolloutCase, dtype: torch.dtype):
    """Every block's attention, before, while and after it is written, over wrapped rings and recycled pages."""
    ours, reference = caches(case, dtype)
    for index, num_frames in enumerate(case.block_frames):
        layers = case.block(num_frames, dtype, seed=index)
        written = case.block(num_frames, dtype, seed=100 + index)
        with torch.no_grad():
            for moment in ("before", "while"):
                for layer, (q, k, v) in enumerate(layers):
                    out = ours.attend(layer, q, k, v)
                    exact = reference.attend(layer, q.double(), k.double(), v.double())
                    assert_close(out, exact, TOLERANCE[dtype], f"block {index}, layer {layer}, {moment} it is written")
                    if moment == "while":
                        _, k, v = written[layer]
                        ours.write(layer, k, v)
                        reference.write(layer, k.double(), v.double())
            ours.commit(num_frames)
            reference.commit(num_frames)
        assert ours.num_frames == reference.num_frames
        assert ours.position.tolist() == [ours.num_frames] * case.batch
        assert ours.visible_frames == reference.visible_frames


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("case", ROLLOUT_CASES, ids=str)
def test_gradients_after_the_rollout(case: RolloutCase, checkpointed: bool):
    """Backward of every block after the last one was written: pages that a recorded block has read are still there."""
    ours, reference = caches(case)
    wanted, got = [], []
    for index, num_frames in enumerate(case.block_frames):
        layers = case.block(num_frames, seed=index)
        for cache, dtype, results in ((ours, torch.float32, got), (reference, torch.float64, wanted)):
            view = cache.view()
            for layer, tensors in enumerate(layers):
                inputs = tuple(t.detach().to(dtype).requires_grad_() for t in tensors)
                if cache is ours and checkpointed:
                    out = checkpoint(view.attend, layer, *inputs, use_reentrant=False)
                else:
                    out = cache.attend(layer, *inputs)
                results.append((out, inputs))
            write_block(cache, case.block(num_frames, seed=100 + index), num_frames)
    for (out, inputs), (exact_out, exact_inputs) in zip(got, wanted, strict=True):
        grad = torch.randn(out.shape)
        grads = torch.autograd.grad(out, inputs, grad)
        exact_grads = torch.autograd.grad(exact_out, exact_inputs, grad.double())
        for name, mine, true in zip("qkv", grads, exact_grads, strict=True):
            assert_close(mine, true, 2e-6, f"grad_{name}")


def test_a_view_reads_what_was_there():
    ours, _ = caches(WINDOWED)
    q, k, v = WINDOWED.block(3, seed=50)[1]
    with torch.no_grad():
        seen = []
        for index, num_frames in enumerate(WINDOWED.block_frames):
            view = ours.view()
            assert view.num_frames == ours.num_frames
            seen.append((view, view.attend(1, q, k, v)))
            write_block(ours, WINDOWED.block(num_frames, seed=index), num_frames)
        for view, out in seen:
            assert_same_bits(view.attend(1, q, k, v), out)


def test_a_view_refuses_what_the_cache_refuses():
    cache = PagedKVCache(**WINDOWED.cache_arguments() | {"max_frames": 6})
    for num_frames in (3, 2):
        write_block(cache, WINDOWED.block(num_frames), num_frames)
    view = cache.view()
    with torch.no_grad():
        view.attend(0, *WINDOWED.block(1)[0])
        with pytest.raises(
            ValueError, match="q has 3 frames, but max_frames leaves room for 1 after the view's position"
        ):
            view.attend(0, *WINDOWED.block(3)[0])
    cache = PagedKVCache(1, 2, 16, 6, window_frames=4)
    for num_frames in (3, 3):
        (block,) = RolloutCase((3,), num_layers=1).block(num_frames)
        write_block(cache, [block], num_frames)
    cache.streams[0].rollback(3)
    with pytest.raises(
        ValueError, match="q has 1 frames, but must have at least 3: a shorter block sees frames that were"
    ):
        cache.view().attend(0, *RolloutCase((1,), num_layers=1).block(1)[0])


def test_pages_come_back_when_nobody_can_read_them():
    cache, _ = caches(WINDOWED)
    q, k, v = (t.detach().clone().requires_grad_() for t in WINDOWED.block(3)[0])

    def free_after(hold) -> int:
        cache.reset()
        held = []
        for index, num_frames in enumerate(WINDOWED.block_frames):
            held.append(hold())
            write_block(cache, WINDOWED.block(num_frames, seed=index), num_frames)
        cache.reset()
        return cache.pool.num_pages - cache.pool.stats().free, held

    pinned, held = free_after(cache.view)
    assert pinned > 0
    held.clear()
    assert cache.pool.stats().free == cache.pool.num_pages

    pinned, held = free_after(lambda: cache.attend(0, q, k, v))
    assert pinned > 0
    torch.autograd.backward(held, [torch.ones_like(out) for out in held])
    assert cache.pool.stats().free == cache.pool.num_pages, "backward is done"

    pinned, held = free_after(lambda: cache.attend(0, q, k, v))
    held.clear()
    gc.collect()
    assert cache.pool.stats().free == cache.pool.num_pages, "the graph is gone"


def test_inference_never_grows_the_pool():
    for case in ROLLOUT_CASES:
        cache, _ = caches(case)
        size = cache.nbytes
        for index, num_frames in enumerate(case.block_frames):
            with torch.no_grad():
                for layer, (q, k, v) in enumerate(case.block(num_frames)):
                    cache.attend(layer, q, k, v)
            write_block(cache, case.block(num_frames, seed=index), num_frames)
        limited = case.window_frames is not None or case.max_frames is not None
        assert (cache.nbytes == size) == (limited or sum(case.block_frames) <= 8), str(case)


def test_eviction_moves_nothing():
    """A write changes exactly the bytes of the block that is written, whatever leaves the window."""
    cache, _ = caches(WINDOWED)
    for pages in memory(cache):
        pages.fill_(0)
    tokens_per_frame = WINDOWED.frame_seqlen * WINDOWED.kv_heads * WINDOWED.head_dim
    for index, num_frames in enumerate(WINDOWED.block_frames):
        before = [pages.clone() for pages in memory(cache)]
        addresses = [pages.data_ptr() for pages in memory(cache)]
        write_block(cache, WINDOWED.block(num_frames, seed=index), num_frames)
        after = memory(cache)
        assert addresses == [pages.data_ptr() for pages in after]
        for old, new in zip(before, after, strict=True):
            assert int((old != new).sum()) == WINDOWED.batch * num_frames * tokens_per_frame


def test_gradient_reaches_the_block_and_not_the_past():
    cache, _ = caches(WINDOWED)
    past = WINDOWED.block(1, seed=1)
    k_past, v_past = (t.detach().clone().requires_grad_() for t in past[0][1:])
    cache.write(0, k_past, v_past)
    cache.write(1, *past[1][1:])
    cache.commit(1)
    inputs = [t.detach().clone().requires_grad_() for t in WINDOWED.block(3)[0]]
    out = cache.attend(0, *inputs)
    grads = torch.autograd.grad(out.square().sum(), [*inputs, k_past, v_past], allow_unused=True)
    assert all(grad.any() for grad in grads[:3])
    assert grads[3] is grads[4] is None


def test_position_is_the_same_tensor_and_keeps_its_value_for_autograd():
    cache, _ = caches(WINDOWED)
    with torch.no_grad():
        position = cache.position
    recorded = cache.position
    write_block(cache, WINDOWED.block(1), 1)
    with torch.no_grad():
        assert cache.position is position
    assert (position.tolist(), recorded.tolist()) == ([1, 1], [0, 0])


def test_a_position_that_nobody_keeps_costs_no_pages():
    """What autograd might have recorded from a block, and did not, is forgotten when the block is written."""
    cache, _ = caches(WINDOWED)
    size = cache.nbytes
    for index, num_frames in enumerate(WINDOWED.block_frames):
        assert cache.position.tolist() == [cache.num_frames] * WINDOWED.batch
        write_block(cache, WINDOWED.block(num_frames, seed=index), num_frames)
    assert cache.nbytes == size


def test_reset_starts_again():
    case = WINDOWED
    cache, _ = caches(case)
    outputs = []
    for _ in range(2):
        for index, num_frames in enumerate(case.block_frames):
            write_block(cache, case.block(num_frames, seed=index), num_frames)
        with torch.no_grad():
            outputs.append(cache.attend(1, *case.block(3, seed=9)[1]))
        cache.reset()
        assert (cache.num_frames, cache.position.tolist(), cache.visible_frames) == (0, [0, 0], 0)
    assert_same_bits(outputs[1], outputs[0])


def test_writing_a_layer_again_replaces_it():
    case = RolloutCase((3,), num_layers=1)
    cache, _ = caches(case)
    (first,), (second,), (block,) = case.block(3, seed=1), case.block(3, seed=2), case.block(3, seed=3)
    cache.write(0, *first[1:])
    write_block(cache, [second], 3)
    other, _ = caches(case)
    write_block(other, [second], 3)
    with torch.no_grad():
        assert_same_bits(cache.attend(0, *block), other.attend(0, *block))


def test_a_cache_without_limits_grows():
    case = RolloutCase((3,) * 12, num_layers=1, page_size=4)
    cache, reference = caches(case)
    sizes = [cache.nbytes]
    for index, num_frames in enumerate(case.block_frames):
        (block,) = case.block(num_frames, seed=index)
        with torch.no_grad():
            exact = reference.attend(0, *(t.double() for t in block))
            assert_close(cache.attend(0, *block), exact, 2e-6, f"block {index}")
        write_block(cache, [block], num_frames)
        write_block(reference, [block], num_frames)
        sizes.append(cache.nbytes)
    assert sorted(Counter(sizes)) == [sizes[0], 2 * sizes[0], 4 * sizes[0], 8 * sizes[0]][: len(Counter(sizes))]
    assert len(Counter(sizes)) > 2


def test_autocast():
    cache = PagedKVCache(1, 2, 16, 6, max_frames=6, dtype=torch.bfloat16)
    (block,) = RolloutCase((3,), num_layers=1).block(3)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        cache.write(0, *block[1:])
        cache.commit(3)
        out = cache.attend(0, *block)
    assert out.dtype == torch.bfloat16
    with torch.no_grad():
        assert_same_bits(out, cache.attend(0, *(t.bfloat16() for t in block)))


def snapshot(cache: PagedKVCache) -> list[object]:
    """Everything that a failed call must not change."""
    tensors = [cache._page_table, cache._past_spans, cache._write_start, cache._position, *memory(cache)]
    return [
        cache.num_frames,
        cache.visible_frames,
        [(block.num_frames, sorted(block.written)) for block in cache._blocks],
        [vars(stream.pool.stats()) for stream in cache.streams],
        [cache.pool.table.row(stream._number) for stream in cache.streams],
        [vars(stream.frames) for stream in cache.streams],
        [t.clone() for t in tensors],
    ]


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def bad_calls():
    q, k, v = WINDOWED.block(3)[0]  # [2, 18, 2, 16]
    long = WINDOWED.block(7)[0]
    yield "layer", ("write", 2, k, v), ValueError, r"layer is 2, but must be in \[0, 2\)"
    yield "negative layer", ("attend", -1, q, k, v), ValueError, r"layer is -1, but must be in \[0, 2\)"
    for call in ("attend", "write"):
        head = (call, 0, q) if call == "attend" else (call, 0)
        yield f"{call} dtype", (*head, k.half(), v), TypeError, "k is float16, but the cache holds float32"
        yield f"{call} dtype v", (*head, k, v.double()), TypeError, "v is float64, but must be float32, bfloat16 or"
        yield f"{call} device", (*head, k.to("meta"), v), ValueError, "k is on meta, but the cache is on cpu"
        yield f"{call} rank", (*head, k[0], v), ValueError, r"k has shape \[18, 2, 16\], but must have four dimensions"
        yield f"{call} batch", (*head, k[:1], v), ValueError, "k has batch size 1, but the cache has 2"
        yield f"{call} heads", (*head, k[:, :, :1], v), ValueError, "k has heads 1, but the cache has 2"
        yield f"{call} head dim", (*head, k, v[..., :8]), ValueError, "v has head dim 8, but the cache has 16"
        yield f"{call} stride", (*head, k, v.mT.contiguous().mT), ValueError, "v has stride 2 in its last dimension"
        yield f"{call} tokens", (*head, k[:, :17], v[:, :17]), ValueError, "k has 17 tokens, .* frame_seqlen = 6"
        yield f"{call} no tokens", (*head, k[:, :0], v[:, :0]), ValueError, "k has 0 tokens, but must have a positive"
        yield f"{call} lengths", (*head, k, v[:, :12]), ValueError, "v has 12 tokens, but must have 18 like k"
    yield "q batch", ("attend", 0, q[:1], k, v), ValueError, r"q has shape .* batch, tokens and head dim \[2, 18, 16\]"
    yield (
        "q heads",
        ("attend", 0, q[:, :, :1], k, v),
        ValueError,
        "q has 1 heads, but must have a multiple of the cache's 2",
    )
    yield "q dtype", ("attend", 0, q.half(), k, v), TypeError, "q is float16, but the cache holds float32"
    yield "window", ("attend", 0, *long), ValueError, r"window_frames is 7, .* sink_frames \+ frames_per_block = 1 \+ 7"
    yield "window write", ("write", 0, *long[1:]), ValueError, "window_frames is 7, but must be at least"
    yield "max_frames", ("write", 0, k, v), ValueError, "k has 3 frames after 3 committed ones, but max_frames is 5"
    yield "max_frames read", ("attend", 0, q, k, v), ValueError, "q has 3 frames after 3 committed ones"
    yield "nothing written", ("commit", 1), ValueError, r"num_frames is 1, but layers \[0, 1\] of 2 have not written"
    yield "grad_to", ("write", 0, k, v, (k, v)), ValueError, "grad_to is given, but grad_through_cache is False"
    yield "layer of another type", ("write", 0.5, k, v), TypeError, "layer is 0.5, but must be an int"
    yield "block of another type", ("attend", 0, q, k, v, None, 0.0), TypeError, "block is 0.0, but must be an int"
    yield "drop", ("drop", -1), ValueError, "block is -1, but must be at least 0"
    yield "commit", ("commit", 3.0), TypeError, "num_frames is 3.0 of type float, but must be an int"
    yield "reserve nothing", ("reserve", 0), ValueError, "num_frames is 0, but must be at least 1"
    yield "reserve too much", ("reserve", 7), ValueError, r"window_frames is 7, .* 1 \+ 7"
    yield "view", ("view", 1), ValueError, r"block is 1, but must be in \[0, 0\]: 0 blocks are written"
    yield "negative view", ("view", -1), ValueError, r"block is -1, but must be in \[0, 0\]"


@pytest.mark.parametrize(("call", "error", "message"), [b[1:] for b in bad_calls()], ids=[b[0] for b in bad_calls()])
def test_bad_calls_change_nothing(call, error, message):
    cache = PagedKVCache(**WINDOWED.cache_arguments() | {"max_frames": 5})
    write_block(cache, WINDOWED.block(3, seed=7), 3)
    before = snapshot(cache)
    method, *arguments = call
    with pytest.raises(error, match=message):
        getattr(cache, method)(*arguments)
    assert same(before, snapshot(cache))


def test_bad_calls_within_a_block_change_nothing():
    cache, _ = caches(WINDOWED)
    q, k, v = WINDOWED.block(3)[0]
    cache.write(0, k, v)
    before = snapshot(cache)
    with pytest.raises(ValueError, match=r"num_frames is 3, but layers \[1\] of 2 have not written the block"):
        cache.commit(3)
    with pytest.raises(
        ValueError, match=r"k has 2 frames, but must have 3 like the block that layers \[0\] have written"
    ):
        cache.write(1, k[:, :12], v[:, :12])
    with pytest.raises(ValueError, match="q has 2 frames, but must have 3 like the block"):
        cache.attend(1, q[:, :12], k[:, :12], v[:, :12])
    assert same(before, snapshot(cache))
    cache.write(1, k, v)
    before = snapshot(cache)
    with pytest.raises(ValueError, match="num_frames is 2, but must be 3, the frames that were written"):
        cache.commit(2)
    assert same(before, snapshot(cache))
    cache.commit(3)
    assert cache.num_frames == 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_layers": 0}, ValueError, "num_layers is 0, but must be at least 1"),
        ({"batch_size": 0}, ValueError, "batch_size is 0, but must be at least 1"),
        ({"page_size": 0}, ValueError, "page_size is 0, but must be at least 1"),
        ({"max_frames": 0}, ValueError, "max_frames is 0, but must be at least 1"),
        ({"sink_frames": -1}, ValueError, "sink_frames is -1, but must be at least 0"),
        ({"page_size": 2.0}, TypeError, "page_size is 2.0 of type float, but must be an int"),
        ({"head_dim": 12}, ValueError, "head_dim has head dim 12, but must have a multiple of 8 up to 256"),
        ({"window_frames": 1, "sink_frames": 1}, ValueError, "window_frames is 1, but must be at least"),
        ({"dtype": torch.float64}, TypeError, "dtype is float64, but must be float32, bfloat16 or float16"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        PagedKVCache(**{"num_layers": 1, "num_heads": 2, "head_dim": 16, "frame_seqlen": 6} | arguments)


def write_arguments(**changes: Tensor) -> dict[str, Tensor]:
    good = {
        "k_pages": torch.zeros(5, 4, 2, 8),
        "v_pages": torch.zeros(5, 4, 2, 8),
        "page_table": torch.tensor([[3, 1], [0, 4]], dtype=torch.int32),
        "write_start": torch.tensor([1, 2], dtype=torch.int32),
        "k": torch.randn(2, 6, 2, 8),
        "v": torch.randn(2, 6, 2, 8),
    }
    return good | changes


def test_write_op():
    arguments = write_arguments(
        k=torch.randn(2, 6, 3, 8).bfloat16()[:, :, 1:], v=torch.randn(2, 2, 6, 8).bfloat16().mT.mT.transpose(1, 2)
    )
    arguments |= {name: torch.full((6, 4, 3, 9), 7.0).bfloat16()[:5, :, :2, :8] for name in ("k_pages", "v_pages")}
    torch.ops.selfforcing.kv_cache_write(**arguments)
    for name in ("k", "v"):
        pages = arguments[f"{name}_pages"]
        untouched = torch.ones(5, 4, dtype=torch.bool)
        for stream in range(2):
            for token in range(6):
                position = int(arguments["write_start"][stream]) + token
                page = int(arguments["page_table"][stream, position // 4])
                assert torch.equal(pages[page, position % 4], arguments[name][stream, token])
                untouched[page, position % 4] = False
        assert (pages[untouched] == 7).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.zeros(2, 6, 2, 8, dtype=torch.int32)}, "k is int32, but must be float32, bfloat16 or float16"),
        ({"v": torch.zeros(2, 5, 2, 8)}, r"v has shape \[2, 5, 2, 8\], but must be"),
        ({"v": torch.zeros(2, 6, 2, 16)[..., ::2]}, "v has stride 2 in its last dimension"),
        ({"v_pages": torch.zeros(4, 4, 2, 8)}, r"v_pages has shape \[4, 4, 2, 8\], but must be"),
        ({"k_pages": torch.zeros(5, 4, 2, 8, dtype=torch.half)}, "k_pages is float16, but must be float32 like k"),
        ({"page_table": torch.zeros(2, 2)}, "page_table is float32, but must be int32"),
        ({"page_table": torch.tensor([[3, 1], [0, 5]], dtype=torch.int32)}, r"page_table\[1, 1\] is 5, but must be in"),
        ({"write_start": torch.tensor([1, 3], dtype=torch.int32)}, r"write_start\[1\] is 3, but its 6 tokens must lie"),
        (
            {"write_start": torch.tensor([1], dtype=torch.int32)},
            r"write_start has shape \[1\], but must be \[B\] = \[2\]",
        ),
    ],
)
def test_write_op_refuses_bad_arguments(changes, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.selfforcing.kv_cache_write(**write_arguments(**changes))


def test_the_tolerance_sees_a_missing_frame():
    """The parity test would notice one frame too many or too few in the window."""
    case = RolloutCase((1,) * 6, num_layers=1, window_frames=4)
    right, wrong = PagedKVCache(**case.cache_arguments()), PagedKVCache(**case.cache_arguments() | {"window_frames": 5})
    for index in range(6):
        for cache in (right, wrong):
            write_block(cache, case.block(1, seed=index), 1)
    (block,) = case.block(1, seed=9)
    with torch.no_grad():
        error = relative_error(wrong.attend(0, *block), right.attend(0, *block))
    assert error > 100 * TOLERANCE[torch.float32]
