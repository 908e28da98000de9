"""Losses: the bidirectional teacher's, and properties of the others. Numbers are in test_golden_objectives.py."""

import pytest
import torch
from compare import relative_error
from golden_files import BACKENDS

from python_ref.models.discriminator import Discriminator
from python_ref.models.wan import CausalWanModel, WanConfig, WanModel
from python_ref.noise import ReplayNoise, TorchNoise
from python_ref.objectives.causvid import CausVid
from python_ref.objectives.diffusion import CausalDiffusion, TeacherFlowMatching
from python_ref.objectives.dmd import DMD
from python_ref.objectives.gan import GAN
from python_ref.objectives.ode_regression import ODERegression
from python_ref.objectives.sid import SID
from python_ref.precision import network_precision
from python_ref.schedule import FlowMatchSchedule
from selfforcing_ext.mask import BlockCausalMask

CONFIG = WanConfig(
    dim=16, num_heads=2, num_layers=1, ffn_dim=24, freq_dim=8, text_dim=6, text_len=3, in_dim=2, out_dim=2
)
SCHEDULE = FlowMatchSchedule(3.0)


def make(kind, backend, seed=0):
    torch.manual_seed(seed)
    model = kind(CONFIG, backend=backend)
    torch.nn.init.normal_(model.head.head.weight, std=0.3)
    return model


def inputs():
    torch.manual_seed(1)
    return torch.randn(2, 4, 2, 4, 4), torch.randn(2, 3, 6), torch.randn(2, 3, 6)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_teacher_loss_is_its_definition(backend, weighted):
    model = make(WanModel, backend)
    clean, context, _ = inputs()
    noise, index = torch.randn_like(clean), torch.tensor([[100], [700]])
    loss, log = TeacherFlowMatching(model, SCHEDULE, weighted).loss(clean, context, ReplayNoise([noise, index]))

    t = SCHEDULE.timesteps[index]
    noisy = SCHEDULE.add_noise(clean, noise, t)
    flow = model(noisy, t[:, 0], context)
    weight = SCHEDULE.training_weights[index][:, 0] if weighted else torch.ones(2)
    expected = (weight * (flow - (noise - clean)).square().mean(dim=(1, 2, 3, 4))).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(log["x0"], SCHEDULE.flow_to_x0(flow, noisy, t).detach())
    assert torch.equal(log["timestep"], t)


