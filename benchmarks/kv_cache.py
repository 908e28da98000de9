"""The paged cache against what people do without one.

    python benchmarks/kv_cache.py [--part write|evict|attend|streams ...] [--size demo|wan ...]
        [--dtype float32|bfloat16 ...] [--page-size N ...] [--threads N]

"write": a block into every layer of a full window, so that each write evicts as many frames as it brings; the peer
keeps a contiguous window and moves it up by a block, as the published rolling cache does. GB/s counts the bytes of the
block's keys and values, read and written; "of copy" divides it by what Tensor.copy_ reaches on as many bytes in the
same turns.

"evict": the same at the reference scale of Wan2.1 1.3B, 30 layers and a window of 21 frames (it takes 13 GB); and what
eviction alone costs, without the copy of the block's keys and values that both need.

"attend": a block reads a window whose pages have wrapped around; the peer is our own attention over the same keys in
one contiguous tensor. Then the same pages read in other ways, against the plain ones: quantised, with biases, and
rotated on reading (there a side is all from normalised queries and keys to the result, the plain one with qk_norm_rope,
the other with the normalisation alone). "few" has 64 queries, where the time goes into reading.

"streams": 64 videos of different lengths in one call, against a call for each.

All of a row run in turns in one process; times are medians.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from timing import median_times

from selfforcing_ext import PagedKVCache, PagePool, block_causal_attention, qk_norm_rope


@dataclass(frozen=True)
class Size:
    batch: int
    grid: tuple[int, int]  # tokens of a frame
    num_heads: int
    head_dim: int
    num_layers: int
    window_frames: int
    sink_frames: int
    block_frames: int

    @property
    def frame_seqlen(self) -> int:
        return self.grid[0] * self.grid[1]


SIZES = {
    # configs/demo.yaml, and Wan2.1 1.3B at 480x832 (arXiv 2503.20314), three of its layers, with a window of 6 frames
    "demo": Size(16, (4, 4), 3, 32, 4, 12, 3, 3),
    "wan": Size(1, (30, 52), 12, 128, 3, 6, 1, 3),
}
WAN_WINDOW = replace(SIZES["wan"], num_layers=30, window_frames=21, sink_frames=0)
WAYS: dict[str, dict[str, Any]] = {
    "int8": {"quantization": "int8"},
    "fp8_e4m3": {"quantization": "fp8_e4m3"},
    "int4": {"quantization": "int4"},
    "rotated": {"rope": "on_read"},
    "biased": {"past_bias": (-1.0, -0.5, 0.0)},
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


def make_cache(size: Size, dtype: torch.dtype, page_size: int | None, **options: Any) -> PagedKVCache:
    if options.get("rope") == "on_read":
        options["rope_grid"] = size.grid
    return PagedKVCache(
        size.num_layers,
        size.num_heads,
        size.head_dim,
        size.frame_seqlen,
        size.batch,
        window_frames=size.window_frames,
        sink_frames=size.sink_frames,
        page_size=page_size,
        dtype=dtype,
        **options,
    )


def fill(cache: PagedKVCache, size: Size, k: Tensor, v: Tensor) -> PagedKVCache:
    """Takes a cache round its ring more than once."""
    for _ in range(2 * size.window_frames // size.block_frames + 1):
        write_block(cache, size, k, v)
    return cache


def write_block(cache: PagedKVCache, size: Size, k: Tensor, v: Tensor) -> None:
    for layer in range(size.num_layers):
        cache.write(layer, k, v)
    cache.commit(size.block_frames)


def block_of(size: Size, dtype: torch.dtype, tokens: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    shape = (size.batch, tokens or size.block_frames * size.frame_seqlen, size.num_heads, size.head_dim)
    q, k, v = (torch.randn(shape).to(dtype) for _ in range(3))
    return q, k, v


def head(name: str, dtype: torch.dtype, page_size: int) -> str:
    return f"{name:5s} {str(dtype).removeprefix('torch.'):9s} page {page_size:4d}"


def measure_write(name: str, size: Size, dtype: torch.dtype, page_size: int | None, seconds: float) -> None:
    _, k, v = block_of(size, dtype)
    cache, shifting = fill(make_cache(size, dtype, page_size), size, k, v), ShiftingCache(size, dtype)
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
    print(
        f"{head(name, dtype, cache.page_size)}  write, {size.num_layers} layers, window {size.window_frames}, "
        f"blocks of {size.block_frames}  {1e3 * ours:9.3f} ms  shifting {1e3 * peer:9.3f} ms  "
        f"ratio {peer / ours:5.2f}  {moved / ours / 1e9:6.2f} GB/s  {ceiling / ours:4.2f} of copy"
    )


def measure_eviction(dtype: torch.dtype, page_size: int | None, seconds: float) -> None:
    """What eviction costs beside the copy of the block: the bookkeeping of ours, the moving of the peer's."""
    for block_frames in (3, 1):
        size = replace(WAN_WINDOW, block_frames=block_frames)
        measure_write("wan", size, dtype, page_size, seconds)
        # One layer of a head of 8 channels: next to nothing is written, and the bookkeeping is the same.
        thin = replace(size, num_layers=1, num_heads=1, head_dim=8)
        _, k, v = block_of(thin, dtype)
        cache = fill(make_cache(thin, dtype, page_size), thin, k, v)
        _, k, v = block_of(size, dtype)
        shifting = ShiftingCache(replace(size, num_layers=1), dtype)
        moved = shifting.layers[0]

        def move(moved: tuple[Tensor, Tensor] = moved, new: int = k.shape[1]) -> None:
            for window in moved:
                window[:, :-new] = window[:, new:].clone()

        ours, peer = median_times([lambda c=cache, t=thin, a=k, b=v: evict_once(c, t, a, b), move], seconds)
        peer *= size.num_layers
        print(
            f"{head('wan', dtype, cache.page_size)}  eviction alone, blocks of {block_frames}: at most "
            f"{1e3 * ours:7.3f} ms and no byte moved, shifting {1e3 * peer:9.3f} ms  ratio {peer / ours:7.0f}"
        )


