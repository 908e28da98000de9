"""The reference cache against things that know nothing of caches: dense masks over the whole sequence, explicit
concatenation, closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from compare import assert_close, assert_same_bits
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn.functional import scaled_dot_product_attention

from python_ref.ops.attention import masked_softmax_attention
from python_ref.ops.kv_cache import PagedKVCache, PagePool, PoolStats
from python_ref.ops.rope import rope_3d
from selfforcing_ext.mask import BlockCausalMask

EXACT = 1e-12
FRAME = 4  # tokens, in a grid of 2 x 2
GRID = (2, 2)
HEADS, KV_HEADS, DIM = 4, 2, 32
Frames = tuple[Tensor, Tensor, Tensor]  # q, k, v


def draw(num_frames: int, batch: int = 1, seed: int = 0) -> Frames:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(batch, num_frames * FRAME, heads, DIM, dtype=torch.float64, generator=generator)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )


def frames_of(qkv: Frames, start: int, end: int) -> Frames:
    return tuple(x[:, start * FRAME : end * FRAME] for x in qkv)


def at(x: Tensor, frames: list[int]) -> Tensor:
    return torch.cat([x[:, :0], *(x[:, frame * FRAME : (frame + 1) * FRAME] for frame in frames)], dim=1)


def cache_of(**options) -> PagedKVCache:
    return PagedKVCache(1, KV_HEADS, DIM, FRAME, **{"dtype": torch.float64} | options)


def pool_of(num_pages: int, page_size: int = FRAME, **options) -> PagePool:
    return PagePool(num_pages, page_size, 1, KV_HEADS, DIM, **{"dtype": torch.float64} | options)


def append(cache: PagedKVCache, qkv: Frames, block: int = 0) -> None:
    _, k, v = qkv
    cache.write(0, k, v, block=block)
    cache.commit(k.shape[1] // FRAME)


def fill(cache: PagedKVCache, qkv: Frames, block_frames: int = 1) -> None:
    for start in range(0, qkv[0].shape[1] // FRAME, block_frames):
        append(cache, frames_of(qkv, start, start + block_frames))


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """torch's own."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True).transpose(1, 2)


def after(block: Frames, past: Frames, frames: list[int]) -> Tensor:
    """A block over these frames of the past and itself."""
    q, *kv = block
    return attention(q, *(torch.cat((at(x, frames), own), dim=1) for x, own in zip(past[1:], kv, strict=True)))


@pytest.mark.parametrize(("window", "sink"), [(None, 0), (4, 0), (6, 2), (3, 1)])
def test_a_rollout_is_attention_under_the_mask(window, sink):
    qkv = draw(10, batch=2)
    mask = BlockCausalMask(10, FRAME, 2, window_frames=window, sink_frames=sink)
    whole = attention(*qkv, mask.dense())
    cache = cache_of(batch_size=2, window_frames=window, sink_frames=sink)
    for start in range(0, 10, 2):
        block = frames_of(qkv, start, start + 2)
        assert_close(cache.attend(0, *block), whole[:, start * FRAME : (start + 2) * FRAME], EXACT)
        append(cache, block)
        assert cache.position.tolist() == [start + 2] * 2
        assert cache.visible_frames == (start + 2 if window is None else min(window, start + 2))


def test_streams_of_different_lengths_in_one_batch():
    pool, past, block = pool_of(20), draw(7, batch=2), draw(1, batch=2, seed=1)
    long, short = pool.open_stream(4, 1, frame_seqlen=FRAME), pool.open_stream(frame_seqlen=FRAME)
    fill(PagedKVCache.of_streams([long]), tuple(x[:1] for x in past))
    fill(PagedKVCache.of_streams([short]), tuple(x[1:, : 2 * FRAME] for x in past))
    both = PagedKVCache.of_streams([short, long])
    assert both.position.tolist() == [2, 7]
    with pytest.raises(ValueError, match=r"the streams have \[2, 7\] frames, but num_frames is for streams of one"):
        _ = both.num_frames
    alone = [tuple(x[i : i + 1] for x in block) for i in range(2)]
    expected = [
        after(alone[0], tuple(x[1:] for x in past), [0, 1]),
        after(alone[1], tuple(x[:1] for x in past), [0, 5, 6]),
    ]
    assert_close(both.attend(0, *block), torch.cat(expected), EXACT)
    append(both, block)
    assert both.position.tolist() == [3, 8]
    # A batch breaks up, and its streams go on in others.
    newest = draw(1, seed=2)
    all_short = tuple(torch.cat((x[1:, : 2 * FRAME], own[:1]), dim=1) for x, own in zip(past, block, strict=True))
    assert_close(PagedKVCache.of_streams([short]).attend(0, *newest), after(newest, all_short, [0, 1, 2]), EXACT)


