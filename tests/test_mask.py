"""Masks: the span table against a predicate that looks at one query and one key and shares no code with it."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selfforcing_ext.mask import BlockCausalMask, causal_span_table, full_span_table, make_span_table


def sees(query: int, key: int, mask: BlockCausalMask) -> bool:
    """Whether a query token sees a key token, said from the definition of each word."""
    length = mask.num_frames * mask.frame_seqlen
    query_is_noisy, key_is_noisy = query >= length, key >= length
    query_frame = query % length // mask.frame_seqlen
    key_frame = key % length // mask.frame_seqlen

    def block_of(frame: int) -> int:
        if mask.first_frame_alone:
            return 0 if frame == 0 else 1 + (frame - 1) // mask.frames_per_block
        return frame // mask.frames_per_block

    if block_of(key_frame) == block_of(query_frame):
        return query_is_noisy == key_is_noisy
    if block_of(key_frame) > block_of(query_frame) or key_is_noisy:
        return False
    if mask.window_frames is None or key_frame < mask.sink_frames:
        return True
    last_frame = max(frame for frame in range(mask.num_frames) if block_of(frame) == block_of(query_frame))
    return last_frame - key_frame < mask.window_frames - mask.sink_frames


@st.composite
def masks(draw: st.DrawFn) -> BlockCausalMask:
    frames_per_block = draw(st.integers(1, 4))
    alone = draw(st.booleans())
    blocks = draw(st.integers(0 if alone else 1, 5))
    sink = draw(st.integers(0, 4))
    window = draw(st.none() | st.integers(sink + frames_per_block, sink + frames_per_block + 12))
    return BlockCausalMask(
        blocks * frames_per_block + alone,
        draw(st.integers(1, 4)),
        frames_per_block,
        window_frames=window,
        sink_frames=sink,
        first_frame_alone=alone,
        teacher_forcing=draw(st.booleans()),
    )


@given(masks())
def test_every_pair_of_tokens(mask):
    wanted = [[sees(query, key, mask) for key in range(mask.seqlen)] for query in range(mask.seqlen)]
    assert mask.dense().tolist() == wanted


@given(masks())
def test_table_is_sorted_disjoint_and_complete(mask):
    table = mask.spans()
    for starts, offsets, spans, rows, columns in (
        (table.block_starts, table.span_offsets, table.spans, mask.seqlen, mask.seqlen),
        (table.key_starts, table.query_span_offsets, table.query_spans, mask.seqlen, mask.seqlen),
    ):
        starts, offsets, spans = starts.tolist(), offsets.tolist(), spans.tolist()
        assert (starts[0], starts[-1]) == (0, rows)
        assert starts == sorted(set(starts))
        assert (offsets[0], offsets[-1]) == (0, len(spans))
        for first, last in pairwise(offsets):
            edges = [edge for span in spans[first:last] for edge in span]
            assert edges == sorted(set(edges)), "spans touch, overlap or are empty"
            assert not edges or (edges[0] >= 0 and edges[-1] <= columns)


@given(masks())
def test_transpose_says_the_same(mask):
    table = mask.spans()
    seen_by = torch.zeros(mask.seqlen, mask.seqlen, dtype=torch.bool)
    starts, offsets, spans = (t.tolist() for t in (table.key_starts, table.query_span_offsets, table.query_spans))
    for run in range(len(starts) - 1):
        for start, end in spans[offsets[run] : offsets[run + 1]]:
            seen_by[starts[run] : starts[run + 1], start:end] = True
    assert torch.equal(seen_by.T, mask.dense())


@given(masks())
def test_a_window_over_everything_is_no_window(mask):
    if mask.window_frames is None:
        return
    wide = BlockCausalMask(
        mask.num_frames,
        mask.frame_seqlen,
        mask.frames_per_block,
        window_frames=mask.num_frames + mask.sink_frames + mask.frames_per_block,
        sink_frames=mask.sink_frames,
        first_frame_alone=mask.first_frame_alone,
        teacher_forcing=mask.teacher_forcing,
    )
    unlimited = BlockCausalMask(
        mask.num_frames,
        mask.frame_seqlen,
        mask.frames_per_block,
        first_frame_alone=mask.first_frame_alone,
        teacher_forcing=mask.teacher_forcing,
    )
    assert torch.equal(wide.dense(), unlimited.dense())


def test_full_table_shows_everything():
    assert full_span_table(3, 5).dense().all()
    assert full_span_table(3, 5).dense().shape == (3, 5)
    assert full_span_table(3, 0).dense().shape == (3, 0)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (1, 7), (5, 5), (4, 9)])
def test_causal_table(num_queries, num_keys):
    table = causal_span_table(num_queries, num_keys)
    wanted = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
    assert torch.equal(table.dense(), wanted)
    by_hand = make_span_table(
        range(num_queries + 1), [[(0, num_keys - num_queries + i + 1)] for i in range(num_queries)], num_keys
    )
    for mine, true in zip(table.tensors(), by_hand.tensors(), strict=True):
        assert torch.equal(mine, true)


def test_causal_table_needs_a_key_for_every_query():
    with pytest.raises(ValueError, match="num_keys is 3, but must be at least num_queries = 4"):
        causal_span_table(4, 3)


def test_tables_are_made_once_per_device():
    mask = BlockCausalMask(4, 3)
    assert mask.spans() is mask.spans("cpu")
    assert mask.spans("meta") is mask.spans(torch.device("meta"))
    assert mask.spans("meta").spans.device.type == "meta"


def test_tables_made_in_inference_mode_serve_training():
    with torch.inference_mode():
        tables = BlockCausalMask(4, 3).spans(), BlockCausalMask(4, 3).spans("meta"), full_span_table(7, 11)
    assert not any(tensor.is_inference() for table in tables for tensor in table.tensors())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_frames": 0}, ValueError, "num_frames is 0, but must be at least 1"),
        ({"num_frames": 2.0}, TypeError, "num_frames is 2.0 of type float, but must be an int"),
        ({"num_frames": True}, TypeError, "num_frames is True of type bool"),
        ({"frame_seqlen": -1}, ValueError, "frame_seqlen is -1, but must be at least 1"),
        ({"sink_frames": -1}, ValueError, "sink_frames is -1, but must be at least 0"),
        ({"frames_per_block": 4}, ValueError, "num_frames is 6, but must be a multiple of frames_per_block = 4"),
        ({"first_frame_alone": True}, ValueError, "num_frames is 6, but must be one more than a multiple"),
        (
            {"window_frames": 2},
            ValueError,
            r"window_frames is 2, but must be at least sink_frames \+ frames_per_block = 0 \+ 3",
        ),
        (
            {"window_frames": 4, "sink_frames": 2},
            ValueError,
            r"window_frames is 4, but must be at least sink_frames \+ frames_per_block = 2 \+ 3",
        ),
        ({"window_frames": 1.5}, TypeError, "window_frames is 1.5 of type float"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        BlockCausalMask(**{"num_frames": 6, "frame_seqlen": 4, "frames_per_block": 3} | arguments)


def test_spans_outside_the_keys_are_refused():
    with pytest.raises(ValueError, match=r"spans_of_block\[1\] is \[\(3, 9\)\], but keys run from 0 to num_keys = 8"):
        make_span_table([0, 2, 4], [[(0, 8)], [(3, 9)]], num_keys=8)
