"""The noise schedule against the published implementation."""

import pytest
import torch
from golden_files import assert_near, case, load, parameters

from python_ref.objectives.dmd import DMD
from python_ref.schedule import FlowMatchSchedule

SHIFTS = (1, 3, 5, 8)


@pytest.mark.parametrize("shift", SHIFTS)
def test_tables(shift):
    tensors = case("flow_match_scheduler", f"shift{shift}")
    for kind, extra_one_step in (("extra", True), ("plain", False)):
        schedule = FlowMatchSchedule(shift, sigma_min=0.0, extra_one_step=extra_one_step)
        assert torch.equal(schedule.sigmas, tensors[f"{kind}.sigmas"])
        assert torch.equal(schedule.timesteps, tensors[f"{kind}.timesteps"])
        assert_near(schedule.training_weights, tensors[f"{kind}.weights"])
    assert torch.equal(FlowMatchSchedule(shift).warp([1000, 750, 500, 250]), tensors["extra.warped_1000_750_500_250"])
    sampling = FlowMatchSchedule(shift, num_steps=50)
    assert torch.equal(sampling.sigmas, tensors["infer50.sigmas"])
    assert torch.equal(sampling.timesteps, tensors["infer50.timesteps"])


@pytest.mark.parametrize("shift", SHIFTS)
def test_arithmetic(shift):
    tensors = case("flow_match_scheduler", f"shift{shift}")
    schedule = FlowMatchSchedule(shift)
    x, noise, flow, t = (tensors[name] for name in ("x", "noise", "v", "t"))
    assert_near(schedule.add_noise(x, noise, t), tensors["add_noise"])
    assert_near(noise - x, tensors["training_target"])
    assert_near(schedule.training_weight_at(t), tensors["training_weight"])
    assert_near(schedule.flow_to_x0(flow, x, t), tensors["flow_to_x0"])
    conversion_t = torch.tensor([10, 1, 333.3, 500, 900.2, 1000])
    assert_near(schedule.x0_to_flow(flow, x, conversion_t), tensors["x0_to_flow"])
    # One of these timesteps is at the last step, at which the published code sends the whole batch to noise level 0.
    assert_near(schedule.flow_to_x0(flow, x, t), tensors["step"])


@pytest.mark.parametrize("shift", SHIFTS)
def test_wide(shift):
    tensors = case("wide/d_scheduler", f"shift{shift}")
    schedule = FlowMatchSchedule(shift)
    assert torch.equal(schedule.sigmas, tensors["sigmas"])
    assert torch.equal(schedule.timesteps, tensors["timesteps"])
    assert_near(schedule.training_weights, tensors["weights"])
    for steps in (4, 50):
        assert_near(FlowMatchSchedule(shift, num_steps=steps).sigmas, tensors[f"infer{steps}.sigmas"])
    defaults = FlowMatchSchedule(shift, num_steps=20, sigma_min=0.003 / 1.002, extra_one_step=False)
    assert_near(defaults.sigmas, tensors["defaults20.sigmas"])

    x0, noise, flow, t = (tensors[name] for name in ("x0", "noise", "flow", "t"))
    x_t = schedule.add_noise(x0, noise, t)
    assert torch.equal(schedule.timesteps.flip(0)[schedule._nearest(t)], schedule.timesteps[tensors["t_index"].long()])
    assert_near(x_t, tensors["add_noise"])
    assert_near(schedule.add_noise(x0, noise, tensors["t_int"]), tensors["add_noise_int"])
    assert_near(noise - x0, tensors["training_target"])
    assert_near(schedule.training_weight_at(t), tensors["training_weight"])
    assert_near(schedule.flow_to_x0(flow, tensors["add_noise"], t), tensors["x0_from_flow"])
    assert_near(schedule.flow_to_x0(flow, tensors["add_noise"], tensors["t_int"]), tensors["x0_from_flow_int"])
    assert_near(schedule.x0_to_flow(x0, tensors["add_noise"], t), tensors["flow_from_x0"])
    keep = tensors["step_keep"].bool()
    assert_near(schedule.step(flow[keep], t[keep], tensors["add_noise"][keep]), tensors["step"])


@pytest.mark.parametrize("name", [f"warp{index}" for index in range(4)])
def test_wide_warp(name):
    entry, tensors = parameters("wide/d_scheduler")["cases"][name], case("wide/d_scheduler", name)
    schedule = FlowMatchSchedule(entry["shift"])
    warped = schedule.warp(entry["steps"])
    assert_near(warped, tensors["out"])
    assert [schedule.unwarp(t) for t in warped] == tensors["denoised_timestep_of_step"].tolist()


@pytest.mark.parametrize("shift", SHIFTS)
def test_wide_score_timesteps(shift):
    tensors = load("wide/d_scheduler")
    objective = DMD(None, None, None, FlowMatchSchedule(shift), timestep_shift=shift)
    assert_near(objective.score_timestep(tensors["score_t_in"]), tensors[f"score_t_shift{shift}"])
