"""Which pages hold which tokens: the bookkeeping of a pool, against a model that remembers the place of every token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfforcing_ext._C import PageTable
from selfforcing_ext.mask import visible_past, visible_past_of_many


def places(table: PageTable, stream: int, spans) -> list[tuple[int, int]]:
    """Page and slot of every token of some ranges of tokens."""
    row, size = table.row(stream), table.page_size
    positions = table.positions([stream], np.array(spans, dtype=np.int64).reshape(1, -1, 2))[0]
    return [(row[p // size], p % size) for start, end in positions.tolist() for p in range(start, end)]


def append(table: PageTable, stream: int, kept, start: int, end: int, again: bool = False) -> list[tuple[int, int]]:
    shortage, copies = table.advance([(stream, kept, (start, end), again)])
    assert shortage == 0
    return copies


@given(
    page_size=st.integers(1, 9),
    frame_seqlen=st.integers(1, 6),
    window=st.integers(1, 5),
    sink=st.integers(0, 3),
    blocks=st.lists(st.integers(1, 5), min_size=1, max_size=12),
)
def test_keeps_what_is_visible(page_size, frame_seqlen, window, sink, blocks):
    """Visible tokens stay where they were written, no page has two owners, and few pages suffice."""
    table = PageTable(page_size)
    table.add_pages(200)
    stream = table.open()
    lies_at: dict[int, tuple[int, int]] = {}
    committed = 0
    for block in (min(frames, window) for frames in blocks):
        visible = visible_past(committed, committed + block, window + sink, sink)
        kept = [(start * frame_seqlen, end * frame_seqlen) for start, end in visible]
        tokens = range(committed * frame_seqlen, (committed + block) * frame_seqlen)
        assert not append(table, stream, kept, tokens.start, tokens.stop)
        row = table.row(stream)
        assert len(set(row)) == len(row) == table.stats().used == table.num_pages - table.num_free_pages
        lies_at |= zip(tokens, places(table, stream, [(tokens.start, tokens.stop)]), strict=True)
        seen = [token for span in kept for token in range(*span)]
        assert [lies_at[token] for token in seen] == places(table, stream, kept)
        assert len(row) <= (sink + window) * frame_seqlen // page_size + 3
        committed += block


def test_a_range_is_cut_to_what_is_held_up_to_its_end():
    table = PageTable(4)
    table.add_pages(8)
    stream = table.open()
    append(table, stream, [], 0, 30)
    table.retain(stream, [(0, 3), (13, 30)])
    assert table.row_length(stream) == 6  # pages 0 and 3 to 7
    positions = table.positions([stream], np.array([[[0, 4], [5, 14], [14, 30], [5, 7], [9, 9]]]))
    assert positions.tolist() == [[[0, 4], [4, 6], [6, 22], [0, 0], [0, 0]]]


def test_forks_share_pages_until_one_writes():
    table = PageTable(4)
    table.add_pages(6)
    stream = table.open()
    append(table, stream, [], 0, 10)
    fork = table.fork(stream)
    assert table.row(fork) == table.row(stream)
    assert (table.stats().used, table.stats().shared, table.num_free_pages) == (3, 3, 3)
    # The third page has room for two more tokens, but both see what it holds.
    shared = table.row(stream)
    ((source, target),) = append(table, fork, [(0, 10)], 10, 13)
    assert source == shared[2]
    assert table.row(fork)[:3] == [*shared[:2], target]
    assert not append(table, stream, [(0, 10)], 10, 12), "nobody shares it any more"
    assert table.row(stream) == shared
    table.close(fork)
    assert (table.stats().used, table.stats().shared, table.num_free_pages) == (3, 0, 3)
    with pytest.raises(ValueError, match=f"stream is {fork}, but must be an open one"):
        table.row(fork)


def test_two_forks_in_one_step_need_one_copy():
    table = PageTable(4)
    table.add_pages(2)
    stream = table.open()
    append(table, stream, [], 0, 2)
    fork = table.fork(stream)
    shortage, copies = table.advance([(s, [(0, 2)], (2, 4), False) for s in (stream, fork)])
    assert (shortage, len(copies), table.num_free_pages) == (0, 1, 0)
    assert not set(table.row(stream)) & set(table.row(fork))


def test_a_page_that_two_forks_leave_is_free():
    table = PageTable(1)
    table.add_pages(3)
    stream = table.open()
    append(table, stream, [], 0, 1)
    fork = table.fork(stream)
    shortage, _ = table.advance([(s, [], (1, 2), False) for s in (stream, fork)])
    assert (shortage, table.num_free_pages) == (0, 1)


def test_pinned_pages_are_neither_handed_out_nor_overwritten():
    table = PageTable(4)
    table.add_pages(3)
    stream = table.open()
    append(table, stream, [], 0, 6)
    first, second = table.row(stream)
    reader = table.pin([stream], [6])
    assert not append(table, stream, [(0, 6)], 6, 8), "slots behind what is read may be written"
    table.retain(stream, [(4, 8)])
    assert (table.stats().used, table.stats().pinned, table.num_free_pages) == (1, 1, 1)
    ((source, target),) = append(table, stream, [(4, 8)], 5, 7)
    assert (source, table.row(stream)) == (second, [target])
    assert table.num_free_pages == 0
    table.unpin(reader)
    assert sorted([*table.row(stream), first, second]) == [0, 1, 2]
    assert table.num_free_pages == 2
    with pytest.raises(ValueError, match=f"reader is {reader}, but must be one that pinned pages"):
        table.unpin(reader)


def test_what_is_written_again_keeps_its_other_content():
    table = PageTable(4)
    table.add_pages(4)
    stream = table.open()
    append(table, stream, [], 0, 8)
    table.pin([stream], [8])
    old = table.row(stream)
    copies = append(table, stream, [(0, 8)], 0, 8, again=True)
    assert copies == list(zip(old, table.row(stream), strict=True))


def test_too_few_pages_change_nothing():
    table = PageTable(4)
    table.add_pages(5)
    streams = [table.open() for _ in range(2)]
    for stream in streams:
        append(table, stream, [], 0, 8)
    before = [table.row(stream) for stream in streams], vars_of(table)
    shortage, copies = table.advance([(stream, [(4, 8)], (8, 20), False) for stream in streams])
    assert (shortage, copies) == (3, [])
    assert ([table.row(stream) for stream in streams], vars_of(table)) == before
    table.add_pages(3)
    assert table.advance([(stream, [(4, 8)], (8, 20), False) for stream in streams]) == (0, [])


@given(
    steps=st.lists(
        st.tuples(
            st.integers(0, 2),  # which stream
            st.lists(
                st.tuples(st.integers(0, 20), st.integers(1, 9)), max_size=2
            ),  # starts and lengths of what is kept
            st.tuples(st.integers(0, 20), st.integers(1, 9)),  # start and length of what is written
            st.booleans(),  # whether a call that asks for too much comes before
        ),
        min_size=1,
        max_size=12,
    )
)
def test_what_was_refused_leaves_no_trace(steps):
    """Later calls get the same pages as without it, in the same order, also of pages that streams share."""
    tables = []
    for asks_for_too_much in (False, True):
        table = PageTable(3)
        table.add_pages(9)
        first = table.open()
        append(table, first, [], 0, 10)
        streams = [first, table.fork(first), table.open()]
        for which, kept, written, too_much in steps:
            ranges = [(start, start + length) for start, length in sorted(kept)]
            step = streams[which], ranges, (written[0], sum(written)), False
            if too_much and asks_for_too_much:
                assert table.advance([(stream, [(4, 7)], (5, 40), True) for stream in streams])[0] > 0
            table.advance([step])
        tables.append(([table.row(stream) for stream in streams], vars_of(table)))
    assert tables[0] == tables[1]


def vars_of(table: PageTable) -> tuple[int, ...]:
    stats = table.stats()
    return stats.used, stats.shared, stats.pinned, table.num_free_pages, table.num_pages


def test_rows_and_positions_of_many_streams():
    table = PageTable(2)
    table.add_pages(9)
    streams = [table.open() for _ in range(3)]
    for index, stream in enumerate(streams):
        append(table, stream, [], 0, 2 + 2 * index)
    rows = np.full((3, 4), -1, dtype=np.int32)
    table.copy_rows(streams, rows)
    assert rows.tolist() == [row + [-1] * (4 - len(row)) for row in map(table.row, streams)]
    tokens = np.array([[[[0, 1 + i]] for i in range(3)], [[[1, 2]]] * 3])
    assert table.positions(streams, tokens).tolist() == tokens.tolist()
    for array, message in (
        (np.zeros((2, 4), dtype=np.int32), "must be a contiguous int32 array with a row for each of the 3 streams"),
        (np.zeros((3, 4), dtype=np.int64), "must be a contiguous int32 array"),
        (np.zeros((3, 8), dtype=np.int32)[:, ::2], "must be a contiguous int32 array"),
        (np.zeros((3, 2), dtype=np.int32), "the table has 2 entries a row, but stream 2 has 3 pages"),
    ):
        with pytest.raises(ValueError, match=message):
            table.copy_rows(streams, array)
    with pytest.raises(ValueError, match=r"tokens must be \[..., streams, ranges, 2\] for 3 streams"):
        table.positions(streams, np.zeros((2, 1, 2), dtype=np.int64))
    with pytest.raises(ValueError, match=r"tokens are \[3, 1\), but must be a range"):
        table.positions(streams, np.array([[[3, 1]]] * 3))


def test_refuses_bad_sizes():
    with pytest.raises(ValueError, match="page_size is 0, but must be at least 1"):
        PageTable(0)
    with pytest.raises(ValueError, match="count is -1, but must be at least 0"):
        PageTable(4).add_pages(-1)


@given(
    starts=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    moving=st.integers(4, 8),
    sink=st.integers(0, 3),
    limited=st.booleans(),
)
def test_the_visible_past_of_many(starts, lengths, moving, sink, limited):
    window = moving + sink if limited else None
    frames = visible_past_of_many(
        np.array(starts),
        np.array(lengths),
        np.full(len(starts), moving if limited else 1 << 40),
        np.full(len(starts), sink),
    )
    for i, length in enumerate(lengths):
        for j, start in enumerate(starts):
            seen = [frame for span in frames[i, j].tolist() for frame in range(*span)]
            assert seen == [f for span in visible_past(start, start + length, window, sink) for f in range(*span)]
