"""The losses with their gradients against the published implementation."""

import pytest
import torch
from golden_files import (
    BACKENDS,
    assert_gradients_near,
    assert_near,
    case,
    load,
    model,
    parameters,
    replay,
    wide_model,
)

from python_ref.models.discriminator import Discriminator
from python_ref.models.wan import CausalWanModel, WanConfig, WanModel
from python_ref.objectives.causvid import CausVid
from python_ref.objectives.diffusion import CausalDiffusion
from python_ref.objectives.dmd import DMD
from python_ref.objectives.gan import GAN
from python_ref.objectives.ode_regression import ODERegression
from python_ref.objectives.sid import SID
from python_ref.pipelines.training import SelfForcingTrainingPipeline
from python_ref.schedule import FlowMatchSchedule

MATCHING_LOSSES = ["loss_dmd", "loss_dmd_masked_guided", "loss_sid"]
WIDE_MATCHING_LOSSES = [
    (name, case)
    for name in ("wide/f_dmd_matching", "wide/f_sid_matching")
    for case in sorted(parameters(name)["cases"])
]
DIFFUSION_LOSSES = ["loss_diffusion_forcing", "loss_teacher_forcing", "loss_teacher_forcing_noise_aug"]
# The penalties are squared differences of two logits that agree to three digits or so, which float32 then lacks. The
# published numbers are as far from float64 as this.
DIFFERENCE_TOLERANCE = 2e-3
SCORE_SHIFT = 8.0  # the shift that the published score wrappers always use


def load_models(backend):
    """Generator, real score and fake score."""
    kinds = {"generator": CausalWanModel, "real": WanModel, "fake": WanModel}
    weights = load("losses_params")
    return [
        model(
            kind,
            "losses_params",
            {key.removeprefix(f"{name}."): w for key, w in weights.items() if key.startswith(f"{name}.")},
            backend,
        )
        for name, kind in kinds.items()
    ]


def matching_objective(name, models, schedule, options, **more):
    """DMD or SiD as the name of the file says."""
    kind, alpha = (SID, {"sid_alpha": options["sid_alpha"]}) if "sid" in name else (DMD, {})
    return kind(
        *models,
        schedule,
        guidance_scale=options.get("real_guidance_scale", options.get("guidance_scale")),
        fake_guidance_scale=options.get("fake_guidance_scale", 0.0),
        timestep_shift=options["timestep_shift"],
        ts_schedule=options["ts_schedule"],
        ts_schedule_max=options.get("ts_schedule_max", False),
        min_score_timestep=options.get("min_score_timestep", 0),
        **alpha,
        **more,
    )


def wide_models(backend):
    """Generator, real score and fake score."""
    kinds = {"ef_gen": CausalWanModel, "ef_real": WanModel, "ef_fake": WanModel}
    return [wide_model(kind, name, backend) for name, kind in kinds.items()]


def denoising_steps(options, schedule):
    """As the generator sees them."""
    steps = options["denoising_step_list"]
    return schedule.warp(steps) if options["warp_denoising_step"] else torch.tensor(steps, dtype=torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MATCHING_LOSSES)
def test_matching(name, backend):
    entry, tensors = parameters(name), load(name)
    objective = matching_objective(name, load_models(backend), FlowMatchSchedule(5.0), entry)
    latents = tensors["latents"].requires_grad_()
    mask = tensors["gradient_mask"].bool() if "gradient_mask" in tensors else None
    loss, log = objective.distribution_matching_loss(
        latents,
        tensors["context"],
        tensors["uncond"],
        mask,
        entry["denoised_timestep_from"],
        entry["denoised_timestep_to"],
        source=replay(tensors),
    )
    loss.backward()
    assert_near(loss, tensors["loss"], name="loss")
    assert_near(latents.grad, tensors["grad_latents"], name="gradient")
    assert_near(log["timestep"].expand(latents.shape[:2]), tensors["timestep"], name="timestep")
    if "gradient_norm" in log:
        assert_near(log["gradient_norm"], tensors["dmdtrain_gradient_norm"], name="gradient norm")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "part"), WIDE_MATCHING_LOSSES)
