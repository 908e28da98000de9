"""The keys and values of past blocks, in pages that are recycled when their frames leave the window.

A cache is a batch of streams (selfforcing_ext/stream.py) of one pool of pages (page_pool.py). The page table
(csrc/geometry/page_table.h) says which pages hold which tokens of which stream; it lives on the host and changes twice
per block, when the block's first layer writes and when the block is committed. Where things are reaches the kernels as
small int32 tensors on the device, updated in place, so that a captured or compiled graph replays with new positions.
Eviction moves no keys or values.

Source: the rolling KV cache of Self-Forcing (arXiv 2506.08009), section 3.4; pages as in PagedAttention (arXiv
2309.06180); sink frames as in StreamingLLM (arXiv 2309.17453).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfforcing_ext import intervals, kv_cache_ops
from selfforcing_ext.attention import attention_over_spans, full_table, op_inputs
from selfforcing_ext.cache_gradient import CacheGradient, PastGradient
from selfforcing_ext.checks import check_heads, dtype_name
from selfforcing_ext.frames import Frames
from selfforcing_ext.integers import check_integer
from selfforcing_ext.intervals import Interval
from selfforcing_ext.kv_cache_view import KVCacheView
from selfforcing_ext.library import call, nvtx_range, ops
from selfforcing_ext.mask import check_window
from selfforcing_ext.page_pool import LayerPages, PagePool
from selfforcing_ext.past_geometry import PastGeometry
from selfforcing_ext.rope import check_qk_norm_rope, qk_norm_rope, rope_table
from selfforcing_ext.stream import Stream
from selfforcing_ext.upload import copy_to_device, on_device

DEFAULT_PAGE_SIZE = 64  # tokens: a key tile of the kernels, so that a tile rarely spans more than two pages
UNBOUNDED_START_FRAMES = 8  # what a cache without window and maximum has room for at first
LARGEST_BIAS = 1e30  # scores stay finite
ROPE_MODES = ("on_write", "on_read")
Turns = tuple[Tensor, tuple[int, int, int]]  # a table of rotations (rope_table), and its grid


@dataclass
class _Block:
    """A block that is not committed."""

    num_frames: int
    written: set[int] = field(default_factory=set)  # layers so far


class PagedKVCache:
    """Keys and values of the frames before the current block, for a batch of videos.

    Args:
        num_layers: attention layers that share the cache's positions.
        num_heads: K/V heads (H_kv).
        head_dim: channels per head, a multiple of 8 up to 256.
        frame_seqlen: tokens per frame.
        batch_size: streams, that is videos generated together.
        window_frames: frames that stay visible, counted back from the end of the current block, the block itself and
            the sink included. None: all.
        sink_frames: the first frames, always visible.
        max_frames: frames that may be committed in all. None: no limit. Without window and maximum the pool doubles
            when it is full; otherwise it is made at once.
        page_size: tokens per page, any number. None: 64.
        dtype: float32, bfloat16 or float16.
        device: of the keys and values.
        grad_through_cache: gradient flows from ``attend`` into the keys and values that were written. Otherwise the
            past is constant to autograd.
        rope: "on_write": q and k come with their rotary embedding. "on_read": they come without, and the visible past
            is rotated inside the attention kernel with positions counted from its first frame (sink first), so that an
            endless rollout never leaves the positions of a window.
        rope_grid: with "on_read": (rows, columns) of the tokens of a frame.
        past_bias: (sink, past, own block), added to the scaled scores of their keys; may be set again between blocks.
        quantization, key_offset: see ``PagePool``.

    Autograd: gradient flows to q and to the block's own k and v, whenever backward runs: pages that a recorded
    ``attend`` has read are not recycled before its backward is done or its graph is gone (the pool grows instead).
    Code that runs an ``attend`` again later, such as activation checkpointing, must call it on a ``view()`` taken at
    the block.

    Blocks are numbered from the first that is not committed (0). Usually that is the only one; several may be denoised
    in a cascade: ``write(..., block=1)`` stages the keys and values of the block after it, which
    ``attend(..., block=2)`` reads and a later write replaces.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a number out of range, a window that holds less than the sink and a frame, or options that do not go
            together.
    """

    def __init__(
        self,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        frame_seqlen: int,
        batch_size: int = 1,
        window_frames: int | None = None,
        sink_frames: int = 0,
        max_frames: int | None = None,
        page_size: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        grad_through_cache: bool = False,
        rope: str = "on_write",
        rope_grid: tuple[int, int] | None = None,
        past_bias: tuple[float, float, float] | None = None,
        quantization: str | None = None,
        key_offset: Tensor | None = None,
    ) -> None:
        page_size = DEFAULT_PAGE_SIZE if page_size is None else page_size
        sizes = {"batch_size": batch_size, "page_size": page_size, "frame_seqlen": frame_seqlen}
        sizes |= {"max_frames": max_frames} if max_frames is not None else {}
        for name, value in sizes.items():
            check_integer(name, value, least=1)
        check_integer("sink_frames", sink_frames, least=0)
        check_window(window_frames, sink_frames, frames_per_block=1)
        row_pages = _row_pages(page_size, frame_seqlen, window_frames, sink_frames, max_frames)
        shape = (num_layers, num_heads, head_dim, dtype, device, quantization, key_offset, grad_through_cache)
        pool = PagePool(batch_size * row_pages, page_size, *shape)
        streams = [Stream(pool, frame_seqlen, window_frames, sink_frames, max_frames) for _ in range(batch_size)]
        self._set_up(streams, rope, rope_grid, past_bias, pool_may_grow=True)

    @classmethod
    def of_streams(
        cls,
        streams: Sequence[Stream],
        rope: str = "on_write",
        rope_grid: tuple[int, int] | None = None,
        past_bias: tuple[float, float, float] | None = None,
    ) -> PagedKVCache:
        """Streams of one pool as a batch, each with its own length, window and position.

        The streams may join other batches between blocks; of several batches that have a stream, one writes a block and
        commits or drops it before another writes. The pool does not grow.

        Raises:
            ValueError: no streams, one that is closed or comes twice, or pools or frame_seqlen that differ; one whose
                keys were written with another ``rope`` or, with ``grad_through_cache``, by another batch; or options
                that do not go together.
        """
        cache = cls.__new__(cls)
        cache._set_up(list(streams), rope, rope_grid, past_bias, pool_may_grow=False)
        return cache

    def _set_up(
        self,
        streams: list[Stream],
        rope: str,
        rope_grid: tuple[int, int] | None,
        past_bias: tuple[float, float, float] | None,
        pool_may_grow: bool,
    ) -> None:
        _check_streams(streams)
        self.streams = streams
        self.pool = pool = streams[0].pool
        self.frame_seqlen = streams[0].frame_seqlen
        _check_rope(rope, rope_grid, self.frame_seqlen)
        self.rope, self.rope_grid = rope, rope_grid
        self.num_layers, self.num_heads, self.head_dim = pool.num_layers, pool.num_heads, pool.head_dim
        self.batch_size = len(streams)
        self.page_size, self.dtype, self.device = pool.page_size, pool.dtype, pool.device
        self.grad_through_cache = pool.grad_through_cache
        self._pool_may_grow = pool_may_grow
        self._past_bias = _checked_bias(past_bias)
        self._numbers = [stream._number for stream in streams]
        # Each stream's window and sink once, and how long a block they allow: None, if any.
        self._windows = sorted(
            {(stream.window_frames, stream.sink_frames) for stream in streams}, key=lambda w: (w[0] is None, w)
        )
        moving = [window - sink for window, sink in self._windows if window is not None]
        self._longest_block = min(moving, default=None)
        self._limited = [stream for stream in streams if stream.max_frames is not None]
        self._blocks: list[_Block] = []
        self._commits_later = False  # a prepared block is under way
        self._refusal = self._refusal_of_streams()  # why no call is taken, or None
        self._check_usable()
        self._read_blocks: set[int] = set()  # of these, those that a view reads as they are now
        self._view: KVCacheView | None = None  # of the current block, while autograd records
        self._gradient = CacheGradient(pool) if self.grad_through_cache else None

        # Every block length has its own visible past. A window admits a few lengths; without one all see the same.
        self._lengths = np.arange(1, (self._longest_block or 1) + 1)
        self._geometry = PastGeometry(streams)
        self._staged: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # by later block and its length
        longest = max(
            _row_pages(pool.page_size, s.frame_seqlen, s.window_frames, s.sink_frames, s.max_frames, s.rollback_frames)
            for s in streams
        )
        lengths, batch = len(self._lengths), self.batch_size
        self._page_table = torch.zeros(batch, longest, dtype=torch.int32, device=self.device)
        self._past_spans = torch.zeros(lengths, batch, 1, 2, 4, dtype=torch.int32, device=self.device)
        self._write_start = torch.zeros(batch, dtype=torch.int32, device=self.device)
        self._position = torch.zeros(batch, dtype=torch.int32, device=self.device)
        self._rope_position = torch.zeros(lengths, batch, dtype=torch.int32, device=self.device)
        self._turns: Turns | None = None  # of keys that are rotated on reading
        self._make_turns(max((window for window, _ in self._windows if window is not None), default=0))
        self._handle, self.reference = kv_cache_ops.register(self), weakref.ref(self)
        for stream in streams:
            stream._batches.add(self)
        self.refresh()

    # ---- What it holds

    @property
    def num_frames(self) -> int:
        """Committed frames. ValueError if the streams have different numbers."""
        value: int = self._common("num_frames")
        return value

    @property
    def window_frames(self) -> int | None:
        """Of all streams; ValueError if they differ, as for the two below."""
        value: int | None = self._common("window_frames")
        return value

    @property
    def sink_frames(self) -> int:
        value: int = self._common("sink_frames")
        return value

    @property
    def max_frames(self) -> int | None:
        value: int | None = self._common("max_frames")
        return value

    def _common(self, name: str) -> Any:
        values = [getattr(stream, name) for stream in self.streams]
        if any(value != values[0] for value in values):
            raise ValueError(f"{name} differs among the streams of the cache: {values}")
        return values[0]

    @property
    def position(self) -> Tensor:
        """The number of committed frames as an int32 tensor [B] on the device: the start frames for rope_3d. Updated in
        place, so that graphs replay with new positions; while autograd records, a copy that stays as it is."""
        if torch.compiler.is_compiling():
            return kv_cache_ops.copy_of_position(self._position)
        self._check_usable()
        return self._current_view().position if torch.is_grad_enabled() else self._position

    @property
    def visible_frames(self) -> int:
        """Committed frames that some head may still see, of the stream that has most."""
        return max(stream.visible_frames for stream in self.streams)

    @property
    def nbytes(self) -> int:
        """Bytes of the pool."""
        return self.pool.nbytes

    @property
    def past_bias(self) -> tuple[float, float, float]:
        """(sink, past, own block), given so that the own block's is 0: only differences matter."""
        return self._past_bias

    @past_bias.setter
    def past_bias(self, bias: tuple[float, float, float] | None) -> None:
        self._check_usable()
        self._past_bias = _checked_bias(bias)
        self.refresh()

    # ---- Reading and writing

    @nvtx_range("kv_cache.attend")
    def attend(
        self,
        layer: int,
        q: Tensor,  # [B, L, H, D]
        k: Tensor,  # [B, L, H_kv, D]
        v: Tensor,  # [B, L, H_kv, D]
        softmax_scale: float | None = None,
        block: int = 0,
    ) -> Tensor:  # [B, L, H, D]
        """Attention of a block over the visible past and the block's own k and v. Writes nothing.

        The block holds L / frame_seqlen frames from frame ``num_frames`` on (later with ``block`` > 0); all its queries
        see the same keys. Differentiable in q, k and v. Under autocast they are cast as scaled_dot_product_attention
        casts them.

        Args:
            layer: which layer.
            q, k, v: of the block. With rope="on_read" q and k are not rotated.
            softmax_scale: factor on q.k; None: D ** -0.5.
            block: number of the block among those that are not committed. It sees those before it as they were written
                last.

        Raises:
            TypeError: a dtype that is not the cache's.
            ValueError: a shape or device that is not the cache's, tokens that are no whole frames, a block that is too
                long for the window or for ``max_frames``, or one before it that this layer has not written.
        """
        q, k, v = op_inputs(q=q, k=k, v=v)
        num_frames = self._check_block(layer, k, v)
        self._check_query(q, k)
        recorded = torch.is_grad_enabled() and (
            q.requires_grad or k.requires_grad or v.requires_grad or self._gradient is not None
        )
        page_table, past_spans, rope_position = self._page_table, self._past_spans, self._rope_position
        if torch.compiler.is_compiling():
            self._check_compiled(block)
            if recorded:
                page_table, past_spans = kv_cache_ops.pin(self)
        else:
            self._check_turn("q", num_frames, block, layer)
            if recorded:
                return self._current_view(block).attend(layer, q, k, v, softmax_scale)
        if block:
            spans, start = self.where_of_staged(block, num_frames)
        else:
            spans, start = self._at_length(past_spans, num_frames), self._at_length(rope_position, num_frames)
        layers = self.pool.saved_layers if recorded else self.pool.layers
        return self.attend_past(layer, q, k, v, softmax_scale, layers, page_table, spans, start, self._turns)

    @nvtx_range("kv_cache.write")
    def write(
        self,
        layer: int,
        k: Tensor,  # [B, L, H_kv, D]
        v: Tensor,  # [B, L, H_kv, D]
        grad_to: tuple[Tensor, Tensor] | None = None,
        block: int = 0,
    ) -> None:
        """Takes a block's keys and values of one layer, in place of those that it wrote before; ``commit`` makes the
        first block the past.

        Args:
            layer: which layer.
            k, v: keys after rotary embedding (with rope="on_read" before), and values.
            grad_to: a pair of tensors, shaped like k and v, that receive the gradient in their place, also when written
                under ``torch.no_grad()``. Needs ``grad_through_cache``.
            block: number of the block among those that are not committed.

        Raises:
            TypeError, ValueError: as ``attend``; and a block of another length than the layers before have written. The
                cache is unchanged then.
            RuntimeError: the pool has too few free pages. The cache is unchanged then.
        """
        if grad_to is not None and self._gradient is None:
            raise ValueError("grad_to is given, but grad_through_cache is False: the past is constant")
        k, v = op_inputs(k=k, v=v)
        num_frames = self._check_block(layer, k, v)
        if self._gradient is not None and not torch.compiler.is_compiling():
            self._gradient.check_write(k, v, grad_to, block)
        write_start = self._begin_write(layer, num_frames, block)
        k_pages, v_pages, *quantised = self._pages_to_write(layer)
        with torch.no_grad():
            ops.kv_cache_write(k_pages, v_pages, self._page_table, write_start, k.detach(), v.detach(), *quantised)
        if torch.compiler.is_compiling():
            return
        self._blocks[block].written.add(layer)
        if self._gradient is not None:
            self._gradient.record(layer, k, v, grad_to, self._places_of_block(k.shape[1]))

    @nvtx_range("kv_cache.norm_rope_write")
    def norm_rope_write(
        self,
        layer: int,
        k: Tensor,  # [B, L, H_kv * D]
        v: Tensor,  # [B, L, H_kv, D]
        weight: Tensor,  # [H_kv * D]
        grid: Sequence[int],
        eps: float = 1e-6,
    ) -> Tensor:  # [B, L, H_kv, D]
        """``write`` of the first block's keys as ``qk_norm_rope`` makes them at the cache's position, and these keys,
        for ``attend``. Where no gradient is recorded, it is one pass: what is computed goes to both places.

        Args:
            layer: which layer.
            k: projected keys, neither normalised nor rotated. With rope="on_read" they are normalised only.
            v: values.
            weight: factor per channel after the normalisation; any floating dtype, used as float32.
            grid: tokens along (frames, rows, columns), of the block.
            eps: added to the mean square; not below 0.

        Raises:
            TypeError, ValueError: as ``qk_norm_rope`` and ``write``. The cache is unchanged then.
            RuntimeError: as ``write``.
        """
        k, v = op_inputs(k=k, v=v)
        check_qk_norm_rope("k", k, weight, self.num_heads, grid, eps)
        num_frames = self._check_block(layer, k.view(*k.shape[:2], self.num_heads, k.shape[2] // self.num_heads), v)
        if grid[0] != num_frames:
            raise ValueError(
                f"grid is {tuple(grid)}, but must have {num_frames} frames: k has as many of {self.frame_seqlen} tokens"
            )
        recorded = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad or weight.requires_grad)
        if recorded or self._gradient is not None or self.rope == "on_read":
            keys = self._normed_keys(k, weight, grid, eps)
            self.write(layer, keys, v)
            return keys
        write_start = self._begin_write(layer, num_frames, block=0)
        position = self._position
        if torch.compiler.is_compiling():
            position = kv_cache_ops.copy_of_position(position)
        k_pages, v_pages, *quantised = self._pages_to_write(layer)
        with torch.no_grad():
            written: Tensor = ops.kv_cache_norm_rope_write(
                k_pages,
                v_pages,
                self._page_table,
                write_start,
                k,
                v,
                weight.float().contiguous(),
                position,
                list(grid),
                eps,
                *quantised,
            )
        if not torch.compiler.is_compiling():
            self._blocks[0].written.add(layer)
        return written

    def _normed_keys(self, k: Tensor, weight: Tensor, grid: Sequence[int], eps: float) -> Tensor:
        if self.rope == "on_write":
            return qk_norm_rope(k, weight, self.num_heads, grid, self.position, eps)
        tokens = k.flatten(0, 1).unsqueeze(1)  # each a sequence of its own, at position 0
        normed = qk_norm_rope(tokens, weight, self.num_heads, (1, 1, 1), 0, eps)
        return normed.view(*k.shape[:2], self.num_heads, self.head_dim)

    def _begin_write(self, layer: int, num_frames: int, block: int) -> Tensor:
        """Takes a block's pages, if it has none, and says where its first tokens go, int32 [B]."""
        if torch.compiler.is_compiling():
            self._check_compiled(block)
            kv_cache_ops.reserve(self, layer, num_frames)
            return self._write_start
        self._take_pages(num_frames, block, layer)
        if block == 0:
            return self._write_start
        return on_device(self._geometry.write_starts(self._start_frames(block)), self.device)

    def _pages_to_write(self, layer: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Pages of keys and values, their scales, and the offset of keys."""
        pages = self.pool.layers[layer]
        offset = None if self.pool.key_offset is None else self.pool.key_offset[layer]
        return pages.k_pages, pages.v_pages, pages.k_scales, pages.v_scales, offset

    def commit(self, num_frames: int) -> None:
        """Makes the first block, of ``num_frames`` frames, the past.

        Raises:
            TypeError: ``num_frames`` is no int.
            ValueError: a layer has not written it, or not this number of frames. The cache is unchanged then.
        """
        if torch.compiler.is_compiling():
            kv_cache_ops.commit(self, num_frames)
            return
        self._check_usable()
        check_integer("num_frames", num_frames, least=1)
        if self._commit(num_frames):
            self.refresh()

    def drop(self, block: int = 0) -> None:
        """Forgets the blocks that are not committed, from this one on.

        Raises:
            TypeError, ValueError: ``block`` is no int or below 0.
        """
        check_integer("block", block, least=0)
        if block < len(self._blocks):
            del self._blocks[block:]
            self._read_blocks = {read for read in self._read_blocks if read < block}
            self._release()
            for stream in self.streams:
                stream.retain(self._staged_frames(block))

    def end(self) -> None:
        """What a stream of the cache does before it closes: blocks that are not committed are dropped, and the cache
        can no longer be used."""
        self.drop()
        self._view = None
        self._refusal = "a stream of the cache is closed: make a new cache of those that are open"
        for stream in self.streams:
            stream._batches.discard(self)

    def reserve(self, num_frames: int) -> None:
        """Takes the pages for the next block, as its first write does otherwise. Only needed before a compiled graph
        that writes to a cache without window and maximum, or whose pages autograd holds: a graph cannot grow the pool.

        Raises:
            TypeError: ``num_frames`` is no int.
            ValueError: the block cannot be the next one.
            RuntimeError: the pool has too few free pages.
            The cache is unchanged then.
        """
        check_integer("num_frames", num_frames, least=1)
        self._check_windows(num_frames)
        self._take_pages(num_frames, block=0, layer=None)

    @contextmanager
    def prepared_block(self, num_frames: int) -> Iterator[set[int]]:
        """Inside, the next block's calls are work on the device alone: its pages are taken before, and it becomes the
        past at the end, where ``commit`` inside only checks. So a CUDA graph can hold the calls (``GraphedBlock``).

        Yields the layers that have written. A replayed graph writes without the host's knowing: whoever replays adds
        its layers. An error inside drops the block.

        Raises:
            TypeError, ValueError, RuntimeError: as ``reserve``; ValueError if at the end a layer has not written.
        """
        self.reserve(num_frames)
        self._commits_later = True
        try:
            yield self._blocks[0].written
        except BaseException:
            self.drop()
            raise
        finally:
            self._commits_later = False
        self.commit(num_frames)

    def memory_of_block(self) -> list[Tensor]:
        """The tensors that the next block's kernels read and write. The same objects from block to block, except where
        something had to grow: the pool, a table, the selections."""
        shown = [self._page_table, self._past_spans, self._write_start, self._position, self._rope_position]
        turns = [] if self._turns is None else [self._turns[0]]
        return [*shown, *turns, *(tensor for layer in self.pool.layers for tensor in layer if tensor is not None)]

    def view(self, block: int = 0) -> KVCacheView:
        """What a block (the next one) sees now, for reading: later writes do not change it. While the view, or a graph
        that recorded its ``attend``, is alive, its pages are not recycled.

        Raises:
            ValueError: there can be no such block now.
        """
        if not torch.compiler.is_compiling():
            self._check_usable()
            self._check_number(block)
        return KVCacheView(self, block)

    def reset(self) -> None:
        """Forgets every frame of every stream. The pool keeps its size.

        Raises:
            ValueError: a stream is closed or is being written by another batch. Nothing is changed then.
        """
        self._check_usable()
        for stream in self.streams:
            stream.check_writer(self)
        if self._gradient is not None:
            self._gradient.forget()
        for stream in self.streams:
            stream.reset()

    # ---- What a block may be

    def _current_view(self, block: int = 0) -> KVCacheView:
        if self._view is None or self._view.block != block:
            self._view = self.view(block)
        return self._view

    def _check_block(self, layer: int, k: Tensor, v: Tensor) -> int:
        """The number of frames of a block that fits the cache."""
        if not isinstance(layer, int):
            raise TypeError(f"layer is {layer!r}, but must be an int")
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer is {layer}, but must be in [0, {self.num_layers})")
        for name, tensor in (("k", k), ("v", v)):
            check_heads(name, tensor, "[B, L, H_kv, D]")
            if tensor.dtype != self.dtype:
                raise TypeError(f"{name} is {dtype_name(tensor.dtype)}, but the cache holds {dtype_name(self.dtype)}")
            if tensor.device != self.device:
                raise ValueError(f"{name} is on {tensor.device}, but the cache is on {self.device}")
            for what, dim, wanted in (
                ("batch size", 0, self.batch_size),
                ("heads", 2, self.num_heads),
                ("head dim", 3, self.head_dim),
            ):
                if tensor.shape[dim] != wanted:
                    raise ValueError(f"{name} has {what} {tensor.shape[dim]}, but the cache has {wanted}")
        num_tokens = k.shape[1]
        if v.shape[1] != num_tokens:
            raise ValueError(f"v has {v.shape[1]} tokens, but must have {num_tokens} like k")
        if num_tokens == 0 or num_tokens % self.frame_seqlen:
            raise ValueError(
                f"k has {num_tokens} tokens, but must have a positive multiple of frame_seqlen = {self.frame_seqlen}"
            )
        num_frames: int = num_tokens // self.frame_seqlen
        self._check_windows(num_frames)
        return num_frames

    def _check_windows(self, num_frames: int) -> None:
        for window, sink in self._windows:
            check_window(window, sink, num_frames)

    def _check_query(self, q: Tensor, k: Tensor) -> None:
        check_heads("q", q)
        if q.dtype != self.dtype:
            raise TypeError(f"q is {dtype_name(q.dtype)}, but the cache holds {dtype_name(self.dtype)}")
        if q.device != self.device:
            raise ValueError(f"q is on {q.device}, but the cache is on {self.device}")
        if q.shape[:2] != k.shape[:2] or q.shape[3] != self.head_dim:
            raise ValueError(
                f"q has shape {list(q.shape)}, but must have batch, tokens and head dim "
                f"{[*k.shape[:2], self.head_dim]} like k"
            )
        if q.shape[2] == 0 or q.shape[2] % self.num_heads:
            raise ValueError(f"q has {q.shape[2]} heads, but must have a multiple of the cache's {self.num_heads}")

    def _check_turn(self, name: str, num_frames: int, block: int, layer: int | None) -> None:
        """Raises ValueError unless a block of this length can be this one of those that are not committed. Not for
        graphs: all this changes."""
        self._check_usable()
        self._check_number(block)
        for stream in self._limited:
            before = stream.num_frames + self._staged_frames(block)
            if stream.max_frames is not None and before + num_frames > stream.max_frames:
                raise ValueError(
                    f"{name} has {num_frames} frames after {before} committed ones, but max_frames is "
                    f"{stream.max_frames}"
                )
        if block < len(self._blocks) and self._blocks[block].num_frames != num_frames:
            raise ValueError(
                f"{name} has {num_frames} frames, but must have {self._blocks[block].num_frames} like the block that "
                f"layers {sorted(self._blocks[block].written)} have written and that is not committed yet"
            )
        if block == 0 and num_frames < self._shortest_block:
            for stream in self.streams:
                missing = stream.frames.missing(num_frames)
                if missing:
                    raise ValueError(
                        f"{name} has {num_frames} frames at frame {stream.num_frames}, and sees the frames {missing}, "
                        "but these were evicted when a longer block was written"
                    )
        for index, before_it in enumerate(self._blocks[:block]):
            if layer is not None and layer not in before_it.written:
                raise ValueError(f"block is {block}, but layer {layer} has not written block {index}")

    def _refusal_of_streams(self) -> str | None:
        return next(filter(None, (stream.refusal(self) for stream in self.streams)), None)

    def _check_usable(self) -> None:
        if self._refusal is not None:
            raise ValueError(self._refusal)

    def _check_number(self, block: int) -> None:
        if not isinstance(block, int):
            raise TypeError(f"block is {block!r}, but must be an int")
        if not 0 <= block <= len(self._blocks):
            raise ValueError(
                f"block is {block}, but must be in [0, {len(self._blocks)}]: {len(self._blocks)} blocks are written "
                "and not committed"
            )

    def _check_compiled(self, block: int) -> None:
        if block or self._gradient is not None:
            what = "a staged block" if block else "grad_through_cache"
            raise ValueError(f"a compiled graph cannot hold {what}: leave the cache's calls out of the graph")

    def _staged_frames(self, block: int) -> int:
        """Frames of the uncommitted blocks before one."""
        return sum(before.num_frames for before in self._blocks[:block])

    def _start_frames(self, block: int) -> list[int]:
        """Where a block starts in every stream."""
        staged = self._staged_frames(block)
        return [stream.num_frames + staged for stream in self.streams]

    # ---- The host's part: streams and page table, and the tensors that mirror them

    def _take_pages(self, num_frames: int, block: int, layer: int | None) -> None:
        """Takes the block's pages, unless that was done already."""
        self._check_turn("k", num_frames, block, layer)
        if self._advance(num_frames, block, self._pool_may_grow):
            self.refresh()

    def take_pages_in_graph(self, num_frames: int) -> bool:
        """The same for the first block in a compiled graph, where the tensors that kernels read must stay as they are;
        True if the pages were not taken before."""
        self._check_turn("k", num_frames, block=0, layer=None)
        longest = max(self._start_frames(0)) + num_frames
        fits = self._longest_block or -(-longest * self.frame_seqlen // self.page_size) <= self._page_table.shape[1]
        try:
            if not fits:
                raise RuntimeError("the page table has no room for the block")
            return self._advance(num_frames, block=0, may_grow=False)
        except RuntimeError as error:
            raise RuntimeError(
                f"{error}; a compiled graph cannot grow the pool: call cache.reserve({num_frames}) before it, or give "
                "window_frames or max_frames"
            ) from error

    def _advance(self, num_frames: int, block: int, may_grow: bool) -> bool:
        """Gives back the pages that the next block and later ones do not see and takes a block's pages; False if it has
        them."""
        again = block < len(self._blocks)
        if again and block not in self._read_blocks:
            return False
        before, size = self._staged_frames(block), self.frame_seqlen
        lengths = [written.num_frames for written in self._blocks] + ([] if again else [num_frames])
        # Streams in step with each other share their frames, and what follows from these is found once.
        steps: dict[Frames, tuple[list[Interval], Interval, Frames]] = {}
        for stream in self.streams:
            if not self._blocks:
                stream.check_writer(self)
            frames = stream.frames
            if frames not in steps:
                after = frames if again else frames.evicted(lengths[0])
                kept = intervals.merge([*after.held, (frames.num_frames, frames.num_frames + sum(lengths))])
                start = frames.num_frames + before
                steps[frames] = intervals.scale(kept, size), (start * size, (start + num_frames) * size), after
        for batch in {batch for stream in self.streams for batch in stream._batches}:
            batch._view = None  # it would keep pages from the block
        self.pool.advance([(s._number, *steps[s.frames][:2], again) for s in self.streams], may_grow)
        self._read_blocks.discard(block)
        for stream in self.streams:
            stream.frames = steps[stream.frames][2]
            stream.written_by(self)
        if not again:
            self._blocks.append(_Block(num_frames))
        self.refresh_others()
        return True

    def _commit(self, num_frames: int) -> bool:
        """False if the block is a prepared one, which becomes the past later."""
        written = self._blocks[0].written if self._blocks else set()
        missing = sorted(set(range(self.num_layers)) - written)
        if missing:
            raise ValueError(
                f"num_frames is {num_frames}, but layers {missing} of {self.num_layers} have not written the block: "
                "commit takes what every layer has written"
            )
        if num_frames != self._blocks[0].num_frames:
            raise ValueError(
                f"num_frames is {num_frames}, but must be {self._blocks[0].num_frames}, the frames that were written"
            )
        if self._commits_later:
            return False
        self._view = None
        del self._blocks[0]
        self._read_blocks = {block - 1 for block in self._read_blocks if block > 0}
        after: dict[Frames, Frames] = {}
        for stream in self.streams:
            if stream.frames not in after:
                after[stream.frames] = stream.frames.committed(num_frames)
            stream.frames = after[stream.frames]
        self._release()
        self.refresh_others()
        return True

    def refresh_others(self) -> None:
        """Shows other batches of the cache's streams what has become of these."""
        for batch in {batch for stream in self.streams for batch in stream._batches} - {self}:
            batch.refresh()

    def _release(self) -> None:
        """Lets other batches write to the streams, once no block is left."""
        if not self._blocks:
            for stream in self.streams:
                stream.writer = None

    def refresh(self) -> None:
        """Brings the tensors that kernels read up to date with streams and page table. Streams call it; nobody else
        needs to."""
        longest = max(self.pool.table.row_length(number) for number in self._numbers)
        if longest > self._page_table.shape[1]:
            self._page_table = self._page_table.new_zeros(self.batch_size, 2 * longest)
        self.mirror_pages(self._page_table, self._write_start)
        self._view = None
        self._staged.clear()
        self._refusal = self._refusal_of_streams()
        self._shortest_block = max(stream.frames.shortest_block for stream in self.streams)
        records, rope_position = self._records(0, self._lengths)
        _, _, lists, spans, _ = self._past_spans.shape
        if records.shape[2] > lists or records.shape[3] > spans:
            sizes = max(records.shape[2], lists), max(records.shape[3], spans)
            self._past_spans = self._past_spans.new_zeros(len(self._lengths), self.batch_size, *sizes, 4)
        self.mirror_past(self._past_spans, self._position, self._rope_position, (records, rope_position))

    def mirror_pages(self, page_table: Tensor, write_start: Tensor) -> None:
        """Writes the rows of pages [B, T] and where the first block that is not committed is written [B]."""
        rows = np.zeros(page_table.shape, dtype=np.int32)
        self.pool.table.copy_rows(self._numbers, rows)
        copy_to_device(page_table, rows)
        if self._blocks:
            copy_to_device(write_start, self._geometry.write_starts(self._start_frames(0)))

    def mirror_past(
        self,
        past_spans: Tensor,
        position: Tensor | None,
        rope_position: Tensor,
        past: tuple[NDArray[np.int32], NDArray[np.int32]] | None = None,
    ) -> None:
        """Writes the visible past [block lengths, B, G, S, 4], and where the next block starts: [B], [lengths, B]."""
        records, rope_positions = self._records(0, self._lengths) if past is None else past
        # There may be room for more lists, which are then alike, and for more spans, which are then empty.
        spans = np.zeros(past_spans.shape, dtype=np.int32)
        spans[:, :, :, : records.shape[3]] = records
        copy_to_device(past_spans, spans)
        if position is not None:
            copy_to_device(position, np.array(self._start_frames(0), dtype=np.int32))
        copy_to_device(rope_position, rope_positions)

    def _records(self, block: int, lengths: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """What a block sees of the past, for K lengths of it: spans [K, B, G, S, 4] as the attention op reads them, and
        the frame at which it starts when the visible past is counted from 0, [K, B]."""
        records, starts = self._geometry.visible(self._start_frames(block), lengths, self._past_bias[:2])
        self._make_turns(int(starts.max()))
        return records, starts

    def _places_of_block(self, num_tokens: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Page and slot of every token of the block that is being written, [B, L] each."""
        starts = self._write_start.cpu().numpy().astype(np.int64)
        positions = starts[:, None] + np.arange(num_tokens)
        rows = self._page_table.cpu().numpy().astype(np.int64)
        pages = np.take_along_axis(rows, positions // self.page_size, axis=1)
        return pages, positions % self.page_size

    def where_of_staged(self, block: int, num_frames: int) -> tuple[Tensor, Tensor]:
        """Spans [B, G, S, 4] and start frames [B] of a later block."""
        if (block, num_frames) not in self._staged:
            records, start = self._records(block, np.array([num_frames]))
            self._staged[block, num_frames] = on_device(records[0], self.device), on_device(start[0], self.device)
        return self._staged[block, num_frames]

    def _at_length(self, of_lengths: Tensor, num_frames: int) -> Tensor:
        """What holds for a block of this length."""
        return of_lengths[0 if self._longest_block is None else num_frames - 1]

    def _make_turns(self, num_frames: int) -> None:
        """A table of rotations that reaches at least this frame."""
        made = 0 if self._turns is None else self._turns[1][0]
        if self.rope_grid is None or max(1, num_frames) <= made:
            return
        grid = (max(1, num_frames, 2 * made), *self.rope_grid)
        self._turns = rope_table(grid, self.head_dim, self.device), grid

    def attend_past(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float | None,
        layers: list[LayerPages],
        page_table: Tensor,
        spans: Tensor,
        start_frame: Tensor,
        turns: Turns | None,
        gradient: PastGradient | None = None,
    ) -> Tensor:
        """A block over its own k and v, and over the past."""
        if turns is not None:
            grid = (k.shape[1] // self.frame_seqlen, *turns[1][1:])
            q, k = (call(ops.rope_3d, x, start_frame, grid, False) for x in (q, k))  # checked above
        past = self.pool.past(layers, layer, page_table, spans, *(turns or ()))
        table = full_table(q.shape[1], k.shape[1], q.device)
        if gradient is not None:
            length = 0 if self._longest_block is None else k.shape[1] // self.frame_seqlen - 1
            return gradient.attend(layer, q, k, v, table, past, softmax_scale, length)
        return attention_over_spans(q, k, v, table, past, softmax_scale)[0]


def _row_pages(
    page_size: int,
    frame_seqlen: int,
    window_frames: int | None,
    sink_frames: int,
    max_frames: int | None,
    rollback_frames: int = 0,
) -> int:
    """Pages that a stream with one uncommitted block holds at most; a first guess where there is no limit."""
    pages = -(-(max_frames or UNBOUNDED_START_FRAMES) * frame_seqlen // page_size)
    if window_frames is None:
        return pages
    sink_pages = -(-sink_frames * frame_seqlen // page_size)
    # What moves through the window may start at the last token of a page.
    moving_tokens = (window_frames + rollback_frames - sink_frames) * frame_seqlen + page_size - 1
    windowed_pages = sink_pages + -(-moving_tokens // page_size)
    return windowed_pages if max_frames is None else min(pages, windowed_pages)


def _check_streams(streams: list[Stream]) -> None:
    if not streams:
        raise ValueError("streams has no stream, but must have at least one")
    if len(set(map(id, streams))) < len(streams):
        raise ValueError("streams has a stream twice, but a batch has each once")
    for stream in streams:
        stream._check_between_blocks("PagedKVCache.of_streams")
        if stream.pool is not streams[0].pool:
            raise ValueError("streams are of several pools, but must be of one")
        if stream.frame_seqlen != streams[0].frame_seqlen:
            raise ValueError(
                f"streams have frame_seqlen {streams[0].frame_seqlen} and {stream.frame_seqlen}, but must have the same"
            )


def _check_rope(rope: str, rope_grid: tuple[int, int] | None, frame_seqlen: int) -> None:
    if rope not in ROPE_MODES:
        raise ValueError(f"rope is {rope!r}, but must be one of {', '.join(map(repr, ROPE_MODES))}")
    if (rope == "on_read") != (rope_grid is not None):
        raise ValueError(f"rope_grid is {rope_grid}, but must be given exactly with rope='on_read'; rope is {rope!r}")
    if rope_grid is not None and (len(rope_grid) != 2 or rope_grid[0] * rope_grid[1] != frame_seqlen):
        raise ValueError(
            f"rope_grid is {rope_grid}, but must be (rows, columns) with rows * columns = frame_seqlen = {frame_seqlen}"
        )


def _checked_bias(bias: tuple[float, float, float] | None) -> tuple[float, float, float]:
    """(sink, past, own block), relative to the own block's: a softmax knows differences only."""
    if bias is None:
        return 0.0, 0.0, 0.0
    if len(bias) != 3 or not all(abs(value) <= LARGEST_BIAS for value in bias):
        raise ValueError(
            f"past_bias is {bias}, but must be three numbers of at most {LARGEST_BIAS:g} in size: for sink, past and "
            "own block"
        )
    sink, past, own = bias
    return sink - own, past - own, 0.0
