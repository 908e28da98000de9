"""At which noise levels generated videos are compared with the teacher or with real ones: what DMD, SiD and GAN share.

Source: DMD (arXiv 2311.18828), section 3.2, for the range; the shift is that of ``FlowMatchSchedule``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from python_ref.models.wan import CausalWanModel
from python_ref.noise import NoiseSource
from python_ref.schedule import FlowMatchSchedule

# Videos are compared at noise levels away from both ends, where a score says nothing.
LOWEST_SCORE_TIMESTEP, HIGHEST_SCORE_TIMESTEP = 0.02, 0.98  # as fractions of num_train_timesteps


class ScoreNoise:
    """Draws timesteps and noises latents to them, as the options of an objective with these fields say."""

    generator: CausalWanModel
    schedule: FlowMatchSchedule
    timestep_shift: float
    ts_schedule: bool
    ts_schedule_max: bool
    min_score_timestep: int

    def score_timestep(self, uniform: Tensor) -> Tensor:
        """float32 timesteps to compare videos at, from uniform integer ones: shifted, then kept off the ends."""
        steps = self.schedule.num_train_timesteps
        t = uniform.float()
        if self.timestep_shift > 1:
            t = self.timestep_shift * (t / steps) / (1 + (self.timestep_shift - 1) * (t / steps)) * steps
        return t.clamp(int(LOWEST_SCORE_TIMESTEP * steps), int(HIGHEST_SCORE_TIMESTEP * steps))

    def _draw_timestep(
        self, latents: Tensor, timestep_from: int | None, timestep_to: int | None, source: NoiseSource
    ) -> Tensor:
        """One timestep per video, [B, 1]."""
        low = timestep_to if self.ts_schedule and timestep_to is not None else self.min_score_timestep
        high = (
            timestep_from if self.ts_schedule_max and timestep_from is not None else self.schedule.num_train_timesteps
        )
        return self.score_timestep(source.randint(low, high, (latents.shape[0], 1), latents.device))

    def _noise_to(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Latents [B, F, C, H, W] at the timesteps [B, 1]."""
        return self.generator.ops.add_noise(latents, noise, self.schedule.sigma_at(t).expand(latents.shape[:2]))


@contextmanager
def constant_weights(*modules: nn.Module) -> Iterator[None]:
    """Within it, gradient flows through the modules to their inputs, but not to their weights."""
    trained = [weight for module in modules for weight in module.parameters() if weight.requires_grad]
    for weight in trained:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)