def test_wide_matching(name, part, backend):
    entry, tensors = parameters(name)["cases"][part], case(name, part)
    objective = matching_objective(
        name,
        wide_models(backend),
        FlowMatchSchedule(entry["generator_scheduler_shift"]),
        entry["args"],
        score_schedule=FlowMatchSchedule(SCORE_SHIFT),
    )
    latents = tensors["x"].requires_grad_()
    loss, log = objective.distribution_matching_loss(
        latents,
        tensors["cond"],
        tensors["uncond"],
        tensors["gradient_mask"].bool() if "gradient_mask" in tensors else None,
        entry["params"].get("fr"),
        entry["params"].get("to"),
        source=replay(tensors),
    )
    loss.backward()
    assert_near(loss, tensors["loss"], name="loss")
    assert_near(latents.grad, tensors["grad_x"], name="gradient")
    assert_near(log["timestep"].expand(latents.shape[:2]), tensors["timestep"], name="timestep")
    if "gradient_norm" in log:
        assert_near(log["gradient_norm"], tensors["log_gradient_norm"], name="gradient norm")


@pytest.mark.parametrize("backend", BACKENDS)
def test_critic(backend):
    tensors = load("loss_critic")
    generator, real, fake = load_models(backend)
    loss, log = DMD(generator, real, fake, FlowMatchSchedule(5.0)).critic_loss(
        tensors["generated"], tensors["context"], source=replay(tensors)
    )
    loss.backward()
    assert_near(loss, tensors["loss"], name="loss")
    assert_near(log["timestep"].expand(tensors["timestep"].shape), tensors["timestep"], name="timestep")
    assert_gradients_near(fake, tensors, "grad.")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DIFFUSION_LOSSES)
def test_causal_diffusion(name, backend):
    entry, tensors = parameters(name), load(name)
    generator, _, _ = load_models(backend)
    objective = CausalDiffusion(
        generator,
        FlowMatchSchedule(5.0),
        frames_per_block=entry["num_frame_per_block"],
        teacher_forcing=entry["teacher_forcing"],
        clean_noise_steps=entry["noise_augmentation_max_timestep"],
        published_clean_noise=True,
    )
    source = replay(tensors)
    loss, log = objective.loss(tensors["clean"], tensors["context"], source)
    assert source.consumed == len(source.draws)
    loss.backward()
    assert_near(loss, tensors["loss"], name="loss")
    assert_near(log["x0"], tensors["x0_pred"], name="x0")
    assert_gradients_near(generator, tensors, "grad.")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(parameters("wide/f_diffusion")["cases"]))
def test_wide_causal_diffusion(name, backend):
    entry, tensors = parameters("wide/f_diffusion")["cases"][name], case("wide/f_diffusion", name)
    options = entry["args"]
    generator = wide_model(CausalWanModel, "ef_gen", backend)
    schedule = FlowMatchSchedule(options["model_kwargs"]["timestep_shift"])
    objective = CausalDiffusion(
        generator,
        schedule,
        frames_per_block=options["num_frame_per_block"],
        first_frame_alone=options["independent_first_frame"],
        teacher_forcing=options.get("teacher_forcing", False),
        clean_noise_steps=options.get("noise_augmentation_max_timestep", 0),
        published_clean_noise=True,
    )
    loss, log = objective.loss(tensors["clean_latent"], tensors["cond"], replay(tensors))
    loss.backward()
    assert_near(log["timestep"], tensors["timestep"], name="timestep")
    assert_near(loss, tensors["loss"], name="loss")
    assert_gradients_near(generator, tensors, "grad.gen.")


def test_clean_noise_is_low_unless_asked_to_be_as_published():
    tensors = load("loss_teacher_forcing_noise_aug")
    generator, _, _ = load_models("reference")
    drawn = {}
    generator.register_forward_pre_hook(lambda _, args, kwargs: drawn.update(kwargs), with_kwargs=True)
    schedule = FlowMatchSchedule(5.0)
    for published, levels in ((False, schedule.timesteps[-100:]), (True, schedule.timesteps[:100])):
        objective = CausalDiffusion(
            generator, schedule, teacher_forcing=True, clean_noise_steps=100, published_clean_noise=published
        )
        objective.loss(tensors["clean"], tensors["context"], replay(tensors))
        assert torch.isin(drawn["clean_t"], levels).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ode_regression(backend):
    entry, tensors = parameters("loss_ode_regression"), load("loss_ode_regression")
    generator, _, _ = load_models(backend)
    objective = ODERegression(
        generator, FlowMatchSchedule(5.0), entry["denoising_step_list"], entry["num_frame_per_block"]
    )
    loss, log = objective.loss(tensors["ode_latent"], tensors["context"], replay(tensors))
    loss.backward()
    assert_near(loss, tensors["loss"], name="loss")
    assert_near(log["x0"], tensors["output"], name="x0")
    assert_gradients_near(generator, tensors, "grad.")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(parameters("wide/f_ode_regression")["cases"]))
