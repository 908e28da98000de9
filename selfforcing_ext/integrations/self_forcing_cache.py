"""The caches of the published Self-Forcing pipelines: their list of dicts, and the same in pages.

A pipeline holds a list with a cache for each layer and passes it to every call with ``current_start``, the position of
the block's first token. Calls at the same position (the denoising steps, then the clean pass) replace each other's keys
and values; a call behind them makes the last of them the past.

Cached keys and values are constant to autograd. With activation checkpointing a call runs again in backward, when the
cache has gone on; it reads what it read before and writes nothing.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from selfforcing_ext.attention import Past, attention_over_spans, full_table, span_records
from selfforcing_ext.kv_cache import PagedKVCache
from selfforcing_ext.kv_cache_view import KVCacheView
from selfforcing_ext.mask import visible_past

DICT_KEYS = ("k", "v", "global_end_index", "local_end_index")


class PagedCacheList(list["LayerCache"]):
    """A ``PagedKVCache`` in the shape of the pipelines' list of dicts, one ``LayerCache`` per layer.

    A call at position 0 begins a new video.
    """

    def __init__(self, cache: PagedKVCache) -> None:
        layers = _Layers(cache)
        super().__init__(LayerCache(layers, layer) for layer in range(cache.num_layers))
        self.cache = cache


class LayerCache(dict[str, Any]):
    """One layer of a ``PagedCacheList``, in place of a dict of ``k, v, global_end_index, local_end_index``.

    ``"global_end_index"`` and ``"local_end_index"`` are int64 tensors [1] on the CPU, brought up to date by every call;
    pipelines may reset them, which does nothing: a call at 0 begins a new video. ``"k"`` and ``"v"`` are gathered from
    the pages when asked for, [B, tokens, H, D]: writing to them changes nothing.
    """

    def __init__(self, layers: _Layers, layer: int) -> None:
        super().__init__(global_end_index=torch.zeros(1, dtype=torch.int64))
        self["local_end_index"] = torch.zeros(1, dtype=torch.int64)
        self._layers, self._layer = layers, layer

    def __missing__(self, key: str) -> Tensor:
        if key not in ("k", "v"):
            raise KeyError(key)
        cache = self._layers.cache
        pages = cache.pool.layers[self._layer]
        return self._layers.gather(pages.k_pages if key == "k" else pages.v_pages)

    @property
    def frame_seqlen(self) -> int:
        return self._layers.cache.frame_seqlen

    def attend(self, start_frame: int, grid_sizes: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the block from ``start_frame`` on over the past and its own k and v [B, L, H, D], which are
        kept. ``grid_sizes`` is the tensor that the model passed: it names the call."""
        cache, dtype = self._layers.cache, v.dtype
        q, k, v = (tensor.to(cache.dtype) for tensor in (q, k, v))
        with torch.autocast(q.device.type, enabled=False):  # the cache has its own dtype
            out = self._layers.attend(self._layer, start_frame, grid_sizes, q, k, v)
        end = start_frame * cache.frame_seqlen + k.shape[1]
        _set_index(self, "global_end_index", end)
        capacity = end if cache.window_frames is None else cache.window_frames * cache.frame_seqlen
        _set_index(self, "local_end_index", min(end, capacity))
        return out.to(dtype)


