"""What a past in pages may be besides pages of q's dtype: time beside plain pages of the same shape.

    python benchmarks/attention_past.py [--size NAME ...] [--dtype float32|bfloat16|float16 ...] [--seconds S]
                                        [--threads N]

Per size, all kinds of past run in turns in one process; times are medians, "speed" is the time on plain pages over the
time. The pages are read in random order. "64 streams" attends with streams of very different lengths in one call, and
in one call per stream.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from selfforcing_ext.attention import Past, attention_over_spans, full_table, span_records

PAGE_SIZE = 64


@dataclass(frozen=True)
class Size:
    batch: int
    queries: int  # and keys of the block
    past: int
    heads: int
    head_dim: int
    frame: tuple[int, int]  # rows and columns


SIZES = {
    # One head of a block of three frames on eighteen of Wan2.1 1.3B at 480x832 (arXiv 2503.20314), a few queries of all
    # heads on a window of 21 frames, and a block of configs/demo.yaml
    "wan": Size(1, 4680, 28080, 1, 128, (30, 52)),
    "few queries": Size(1, 64, 32760, 12, 128, (30, 52)),
    "demo": Size(16, 48, 144, 3, 32, (4, 4)),
}


def rope_table(head_dim: int, grid: tuple[int, int, int]) -> Tensor:
    """Cosine and sine per axis, position and pair (csrc/geometry/rope_axes.h)."""
    spatial = head_dim // 6
    angles = [
        torch.outer(torch.arange(size).double(), 10000.0 ** -(torch.arange(pairs).double() / pairs)).flatten()
        for size, pairs in zip(grid, (head_dim // 2 - 2 * spatial, spatial, spatial), strict=True)
    ]
    return torch.cat([torch.stack((a.cos(), a.sin()), -1) for a in angles]).float()


def pasts(size: Size, dtype: torch.dtype) -> dict[str, Past]:
    row = -(-size.past // PAGE_SIZE)
    pages = size.batch * row
    shape = (pages, PAGE_SIZE, size.heads, size.head_dim)
    table = torch.randperm(pages).int().view(size.batch, row)
    sink = size.frame[0] * size.frame[1]
    spans = torch.tensor([[0, sink], [sink, size.past]]).expand(size.batch, 1, 2, 2)
    plain = Past(*(torch.randn(shape).to(dtype) for _ in range(2)), table, span_records(spans))

    def quantised(elements: Callable[[], Tensor], scale: float, groups: int = 1) -> Past:
        scales = (torch.full((*shape[:-1], groups), scale, dtype=torch.bfloat16) for _ in range(2))
        offset = torch.randn(size.heads, size.head_dim)
        return Past(elements(), elements(), table, span_records(spans), *scales, offset)

    grid = (-(-size.past // sink), *size.frame)
    int8 = quantised(lambda: torch.randint(-127, 128, shape, dtype=torch.int8), 1 / 70)
    turned = {"rope_table": rope_table(size.head_dim, grid), "rope_grid": grid}
    tokens = span_records(spans, 0.0, torch.tensor([0, sink]))
    return {
        "plain": plain,
        "bias": plain._replace(spans=span_records(spans, torch.tensor([0.5, -0.5]))),
        "int8": int8,
        "fp8_e4m3": quantised(lambda: torch.randn(shape).to(torch.float8_e4m3fn), 1.0),
        "int4": quantised(
            lambda: torch.randint(0, 256, (*shape[:-1], size.head_dim // 2), dtype=torch.uint8),
            1 / 4,
            size.head_dim // 32,
        ),
        "on read": plain._replace(spans=tokens, **turned),
        "int8, on read": int8._replace(spans=tokens, **turned),
    }


def medians(functions: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median seconds of each function, called in turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(times))]) < 3:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(name: str, size: Size, dtype: torch.dtype, seconds: float) -> None:
    q, k, v = (torch.randn(size.batch, size.queries, size.heads, size.head_dim).to(dtype) for _ in range(3))
    table = full_table(size.queries, size.queries, q.device)
    kinds = pasts(size, dtype)
    found = medians(
        {kind: partial(attention_over_spans, q, k, v, table, past) for kind, past in kinds.items()}, seconds
    )
    for kind, past in kinds.items():
        held = sum(
            part.nbytes for part in (past.k_pages, past.v_pages, past.k_scales, past.v_scales) if part is not None
        )
        print(
            f"{name:12s} {str(dtype).removeprefix('torch.'):9s} {kind:14s} {1e3 * found[kind]:9.3f} ms"
            f"  speed {found['plain'] / found[kind]:5.3f}  pages {held / 2**20:7.1f} MiB",
            flush=True,
        )


def measure_streams(dtype: torch.dtype, seconds: float, streams: int = 64) -> None:
    """Streams that have from no frame to a window of 21 frames of 64 tokens behind them."""
    frame, heads, head_dim = 64, 4, 64
    frames = torch.arange(streams) * 37 % 22
    row = 21 * frame // PAGE_SIZE
    pools = (torch.randn(streams * row, PAGE_SIZE, heads, head_dim).to(dtype) for _ in range(2))
    page_table = torch.randperm(streams * row).int().view(streams, row)
    spans = torch.stack((torch.zeros(streams), frames * frame), -1).view(streams, 1, 1, 2)
    past = Past(*pools, page_table, span_records(spans))
    q, k, v = (torch.randn(streams, frame, heads, head_dim).to(dtype) for _ in range(3))
    table = full_table(frame, frame, q.device)

    def one_by_one() -> None:
        for i in range(streams):
            alone = past._replace(page_table=page_table[i : i + 1], spans=past.spans[i : i + 1])
            attention_over_spans(q[i : i + 1], k[i : i + 1], v[i : i + 1], table, alone)

    found = medians({"one call": lambda: attention_over_spans(q, k, v, table, past), "64 calls": one_by_one}, seconds)
    print(
        f"{streams} streams   {str(dtype).removeprefix('torch.'):9s} one call {1e3 * found['one call']:8.3f} ms"
        f"  a call each {1e3 * found['64 calls']:8.3f} ms  ratio {found['64 calls'] / found['one call']:5.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=[*SIZES, "64 streams"], default=[*SIZES, "64 streams"])
    parser.add_argument(
        "--dtype", nargs="+", choices=["float32", "bfloat16", "float16"], default=["float32", "bfloat16"]
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="per size and dtype")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"{arguments.threads} threads")
    for name in arguments.size:
        for dtype in arguments.dtype:
            if name == "64 streams":
                measure_streams(getattr(torch, dtype), arguments.seconds)
            else:
                measure(name, SIZES[name], getattr(torch, dtype), arguments.seconds)


if __name__ == "__main__":
    main()
