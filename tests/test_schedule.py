"""The noise schedule: properties of its definition, and bad input. Its numbers are in test_golden_schedule.py."""

import pytest
import torch

from python_ref.noise import TorchNoise
from python_ref.schedule import FlowMatchSchedule


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 8.0])
def test_nearest_entry(shift):
    """Against a search through the whole table; of two equally near entries the higher one counts."""
    schedule = FlowMatchSchedule(shift)
    torch.manual_seed(0)
    middles = (schedule.timesteps[1:50].double() + schedule.timesteps[:49].double()) / 2
    t = torch.cat((1000 * torch.rand(200).double(), torch.tensor([0.0, 1000.0, -5.0, 2000.0]).double(), middles))
    index = (schedule.timesteps.double() - t[:, None]).abs().argmin(dim=1)
    assert torch.equal(schedule.sigma_at(t), schedule.sigmas[index])
    assert torch.equal(schedule.training_weight_at(t.view(-1, 1)), schedule.training_weights[index].view(-1, 1))


def test_steps_reach_the_clean_sample():
    """Exact flow, any number of Euler steps: noise becomes x0, with another timestep in every row."""
    schedule = FlowMatchSchedule(5.0, num_steps=7)
    x0, noise = torch.randn(2, 2, 3, 1, 2, 2)
    x = noise
    for t in schedule.timesteps:
        x = schedule.step(noise - x0, t.expand(2, 3), x)
    torch.testing.assert_close(x, x0)
    mixed = torch.stack((schedule.timesteps[:3], schedule.timesteps[-3:]))
    stepped = schedule.step(noise - x0, mixed, schedule.add_noise(x0, noise, mixed))
    torch.testing.assert_close(stepped[1, 2], x0[1, 2])
    torch.testing.assert_close(stepped[0, 0], schedule.add_noise(x0, noise, mixed.roll(-1, 1))[0, 0])


def test_conversions_undo_each_other():
    schedule = FlowMatchSchedule(3.0)
    x0, noise = torch.randn(2, 4, 3, 1, 2, 2, dtype=torch.float64)
    t = 100 + 900 * torch.rand(4, 3)
    x_t = schedule.add_noise(x0, noise, t)
    torch.testing.assert_close(schedule.flow_to_x0(noise - x0, x_t, t), x0)
    torch.testing.assert_close(schedule.x0_to_flow(x0, x_t, t), noise - x0)
    assert schedule.add_noise(x0.bfloat16(), noise.bfloat16(), t).dtype == torch.bfloat16


def test_warp_and_back():
    schedule = FlowMatchSchedule(5.0)
    steps = list(range(0, 1001, 50))
    warped = schedule.warp(steps)
    assert warped[0] == 0
    assert [schedule.unwarp(t) for t in warped[1:]] == steps[1:]


def test_bad_input():
    with pytest.raises(ValueError, match="shift is 0, but must be positive"):
        FlowMatchSchedule(0)
    with pytest.raises(ValueError, match="num_steps is 0, but must be at least 1"):
        FlowMatchSchedule(num_steps=0)
    with pytest.raises(ValueError, match=r"steps holds 1001, but they must lie in \[0, 1000\]"):
        FlowMatchSchedule().warp([1001])
    with pytest.raises(ValueError, match="num_steps is 50, but must be num_train_timesteps = 1000: warp looks"):
        FlowMatchSchedule(num_steps=50).warp([500])


def test_seeded_noise_repeats_itself():
    cpu = torch.device("cpu")
    first, second = TorchNoise(3), TorchNoise(torch.Generator().manual_seed(3))
    for source in (first, second):
        source.randint(0, 4, (5,), cpu)
    half, full = first.randn((4, 2), torch.bfloat16, cpu), second.randn((4, 2), torch.float32, cpu)
    assert torch.equal(half, full.bfloat16())
