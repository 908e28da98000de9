"""CausVid: distribution matching without a rollout. The block-causal student denoises all blocks in one pass, each from
a noise level of its own; the videos then go through the losses of DMD (or of SiD or GAN, as rollouts do).

Source: CausVid (arXiv 2412.07772), section 4.2 and algorithm 1, for noised data; DMD2 (arXiv 2405.14867), section 4.5,
for backward simulation, where the student's own outputs are noised instead, so that no data are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from python_ref.models.wan import CausalWanModel, EncodedContext
from python_ref.noise import NoiseSource
from python_ref.objectives.blockwise import Blockwise, per_block, pick_steps
from python_ref.schedule import FlowMatchSchedule


@dataclass
class CausVid(Blockwise):
    """Makes the videos for the losses of an objective such as ``DMD``. A step of the generator is

        states = causvid.noise_data(clean, source)  # or causvid.simulate(noise, context, source)
        video = causvid.generate(states, context, source)
        loss, log = objective.distribution_matching_loss(video, context, uncond, source=source)

    and one of the critic the same under ``torch.no_grad()``, with ``critic_loss(video, context, source=source)``.

    Args:
        generator: predicts the flow under a mask.
        schedule: gives the noise levels of the timesteps.
        denoising_steps: falling timesteps, as the generator sees them (see ``FlowMatchSchedule.warp``), at which
            blocks are denoised. The last may be 0, which stands for clean data.
        frames_per_block, first_frame_alone, window_frames, sink_frames: as in ``BlockCausalMask``.
        teacher_forcing: blocks see the clean data before them rather than the noised.
    """

    generator: CausalWanModel
    schedule: FlowMatchSchedule
    denoising_steps: Sequence[float] | Tensor
    frames_per_block: int = 3
    first_frame_alone: bool = False
    window_frames: int | None = None
    sink_frames: int = 0
    teacher_forcing: bool = False

    def noise_data(self, clean: Tensor, source: NoiseSource) -> Tensor:
        """Videos [B, F, C, H, W] at every denoising step, [B, T, F, C, H, W], each with noise of its own."""
        states = []
        for sigma in self._sigmas(self._steps(clean)):
            noise = source.randn(clean.shape, clean.dtype, clean.device)
            states.append(self.generator.ops.add_noise(clean, noise, sigma.expand(clean.shape[:2])))
        return torch.stack(states, dim=1)

    @torch.no_grad()
    def simulate(self, noise: Tensor, context: Tensor | EncodedContext, source: NoiseSource) -> Tensor:
        """Backward simulation: what the student denoises at every step when it generates from noise.

        Args:
            noise: [B, F, C, H, W], the state at the first step, which is 1000.
            context: text embeddings.
            source: draws the noise for each step but the first.

        Returns:
            [B, T, F, C, H, W], without gradient.

        Raises:
            ValueError: with ``teacher_forcing``, which needs clean data.
        """
        if self.teacher_forcing:
            raise ValueError("teacher_forcing is True, but must be False to simulate: it shows blocks the clean data")
        per_frame = noise.shape[:2]
        steps = self._steps(noise)
        mask = self._mask(self.generator.config, noise)
        x_t, states = noise, [noise]
        for t, (sigma, sigma_next) in zip(steps, pairwise(self._sigmas(steps)), strict=False):
            flow = self.generator(x_t, t.expand(per_frame), context, mask=mask)
            fresh = source.randn(noise.shape, noise.dtype, noise.device)
            _, x_t = self.generator.ops.denoise_step(
                flow, x_t, sigma.expand(per_frame), sigma_next.expand(per_frame), fresh
            )
            states.append(x_t)
        return torch.stack(states, dim=1)

    def generate(
        self,
        states: Tensor,  # [B, T, F, C, H, W]
        context: Tensor | EncodedContext,  # [B, text_len, text_dim]
        source: NoiseSource,
        clean: Tensor | None = None,  # [B, F, C, H, W]
    ) -> Tensor:
        """The student's x0 [B, F, C, H, W], with gradient, each block denoised from one of its states.

        Args:
            states: videos at the denoising steps.
            context: text embeddings.
            source: draws one step per frame, of which each block takes that of its first frame.
            clean: the data, with ``teacher_forcing``.
        """
        steps = self._steps(states)
        mask = self._mask(self.generator.config, states[:, 0])
        index = per_block(mask, source.randint(0, len(steps), (states.shape[0], states.shape[2]), states.device))
        x_t, t = pick_steps(states, index), steps[index]
        flow = self.generator(x_t, t, context, mask=mask, clean_x=clean)
        return self.generator.ops.denoise_step(flow, x_t, self.schedule.sigma_at(t))[0]

    def _steps(self, latents: Tensor) -> Tensor:
        return torch.as_tensor(self.denoising_steps, dtype=torch.float32, device=latents.device)

    def _sigmas(self, steps: Tensor) -> Tensor:
        """Noise levels of the steps, and 0 of timestep 0, for which the schedule's table has no entry."""
        return self.schedule.sigma_at(steps).masked_fill(steps == 0, 0)