def test_wide_ode_regression(name, backend):
    entry, tensors = parameters("wide/f_ode_regression")["cases"][name], case("wide/f_ode_regression", name)
    options = entry["args"]
    generator = wide_model(CausalWanModel, "ef_gen", backend)
    schedule = FlowMatchSchedule(options["model_kwargs"]["timestep_shift"])
    objective = ODERegression(
        generator,
        schedule,
        denoising_steps(options, schedule),
        options["num_frame_per_block"],
        first_frame_alone=options["independent_first_frame"],
        first_frame_given=options["i2v"],
    )
    loss, log = objective.loss(tensors["ode_latent"], tensors["cond"], replay(tensors))
    loss.backward()
    assert_near(log["timestep"], tensors["timestep"], name="timestep")
    assert_near(log["x0"], tensors["output"], name="x0")
    assert_near(loss, tensors["loss"], name="loss")
    assert_gradients_near(generator, tensors, "grad.gen.")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(parameters("wide/f_causvid")["cases"]))
def test_causvid(name, backend):
    entry, shared = parameters("wide/f_causvid")["cases"][name], case("wide/f_causvid", name.partition(".")[0])
    tensors, options = case("wide/f_causvid", name), entry["args"]
    schedule = FlowMatchSchedule(options["model_kwargs"]["timestep_shift"])
    models = generator, _, fake = wide_models(backend)
    objective = DMD(
        *models,
        schedule,
        score_schedule=FlowMatchSchedule(SCORE_SHIFT),
        guidance_scale=options["guidance_scale"],
        timestep_shift=options["timestep_shift"],
    )
    causvid = CausVid(
        generator,
        schedule,
        denoising_steps(options, schedule),
        frames_per_block=options["num_frame_per_block"],
        first_frame_alone=options["independent_first_frame"],
        teacher_forcing=options.get("teacher_forcing", False),
    )
    source, clean = replay(tensors), shared["clean_latent"]
    states = causvid.noise_data(clean, source)
    video = causvid.generate(states, shared["cond"], source, clean if causvid.teacher_forcing else None)
    assert_near(video, tensors["pred"], name="video")
    if name.endswith("gen"):
        loss, log = objective.distribution_matching_loss(video, shared["cond"], shared["uncond"], source=source)
    else:
        loss, log = objective.critic_loss(video, shared["cond"], source=source)
    loss.backward()
    assert source.consumed == len(source.draws)
    assert_near(loss, tensors["loss"], name="loss")
    assert_near(log["timestep"].expand(clean.shape[:2]), tensors["score_timestep"], name="timestep")
    trained, prefix = (generator, "grad.gen.") if name.endswith("gen") else (fake, "grad.fake.")
    assert_gradients_near(trained, tensors, prefix)


