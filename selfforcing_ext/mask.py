"""Who sees whom: block-causal masks as span tables.

All queries of a block see the same few contiguous runs of keys (spans), so a mask is a short list of spans per block.
This module alone knows what block-causal, window, sink, first frame alone and teacher forcing mean; kernels and the
reference read the table it makes. It needs torch but not the compiled part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from selfforcing_ext.integers import check_integer
from selfforcing_ext.intervals import Interval, merge


@dataclass(frozen=True, eq=False)
class SpanTable:
    """Blocks of queries and the keys they see, as int32 tensors on one device.

    Block ``i`` holds the queries ``[block_starts[i], block_starts[i + 1])`` and sees the keys of
    ``spans[span_offsets[i] : span_offsets[i + 1]]``, half-open ``[start, end)``, sorted and disjoint. The last three
    tensors are the transpose: runs of keys, and the queries that see them.
    """

    block_starts: Tensor  # [num_blocks + 1]
    span_offsets: Tensor  # [num_blocks + 1]
    spans: Tensor  # [num_spans, 2]
    key_starts: Tensor  # [num_key_runs + 1]
    query_span_offsets: Tensor  # [num_key_runs + 1]
    query_spans: Tensor  # [num_query_spans, 2]

    @property
    def num_queries(self) -> int:
        return int(self.block_starts[-1])

    @property
    def num_keys(self) -> int:
        return int(self.key_starts[-1])

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The six tensors in the order the attention op takes them."""
        return (
            self.block_starts,
            self.span_offsets,
            self.spans,
            self.key_starts,
            self.query_span_offsets,
            self.query_spans,
        )

    def to(self, device: torch.device | str) -> SpanTable:
        with torch.inference_mode(False):  # tables are kept, and autograd saves no tensors of inference mode
            return SpanTable(*(tensor.to(device) for tensor in self.tensors()))

    def dense(self, device: torch.device | str = "cpu") -> Tensor:
        """The same as a bool tensor [num_queries, num_keys], True where the query sees the key."""
        visible = torch.zeros(self.num_queries, self.num_keys, dtype=torch.bool, device="cpu")
        starts, offsets, spans = (t.tolist() for t in (self.block_starts, self.span_offsets, self.spans))
        for block in range(len(starts) - 1):
            for start, end in spans[offsets[block] : offsets[block + 1]]:
                visible[starts[block] : starts[block + 1], start:end] = True
        return visible.to(device)


def make_span_table(
    block_starts: Sequence[int], spans_of_block: Sequence[Sequence[Interval]], num_keys: int
) -> SpanTable:
    """Builds a table from block borders and each block's visible key intervals.

    Args:
        block_starts: borders of the query blocks, from 0 to the number of queries, increasing.
        spans_of_block: for each block its key intervals ``[start, end)``; empty ones are dropped, touching or
            overlapping ones merged.
        num_keys: number of keys; intervals lie within ``[0, num_keys)``.
    """
    merged = [merge(spans) for spans in spans_of_block]
    for block, spans in enumerate(merged):
        if spans and (spans[0][0] < 0 or spans[-1][1] > num_keys):
            raise ValueError(f"spans_of_block[{block}] is {spans}, but keys run from 0 to num_keys = {num_keys}")
    key_starts, query_spans = _transpose(block_starts, merged, num_keys)
    return SpanTable(_int32(block_starts), *_csr(merged), _int32(key_starts), *_csr(query_spans))


def full_span_table(num_queries: int, num_keys: int, device: torch.device | str = "cpu") -> SpanTable:
    """Every query sees every key. Made once per shape and device."""
    if _get_current_dispatch_mode() is not None:  # a mode such as FakeTensorMode: its tensors are of no use outside
        return _make_full_span_table.__wrapped__(num_queries, num_keys, device)
    return _make_full_span_table(num_queries, num_keys, device)


@lru_cache(maxsize=256)
def _make_full_span_table(num_queries: int, num_keys: int, device: torch.device | str) -> SpanTable:
    return make_span_table([0, num_queries], [[(0, num_keys)]], num_keys).to(device)


