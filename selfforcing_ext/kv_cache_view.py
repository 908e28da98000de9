"""What one block saw of a cache: it can be read again after the cache went on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from selfforcing_ext import kv_cache_ops
from selfforcing_ext.attention import op_inputs
from selfforcing_ext.cache_gradient import PastGradient
from selfforcing_ext.library import nvtx_range
from selfforcing_ext.upload import on_device

if TYPE_CHECKING:
    from selfforcing_ext.kv_cache import PagedKVCache


class KVCacheView:
    """What a block saw of a cache when the view was taken (``PagedKVCache.view``), for reading only.

    ``attend`` works as the cache's, also after the cache went on, and as often as wanted: activation checkpointing
    calls it again in backward. ``position`` has the number of frames before the block, int32 [B].
    """

    def __init__(self, cache: PagedKVCache, block: int = 0) -> None:
        self._cache = cache
        self.block = block
        # By layer, the staged blocks before it must be there.
        before_it = [written.written for written in cache._blocks[:block]]
        self._readable_layers = set(range(cache.num_layers)).intersection(*before_it)
        # The memory and the table of now: activation checkpointing wants the same shapes again.
        self._layers = list(cache.pool.saved_layers)
        if block == 0:
            self.position = kv_cache_ops.copy_of_position(cache._position)
            self._page_table, self._past_spans = kv_cache_ops.pin(cache)
            self._rope_position = cache._rope_position.clone()
        else:
            self.position = on_device(np.array(cache._start_frames(block), dtype=np.int32), cache.device)
            records, starts = cache._records(block, cache._lengths)
            self._page_table = kv_cache_ops.pinned_rows(cache, cache._page_table, block)
            self._past_spans, self._rope_position = (on_device(x, cache.device) for x in (records, starts))
            cache._read_blocks.update(range(block))
        self._turns = cache._turns
        # What a block may be, as the cache says it of its own; the first block alone may be too short.
        self._shortest_block = cache._shortest_block if block == 0 else 1
        before = cache._staged_frames(block)
        self._longest_block = min(
            (stream.max_frames - stream.num_frames - before for stream in cache._limited if stream.max_frames),
            default=None,
        )
        self._gradient: PastGradient | None = None
        if cache._gradient is not None and block == 0:
            rows = [cache.pool.table.row(number) for number in cache._numbers]
            self._gradient = PastGradient(cache._gradient, rows, cache._records(0, cache._lengths)[0], cache.page_size)

    @property
    def rope(self) -> str:
        """The cache's."""
        return self._cache.rope

    @property
    def num_frames(self) -> int:
        """Frames before the block. ValueError if the streams have different numbers."""
        numbers = set(self.position.tolist())
        if len(numbers) > 1:
            raise ValueError(f"num_frames is asked of streams of different lengths, {self.position.tolist()}")
        return int(numbers.pop())

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
        if not torch.compiler.is_compiling():
            self._check_turn(layer, num_frames)
        spans, start = (cache._at_length(x, num_frames) for x in (self._past_spans, self._rope_position))
        where = (self._layers, self._page_table, spans, start, self._turns)
        return cache.attend_past(layer, q, k, v, softmax_scale, *where, self._gradient)

    def _check_turn(self, layer: int, num_frames: int) -> None:
        """Raises ValueError unless this layer can read for a block of this length. Not for graphs, as of a cache: all
        this changes."""
        if self.block and self._cache.grad_through_cache and torch.is_grad_enabled():
            raise ValueError(
                f"block is {self.block}, but must be 0 with grad_through_cache: gradients do not reach staged blocks; "
                "read under torch.no_grad()"
            )
        if layer not in self._readable_layers:
            raise ValueError(f"block is {self.block}, but layer {layer} had not written all blocks before it")
        if self._longest_block is not None and num_frames > self._longest_block:
            raise ValueError(
                f"q has {num_frames} frames, but max_frames leaves room for {self._longest_block} after the view's "
                "position"
            )
        if num_frames < self._shortest_block:
            raise ValueError(
                f"q has {num_frames} frames, but must have at least {self._shortest_block}: a shorter block sees "
                "frames that were evicted when a longer one was written"
            )