def load_discriminator(name, sees_time, backend):
    entry = parameters(f"wide/models/{name}")
    model = WanModel(WanConfig(**entry["config"]), backend=backend)
    discriminator = Discriminator(model, ffn_dim=entry["gan_ffn"], sees_time=sees_time)
    weights = load(f"wide/models/{name}")
    discriminator.load_state_dict({key: weight.float() for key, weight in weights.items()}, strict=True)
    return discriminator


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["plain", "relativistic_time"])
def test_gan(name, backend):
    """Both losses on the videos of recorded rollouts; the generator's gradient down to its weights."""
    entry, tensors = parameters(f"wide/f_gan/{name}"), load(f"wide/f_gan/{name}")
    options = entry["args"]
    schedule = FlowMatchSchedule(options["model_kwargs"]["timestep_shift"])
    generator = wide_model(CausalWanModel, "ef_gen", backend)
    discriminator = load_discriminator(f"f_gan_{name}", options.get("concat_time_embeddings", False), backend)
    objective = GAN(
        generator,
        discriminator,
        schedule,
        generator_weight=options["gan_g_weight"],
        discriminator_weight=options["gan_d_weight"],
        relativistic=options.get("relativistic_discriminator", False),
        **{name: options[name] for name in ("r1_weight", "r1_sigma", "r2_weight", "r2_sigma")},
        timestep_shift=options.get("critic_timestep_shift", options["timestep_shift"]),
    )
    pipeline = SelfForcingTrainingPipeline(
        generator,
        schedule,
        denoising_steps(options, schedule),
        frames_per_block=options["num_frame_per_block"],
    )
    logits = []
    discriminator.register_forward_hook(lambda _, __, output: logits.append(output.detach()))
    for part in ("gen", "critic"):
        recorded = {key.removeprefix(f"{part}."): value for key, value in tensors.items() if key.startswith(part)}
        source = replay(recorded)
        _, noise, *source.draws = source.draws  # the number of blocks and the noise are drawn before the rollout
        with torch.set_grad_enabled(part == "gen"):
            rollout = pipeline.rollout(noise, tensors["cond"], source)
        assert_near(rollout.video, recorded["generated"])
        levels = rollout.timestep_from, rollout.timestep_to
        if part == "gen":
            loss, log = objective.distribution_matching_loss(
                rollout.video, tensors["cond"], tensors["clean_latent"], *levels, source=source
            )
            loss.backward()
            assert_gradients_near(generator, recorded, "grad_detached.gen.")
            assert all(weight.grad is None for weight in discriminator.parameters())
        else:
            loss, log = objective.critic_loss(
                rollout.video, tensors["cond"], tensors["real_image_or_video"], *levels, source=source
            )
            loss.backward()
            for penalty in ("r1", "r2"):
                assert_near(log[penalty], recorded[penalty], DIFFERENCE_TOLERANCE, penalty)
            assert_gradients_near(discriminator, recorded, "grad.fake.", DIFFERENCE_TOLERANCE)
        assert source.consumed == len(source.draws)
        assert_near(loss, recorded["loss"], name="loss")
        for call, logit in enumerate(logits):
            assert_near(logit, recorded[f"score_call{call}.logit"], name=f"logits of call {call}")
        logits.clear()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["dmd_gen", "dmd_critic", "sid_gen", "sid_critic"])
def test_whole_step(name, backend):
    """A rollout of 21 frames and the loss on it, down to the gradients of the generator or of the critic."""
    entry, tensors = parameters(f"wide/f_e2e/{name}"), load(f"wide/f_e2e/{name}")
    options = entry["args"]
    schedule = FlowMatchSchedule(options["model_kwargs"]["timestep_shift"])
    models = generator, _, fake = wide_models(backend)
    objective = matching_objective(name, models, schedule, options, score_schedule=FlowMatchSchedule(SCORE_SHIFT))
    prefixes = {"constant": "grad_detached.gen."} | ({"exit_step": "grad.gen."} if backend == "reference" else {})
    for cache_gradient, prefix in prefixes.items():
        source = replay(tensors)
        _, noise, *source.draws = source.draws  # the number of blocks and the noise are drawn before the rollout
        pipeline = SelfForcingTrainingPipeline(
            generator,
            schedule,
            denoising_steps(options, schedule),
            frames_per_block=options["num_frame_per_block"],
            cache_gradient=cache_gradient,
        )
        rollout = pipeline.rollout(noise, tensors["cond"], source)
        assert_near(rollout.video, tensors["generated"])
        levels = rollout.timestep_from, rollout.timestep_to
        for module in (generator, fake):
            module.zero_grad()
        if name.endswith("gen"):
            loss, _ = objective.distribution_matching_loss(
                rollout.video, tensors["cond"], tensors["uncond"], None, *levels, source=source
            )
        else:
            loss, _ = objective.critic_loss(rollout.video, tensors["cond"], *levels, source=source)
        loss.backward()
        assert source.consumed == len(source.draws)
        assert_near(loss, tensors["loss"], name="loss")
        trained, prefix = (generator, prefix) if name.endswith("gen") else (fake, "grad.fake.")
        assert_gradients_near(trained, tensors, prefix)