def causal_span_table(num_queries: int, num_keys: int, device: torch.device | str = "cpu") -> SpanTable:
    """Every query sees its own key and those before it; the last query stands at the last key.

    A block of its own for every query: exact, and slow beside masks whose blocks hold many queries.
    """
    if num_keys < num_queries:
        raise ValueError(f"num_keys is {num_keys}, but must be at least num_queries = {num_queries}")
    counts = torch.arange(num_queries + 1, dtype=torch.int32, device=device)
    keys_seen = counts[1:] + (num_keys - num_queries)
    spans = torch.stack([torch.zeros_like(keys_seen), keys_seen], dim=1)
    key_starts = torch.cat([counts[:1], keys_seen])
    query_spans = torch.stack([counts[:-1], torch.full_like(keys_seen, num_queries)], dim=1)
    return SpanTable(counts, counts, spans, key_starts, counts, query_spans)


def visible_past(block_start: int, block_end: int, window_frames: int | None, sink_frames: int) -> list[Interval]:
    """Frames before a block that its queries see: the sink, and what the window leaves of the rest.

    The window counts back from the end of the block, the block itself and the sink included, so that the sink and
    ``window_frames - sink_frames`` newest frames are visible: what a cache of ``window_frames`` frames holds.
    """
    if window_frames is None:
        return merge([(0, block_start)])
    newest = max(0, block_end - (window_frames - sink_frames))
    return merge([(0, min(sink_frames, block_start)), (min(newest, block_start), block_start)])


def visible_past_of_many(
    block_starts: NDArray[np.int64],  # [B]
    block_lengths: NDArray[np.int64],  # [K]
    moving_frames: NDArray[np.int64],  # [B]
    sink_frames: NDArray[np.int64],  # [B]
) -> NDArray[np.int64]:
    """``visible_past`` for B videos and K lengths of their next block at once: [K, B, 2, 2], the sink and the rest,
    which may be empty or touch. ``moving_frames`` is window_frames - sink_frames, any large number without a window."""
    sink_ends = np.minimum(sink_frames, block_starts)
    newest = np.maximum(block_starts + block_lengths[:, None] - moving_frames, sink_ends)
    visible = np.zeros((*newest.shape, 2, 2), dtype=np.int64)
    visible[..., 0, 1] = sink_ends
    visible[..., 1, 0] = np.minimum(newest, block_starts)
    visible[..., 1, 1] = block_starts
    return visible


@dataclass(frozen=True)
class BlockCausalMask:
    """A query sees its own block and the blocks before it, as far as window and sink allow.

    Args:
        num_frames: latent frames of the video. With ``first_frame_alone`` one more than a multiple of
            ``frames_per_block``, else a multiple.
        frame_seqlen: tokens of a latent frame.
        frames_per_block: frames that are denoised together.
        window_frames: the newest frames that stay visible, counted back from the end of the query's block, the block
            itself and the sink included. None: all.
        sink_frames: the first frames, always visible.
        first_frame_alone: frame 0 is a block of its own.
        teacher_forcing: the sequence is [clean; noisy], twice as long. Clean blocks are block-causal among themselves;
            a noisy block sees the clean frames that a cache would hold for it, and itself.

    Raises:
        TypeError: an argument is not an integer (or bool where a bool is meant).
        ValueError: an argument is out of range, or the numbers do not fit each other.

    Source: Self-Forcing (arXiv 2506.08009), section 3; CausVid (arXiv 2412.07772), section 4.2.
    """

    num_frames: int
    frame_seqlen: int
    frames_per_block: int = 1
    window_frames: int | None = None
    sink_frames: int = 0
    first_frame_alone: bool = False
    teacher_forcing: bool = False
    _tables: dict[torch.device, SpanTable] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, least in (("num_frames", 1), ("frame_seqlen", 1), ("frames_per_block", 1), ("sink_frames", 0)):
            check_integer(name, getattr(self, name), least)
        alone = int(bool(self.first_frame_alone))
        if (self.num_frames - alone) % self.frames_per_block:
            wanted = "one more than a multiple" if alone else "a multiple"
            raise ValueError(
                f"num_frames is {self.num_frames}, but must be {wanted} of frames_per_block = {self.frames_per_block}"
            )
        check_window(self.window_frames, self.sink_frames, self.frames_per_block)
        # Made here and not on demand: torch.compile can read a table, but not trace how one is made.
        self._tables[torch.device("cpu")] = self._build_table()

    @property
    def seqlen(self) -> int:
        """Tokens of the whole sequence (both halves under teacher forcing)."""
        return self.num_frames * self.frame_seqlen * (2 if self.teacher_forcing else 1)

    @cached_property
    def frame_blocks(self) -> tuple[Interval, ...]:
        """The blocks as frame intervals ``[start, end)``."""
        first = 1 if self.first_frame_alone else 0
        blocks = [(0, 1)] if first else []
        blocks += [
            (start, start + self.frames_per_block) for start in range(first, self.num_frames, self.frames_per_block)
        ]
        return tuple(blocks)

    def spans(self, device: torch.device | str = "cpu") -> SpanTable:
        """The span table on a device (made once per device)."""
        device = torch.device(device)
        if device not in self._tables:
            self._tables[device] = self._tables[torch.device("cpu")].to(device)
        return self._tables[device]

    def dense(self, device: torch.device | str = "cpu") -> Tensor:
        """bool [seqlen, seqlen], True where the query (row) sees the key (column): for tests and pictures."""
        return self.spans().dense(device)

    def _build_table(self) -> SpanTable:
        tokens, clean_length = self.frame_seqlen, self.num_frames * self.frame_seqlen
        past = [visible_past(start, end, self.window_frames, self.sink_frames) for start, end in self.frame_blocks]
        own = list(self.frame_blocks)
        borders = [start * tokens for start, _ in own] + [clean_length]
        visible = [
            [_scale(interval, tokens) for interval in (*past_frames, block)]
            for past_frames, block in zip(past, own, strict=True)
        ]
        if self.teacher_forcing:
            borders += [clean_length + border for border in borders[1:]]
            visible += [
                [*(_scale(interval, tokens) for interval in past_frames), _scale(block, tokens, clean_length)]
                for past_frames, block in zip(past, own, strict=True)
            ]
        return make_span_table(borders, visible, self.seqlen)


