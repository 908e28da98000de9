"""The gradient of cached keys and values: from every block that read them into the tensors that were written.

Attention adds its gradient of the past to pages of gradients, in place, so that memory grows with the pages that are
visible and not with the number of blocks that saw them. To autograd each layer's past is one small tensor, the link: a
write takes the link and returns a new one, an attend takes the newest. So a write's backward runs when every later
attend has added its part, hands what lies in its pages to the written tensors and frees the pages of gradients.

Source: backpropagation through time; the caches of Self-Forcing's training (arXiv 2506.08009, section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfforcing_ext.attention import Past, attention_over_spans
from selfforcing_ext.checks import dtype_name
from selfforcing_ext.library import ops
from selfforcing_ext.mask import SpanTable
from selfforcing_ext.page_pool import PagePool

Places = tuple[NDArray[np.int64], NDArray[np.int64]]  # page and slot of tokens, [B, L] each


class CacheGradient:
    """What autograd has to know of one cache."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self.forget()

    def forget(self) -> None:
        """Starts again: what is recorded stays valid, what comes does not depend on it."""
        self.links: list[Tensor | None] = [None] * self._pool.num_layers
        # Recorded writes by layer and page; pages without one want no gradient.
        self.writes = np.zeros((self._pool.num_layers, self._pool.num_pages), dtype=np.int32)
        self._sums = [_Sums(self._pool) for _ in range(self._pool.num_layers)]

    def check_write(self, k: Tensor, v: Tensor, grad_to: tuple[Tensor, Tensor] | None, block: int) -> None:
        """Raises TypeError or ValueError for a write that cannot have a gradient."""
        if block:
            raise ValueError(f"block is {block}, but must be 0 with grad_through_cache: staged blocks have no gradient")
        if grad_to is None:
            return
        pair = isinstance(grad_to, tuple | list) and len(grad_to) == 2
        if not pair or not all(isinstance(target, Tensor) for target in grad_to):
            what = [type(x).__name__ for x in grad_to] if isinstance(grad_to, tuple | list) else type(grad_to).__name__
            raise TypeError(f"grad_to is {what}, but must be a pair of tensors: for k and for v")
        for name, given, target in (("k", k, grad_to[0]), ("v", v, grad_to[1])):
            if target.shape != given.shape:
                raise ValueError(
                    f"grad_to has shape {list(target.shape)} for {name}, but must have {list(given.shape)} like {name}"
                )
            if not target.is_floating_point():
                raise TypeError(f"grad_to is {dtype_name(target.dtype)} for {name}, but must be a floating dtype")
            if target.device != given.device:
                raise ValueError(f"grad_to is on {target.device} for {name}, but must be on {given.device} like {name}")

    def record(self, layer: int, k: Tensor, v: Tensor, grad_to: tuple[Tensor, Tensor] | None, places: Places) -> None:
        """A layer has written its block to these places."""
        pages, slots = places
        if self.writes.shape[1] < self._pool.num_pages:
            more = self._pool.num_pages - self.writes.shape[1]
            self.writes = np.pad(self.writes, ((0, 0), (0, more)))
        # Of a page that begins with this block, what was recorded before is of tokens that are gone.
        self.writes[layer, pages[slots == 0]] = 0
        targets = (k, v) if grad_to is None else grad_to
        # With grad_to the values come from a pass without gradient, and yet have one.
        with torch.set_grad_enabled(grad_to is not None or torch.is_grad_enabled()):
            if not torch.is_grad_enabled() or not any(target.requires_grad for target in targets):
                return
            self.writes[layer, np.unique(pages)] += 1
            self.links[layer] = _Write.apply(*targets, self.links[layer], self._sums[layer], places)  # type: ignore[no-untyped-call]


