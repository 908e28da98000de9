"""One video that is being generated: its frames, which of them later blocks see, and which are kept.

Source: the rolling KV cache of Self-Forcing (arXiv 2506.08009), section 3.4, with sink frames as in StreamingLLM
(arXiv 2309.17453).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from selfforcing_ext.frames import FrameLists, frame_lists
from selfforcing_ext.mask import check_window, visible_past

if TYPE_CHECKING:
    from python_ref.ops.page_pool import PagePool, Pages

KeysAndValues = tuple[Tensor, Tensor]  # of a frame as they are read, each [frame_seqlen, H_kv, D]


@dataclass
class Block:
    """Frames that are not committed yet, by the layers that have written them."""

    num_frames: int
    layers: dict[int, list[KeysAndValues]] = field(default_factory=dict)


class PastFrame(NamedTuple):
    """A frame that a block sees."""

    k: Tensor
    v: Tensor
    is_sink: bool


class Plan(NamedTuple):
    """What a stream is once a block has its pages."""

    frames: dict[int, list[KeysAndValues]]
    pages: Pages


class Stream:
    """The frames of one video, in a pool.

    Args:
        pool: whose pages it takes.
        window_frames: frames that stay visible, counted back from the end of the current block, the block itself and
            the sink included. None: all.
        sink_frames: the first frames, always visible.
        frame_seqlen: tokens per frame.
        max_frames: frames that may be committed in all. None: no limit.
        rollback_frames: frames that are kept beyond the window, for ``rollback``.

    When a block is written for the first time, frames are evicted that are in neither sink nor selection and lie more
    than ``rollback_frames`` frames before the first that it sees. A block that would see a frame that was evicted is an
    error: after a rollback, or in place of a block that was dropped, a block may be too short for what is left.

    Raises:
        ValueError: a number out of range, or the window holds less than the sink and a frame.
    """

    def __init__(
        self,
        pool: PagePool,
        window_frames: int | None,
        sink_frames: int,
        frame_seqlen: int,
        max_frames: int | None = None,
        rollback_frames: int = 0,
    ) -> None:
        least = {"sink_frames": (sink_frames, 0), "frame_seqlen": (frame_seqlen, 1)}
        least |= {"rollback_frames": (rollback_frames, 0), "max_frames": (max_frames, 1)}
        for name, (value, minimum) in least.items():
            if value is not None and value < minimum:
                raise ValueError(f"{name} is {value}, but must be at least {minimum}")
        check_window(window_frames, sink_frames, frames_per_block=1)
        self.pool = pool
        self.window_frames = window_frames
        self.sink_frames = sink_frames
        self.frame_seqlen = frame_seqlen
        self.max_frames = max_frames
        self.rollback_frames = rollback_frames
        self._closed = False
        self._reset()

    def _reset(self) -> None:
        self.num_frames = 0
        self._frames: dict[int, list[KeysAndValues]] = {}  # committed frames that are kept, of every layer
        self._blocks: list[Block] = []  # that are not committed
        self._selection: list[list[int]] | None = None  # one list, or one per K/V head
        self._selected_before = 0  # frames from this one on are seen as usual
        self._forgot = False  # frames that were not selected
        self._newest_block_frames = 1  # of the block for which frames were evicted
        self._rope: str | None = None  # of the cache that wrote the keys
        self._pages: Pages = {}

    @property
    def visible_frames(self) -> int:
        """Committed frames that some head may still see."""
        return len(set().union(*self._seen_from(self.num_frames, 0)))

    def fork(self) -> Stream:
        """A stream with the same past that goes on by itself. Both hold the same pages; one that is written is copied
        first.

        Raises:
            ValueError: a block is not committed, or the pool has ``grad_through_cache``.
        """
        self._check_between_blocks("fork")
        self._check_constant("fork")
        return self.pool._opened(self._snapshot())

    def rollback(self, num_frames: int) -> None:
        """Forgets the newest committed frames, and the blocks that are not committed.

        Args:
            num_frames: how many. The newest block can always be taken back before the next one is written, frames
                before it as far as ``rollback_frames`` says.

        Raises:
            ValueError: there are fewer frames, the next block (as long as the one that was written last) would see
                frames that were evicted, or the pool has ``grad_through_cache``. Nothing is changed then.
        """
        self._check_open()
        self._check_constant("rollback")
        if not 0 <= num_frames <= self.num_frames:
            raise ValueError(f"num_frames is {num_frames}, but must be in [0, {self.num_frames}], the committed frames")
        left = self.num_frames - num_frames
        self._check_kept(left, self._newest_block_frames)
        self.num_frames = left
        self._blocks = []
        self._frames = {frame: kept for frame, kept in self._frames.items() if frame < left}
        if self._selection is not None:
            self._selection = [[frame for frame in frames if frame < left] for frames in self._selection]
        self._selected_before = min(self._selected_before, left)
        self._release_pages()

    def select_frames(self, frames: FrameLists | None, forget: bool = False) -> None:
        """Chooses which of the frames committed so far later blocks see; later frames are seen as usual.

        Args:
            frames: committed frames in any order, or such a sequence for each K/V head. None: sink and window, as at
                first. Chosen frames are kept while they are chosen.
            forget: frames that no head has chosen are gone for good, and their pages are free.

        Raises:
            ValueError: a block is not committed, frames that are not there or were evicted, another number of sequences
                than heads, or None with or after ``forget``. Nothing is changed then.
        """
        self._check_between_blocks("select_frames")
        if frames is None:
            if forget or self._forgot:
                raise ValueError("frames is None, but frames are forgotten: choose among those that are left")
            self._selection = None
            return
        chosen = [sorted(set(of_head)) for of_head in frame_lists(frames, self.pool.num_heads)]
        for frame in set().union(*chosen):
            if frame not in self._frames:
                why = "was evicted or forgotten" if 0 <= frame < self.num_frames else "is not there"
                raise ValueError(f"frames has {frame}, which {why}: {self.num_frames} frames are committed")
        self._selection = chosen
        self._selected_before = self.num_frames
        if forget:
            self._forgot = True
            self._frames = {frame: self._frames[frame] for frame in set().union(*chosen)}
            self._release_pages()

    def save(self, path: str | Path) -> None:
        """Writes the frames that are kept, as they are read, and all that ``PagePool.load_stream`` needs to go on
        (safetensors).

        Raises:
            ValueError: a block is not committed.
        """
        self._check_between_blocks("save")
        frames = sorted(self._frames)
        tensors = {"frames": torch.tensor(frames, dtype=torch.int64)}
        for index, name in enumerate(("k", "v")):
            for frame in frames:
                tensors[f"{name}.{frame}"] = torch.stack([of_layer[index] for of_layer in self._frames[frame]])
        if self.pool.key_offset is not None:
            tensors["key_offset"] = self.pool.key_offset
        state = {name: getattr(self, name) for name in (*_ARGUMENTS, *_STATE)}
        save_file(tensors, path, {"stream": json.dumps(state), "pool": json.dumps(_pool_key(self.pool))})

    @classmethod
    def _load(cls, pool: PagePool, path: str | Path) -> Stream:
        with safe_open(path, "pt", device=str(pool.device)) as file:
            metadata = file.metadata()
            for name, stored in json.loads(metadata["pool"]).items():
                if stored != _pool_key(pool)[name]:
                    raise ValueError(
                        f"{path} has a stream of {name} {stored}, but the pool has {_pool_key(pool)[name]}"
                    )
            offset = file.get_tensor("key_offset") if "key_offset" in list(file.keys()) else None
            if (offset is None) != (pool.key_offset is None) or (
                offset is not None and not torch.equal(offset, pool.key_offset)
            ):
                raise ValueError(f"{path} has a stream of another key_offset than the pool's")
            state = json.loads(metadata["stream"])
            stream = cls(pool, **{name: state[name] for name in _ARGUMENTS})
            for name in _STATE:
                setattr(stream, name, state[name])
            for frame in file.get_tensor("frames").tolist():
                k, v = (file.get_tensor(f"{name}.{frame}") for name in ("k", "v"))
                stream._frames[frame] = list(zip(k, v, strict=True))
        stream._pages = {page: object() for page in stream._pages_of(stream._frames)}
        return stream

    def close(self) -> None:
        """Gives all pages back; the stream can no longer be used."""
        self._reset()
        self._closed = True

    # ---- What a block sees

    def _start_of(self, block: int) -> int:
        """The first frame of an uncommitted block, or of the one after the last."""
        return self.num_frames + sum(written.num_frames for written in self._blocks[:block])

    def _seen_from(self, start: int, num_frames: int) -> list[list[int]]:
        """Frames that a block at ``start`` sees before it, in order: one list, or one for each head."""
        spans = visible_past(start, start + num_frames, self.window_frames, self.sink_frames)
        usual = [frame for first, end in spans for frame in range(first, end)]
        if self._selection is None:
            return [usual]
        border = min(self._selected_before, start)  # a rollback may go back behind the choice
        newer = [frame for frame in usual if frame >= border]
        return [[frame for frame in chosen if frame < border] + newer for chosen in self._selection]

    def _check_kept(self, start: int, num_frames: int) -> None:
        """Raises ValueError if a block at ``start`` would see frames that were evicted."""
        committed = {frame for seen in self._seen_from(start, num_frames) for frame in seen if frame < self.num_frames}
        evicted = sorted(committed - self._frames.keys())
        if evicted:
            raise ValueError(
                f"a block of {num_frames} frames after {start} frames sees frames {evicted}, which were evicted: "
                f"rollback_frames is {self.rollback_frames}"
            )

    def _past(self, layer: int, block: int, num_frames: int) -> list[list[PastFrame]]:
        """What an uncommitted block sees before it: one list, or one for each head."""
        frames = {frame: layers[layer] for frame, layers in self._frames.items()}
        for index, written in enumerate(self._blocks[:block]):
            frames |= dict(enumerate(written.layers[layer], self._start_of(index)))
        return [
            [PastFrame(*frames[frame], frame < self.sink_frames) for frame in seen]
            for seen in self._seen_from(self._start_of(block), num_frames)
        ]

    def _check_turn(self, name: str, layer: int, block: int, num_frames: int) -> None:
        """Raises ValueError unless this layer can write or read an uncommitted block of this length now."""
        self._check_open()
        check_window(self.window_frames, self.sink_frames, num_frames)
        if not 0 <= block <= len(self._blocks):
            raise ValueError(
                f"block is {block}, but must be in [0, {len(self._blocks)}]: blocks come one after another"
            )
        for index, written in enumerate(self._blocks[:block]):
            if layer not in written.layers:
                raise ValueError(f"block is {block}, but layer {layer} has not written block {index} yet")
        if block < len(self._blocks) and self._blocks[block].num_frames != num_frames:
            raise ValueError(
                f"{name} has {num_frames} frames, but must have {self._blocks[block].num_frames} like the block that "
                f"layers {sorted(self._blocks[block].layers)} have written and that is not committed yet"
            )
        start = self._start_of(block)
        if self.max_frames is not None and start + num_frames > self.max_frames:
            committed = "committed ones" if block == 0 else "committed and staged ones"
            raise ValueError(
                f"{name} has {num_frames} frames after {start} {committed}, but max_frames is {self.max_frames}"
            )
        self._check_kept(start, num_frames)

    # ---- What is kept

    def _plan(self, block: int, num_frames: int) -> Plan:
        """What the stream keeps and holds once a block has its pages: what the first uncommitted block does not see is
        evicted when a block comes that was not there."""
        if block < len(self._blocks):
            return Plan(self._frames, self._pages)
        first_end = self.num_frames + (self._blocks[0].num_frames if self._blocks else num_frames)
        window = None if self.window_frames is None else self.window_frames + self.rollback_frames
        spans = visible_past(self.num_frames, first_end, window, self.sink_frames)
        needed = {frame for first, end in spans for frame in range(first, end)}.union(*(self._selection or []))
        frames = {frame: kept for frame, kept in self._frames.items() if frame in needed}
        start = self._start_of(block)
        held = self._pages_of([*frames, *range(self.num_frames, start)])
        pages = {page: self._pages[page] for page in held}
        for page in self._pages_of(range(start, start + num_frames)):
            if page not in pages or self.pool._is_shared(pages[page]):
                pages[page] = object()
        return Plan(frames, pages)

    def _begin_block(self, block: int, num_frames: int, plan: Plan) -> None:
        if block < len(self._blocks):
            return
        self._frames, self._pages = plan
        self._blocks.append(Block(num_frames))
        self._newest_block_frames = self._blocks[0].num_frames

    def _commit(self) -> None:
        block = self._blocks.pop(0)
        for index in range(block.num_frames):
            self._frames[self.num_frames + index] = [
                block.layers[layer][index] for layer in range(self.pool.num_layers)
            ]
        self.num_frames += block.num_frames

    def _drop(self, block: int) -> None:
        del self._blocks[block:]
        self._release_pages()

    def _pages_of(self, frames: Iterable[int]) -> set[int]:
        """The logical pages that hold tokens of these frames."""
        length, size = self.frame_seqlen, self.pool.page_size
        return {
            page for frame in frames for page in range(frame * length // size, ((frame + 1) * length - 1) // size + 1)
        }

    def _release_pages(self) -> None:
        """Gives back the pages that hold no frame."""
        uncommitted = range(self.num_frames, self._start_of(len(self._blocks)))
        held = self._pages_of([*self._frames, *uncommitted])
        self._pages = {page: held_page for page, held_page in self._pages.items() if page in held}

    def _snapshot(self) -> Stream:
        """The stream as it is now, that later changes of this one do not change."""
        snapshot = copy.copy(self)
        snapshot._frames = dict(self._frames)
        snapshot._blocks = [Block(block.num_frames, dict(block.layers)) for block in self._blocks]
        snapshot._pages = dict(self._pages)
        return snapshot

    def _check_rope(self, rope: str) -> None:
        """Raises ValueError unless its keys were written by caches with this ``rope``."""
        if self.num_frames and self._rope not in (None, rope):
            raise ValueError(f"rope is {rope!r}, but the keys of the stream were written with {self._rope!r}")

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the stream is closed")

    def _check_between_blocks(self, name: str) -> None:
        self._check_open()
        if self._blocks:
            raise ValueError(f"{name} is called with {len(self._blocks)} uncommitted blocks: commit or drop them first")

    def _check_constant(self, name: str) -> None:
        if self.pool.grad_through_cache:
            raise ValueError(f"{name} is for constant pasts, but the pool has grad_through_cache")


_ARGUMENTS = ("window_frames", "sink_frames", "frame_seqlen", "max_frames", "rollback_frames")
_STATE = ("num_frames", "_selection", "_selected_before", "_forgot", "_newest_block_frames", "_rope")


def _pool_key(pool: PagePool) -> dict[str, object]:
    """What a pool must share with the one that a stream was saved from."""
    names = ("num_layers", "num_heads", "head_dim", "quantization")
    return {name: getattr(pool, name) for name in names} | {"dtype": str(pool.dtype).removeprefix("torch.")}
