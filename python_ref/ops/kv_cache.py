"""The keys and values of past blocks, kept in Python lists: what a paged ring buffer must amount to.

Source: the rolling KV cache of Self-Forcing (arXiv 2506.08009), section 3.4, with sink frames as in StreamingLLM
(arXiv 2309.17453).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from python_ref.ops.attention import cast_to_autocast_dtype, masked_softmax_attention
from selfforcing_ext.mask import check_window, visible_past


class PagedKVCache:
    """Keys and values of the frames before the current block, one list of frames per layer.

    Args:
        num_layers: attention layers that share the cache's positions.
        num_heads: K/V heads.
        head_dim: channels per head.
        frame_seqlen: tokens per frame.
        batch_size: videos that are generated together.
        window_frames: frames that stay visible, counted back from the end of the current block, the block itself and
            the sink included. None: all.
        sink_frames: the first frames, always visible.
        max_frames: frames that may be committed in all. None: no limit.
        page_size: accepted for the signature's sake; lists have no pages.
        dtype, device: of the keys and values.
        grad_through_cache: gradient flows from ``attend`` into the tensors that were written; otherwise the past is
            constant.

    ``position`` is ``num_frames`` as an int32 tensor [1] on the device, updated in place.

    Raises:
        ValueError: the window holds less than the sink and a frame.
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
        check_window(window_frames, sink_frames, frames_per_block=1)
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.frame_seqlen = frame_seqlen
        self.batch_size = batch_size
        self.window_frames = window_frames
        self.sink_frames = sink_frames
        self.max_frames = max_frames
        self.dtype = dtype
        self.device = torch.device(device)
        self.grad_through_cache = grad_through_cache
        self.position = torch.zeros(1, dtype=torch.int32, device=device)
        self.reset()

    def reset(self) -> None:
        """Forgets every frame."""
        self.num_frames = 0
        self.position.zero_()
        # frames[layer][frame] is (k, v), each [B, frame_seqlen, H_kv, D], or None once it has left the window.
        self._frames: list[list[tuple[Tensor, Tensor] | None]] = [[] for _ in range(self.num_layers)]
        self._written: dict[int, list[tuple[Tensor, Tensor]]] = {}

    @property
    def visible_frames(self) -> int:
        """Frames that are kept for later blocks."""
        return self.num_frames if self.window_frames is None else min(self.num_frames, self.window_frames)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that are kept."""
        frame = self.batch_size * self.frame_seqlen * self.num_heads * self.head_dim * self.dtype.itemsize
        return 2 * self.num_layers * self.visible_frames * frame

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

        Raises:
            TypeError: a dtype that is not the cache's.
            ValueError: a shape that is not the cache's, tokens that are no whole frames, or a block that is too long
                for the window or for ``max_frames``.
        """
        q, k, v = cast_to_autocast_dtype(q, k, v)
        block_frames = self._check_block(layer, k, v)
        if q.dtype != self.dtype:
            raise TypeError(f"q is {_name(q.dtype)}, but the cache holds {_name(self.dtype)}")
        if q.shape[:2] != k.shape[:2] or q.shape[3] != self.head_dim:
            raise ValueError(
                f"q has shape {list(q.shape)}, but must have batch, tokens and head dim "
                f"{[*k.shape[:2], self.head_dim]} like k"
            )
        self._check_turn("q", block_frames)
        spans = visible_past(self.num_frames, self.num_frames + block_frames, self.window_frames, self.sink_frames)
        past = [self._frames[layer][frame] for start, end in spans for frame in range(start, end)]
        keys, values = zip(*past, (k, v), strict=True)
        out, _ = masked_softmax_attention(q, torch.cat(keys, dim=1), torch.cat(values, dim=1), None, softmax_scale)
        return out

    def write(
        self,
        layer: int,
        k: Tensor,  # [B, L, H_kv, D]
        v: Tensor,  # [B, L, H_kv, D]
        grad_to: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Takes the next block's clean keys and values of one layer; ``commit`` makes them the past.

        Args:
            layer: which layer.
            k, v: keys after rotary embedding, and values.
            grad_to: keys and values of the same shapes that receive the gradient in place of k and v, also when
                written under ``torch.no_grad()``. Needs ``grad_through_cache``.
        """
        k, v = cast_to_autocast_dtype(k, v)
        self._check_turn("k", self._check_block(layer, k, v))
        if grad_to is not None and not self.grad_through_cache:
            raise ValueError("grad_to is given, but grad_through_cache is False: the past is constant")
        if not self.grad_through_cache:
            k, v = k.detach(), v.detach()
        # With grad_to the values come from a pass without gradient, and yet have one.
        with torch.set_grad_enabled(grad_to is not None or torch.is_grad_enabled()):
            if grad_to is not None:
                k_target, v_target = cast_to_autocast_dtype(*grad_to)
                k, v = _ValueWithGradientTo.apply(k, k_target), _ValueWithGradientTo.apply(v, v_target)
            self._written[layer] = list(
                zip(k.split(self.frame_seqlen, dim=1), v.split(self.frame_seqlen, dim=1), strict=True)
            )

    def commit(self, num_frames: int) -> None:
        """Makes the written block of ``num_frames`` frames the past and forgets what has left the window.

        Raises:
            ValueError: a layer has not written, or not this number of frames.
        """
        for layer in range(self.num_layers):
            written = len(self._written.get(layer, []))
            if written != num_frames:
                raise ValueError(
                    f"num_frames is {num_frames}, but layer {layer} has written {written} frames: commit takes the "
                    "block that every layer has written"
                )
        for layer, frames in enumerate(self._frames):
            frames.extend(self._written[layer])
        self._written = {}
        self.num_frames += num_frames
        self.position.fill_(self.num_frames)
        if self.window_frames is not None:
            for frames in self._frames:
                for frame in range(self.sink_frames, self.num_frames - (self.window_frames - self.sink_frames)):
                    frames[frame] = None

    def view(self) -> PagedKVCache:
        """What the cache holds now, for reading: later writes to the cache do not change it, so that a block that is
        recomputed in backward reads what its forward read, even after eviction."""
        view = copy.copy(self)
        view.position = self.position.clone()
        view._frames = [list(frames) for frames in self._frames]
        view._written = {}
        return view

    def _check_block(self, layer: int, k: Tensor, v: Tensor) -> int:
        """The number of frames of a block that fits the cache."""
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer is {layer}, but must be in [0, {self.num_layers})")
        for name, tensor in (("k", k), ("v", v)):
            if tensor.dtype != self.dtype:
                raise TypeError(f"{name} is {_name(tensor.dtype)}, but the cache holds {_name(self.dtype)}")
            for what, size, wanted in zip(
                ("batch size", "heads", "head dim"),
                (tensor.shape[0], *tensor.shape[2:]),
                (self.batch_size, self.num_heads, self.head_dim),
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
        block_frames = k.shape[1] // self.frame_seqlen
        check_window(self.window_frames, self.sink_frames, block_frames)
        return block_frames

    def _check_turn(self, name: str, block_frames: int) -> None:
        """Raises ValueError unless a block of this length can be the next."""
        if self.max_frames is not None and self.num_frames + block_frames > self.max_frames:
            raise ValueError(
                f"{name} has {block_frames} frames after {self.num_frames} committed ones, but max_frames is "
                f"{self.max_frames}"
            )
        for written in self._written.values():
            if len(written) != block_frames:
                raise ValueError(
                    f"{name} has {block_frames} frames, but must have {len(written)} like the block that layers "
                    f"{sorted(self._written)} have written and that is not committed yet"
                )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _ValueWithGradientTo(torch.autograd.Function):
    """The first tensor's value, with the gradient sent to the second tensor."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: Tensor, target: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad
