"""Streams of a pool: cases that random lives (test_kv_cache_stateful.py) meet now and then, said plainly."""

from __future__ import annotations

import pytest
import torch
from compare import assert_close, assert_same_bits

from selfforcing_ext import PagedKVCache, PagePool, rope_3d
from selfforcing_ext.stream import Stream

FRAME = 4


def draw(num_frames: int = 1, batch: int = 1) -> list[torch.Tensor]:
    return [torch.randn(batch, num_frames * FRAME, 2, 16) for _ in range(3)]


def pool_of(num_pages: int) -> PagePool:
    return PagePool(num_pages, FRAME, num_layers=1, num_heads=2, head_dim=16)


def open_stream(pool: PagePool, window_frames: int | None = None, **options: int) -> Stream:
    return pool.open_stream(window_frames, frame_seqlen=FRAME, **options)


def append(cache: PagedKVCache, num_frames: int = 1) -> None:
    cache.write(0, *draw(num_frames, len(cache.streams))[1:])
    cache.commit(num_frames)


def test_an_endless_cascade_needs_no_more_pages():
    """A window of four frames, with a block in work, and one that is staged behind it."""
    pool = pool_of(5)
    cache = PagedKVCache.of_streams([open_stream(pool, 4)])
    cache.write(0, *draw()[1:])
    for _ in range(20):
        cache.write(0, *draw()[1:], block=1)
        cache.commit(1)
    assert pool.stats().used == 5


def test_a_dropped_block_gives_its_pages_back():
    pool = pool_of(9)
    cache = PagedKVCache.of_streams([open_stream(pool)])
    append(cache, 2)
    for block in range(3):
        cache.write(0, *draw(2)[1:], block=block)
    cache.drop(1)
    assert pool.stats().used == 4
    cache.drop()
    assert pool.stats().used == 2


def test_a_cache_of_a_closed_stream_says_so_and_the_others_go_on():
    pool = pool_of(9)
    first, second = open_stream(pool), open_stream(pool)
    batches = [PagedKVCache.of_streams([first, second]) for _ in range(2)]
    append(batches[0])
    batches[0].write(0, *draw(batch=2)[1:])
    first.close()
    assert pool.stats().used == 1
    for batch in batches:
        with pytest.raises(
            ValueError, match="a stream of the cache is closed: make a new cache of those that are open"
        ):
            batch.attend(0, *draw(batch=2))
    append(PagedKVCache.of_streams([second]))
    assert second.num_frames == 2


def test_batches_of_one_stream_see_what_the_others_commit():
    stream = open_stream(pool_of(9), 4)
    batches = [PagedKVCache.of_streams([stream]) for _ in range(2)]
    for index in range(6):
        append(batches[index % 2])
        block = draw()
        with torch.no_grad():
            assert_same_bits(*(batch.attend(0, *block) for batch in batches))
            assert [int(batch.position) for batch in batches] == [index + 1] * 2


def test_a_block_that_is_too_short_for_what_is_kept_is_refused():
    stream = open_stream(pool_of(9), 4)
    cache = PagedKVCache.of_streams([stream])
    append(cache, 3)
    append(cache, 3)
    stream.rollback(3)
    stream.select_frames([2])
    cache.attend(0, *draw(2))
    stream.select_frames(None)
    cache.attend(0, *draw(3))
    for call in (lambda: cache.attend(0, *draw(2)), lambda: cache.write(0, *draw(2)[1:])):
        with pytest.raises(ValueError, match="evicted"):
            call()


def test_rollback_asks_what_a_block_like_the_last_sees():
    stream = open_stream(pool_of(9), 4, rollback_frames=1)
    cache = PagedKVCache.of_streams([stream])
    for _ in range(8):
        append(cache)
    with pytest.raises(ValueError, match="were evicted; the stream keeps rollback_frames = 1 beyond its window"):
        stream.rollback(3)
    stream.rollback(2)
    assert stream.num_frames == 6


def test_a_loaded_stream_goes_on(tmp_path):
    pool = pool_of(20)
    stream = open_stream(pool, 4, sink_frames=1)
    cache = PagedKVCache.of_streams([stream])
    for _ in range(7):
        append(cache)
    stream.save(tmp_path / "stream")
    again = PagedKVCache.of_streams([pool.load_stream(tmp_path / "stream")])
    for _ in range(4):
        block, written = draw(), draw()
        with torch.no_grad():
            assert_same_bits(again.attend(0, *block), cache.attend(0, *block))
        for one in (again, cache):
            one.write(0, *written[1:])
            one.commit(1)


def test_a_block_that_a_view_reads_may_be_written_again():
    cache = PagedKVCache.of_streams([open_stream(pool_of(20))])
    append(cache)
    first, second, third, block = (draw() for _ in range(4))
    cache.write(0, *first[1:])
    cache.write(0, *second[1:], block=1)
    with torch.no_grad():
        view = cache.view(block=1)
        seen = view.attend(0, *block)
        cache.write(0, *third[1:])
        assert_same_bits(view.attend(0, *block), seen)
        behind_both = cache.attend(0, *block, block=2)
        cache.drop()
        for written in (third, second):
            cache.write(0, *written[1:])
            cache.commit(1)
        assert_close(cache.attend(0, *block), behind_both.double(), 1e-6)


def test_the_first_block_is_rotated_on_reading_too():
    stream = open_stream(pool_of(9))
    q, k, v = draw()
    with torch.no_grad():
        on_read = PagedKVCache.of_streams([stream], rope="on_read", rope_grid=(2, 2)).attend(0, q, k, v)
        rotated = (rope_3d(x, (1, 2, 2)) for x in (q, k))
        assert_close(on_read, PagedKVCache.of_streams([stream]).attend(0, *rotated, v).double(), 1e-6)
