"""One video that is being generated: which of its frames a pool holds, and what its next block sees of them.

Source: the rolling KV cache of Self-Forcing (arXiv 2506.08009), section 3.4; sink frames as in StreamingLLM (arXiv
2309.17453).
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from selfforcing_ext import intervals
from selfforcing_ext.frames import FrameLists, Frames, frame_lists
from selfforcing_ext.integers import check_integer
from selfforcing_ext.intervals import Interval
from selfforcing_ext.mask import check_window

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
            check_integer(name, value, bound)
        check_window(window_frames, sink_frames, frames_per_block=1)
        self.pool = pool
        self.frame_seqlen = frame_seqlen
        self.window_frames = window_frames
        self.sink_frames = sink_frames
        self.max_frames = max_frames
        self.rollback_frames = rollback_frames
        self.frames = Frames.none_yet(window_frames, sink_frames, rollback_frames)
        self._set_table_number(pool.table.open())
        self.rope: str | None = None  # of the batch that wrote its keys
        self._batches: weakref.WeakSet[PagedKVCache] = weakref.WeakSet()  # whose tensors show this stream
        self.writer: weakref.ref[PagedKVCache] | None = None  # the batch that has blocks which are not committed
        self._owner: weakref.ref[PagedKVCache] | None = None  # the one that has the gradients of its frames

    def _set_table_number(self, number: int) -> None:
        self._number = number
        self._finalizer = weakref.finalize(self, self.pool.table.close, number)
        self._finalizer.atexit = False

    @property
    def num_frames(self) -> int:
        """Committed frames."""
        return self.frames.num_frames

    @property
    def visible_frames(self) -> int:
        """Committed frames that some head may still see."""
        seen = self.frames.visible(self.num_frames, self.num_frames)
        return intervals.count(intervals.merge(interval for frames in seen for interval in frames))

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
        fork._batches, fork.writer = weakref.WeakSet(), None
        return fork

    def rollback(self, num_frames: int) -> None:
        """Forgets the newest committed frames. Blocks that are not committed are dropped, by the batch that writes them
        and so for all its streams.

        Raises:
            TypeError: ``num_frames`` is no int.
            ValueError: the stream is closed or has fewer frames, the pool has ``grad_through_cache``, or the next
                block, as long as the one that was written last, would see frames that were evicted
                (``rollback_frames`` keeps them). The stream is unchanged then.
        """
        self._check_open()
        self._check_constant("rollback")
        check_integer("num_frames", num_frames, least=0)
        if not 0 <= num_frames <= self.num_frames:
            raise ValueError(f"num_frames is {num_frames}, but must be in [0, {self.num_frames}], the committed frames")
        frames = self.frames.rolled_back(num_frames)
        missing = frames.missing(frames.newest_block_frames)
        if missing:
            raise ValueError(
                f"num_frames is {num_frames}, but the frames {_text(missing)} that would be visible again were "
                f"evicted; the stream keeps rollback_frames = {self.rollback_frames} beyond its window"
            )
        self._drop_blocks()
        self._change(frames)

    def select_frames(self, frames: FrameLists | None, forget: bool = False) -> None:
        """Chooses what later blocks see of the frames committed so far: exactly these, in place of sink and window.
        Frames committed after the call are seen as usual, as far as the window reaches.

        Args:
            frames: numbers of committed frames, or one such sequence per K/V head (lists, tensors or arrays); None:
                sink and window as usual.
            forget: frames that no head selected are gone for good, and their pages are free.

        Raises:
            TypeError: what is no whole number.
            ValueError: the stream is closed or has a block that is not committed, or frames that are not committed,
                were evicted or forgotten, or another number of sequences than K/V heads.
            Nothing is changed then.
        """
        self._check_between_blocks("select_frames")
        if frames is None:
            if self.frames.forgot:
                raise ValueError("frames is None, but frames were forgotten: select among those that are left")
            self._change(self.frames.selecting(None, forget=False))
            return
        selected = [intervals.of_numbers(numbers) for numbers in frame_lists(frames, self.pool.num_heads)]
        for numbers in selected:
            unknown = intervals.subtract(numbers, [(0, self.num_frames)])
            if unknown:
                raise ValueError(f"frames has {_text(unknown)}, but must have committed ones, [0, {self.num_frames})")
            evicted = intervals.subtract(numbers, self.frames.held)
            if evicted:
                raise ValueError(f"frames has {_text(evicted)}, which were evicted")
        self._change(self.frames.selecting(selected, forget))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes what the pool holds of the stream to a safetensors file, keys and values as they are stored.
        ``PagePool.load_stream`` reads it. The file appears whole or not at all.

        Raises:
            ValueError: the stream is closed or has a block that is not committed.
        """
        self._check_between_blocks("save")
        path = Path(path)
        pages, slots = self.places(self.frames.held)
        tensors = {}
        for layer, name, tensor in _named_tensors(self.pool):
            tensors[f"{layer}.{name}"] = tensor[pages, slots].cpu()
        if self.pool.key_offset is not None:
            tensors["key_offset"] = self.pool.key_offset.cpu()
        description = {
            **_shape_of(self.pool),
            "rope": self.rope,
            "frame_seqlen": self.frame_seqlen,
            "max_frames": self.max_frames,
            "frames": asdict(self.frames),
        }
        temporary = path.with_name(f".{path.name}.writing")
        save_file(tensors, temporary, {"format": _FORMAT, "stream": json.dumps(description)})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.rename(path)

    def close(self) -> None:
        """Gives its pages back, and ends the batches that it is in: they drop their blocks that are not committed, and
        take no more calls. What views and recorded graphs read stays until they are gone."""
        for batch in list(self._batches):
            batch.end()
        self._finalizer()

    # ---- What its batches do with it

    def check_writer(self, batch: PagedKVCache) -> None:
        """Raises ValueError unless this batch may write to it."""
        self._check_open()
        if self._writing_batch() not in (None, batch):
            raise ValueError("a stream of the cache is being written by another batch: commit or drop it there")

    def written_by(self, batch: PagedKVCache) -> None:
        """Remembers that a batch has begun a block of it."""
        self.writer, self.rope = batch.reference, batch.rope
        if self.pool.grad_through_cache:
            self._owner = batch.reference

    def refusal(self, batch: PagedKVCache) -> str | None:
        """Why a batch can neither read its frames nor write to it, or None."""
        if self.num_frames == 0:
            return None
        if self.rope not in (None, batch.rope):
            return f"rope is {batch.rope!r}, but the keys of a stream of the cache were written with {self.rope!r}"
        if self._owner is not None and self._owner() is not batch:
            return (
                "a stream of the cache was written by another cache: with grad_through_cache that one alone has the "
                "gradients of its frames"
            )
        return None

    def reset(self) -> None:
        """Forgets every frame."""
        self._drop_blocks()
        self._change(Frames.none_yet(self.window_frames, self.sink_frames, self.rollback_frames))

    def retain(self, uncommitted_frames: int = 0) -> None:
        """Brings page table and batches to the frames that are held, and those of blocks that are not committed."""
        written = self.num_frames, self.num_frames + uncommitted_frames
        kept = intervals.merge([*self.frames.held, written])
        self.pool.table.retain(self._number, intervals.scale(kept, self.frame_seqlen))
        for batch in self._batches:
            batch.refresh()

    def _change(self, frames: Frames) -> None:
        self.frames = frames
        self.retain()

    def _writing_batch(self) -> PagedKVCache | None:
        return None if self.writer is None else self.writer()

    def _drop_blocks(self) -> None:
        batch = self._writing_batch()
        if batch is not None:
            batch.drop()

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
        if self._writing_batch() is not None:
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
            _check_pool(pool, path, description, file)
            frames = _frames_of(description["frames"])
            geometry = frames.window_frames, frames.sink_frames, description["max_frames"], frames.rollback_frames
            stream = Stream(pool, description["frame_seqlen"], *geometry)
            stream.frames, stream.rope = frames, description["rope"]
            try:
                stored = _stored_tensors(stream, file)
                for start, end in intervals.scale(frames.held, stream.frame_seqlen):
                    pool.advance([(stream._number, [(0, start)], (start, end), False)])
            except BaseException:
                stream.close()
                raise
            pages, slots = stream.places(frames.held)
            with torch.no_grad():
                for (_, _, tensor), rows in zip(_named_tensors(pool), stored, strict=True):
                    tensor[pages, slots] = rows.to(pool.device)
    except (SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"path is {path}, which is not a whole stream: {error}") from error
    return stream


