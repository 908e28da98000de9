"""Few-step generation block by block: streaming, of any length.

Source: Self-Forcing (arXiv 2506.08009), algorithm 2, with the rolling cache of its section 3.4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import nvtx
import torch
from torch import Tensor

from python_ref.models.wan import CausalWanModel
from python_ref.noise import NoiseSource
from python_ref.pipelines.blocks import given_frames_of, plan_blocks
from python_ref.schedule import FlowMatchSchedule


class CausalInferencePipeline:
    """Denoises each block in a few steps while it attends to the cached blocks before it.

    Args:
        generator: predicts flow, see ``CausalWanModel``.
        schedule: gives the sigmas of the timesteps.
        denoising_steps: falling timesteps in [0, 1000], as the generator sees them (see ``FlowMatchSchedule.warp``).
        frames_per_block: frames that are denoised together.
        first_frame_alone: frame 0 is a block of its own.
        context_noise: timestep that the clean pass of a finished block is given.
        window_frames, sink_frames: how much of the past stays visible, see ``BlockCausalMask``. With a window memory
            and time per block do not grow with the length of the video.
        cache_options: further options of ``PagedKVCache``, such as ``rope`` or ``quantization``.
        use_cuda_graph: run every block, with its clean pass, as one CUDA graph (``selfforcing_ext.GraphedBlock``): the
            same videos, faster where launching kernels takes longer than running them. Needs backend "ext" and a
            generator on a CUDA device.
    """

    def __init__(
        self,
        generator: CausalWanModel,
        schedule: FlowMatchSchedule,
        denoising_steps: Sequence[float] | Tensor,
        frames_per_block: int = 3,
        first_frame_alone: bool = False,
        context_noise: float = 0,
        window_frames: int | None = None,
        sink_frames: int = 0,
        cache_options: Mapping[str, Any] | None = None,
        use_cuda_graph: bool = False,
    ) -> None:
        if use_cuda_graph and generator.ops.name != "ext":
            raise ValueError(
                f"use_cuda_graph is True, but needs backend 'ext'; the generator's is {generator.ops.name!r}"
            )
        self.generator = generator
        self.timesteps, self.sigmas = denoising_table(schedule, denoising_steps)
        self.frames_per_block = frames_per_block
        self.first_frame_alone = first_frame_alone
        self.context_noise = context_noise
        self.window_frames = window_frames
        self.sink_frames = sink_frames
        self.cache_options = dict(cache_options or {})
        self.use_cuda_graph = use_cuda_graph

    def generate(
        self,
        noise: Tensor,  # [B, F, C, H, W]
        context: Tensor,  # [B, text_len, text_dim]
        source: NoiseSource,
        initial_latents: Tensor | None = None,  # [B, F_given, C, H, W]
    ) -> Tensor:
        """The whole video [B, F_given + F, C, H, W], the given frames included; arguments as in ``stream``."""
        blocks = list(self.stream(noise, context, source, initial_latents))
        if initial_latents is not None:
            blocks.insert(0, initial_latents.to(noise.dtype))
        return torch.cat(blocks, dim=1)

    @torch.no_grad()
    def stream(
        self,
        noise: Tensor,  # [B, F, C, H, W]
        context: Tensor,  # [B, text_len, text_dim]
        source: NoiseSource,
        initial_latents: Tensor | None = None,  # [B, F_given, C, H, W]
    ) -> Iterator[Tensor]:
        """Yields each block [B, frames, C, H, W] as soon as it is denoised.

        Args:
            noise: where the blocks start; its frames are the frames to generate.
            context: text embeddings.
            source: gives the noise between the denoising steps.
            initial_latents: clean frames that the video continues, an image for instance.

        Raises:
            ValueError: frames that do not fill blocks, or shapes that do not fit each other.
        """
        plan = plan_blocks(
            noise.shape[1], self.frames_per_block, self.first_frame_alone, given_frames_of(initial_latents, noise)
        )
        cache = self.generator.make_cache(
            noise.shape, plan.num_frames, self.window_frames, self.sink_frames, **self.cache_options
        )
        encoded = self.generator.encode_context(context)
        if initial_latents is not None:
            with nvtx.annotate("selfforcing.given_frames"):
                for frames in initial_latents.to(noise.dtype).split(plan.given, dim=1):
                    self.generator(frames, frames.new_zeros(frames.shape[:2]), encoded, cache=cache, commit=True)

        sigmas = self.sigmas.to(noise.device)
        timesteps = self.timesteps.to(noise.device)

        @nvtx.annotate("selfforcing.denoise_block")
        def denoise(x_t: Tensor, *fresh: Tensor) -> Tensor:
            shape = x_t.shape[:2]
            for step in range(len(timesteps)):
                flow = self.generator(x_t, timesteps[step].expand(shape), encoded, cache=cache)
                if step + 1 < len(timesteps):
                    _, x_t = self.generator.ops.denoise_step(
                        flow, x_t, sigmas[step].expand(shape), sigmas[step + 1].expand(shape), fresh[step]
                    )
            x0, _ = self.generator.ops.denoise_step(flow, x_t, sigmas[-1].expand(shape))
            return x0

        @nvtx.annotate("selfforcing.clean_pass")
        def clean_pass(x0: Tensor) -> Tensor:
            clean_t = x0.new_full(x0.shape[:2], self.context_noise)
            self.generator(x0, clean_t, encoded, cache=cache, commit=True)
            return x0

        graphed = {}
        if self.use_cuda_graph:
            from selfforcing_ext import GraphedBlock  # needs the compiled ops, which the reference does not

            for length in set(plan.generated):
                graphed[length] = GraphedBlock(cache, length, lambda *inputs: clean_pass(denoise(*inputs)))
        for index, x_t in enumerate(noise.split(plan.generated, dim=1)):
            fresh = [source.randn(x_t.shape, x_t.dtype, x_t.device) for _ in timesteps[1:]]
            if graphed:
                yield graphed[x_t.shape[1]](x_t, *fresh)
                continue
            x0 = denoise(x_t, *fresh)
            yield x0
            if index + 1 < len(plan.generated):
                clean_pass(x0)


def denoising_table(schedule: FlowMatchSchedule, denoising_steps: Sequence[float] | Tensor) -> tuple[Tensor, Tensor]:
    """float32 timesteps and sigmas [steps], after a check that there are some and that they fall."""
    timesteps = torch.as_tensor(denoising_steps, dtype=torch.float32).cpu()
    if timesteps.dim() != 1 or len(timesteps) == 0 or not bool((timesteps.diff() < 0).all()):
        raise ValueError(f"denoising_steps is {timesteps.tolist()}, but must be one or more falling timesteps")
    return timesteps, schedule.sigma_at(timesteps)
