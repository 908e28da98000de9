"""Score identity distillation: the generator minimises an estimate of the Fisher divergence between the noised
generated distribution and the teacher's, with gradient through both scores.

Source: SiD (arXiv 2404.04057), equation 23, in the x0 parametrisation and with the normaliser of DMD (arXiv 2311.18828,
equation 8), as Self-Forcing (arXiv 2506.08009) trains with it. With r and f the x0 predictions of the real and the fake
score from the noised latents x_t = (1 - sigma) x + sigma noise,

    loss = mean of (r - f) * ((r - x) - alpha (r - f)) / mean |x - r|
         = mean of ((1 - alpha) (r - f)^2 + (r - f) * (f - x)) / mean |x - r|.

(r - f)^2 and (r - f) * (r - x) have the same expectation, the divergence, if the fake score is exact: f = E[x | x_t].
Their gradients, which take the scores' weights as given, differ, and alpha in 0.5..1.2 balances them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from python_ref.noise import NoiseSource
from python_ref.objectives.dmd import DMD
from python_ref.objectives.score_noise import constant_weights


@dataclass
class SID(DMD):
    """The losses of SiD: that of the generator is its own, the critic's and all other arguments are those of ``DMD``.

    Args:
        sid_alpha: how much of the squared difference of the scores is taken away; 1 leaves the inner product alone.
    """

    sid_alpha: float = 1.0

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
        """The SiD loss. Its gradient flows to the latents directly, through the noising and through both scores, whose
        weights get none.

        Takes and draws what ``DMD.distribution_matching_loss`` does.

        Returns:
            The loss (float64 scalar), and its log: ``score_difference`` (mean absolute difference of the scores' x0)
            and ``timestep`` [B, 1].
        """
        t = self._draw_timestep(latents, timestep_from, timestep_to, source)
        noisy = self._noise_to(latents, source.randn(latents.shape, latents.dtype, latents.device), t)
        with constant_weights(self.fake_score, self.real_score):
            x0_fake = self._guided_x0(self.fake_score, noisy, t, context, uncond, self.fake_guidance_scale)
            x0_real = self._guided_x0(self.real_score, noisy, t, context, uncond, self.guidance_scale)
        x, real, fake = latents.double(), x0_real.double(), x0_fake.double()
        distance = (x - real).detach().abs().mean(dim=(1, 2, 3, 4), keepdim=True)
        loss = torch.nan_to_num((real - fake) * ((real - x) - self.sid_alpha * (real - fake)) / distance)
        loss = (loss if gradient_mask is None else loss[gradient_mask]).mean()
        return loss, {"score_difference": (real - fake).detach().abs().mean(), "timestep": t}