class _Layers:
    """What the layers of a ``PagedCacheList`` share."""

    def __init__(self, cache: PagedKVCache) -> None:
        self.cache = cache
        self.num_pending_frames = 0  # of the block that the calls so far have written
        # What the block of a recorded call saw, for when it runs again. A model makes ``grid_sizes`` anew for each call
        # and checkpoints hold on to it, so that it stands for the call and lives as long as it can run again.
        self._views: MutableMapping[Tensor, KVCacheView] = WeakIdKeyDictionary()

    def attend(self, layer: int, start_frame: int, grid_sizes: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        view = self._views.get(grid_sizes)
        if view is not None and view.num_frames != start_frame:  # a model that keeps its grid_sizes
            view = None
        if _runs_again():
            if view is None:
                raise RuntimeError(
                    f"kv_cache is read again in backward at frame {start_frame}, but that call was not recorded: "
                    "checkpoint with use_reentrant=False"
                )
            return view.attend(layer, q, k, v)
        num_frames = k.shape[1] // self.cache.frame_seqlen
        self._go_to(start_frame, num_frames)
        if torch.is_grad_enabled():
            if view is None:
                view = self._views[grid_sizes] = self.cache.view()
            out = view.attend(layer, q, k, v)
        else:
            out = self.cache.attend(layer, q, k, v)
        self.cache.write(layer, k, v)
        self.num_pending_frames = num_frames
        return out

    def gather(self, pool: Tensor) -> Tensor:
        """The kept tokens of one of the cache's pools in order, [B, tokens, H, D]: a copy."""
        cache = self.cache
        num_frames = cache.num_frames + self.num_pending_frames
        kept = visible_past(num_frames, num_frames, cache.window_frames, cache.sink_frames)
        places = (stream.places(kept) for stream in cache.streams)
        return torch.stack([pool[pages, slots] for pages, slots in places])

    def _go_to(self, start_frame: int, num_frames: int) -> None:
        """Makes ``start_frame`` the next block's first frame."""
        committed, pending = self.cache.num_frames, self.num_pending_frames
        if start_frame == committed and pending in (0, num_frames):
            return
        if pending and start_frame == committed + pending:
            self.cache.commit(pending)
        elif start_frame == 0:
            self.cache.reset()
        else:
            again = f"{committed} with {pending} frames again, at {committed + pending}" if pending else f"{committed}"
            raise ValueError(
                f"current_start is frame {start_frame} for {num_frames} frames, but the cache can go on at frame "
                f"{again}, or begin anew at 0"
            )
        self.num_pending_frames = 0


def attend_with_dict(
    cache: MutableMapping[str, Any],
    start: int,
    q: Tensor,  # [B, L, H, D]
    k: Tensor,
    v: Tensor,
    rolls: bool,
    sink: int,
    visible: int | None,
) -> Tensor:  # [B, L, H, D]
    """Attention with a pipeline's own dict of ``k, v`` [B, size, H, D] and ``global_end_index, local_end_index`` [1].

    The dict's tensors are one long page for each video, so that nothing is copied for attention. k and v are put where
    the published code puts them.

    Args:
        cache: the dict of a layer.
        start: position of the first token.
        q, k, v: of the block, after rotary embedding.
        rolls: make room for a new block by moving all but the ``sink`` first tokens down. Else a full dict is an error.
        visible: how many tokens up to the end of the block are seen. None: all.

    Raises:
        ValueError: a dict of another form, a position that does not follow from it, or no room. It is unchanged then.
        RuntimeError: in backward, what the block saw has been evicted.
    """
    batch, num_new, num_heads, head_dim = k.shape
    _check_dict(cache, batch, num_heads, head_dim)
    dtype, device, size = v.dtype, v.device, cache["k"].shape[1]
    q, k, v = (tensor.to(cache["k"].dtype) for tensor in (q, k, v))
    end, global_end, local_end = start + num_new, int(cache["global_end_index"]), int(cache["local_end_index"])
    local_start = local_end + start - global_end
    is_new = local_start == local_end
    if not is_new and not (local_start >= 0 and end <= global_end):
        raise ValueError(
            f"current_start is {start} for {num_new} tokens, but kv_cache can go on at {global_end} or repeat a "
            f"block of the {local_end} tokens before (global_end_index {global_end}, local_end_index {local_end})"
        )
    overflow = max(0, local_start + num_new - size)
    if overflow and not (rolls and is_new and local_end - overflow >= sink):
        raise ValueError(
            f"kv_cache has room for {size} tokens, but must have it for {local_start + num_new} (or, with a window, "
            f"for the sink's {sink} and the block's {num_new})"
        )
    if _runs_again():
        if global_end - local_end > max(0, end - size):
            raise RuntimeError(
                f"kv_cache has evicted tokens that the block at {start} saw and that backward needs again: use "
                "make_kv_cache, which keeps them"
            )
    else:
        with torch.no_grad():
            for tokens, new in ((cache["k"], k), (cache["v"], v)):
                if overflow:
                    tokens[:, sink : local_end - overflow] = tokens[:, sink + overflow : local_end].clone()
                tokens[:, local_start - overflow : local_start - overflow + num_new] = new
        local_start -= overflow
        _set_index(cache, "global_end_index", end)
        _set_index(cache, "local_end_index", local_start + num_new)

    first = 0 if visible is None else min(local_start, max(0, local_start + num_new - visible))
    past = Past(cache["k"], cache["v"], *_one_page(batch, first, local_start, device))
    out, _ = attention_over_spans(q, k, v, full_table(num_new, num_new, device), past)
    return out.to(dtype)


@lru_cache(maxsize=16)
def _one_page(batch: int, first: int, end: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Page table [B, 1] and spans [B, 1, 1, 4] for a page of each video, seen from ``first`` to ``end``: the same for
    all layers and denoising steps."""
    with torch.inference_mode(False):  # autograd saves them later
        page_table = torch.arange(batch, dtype=torch.int32, device=device).unsqueeze(1)
        return page_table, span_records(torch.tensor([[[[first, end]]]] * batch, device=device))


def _check_dict(cache: MutableMapping[str, Any], batch: int, num_heads: int, head_dim: int) -> None:
    if any(key not in cache for key in DICT_KEYS) or "is_init" in cache:
        raise ValueError(f"kv_cache has {', '.join(cache)}, but must have {', '.join(DICT_KEYS)} (and no is_init)")
    for key in ("k", "v"):
        wanted = [batch, cache["k"].shape[1], num_heads, head_dim]
        if list(cache[key].shape) != wanted:
            raise ValueError(
                f"kv_cache['{key}'] has shape {list(cache[key].shape)}, but must have [B, L, H, D] = {wanted}"
            )


def _set_index(cache: MutableMapping[str, Any], name: str, value: int) -> None:
    if isinstance(cache[name], Tensor):
        cache[name].fill_(value)
    else:  # some pipelines reset it to a number
        cache[name] = torch.tensor([value], dtype=torch.int64)


def _runs_again() -> bool:
    """Whether this is a checkpoint's second run: autograd is in backward."""
    return torch._C._current_graph_task_id() != -1
