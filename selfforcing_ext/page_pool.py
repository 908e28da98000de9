"""The memory of KV caches: pages of keys and values that streams share.

Source: pages as in PagedAttention (arXiv 2309.06180).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from selfforcing_ext.attention import Past
from selfforcing_ext.checks import FLOAT_DTYPES, check_head_dim, dtype_name
from selfforcing_ext.integers import check_integer
from selfforcing_ext.library import PageTable
from selfforcing_ext.stream import Step, Stream, load_stream

#: Formats of quantised pages (csrc/geometry/pages.h): the dtype that holds them, elements in each, and channels that
#: share a scale (None: all of a head).
QUANTIZATIONS: dict[str, tuple[torch.dtype, int, int | None]] = {
    "int8": (torch.int8, 1, None),
    "fp8_e4m3": (torch.float8_e4m3fn, 1, None),
    "int4": (torch.uint8, 2, 32),
}


@dataclass(frozen=True)
class PoolStats:
    """How the pages of a pool are used; what is neither used nor pinned is free."""

    num_pages: int
    used: int  # held by at least one stream
    shared: int  # of these, held by more than one
    pinned: int  # held by no stream any more, but a view or a recorded graph may still read them
    free: int
    nbytes: int


class LayerPages(NamedTuple):
    """The memory of one layer."""

    k_pages: Tensor  # [P, page_size, H_kv, D]; quantised as QUANTIZATIONS says
    v_pages: Tensor
    k_scales: Tensor | None  # of quantised pages: bfloat16 [P, page_size, H_kv, groups of channels]
    v_scales: Tensor | None


class PagePool:
    """Pages of keys and values for every layer, handed out to streams.

    Args:
        num_pages: pages per layer.
        page_size: tokens per page.
        num_layers: attention layers; a page has room for its tokens in each of them.
        num_heads: K/V heads.
        head_dim: channels per head, a multiple of 8 up to 256.
        dtype: of the keys and values that are written and read: float32, bfloat16 or float16.
        device: of the pages.
        quantization: how pages hold them: None as they are; "int8" or "fp8_e4m3" with a scale per token and head,
            "int4" with one per 32 channels (head_dim is a multiple of 32 then). They are rounded when written and
            restored inside the attention kernel.
        key_offset: float32 [num_layers, num_heads, head_dim], subtracted from keys before they are quantised and added
            again when they are read: with the mean of each channel, what is left is smaller. None: 0.
        grad_through_cache: gradient flows from attention into the keys and values that were written, by the same
            ``PagedKVCache``; its streams cannot fork or roll back, nor have staged blocks.

    Raises:
        TypeError: a dtype that is not accepted, or an argument of another type.
        ValueError: a number out of range, an unknown quantisation, or a key_offset of another shape, not finite or
            without one.
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
        sizes = {"num_layers": num_layers, "num_heads": num_heads, "page_size": page_size, "num_pages": num_pages}
        for name, value in sizes.items():
            check_integer(name, value, least=1)
        check_head_dim("head_dim", head_dim)
        if dtype not in FLOAT_DTYPES:
            raise TypeError(f"dtype is {dtype_name(dtype)}, but must be float32, bfloat16 or float16")
        if quantization not in (None, *QUANTIZATIONS):
            raise ValueError(f"quantization is {quantization!r}, but must be None or one of {', '.join(QUANTIZATIONS)}")
        if quantization == "int4" and head_dim % 32:
            raise ValueError(f"head_dim is {head_dim}, but must be a multiple of 32 with quantization 'int4'")
        self.page_size = page_size
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.dtype = dtype
        self.device = torch.empty(0, device=device).device  # with its index
        self.quantization = quantization
        self.grad_through_cache = grad_through_cache
        self.key_offset = self._checked_offset(key_offset)
        self.table = PageTable(page_size)
        self.layers: list[LayerPages] = []
        # The same memory as autograd saves it, with version counters of its own. Autograd would take every write for a
        # change of what it saved; but pages that a recorded attend reads are pinned and not written.
        self.saved_layers: list[LayerPages] = []
        self.grow(num_pages)

    def open_stream(
        self,
        window_frames: int | None = None,
        sink_frames: int = 0,
        *,
        frame_seqlen: int,
        max_frames: int | None = None,
        rollback_frames: int = 0,
    ) -> Stream:
        """A stream without frames, see ``Stream`` for the arguments."""
        return Stream(self, frame_seqlen, window_frames, sink_frames, max_frames, rollback_frames)

    def load_stream(self, path: str | os.PathLike[str]) -> Stream:
        """A stream as ``Stream.save`` left it, in new pages.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds no stream, or one of other layers, heads, channels, dtype, quantisation or key_offset.
            RuntimeError: the pool has too few free pages. Nothing is changed then.
        """
        return load_stream(self, path)

    @property
    def num_pages(self) -> int:
        return self.table.num_pages

    @property
    def nbytes(self) -> int:
        """Bytes of the pages of all layers, scales included."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer if tensor is not None)

    def stats(self) -> PoolStats:
        stats = self.table.stats()
        free = self.table.num_free_pages
        return PoolStats(self.num_pages, stats.used, stats.shared, stats.pinned, free, self.nbytes)

    def grow(self, num_pages: int) -> None:
        """Adds pages. Every layer's memory is allocated anew and copied, so graphs captured before are no longer valid;
        views keep what they read.

        Raises:
            ValueError: ``num_pages`` is below 0.
        """
        check_integer("num_pages", num_pages, least=0)
        total = self.num_pages + num_pages
        grown = [self._allocate(total) for _ in range(self.num_layers)]
        for old, new in zip(self.layers, grown, strict=False):
            for held, tensor in zip(old, new, strict=True):
                if held is not None and tensor is not None:
                    _bits(tensor)[: held.shape[0]] = _bits(held)
        self.layers = grown
        self.saved_layers = [_alias(layer) for layer in grown]
        self.table.add_pages(num_pages)

    def advance(self, steps: list[Step], may_grow: bool = False) -> None:
        """Gives streams pages to write to, and takes back what they do not keep.

        Args:
            steps: what each stream does.
            may_grow: add pages where they do not suffice.

        Raises:
            RuntimeError: there are not enough pages. Nothing is changed then.
        """
        shortage, copies = self.table.advance(steps)
        if shortage and may_grow:
            self.grow(max(shortage, self.num_pages))
            shortage, copies = self.table.advance(steps)
        if shortage:
            needed = sum(-(-(end - start) // self.page_size) for _, _, (start, end), _ in steps)
            pinned = self.table.stats().pinned
            held = f", {pinned} pages are held by views and recorded graphs alone: let go of these" if pinned else ""
            raise RuntimeError(
                f"the pool is exhausted: {len(steps)} streams write {needed} pages, and {shortage} more than the "
                f"{self.table.num_free_pages} free ones of {self.num_pages} are needed{held}; close streams, or make a "
                "pool with a larger num_pages"
            )
        if copies:
            sources, targets = (list(pages) for pages in zip(*copies, strict=True))
            with torch.no_grad():
                for tensor in (tensor for layer in self.layers for tensor in layer if tensor is not None):
                    _bits(tensor)[targets] = _bits(tensor)[sources]

    def past(
        self,
        layers: list[LayerPages],
        layer: int,
        page_table: Tensor,
        spans: Tensor,
        rope_table: Tensor | None = None,
        rope_grid: tuple[int, ...] = (),
    ) -> Past:
        """What the attention op reads of one layer; ``layers`` is the pool's memory, of now or of an earlier view."""
        pages = layers[layer]
        offset = None if self.key_offset is None else self.key_offset[layer]
        return Past(
            pages.k_pages,
            pages.v_pages,
            page_table,
            spans,
            pages.k_scales,
            pages.v_scales,
            offset,
            rope_table,
            rope_grid,
        )

    def _allocate(self, num_pages: int) -> LayerPages:
        shape = (num_pages, self.page_size, self.num_heads)
        if self.quantization is None:
            k_pages, v_pages = (
                torch.empty(*shape, self.head_dim, dtype=self.dtype, device=self.device) for _ in range(2)
            )
            return LayerPages(k_pages, v_pages, None, None)
        dtype, packed, group = QUANTIZATIONS[self.quantization]
        k_pages, v_pages = (
            torch.empty(*shape, self.head_dim // packed, dtype=dtype, device=self.device) for _ in range(2)
        )
        groups = self.head_dim // (group or self.head_dim)
        k_scales, v_scales = (torch.empty(*shape, groups, dtype=torch.bfloat16, device=self.device) for _ in range(2))
        return LayerPages(k_pages, v_pages, k_scales, v_scales)

    def _checked_offset(self, offset: Tensor | None) -> Tensor | None:
        if offset is None:
            return None
        if self.quantization is None:
            raise ValueError("key_offset is given, but quantization is None: only quantised pages have an offset")
        wanted = [self.num_layers, self.num_heads, self.head_dim]
        if not isinstance(offset, Tensor):
            raise TypeError(f"key_offset is a {type(offset).__name__}, but must be a torch.Tensor")
        if list(offset.shape) != wanted:
            raise ValueError(
                f"key_offset has shape {list(offset.shape)}, but must have [num_layers, num_heads, head_dim] = {wanted}"
            )
        offset = offset.detach().to(self.device, torch.float32).contiguous()
        if not bool(offset.isfinite().all()):
            raise ValueError("key_offset has an infinity or NaN, but must be finite")
        return offset


def _alias(layer: LayerPages) -> LayerPages:
    k_scales, v_scales = (None if scales is None else scales.data for scales in layer[2:])
    return LayerPages(layer.k_pages.data, layer.v_pages.data, k_scales, v_scales)


def _bits(tensor: Tensor) -> Tensor:
    """The same memory in a dtype that indexing knows: fp8 has few operations."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
