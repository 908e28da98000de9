"""Adversarial training: a discriminator tells noised generated videos from noised real ones.

Source: the non-saturating loss of GAN (arXiv 1406.2661), or the relativistic pairing loss (arXiv 1807.00734) with the
R1 and R2 penalties of R3GAN (arXiv 2501.05441), as Self-Forcing (arXiv 2506.08009), section 3.3, uses it. The penalties
are finite differences, as in APT (arXiv 2501.08316): with sigma small and epsilon standard normal,
E ((D(x + sigma epsilon) - D(x)) / sigma)^2 is near |grad D(x)|^2, without a second derivative.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from python_ref.models.wan import CausalWanModel
from python_ref.noise import NoiseSource
from python_ref.objectives.score_noise import ScoreNoise, constant_weights
from python_ref.schedule import FlowMatchSchedule


@dataclass
class GAN(ScoreNoise):
    """The losses of the generator and of the discriminator.

    Args:
        generator: the model that made the latents; gives the backend of the ops.
        discriminator: (x_t, t, context) to logits [B, n], high for real videos: a ``Discriminator``.
        schedule: noises the latents.
        generator_weight, discriminator_weight: factors of the losses.
        relativistic: only the difference of the logits of a real and a generated video counts, pair by pair.
        r1_weight, r1_sigma: factor and step of the penalty on the discriminator's slope at real videos; 0: none.
        r2_weight, r2_sigma: the same at generated videos.
        timestep_shift, ts_schedule, ts_schedule_max, min_score_timestep: of the timesteps that videos are noised to, as
            in ``DMD``.
    """

    generator: CausalWanModel
    discriminator: nn.Module
    schedule: FlowMatchSchedule
    generator_weight: float = 1.0
    discriminator_weight: float = 1.0
    relativistic: bool = False
    r1_weight: float = 0.0
    r1_sigma: float = 0.1
    r2_weight: float = 0.0
    r2_sigma: float = 0.1
    timestep_shift: float = 5.0
    ts_schedule: bool = False
    ts_schedule_max: bool = False
    min_score_timestep: int = 0

    def distribution_matching_loss(
        self,
        latents: Tensor,  # [B, F, C, H, W]
        context: Tensor,  # [B, text_len, text_dim]
        real: Tensor,  # [B, F, C, H, W]
        timestep_from: int | None = None,
        timestep_to: int | None = None,
        *,
        source: NoiseSource,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The generator's loss: its videos should look real. The discriminator's weights get no gradient.

        Args:
            latents: generated, with gradient.
            context: text embeddings of the captions, which real and generated videos share.
            real: videos of the data.
            timestep_from, timestep_to: as a ``Rollout`` has them, for ``ts_schedule``.
            source: draws one timestep per pair, then the noise of the generated, then that of the real videos.

        Returns:
            The loss, and its log: ``fake_logit`` and ``real_logit`` (means) and ``timestep`` [B, 1].
        """
        t = self._draw_timestep(latents, timestep_from, timestep_to, source)
        fake = self._noise_to(latents, self._noise_for(latents, source), t)
        real = self._noise_to(real, self._noise_for(real, source), t)
        with constant_weights(self.discriminator):
            fake_logit, real_logit = self._logits(fake, real, t, context)
        margin = fake_logit - real_logit if self.relativistic else fake_logit
        return self.generator_weight * softplus(-margin).mean(), self._log(fake_logit, real_logit, t)

    def critic_loss(
        self,
        generated: Tensor,  # [B, F, C, H, W]
        context: Tensor,  # [B, text_len, text_dim]
        real: Tensor,  # [B, F, C, H, W]
        timestep_from: int | None = None,
        timestep_to: int | None = None,
        *,
        source: NoiseSource,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss, with its penalties.

        Draws one timestep per pair, one noise for both of the pair, and the steps of the penalties that have a weight.

        Returns:
            The loss, and its log: that of ``distribution_matching_loss``, and ``r1`` and ``r2`` where they have a
            weight.
        """
        t = self._draw_timestep(generated, timestep_from, timestep_to, source)
        noise = self._noise_for(generated, source)
        fake, real = self._noise_to(generated.detach(), noise, t), self._noise_to(real, noise, t)
        fake_logit, real_logit = self._logits(fake, real, t, context)
        if self.relativistic:
            loss = softplus(fake_logit - real_logit).mean()
        else:
            loss = softplus(-real_logit).mean() + softplus(fake_logit).mean()
        loss = self.discriminator_weight * loss
        log = self._log(fake_logit, real_logit, t)
        for name, weight, sigma, x, logit in (
            ("r1", self.r1_weight, self.r1_sigma, real, real_logit),
            ("r2", self.r2_weight, self.r2_sigma, fake, fake_logit),
        ):
            if weight:
                moved = self.discriminator(x + sigma * self._noise_for(x, source), t[:, 0], context).float()
                penalty = weight * ((moved - logit) / sigma).square().mean()
                loss, log[name] = loss + penalty, penalty.detach()
        return loss, log

    def _logits(self, fake: Tensor, real: Tensor, t: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """float32, of both in one call."""
        logits = self.discriminator(torch.cat((fake, real)), t[:, 0].repeat(2), torch.cat((context, context)))
        fake_logit, real_logit = logits.float().chunk(2)
        return fake_logit, real_logit

    @staticmethod
    def _noise_for(latents: Tensor, source: NoiseSource) -> Tensor:
        return source.randn(latents.shape, latents.dtype, latents.device)

    @staticmethod
    def _log(fake_logit: Tensor, real_logit: Tensor, t: Tensor) -> dict[str, Tensor]:
        return {"fake_logit": fake_logit.detach().mean(), "real_logit": real_logit.detach().mean(), "timestep": t}
