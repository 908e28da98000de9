"""Peak memory: of a self-forcing training step against a contiguous cache under autograd, and of quantised caches.

    python benchmarks/cache_memory.py [--frames N ...] [--window N] [--cache-gradient constant|full ...]
        [--keep-activations]
    python benchmarks/cache_memory.py --quantised

A step is a rollout in blocks of one frame, a loss on the video and its backward, on a Wan-style model. The peer keeps
one tensor per layer, writes each block into it in place and attends to what is visible. Autograd must not see such a
tensor change, nor must a layer that is computed again in backward; so a block that is recorded gets a copy of the
visible part, and the copies of all blocks live until backward. With gradient through the cache the writes are recorded
too. Layers are checkpointed, as large models need it, or keep their activations.

"--quantised": a cache of a window of 21 frames of 1,560 tokens, 12 heads of 128 and one layer is filled, and a block of
one frame attends to it, in bfloat16.

Every row is a process of its own; memory is the most it held at any time, less what it held before the step. Tensors
are mapped one by one, so that what was given back is not counted.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).parents[1]))

from python_ref.models.wan import CausalWanModel, WanConfig
from python_ref.noise import TorchNoise
from python_ref.pipelines.training import SelfForcingTrainingPipeline
from python_ref.schedule import FlowMatchSchedule
from selfforcing_ext import PagedKVCache

CONFIG = WanConfig(
    dim=512, num_heads=8, num_layers=4, ffn_dim=512, freq_dim=64, text_dim=64, text_len=8, in_dim=4, out_dim=4
)
LATENTS = (4, 24, 32)  # C, H, W: 192 tokens a frame


class ContiguousCache:
    """One tensor per layer, written in place; what the pipeline needs of a cache, for blocks of one frame."""

    rope = "on_write"

    def __init__(self, num_layers: int, num_heads: int, head_dim: int, frame_seqlen: int, **options: Any) -> None:
        self.frame_seqlen, self.num_frames = frame_seqlen, 0
        self.records = options["grad_through_cache"]
        self.window = options["window_frames"]
        tokens = options["max_frames"] * frame_seqlen
        shape = (options["batch_size"], tokens, num_heads, head_dim)
        self.layers = [tuple(torch.zeros(shape, dtype=options["dtype"]) for _ in range(2)) for _ in range(num_layers)]

    @property
    def position(self) -> Tensor:
        return torch.tensor([self.num_frames], dtype=torch.int32)

    def visible(self, layer: int) -> list[Tensor]:
        first = max(0, self.num_frames + 1 - self.window)
        return [past[:, first * self.frame_seqlen : self.num_frames * self.frame_seqlen] for past in self.layers[layer]]

    def view(self) -> SimpleNamespace:
        """A copy of what the next block sees."""
        copies = [[past.clone() for past in self.visible(layer)] for layer in range(len(self.layers))]
        attend = lambda layer, q, k, v: attend_to(copies[layer], q, k, v)  # noqa: E731
        return SimpleNamespace(position=self.position, attend=attend)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_to(self.visible(layer), q, k, v)

    def write(self, layer: int, k: Tensor, v: Tensor, grad_to: object = None) -> None:
        at = slice(self.num_frames * self.frame_seqlen, (self.num_frames + 1) * self.frame_seqlen)
        with torch.set_grad_enabled(self.records and torch.is_grad_enabled()):
            for past, new in zip(self.layers[layer], (k, v), strict=True):
                past[:, at] = new

    def commit(self, num_frames: int) -> None:
        self.num_frames += num_frames


def attend_to(past: list[Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values = (torch.cat((old, own), dim=1) for old, own in zip(past, (k, v), strict=True))
    return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, keys, values))).transpose(1, 2)


def peak_bytes() -> int:
    """The most memory that this process has held so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM: this benchmark runs on Linux")


