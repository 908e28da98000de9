"""The keys and values of past blocks, kept in Python lists: what a paged ring buffer must amount to.

Source: the rolling KV cache of Self-Forcing (arXiv 2506.08009), section 3.4, with sink frames as in StreamingLLM
(arXiv 2309.17453).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from python_ref.ops.attention import cast_to_autocast_dtype, masked_softmax_attention
from python_ref.ops.page_pool import PagePool, PoolStats
from python_ref.ops.rope import qk_norm_rope, rope_3d
from python_ref.ops.stream import PastFrame, Stream

__all__ = ["PagePool", "PagedKVCache", "PoolStats", "Stream"]

ROPE = ("on_write", "on_read")


class PagedKVCache:
    """Keys and values of the frames before the current block, of one or more streams that are used as a batch.

    Args:
        num_layers: attention layers that share the cache's positions.
        num_heads: K/V heads.
        head_dim: channels per head.
        frame_seqlen: tokens per frame.
        batch_size: videos that are generated together, each a stream of a pool of the cache's own, which grows.
        window_frames: frames that stay visible, counted back from the end of the current block, the block itself and
            the sink included. None: all.
        sink_frames: the first frames, always visible.
        max_frames: frames that may be committed in all. None: no limit.
        page_size: tokens per page, which are only counted. None: those of a frame.
        dtype, device: of the keys and values.
        grad_through_cache: gradient flows from ``attend`` into the tensors that were written; otherwise the past is
            constant.
        rope: "on_write": q and k come with rotary embedding. "on_read": they come without, the past that a block sees
            is numbered from frame 0 on, sink first and without gaps, the block comes after it, and keys are rotated
            (``rope_3d``) when they are read. With frames chosen per head the block comes after those of the head that
            sees most, and each head's past ends there.
        rope_grid: rows and columns of a frame's tokens; needed for "on_read".
        past_bias: what is added to the scaled scores of keys in the sink, in the rest of the past (uncommitted blocks
            before this one included), and in the block itself. None: nothing. May be set between blocks.
        quantization, key_offset: as in ``PagePool``. A block's own keys and values are read as they are.

    Raises:
        ValueError: an argument out of range, or a window that holds less than the sink and a frame.
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
        page_size = frame_seqlen if page_size is None else page_size
        shape = page_size, num_layers, num_heads, head_dim
        pool = PagePool(1, *shape, dtype, device, quantization, key_offset, grad_through_cache)
        pool._grows = True
        window = window_frames, sink_frames
        streams = [
            pool.open_stream(*window, frame_seqlen=frame_seqlen, max_frames=max_frames) for _ in range(batch_size)
        ]
        self._read_streams(streams, rope, rope_grid, past_bias)

    @classmethod
    def of_streams(
        cls,
        streams: Sequence[Stream],
        rope: str = "on_write",
        rope_grid: tuple[int, int] | None = None,
        past_bias: tuple[float, float, float] | None = None,
    ) -> PagedKVCache:
        """A batch of streams of one pool and one frame_seqlen, each once; all else may differ from stream to stream."""
        cache = cls.__new__(cls)
        cache._read_streams(streams, rope, rope_grid, past_bias)
        return cache

    def _read_streams(
        self,
        streams: Sequence[Stream],
        rope: str,
        rope_grid: tuple[int, int] | None,
        past_bias: tuple[float, float, float] | None,
    ) -> None:
        if not streams:
            raise ValueError("streams is empty, but a batch has at least one")
        first = streams[0]
        for index, stream in enumerate(streams):
            stream._check_open()
            if stream.pool is not first.pool:
                raise ValueError(f"streams[{index}] is of another pool than streams[0]")
            if stream.frame_seqlen != first.frame_seqlen:
                raise ValueError(
                    f"streams[{index}] has frame_seqlen {stream.frame_seqlen}, but must have {first.frame_seqlen} like "
                    "streams[0]"
                )
            if stream in streams[:index]:
                raise ValueError(f"streams[{index}] is streams[{streams.index(stream)}], but each may be there once")
        if rope not in ROPE:
            raise ValueError(f"rope is {rope!r}, but must be one of {', '.join(map(repr, ROPE))}")
        if (rope == "on_read") != (rope_grid is not None):
            raise ValueError(f"rope_grid is {rope_grid}, but must be given for rope 'on_read' and for it alone")
        if rope_grid is not None and rope_grid[0] * rope_grid[1] != first.frame_seqlen:
            raise ValueError(
                f"rope_grid is {rope_grid}, but rows * columns must be frame_seqlen = {first.frame_seqlen}"
            )
        for stream in streams:
            stream._check_rope(rope)
        self.streams = list(streams)
        self._first_block = 0  # of those that are not committed, which one a view counts as its block 0
        self.pool = first.pool
        self.frame_seqlen = first.frame_seqlen
        self.rope = rope
        self.rope_grid = rope_grid
        self.past_bias = past_bias

    @property
    def past_bias(self) -> tuple[float, float, float] | None:
        """Added to the scaled scores of (sink, past, own block)."""
        return self._past_bias

    @past_bias.setter
    def past_bias(self, bias: tuple[float, float, float] | None) -> None:
        if bias is not None and (len(bias) != 3 or not all(map(math.isfinite, bias))):
            raise ValueError(f"past_bias is {bias}, but must be three finite numbers: for sink, past and own block")
        self._past_bias = bias

    @property
    def dtype(self) -> torch.dtype:
        return self.pool.dtype

    @property
    def num_frames(self) -> int:
        """Committed frames of every stream. ValueError if they differ."""
        lengths = [stream.num_frames for stream in self.streams]
        if len(set(lengths)) > 1:
            raise ValueError(f"the streams have {lengths} frames, but num_frames is for streams of one length")
        return lengths[0]

    @property
    def position(self) -> Tensor:
        """Committed frames of each stream, int32 [B] on the device: the start frames of the next block for rope_3d."""
        starts = [stream._start_of(self._first_block) for stream in self.streams]
        return torch.tensor(starts, dtype=torch.int32, device=self.pool.device)

    @property
    def visible_frames(self) -> int:
        """Committed frames that some head may still see, of the stream that has most."""
        return max(stream.visible_frames for stream in self.streams)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that are kept for later blocks."""
        return sum(stream.visible_frames for stream in self.streams) * self.frame_seqlen * self.pool._token_nbytes

    def reset(self) -> None:
        """Forgets every frame."""
        for stream in self.streams:
            stream._check_open()
            stream._reset()

    def attend(
        self,
        layer: int,
        q: Tensor,  # [B, L, H, D]
        k: Tensor,  # [B, L, H_kv, D]
        v: Tensor,  # [B, L, H_kv, D]
        softmax_scale: float | None = None,
        block: int = 0,
    ) -> Tensor:  # [B, L, H, D]
        """Attention of an uncommitted block over the visible past and the block's own k and v. Writes nothing.

        The block holds L / frame_seqlen frames; all its queries see the same keys. Block 0 starts at the first frame
        that is not committed; block j sees the blocks before it, as they were written last, as frames of the past.

        Raises:
            TypeError: a dtype that is not the cache's.
            ValueError: a shape that is not the cache's, tokens that are no whole frames, a block that is too long for
                the window or for ``max_frames`` or has another length than it was written with, that follows a block
                which this layer has not written, or that would see frames that were evicted.
        """
        block += self._first_block
        q, k, v = cast_to_autocast_dtype(q, k, v)
        num_frames = self._check_block(layer, k, v)
        if q.dtype != self.dtype:
            raise TypeError(f"q is {_name(q.dtype)}, but the cache holds {_name(self.dtype)}")
        if q.shape[:2] != k.shape[:2] or q.shape[3] != self.pool.head_dim:
            raise ValueError(
                f"q has shape {list(q.shape)}, but must have batch, tokens and head dim "
                f"{[*k.shape[:2], self.pool.head_dim]} like k"
            )
        for stream in self.streams:
            stream._check_rope(self.rope)
            stream._check_turn("q", layer, block, num_frames)
        outs = []
        for stream, *own in zip(self.streams, *(x.split(1) for x in (q, k, v)), strict=True):
            past = stream._past(layer, block, num_frames)
            most = max(map(len, past))
            heads = zip(*(x.chunk(len(past), dim=2) for x in own), strict=True)
            outs.append(
                torch.cat(
                    [
                        self._attend_over(*of_head, _of_head(seen, index, len(past)), most, softmax_scale)
                        for index, (seen, of_head) in enumerate(zip(past, heads, strict=True))
                    ],
                    dim=2,
                )
            )
        return torch.cat(outs)

    def _attend_over(
        self,
        q: Tensor,  # [1, L, H, D]
        k: Tensor,  # [1, L, H_kv, D]
        v: Tensor,  # [1, L, H_kv, D]
        past: list[PastFrame],
        start_frame: int,
        softmax_scale: float | None,
    ) -> Tensor:  # [1, L, H, D]
        """A block of one stream that starts at frame ``start_frame`` for "on_read", over frames that end there."""
        keys = torch.cat((k[0, :0], *(frame.k for frame in past)))[None]
        values = torch.cat((v[0, :0], *(frame.v for frame in past)))[None]
        if self.rope == "on_read":
            q, k = self._rotated(q, start_frame), self._rotated(k, start_frame)
            keys = self._rotated(keys, start_frame - len(past))
        keys, values = torch.cat((keys.to(k.dtype), k), dim=1), torch.cat((values.to(v.dtype), v), dim=1)
        bias = None
        if self.past_bias is not None:
            of_sink, of_past, of_own = self.past_bias
            per_frame = [of_sink if frame.is_sink else of_past for frame in past]
            per_frame += [of_own] * (k.shape[1] // self.frame_seqlen)
            bias = torch.tensor(per_frame, dtype=torch.float64, device=q.device).repeat_interleave(self.frame_seqlen)
        out, _ = masked_softmax_attention(q, keys, values, None, softmax_scale, bias)
        return out

    def _rotated(self, x: Tensor, start_frame: int) -> Tensor:
        return rope_3d(x, (x.shape[1] // self.frame_seqlen, *self.rope_grid), start_frame)

    def write(
        self,
        layer: int,
        k: Tensor,  # [B, L, H_kv, D]
        v: Tensor,  # [B, L, H_kv, D]
        grad_to: tuple[Tensor, Tensor] | None = None,
        block: int = 0,
    ) -> None:
        """Takes the keys and values of one layer of an uncommitted block; ``commit`` makes block 0 the past.

        Until then a block may be written again and again, with as many frames; later blocks read it as it was written
        last. The first write to a block takes its pages and evicts what no block will see.

        Args:
            layer: which layer.
            k, v: keys (after rotary embedding with rope "on_write") and values.
            grad_to: keys and values of the same shapes that receive the gradient in place of k and v, also when
                written under ``torch.no_grad()``. Needs ``grad_through_cache``.
            block: which of the uncommitted blocks, those before it written by this layer.

        Raises:
            TypeError, ValueError: as ``attend``.
            RuntimeError: the pool has too few pages. Nothing is changed then.
        """
        k, v = cast_to_autocast_dtype(k, v)
        num_frames = self._check_block(layer, k, v)
        for stream in self.streams:
            stream._check_rope(self.rope)
            stream._check_turn("k", layer, block, num_frames)
        if grad_to is not None and not self.pool.grad_through_cache:
            raise ValueError("grad_to is given, but grad_through_cache is False: the past is constant")
        self._begin_block(block, num_frames)
        with torch.no_grad():
            stored = self.pool._read_back(layer, k, v)
        if self.pool.grad_through_cache:
            targets = (k, v) if grad_to is None else cast_to_autocast_dtype(*grad_to)
            # With grad_to the values come from a pass without gradient, and yet have one.
            with torch.set_grad_enabled(grad_to is not None or torch.is_grad_enabled()):
                stored = tuple(map(_ValueWithGradientTo.apply, stored, targets))
                self._keep(layer, block, *stored)
        else:
            self._keep(layer, block, *(x.detach() for x in stored))

    def norm_rope_write(
        self,
        layer: int,
        k: Tensor,  # [B, L, H_kv * D]
        v: Tensor,  # [B, L, H_kv, D]
        weight: Tensor,  # [H_kv * D]
        grid: tuple[int, int, int],
        eps: float = 1e-6,
    ) -> Tensor:  # [B, L, H_kv, D]
        """``write`` of block 0's keys as ``qk_norm_rope`` makes them (with rope "on_read" without rotation), and these.

        Args:
            layer: which layer.
            k, v: projected keys, neither normalised nor rotated, and values.
            weight, grid, eps: as in ``qk_norm_rope``.
        """
        k, v = cast_to_autocast_dtype(k, v)
        heads = self.pool.num_heads
        if self.rope == "on_write":
            keys = qk_norm_rope(k, weight, heads, grid, self.position, eps)
        else:
            tokens = k.flatten(0, 1).unsqueeze(1)  # each a sequence of its own, at position 0
            keys = qk_norm_rope(tokens, weight, heads, (1, 1, 1), 0, eps).view(*k.shape[:2], heads, -1)
        self.write(layer, keys, v)
        return keys

    def _begin_block(self, block: int, num_frames: int) -> None:
        plans = [stream._plan(block, num_frames) for stream in self.streams]
        self.pool._take({stream: plan.pages for stream, plan in zip(self.streams, plans, strict=True)})
        for stream, plan in zip(self.streams, plans, strict=True):
            stream._begin_block(block, num_frames, plan)
            stream._rope = self.rope

    def _keep(self, layer: int, block: int, k: Tensor, v: Tensor) -> None:
        for stream, *of_stream in zip(self.streams, k, v, strict=True):
            frames = zip(*(x.split(self.frame_seqlen) for x in of_stream), strict=True)
            stream._blocks[block].layers[layer] = list(frames)

    def commit(self, num_frames: int) -> None:
        """Makes block 0 of ``num_frames`` frames the past; block 1 becomes block 0, and so on.

        Raises:
            ValueError: a layer has not written it, or not this number of frames. Nothing is changed then.
        """
        for stream in self.streams:
            stream._check_open()
            for layer in range(self.pool.num_layers):
                written = len(stream._blocks[0].layers.get(layer, [])) if stream._blocks else 0
                if written != num_frames:
                    raise ValueError(
                        f"num_frames is {num_frames}, but layer {layer} has written {written} frames: commit takes the "
                        "block that every layer has written"
                    )
        for stream in self.streams:
            stream._commit()

    def drop(self, block: int = 0) -> None:
        """Forgets the uncommitted blocks from this one on."""
        if block < 0:
            raise ValueError(f"block is {block}, but must be at least 0")
        for stream in self.streams:
            stream._check_open()
            stream._drop(block)

    def reserve(self, num_frames: int) -> None:
        """Takes the pages of block 0, as its first write does otherwise.

        Raises:
            ValueError, RuntimeError: as ``write``.
        """
        for stream in self.streams:
            stream._check_turn("num_frames", 0, 0, num_frames)
        self._begin_block(0, num_frames)

    def view(self, block: int = 0) -> PagedKVCache:
        """What a block that is not committed sees now, for reading: later writes to the cache do not change it, so that
        a block that is recomputed in backward reads what its forward read, even after eviction."""
        view = copy.copy(self)
        view._first_block = block
        view.streams = [stream._snapshot() for stream in self.streams]
        for stream in view.streams:
            del stream._blocks[block:]
        return view

    def _check_block(self, layer: int, k: Tensor, v: Tensor) -> int:
        """The number of frames of a block that fits the cache."""
        pool = self.pool
        if not 0 <= layer < pool.num_layers:
            raise ValueError(f"layer is {layer}, but must be in [0, {pool.num_layers})")
        for name, tensor in (("k", k), ("v", v)):
            if tensor.dtype != self.dtype:
                raise TypeError(f"{name} is {_name(tensor.dtype)}, but the cache holds {_name(self.dtype)}")
            for what, size, wanted in zip(
                ("batch size", "heads", "head dim"),
                (tensor.shape[0], *tensor.shape[2:]),
                (len(self.streams), pool.num_heads, pool.head_dim),
                strict=True,
            ):
                if size != wanted:
                    raise ValueError(f"{name} has {what} {size}, but the cache has {wanted}")
        if v.shape[1] != k.shape[1]:
            raise ValueError(f"v has {v.shape[1]} tokens, but must have {k.shape[1]} like k")
        if k.shape[1] == 0 or k.shape[1] % self.frame_seqlen:
            raise ValueError(
                f"k has {k.shape[1]} tokens, but must have a positive multiple of frame_seqlen = {self.frame_seqlen}"
            )
        return k.shape[1] // self.frame_seqlen


def _of_head(frames: list[PastFrame], index: int, count: int) -> list[PastFrame]:
    """Frames with one of ``count`` equal parts of their heads."""
    return [
        PastFrame(frame.k.chunk(count, dim=1)[index], frame.v.chunk(count, dim=1)[index], frame.is_sink)
        for frame in frames
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _ValueWithGradientTo(torch.autograd.Function):
    """The first tensor's value, with the gradient sent to the second tensor."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: Tensor, target: Tensor) -> Tensor:
        ctx.dtype = target.dtype
        return value.view_as(value)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad.to(ctx.dtype)