@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_fall(backend):
    """A few steps on one batch with the draws fixed: gradients point the right way."""
    clean, context, _ = inputs()
    for objective in (
        TeacherFlowMatching(make(WanModel, backend), SCHEDULE),
        CausalDiffusion(make(CausalWanModel, backend), SCHEDULE, frames_per_block=2, teacher_forcing=True),
        CausalDiffusion(make(CausalWanModel, backend), SCHEDULE, frames_per_block=2, window_frames=3, sink_frames=1),
    ):
        optimizer = torch.optim.Adam(objective.model.parameters(), lr=1e-2)
        losses = []
        for _ in range(20):
            loss, _ = objective.loss(clean, context, TorchNoise(0))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_dmd_pulls_latents_from_the_critic_to_the_teacher(backend):
    """Where critic and teacher agree, without guidance, there is no gradient; otherwise it is their difference."""
    generator, real, fake = make(CausalWanModel, backend), make(WanModel, backend, 1), make(WanModel, backend, 2)
    latents, context, uncond = inputs()
    latents.requires_grad_()
    agreeing = DMD(generator, real, real, SCHEDULE, guidance_scale=0.0)
    loss, _ = agreeing.distribution_matching_loss(latents, context, uncond, source=TorchNoise(0))
    loss.backward()
    assert latents.grad.abs().max() < 1e-7

    latents.grad = None
    objective = DMD(generator, real, fake, SCHEDULE, guidance_scale=2.0)
    loss, log = objective.distribution_matching_loss(latents, context, uncond, source=TorchNoise(0))
    loss.backward()
    source = TorchNoise(0)
    t = objective.score_timestep(source.randint(0, 1000, (2, 1), latents.device))
    assert torch.equal(t, log["timestep"])
    noisy = SCHEDULE.add_noise(latents.detach(), source.randn(latents.shape, latents.dtype, latents.device), t)
    with torch.no_grad():
        x0 = [
            SCHEDULE.flow_to_x0(score(noisy, t[:, 0], text), noisy, t)
            for score, text in ((fake, context), (real, context), (real, uncond))
        ]
    wanted = x0[1] + 2.0 * (x0[1] - x0[2])
    distance = (latents.detach() - wanted).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    assert relative_error(latents.grad * latents.numel(), (x0[0] - wanted) / distance) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_sid_is_its_definition(backend):
    """Both ways of writing the loss, and a gradient mask; the critic's weights get no gradient but stay trainable."""
    generator, real, fake = make(CausalWanModel, backend), make(WanModel, backend, 1), make(WanModel, backend, 2)
    latents, context, uncond = inputs()
    latents.requires_grad_()
    mask = torch.zeros_like(latents, dtype=torch.bool)
    mask[:, 1:3] = True
    objective = SID(generator, real, fake, SCHEDULE, guidance_scale=2.0, sid_alpha=0.8)
    loss, log = objective.distribution_matching_loss(latents, context, uncond, mask, source=TorchNoise(0))
    loss.backward()
    assert all(weight.requires_grad and weight.grad is None for weight in fake.parameters())

    source, t = TorchNoise(0), log["timestep"]
    source.randint(0, 1000, (2, 1), latents.device)
    x = latents.detach().clone().requires_grad_()
    noisy = SCHEDULE.add_noise(x, source.randn(x.shape, x.dtype, x.device), t)
    x0 = [
        SCHEDULE.flow_to_x0(score(noisy, t[:, 0], text), noisy, t)
        for score, text in ((fake, context), (real, context), (real, uncond))
    ]
    wanted = x0[1] + 2.0 * (x0[1] - x0[2])
    distance = (x - wanted).detach().abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    difference = wanted - x0[0]
    expected = ((0.2 * difference.square() + difference * (x0[0] - x)) / distance)[mask].mean()
    expected.backward()
    torch.testing.assert_close(loss, expected.double(), rtol=1e-5, atol=1e-6)
    assert relative_error(latents.grad, x.grad) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_causvid_simulates_what_it_denoises_at_inference(backend):
    """States of the few-step sampling under the mask; the last of them is where the video comes from."""
    generator = make(CausalWanModel, backend)
    noise, context, _ = inputs()
    steps = [1000.0, 600.0, 0.0]
    causvid = CausVid(generator, SCHEDULE, steps, frames_per_block=2)
    states = causvid.simulate(noise, context, TorchNoise(0))

    source, x_t, expected = TorchNoise(0), noise, [noise]
    mask = BlockCausalMask(4, 4, 2)
    for t, t_next in ((1000.0, 600.0), (600.0, 0.0)):
        times = torch.full((2, 4), t)
        x0 = SCHEDULE.flow_to_x0(generator(x_t, times, context, mask=mask), x_t, times)
        fresh = source.randn(noise.shape, noise.dtype, noise.device)
        x_t = SCHEDULE.add_noise(x0, fresh, torch.full((2, 4), t_next)) if t_next else x0
        expected.append(x_t)
    torch.testing.assert_close(states, torch.stack(expected, dim=1).detach(), rtol=1e-4, atol=1e-5)
    assert not states.requires_grad

    index = torch.tensor([[0, 2, 1, 0], [2, 0, 0, 1]])  # of a block the first counts
    video = causvid.generate(states, context, ReplayNoise([index]))
    x_t = torch.stack(
        [torch.cat((states[0, 0, :2], states[0, 1, 2:])), torch.cat((states[1, 2, :2], states[1, 0, 2:]))]
    )
    times = torch.tensor([[1000.0, 1000, 600, 600], [0, 0, 1000, 1000]])
    wanted = SCHEDULE.flow_to_x0(generator(x_t, times, context, mask=mask), x_t, times)
    torch.testing.assert_close(video, wanted, rtol=1e-4, atol=1e-5)
    assert video.requires_grad


def test_causvid_does_not_simulate_with_clean_data_in_sight():
    causvid = CausVid(make(CausalWanModel, "reference"), SCHEDULE, [1000, 500], teacher_forcing=True)
    noise, context, _ = inputs()
    with pytest.raises(ValueError, match="teacher_forcing is True, but must be False to simulate"):
        causvid.simulate(noise, context, TorchNoise(0))


def test_ode_regression_on_clean_frames_alone_is_no_loss():
    """All blocks may draw the clean end: the mean over the frames that count must not be one over nothing."""
    latents, context, _ = inputs()
    trajectory = torch.stack((torch.randn_like(latents), latents), dim=1)
    objective = ODERegression(make(CausalWanModel, "reference"), SCHEDULE, [1000, 0], frames_per_block=2)
    loss, _ = objective.loss(trajectory, context, ReplayNoise([torch.ones(2, 4, dtype=torch.int64)]))
    loss.backward()
    assert loss == 0
    assert all(not weight.grad.any() for weight in objective.generator.parameters() if weight.grad is not None)


def test_ode_regression_starts_from_a_given_frame():
    latents, context, _ = inputs()
    trajectory = torch.stack((torch.randn_like(latents), torch.randn_like(latents), latents), dim=1)
    generator = make(CausalWanModel, "reference")
    objective = ODERegression(generator, SCHEDULE, [1000, 500], frames_per_block=2, first_frame_given=True)
    seen = []
    generator.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    _, log = objective.loss(trajectory, context, ReplayNoise([torch.zeros(2, 4, dtype=torch.int64)]))
    assert torch.equal(log["timestep"], torch.tensor([[0.0, 1000, 1000, 1000]] * 2))
    assert torch.equal(seen[0], torch.cat((latents[:, :1], trajectory[:, 0, 1:]), dim=1))