@pytest.mark.parametrize(("window", "sink"), [(None, 0), (5, 0), (5, 2)])
def test_rope_on_read_numbers_what_is_visible(window, sink):
    qkv = draw(9)
    cache = cache_of(rope="on_read", rope_grid=GRID, window_frames=window, sink_frames=sink)
    for start in range(9):
        q, k, v = frames_of(qkv, start, start + 1)
        newest = range(0 if window is None else max(sink, start + 1 - (window - sink)), start)
        seen = [*range(min(sink, start)), *newest]
        keys = rope_3d(at(qkv[1], [*seen, start]), (len(seen) + 1, *GRID))
        values = at(qkv[2], [*seen, start])
        expected = attention(rope_3d(q, (1, *GRID), len(seen)), keys, values)
        assert_close(cache.attend(0, q, k, v), expected, EXACT, f"frame {start}")
        append(cache, (q, k, v))


def test_rope_on_read_is_rope_on_write_while_the_visible_frames_are_in_one_piece():
    """Scores depend on differences of positions alone."""
    qkv = draw(9)
    on_read = cache_of(rope="on_read", rope_grid=GRID, window_frames=4)
    on_write = cache_of(window_frames=4)
    for start in range(9):
        q, k, v = frames_of(qkv, start, start + 1)
        rotated = *(rope_3d(x, (1, *GRID), start) for x in (q, k)), v
        assert_close(on_read.attend(0, q, k, v), on_write.attend(0, *rotated), 1e-11)
        append(on_read, (q, k, v))
        append(on_write, rotated)


def test_a_bias_of_log_2_doubles_a_key():
    past, block = draw(4), draw(2, seed=1)
    cache = cache_of(window_frames=5, sink_frames=1)
    fill(cache, past)
    doubled = {"sink": [0, 0, 2, 3], "past": [0, 2, 3, 2, 3]}  # of visible frames 0, 2, 3
    for index, (name, frames) in enumerate(doubled.items()):
        cache.past_bias = tuple(math.log(2) * (index == i) for i in range(3))
        assert_close(cache.attend(0, *block), after(block, past, frames), EXACT, name)
    twice = tuple(torch.cat((x, own), dim=1) for x, own in zip(past, block, strict=True))
    cache.past_bias = (0.0, 0.0, math.log(2))
    assert_close(cache.attend(0, *block), after(block, twice, [0, 2, 3, 4, 5]), EXACT, "own block")
    with pytest.raises(ValueError, match="but must be three finite numbers: for sink, past and own block"):
        cache.past_bias = (0.0, 0.0)


def test_selected_frames():
    past, block = draw(8), draw(1, seed=1)
    cache = cache_of(rope="on_write")
    (stream,) = cache.streams
    fill(cache, past)
    stream.select_frames([6, 0, 3])
    assert stream.visible_frames == 3
    assert_close(cache.attend(0, *block), after(block, past, [0, 3, 6]), EXACT)
    append(cache, block)
    more, longer = draw(1, seed=2), tuple(torch.cat(pair, dim=1) for pair in zip(past, block, strict=True))
    assert_close(cache.attend(0, *more), after(more, longer, [0, 3, 6, 8]), EXACT, "later frames are seen")
    stream.select_frames(None)
    assert_close(cache.attend(0, *more), after(more, longer, list(range(9))), EXACT, "as at first")
    stream.select_frames([2], forget=True)
    assert_close(cache.attend(0, *more), after(more, longer, [2]), EXACT)
    assert cache.pool.stats().used == 1
    with pytest.raises(ValueError, match=r"frames has 3, which was evicted or forgotten: 9 frames are committed"):
        stream.select_frames([3])
    with pytest.raises(ValueError, match="frames is None, but frames are forgotten: choose among those that are left"):
        stream.select_frames(None)


