"""Streams of a pool: cases that random lives (test_kv_cache_stateful.py) meet now and then, said plainly."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from compare import assert_close, assert_same_bits
from safetensors import safe_open
from safetensors.torch import save_file

from selfforcing_ext import PagedKVCache, PagePool, rope_3d
from selfforcing_ext.stream import Stream

FRAME = 4


def draw(num_frames: int = 1, batch: int = 1) -> list[torch.Tensor]:
    return [torch.randn(batch, num_frames * FRAME, 2, 16) for _ in range(3)]


def pool_of(num_pages: int, **options: object) -> PagePool:
    return PagePool(num_pages, FRAME, num_layers=1, num_heads=2, head_dim=16, **options)


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


def test_a_batch_reads_the_past_while_another_writes():
    """Pages that the block in work has recycled are not read: what is seen shrinks with them."""
    stream = open_stream(pool_of(4), 4)
    writer, reader = (PagedKVCache.of_streams([stream]) for _ in range(2))
    for _ in range(6):
        append(writer)
    block = draw(3)
    with torch.no_grad():
        before = reader.attend(0, *block)
        writer.write(0, *draw(3)[1:])
        assert_same_bits(reader.attend(0, *block), before)
        assert_same_bits(reader.view().attend(0, *block), before)
        for call in (reader.attend, reader.view().attend):
            with pytest.raises(ValueError, match="evicted"):
                call(0, *draw(1))
    with pytest.raises(ValueError, match="a stream of the cache is being written by another batch"):
        reader.reset()
    assert stream.num_frames == 6
    writer.commit(3)
    assert_same_bits(*(batch.attend(0, *block) for batch in (writer, reader)))


def test_a_view_of_a_staged_block_is_of_the_layers_that_wrote_those_before_it():
    pool = PagePool(9, FRAME, num_layers=2, num_heads=2, head_dim=16)
    cache = PagedKVCache.of_streams([open_stream(pool)])
    cache.write(0, *draw()[1:])
    view = cache.view(block=1)
    view.attend(0, *draw())
    with pytest.raises(ValueError, match="block is 1, but layer 1 had not written all blocks before it"):
        view.attend(1, *draw())


def test_frames_are_selected_by_tensors_and_arrays():
    stream = open_stream(pool_of(9))
    cache = PagedKVCache.of_streams([stream])
    append(cache, 5)
    block = draw()
    with torch.no_grad():
        for chosen, others in (
            ([0, 3, 4], [torch.tensor([4, 0, 3]), np.array([0, 3, 4]), list(np.array([0, 3, 4])), {0, 3, 4}]),
            ([[0, 1], [2, 4]], [torch.tensor([[0, 1], [4, 2]]), np.array([[0, 1], [2, 4]]), ({0, 1}, range(2, 5, 2))]),
        ):
            stream.select_frames(chosen)
            seen = cache.attend(0, *block)
            for other in others:
                stream.select_frames(None)
                stream.select_frames(other)
                assert_same_bits(cache.attend(0, *block), seen)
    with pytest.raises(TypeError, match=r"frames must have whole numbers \('float' object"):
        stream.select_frames([0.5])


@pytest.mark.parametrize("name", ["frame_seqlen", "sink_frames", "max_frames", "rollback_frames", "window_frames"])
def test_a_stream_counts_in_whole_numbers(name):
    with pytest.raises(TypeError, match=f"{name} is 2.0 of type float, but must be an int"):
        pool_of(4).open_stream(**{"frame_seqlen": FRAME, "window_frames": 5} | {name: 2.0})
    stream = open_stream(pool_of(4))
    with pytest.raises(TypeError, match=r"num_frames is 0\.5 of type float, but must be an int"):
        stream.rollback(0.5)


def test_keys_are_read_as_they_were_written():
    stream = open_stream(pool_of(9))
    on_write = PagedKVCache.of_streams([stream])
    on_read = PagedKVCache.of_streams([stream], rope="on_read", rope_grid=(2, 2))
    append(on_write)
    wrong = "rope is 'on_read', but the keys of a stream of the cache were written with 'on_write'"
    for call in (
        lambda: on_read.attend(0, *draw()),
        lambda: on_read.write(0, *draw()[1:]),
        lambda: on_read.view(),
        lambda: PagedKVCache.of_streams([stream.fork()], rope="on_read", rope_grid=(2, 2)),
    ):
        with pytest.raises(ValueError, match=wrong):
            call()
    on_write.reset()
    append(on_read)
    with pytest.raises(ValueError, match=r"rope is 'on_write', but .* written with 'on_read'"):
        append(on_write)


def test_gradients_are_of_the_cache_that_wrote():
    pool = pool_of(9, grad_through_cache=True)
    stream = open_stream(pool)
    first, second = (PagedKVCache.of_streams([stream]) for _ in range(2))
    append(first)
    with pytest.raises(ValueError, match="was written by another cache: with grad_through_cache that one alone"):
        second.attend(0, *draw())
    k, v = draw()[1:]
    for grad_to, error, message in (
        ((None, v), TypeError, "grad_to is .* but must be a pair of tensors"),
        ((k, v, v), TypeError, "grad_to is .* but must be a pair of tensors"),
        ((k, v[:, :1]), ValueError, r"grad_to has shape \[1, 1, 2, 16\] for v"),
        ((k.int(), v), TypeError, "grad_to is int32 for k, but must be a floating dtype"),
        ((k, v.to("meta")), ValueError, "grad_to is on meta for v, but must be on cpu like v"),
    ):
        with pytest.raises(error, match=message):
            first.write(0, k, v, grad_to=grad_to)
        assert pool.stats().used == 1
    first.write(0, k, v)
    with pytest.raises(ValueError, match="block is 1, but must be 0 with grad_through_cache"):
        first.attend(0, *draw(), block=1)
    with torch.no_grad():
        first.attend(0, *draw(), block=1)


def test_a_stream_goes_into_a_pool_with_its_offset_alone(tmp_path):
    offset = torch.full((1, 2, 16), 30.0)
    pool = pool_of(9, quantization="int8", key_offset=offset)
    cache = PagedKVCache.of_streams([open_stream(pool)])
    append(cache, 2)
    cache.streams[0].save(tmp_path / "stream")
    for options, message in (
        ({}, "a stream with a key_offset, but the pool has no key_offset"),
        ({"key_offset": 2 * offset}, "a stream with another key_offset than the pool's"),
    ):
        other = pool_of(9, quantization="int8", **options)
        with pytest.raises(ValueError, match=message):
            other.load_stream(tmp_path / "stream")
        assert other.stats().used == 0
    block = draw()
    same = PagedKVCache.of_streams(
        [pool_of(9, quantization="int8", key_offset=offset).load_stream(tmp_path / "stream")]
    )
    assert_same_bits(same.attend(0, *block), cache.attend(0, *block))
    with pytest.raises(ValueError, match="key_offset has an infinity or NaN, but must be finite"):
        pool_of(9, quantization="int8", key_offset=offset / 0)
    with pytest.raises(TypeError, match=r"key_offset is a list, but must be a torch\.Tensor"):
        pool_of(9, quantization="int8", key_offset=[0.0])


def test_a_damaged_stream_is_refused(tmp_path):
    pool = pool_of(9)
    cache = PagedKVCache.of_streams([open_stream(pool)])
    append(cache, 2)
    path = tmp_path / "stream"
    cache.streams[0].save(path)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in list(file.keys())}
    description = json.loads(metadata["stream"])
    del description["frames"]
    for changed, damage in (
        (tensors, {"stream": json.dumps(description)}),
        (tensors, {"stream": "{"}),
        ({**tensors, "0.k_pages": tensors["0.k_pages"][:5]}, {}),
        ({"0.k_pages": tensors["0.k_pages"]}, {}),
    ):
        save_file(changed, path, metadata | damage)
        with pytest.raises(ValueError, match="stream, which is not a whole stream"):
            pool.load_stream(path)
        assert pool.stats().used == 2


def test_a_full_pool_says_who_holds_its_pages():
    pool = pool_of(4)
    stream = open_stream(pool, 2)
    cache = PagedKVCache.of_streams([stream])
    append(cache)
    view = cache.view()
    stream.close()
    cache = PagedKVCache.of_streams([open_stream(pool)])
    with pytest.raises(RuntimeError, match="1 pages are held by views and recorded graphs alone: let go of these"):
        cache.write(0, *draw(4)[1:])
    del view
    with pytest.raises(ValueError, match="num_pages is -1, but must be at least 0"):
        pool.grow(-1)


def test_an_error_inside_a_prepared_block_drops_it():
    cache = PagedKVCache.of_streams([open_stream(pool_of(4))])
    with pytest.raises(ValueError, match="layer is 1"), cache.prepared_block(2):
        cache.write(1, *draw(2)[1:])
    assert (cache.num_frames, cache.pool.stats().used) == (0, 0)
    append(cache, 1)
