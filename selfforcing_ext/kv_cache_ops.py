"""The host's part of a cache as ops, so that a compiled graph can contain it: taking pages, committing, pinning.

The ops find their cache by a handle, which is a tensor on the CPU: its value does not tie a graph to one cache, and
CUDA graphs leave out a graph with such an input, as they must (these ops run on the host).
"""

from __future__ import annotations

import itertools
import os
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from selfforcing_ext.library import ops

if TYPE_CHECKING:
    from selfforcing_ext.kv_cache import PagedKVCache

# Handles start anywhere, so that a program exported by another process finds no cache rather than a wrong one.
_caches: weakref.WeakValueDictionary[int, PagedKVCache] = weakref.WeakValueDictionary()
_handles = itertools.count(int.from_bytes(os.urandom(7), "big"))


def register(cache: PagedKVCache) -> Tensor:
    """The handle of a new cache, int64 [1]."""
    handle = next(_handles)
    _caches[handle] = cache
    return torch.tensor([handle], dtype=torch.int64, device="cpu")


def reserve(cache: PagedKVCache, layer: int, num_frames: int) -> None:
    """Takes the pages that a layer's write needs, in a compiled graph."""
    ops.kv_cache_reserve(
        cache._page_table, cache._past_spans, cache._write_start, cache._rope_position, cache._handle, layer, num_frames
    )


def commit(cache: PagedKVCache, num_frames: int) -> None:
    """Makes the written block the past, in a compiled graph."""
    ops.kv_cache_commit(cache._past_spans, cache._position, cache._rope_position, cache._handle, num_frames)


def pin(cache: PagedKVCache) -> tuple[Tensor, Tensor]:
    """Copies of page table and spans that stay as they are; the pages stay too while the first lives. An op, since
    torch.compile would make plain copies a second time in backward, when all has changed."""
    page_table, past_spans = ops.kv_cache_pin(cache._page_table, cache._past_spans, cache._handle)
    return page_table, past_spans


def pinned_rows(cache: PagedKVCache, page_table: Tensor, block: int) -> Tensor:
    """A copy of the page table with which the pages live that an uncommitted block reads."""
    rows = page_table.clone()
    tokens = [start * cache.frame_seqlen for start in cache._start_frames(block)]
    table = cache.pool.table
    weakref.finalize(rows, table.unpin, table.pin(cache._numbers, tokens)).atexit = False
    return rows


def copy_of_position(position: Tensor) -> Tensor:
    """A copy that stays as it is. An op, because torch.compile may move plain reads across the op that commits."""
    copy: Tensor = ops.kv_cache_position(position)
    return copy


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
    page_table: Tensor,
    past_spans: Tensor,
    write_start: Tensor,
    rope_position: Tensor,
    handle: Tensor,
    layer: int,
    num_frames: int,
) -> None:
    cache = _cache_of(handle)
    if cache.take_pages_in_graph(num_frames):
        cache.mirror_pages(page_table, write_start)
        cache.mirror_past(past_spans, None, rope_position)
    cache._blocks[0].written.add(layer)


@torch.library.impl("selfforcing::kv_cache_commit", "CompositeExplicitAutograd")
def _commit_op(past_spans: Tensor, position: Tensor, rope_position: Tensor, handle: Tensor, num_frames: int) -> None:
    cache = _cache_of(handle)
    if cache._commit(num_frames):
        cache.mirror_past(past_spans, position, rope_position)


@torch.library.impl("selfforcing::kv_cache_pin", "CompositeExplicitAutograd")
def _pin_op(page_table: Tensor, past_spans: Tensor, handle: Tensor) -> tuple[Tensor, Tensor]:
    # Autograd saves the copied table with the attend that read it, so the pages stay until that attend's backward is
    # done or its graph is gone.
    return pinned_rows(_cache_of(handle), page_table, block=0), past_spans.clone()


@torch.library.impl("selfforcing::kv_cache_position", "CompositeExplicitAutograd")
def _position_op(position: Tensor) -> Tensor:
    return position.clone()


def _changes_nothing(*_: Any) -> None:
    """That a trace could see."""


for _name in ("write", "reserve", "commit"):
    torch.library.register_fake(f"selfforcing::kv_cache_{_name}", _changes_nothing)


@torch.library.register_fake("selfforcing::kv_cache_norm_rope_write")
def _norm_rope_write_fake(
    k_pages: Tensor, v_pages: Tensor, page_table: Tensor, write_start: Tensor, k: Tensor, v: Tensor, *_: Any
) -> Tensor:
    return k.new_empty(v.shape)


@torch.library.register_fake("selfforcing::kv_cache_pin")
def _pin_fake(page_table: Tensor, past_spans: Tensor, handle: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(page_table), torch.empty_like(past_spans)


@torch.library.register_fake("selfforcing::kv_cache_position")
def _position_fake(position: Tensor) -> Tensor:
    return torch.empty_like(position)
