"""Self Gradient Forcing: a rollout without gradient, and one parallel pass that has it, through the context too.

The idea is that of Self Gradient Forcing (arXiv 2607.20368): videos are generated without gradient; then the exit steps
of all blocks are computed once more in a single pass over [clean; noisy] under the teacher-forcing mask. That pass has
the rollout's values, as the clean half has the keys and values that the rollout cached, but it computes those keys and
values with gradient. So the weights also learn to write what later blocks read, which a constant cache does not teach,
without keeping the graph of a whole rollout.

What follows is our construction of it: the rollout is that of ``SelfForcingTrainingPipeline``, and the clean frames are
constants. With block b's exit state x_b at noise level s_b, clean frames c and weights w,

    video_b = x_b - s_b flow_w(x_b | keys and values_w(c_<b)),

differentiated in every w. Backpropagation through time (``cache_gradient="full"``) differentiates c_<b besides.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from python_ref.noise import NoiseSource
from python_ref.pipelines.training import Rollout, SelfForcingTrainingPipeline
from selfforcing_ext.mask import BlockCausalMask


class SelfGradientPipeline:
    """Makes the videos of a rollout, with another gradient.

    Args:
        pipeline: makes the rollouts. Its ``cache_gradient`` has no effect, as they have no gradient; all else counts.
    """

    def __init__(self, pipeline: SelfForcingTrainingPipeline) -> None:
        self.pipeline = pipeline

    def rollout(
        self,
        noise: Tensor,  # [B, F, C, H, W]
        context: Tensor,  # [B, text_len, text_dim]
        source: NoiseSource,
        initial_latents: Tensor | None = None,  # [B, F_given, C, H, W]
    ) -> Rollout:
        """As ``SelfForcingTrainingPipeline.rollout``; under ``torch.no_grad()`` the very same.

        Raises:
            ValueError: also if given frames begin with a short block of more than one frame, which no mask describes.
        """
        with torch.no_grad():
            result = self.pipeline.rollout(noise, context, source, initial_latents)
        if not torch.is_grad_enabled():
            return result
        given = result.video.shape[1] - noise.shape[1]
        mask = self._mask(result.video, given)
        blocks = [block for block in mask.frame_blocks if block[0] >= given]
        x0 = self._exit_steps_at_once(result, context, mask, blocks)
        oldest = result.video.shape[1] - self.pipeline.gradient_frames
        start = next((start for start, _ in blocks if start >= oldest), result.video.shape[1])
        return replace(result, video=torch.cat((result.video[:, :start], x0[:, start:]), dim=1), gradient_start=start)

    def _exit_steps_at_once(
        self, result: Rollout, context: Tensor, mask: BlockCausalMask, blocks: list[tuple[int, int]]
    ) -> Tensor:
        """x0 of all frames; that of given frames means nothing."""
        pipeline, video = self.pipeline, result.video
        given = blocks[0][0]
        noisy = torch.cat((video[:, :given], result.exit_states), dim=1)
        steps = [step for (start, end), step in zip(blocks, result.exit_steps, strict=True) for _ in range(start, end)]
        t, sigma = (
            torch.cat((torch.zeros(given), table[steps])).to(video.device).expand(video.shape[:2])
            for table in (pipeline.timesteps, pipeline.sigmas)
        )
        clean_t = torch.full_like(t, pipeline.context_noise)
        clean_t[:, :given] = 0
        flow = pipeline.generator(
            noisy,
            t,
            context,
            mask=mask,
            clean_x=result.past,
            clean_t=clean_t,
            checkpoint_layers=pipeline.checkpoint_activations,
        )
        return pipeline.generator.ops.denoise_step(flow, noisy, sigma)[0]

    def _mask(self, video: Tensor, given: int) -> BlockCausalMask:
        pipeline = self.pipeline
        first_block = given % pipeline.frames_per_block
        if first_block > 1 and not pipeline.first_frame_alone:
            raise ValueError(
                f"initial_latents has {given} frames, but must have a multiple of frames_per_block = "
                f"{pipeline.frames_per_block}, or one more"
            )
        frames, rows, columns = pipeline.generator.config.grid(video.shape)
        return BlockCausalMask(
            frames,
            rows * columns,
            pipeline.frames_per_block,
            pipeline.window_frames,
            pipeline.sink_frames,
            first_frame_alone=pipeline.first_frame_alone or first_block == 1,
            teacher_forcing=True,
        )