class PastGradient:
    """The part of a cache's gradient that one view needs.

    Args:
        gradient: of the cache.
        rows: pages of every stream, [B][T].
        spans: of positions that a block sees, for each length of it: [K, B, G, S, 4].
    """

    def __init__(
        self, gradient: CacheGradient, rows: Sequence[Sequence[int]], spans: NDArray[np.int32], page_size: int
    ) -> None:
        self._links = list(gradient.links)
        self._sums = list(gradient._sums)
        self._writes = gradient.writes
        self._rows, self._spans, self._page_size = rows, spans, page_size

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        table: SpanTable,
        past: Past,
        softmax_scale: float | None,
        length: int,
    ) -> Tensor:
        """Attention over the past, with its gradient. ``length`` is the index of the block's length."""
        link = self._links[layer]
        if link is None or not torch.is_grad_enabled():
            return attention_over_spans(q, k, v, table, past, softmax_scale)[0]
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
        pages = self._pages_with_gradient(layer, past.page_table.shape, length)
        out: Tensor = _Attend.apply(q, k, v, link, table, past, scale, self._sums[layer], pages, self._writes[layer])  # type: ignore[no-untyped-call]
        return out

    def _pages_with_gradient(self, layer: int, shape: Sequence[int], length: int) -> NDArray[np.int64]:
        """The page table [B, T] with -1 where no head sees anything that was recorded."""
        result = np.full(shape, -1, dtype=np.int64)
        for row, of_stream, spans in zip(result, self._rows, self._spans[length], strict=True):
            for start, end in spans[..., :2].reshape(-1, 2).tolist():
                seen = slice(start // self._page_size, -(-end // self._page_size) if end > start else 0)
                row[seen] = of_stream[seen]
        wanted = (result >= 0) & (self._writes[layer, result] > 0)
        return np.where(wanted, result, -1)


class _Sums:
    """Pages of gradients of one layer, while backward runs: float32 [P', page_size, H_kv, D] for k and v."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._task = -1

    def _start(self) -> None:
        """Forgets what a backward has left that did not come to its end."""
        task = torch._C._current_graph_task_id()
        if task == self._task:
            return
        self._task = task
        pool = self._pool
        empty = torch.empty(0, pool.page_size, pool.num_heads, pool.head_dim, device=pool.device)
        self.k_pages, self.v_pages = empty, empty.clone()
        self._slot = np.full(pool.num_pages, -1, dtype=np.int64)  # by page of the pool
        self._writes_left = np.zeros(pool.num_pages, dtype=np.int32)
        self._free: list[int] = []

    def table_of(self, pages: NDArray[np.int64], writes: NDArray[np.int32]) -> Tensor:
        """Where the gradients of these pages [B, T] are summed, int32 [B, T]; makes those that are not there yet."""
        self._start()
        wanted = np.unique(pages[pages >= 0])
        fresh = wanted[self._slot[wanted] < 0]
        missing = len(fresh) - len(self._free)
        if missing > 0:
            held = self.k_pages.shape[0]
            self.k_pages, self.v_pages = (
                torch.cat((tensor, tensor.new_empty(missing, *tensor.shape[1:])))
                for tensor in (self.k_pages, self.v_pages)
            )
            self._free += range(held, held + missing)
        if len(fresh):
            slots = [self._free.pop() for _ in range(len(fresh))]
            self._slot[fresh] = slots
            self._writes_left[fresh] = writes[fresh]
            for tensor in (self.k_pages, self.v_pages):
                tensor[slots] = 0
        return torch.from_numpy(np.where(pages >= 0, self._slot[pages], -1).astype(np.int32)).to(self._pool.device)

    def take(self, places: Places) -> tuple[Tensor, Tensor] | None:
        """The sums of a write's tokens [B, L, H_kv, D]; pages whose writes have all come are free then."""
        self._start()
        pages, slots = places
        touched = np.unique(pages)
        touched = touched[self._slot[touched] >= 0]
        if not len(touched):
            return None
        of_page = torch.from_numpy(self._slot[pages]).to(self._pool.device)
        at = torch.from_numpy(slots).to(self._pool.device)
        there = (of_page >= 0)[..., None, None]
        k, v = (torch.where(there, tensor[of_page, at], 0) for tensor in (self.k_pages, self.v_pages))
        for tensor in (self.k_pages, self.v_pages):
            tensor[of_page[there[..., 0, 0]], at[there[..., 0, 0]]] = 0  # a write before may have had the same places
        self._writes_left[touched] -= 1
        done = touched[self._writes_left[touched] == 0]
        self._free += self._slot[done].tolist()
        self._slot[done] = -1
        if len(self._free) == self.k_pages.shape[0]:
            self._task = -1  # nothing is left: the next one starts with no memory
            self.k_pages = self.v_pages = self.k_pages[:0].clone()
        return k, v


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, link: Tensor | None, sums: _Sums, places: Places) -> Tensor:
        ctx.sums, ctx.places, ctx.dtypes = sums, places, (k.dtype, v.dtype)
        return k.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad_link: Tensor) -> tuple[Any, ...]:
        taken = ctx.sums.take(ctx.places)
        grads = (None, None) if taken is None else tuple(g.to(d) for g, d in zip(taken, ctx.dtypes, strict=True))
        return (*grads, grad_link if ctx.needs_input_grad[2] else None, None, None)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        link: Tensor,
        table: SpanTable,
        past: Past,
        scale: float,
        sums: _Sums,
        pages: NDArray[np.int64],
        writes: NDArray[np.int32],
    ) -> Tensor:
        *tensors, rope_grid = past
        geometry = (*table.tensors(), *tensors)
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = ops.attention(q, k, v, *geometry, rope_grid, scale)
        ctx.save_for_backward(q, k, v, out, lse, *geometry)
        ctx.rope_grid, ctx.scale, ctx.sums, ctx.pages, ctx.writes = rope_grid, scale, sums, pages, writes
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse, *geometry = ctx.saved_tensors
        table = ctx.sums.table_of(ctx.pages, ctx.writes)
        with torch._C._AutoDispatchBelowAutograd():
            grads = ops.attention_backward_through_past(
                grad_out,
                None,
                q,
                k,
                v,
                out,
                lse,
                *geometry,
                ctx.rope_grid,
                ctx.scale,
                ctx.sums.k_pages,
                ctx.sums.v_pages,
                table,
            )
        return (*grads, lse.new_zeros(()), *(None,) * 6)
