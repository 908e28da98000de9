"""Short benchmarks of the CUDA ops beside torch's own, for scripts/gpu_check.sh: a few seconds in all.

Ratios are torch's time over ours, medians of interleaved repeats on one GPU; the ceiling is a copy measured here.
python benchmarks/gpu.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from selfforcing_ext import BlockCausalMask, PagedKVCache, block_causal_attention, modulated_layer_norm, rope_3d

REPEATS = 7
# A latent video of Wan2.1 1.3B at 480p: 21 frames of 1560 tokens, 12 heads of 128 channels. Seven blocks of three.
HEADS, HEAD_DIM, FRAME_SEQLEN, FRAMES_PER_BLOCK = 12, 128, 1560, 3

Timings = dict[str, float]


def interleaved(functions: dict[str, Callable[[], object]]) -> Timings:
    """Median seconds of each function, one after the other in every repeat."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(REPEATS + 1):  # the first one warms up
        for name, function in functions.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            if repeat:
                seconds[name].append(start.elapsed_time(end) / 1000)
    return {name: statistics.median(times) for name, times in seconds.items()}


def blocks_of_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: BlockCausalMask) -> Tensor:
    """What one writes without our op: a call of torch's attention per block, over the keys up to its end."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    tokens = mask.frame_seqlen
    return torch.cat(
        [
            scaled_dot_product_attention(q[:, :, a * tokens : b * tokens], k[:, :, : b * tokens], v[:, :, : b * tokens])
            for a, b in mask.frame_blocks
        ],
        dim=2,
    ).transpose(1, 2)


def attention(dtype: torch.dtype, num_frames: int) -> list[dict[str, object]]:
    """Block-causal attention, forward and both passes."""
    mask = BlockCausalMask(num_frames, FRAME_SEQLEN, FRAMES_PER_BLOCK)
    mask.spans("cuda")
    shape = (1, mask.seqlen, HEADS, HEAD_DIM)
    q, k, v = (torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))
    grad = torch.randn(shape, device="cuda", dtype=dtype)
    ours, theirs = (lambda: block_causal_attention(q, k, v, mask)), (lambda: blocks_of_sdpa(q, k, v, mask))

    def both(forward: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(), (q, k, v), grad)

    pairs = sum((b - a) * b for a, b in mask.frame_blocks) * FRAME_SEQLEN**2
    forward_flops = 4 * pairs * HEADS * HEAD_DIM
    rows = []
    for name, factor, times in (
        ("forward", 1.0, interleaved({"ours": ours, "torch": theirs})),
        ("forward and backward", 3.5, interleaved({"ours": both(ours), "torch": both(theirs)})),
    ):
        rows.append(
            row(f"attention {name}, {num_frames} frames", dtype, times, factor * forward_flops, "TFLOP/s", 1e12)
        )
    return rows


def cache(dtype: torch.dtype) -> list[dict[str, object]]:
    """A block of three frames over a window of twelve in pages, beside torch over the same keys in one piece."""
    pages = PagedKVCache(1, HEADS, HEAD_DIM, FRAME_SEQLEN, window_frames=12, dtype=dtype, device="cuda")
    block = (1, FRAMES_PER_BLOCK * FRAME_SEQLEN, HEADS, HEAD_DIM)
    q, k, v = (torch.randn(block, device="cuda", dtype=dtype) for _ in range(3))
    with torch.no_grad():
        for _ in range(4):
            pages.write(0, k, v)
            pages.commit(FRAMES_PER_BLOCK)
    keys, values = (torch.cat([tensor] * 4, dim=1) for tensor in (k, v))

    def whole() -> Tensor:
        return scaled_dot_product_attention(*(tensor.transpose(1, 2) for tensor in (q, keys, values)))

    with torch.no_grad():
        times = interleaved({"ours": lambda: pages.attend(0, q, k, v), "torch": whole})
        flops = 4 * q.shape[1] * keys.shape[1] * HEADS * HEAD_DIM
        attend = row("attend, 12 frames in pages", dtype, times, flops, "TFLOP/s", 1e12)
        target = torch.empty_like(keys[:, : q.shape[1]])
        times = interleaved({"ours": lambda: pages.write(0, k, v), "torch": lambda: (target.copy_(k), target.copy_(v))})
    return [attend, row("cache write", dtype, times, 4 * k.nbytes, "GB/s", 1e9)]


def elementwise(dtype: torch.dtype) -> list[dict[str, object]]:
    frames, channels = 21, HEADS * HEAD_DIM
    x = torch.randn(1, frames * FRAME_SEQLEN, channels, device="cuda", dtype=dtype)
    shift, scale = (torch.randn(1, frames, channels, device="cuda") for _ in range(2))
    heads = x.unflatten(-1, (HEADS, HEAD_DIM))
    copy = torch.empty_like(x)

    def plain_norm() -> Tensor:
        normed = layer_norm(x, (channels,)).unflatten(1, (frames, -1))
        return normed * (1 + scale.to(dtype).unsqueeze(2)) + shift.to(dtype).unsqueeze(2)

    with torch.no_grad():
        norm = interleaved({"ours": lambda: modulated_layer_norm(x, shift, scale), "torch": plain_norm})
        rope = interleaved({"ours": lambda: rope_3d(heads, (frames, 30, 52)), "torch": lambda: copy.copy_(x)})
    return [
        row("modulated_layer_norm", dtype, norm, 2 * x.nbytes, "GB/s", 1e9),
        row("rope_3d beside a copy (the ceiling)", dtype, rope, 2 * x.nbytes, "GB/s", 1e9),
    ]


def row(name: str, dtype: torch.dtype, times: Timings, work: float, unit: str, scale: float) -> dict[str, object]:
    return {
        "name": name,
        "dtype": str(dtype).removeprefix("torch."),
        "milliseconds": 1e3 * times["ours"],
        "torch_milliseconds": 1e3 * times["torch"],
        "ratio": times["torch"] / times["ours"],
        "rate": work / times["ours"] / scale,
        "unit": unit,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing is measured")
        return
    rows = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        rows += [*attention(dtype, num_frames=9), *cache(dtype), *elementwise(dtype)]
    print(f"| {torch.cuda.get_device_name()} | dtype | ours, ms | torch, ms | ratio | rate |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for r in rows:
        print(
            f"| {r['name']} | {r['dtype']} | {r['milliseconds']:.3f} | {r['torch_milliseconds']:.3f} "
            f"| {r['ratio']:.2f} | {r['rate']:.1f} {r['unit']} |"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
