"""The published Self-Forcing model and pipeline, before and after two lines.

    python examples/self_forcing.py

Runs on the CPU in a few seconds, with random weights. In a checkout of Self-Forcing (arXiv 2506.08009) the model is
``wan.modules.causal_model.CausalWanModel`` and the pipeline ``pipeline.CausalInferencePipeline``. Here a stand-in of
the same form (tests/published_wan.py) and a short pipeline with the same calls take their place.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from published_wan import CausalWanModel, make_crossattn_cache, make_dict_cache

from selfforcing_ext.integrations.self_forcing import accelerate, make_kv_cache

FRAMES_PER_BLOCK, NUM_BLOCKS, WINDOW_FRAMES, SINK_FRAMES = 3, 6, 9, 3
ROWS, COLUMNS = 16, 24  # of the latents; a patch has 2 x 2
FRAME_SEQLEN = ROWS * COLUMNS // 4


class Pipeline:
    """Generates block by block as the published pipelines do: four denoising steps and the clean pass, all called with
    the position where the block starts. ``make_cache`` makes what every call gets as ``kv_cache``."""

    def __init__(self, generator: CausalWanModel) -> None:
        self.generator = generator
        self.make_cache = lambda: make_dict_cache(generator, 1, WINDOW_FRAMES * FRAME_SEQLEN)

    @torch.no_grad()
    def inference(self, noise: Tensor, context: Tensor) -> Tensor:
        kv_cache, crossattn_cache = self.make_cache(), make_crossattn_cache(self.generator)
        video = []
        for index, x in enumerate(noise.split(FRAMES_PER_BLOCK, dim=2)):
            for sigma, next_sigma in ((1.0, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0.0), (0.0, 0.0)):
                flow = self.generator(
                    x,
                    torch.full((1, FRAMES_PER_BLOCK), 1000 * sigma),
                    context,
                    noise[0, 0].numel(),
                    kv_cache=kv_cache,
                    crossattn_cache=crossattn_cache,
                    current_start=index * FRAMES_PER_BLOCK * FRAME_SEQLEN,
                )
                x = x + (next_sigma - sigma) * flow
            video.append(x)
        return torch.cat(video, dim=2)


def timed(pipeline: Pipeline, *arguments: Tensor) -> tuple[Tensor, float]:
    start = time.perf_counter()
    video = pipeline.inference(*arguments)
    return video, time.perf_counter() - start


def main() -> None:
    torch.manual_seed(0)
    generator = CausalWanModel(
        dim=384,
        ffn_dim=768,
        num_heads=6,
        num_layers=2,
        text_len=16,
        text_dim=32,
        local_attn_size=WINDOW_FRAMES,
        sink_size=SINK_FRAMES,
    )
    generator.num_frame_per_block = FRAMES_PER_BLOCK
    noise = torch.randn(1, 16, NUM_BLOCKS * FRAMES_PER_BLOCK, ROWS, COLUMNS)
    context = torch.randn(1, 16, 32)
    pipeline = Pipeline(generator)

    def error(ours: Tensor, theirs: Tensor) -> float:
        return float((ours - theirs).norm() / theirs.norm())

    before, seconds = timed(pipeline, noise, context)
    print(f"as published: {1e3 * seconds:.0f} ms")

    accelerate(generator)  # the first line
    after, seconds = timed(pipeline, noise, context)
    print(f"accelerated, the pipeline's own dicts: {1e3 * seconds:.0f} ms, relative error {error(after, before):.1e}")

    pipeline.make_cache = lambda: make_kv_cache(generator, 1, FRAME_SEQLEN)  # the second line
    after, seconds = timed(pipeline, noise, context)
    print(f"accelerated, pages: {1e3 * seconds:.0f} ms, relative error {error(after, before):.1e}")

    # Training goes through the same attention: a video at once, by teacher forcing.
    t = 1000 * torch.rand(1, noise.shape[2])
    flow = generator(noise, t, context, noise[0, 0].numel(), clean_x=before)
    flow.square().mean().backward()
    norm = generator.blocks[0].self_attn.q.weight.grad.norm()
    print(f"teacher forcing on {2 * noise.shape[2] * FRAME_SEQLEN} tokens: gradient norm {norm:.1e}")


if __name__ == "__main__":
    main()
