"""One video that is being generated: which of its frames a pool holds, and what its next block sees of them.

Source: the rolling KV cache of Self-Forcing (arXiv 2506.08009), section 3.4; sink frames as in StreamingLLM (arXiv
2309.17453).
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from selfforcing_ext import intervals
from selfforcing_ext.intervals import Interval
from selfforcing_ext.mask import check_window, visible_past

if TYPE_CHECKING:
    from selfforcing_ext.kv_cache import PagedKVCache
    from selfforcing_ext.page_pool import PagePool

# A stream's part of a change of the page table (PageTable::Step): its number there, tokens that it keeps, tokens that
# it will write, and whether these are there already.
Step = tuple[int, list[Interval], Interval, bool]

_FORMAT = "selfforcing_ext stream 1"


class Stream:
    """The frames of one video in a pool (``PagePool.open_stream``). Batches of streams are read and written as a
    ``PagedKVCache``.

    Args:
        pool: where its pages are.
        frame_seqlen: tokens per frame.
        window_frames: frames that stay visible, counted back from the end of the current block, the block itself and
            the sink included. None: all.
        sink_frames: the first frames, always visible.
        max_frames: frames that may be committed in all. None: no limit.
        rollback_frames: frames that are kept beyond the window, so that as many can be rolled back.

    Raises:
        ValueError: a number out of range, or a window that holds less than the sink and a frame.
    """

    def __init__(
        self,
        pool: PagePool,
        frame_seqlen: int,
        window_frames: int | None = None,
        sink_frames: int = 0,
        max_frames: int | None = None,
        rollback_frames: int = 0,
    ) -> None:
        least = {"frame_seqlen": (frame_seqlen, 1), "sink_frames": (sink_frames, 0)}
        least |= {"rollback_frames": (rollback_frames, 0)}
        least |= {"max_frames": (max_frames, 1)} if max_frames is not None else {}
        for name, (value, bound) in least.items():
            if value < bound:
                raise ValueError(f"{name} is {value}, but must be at least {bound}")
        check_window(window_frames, sink_frames, frames_per_block=1)
        self.pool = pool
        self.frame_seqlen = frame_seqlen
        self.window_frames = window_frames
        self.sink_frames = sink_frames
        self.max_frames = max_frames
        self.rollback_frames = rollback_frames
        self._set_table_number(pool.table.open())
        self._num_frames = 0
        self._held: list[Interval] = []  # committed frames that were not evicted
        self._selected: list[list[Interval]] | None = None  # one list for all heads, or one for each
        self._selected_at = 0  # frames before this one are seen if they are selected, later ones as usual
        self._forgot = False
        self._newest_block_frames = 1  # of the block for which frames were evicted last
        self._batches: weakref.WeakSet[PagedKVCache] = weakref.WeakSet()  # whose tensors show this stream

    def _set_table_number(self, number: int) -> None:
        self._number = number
        self._finalizer = weakref.finalize(self, self.pool.table.close, number)
        self._finalizer.atexit = False

    @property
    def num_frames(self) -> int:
        """Committed frames."""
        return self._num_frames

    @property
    def visible_frames(self) -> int:
        """Committed frames that some head may still see."""
        seen = self.visible(self._num_frames, self._num_frames)
        return intervals.count(intervals.merge(interval for frames in seen for interval in frames))

    @property
    def has_selection(self) -> bool:
        """Whether sink and window alone do not say what is visible."""
        return self._selected is not None

    @property
    def closed(self) -> bool:
        return not self._finalizer.alive

    # ---- What a user does with it

    def fork(self) -> Stream:
        """A second stream that goes on from here on its own. All pages are shared until one of the two writes to them:
        then that page is copied first.

        Raises:
            ValueError: the stream is closed, a block of it is not committed, or the pool has ``grad_through_cache``.
        """
        self._check_between_blocks("fork")
        self._check_constant("fork")
        fork = Stream.__new__(Stream)
        fork.__dict__.update(self.__dict__)
        fork._set_table_number(self.pool.table.fork(self._number))
        fork._batches = weakref.WeakSet()
        return fork

    def rollback(self, num_frames: int) -> None:
        """Forgets the newest committed frames, and blocks that are not committed.

        Raises:
            ValueError: the stream is closed or has fewer frames, the pool has ``grad_through_cache``, or the next
                block, as long as the one that was written last, would see frames that were evicted
                (``rollback_frames`` keeps them). The stream is unchanged then.
        """
        self._check_open()
        self._check_constant("rollback")
        if not 0 <= num_frames <= self._num_frames:
            raise ValueError(
                f"num_frames is {num_frames}, but must be in [0, {self._num_frames}], the committed frames"
            )
        left = self._num_frames - num_frames
        evicted = self._evicted(self._seen(left, left + self._newest_block_frames))
        if evicted:
            raise ValueError(
                f"num_frames is {num_frames}, but the frames {_text(evicted)} that would be visible again were "
                f"evicted; the stream keeps rollback_frames = {self.rollback_frames} beyond its window"
            )
        for batch in self._batches:
            batch.drop()
        self._num_frames = left
        self._held = intervals.intersect(self._held, [(0, left)])
        if self._selected is not None:
            self._selected = [intervals.intersect(frames, [(0, left)]) for frames in self._selected]
            self._selected_at = min(self._selected_at, left)
        self.retain()

    def select_frames(self, frames: Sequence[int] | Sequence[Sequence[int]] | None, forget: bool = False) -> None:
        """Chooses what later blocks see of the frames committed so far: exactly these, in place of sink and window.
        Frames committed after the call are seen as usual, as far as the window reaches.

        Args:
            frames: numbers of committed frames, or one such sequence per K/V head; None: sink and window as usual.
            forget: frames that no head selected are gone for good, and their pages are free.

        Raises:
            ValueError: the stream is closed or has a block that is not committed, or frames that are not committed,
                were evicted or forgotten, or another number of sequences than K/V heads. Nothing is changed then.
        """
        self._check_between_blocks("select_frames")
        if frames is None:
            if self._forgot:
                raise ValueError("frames is None, but frames were forgotten: select among those that are left")
            self._selected, self._selected_at = None, 0
            self._changed()
            return
        per_head = any(not isinstance(frame, int) for frame in frames)
        lists = cast(Sequence[Sequence[int]], frames) if per_head else [cast(Sequence[int], frames)]
        if per_head and len(lists) != self.pool.num_heads:
            raise ValueError(
                f"frames has {len(lists)} sequences, but must have {self.pool.num_heads}, one per K/V head"
            )
        selected = [intervals.of_numbers(numbers) for numbers in lists]
        for numbers in selected:
            missing = intervals.subtract(numbers, [(0, self._num_frames)])
            if missing:
                raise ValueError(f"frames has {_text(missing)}, but must have committed ones, [0, {self._num_frames})")
            if self._evicted(numbers):
                raise ValueError(f"frames has {_text(self._evicted(numbers))}, which were evicted")
        self._selected, self._selected_at = selected, self._num_frames
        if forget:
            self._forgot = True
            self._held = intervals.merge(interval for numbers in selected for interval in numbers)
            self.retain()
        else:
            self._changed()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes what the pool holds of the stream to a safetensors file, keys and values as they are stored.
        ``PagePool.load_stream`` reads it. The file appears whole or not at all.

        Raises:
            ValueError: the stream is closed or has a block that is not committed.
        """
        self._check_between_blocks("save")
        path = Path(path)
        pages, slots = self.places(self._held)
        tensors = {}
        for layer, name, tensor in _named_tensors(self.pool):
            tensors[f"{layer}.{name}"] = tensor[pages, slots].cpu()
        description = {
            **_shape_of(self.pool),
            "frame_seqlen": self.frame_seqlen,
            "window_frames": self.window_frames,
            "sink_frames": self.sink_frames,
            "max_frames": self.max_frames,
            "rollback_frames": self.rollback_frames,
            "num_frames": self._num_frames,
            "held": self._held,
            "selected": self._selected,
            "selected_at": self._selected_at,
            "forgot": self._forgot,
            "newest_block_frames": self._newest_block_frames,
        }
        temporary = path.with_name(f".{path.name}.writing")
        save_file(tensors, temporary, {"format": _FORMAT, "stream": json.dumps(description)})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.rename(path)

    def close(self) -> None:
        """Gives its pages back. What views and recorded graphs read stays until they are gone."""
        self._finalizer()
        for batch in list(self._batches):
            batch.end()

    # ---- What its batches do with it

    def visible(self, start: int, end: int) -> list[list[Interval]]:
        """Frames before a block [start, end) that it sees: one list for all heads, or one for each."""
        usual = visible_past(start, end, self.window_frames, self.sink_frames)
        if self._selected is None:
            return [usual]
        later = intervals.intersect(usual, [(self._selected_at, start)])
        return [intervals.merge([*frames, *later]) for frames in self._selected]

    @property
    def shortest_block(self) -> int:
        """Frames that the next block has at least: a shorter one would see frames that were evicted."""
        if self.window_frames is None:
            return 1
        seen_as_usual = [(max(self._selected_at, self.sink_frames), self._num_frames)]
        evicted = self._evicted(intervals.merge(seen_as_usual))
        end = evicted[-1][1] if evicted else 0
        return max(1, end - self._num_frames + self.window_frames - self.sink_frames)

    def check_visible(self, num_frames: int) -> None:
        """Raises ValueError if the next block, of this length, would see frames that were evicted."""
        start = self._num_frames
        evicted = self._evicted(self._seen(start, start + num_frames))
        if evicted:
            raise ValueError(
                f"a block of {num_frames} frames at frame {start} sees the frames {_text(evicted)}, but these were "
                "evicted when a longer block was written"
            )

    def step(self, start: int, end: int, block_frames: Sequence[int], again: bool) -> Step:
        """What writing a block [start, end) means for the page table. ``block_frames``: frames of all uncommitted
        blocks, this one included. If it was not there, frames are evicted that none of them sees."""
        kept = self._held if again else self._kept(block_frames[0])
        uncommitted = self._num_frames, self._num_frames + sum(block_frames)
        written = start * self.frame_seqlen, end * self.frame_seqlen
        return self._number, intervals.scale(intervals.merge([*kept, uncommitted]), self.frame_seqlen), written, again

    def evict(self, first_frames: int) -> None:
        """Forgets what ``step`` gave back."""
        self._held = self._kept(first_frames)
        self._newest_block_frames = first_frames

    def commit(self, num_frames: int) -> None:
        """Makes written frames part of the stream."""
        self._held = intervals.merge([*self._held, (self._num_frames, self._num_frames + num_frames)])
        self._num_frames += num_frames

    def reset(self) -> None:
        self._num_frames = 0
        self._held, self._selected, self._selected_at, self._forgot = [], None, 0, False
        self._newest_block_frames = 1
        self.retain()

    # ---- Inner parts

    def _kept(self, num_frames: int) -> list[Interval]:
        """Committed frames that are still needed once the next block, of this length, is written."""
        if self.window_frames is None and not self._forgot:
            return self._held
        window = None if self.window_frames is None else self.window_frames + self.rollback_frames
        needed = visible_past(self._num_frames, self._num_frames + num_frames, window, self.sink_frames)
        needed += [interval for frames in self._selected or [] for interval in frames]
        return intervals.intersect(self._held, intervals.merge(needed))

    def _seen(self, start: int, end: int) -> list[Interval]:
        """Frames before a block [start, end) that some head sees."""
        return intervals.intersect(
            intervals.merge(interval for frames in self.visible(start, end) for interval in frames), [(0, start)]
        )

    def _evicted(self, frames: Sequence[Interval]) -> list[Interval]:
        return intervals.subtract(frames, self._held)

    def retain(self, uncommitted_frames: int = 0) -> None:
        """Brings the page table to the frames that are held, and those of blocks that are not committed."""
        written = (self._num_frames, self._num_frames + uncommitted_frames)
        kept = intervals.merge([*self._held, written])
        self.pool.table.retain(self._number, intervals.scale(kept, self.frame_seqlen))
        self._changed()

    def _changed(self) -> None:
        for batch in self._batches:
            batch.refresh()

    def places(self, frames: Sequence[Interval]) -> tuple[Tensor, Tensor]:
        """Page and slot of every token of frames that are held or being written, int64 [tokens] each."""
        tokens = np.array(intervals.scale(frames, self.frame_seqlen), dtype=np.int64).reshape(1, -1, 2)
        positions = [p for span in self.pool.table.positions([self._number], tokens)[0] for p in range(*span)]
        at = torch.tensor(positions, dtype=torch.int64)
        row = torch.tensor(self.pool.table.row(self._number), dtype=torch.int64)
        device, size = self.pool.device, self.pool.page_size
        return row[at // size].to(device), (at % size).to(device)

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("the stream is closed")

    def _check_between_blocks(self, name: str) -> None:
        self._check_open()
        if any(batch.has_uncommitted_blocks for batch in self._batches):
            raise ValueError(f"{name} is called while a block is written: commit it or drop it first")

    def _check_constant(self, name: str) -> None:
        if self.pool.grad_through_cache:
            raise ValueError(f"{name} does not go with grad_through_cache: recorded gradients belong to one past")


def load_stream(pool: PagePool, path: str | os.PathLike[str]) -> Stream:
    """The inverse of ``Stream.save``, see ``PagePool.load_stream``."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"path is {path}, which is no file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"path is {path}, which holds no stream: it was not written by Stream.save")
            description = json.loads(metadata["stream"])
            for name, value in _shape_of(pool).items():
                if description[name] != value:
                    raise ValueError(
                        f"path is {path}, a stream with {name} {description[name]}, but the pool has {value}"
                    )
            stream = Stream(
                pool,
                description["frame_seqlen"],
                description["window_frames"],
                description["sink_frames"],
                description["max_frames"],
                description["rollback_frames"],
            )
            stream._held = [(start, end) for start, end in description["held"]]
            try:
                for start, end in intervals.scale(stream._held, stream.frame_seqlen):
                    pool.advance([(stream._number, [(0, start)], (start, end), False)])
            except RuntimeError:
                stream.close()
                raise
            stream._num_frames = description["num_frames"]
            if description["selected"] is not None:
                stream._selected = [[(start, end) for start, end in frames] for frames in description["selected"]]
            stream._selected_at, stream._forgot = description["selected_at"], description["forgot"]
            stream._newest_block_frames = description["newest_block_frames"]
            pages, slots = stream.places(stream._held)
            with torch.no_grad():
                for layer, name, tensor in _named_tensors(pool):
                    stored = file.get_tensor(f"{layer}.{name}").to(pool.device)
                    tensor[pages, slots] = stored
    except SafetensorError as error:
        raise ValueError(f"path is {path}, which is not a whole safetensors file: {error}") from error
    return stream


def _named_tensors(pool: PagePool) -> Iterator[tuple[int, str, Tensor]]:
    """The memory of a pool as bits: layer, name, tensor [P, page_size, ...]."""
    for index, layer in enumerate(pool.layers):
        for name, tensor in layer._asdict().items():
            if tensor is not None:
                yield index, name, tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def _shape_of(pool: PagePool) -> dict[str, object]:
    """What a stream's file and its pool must agree on."""
    return {
        "num_layers": pool.num_layers,
        "num_heads": pool.num_heads,
        "head_dim": pool.head_dim,
        "dtype": str(pool.dtype).removeprefix("torch."),
        "quantization": pool.quantization,
    }


def _text(frames: Sequence[Interval]) -> str:
    return ", ".join(f"[{start}, {end})" for start, end in frames)
