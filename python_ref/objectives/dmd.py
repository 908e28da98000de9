"""Distribution matching distillation: generated videos follow the difference of two scores.

Source: DMD (arXiv 2311.18828), equations 7 and 8; DMD2 (arXiv 2405.14867) for the critic; as used for video by
CausVid (arXiv 2412.07772) and Self-Forcing (arXiv 2506.08009), section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from python_ref.models.wan import CausalWanModel, WanModel
from python_ref.noise import NoiseSource
from python_ref.objectives.diffusion import flow_matching_loss
from python_ref.objectives.score_noise import ScoreNoise
from python_ref.schedule import FlowMatchSchedule


@dataclass
class DMD(ScoreNoise):
    """The losses of the generator and of the critic (the score of the generated distribution).

    Args:
        generator: the model that made the latents; gives the backend of the ops.
        real_score: the frozen bidirectional teacher.
        fake_score: the critic, bidirectional too.
        schedule: noises the latents.
        score_schedule: turns the scores' flow into x0; None: ``schedule``.
        guidance_scale: of the teacher: real = cond + scale (cond - uncond).
        fake_guidance_scale: of the critic, in the same way; 0: none.
        timestep_shift: uniform timesteps are shifted towards noise by this, as sigmas are in ``FlowMatchSchedule``.
        ts_schedule: timesteps are drawn from the generator's ``timestep_to`` on, the noise level that its result
            was denoised to.
        ts_schedule_max: timesteps are drawn up to the generator's ``timestep_from``.
        min_score_timestep: where timesteps start otherwise, before the shift.
    """

    generator: CausalWanModel
    real_score: WanModel
    fake_score: WanModel
    schedule: FlowMatchSchedule
    score_schedule: FlowMatchSchedule | None = None
    guidance_scale: float = 3.0
    fake_guidance_scale: float = 0.0
    timestep_shift: float = 5.0
    ts_schedule: bool = False
    ts_schedule_max: bool = False
    min_score_timestep: int = 0

    def distribution_matching_loss(
        self,
        latents: Tensor,  # [B, F, C, H, W]
        context: Tensor,  # [B, text_len, text_dim]
        uncond: Tensor,  # [B, text_len, text_dim]
        gradient_mask: Tensor | None = None,  # bool [B, F, C, H, W]
        timestep_from: int | None = None,
        timestep_to: int | None = None,
        *,
        source: NoiseSource,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A loss whose gradient with respect to the latents is the DMD gradient over the number of elements.

        Args:
            latents: generated, with gradient.
            context, uncond: text embeddings of the captions and of the empty caption.
            gradient_mask: only where it is True do latents count.
            timestep_from, timestep_to: as a ``Rollout`` has them, for ``ts_schedule``.
            source: draws one integer timestep per video, then the noise.

        Returns:
            The loss (float64 scalar), and its log: ``gradient_norm`` (mean absolute DMD gradient) and ``timestep``
            [B, 1].
        """
        with torch.no_grad():
            t = self._draw_timestep(latents, timestep_from, timestep_to, source)
            noisy = self._noise_to(latents, source.randn(latents.shape, latents.dtype, latents.device), t)
            x0_fake = self._guided_x0(self.fake_score, noisy, t, context, uncond, self.fake_guidance_scale)
            x0_real, x0_real_uncond = self._predict_x0(
                self.real_score, noisy, t, context, uncond if self.guidance_scale else None
            )
            grad = self.generator.ops.dmd_gradient(latents, x0_fake, x0_real, x0_real_uncond, self.guidance_scale)
        # float64: latents of half precision would swallow the difference.
        wanted = (latents.double() - grad.double()).detach()
        error = (latents.double() - wanted).square()
        loss = 0.5 * (error if gradient_mask is None else error[gradient_mask]).mean()
        return loss, {"gradient_norm": grad.abs().mean(), "timestep": t}

    def critic_loss(
        self,
        generated: Tensor,  # [B, F, C, H, W]
        context: Tensor,  # [B, text_len, text_dim]
        timestep_from: int | None = None,
        timestep_to: int | None = None,
        *,
        source: NoiseSource,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Flow-matching loss of the critic on generated latents.

        Draws as ``distribution_matching_loss`` does.

        Returns:
            The loss, and its log: ``timestep`` [B, 1].
        """
        generated = generated.detach()
        t = self._draw_timestep(generated, timestep_from, timestep_to, source)
        noise = source.randn(generated.shape, generated.dtype, generated.device)
        flow = self.fake_score(self._noise_to(generated, noise, t), t[:, 0], context)
        if self.score_schedule is not None:
            # The critic's x0 prediction, as flow of the generator's schedule: x0 = x_t - sigma flow in both.
            ratio = self.score_schedule.sigma_at(t) / self.schedule.sigma_at(t)
            flow = ratio[:, :, None, None, None] * flow
        return flow_matching_loss(flow, generated, noise), {"timestep": t}

    def _guided_x0(
        self, model: WanModel, noisy: Tensor, t: Tensor, context: Tensor, uncond: Tensor, scale: float
    ) -> Tensor:
        """cond + scale (cond - uncond)."""
        cond, free = self._predict_x0(model, noisy, t, context, uncond if scale else None)
        return cond if free is None else cond + scale * (cond - free)

    def _predict_x0(
        self, model: WanModel, noisy: Tensor, t: Tensor, context: Tensor, uncond: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """x0 with the captions, and without them if ``uncond`` is given, in one call of the model."""
        sigma = (self.score_schedule or self.schedule).sigma_at(t).expand(noisy.shape[:2])
        if uncond is None:
            return self.generator.ops.denoise_step(model(noisy, t[:, 0], context), noisy, sigma)[0], None
        flow = model(noisy.repeat(2, 1, 1, 1, 1), t[:, 0].repeat(2), torch.cat((context, uncond)))
        cond, free = (self.generator.ops.denoise_step(part, noisy, sigma)[0] for part in flow.chunk(2))
        return cond, free