def train_step(cache: str, frames: int, window: int, cache_gradient: str, checkpoint: bool) -> int:
    """Bytes that a step takes at most."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = CausalWanModel(CONFIG, backend="ext")
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    if cache == "contiguous":
        model.ops.PagedKVCache = ContiguousCache
    pipeline = SelfForcingTrainingPipeline(
        model,
        FlowMatchSchedule(5.0),
        [1000, 500],
        frames_per_block=1,
        last_step_only=True,
        gradient_frames=frames,
        window_frames=window,
        cache_gradient=cache_gradient,
        checkpoint_activations=checkpoint,
    )
    context = torch.randn(1, CONFIG.text_len, CONFIG.text_dim)

    def step(length: int) -> None:
        noise = torch.randn(1, length, *LATENTS)
        video = pipeline.rollout(noise, context, TorchNoise(torch.Generator().manual_seed(1))).video
        video.square().mean().backward()

    step(2)  # gradients of the parameters, and what libraries set up
    before = peak_bytes()
    step(frames)
    return peak_bytes() - before


@torch.no_grad()
def fill_and_attend(quantization: str | None) -> int:
    """Bytes that a full window takes at most, its reading included."""
    torch.set_num_threads(1)

    def run(window: int) -> None:
        cache = PagedKVCache(
            1, 12, 128, 1560, window_frames=window, max_frames=window, dtype=torch.bfloat16, quantization=quantization
        )
        q, k, v = (torch.randn(1, 1560, 12, 128, dtype=torch.bfloat16) for _ in range(3))
        for _ in range(window - 1):
            cache.write(0, k, v)
            cache.commit(1)
        cache.attend(0, q, k, v)

    run(2)  # what a block and its workspace take, and what libraries set up
    before = peak_bytes()
    run(21)
    return peak_bytes() - before


def measure_quantised(environment: dict[str, str]) -> None:
    print("a window of 21 frames of 1,560 tokens, one layer, bfloat16; beyond what a window of 2 takes")
    plain = 0
    for quantization in ("none", "int8", "fp8_e4m3", "int4"):
        command = [sys.executable, __file__, "--quantised", "--one", quantization]
        taken = int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
        plain = plain or taken
        print(f"{quantization:9s} {taken / 2**20:8.1f} MiB  {plain / taken:5.2f} times less", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", nargs="+", type=int, default=[7, 14, 21, 42])
    parser.add_argument("--window", type=int, default=21)
    parser.add_argument("--cache-gradient", nargs="+", choices=["constant", "full"], default=["constant", "full"])
    parser.add_argument("--keep-activations", action="store_true", help="do not checkpoint layers")
    parser.add_argument("--quantised", action="store_true", help="peak memory of quantised caches")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the row of this process
    arguments = parser.parse_args()
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    if arguments.one and arguments.quantised:
        print(fill_and_attend(None if arguments.one == "none" else arguments.one))
        return
    if arguments.quantised:
        measure_quantised(environment)
        return
    if arguments.one:
        print(
            train_step(
                arguments.one,
                arguments.frames[0],
                arguments.window,
                arguments.cache_gradient[0],
                not arguments.keep_activations,
            )
        )
        return
    token_bytes = 2 * CONFIG.num_layers * CONFIG.dim * 4
    frame = token_bytes * (LATENTS[1] // 2) * (LATENTS[2] // 2)
    print(f"keys and values of a frame: {frame / 2**20:.1f} MiB; window {arguments.window}, blocks of 1, float32")
    for cache_gradient in arguments.cache_gradient:
        for frames in arguments.frames:
            row = f"{cache_gradient:8s} {frames:3d} frames"
            measured = {}
            for cache in ("paged", "contiguous"):
                command = [sys.executable, __file__, "--one", cache, "--frames", str(frames)]
                command += ["--window", str(arguments.window), "--cache-gradient", cache_gradient]
                command += ["--keep-activations"] if arguments.keep_activations else []
                measured[cache] = int(
                    subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
                )
                row += f"  {cache} {measured[cache] / 2**20:8.1f} MiB"
            print(f"{row}  ratio {measured['contiguous'] / measured['paged']:5.2f}", flush=True)


if __name__ == "__main__":
    main()