def check_window(window_frames: int | None, sink_frames: int, frames_per_block: int) -> None:
    """Raises ValueError unless sink and one block fit into the window."""
    if window_frames is None:
        return
    check_integer("window_frames", window_frames, 1)
    if window_frames < sink_frames + frames_per_block:
        raise ValueError(
            f"window_frames is {window_frames}, but must be at least sink_frames + frames_per_block = "
            f"{sink_frames} + {frames_per_block}: the window counts the sink and the query's own block"
        )


def _scale(interval: Interval, tokens: int, offset: int = 0) -> Interval:
    return offset + interval[0] * tokens, offset + interval[1] * tokens


def _transpose(
    block_starts: Sequence[int], spans_of_block: Sequence[Sequence[Interval]], num_keys: int
) -> tuple[list[int], list[list[Interval]]]:
    """Runs of keys that the same queries see, and for each run those queries."""
    opening: dict[int, list[int]] = {}
    closing: dict[int, list[int]] = {}
    for block, spans in enumerate(spans_of_block):
        for start, end in spans:
            opening.setdefault(start, []).append(block)
            closing.setdefault(end, []).append(block)
    borders = sorted({0, num_keys, *opening, *closing})
    sees = bytearray(len(spans_of_block))  # of each block, whether it sees the run that the sweep has come to
    runs = []
    for left in borders[:-1]:
        for block in closing.get(left, ()):
            sees[block] = 0
        for block in opening.get(left, ()):
            sees[block] = 1
        runs.append(merge([(block_starts[first], block_starts[last]) for first, last in _runs_of_ones(sees)]))
    return borders, runs


def _runs_of_ones(flags: bytearray) -> Iterator[Interval]:
    start = flags.find(1)
    while start >= 0:
        end = flags.find(0, start)
        if end < 0:
            end = len(flags)
        yield start, end
        start = flags.find(1, end)


def _csr(lists: Sequence[Sequence[Interval]]) -> tuple[Tensor, Tensor]:
    offsets = [0]
    for entries in lists:
        offsets.append(offsets[-1] + len(entries))
    flat = [entry for entries in lists for entry in entries]
    return _int32(offsets), _int32(flat).reshape(-1, 2)


def _int32(values: Sequence[int] | Sequence[Interval]) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.int32, device="cpu")  # under torch.device("meta") too