def _check_pool(pool: PagePool, path: str | os.PathLike[str], description: dict[str, Any], file: Any) -> None:
    """Raises ValueError unless the stream in a file is one for this pool."""
    for name, value in _shape_of(pool).items():
        if description[name] != value:
            raise ValueError(f"path is {path}, a stream with {name} {description[name]}, but the pool has {value}")
    offset = file.get_tensor("key_offset") if "key_offset" in list(file.keys()) else None
    if (offset is None) != (pool.key_offset is None):
        its, pools = ("no" if tensor is None else "a" for tensor in (offset, pool.key_offset))
        raise ValueError(f"path is {path}, a stream with {its} key_offset, but the pool has {pools} key_offset")
    if offset is not None and pool.key_offset is not None and not torch.equal(offset, pool.key_offset.cpu()):
        raise ValueError(f"path is {path}, a stream with another key_offset than the pool's")


def _stored_tensors(stream: Stream, file: Any) -> list[Tensor]:
    """Of the tensors of its pool, the rows of the frames that a stream holds, as a file has them."""
    num_tokens = intervals.count(stream.frames.held) * stream.frame_seqlen
    stored = []
    for layer, name, tensor in _named_tensors(stream.pool):
        rows = file.get_tensor(f"{layer}.{name}")
        wanted = num_tokens, *tensor.shape[2:]
        if rows.shape != wanted or rows.dtype != tensor.dtype:
            raise KeyError(
                f"{layer}.{name} is {rows.dtype} {list(rows.shape)} instead of {tensor.dtype} {list(wanted)}"
            )
        stored.append(rows)
    return stored


def _frames_of(saved: dict[str, Any]) -> Frames:
    """The inverse of asdict, after JSON, which has lists for tuples."""
    held, selected = saved.pop("held"), saved.pop("selected")
    if selected is not None:
        selected = [_intervals(frames) for frames in selected]
    return Frames(held=_intervals(held), selected=selected, **saved)


def _intervals(pairs: Sequence[Sequence[int]]) -> list[Interval]:
    return [(start, end) for start, end in pairs]


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
