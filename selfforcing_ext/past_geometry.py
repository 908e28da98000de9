"""Where the past of a batch of streams is: what blocks see of it and where they are written, as tables on the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from selfforcing_ext import intervals
from selfforcing_ext.intervals import Interval
from selfforcing_ext.mask import visible_past_of_many
from selfforcing_ext.stream import Stream

NO_WINDOW = 1 << 40  # frames that move through a window that has no end


class PastGeometry:
    """Of the frames of B streams of one pool and one ``frame_seqlen``, each with a window and a sink of its own."""

    def __init__(self, streams: Sequence[Stream]) -> None:
        self._streams = streams
        self._table = streams[0].pool.table
        self._frame_seqlen = streams[0].frame_seqlen
        self._numbers = [stream._number for stream in streams]  # in the page table
        self._sinks = np.array([stream.sink_frames for stream in streams])
        self._moving = np.array(
            [NO_WINDOW if s.window_frames is None else s.window_frames - s.sink_frames for s in streams]
        )

    def visible(
        self, starts: Sequence[int], lengths: NDArray[np.int64], bias: tuple[float, float]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """What a block sees of the past.

        Args:
            starts: the frame at which it starts in every stream.
            lengths: numbers of frames that it may have, [K].
            bias: of the sink and of the rest of the past.

        Returns:
            Spans [K, B, G, S, 4] as the attention op reads them, and the frame at which the block starts when the
            visible past is counted from 0, [K, B].
        """
        if any(stream.frames.selected is not None for stream in self._streams):
            frames, sees_sink = self._selected(starts, lengths)
            positions = self._positions(frames)
        else:
            frames = visible_past_of_many(np.array(starts), lengths, self._moving, self._sinks)[:, :, None]
            sees_sink = np.zeros(frames.shape[:-1], dtype=bool)
            sees_sink[..., 0] = True
            positions = self._positions_of_ends(frames)
        records = np.empty((*frames.shape[:-1], 4), dtype=np.int32)
        records[..., :2] = positions
        # The newest visible frame of every head stands right before the block.
        counts = frames[..., 1] - frames[..., 0]
        visible = counts.sum(-1)  # [K, B, G]
        start = visible.max(-1)  # [K, B]
        before = (start[..., None] - visible)[..., None] + np.cumsum(counts, axis=-1) - counts
        records[..., 2] = before * self._frame_seqlen
        sink, past = bias
        records[..., 3] = np.where(sees_sink, np.float32(sink), np.float32(past)).view(np.int32)
        return records, start.astype(np.int32)

    def _selected(
        self, starts: Sequence[int], lengths: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Visible frames [K, B, G, S, 2] where streams have selections, and which of these are sink frames."""
        seen: list[list[list[list[Interval]]]] = []
        for length in lengths.tolist():
            of_length = []
            for stream, start in zip(self._streams, starts, strict=True):
                sink, rest = [(0, stream.sink_frames)], [(stream.sink_frames, start)]
                of_length.append(
                    [
                        [*intervals.intersect(frames, sink), *intervals.intersect(frames, rest)]
                        for frames in stream.frames.visible(start, start + length)
                    ]
                )
            seen.append(of_length)
        num_lists = max(len(lists) for of_length in seen for lists in of_length)
        most = max(1, *(len(spans) for of_length in seen for lists in of_length for spans in lists))
        frames = np.zeros((len(seen), len(starts), num_lists, most, 2), dtype=np.int64)
        for i, of_length in enumerate(seen):
            for j, lists in enumerate(of_length):
                for g in range(num_lists):
                    spans = lists[g if len(lists) > 1 else 0]
                    frames[i, j, g, : len(spans)] = np.array(spans).reshape(-1, 2)
        return frames, frames[..., 1] <= self._sinks[None, :, None, None]

    def _positions(self, frames: NDArray[np.int64]) -> NDArray[np.int32]:
        """Where frames [K, B, G, S, 2] stand."""
        tokens = (frames * self._frame_seqlen).reshape(*frames.shape[:2], -1, 2)
        return self._table.positions(self._numbers, tokens).reshape(frames.shape)

    def _positions_of_ends(self, frames: NDArray[np.int64]) -> NDArray[np.int32]:
        """The same for K ranges that end alike: the table finds the longest, and the others are its last part."""
        starts, ends = frames[..., 0].min(axis=0, keepdims=True), frames[:1, ..., 1]
        longest = self._positions(np.stack((starts, ends), axis=-1))
        end, held = longest[..., 1], longest[..., 1] - longest[..., 0]
        wanted = (frames[..., 1] - frames[..., 0]) * self._frame_seqlen
        return np.stack((end - np.minimum(wanted, held), np.broadcast_to(end, wanted.shape)), axis=-1).astype(np.int32)

    def write_starts(self, starts: Sequence[int]) -> NDArray[np.int32]:
        """Positions [B] of the first tokens of a block that starts at these frames."""
        first = np.array(starts) * self._frame_seqlen
        tokens = np.stack((first, first + 1), axis=-1)[:, None]
        positions: NDArray[np.int32] = self._table.positions(self._numbers, tokens)[:, 0, 0]
        return np.ascontiguousarray(positions)
