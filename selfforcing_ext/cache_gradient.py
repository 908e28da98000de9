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
        # By layer and page: whether a write to the page was recorded. Others want no gradient.
        self.recorded = np.zeros((self._pool.num_layers, self._pool.num_pages), dtype=bool)
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
        if self.recorded.shape[1] < self._pool.num_pages:
            more = self._pool.num_pages - self.recorded.shape[1]
            self.recorded = np.pad(self.recorded, ((0, 0), (0, more)))
        recorded = self.recorded[layer]
        # Of a page that begins with this block, what was recorded before is of tokens that are gone.
        recorded[pages[slots == 0]] = False
        touched = np.unique(pages)
        targets = (k, v) if grad_to is None else grad_to
        # With grad_to the values come from a pass without gradient, and yet have one.
        wanted = (grad_to is not None or torch.is_grad_enabled()) and any(target.requires_grad for target in targets)
        if not wanted:
            if not recorded[touched].any():
                return
            # A write that it replaces must not get the gradient of what stands there now.
            targets = targets[0].detach(), targets[1].detach()
        opened = touched[~recorded[touched]] if wanted else touched[:0]
        recorded[opened] = True
        with torch.enable_grad():
            self.links[layer] = _Write.apply(*targets, self.links[layer], self._sums[layer], places, opened)  # type: ignore[no-untyped-call]


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
        self._pages = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int64)  # [B, T]
        for padded, row in zip(self._pages, rows, strict=True):
            padded[: len(row)] = row
        # As it is now: later writes to these pages have a newer link.
        self._recorded = (self._pages >= 0) & gradient.recorded[:, self._pages]  # [layers, B, T]
        self._spans, self._page_size = spans, page_size

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
        pages = self._pages_with_gradient(layer, past.page_table.shape[1], length)
        out: Tensor = _Attend.apply(q, k, v, link, table, past, scale, self._sums[layer], pages)  # type: ignore[no-untyped-call]
        return out

    def _pages_with_gradient(self, layer: int, width: int, length: int) -> NDArray[np.int64]:
        """The page table [B, width] with -1 where no head sees anything that was recorded."""
        starts, ends = self._spans[length, ..., 0, None], self._spans[length, ..., 1, None]  # [B, G, S, 1]
        first_token = np.arange(self._pages.shape[1]) * self._page_size
        seen = (first_token < ends) & (first_token + self._page_size > starts) & (starts < ends)
        result = np.full((len(self._pages), width), -1, dtype=np.int64)
        here = result[:, : self._pages.shape[1]]
        np.copyto(here, self._pages, where=self._recorded[layer] & seen.any((1, 2)))
        return result


class _Sums:
    """Pages of gradients of one layer, while backward runs: float32 [P', page_size, H_kv, D] for k and v.

    A page is there from the backward of the last attend that read it to the backward of the first write that was
    recorded for it, its opening write: attends before that one saw nothing of it.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._task = -1
        self._clear()

    def _clear(self) -> None:
        pool = self._pool
        empty = torch.empty(0, pool.page_size, pool.num_heads, pool.head_dim, device=pool.device)
        self.k_pages, self.v_pages = empty, empty.clone()
        self._slot = np.full(pool.num_pages, -1, dtype=np.int64)  # by page of the pool
        self._free: list[int] = []

    def _start(self) -> None:
        """Starts with nothing in every backward and gives back at its end what is left: the pages, and sums that an
        opening write does not take where only some gradients are asked for."""
        task = torch._C._current_graph_task_id()
        if task == self._task:
            return
        self._task = task
        self._clear()  # a backward that failed has no end
        torch.autograd.Variable._execution_engine.queue_callback(self._clear)

    def table_of(self, pages: NDArray[np.int64]) -> Tensor:
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
            for tensor in (self.k_pages, self.v_pages):
                tensor[slots] = 0
        return torch.from_numpy(np.where(pages >= 0, self._slot[pages], -1).astype(np.int32)).to(self._pool.device)

    def take(self, places: Places, opened: NDArray[np.int64]) -> tuple[Tensor, Tensor] | None:
        """The sums of a write's tokens [B, L, H_kv, D]; the pages that it opened are free then."""
        self._start()
        pages, slots = places
        if (self._slot[pages] < 0).all():
            return None
        of_page = torch.from_numpy(self._slot[pages]).to(self._pool.device)
        at = torch.from_numpy(slots).to(self._pool.device)
        there = (of_page >= 0)[..., None, None]
        k, v = (torch.where(there, tensor[of_page, at], 0) for tensor in (self.k_pages, self.v_pages))
        for tensor in (self.k_pages, self.v_pages):
            tensor[of_page[there[..., 0, 0]], at[there[..., 0, 0]]] = 0  # a write before may have had the same places
        done = opened[self._slot[opened] >= 0]
        self._free += self._slot[done].tolist()
        self._slot[done] = -1
        return k, v


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        k: Tensor,
        v: Tensor,
        link: Tensor | None,
        sums: _Sums,
        places: Places,
        opened: NDArray[np.int64],
    ) -> Tensor:
        ctx.sums, ctx.places, ctx.opened, ctx.dtypes = sums, places, opened, (k.dtype, v.dtype)
        return k.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad_link: Tensor) -> tuple[Any, ...]:
        taken = ctx.sums.take(ctx.places, ctx.opened)
        grads = (None, None) if taken is None else tuple(g.to(d) for g, d in zip(taken, ctx.dtypes, strict=True))
        return (*grads, grad_link if ctx.needs_input_grad[2] else None, *(None,) * 3)


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
    ) -> Tensor:
        *tensors, rope_grid = past
        geometry = (*table.tensors(), *tensors)
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = ops.attention(q, k, v, *geometry, rope_grid, scale)
        ctx.save_for_backward(q, k, v, out, lse, *geometry)
        ctx.rope_grid, ctx.scale, ctx.sums, ctx.pages = rope_grid, scale, sums, pages
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse, *geometry = ctx.saved_tensors
        table = ctx.sums.table_of(ctx.pages)
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
        return (*grads, lse.new_zeros(()), *(None,) * 5)
