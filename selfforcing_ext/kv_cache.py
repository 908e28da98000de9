"""The keys and values of past blocks, in pages that are recycled when their frames leave the window.

A pool per layer holds pages of ``page_size`` tokens. The page table (csrc/geometry/page_table.h) says which pages hold
which frames of which stream; it lives on the host and changes twice per block, when the block's first layer writes and
when the block is committed. Where things are reaches the kernels as small int32 tensors on the device, updated in
place, so that a captured or compiled graph replays with new positions. Eviction moves no keys or values.

Source: the rolling KV cache of Self-Forcing (arXiv 2506.08009), section 3.4; pages as in PagedAttention (arXiv
2309.06180); sink frames as in StreamingLLM (arXiv 2309.17453).
"""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from selfforcing_ext.attention import Past, attention_over_spans, full_table, op_inputs, span_records
from selfforcing_ext.checks import FLOAT_DTYPES, check_head_dim, check_heads, dtype_name
from selfforcing_ext.library import PageTable, nvtx_range, ops
from selfforcing_ext.mask import check_window

DEFAULT_PAGE_SIZE = 64  # tokens: a key tile of the kernels, so that a tile rarely spans more than two pages
UNBOUNDED_START_FRAMES = 8  # what a cache without window and maximum has room for at first

# Caches by handle, for the ops that a compiled graph calls. They take the handle as a tensor on the CPU: its value does
# not tie a graph to one cache, and CUDA graphs leave out a graph with such an input, as they must (these ops run on the
# host). They start anywhere, so that a program exported by another process finds no cache rather than a wrong one.
_caches: weakref.WeakValueDictionary[int, PagedKVCache] = weakref.WeakValueDictionary()
_handles = itertools.count(int.from_bytes(os.urandom(7), "big"))


