"""Objectives on Gaussian videos, where the best generator is known: each drives it there."""

import pytest
import torch
from gaussian_models import (
    SCHEDULE,
    SHAPE,
    AffineStudent,
    CausalGaussianScore,
    Gaussian,
    GaussianScore,
    QuadraticDiscriminator,
)
from torch import nn

from python_ref.noise import TorchNoise
from python_ref.objectives.causvid import CausVid
from python_ref.objectives.consistency import ConsistencyDistillation
from python_ref.objectives.dmd import DMD
from python_ref.objectives.gan import GAN
from python_ref.objectives.ode_regression import ODERegression
from python_ref.objectives.sid import SID
from python_ref.pipelines.bidirectional import solve_bidirectional
from python_ref.schedule import FlowMatchSchedule

MEAN, DEVIATION = 0.7, 0.5  # of the data
START = -1.0, 1.5
TEXT = torch.zeros(128, 1, 1)  # the models do not read it


class Descent:
    """Adam with a rate that falls to 0."""

    def __init__(self, module: nn.Module, rate: float, steps: int, betas: tuple[float, float] = (0.5, 0.99)) -> None:
        self.optimizer = torch.optim.Adam(module.parameters(), rate, betas)
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


def test_the_solution_of_the_ode_is_the_known_one():
    """The flow of a Gaussian is affine in x_t, and so is the map along it; Euler's error falls as 1 / steps."""
    teacher, errors = GaussianScore(MEAN, DEVIATION).requires_grad_(False), []
    noise = draw(TorchNoise(0))
    for steps in (100, 200):
        states = list(solve_bidirectional(teacher, FlowMatchSchedule(1.0, num_steps=steps), noise, TEXT, TEXT, 1.0))
        assert len(states) == steps + 1
        assert torch.equal(states[0], noise)
        worst = 0.0
        for number, state in enumerate(states):
            gain, offset = teacher.at_noise_level(1 - number / steps)
            worst = max(worst, (state - (gain * noise + offset)).abs().max().item())
        errors.append(worst)
    assert errors[1] < 0.02
    assert 1.8 < errors[0] / errors[1] < 2.2


def test_ode_regression_reaches_the_known_map():
    teacher = GaussianScore(MEAN, DEVIATION).requires_grad_(False)
    timesteps = torch.tensor([1000.0, 750.0, 500.0, 250.0])
    student, source, steps = AffineStudent(timesteps), TorchNoise(0), 400
    objective = ODERegression(student, SCHEDULE, timesteps, frames_per_block=1)
    learner = Descent(student, 0.05, steps)
    maps = [teacher.at_noise_level(sigma) for sigma in (1.0, 0.75, 0.5, 0.25, 0.0)]
    for _ in range(steps):
        noise = draw(source)
        trajectory = torch.stack([gain * noise + offset for gain, offset in maps], dim=1)
        learner.step(objective.loss(trajectory, TEXT, source)[0])
    for step, (gain, offset) in enumerate(maps[:-1]):
        wanted = DEVIATION / gain.mean()
        assert abs(student.gain[step] - wanted) < 1e-2
        assert abs(student.offset[step] - (MEAN - wanted * offset.mean())) < 1e-2


def test_consistency_distillation_reaches_the_solution_of_the_teacher():
    """Where the Euler steps of the teacher lead from each noise level, affine maps all of them."""
    solver, source, steps = FlowMatchSchedule(1.0, num_steps=4), TorchNoise(0), 600
    teacher = CausalGaussianScore(MEAN, DEVIATION).requires_grad_(False)
    student = AffineStudent(solver.timesteps)
    objective = ConsistencyDistillation(student, student, teacher, solver, frames_per_block=1)
    learner = Descent(student, 0.05, steps)
    for _ in range(steps):
        data = MEAN + DEVIATION * draw(source)
        learner.step(objective.loss(data, TEXT, source)[0])
    points = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1, 1).expand(2, *SHAPE)
    for start in range(4):
        x = points
        for t in solver.timesteps[start:]:
            x = solver.step(teacher(x, t.expand(2, SHAPE[0]), TEXT, mask=None), t.expand(2), x)
        offset, end = (value.mean() for value in x)
        assert abs(student.offset[start] - offset) < 0.02
        assert abs(student.gain[start] - (end - offset)) < 0.02


def test_causvid_reaches_the_data_from_noised_data():
    """Of the maps from noised data to data, the affine one with a positive gain."""
    timesteps, source, steps = torch.tensor([500.0]), TorchNoise(0), 250
    teacher = GaussianScore(MEAN, DEVIATION).requires_grad_(False)
    student, critic = AffineStudent(timesteps), GaussianScore(*START)
    causvid = CausVid(student, SCHEDULE, timesteps, frames_per_block=1)
    objective = DMD(student, teacher, critic, SCHEDULE, guidance_scale=0.0, timestep_shift=1.0)
    learner, critic_learner = Descent(student, 0.02, steps), Descent(critic, 0.05, steps)
    for _ in range(steps):
        data = MEAN + DEVIATION * draw(source)
        video = causvid.generate(causvid.noise_data(data, source), TEXT, source)
        learner.step(objective.distribution_matching_loss(video, TEXT, TEXT, source=source)[0])
        critic_learner.step(objective.critic_loss(video, TEXT, source=source)[0])
    gain, offset = (value.mean() for value in teacher.at_noise_level(0.5))
    assert abs(student.gain - DEVIATION / gain) < 0.05
    assert abs(student.offset - (MEAN - DEVIATION / gain * offset)) < 0.05


@pytest.mark.parametrize("relativistic", [False, True])
def test_gan_reaches_the_data(relativistic):
    """The penalties damp the game of generator and discriminator, which would otherwise go round in circles."""
    generator, discriminator = Gaussian(*START), QuadraticDiscriminator()
    objective = GAN(
        generator,
        discriminator,
        SCHEDULE,
        relativistic=relativistic,
        r1_weight=0.2,
        r2_weight=0.2,
        timestep_shift=1.0,
    )
    source, steps = TorchNoise(0), 300
    learner = Descent(generator, 0.03, steps, betas=(0.0, 0.9))
    critic_learner = Descent(discriminator, 0.1, steps, betas=(0.0, 0.9))
    for _ in range(steps):
        video, data = generator.sample(draw(source)), MEAN + DEVIATION * draw(source)
        critic_learner.step(objective.critic_loss(video, TEXT, data, source=source)[0])
        learner.step(objective.distribution_matching_loss(video, TEXT, data, source=source)[0])
    assert (generator.mean - MEAN).abs().max() < 0.05
    assert (generator.deviation - DEVIATION).abs().max() < 0.05
