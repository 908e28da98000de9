"""Objectives on Gaussian videos, where the best generator is known: each drives it there."""

import pytest
import torch
from gaussian_models import SCHEDULE, SHAPE, Gaussian, GaussianScore
from torch import nn

from python_ref.noise import TorchNoise
from python_ref.objectives.dmd import DMD
from python_ref.objectives.sid import SID

MEAN, DEVIATION = 0.7, 0.5  # of the data
START = -1.0, 1.5
TEXT = torch.zeros(128, 1, 1)  # the models do not read it


class Descent:
    """Adam with a rate that falls to 0."""

    def __init__(self, module: nn.Module, rate: float, steps: int) -> None:
        self.optimizer = torch.optim.Adam(module.parameters(), rate, betas=(0.5, 0.99))
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    def step(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()


def draw(source: TorchNoise, batch: int = len(TEXT)) -> torch.Tensor:
    return source.randn((batch, *SHAPE), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("kind", [DMD, SID])
def test_score_distillation_reaches_the_data(kind):
    """With a critic that is learned alongside."""
    generator, critic = Gaussian(*START), GaussianScore(*START)
    teacher = GaussianScore(MEAN, DEVIATION).requires_grad_(False)
    objective = kind(generator, teacher, critic, SCHEDULE, guidance_scale=0.0, timestep_shift=1.0)
    source, steps = TorchNoise(0), 250
    learner, critic_learner = Descent(generator, 0.02, steps), Descent(critic, 0.05, steps)
    for _ in range(steps):
        video = generator.sample(draw(source))
        learner.step(objective.distribution_matching_loss(video, TEXT, TEXT, source=source)[0])
        critic_learner.step(objective.critic_loss(video, TEXT, source=source)[0])
    for reached in (generator, critic):
        assert (reached.mean - MEAN).abs().max() < 0.05
        assert (reached.deviation - DEVIATION).abs().max() < 0.05