def test_ode_regression_refuses_another_number_of_states():
    latents, context, _ = inputs()
    objective = ODERegression(make(CausalWanModel, "reference"), SCHEDULE, [1000, 500], frames_per_block=2)
    with pytest.raises(ValueError, match=r"trajectory has shape \[2, 2, 4, 2, 4, 4\], but must be \[B, 3, F"):
        objective.loss(torch.stack((latents, latents), dim=1), context, TorchNoise(0))


class LinearDiscriminator(torch.nn.Module):
    def __init__(self, slope):
        super().__init__()
        self.slope = torch.nn.Parameter(slope)

    def forward(self, x_t, t, context):
        return (x_t * self.slope).flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize("relativistic", [False, True])
def test_gan_losses_are_their_definitions(relativistic):
    """With a linear discriminator: logits are products, and the mean penalty is its squared slope at any step."""
    fake, context, _ = inputs()
    fake, real = fake.requires_grad_(), torch.randn_like(fake)
    discriminator = LinearDiscriminator(0.1 * torch.randn(fake.shape[1:]))
    objective = GAN(
        make(CausalWanModel, "reference"), discriminator, SCHEDULE, 0.5, 0.25, relativistic, r1_weight=2.0, r1_sigma=0.3
    )
    noises, index = torch.randn(3, *fake.shape), torch.tensor([[300], [600]])
    t = objective.score_timestep(index)

    def logits(latents, noise):
        return discriminator(SCHEDULE.add_noise(latents, noise, t), t, context)

    loss, log = objective.distribution_matching_loss(
        fake, context, real, source=ReplayNoise([index, noises[0], noises[1]])
    )
    loss.backward()
    fake_logit, real_logit = logits(fake, noises[0]), logits(real, noises[1])
    margin = fake_logit - real_logit if relativistic else fake_logit
    torch.testing.assert_close(loss, -0.5 * margin.sigmoid().log().mean())
    torch.testing.assert_close(log["real_logit"], real_logit.mean().detach())
    assert discriminator.slope.grad is None
    assert (fake.grad * discriminator.slope).flatten(1).sum(1).max() < 0  # downhill, the logit rises

    loss, log = objective.critic_loss(fake, context, real, source=ReplayNoise([index, noises[0], noises[2]]))
    fake_logit, real_logit = logits(fake.detach(), noises[0]), logits(real, noises[0])
    if relativistic:
        expected = -(real_logit - fake_logit).sigmoid().log().mean()
    else:
        expected = -real_logit.sigmoid().log().mean() - (1 - fake_logit.sigmoid()).log().mean()
    penalty = 2.0 * (noises[2] * discriminator.slope).flatten(1).sum(1).square().mean()
    torch.testing.assert_close(loss, 0.25 * expected + penalty)
    fake.grad = None
    loss.backward()
    assert fake.grad is None
    assert discriminator.slope.grad.any()
    torch.testing.assert_close(log["r1"], penalty.detach())
    assert "r2" not in log


@pytest.mark.parametrize("backend", BACKENDS)
def test_discriminator_learns_to_tell_videos_apart(backend):
    """Down to the model that it stands on."""
    context = inputs()[1]
    real, fake = (mean + torch.randn(2, 4, 2, 4, 4) for mean in (0.5, -0.5))
    discriminator = Discriminator(make(WanModel, backend), layers=[0, 0], num_classes=2, sees_time=True)
    objective = GAN(make(CausalWanModel, backend), discriminator, SCHEDULE, r1_weight=0.01, r2_weight=0.01)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-2)
    for _ in range(20):
        loss, log = objective.critic_loss(fake, context, real, source=TorchNoise(0))
        optimizer.zero_grad()
        loss.backward()
        assert discriminator.model.patch_embedding.weight.grad.any()
        optimizer.step()
    assert log["real_logit"] > log["fake_logit"] + 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_discriminator_keeps_its_logits_wide_under_autocast(backend):
    latents, context, _ = inputs()
    discriminator = Discriminator(make(WanModel, backend), layers=[0])
    t = torch.tensor([300.0, 600.0])
    with network_precision("bf16"):
        logits = discriminator(latents, t, context)
    assert logits.dtype == torch.float32
    assert relative_error(logits, discriminator(latents, t, context)) < 0.05


@pytest.mark.parametrize("layers", [(), (0, 1), (-1,)])
def test_discriminator_refuses_layers_that_are_not_there(layers):
    with pytest.raises(ValueError, match=r"layers is \[.*\], but must name some of the model's 0 to 0"):
        Discriminator(make(WanModel, "reference"), layers)


def test_score_timesteps_follow_the_rollout():
    latents, context, uncond = inputs()
    models = make(CausalWanModel, "reference"), make(WanModel, "reference"), make(WanModel, "reference")
    objective = DMD(*models, SCHEDULE, timestep_shift=1.0, ts_schedule=True, ts_schedule_max=True)
    source = TorchNoise(0)
    for _ in range(5):
        _, log = objective.distribution_matching_loss(latents, context, uncond, None, 600, 400, source=source)
        assert ((log["timestep"] >= 400) & (log["timestep"] < 600)).all()
        _, log = objective.critic_loss(latents, context, 600, 400, source=source)
        assert ((log["timestep"] >= 400) & (log["timestep"] < 600)).all()