class PagedKVCache:
    """Keys and values of the frames before the current block.

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
        grad_through_cache: not supported yet; the past is constant to autograd.

    Autograd: gradient flows to q and to the block's own k and v, whenever backward runs: pages that a recorded
    ``attend`` has read are not recycled before its backward is done or its graph is gone (the pool grows instead).
    Code that runs an ``attend`` again later, such as activation checkpointing, must call it on a ``view()`` taken at
    the block.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a number out of range, or a window that holds less than the sink and a frame.
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
    ) -> None:
        page_size = DEFAULT_PAGE_SIZE if page_size is None else page_size
        sizes = {"num_layers": num_layers, "num_heads": num_heads, "frame_seqlen": frame_seqlen}
        sizes |= {"batch_size": batch_size, "page_size": page_size}
        sizes |= {"max_frames": max_frames} if max_frames is not None else {}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} is {value}, but must be at least 1")
        if sink_frames < 0:
            raise ValueError(f"sink_frames is {sink_frames}, but must be at least 0")
        check_head_dim("head_dim", head_dim)
        check_window(window_frames, sink_frames, frames_per_block=1)
        if dtype not in FLOAT_DTYPES:
            raise TypeError(f"dtype is {dtype_name(dtype)}, but must be float32, bfloat16 or float16")
        if grad_through_cache:
            raise ValueError("grad_through_cache is True, which is not supported yet: the past is constant to autograd")
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.frame_seqlen = frame_seqlen
        self.batch_size = batch_size
        self.window_frames = window_frames
        self.sink_frames = sink_frames
        self.max_frames = max_frames
        self.page_size = page_size
        self.dtype = dtype
        self.device = torch.empty(0, device=device).device  # with its index
        self.grad_through_cache = grad_through_cache
        handle = next(_handles)
        self._handle = _on_host([handle], torch.int64)
        _caches[handle] = self

        self._table = PageTable(batch_size, page_size, sink_frames * frame_seqlen)
        self._num_frames = 0
        self._pending_frames = 0  # of the block that is being written
        self._written: set[int] = set()  # its layers so far
        self._view: KVCacheView | None = None  # of the current block, while autograd records

        self._k_pages: list[Tensor] = []  # per layer [P, page_size, H_kv, D]
        self._v_pages: list[Tensor] = []
        # The same memory as autograd saves it, with version counters of its own. Autograd would take every write for a
        # change of what it saved; but pages that a recorded attend reads are pinned and not written.
        self._saved_k_pages: list[Tensor] = []
        self._saved_v_pages: list[Tensor] = []
        row_pages = self._row_pages()
        self._page_table = torch.zeros(batch_size, row_pages, dtype=torch.int32, device=device)
        self._write_start = torch.zeros(batch_size, dtype=torch.int32, device=device)
        # Every block length has its own visible past. A window admits a few lengths; without one all see the same.
        block_lengths = 1 if window_frames is None else window_frames - sink_frames
        self._past_spans = torch.zeros(block_lengths, batch_size, 1, 2, 4, dtype=torch.int32, device=device)
        self._position = torch.zeros(1, dtype=torch.int32, device=device)
        self._grow(batch_size * row_pages)

    @property
    def num_frames(self) -> int:
        """Committed frames."""
        return self._num_frames

    @property
    def position(self) -> Tensor:
        """``num_frames`` as an int32 tensor [1] on the device: the start frame for rope_3d. Updated in place, so that
        graphs replay with new positions; while autograd records, a copy that stays as it is."""
        if torch.compiler.is_compiling():
            return _copy_of_position(self._position)
        return self._current_view().position if torch.is_grad_enabled() else self._position

    @property
    def visible_frames(self) -> int:
        """Committed frames that are kept."""
        return self._num_frames if self.window_frames is None else min(self._num_frames, self.window_frames)

    @property
    def nbytes(self) -> int:
        """Bytes of the pools."""
        return sum(pages.nbytes for pages in (*self._k_pages, *self._v_pages))

    @nvtx_range("kv_cache.attend")
    def attend(
        self,
        layer: int,
        q: Tensor,  # [B, L, H, D]
        k: Tensor,  # [B, L, H_kv, D]
        v: Tensor,  # [B, L, H_kv, D]
        softmax_scale: float | None = None,
    ) -> Tensor:  # [B, L, H, D]
        """Attention of the next block over the visible past and the block's own k and v. Writes nothing.

        The block holds L / frame_seqlen frames from frame ``num_frames`` on; all its queries see the same keys.
        Differentiable in q, k and v. Under autocast they are cast as scaled_dot_product_attention casts them.

        Raises:
            TypeError: a dtype that is not the cache's.
            ValueError: a shape or device that is not the cache's, tokens that are no whole frames, or a block that is
                too long for the window or for ``max_frames``.
        """
        q, k, v = op_inputs(q=q, k=k, v=v)
        num_frames = self._check_block(layer, k, v)
        self._check_query(q, k)
        if not torch.compiler.is_compiling():
            self._check_turn("q", num_frames)
        if not torch.is_grad_enabled() or not (q.requires_grad or k.requires_grad or v.requires_grad):
            pages = self._k_pages[layer], self._v_pages[layer], self._page_table
            return _attend(q, k, v, softmax_scale, *pages, self._spans_of(num_frames, self._past_spans))
        if not torch.compiler.is_compiling():
            return self._current_view().attend(layer, q, k, v, softmax_scale)
        page_table, past_spans = self._snapshot()
        pages = self._saved_k_pages[layer], self._saved_v_pages[layer], page_table
        return _attend(q, k, v, softmax_scale, *pages, self._spans_of(num_frames, past_spans))

    @nvtx_range("kv_cache.write")
    def write(
        self,
        layer: int,
        k: Tensor,  # [B, L, H_kv, D]
        v: Tensor,  # [B, L, H_kv, D]
        grad_to: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Takes the next block's clean keys and values of one layer; ``commit`` makes them the past.

        The first layer's write takes the pages for the block, and gives back those whose frames the block and all later
        ones do not see. Writing a layer again before the commit replaces what it wrote.

        Args:
            layer: which layer.
            k, v: keys after rotary embedding, and values.
            grad_to: needs ``grad_through_cache``, which is not supported yet.

        Raises:
            TypeError, ValueError: as ``attend``; and a block of another length than the layers before have written. The
                cache is unchanged then.
        """
        if grad_to is not None:
            raise ValueError("grad_to is given, but grad_through_cache is False: the past is constant")
        k, v = op_inputs(k=k, v=v)
        num_frames = self._check_block(layer, k, v)
        with torch.no_grad():
            if torch.compiler.is_compiling():
                tables = self._page_table, self._past_spans, self._write_start
                ops.kv_cache_reserve(*tables, self._handle, layer, num_frames)
            else:
                self.reserve(num_frames)
                self._written.add(layer)
            pages = self._k_pages[layer], self._v_pages[layer]
            ops.kv_cache_write(*pages, self._page_table, self._write_start, k.detach(), v.detach())

    def commit(self, num_frames: int) -> None:
        """Makes the written block of ``num_frames`` frames the past.

        Raises:
            ValueError: a layer has not written, or not this number of frames. The cache is unchanged then.
        """
        if torch.compiler.is_compiling():
            ops.kv_cache_commit(self._past_spans, self._position, self._handle, num_frames)
        else:
            self._commit(num_frames)
            self._mirror_spans(self._past_spans)
            self._position.fill_(self._num_frames)

    def reserve(self, num_frames: int) -> None:
        """Takes the pages for the next block, as its first write does otherwise. Only needed before a compiled graph
        that writes to a cache without window and maximum, or whose pages autograd holds: a graph cannot grow the pool.

        Raises:
            ValueError: the block cannot be the next one. The cache is unchanged then.
        """
        if self._take_pages(num_frames, may_grow=True):
            self._mirror_pages(self._page_table, self._write_start)
            self._mirror_spans(self._past_spans)

    def view(self) -> KVCacheView:
        """What the next block sees now, for reading: later writes do not change it. While the view, or a graph that
        recorded its ``attend``, is alive, its pages are not recycled."""
        return KVCacheView(self)

    def reset(self) -> None:
        """Forgets every frame. The pools keep their size."""
        self._view = None
        self._table.clear()
        self._num_frames = self._pending_frames = 0
        self._written.clear()
        self._position.zero_()
        self._past_spans.zero_()

    # ---- What a block may be, and what it sees

    def _snapshot(self) -> tuple[Tensor, Tensor]:
        """Copies of page table and spans that stay as they are; the pages stay too while the first lives. An op, since
        torch.compile would make plain copies a second time in backward, when all has changed."""
        page_table, past_spans = ops.kv_cache_pin(self._page_table, self._past_spans, self._handle)
        return page_table, past_spans

    def _current_view(self) -> KVCacheView:
        if self._view is None:
            self._view = self.view()
        return self._view

    def _check_block(self, layer: int, k: Tensor, v: Tensor) -> int:
        """The number of frames of a block that fits the cache."""
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
        check_window(self.window_frames, self.sink_frames, num_frames)
        return num_frames

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

    def _check_turn(self, name: str, num_frames: int) -> None:
        """Raises ValueError unless a block of this length can be the next. Not for graphs: num_frames changes."""
        if self.max_frames is not None and self._num_frames + num_frames > self.max_frames:
            raise ValueError(
                f"{name} has {num_frames} frames after {self._num_frames} committed ones, but max_frames is "
                f"{self.max_frames}"
            )
        if self._pending_frames not in (0, num_frames):
            raise ValueError(
                f"{name} has {num_frames} frames, but must have {self._pending_frames} like the block that layers "
                f"{sorted(self._written)} have written and that is not committed yet"
            )

    def _spans_of(self, num_frames: int, past_spans: Tensor) -> Tensor:
        """The past of a block of this length, int32 [B, 1, 2, 4]."""
        return past_spans[0 if self.window_frames is None else num_frames - 1]

    # ---- The host's part: the page table, and the tensors that mirror it

    def _take_pages(self, num_frames: int, may_grow: bool) -> bool:
        """Gives back the pages that the next block and later ones do not see and takes the block's pages, unless that
        was done already; True if it was done now."""
        self._check_turn("k", num_frames)
        if self._pending_frames:
            return False
        self._view = None  # it would keep pages from the block
        first_visible = self._first_visible(num_frames)
        num_tokens = num_frames * self.frame_seqlen
        streams = range(self.batch_size)
        per_stream = self._table.pages_needed(0, num_tokens)
        needed = self.batch_size * per_stream
        free = self._table.num_free_pages
        if needed > free:
            free += sum(self._table.releasable(stream, first_visible) for stream in streams)
        row_pages = self._row_pages()
        if self.window_frames is None and self.max_frames is None:
            row_pages = len(self._table.pages(0)) + per_stream
        if needed > free or row_pages > self._page_table.shape[1]:
            if not may_grow:
                raise RuntimeError(
                    f"the block needs {needed} pages, but {free} are free, and a compiled graph cannot grow the "
                    f"pool: call cache.reserve({num_frames}) before it, or give window_frames or max_frames"
                )
            self._grow(needed - free)
            if row_pages > self._page_table.shape[1]:
                self._page_table = self._page_table.new_zeros(self.batch_size, 2 * row_pages)
        for stream in streams:
            self._table.release_before(stream, first_visible)
            self._table.append(stream, num_tokens)
        self._pending_frames = num_frames
        return True

    def _row_pages(self) -> int:
        """Pages that a stream holds at most; a first guess where there is no limit."""
        tokens = (self.max_frames or UNBOUNDED_START_FRAMES) * self.frame_seqlen
        pages = -(-tokens // self.page_size)
        if self.window_frames is None:
            return pages
        sink_pages = -(-self.sink_frames * self.frame_seqlen // self.page_size)
        # What moves through the window may start at the last token of a page.
        moving_tokens = (self.window_frames - self.sink_frames) * self.frame_seqlen + self.page_size - 1
        windowed_pages = sink_pages + -(-moving_tokens // self.page_size)
        return windowed_pages if self.max_frames is None else min(pages, windowed_pages)

    def _first_visible(self, num_frames: int) -> int:
        """The first token outside the sink that a block of this length sees if it comes next."""
        if self.window_frames is None:
            return 0
        return max(0, self._num_frames + num_frames - (self.window_frames - self.sink_frames)) * self.frame_seqlen

    def _commit(self, num_frames: int) -> None:
        missing = sorted(set(range(self.num_layers)) - self._written)
        if missing:
            raise ValueError(
                f"num_frames is {num_frames}, but layers {missing} of {self.num_layers} have not written the block: "
                "commit takes what every layer has written"
            )
        if num_frames != self._pending_frames:
            raise ValueError(
                f"num_frames is {num_frames}, but must be {self._pending_frames}, the frames that were written"
            )
        self._view = None
        self._num_frames += num_frames
        self._pending_frames = 0
        self._written.clear()

    def _grow(self, num_pages: int) -> None:
        """Adds this many pages to the pools, or doubles them if that is more."""
        if num_pages <= 0:
            return
        held = self._table.num_pages
        total = held + max(num_pages, held)
        for pools, saved in ((self._k_pages, self._saved_k_pages), (self._v_pages, self._saved_v_pages)):
            for layer in range(self.num_layers):
                grown = torch.empty(
                    total, self.page_size, self.num_heads, self.head_dim, dtype=self.dtype, device=self.device
                )
                if held:
                    grown[:held] = pools[layer]
                pools[layer : layer + 1], saved[layer : layer + 1] = [grown], [grown.data]
        self._table.add_pages(total - held)

    # The streams advance together, so that their tokens have the same positions: those of stream 0. Pages differ.

    def _mirror_pages(self, page_table: Tensor, write_start: Tensor) -> None:
        """Brings a page table [B, T] and the position of the block's first token [B] up to date."""
        rows = [self._table.pages(stream) for stream in range(self.batch_size)]
        page_table[:, : len(rows[0])] = _on_host(rows, torch.int32)
        write_start.fill_(self._table.position(0, self._num_frames * self.frame_seqlen))

    def _mirror_spans(self, past_spans: Tensor) -> None:
        """Brings the visible past [block lengths, B, 1, 2, 4] up to date."""
        first_visible = [self._first_visible(length) for length in range(1, past_spans.shape[0] + 1)]
        spans = self._table.spans(0, first_visible, self._num_frames * self.frame_seqlen)
        past_spans.copy_(span_records(_on_host(spans, torch.int32))[:, None, None])


class KVCacheView:
    """What a block saw of a cache when the view was taken (``PagedKVCache.view``), for reading only.

    ``attend`` works as the cache's, also after the cache went on, and as often as wanted: activation checkpointing
    calls it again in backward. ``position`` is the number of frames before the block, int32 [1].
    """

    def __init__(self, cache: PagedKVCache) -> None:
        self._cache = cache
        self.num_frames = cache.num_frames
        self.position = _copy_of_position(cache._position)
        self._page_table, self._past_spans = cache._snapshot()
        # The pools of now: activation checkpointing wants the same shapes again, and a pool that grows keeps its pages.
        self._k_pages, self._v_pages = list(cache._saved_k_pages), list(cache._saved_v_pages)

    @nvtx_range("kv_cache.attend")
    def attend(
        self,
        layer: int,
        q: Tensor,  # [B, L, H, D]
        k: Tensor,  # [B, L, H_kv, D]
        v: Tensor,  # [B, L, H_kv, D]
        softmax_scale: float | None = None,
    ) -> Tensor:  # [B, L, H, D]
        """As ``PagedKVCache.attend``, over the past of the moment when the view was taken."""
        q, k, v = op_inputs(q=q, k=k, v=v)
        cache = self._cache
        num_frames = cache._check_block(layer, k, v)
        cache._check_query(q, k)
        pages = self._k_pages[layer], self._v_pages[layer], self._page_table
        return _attend(q, k, v, softmax_scale, *pages, cache._spans_of(num_frames, self._past_spans))


def _on_host(values: Sequence[object], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU, whatever torch's default device is."""
    return torch.tensor(values, dtype=dtype, device="cpu")


def _copy_of_position(position: Tensor) -> Tensor:
    """A copy that stays as it is. An op, because torch.compile may move plain reads across the op that commits."""
    copy: Tensor = ops.kv_cache_position(position)
    return copy


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    past_spans: Tensor,
) -> Tensor:
    """A block over its own k and v, and over the past."""
    past = Past(k_pages, v_pages, page_table, past_spans)
    out, _ = attention_over_spans(q, k, v, full_table(q.shape[1], k.shape[1], q.device), past, softmax_scale)
    return out


def _cache_of(handle: Tensor) -> PagedKVCache:
    cache = _caches.get(int(handle))
    if cache is None:
        raise RuntimeError(
            "this graph belongs to a cache that is gone or lives in another process: an exported program can be loaded "
            "elsewhere if it only reads a cache, without gradient"
        )
    return cache


@torch.library.impl("selfforcing::kv_cache_reserve", "CompositeExplicitAutograd")
def _reserve_op(
    page_table: Tensor, past_spans: Tensor, write_start: Tensor, handle: Tensor, layer: int, num_frames: int
) -> None:
    cache = _cache_of(handle)
    if cache._take_pages(num_frames, may_grow=False):
        cache._mirror_pages(page_table, write_start)
        cache._mirror_spans(past_spans)
    cache._written.add(layer)


@torch.library.impl("selfforcing::kv_cache_commit", "CompositeExplicitAutograd")
def _commit_op(past_spans: Tensor, position: Tensor, handle: Tensor, num_frames: int) -> None:
    cache = _cache_of(handle)
    cache._commit(num_frames)
    cache._mirror_spans(past_spans)
    position.fill_(cache.num_frames)


@torch.library.impl("selfforcing::kv_cache_pin", "CompositeExplicitAutograd")
def _pin_op(page_table: Tensor, past_spans: Tensor, handle: Tensor) -> tuple[Tensor, Tensor]:
    # Autograd saves the copied table with the attend that read it, so the pages stay until that attend's backward is
    # done or its graph is gone.
    cache = _cache_of(handle)
    pages = [page for stream in range(cache.batch_size) for page in cache._table.pages(stream)]
    pinning_table = page_table.clone()
    cache._table.pin(pages)
    weakref.finalize(pinning_table, cache._table.unpin, pages).atexit = False
    return pinning_table, past_spans.clone()


@torch.library.impl("selfforcing::kv_cache_position", "CompositeExplicitAutograd")
def _position_op(position: Tensor) -> Tensor:
    return position.clone()


@torch.library.register_fake("selfforcing::kv_cache_write")
def _write_fake(
    k_pages: Tensor, v_pages: Tensor, page_table: Tensor, write_start: Tensor, k: Tensor, v: Tensor, *_: Any
) -> None:
    """Changes nothing that a trace can see."""


@torch.library.register_fake("selfforcing::kv_cache_reserve")
def _reserve_fake(
    page_table: Tensor, past_spans: Tensor, write_start: Tensor, handle: Tensor, layer: int, num_frames: int
) -> None:
    """Changes nothing that a trace can see."""


@torch.library.register_fake("selfforcing::kv_cache_commit")
def _commit_fake(past_spans: Tensor, position: Tensor, handle: Tensor, num_frames: int) -> None:
    """Changes nothing that a trace can see."""


@torch.library.register_fake("selfforcing::kv_cache_pin")
def _pin_fake(page_table: Tensor, past_spans: Tensor, handle: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(page_table), torch.empty_like(past_spans)


@torch.library.register_fake("selfforcing::kv_cache_position")
def _position_fake(position: Tensor) -> Tensor:
    return torch.empty_like(position)
