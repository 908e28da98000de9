"""Which frames of a video are there, and which of them its next block sees: a value that every change makes anew, so
that videos in step with each other share it."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import SupportsIndex, cast

from selfforcing_ext import intervals
from selfforcing_ext.intervals import Interval
from selfforcing_ext.mask import visible_past


@dataclass(frozen=True, eq=False)
class Frames:
    """The committed frames of a video.

    Attributes:
        window_frames, sink_frames: what usually stays visible, see ``BlockCausalMask``.
        rollback_frames: frames that are kept beyond the window.
        num_frames: how many were committed.
        held: those that were not evicted.
        selected: in place of sink and window, what is seen of the frames before ``selected_at``: one list for all heads
            or one for each. None: sink and window as usual.
        forgot: frames outside the selection were given up.
        newest_block_frames: frames of the block for which frames were evicted last.
    """

    window_frames: int | None = None
    sink_frames: int = 0
    rollback_frames: int = 0
    num_frames: int = 0
    held: Sequence[Interval] = ()
    selected: Sequence[Sequence[Interval]] | None = None
    selected_at: int = 0
    forgot: bool = False
    newest_block_frames: int = 1

    @staticmethod
    @lru_cache
    def none_yet(window_frames: int | None, sink_frames: int, rollback_frames: int) -> Frames:
        """Of a video without frames: the same value for all that are alike."""
        return Frames(window_frames, sink_frames, rollback_frames)

    def visible(self, start: int, end: int) -> list[list[Interval]]:
        """Frames before a block [start, end) that it sees: one list for all heads, or one for each."""
        usual = visible_past(start, end, self.window_frames, self.sink_frames)
        if self.selected is None:
            return [usual]
        later = intervals.intersect(usual, [(self.selected_at, start)])
        return [intervals.merge([*frames, *later]) for frames in self.selected]

    def missing(self, num_frames: int) -> list[Interval]:
        """Committed frames that the next block, of this length, would see, but that were evicted."""
        seen = self.visible(self.num_frames, self.num_frames + num_frames)
        return intervals.subtract(intervals.merge(interval for frames in seen for interval in frames), self.held)

    @property
    def shortest_block(self) -> int:
        """Frames that the next block has at least: a shorter one would see frames that were evicted."""
        if self.window_frames is None:
            return 1
        seen_as_usual = intervals.merge([(max(self.selected_at, self.sink_frames), self.num_frames)])
        evicted = intervals.subtract(seen_as_usual, self.held)
        if not evicted:
            return 1
        return max(1, evicted[-1][1] - self.num_frames + self.window_frames - self.sink_frames)

    def evicted(self, num_frames: int) -> Frames:
        """Without the frames that neither the next block, of this length, nor a later one sees."""
        held = self.held
        if self.window_frames is not None or self.forgot:
            window = None if self.window_frames is None else self.window_frames + self.rollback_frames
            needed = visible_past(self.num_frames, self.num_frames + num_frames, window, self.sink_frames)
            needed += [interval for frames in self.selected or [] for interval in frames]
            held = intervals.intersect(self.held, intervals.merge(needed))
        return replace(self, held=held, newest_block_frames=num_frames)

    def committed(self, num_frames: int) -> Frames:
        """With these frames more."""
        end = self.num_frames + num_frames
        return replace(self, held=intervals.merge([*self.held, (self.num_frames, end)]), num_frames=end)

    def rolled_back(self, num_frames: int) -> Frames:
        """Without the newest frames."""
        left = self.num_frames - num_frames
        selected = self.selected
        if selected is not None:
            selected = [intervals.intersect(frames, [(0, left)]) for frames in selected]
        held = intervals.intersect(self.held, [(0, left)])
        return replace(self, num_frames=left, held=held, selected=selected, selected_at=min(self.selected_at, left))

    def selecting(self, selected: Sequence[Sequence[Interval]] | None, forget: bool) -> Frames:
        """With another choice of what is seen."""
        if selected is None:
            return replace(self, selected=None, selected_at=0)
        if not forget:
            return replace(self, selected=selected, selected_at=self.num_frames)
        held = intervals.merge(interval for frames in selected for interval in frames)
        return replace(self, selected=selected, selected_at=self.num_frames, held=held, forgot=True)


#: Numbers of frames, for all K/V heads or one iterable for each; tensors and arrays of whole numbers count as such.
FrameLists = Iterable[SupportsIndex] | Iterable[Iterable[SupportsIndex]]


def frame_lists(frames: FrameLists, num_heads: int) -> list[list[int]]:
    """One list for all heads, or one for each.

    Raises:
        TypeError: what is no whole number.
        ValueError: another number of lists than heads.
    """
    entries = list(frames)
    if not any(map(_is_iterable, entries)):
        return [_whole_numbers(cast(list[SupportsIndex], entries))]
    if len(entries) != num_heads:
        raise ValueError(f"frames has {len(entries)} sequences, but must have {num_heads}, one per K/V head")
    return [_whole_numbers(of_head) for of_head in cast(list[Iterable[SupportsIndex]], entries)]


def _is_iterable(entry: object) -> bool:
    try:
        iter(cast(Iterable[object], entry))
    except TypeError:
        return False
    return True


def _whole_numbers(frames: Iterable[SupportsIndex]) -> list[int]:
    try:
        return [operator.index(frame) for frame in frames]
    except TypeError as error:
        raise TypeError(f"frames must have whole numbers ({error})") from error