def test_selected_frames_stay_while_the_window_moves_on():
    past = draw(12)
    cache = cache_of(window_frames=4, sink_frames=1)
    (stream,) = cache.streams
    fill(cache, frames_of(past, 0, 4))
    stream.select_frames([1, 3])
    for start in range(4, 12):
        block = frames_of(past, start, start + 1)
        newest = [frame for frame in range(4, start) if frame >= start + 1 - 3]
        assert_close(cache.attend(0, *block), after(block, past, [1, 3, *newest]), EXACT, f"frame {start}")
        append(cache, block)
    with pytest.raises(ValueError, match="frames has 2, which was evicted"):
        stream.select_frames([2])
    stream.select_frames(None)
    block = draw(1, seed=1)
    assert_close(cache.attend(0, *block), after(block, past, [0, 10, 11]), EXACT, "the sink was kept")


@pytest.mark.parametrize("rope", ["on_write", "on_read"])
def test_frames_selected_per_head(rope):
    past, (q, k, v) = draw(6), draw(2, seed=1)
    options = {} if rope == "on_write" else {"rope": rope, "rope_grid": GRID}
    cache = cache_of(window_frames=8, **options)
    fill(cache, past)
    chosen = [[0, 2, 5], [4]]
    cache.streams[0].select_frames(chosen)
    group = HEADS // KV_HEADS
    expected = []
    for head, frames in enumerate(chosen):
        queries, keys = q[:, :, head * group : (head + 1) * group], k[:, :, [head]]
        past_keys = at(past[1], frames)[:, :, [head]]
        if rope == "on_read":  # the block stands after the three frames that the first head sees
            queries, keys = rope_3d(queries, (2, *GRID), 3), rope_3d(keys, (2, *GRID), 3)
            past_keys = rope_3d(past_keys, (len(frames), *GRID), 3 - len(frames))
        values = torch.cat((at(past[2], frames)[:, :, [head]], v[:, :, [head]]), dim=1)
        expected.append(attention(queries, torch.cat((past_keys, keys), dim=1), values))
    assert_close(cache.attend(0, q, k, v), torch.cat(expected, dim=2), EXACT)
    # Also as a mask per head.
    if rope == "on_write":
        visible = torch.zeros(HEADS, 1, 8 * FRAME, dtype=torch.bool)
        for head in range(HEADS):
            for frame in (*chosen[head // group], 6, 7):
                visible[head, :, frame * FRAME : (frame + 1) * FRAME] = True
        keys, values = (torch.cat((x, own), dim=1) for x, own in ((past[1], k), (past[2], v)))
        masked, _ = masked_softmax_attention(q, keys, values, visible)
        assert_close(cache.attend(0, q, k, v), masked, EXACT)
    # Pages stay while one head wants them.
    cache.streams[0].select_frames(chosen, forget=True)
    assert cache.pool.stats().used == 4
    with pytest.raises(ValueError, match="frames has 1 sequences, but must have 2, one per K/V head"):
        cache.streams[0].select_frames([[0]])


def test_staged_blocks():
    """A cascade: blocks at different noise levels, each seen by those after it as it was written last."""
    past, first, second, third = draw(4), draw(2, seed=1), draw(1, seed=2), draw(1, seed=3)
    cache = cache_of(window_frames=5, sink_frames=1)
    fill(cache, past)

    def sequence(*blocks: Frames) -> Frames:
        return tuple(torch.cat(xs, dim=1) for xs in zip(past, *blocks, strict=True))

    with pytest.raises(ValueError, match=r"block is 1, but must be in \[0, 0\]"):
        cache.attend(0, *second, block=1)
    for step in range(3):
        first, second = draw(2, seed=10 + step), draw(1, seed=20 + step)
        assert_close(cache.attend(0, *first), after(first, past, [0, 2, 3]), EXACT)
        cache.write(0, *first[1:])
        assert_close(cache.attend(0, *second, block=1), after(second, sequence(first), [0, 3, 4, 5]), EXACT)
        cache.write(0, *second[1:], block=1)
        expected = after(third, sequence(first, second), [0, 4, 5, 6])
        assert_close(cache.attend(0, *third, block=2), expected, EXACT)
        with pytest.raises(ValueError, match="q has 1 frames, but must have 2 like the block that layers"):
            cache.attend(0, *third)
    view = cache.view(block=1)
    assert view.position.tolist() == [6]
    cache.commit(2)
    assert cache.num_frames == 6
    assert_same_bits(view.attend(0, *second), cache.attend(0, *second))
    assert_close(cache.attend(0, *second), after(second, sequence(first), [0, 3, 4, 5]), EXACT)
    cache.drop()
    assert_close(cache.attend(0, *third), after(third, sequence(first), [0, 3, 4, 5]), EXACT)
    append(cache, third)
    assert_close(cache.attend(0, *second), after(second, sequence(first, third), [0, 4, 5, 6]), EXACT)


def test_a_layer_waits_for_the_block_before():
    cache = PagedKVCache(2, KV_HEADS, DIM, FRAME, dtype=torch.float64)
    q, k, v = draw(1)
    cache.write(0, k, v)
    cache.attend(0, q, k, v, block=1)
    for call in (cache.attend, cache.write):
        with pytest.raises(ValueError, match="block is 1, but layer 1 has not written block 0 yet"):
            call(1, *((q, k, v) if call == cache.attend else (k, v)), block=1)
    with pytest.raises(ValueError, match="num_frames is 1, but layer 1 has written 0 frames"):
        cache.commit(1)


def test_rollback_forgets_what_was_written():
    past, block, other = draw(8), draw(2, seed=1), draw(2, seed=2)
    cache = cache_of(window_frames=5, sink_frames=1)
    fill(cache, past, 2)
    append(cache, block)
    cache.write(0, *other[1:])
    with pytest.raises(ValueError, match=r"num_frames is 11, but must be in \[0, 10\], the committed frames"):
        cache.streams[0].rollback(11)
    cache.drop()
    cache.streams[0].rollback(0)
    assert cache.num_frames == 10
    with pytest.raises(
        ValueError, match=r"a block of 2 frames after 8 frames sees frames \[6, 7\], which were evicted"
    ):
        cache.streams[0].rollback(2)  # the block that was dropped had evicted them


def test_the_newest_block_can_be_rolled_back_exactly():
    past, block, other = draw(8), draw(2, seed=1), draw(2, seed=2)
    cache = cache_of(window_frames=5, sink_frames=1)
    fill(cache, past, 2)
    before = cache.attend(0, *other)
    append(cache, block)
    cache.streams[0].rollback(2)
    assert_same_bits(cache.attend(0, *other), before)
    assert_close(before, after(other, past, [0, 6, 7]), EXACT)
    short = draw(1, seed=3)
    with pytest.raises(ValueError, match=r"a block of 1 frames after 8 frames sees frames \[5\], which were evicted"):
        cache.attend(0, *short)


def test_rollback_as_far_as_frames_were_kept():
    past = draw(12)
    stream = pool_of(20).open_stream(4, 1, frame_seqlen=FRAME, rollback_frames=3)
    cache = PagedKVCache.of_streams([stream])
    fill(cache, past)
    with pytest.raises(ValueError, match=r"sees frames \[5\], which were evicted: rollback_frames is 3"):
        stream.rollback(5)
    stream.rollback(4)  # the newest block and three frames
    block = draw(1, seed=1)
    assert_close(cache.attend(0, *block), after(block, past, [0, 6, 7]), EXACT)
    append(cache, block)
    assert cache.num_frames == 9


def test_rollback_into_a_selection():
    past, block = draw(6), draw(1, seed=1)
    cache = cache_of()
    fill(cache, past)
    cache.streams[0].select_frames([1, 5])
    cache.streams[0].rollback(2)
    assert_close(cache.attend(0, *block), after(block, past, [1]), EXACT)
    append(cache, block)
    changed = tuple(torch.cat((x[:, : 4 * FRAME], own), dim=1) for x, own in zip(past, block, strict=True))
    assert_close(cache.attend(0, *block), after(block, changed, [1, 4]), EXACT)


def test_forks_share_pages_until_they_write():
    page_size = 6  # a frame of four tokens is in one page or in two
    pool, past = pool_of(20, page_size), draw(4)
    stream = pool.open_stream(frame_seqlen=FRAME)
    fill(PagedKVCache.of_streams([stream]), past)
    assert pool.stats() == PoolStats(20, 3, 0, 17, 0, pool.nbytes)
    branch = stream.fork()
    assert pool.stats() == PoolStats(20, 3, 3, 17, 0, pool.nbytes)
    ways = {}
    for seed, one in enumerate((stream, branch), 1):
        block, cache = draw(1, seed=seed), PagedKVCache.of_streams([one])
        append(cache, block)
        ways[one] = cache, tuple(torch.cat(pair, dim=1) for pair in zip(past, block, strict=True))
    # Tokens 16 and 17 go into the third page, which the first of the two copies; the rest into a page each.
    assert pool.stats() == PoolStats(20, 6, 2, 14, 0, pool.nbytes)
    newest = draw(1, seed=3)
    for cache, all_frames in ways.values():
        assert_close(cache.attend(0, *newest), after(newest, all_frames, list(range(5))), EXACT)
    stream.close()
    assert (pool.stats().used, pool.stats().shared) == (4, 0)
    branch.close()
    assert pool.stats().free == 20
    with pytest.raises(ValueError, match="the stream is closed"):
        ways[stream][0].attend(0, *newest)


def test_what_is_for_streams_between_blocks_and_without_gradient():
    cache = cache_of()
    cache.write(0, *draw(1)[1:])
    for name, arguments in (("fork", ()), ("select_frames", ([],)), ("save", ("nowhere",))):
        with pytest.raises(ValueError, match=f"{name} is called with 1 uncommitted blocks: commit or drop them first"):
            getattr(cache.streams[0], name)(*arguments)
    (recorded,) = cache_of(grad_through_cache=True).streams
    for name, arguments in (("fork", ()), ("rollback", (0,))):
        with pytest.raises(ValueError, match=f"{name} is for constant pasts, but the pool has grad_through_cache"):
            getattr(recorded, name)(*arguments)


def test_a_full_pool_changes_nothing():
    pool, past = pool_of(3), draw(3)
    streams = [pool.open_stream(frame_seqlen=FRAME) for _ in range(2)]
    fill(PagedKVCache.of_streams(streams[:1]), frames_of(past, 0, 2))
    both = PagedKVCache.of_streams(streams)
    with pytest.raises(RuntimeError, match="2 pages are needed, but 1 are free of the 3 in the pool"):
        both.write(0, *draw(1, batch=2)[1:])
    assert pool.stats().used == 2
    append(PagedKVCache.of_streams(streams[:1]), frames_of(past, 2, 3))
    newest = draw(1, seed=1)
    expected = after(newest, past, [0, 1, 2])
    assert_close(PagedKVCache.of_streams(streams[:1]).attend(0, *newest), expected, EXACT)
    with pytest.raises(RuntimeError, match="1 pages are needed, but 0 are free of the 3"):
        PagedKVCache.of_streams(streams[1:]).write(0, *newest[1:])


def test_eviction_makes_room():
    """A window of four frames never takes more than four pages of a frame each."""
    pool = pool_of(4)
    cache = PagedKVCache.of_streams([pool.open_stream(4, 1, frame_seqlen=FRAME)])
    fill(cache, draw(20))
    assert pool.stats().used == 4


def test_save_and_load(tmp_path):
    past, path = draw(9), tmp_path / "stream.safetensors"
    stream = pool_of(20).open_stream(4, 1, frame_seqlen=FRAME, max_frames=12, rollback_frames=2)
    cache = PagedKVCache.of_streams([stream])
    fill(cache, past)
    stream.select_frames([[0, 7], [8]])
    stream.save(path)
    pool = pool_of(30, page_size=3)
    loaded = pool.load_stream(path)
    assert (loaded.num_frames, loaded.window_frames, loaded.sink_frames, loaded.max_frames) == (9, 4, 1, 12)
    assert pool.stats().used == len(
        {token // 3 for frame in (0, *range(4, 9)) for token in range(4 * frame, 4 * frame + 4)}
    )
    again = PagedKVCache.of_streams([loaded])
    for index in range(3):
        block = draw(1, seed=index + 1)
        assert_same_bits(again.attend(0, *block), cache.attend(0, *block))
        for one in (again, cache):
            append(one, block)
        if index == 1:
            for one in (loaded, stream):
                one.select_frames(None)
                one.rollback(1)
    with pytest.raises(ValueError, match="has a stream of head_dim 32, but the pool has 64"):
        PagePool(9, 4, 1, KV_HEADS, 64, dtype=torch.float64).load_stream(path)
    with pytest.raises(RuntimeError, match="6 pages are needed, but 5 are free of the 5"):
        pool_of(5).load_stream(path)


@pytest.mark.parametrize(("format", "levels"), [("int8", 127), ("fp8_e4m3", 448), ("int4", 7)])
def test_quantised_pages(format, levels):
    """What is a few levels times a power of two is stored exactly; anything else is off by at most its rounding."""
    cache = cache_of(quantization=format, window_frames=4)
    q, k, v = draw(3)
    exact = [torch.randint(-7, 8, x.shape).double() / 8 for x in (k, v)]
    for x in exact:
        x[..., ::32] = levels / 8  # the largest of each token, head and group
    append(cache, (q, *exact))
    block = draw(1, seed=1)
    assert_close(cache.attend(0, *block), after(block, (q, *exact), [0, 1, 2]), EXACT)
    cache.reset()
    append(cache, (q, k, v))
    ((frame, *_),) = cache.streams[0]._past(0, 0, 1)
    for stored, given in zip(frame[:2], (k[0, :FRAME], v[0, :FRAME]), strict=True):
        size = given.unflatten(-1, (-1, 32)).abs().amax(dim=-1, keepdim=True).expand(FRAME, KV_HEADS, 1, 32).flatten(2)
        bound = given.abs() / 16 + size * 2.0**-9 / 448 if format == "fp8_e4m3" else size / levels / 2
        assert ((stored - given).abs() <= 1.01 * bound).all()
        assert not torch.equal(stored.double(), given)


def test_a_key_offset_takes_what_all_tokens_share_out_of_the_rounding():
    offset = torch.randn(1, KV_HEADS, DIM)
    q, k, v = draw(3)
    k = k.sign() / 4 + 100 * offset[0].double()
    block = draw(1, seed=1)
    cache = cache_of(quantization="int8", key_offset=100 * offset)
    append(cache, (q, k.float().double(), v))
    ((frame, *_),) = cache.streams[0]._past(0, 0, 1)
    assert_close(frame.k, k[0, :FRAME], 1e-6)
    assert cache.attend(0, *block).isfinite().all()
    with pytest.raises(ValueError, match="key_offset is given, but quantization is None"):
        cache_of(key_offset=offset)
    with pytest.raises(ValueError, match=r"key_offset has shape \[2, 32\], but must be .* \[1, 2, 32\]"):
        cache_of(quantization="int8", key_offset=offset[0])


def test_bytes_of_quantised_pages():
    sizes = {format: pool_of(10, quantization=format, dtype=torch.bfloat16).nbytes for format in (None, "int8", "int4")}
    assert sizes[None] == 10 * FRAME * KV_HEADS * 2 * DIM * 2
    assert sizes["int8"] == 10 * FRAME * KV_HEADS * 2 * (DIM + 2)
    assert sizes["int4"] == 10 * FRAME * KV_HEADS * 2 * (DIM // 2 + 2)


def two_blocks(options: dict, q, k, v, q2, k2, v2) -> tuple[Tensor, Tensor]:
    cache = PagedKVCache(1, 1, 4, 1, window_frames=3, dtype=torch.float64, grad_through_cache=True, **options)
    first = cache.attend(0, q, k, v)
    cache.write(0, k, v)
    cache.commit(2)
    return first, cache.attend(0, q2, k2, v2)


@pytest.mark.parametrize(
    "options", [{"past_bias": (0.5, -0.7, 0.2)}, {"rope": "on_read", "rope_grid": (1, 1)}], ids=["bias", "rope"]
)
def test_gradcheck(options):
    blocks = [torch.randn(1, 2, 1, 4, dtype=torch.float64, requires_grad=True) for _ in range(6)]
    assert gradcheck(lambda *tensors: two_blocks(options, *tensors), blocks)


def test_gradients_pass_the_rounding_straight_through():
    _, k, v = (x.requires_grad_() for x in draw(2))
    block = draw(1, seed=1)
    cache = cache_of(quantization="int8", grad_through_cache=True)
    append(cache, (None, k, v))
    past = cache.streams[0]._past(0, 0, 1)[0]
    stored = [
        torch.cat(x).double().detach()[None].requires_grad_() for x in zip(*((f.k, f.v) for f in past), strict=True)
    ]
    grad = torch.randn(block[0].shape, dtype=torch.float64)
    got = torch.autograd.grad(cache.attend(0, *block), (k, v), grad)
    expected = torch.autograd.grad(after(block, (None, *stored), [0, 1]), stored, grad)
    for mine, true in zip(got, expected, strict=True):
        assert_close(mine, true, 1e-7)  # the gradient of what is read back is float32


def test_a_view_reads_what_was_there():
    cache, past, block = cache_of(window_frames=3), draw(9), draw(1, seed=1)
    seen = []
    for start in range(9):
        view = cache.view()
        seen.append((view, view.attend(0, *block)))
        append(cache, frames_of(past, start, start + 1))
    for start, (view, out) in enumerate(seen):
        assert_same_bits(view.attend(0, *block), out)
        assert view.position.tolist() == [start]
        assert_close(out, after(block, past, list(range(max(0, start - 2), start))), EXACT)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pool_of(0), "num_pages is 0, but must be at least 1"),
        (lambda: pool_of(1, 0), "page_size is 0, but must be at least 1"),
        (
            lambda: pool_of(1, quantization="int3"),
            "quantization is 'int3', but must be None or one of 'int8', 'fp8_e4m",
        ),
        (lambda: PagePool(1, 1, 1, 1, 16, quantization="int4"), "head_dim is 16, but quantization 'int4' takes"),
        (lambda: pool_of(1).open_stream(frame_seqlen=0), "frame_seqlen is 0, but must be at least 1"),
        (lambda: pool_of(1).open_stream(frame_seqlen=1, sink_frames=-1), "sink_frames is -1, but must be at least 0"),
        (lambda: pool_of(1).open_stream(frame_seqlen=1, max_frames=0), "max_frames is 0, but must be at least 1"),
        (lambda: pool_of(1).open_stream(frame_seqlen=1, rollback_frames=-1), "rollback_frames is -1, but must be"),
        (lambda: pool_of(1).open_stream(2, 2, frame_seqlen=1), "window_frames is 2, but must be at least"),
        (lambda: cache_of(batch_size=0), "streams is empty, but a batch has at least one"),
        (lambda: cache_of(rope="late"), "rope is 'late', but must be one of 'on_write', 'on_read'"),
        (lambda: cache_of(rope="on_read"), "rope_grid is None, but must be given for rope 'on_read'"),
        (
            lambda: cache_of(rope="on_read", rope_grid=(2, 3)),
            r"rope_grid is \(2, 3\), but rows \* columns must be frame_seqlen = 4",
        ),
        (lambda: cache_of().streams[0].select_frames(None, forget=True), "frames is None, but frames are forgotten"),
        (lambda: cache_of().streams[0].select_frames([0]), "frames has 0, which is not there: 0 frames are committed"),
        (lambda: cache_of().drop(-1), "block is -1, but must be at least 0"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_batches_of_streams_that_do_not_fit():
    pool = pool_of(4)
    stream, other = pool.open_stream(frame_seqlen=FRAME), pool.open_stream(frame_seqlen=1)
    for streams, message in (
        ([stream, stream], r"streams\[1\] is streams\[0\], but each may be there once"),
        ([stream, other], r"streams\[1\] has frame_seqlen 1, but must have 4 like"),
        ([stream, pool_of(1).open_stream(frame_seqlen=FRAME)], r"streams\[1\] is of another pool"),
    ):
        with pytest.raises(ValueError, match=message):
            PagedKVCache.of_streams(streams)
    limited = PagedKVCache.of_streams([pool.open_stream(frame_seqlen=FRAME, max_frames=1)])
    with pytest.raises(ValueError, match="k has 2 frames after 0 committed ones, but max_frames is 1"):
        limited.write(0, *draw(2)[1:])