def evict_once(cache: PagedKVCache, size: Size, k: Tensor, v: Tensor) -> None:
    write_block(cache, size, k[:, :, :1, :8], v[:, :, :1, :8])


def measure_attend(name: str, size: Size, dtype: torch.dtype, page_size: int | None, seconds: float) -> None:
    q, k, v = block_of(size, dtype)
    plain = fill(make_cache(size, dtype, page_size), size, k, v)
    past = (size.window_frames - size.block_frames) * size.frame_seqlen
    tokens = q.shape[1]
    keys, values = block_of(size, dtype, past + tokens)[:2]
    ours, peer = median_times(
        [lambda: plain.attend(0, q, k, v), lambda: block_causal_attention(q, keys, values)], seconds
    )
    operations = 4 * size.batch * size.num_heads * size.head_dim * tokens * (past + tokens)
    print(
        f"{head(name, dtype, plain.page_size)}  attend {1e3 * ours:8.3f} ms  contiguous {1e3 * peer:8.3f} ms  "
        f"ratio {peer / ours:5.2f}  {operations / ours / 1e9:6.1f} GFLOP/s"
    )
    weight = torch.ones(size.num_heads * size.head_dim, dtype=dtype)
    grid = (q.shape[1] // size.frame_seqlen, *size.grid)

    def rotate_and_attend(cache: PagedKVCache) -> None:
        """What self-attention does from its projections on."""
        if cache.rope == "on_read":
            where: tuple[Any, ...] = (1, 1, 1), 0
            tokens = [x.view(-1, 1, size.num_heads * size.head_dim) for x in (q, k)]
        else:
            where = grid, cache.position
            tokens = [x.flatten(2) for x in (q, k)]
        rotated = (qk_norm_rope(x, weight, size.num_heads, *where, 1e-6).view(q.shape) for x in tokens)
        cache.attend(0, *rotated, v)

    for way, options in WAYS.items():
        other = fill(make_cache(size, dtype, page_size, **options), size, k, v)
        run = rotate_and_attend if way == "rotated" else (lambda cache: cache.attend(0, q, k, v))
        ours, peer = median_times([partial(run, other), partial(run, plain)], seconds)
        print(
            f"{head(name, dtype, plain.page_size)}  attend, {way:8s} {1e3 * ours:8.3f} ms  plain {1e3 * peer:8.3f} ms  "
            f"ratio {peer / ours:5.2f}  pages {plain.nbytes / other.nbytes:4.2f} times smaller"
        )


def measure_few(dtype: torch.dtype, page_size: int | None, seconds: float) -> None:
    """64 queries on 32,760 keys of the past: frames of 64 tokens, of which the past has 511."""
    size = Size(1, (8, 8), 12, 128, 1, 512, 0, 1)
    measure_attend("few", size, dtype, page_size, seconds)


def measure_streams(name: str, size: Size, dtype: torch.dtype, page_size: int | None, seconds: float) -> None:
    """One frame of each of 64 videos, of 0 to 2 window_frames frames."""
    streams, frames = 64, 2 * size.window_frames
    pages = -(-frames * size.frame_seqlen // (page_size or 64)) + 1
    pool = PagePool(streams * pages, page_size or 64, 1, size.num_heads, size.head_dim, dtype)
    made = [pool.open_stream(frame_seqlen=size.frame_seqlen) for _ in range(streams)]
    singles = [PagedKVCache.of_streams([stream]) for stream in made]
    for index, single in enumerate(singles):
        length = index * frames // streams
        if length:
            _, k, v = block_of(replace(size, batch=1, block_frames=length), dtype)
            single.write(0, k, v)
            single.commit(length)
    batch = PagedKVCache.of_streams(made)
    q, k, v = block_of(replace(size, batch=streams, block_frames=1), dtype)

    def one_by_one() -> None:
        for index, single in enumerate(singles):
            at = slice(index, index + 1)
            single.attend(0, q[at], k[at], v[at])

    ours, peer = median_times([lambda: batch.attend(0, q, k, v), one_by_one], seconds)
    print(
        f"{head(name, dtype, pool.page_size)}  {streams} streams of 0 to {frames} frames in one call "
        f"{1e3 * ours:9.3f} ms  in {streams} calls {1e3 * peer:9.3f} ms  ratio {peer / ours:5.2f}"
    )


PARTS = ("write", "evict", "attend", "streams")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=["write", "attend", "streams"])
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
    dtypes = [getattr(torch, name) for name in arguments.dtype]
    measures = {"write": measure_write, "attend": measure_attend, "streams": measure_streams}
    for page_size in arguments.page_size:
        for part in arguments.part:
            if part == "evict":
                measure_eviction(torch.bfloat16, page_size, arguments.seconds)
                continue
            for name in arguments.size:
                for dtype in dtypes:
                    measures[part](name, SIZES[name], dtype, page_size, arguments.seconds)
            if part == "attend":
                for dtype in dtypes:
                    measure_few(dtype, page_size, arguments.seconds)


if __name__ == "__main__":
    main()
