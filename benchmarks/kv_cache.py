"""The paged cache against one that shifts: cost of a block's write with eviction, and of reading pages.

    python benchmarks/kv_cache.py [--size demo|wan ...] [--dtype float32|bfloat16 ...] [--page-size N ...] [--threads N]

"write" takes a block into every layer of a full window, so that each write evicts as many frames as it brings; the peer
keeps a contiguous window and moves it up by a block, as the published rolling cache does. "attend" reads a window whose
pages have wrapped around; the peer is our own attention over the same keys in one contiguous tensor. Both of a pair run
in turns in one process; times are medians. GB/s counts the bytes of the block's keys and values, read and written; "of
copy" divides it by what Tensor.copy_ reaches on as many bytes in the same turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from selfforcing_ext import PagedKVCache, block_causal_attention


@dataclass(frozen=True)
class Size:
    batch: int
    frame_seqlen: int
    num_heads: int
    head_dim: int
    num_layers: int
    window_frames: int
    sink_frames: int
    block_frames: int


SIZES = {
    # configs/demo.yaml, and Wan2.1 1.3B at 480x832 (arXiv 2503.20314), three of its layers, with a window of 6 frames
    "demo": Size(16, 16, 3, 32, 4, 12, 3, 3),
    "wan": Size(1, 1560, 12, 128, 3, 6, 1, 3),
}


class ShiftingCache:
    """A contiguous window per layer; a full one moves up by a block before the block is written."""

    def __init__(self, size: Size, dtype: torch.dtype) -> None:
        tokens = size.window_frames * size.frame_seqlen
        shape = (size.batch, tokens, size.num_heads, size.head_dim)
        self.sink = size.sink_frames * size.frame_seqlen
        self.layers = [
            (torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in range(size.num_layers)
        ]

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        new = k.shape[1]
        for window, block in zip(self.layers[layer], (k, v), strict=True):
            window[:, self.sink : -new] = window[:, self.sink + new :].clone()
            window[:, -new:] = block


def median_times(functions: list[Callable[[], object]], seconds: float) -> list[float]:
    """Median seconds of each function, called in turns."""
    for function in functions:
        function()
    times: list[list[float]] = [[] for _ in functions]
    end = time.perf_counter() + seconds
    while len(times[0]) < 3 or time.perf_counter() < end:
        for function, measured in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            measured.append(time.perf_counter() - start)
    return [statistics.median(measured) for measured in times]


def filled_cache(size: Size, dtype: torch.dtype, page_size: int | None, k: Tensor, v: Tensor) -> PagedKVCache:
    """A cache that has been round its ring more than once."""
    cache = PagedKVCache(
        size.num_layers,
        size.num_heads,
        size.head_dim,
        size.frame_seqlen,
        size.batch,
        window_frames=size.window_frames,
        sink_frames=size.sink_frames,
        page_size=page_size,
        dtype=dtype,
    )
    for _ in range(2 * size.window_frames // size.block_frames + 1):
        write_block(cache, size, k, v)
    return cache


def write_block(cache: PagedKVCache, size: Size, k: Tensor, v: Tensor) -> None:
    for layer in range(size.num_layers):
        cache.write(layer, k, v)
    cache.commit(size.block_frames)


@torch.no_grad()
def measure(name: str, size: Size, dtype: torch.dtype, page_size: int | None, seconds: float) -> None:
    tokens = size.block_frames * size.frame_seqlen
    q, k, v = (torch.randn(size.batch, tokens, size.num_heads, size.head_dim).to(dtype) for _ in range(3))
    cache, shifting = filled_cache(size, dtype, page_size, k, v), ShiftingCache(size, dtype)
    target = torch.empty_like(k)

    def shift() -> None:
        for layer in range(size.num_layers):
            shifting.write(layer, k, v)

    def copy() -> None:
        for _ in range(size.num_layers):
            target.copy_(k)
            target.copy_(v)

    ours, peer, ceiling = median_times([lambda: write_block(cache, size, k, v), shift, copy], seconds)
    moved = 2 * 2 * size.num_layers * k.nbytes
    head = f"{name:5s} {str(dtype).removeprefix('torch.'):9s} page {cache.page_size:5d}"
    print(
        f"{head}  write  {1e3 * ours:8.3f} ms  shifting {1e3 * peer:8.3f} ms  ratio {peer / ours:5.2f}"
        f"  {moved / ours / 1e9:6.2f} GB/s  {ceiling / ours:4.2f} of copy"
    )

    past = (size.window_frames - size.block_frames) * size.frame_seqlen
    keys, values = (torch.randn(size.batch, past + tokens, size.num_heads, size.head_dim).to(dtype) for _ in range(2))
    ours, peer = median_times(
        [lambda: cache.attend(0, q, k, v), lambda: block_causal_attention(q, keys, values)], seconds
    )
    operations = 4 * size.batch * size.num_heads * size.head_dim * tokens * (past + tokens)
    print(
        f"{head}  attend {1e3 * ours:8.3f} ms  contiguous {1e3 * peer:6.3f} ms  ratio {peer / ours:5.2f}"
        f"  {operations / ours / 1e9:6.1f} GFLOP/s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument(
        "--dtype", nargs="+", choices=["float32", "bfloat16", "float16"], default=["float32", "bfloat16"]
    )
    parser.add_argument("--page-size", nargs="+", type=int, default=[None])
    parser.add_argument("--seconds", type=float, default=1.0, help="per row")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.threads} threads; ratio is the peer's time over ours")
    for name in arguments.size:
        for dtype in arguments.dtype:
            for page_size in arguments.page_size:
                measure(name, SIZES[name], getattr(torch, dtype), page_size, arguments.seconds)


if __name__ == "__main__":
    main()
