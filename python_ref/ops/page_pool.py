"""What streams share: a number of pages, and what keys and values become when they are stored.

Pages as in PagedAttention (arXiv 2309.06180). Here keys and values lie in Python lists; pages are only counted.
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from python_ref.ops.quantization import INT4_GROUP, LARGEST, dequantise, quantise
from python_ref.ops.stream import Stream

Pages = dict[int, object]  # by logical page: token // page_size of a stream; the object stands for the page


@dataclass(frozen=True)
class PoolStats:
    """Pages of a pool: in all, held by a stream, held by more than one, free, held by readers alone; and its bytes."""

    num_pages: int
    used: int
    shared: int
    free: int
    pinned: int
    nbytes: int


class PagePool:
    """Room for the keys and values of several streams.

    Args:
        num_pages: pages that the streams share.
        page_size: tokens per page.
        num_layers, num_heads, head_dim: of the keys and values.
        dtype, device: of the keys and values that are written and read.
        quantization: how they are kept: None (as they are), "int8", "fp8_e4m3" or "int4"
            (python_ref/ops/quantization.py).
        key_offset: float32 [num_layers, num_heads, head_dim], subtracted from keys before they are quantised and added
            when they are read. None: 0.
        grad_through_cache: gradient flows from what is read into what was written; the rounding of quantised pages
            passes it straight through.

    Raises:
        ValueError: a number below 1, an unknown quantization, int4 with a head_dim that is no multiple of 32, or a
            key_offset of another shape or without quantization.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        quantization: str | None = None,
        key_offset: Tensor | None = None,
        grad_through_cache: bool = False,
    ) -> None:
        sizes = {"num_pages": num_pages, "page_size": page_size, "num_layers": num_layers, "num_heads": num_heads}
        for name, size in (sizes | {"head_dim": head_dim}).items():
            if size < 1:
                raise ValueError(f"{name} is {size}, but must be at least 1")
        if quantization is not None and quantization not in LARGEST:
            raise ValueError(
                f"quantization is {quantization!r}, but must be None or one of {', '.join(map(repr, LARGEST))}"
            )
        if quantization == "int4" and head_dim % INT4_GROUP:
            raise ValueError(f"head_dim is {head_dim}, but quantization 'int4' takes a multiple of {INT4_GROUP}")
        if key_offset is not None:
            if quantization is None:
                raise ValueError("key_offset is given, but quantization is None: keys are stored as they are")
            if list(key_offset.shape) != [num_layers, num_heads, head_dim]:
                raise ValueError(
                    f"key_offset has shape {list(key_offset.shape)}, but must be [num_layers, num_heads, head_dim] = "
                    f"{[num_layers, num_heads, head_dim]}"
                )
        self.num_pages = num_pages
        self.page_size = page_size
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.dtype = dtype
        self.device = torch.device(device)
        self.quantization = quantization
        self.key_offset = key_offset
        self.grad_through_cache = grad_through_cache
        self._grows = False  # pages are added when there are too few
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()

    def open_stream(
        self,
        window_frames: int | None = None,
        sink_frames: int = 0,
        *,
        frame_seqlen: int,
        max_frames: int | None = None,
        rollback_frames: int = 0,
    ) -> Stream:
        """A new video without frames; arguments as of ``Stream``."""
        return self._opened(Stream(self, window_frames, sink_frames, frame_seqlen, max_frames, rollback_frames))

    def load_stream(self, path: str | Path) -> Stream:
        """A stream as ``Stream.save`` left it.

        Raises:
            ValueError: what is stored there is not of this pool's layers, heads, head dim, dtype or quantization.
            RuntimeError: the free pages do not suffice.
        """
        stream = Stream._load(self, path)
        self._take({stream: stream._pages})
        return self._opened(stream)

    def stats(self) -> PoolStats:
        """Pages that are used, shared and free. Nothing is ever pinned: a list stays while someone reads it."""
        holders = Counter(page for stream in self._streams for page in stream._pages.values())
        shared = sum(count > 1 for count in holders.values())
        return PoolStats(self.num_pages, len(holders), shared, self.num_pages - len(holders), 0, self.nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys, values and scales of all pages."""
        return self.num_pages * self.page_size * self._token_nbytes

    @property
    def _token_nbytes(self) -> int:
        """Bytes of one token's keys and values of all layers; a scale is bfloat16."""
        per_head = {
            None: self.head_dim * self.dtype.itemsize,
            "int8": self.head_dim + 2,
            "fp8_e4m3": self.head_dim + 2,
            "int4": self.head_dim // 2 + 2 * (self.head_dim // INT4_GROUP),
        }[self.quantization]
        return 2 * self.num_layers * self.num_heads * per_head

    def _opened(self, stream: Stream) -> Stream:
        self._streams.add(stream)
        return stream

    def _is_shared(self, page: object) -> bool:
        return sum(page in stream._pages.values() for stream in self._streams) > 1

    def _take(self, pages: dict[Stream, Pages]) -> None:
        """Raises RuntimeError unless there are pages enough when these streams hold these pages."""
        before = {page for stream in self._streams for page in stream._pages.values()}
        kept = {page for stream in self._streams for page in stream._pages.values() if stream not in pages}
        wanted = kept.union(*(held.values() for held in pages.values()))
        if len(wanted) <= self.num_pages:
            return
        if not self._grows:
            needed = len(wanted - before)
            free = self.num_pages - len(wanted & before)
            raise RuntimeError(
                f"{needed} pages are needed, but {free} are free of the {self.num_pages} in the pool: close or "
                "shorten streams, or make the pool larger"
            )
        self.num_pages = len(wanted)

    def _read_back(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [..., H_kv, D] as they are read once they have been stored."""
        if self.quantization is None:
            return k, v
        offset = None if self.key_offset is None else self.key_offset[layer]
        k_elements, v_elements = quantise(k, self.quantization, offset), quantise(v, self.quantization)
        return dequantise(*k_elements, self.quantization, offset), dequantise(*v_elements, self.quantization)
