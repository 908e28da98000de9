"""A denoise step and a whole block of streaming generation with the compiled ops against their definitions in PyTorch.

    python benchmarks/denoise_loop.py [--size demo|wan ...] [--dtype float32|bfloat16 ...] [--threads N]

A step is the model on a block that attends to its cached past, then the denoising step. A block is all its steps and
the clean pass that makes it part of the past. The model, its weights and the inputs are the same for both backends, and
they run in turns in one process; times are medians. Where the time of ours goes is measured by torch's profiler in a
run of its own: linear layers (torch's in both backends), attention, our elementwise ops, and the rest, which is torch's
own elementwise ops (GELU, the layer normalisation and residual of cross-attention) and Python. "at most" is the ratio
if nothing but the linear layers took time.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ["KINETO_LOG_LEVEL"] = "99"  # read when torch is imported: its profiler would print that it starts

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))

from timing import median_times

from python_ref.models.wan import CausalWanModel
from python_ref.models.wan_layers import WanConfig

STEPS = (1000.0, 750.0, 500.0, 250.0)
BLOCK_FRAMES = 3


@dataclass(frozen=True)
class Size:
    config: WanConfig
    batch: int
    latents: tuple[int, int, int]  # C, H, W
    window_frames: int  # the past and the block


SIZES = {
    # configs/demo.yaml, as its rollouts run in training
    "demo": Size(
        WanConfig(96, 3, 4, 384, 64, 64, 16, 1, 1, (1, 6, 6), position_grid=(4, 4)),
        batch=16,
        latents=(1, 24, 24),
        window_frames=12,
    ),
    # Two layers of Wan2.1 1.3B (arXiv 2503.20314) on frames of 15 x 26 tokens, with three blocks behind this one
    "wan": Size(WanConfig(num_layers=2), batch=1, latents=(16, 30, 52), window_frames=12),
}


class Stream:
    """One backend in the middle of a video: the window is full."""

    def __init__(self, size: Size, dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
        torch.manual_seed(0)
        self.model = CausalWanModel(size.config, backend=backend).to(device, dtype).requires_grad_(False)
        torch.nn.init.normal_(self.model.head.head.weight, std=0.02)  # zero at first: then nothing would move
        shape = (size.batch, BLOCK_FRAMES, *size.latents)
        self.noise = torch.randn(shape).to(device, dtype)
        self.context = self.model.encode_context(
            torch.randn(size.batch, size.config.text_len, size.config.text_dim).to(device, dtype)
        )
        self.cache = self.model.make_cache(shape, None, size.window_frames)
        for _ in range(size.window_frames // BLOCK_FRAMES):
            self.clean_pass(self.noise)

    def step(self, x_t: Tensor, index: int) -> Tensor:
        """Latents for the next step; the last step's are clean."""
        flow = self.model(x_t, self._per_frame(x_t, STEPS[index]), self.context, cache=self.cache)
        sigma = self._per_frame(x_t, STEPS[index] / 1000)
        if index + 1 == len(STEPS):
            return self.model.ops.denoise_step(flow, x_t, sigma)[0]
        sigma_next = self._per_frame(x_t, STEPS[index + 1] / 1000)
        return self.model.ops.denoise_step(flow, x_t, sigma, sigma_next, self.noise)[1]

    def clean_pass(self, x0: Tensor) -> None:
        self.model(x0, self._per_frame(x0, 0.0), self.context, cache=self.cache, commit=True)

    def block(self) -> Tensor:
        x = self.noise
        for index in range(len(STEPS)):
            x = self.step(x, index)
        self.clean_pass(x)
        return x

    @staticmethod
    def _per_frame(x: Tensor, value: float) -> Tensor:
        return torch.full(x.shape[:2], value, device=x.device)


PARTS: dict[str, Callable[[Stream], Callable[[], object]]] = {
    "step": lambda stream: lambda: stream.step(stream.noise, 0),
    "block": lambda stream: stream.block,
}


KINDS = {"aten::addmm": "linear", "aten::mm": "linear", "selfforcing::attention": "attention"}


def shares(function: Callable[[], object], seconds: float, repeats: int = 2) -> dict[str, float]:
    """Of a call that takes ``seconds``, the share of each kind of work."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(repeats):
            function()
    spent = dict.fromkeys(("linear", "attention", "elementwise"), 0.0)
    for event in profiler.key_averages():
        kind = KINDS.get(event.key, "elementwise" if event.key.startswith("selfforcing::") else None)
        if kind:
            spent[kind] += event.self_cpu_time_total * 1e-6 / (repeats * seconds)
    return spent | {"rest": 1 - sum(spent.values())}


@torch.no_grad()
def measure(name: str, dtype_name: str, parts: Sequence[str], seconds: float) -> None:
    dtype = getattr(torch, dtype_name)
    ours, reference = (Stream(SIZES[name], dtype, backend) for backend in ("ext", "reference"))
    for part in parts:
        mine, theirs = PARTS[part](ours), PARTS[part](reference)
        time_ours, time_reference = median_times([mine, theirs], seconds)
        spent = shares(mine, time_ours)
        where = "  ".join(f"{kind} {share:3.0%}" for kind, share in spent.items())
        ratio = time_reference / time_ours
        times = f"ours {1e3 * time_ours:9.2f} ms  reference {1e3 * time_reference:9.2f} ms"
        ratios = f"ratio {ratio:5.2f}, at most {ratio / spent['linear']:5.2f}"
        print(f"{name:5s} {dtype_name:9s} {part:5s} {times}  {ratios}  ours: {where}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--threads", type=int, help="of torch; its default if not given")
    parser.add_argument("--seconds", type=float, default=3.0, help="per line")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; ratio is the reference's time over ours")
    for name in arguments.size:
        for dtype_name in arguments.dtype:
            measure(name, dtype_name, arguments.part, arguments.seconds)


if __name__ == "__main__":
    main()
