"""Self-forcing rollouts, their gradients, and causal inference against the published implementation."""

import pytest
import torch
from golden_files import (
    BACKENDS,
    assert_gradients_near,
    assert_near,
    files,
    load,
    model,
    parameters,
    replay,
    wide_model,
)

from python_ref.models.wan import CausalWanModel
from python_ref.pipelines.inference import CausalInferencePipeline
from python_ref.pipelines.training import CACHE_GRADIENTS, SelfForcingTrainingPipeline
from python_ref.schedule import FlowMatchSchedule

ROLLOUTS = [f"rollout_{name}" for name in ("same", "per_block", "last", "ctxnoise", "first")]
WIDE_ROLLOUTS = files("wide/e_rollout/")
WIDE_INFERENCES = files("wide/g_inference/")


def load_generator(backend):
    weights = {key.removeprefix("params."): tensor for key, tensor in load("rollout_params").items()}
    return model(CausalWanModel, "rollout_params", weights, backend)


@pytest.mark.parametrize("checkpoint_activations", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ROLLOUTS)
def test_rollout(name, backend, checkpoint_activations):
    entry, tensors = parameters(name), load(name)
    options = entry["options"]
    generator = load_generator(backend)
    for cache_gradient in CACHE_GRADIENTS:
        pipeline = SelfForcingTrainingPipeline(
            generator,
            FlowMatchSchedule(parameters("rollout_params")["timestep_shift"]),
            entry["denoising_steps"],
            frames_per_block=entry["num_frame_per_block"],
            first_frame_alone=options.get("independent_first_frame", False),
            same_step_across_blocks=options["same_step_across_blocks"],
            last_step_only=options.get("last_step_only", False),
            context_noise=options.get("context_noise", 0),
            checkpoint_activations=checkpoint_activations,
            cache_gradient=cache_gradient,
        )
        source = replay(tensors)
        result = pipeline.rollout(tensors["noise"], tensors["context"], source)
        assert source.consumed == len(source.draws)
        assert_near(result.video, tensors["output"])
        assert (result.timestep_from, result.timestep_to) == (
            entry["denoised_timestep_from"],
            entry["denoised_timestep_to"],
        )
        generator.zero_grad()
        result.video.backward(tensors["grad_out"])
        assert_gradients_near(generator, tensors, f"grad_{cache_gradient}.")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WIDE_ROLLOUTS)
def test_wide_rollout(name, backend):
    entry, tensors = parameters(name), load(name)
    options = entry["params"]
    generator = wide_model(CausalWanModel, entry["model"], backend)
    prefixes = {"constant": "grad_detached.", "exit_step": "grad."}
    for cache_gradient in CACHE_GRADIENTS:
        if cache_gradient not in prefixes:
            continue
        pipeline = SelfForcingTrainingPipeline(
            generator,
            FlowMatchSchedule(options["shift"]),
            tensors["denoising_step_list"],
            frames_per_block=options["nf"],
            first_frame_alone=options["ind"],
            same_step_across_blocks=options["same"],
            last_step_only=options["last"],
            context_noise=options["cn"],
            gradient_frames=21,
            # The published rollout never evicts, and so ignores the sink: a plain window.
            window_frames=None if options["loc"] == -1 else options["loc"],
            checkpoint_activations=True,
            cache_gradient=cache_gradient,
        )
        source = replay(tensors)
        result = pipeline.rollout(
            tensors["noise"], tensors["prompt_embeds"], source, initial_latents=tensors.get("initial_latent")
        )
        assert source.consumed == len(source.draws)
        assert_near(result.video, tensors["output"])
        assert (result.timestep_from, result.timestep_to) == (
            entry["denoised_timestep_from"],
            entry["denoised_timestep_to"],
        )
        generator.zero_grad()
        result.video.backward(tensors["w"])
        assert_gradients_near(generator, tensors, prefixes[cache_gradient])


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference(backend):
    entry, tensors = parameters("inference"), load("inference")
    schedule = FlowMatchSchedule(parameters("rollout_params")["timestep_shift"])
    pipeline = CausalInferencePipeline(
        load_generator(backend), schedule, entry["denoising_steps"], frames_per_block=entry["num_frame_per_block"]
    )
    assert_near(pipeline.generate(tensors["noise"], tensors["context"], replay(tensors)), tensors["latents"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WIDE_INFERENCES)
def test_wide_inference(name, backend):
    entry, tensors = parameters(name), load(name)
    options = entry["args"]
    pipeline = CausalInferencePipeline(
        wide_model(CausalWanModel, entry["model"], backend),
        FlowMatchSchedule(options["model_kwargs"]["timestep_shift"]),
        tensors["denoising_step_list"],
        frames_per_block=options["num_frame_per_block"],
        first_frame_alone=options["independent_first_frame"],
        context_noise=options["context_noise"],
        window_frames=entry["params"].get("loc"),
        sink_frames=entry["params"].get("sink", 0),
    )
    for prefix in ("", "second."):  # a second call on the same pipeline must not see the first
        part = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if "noise" in part:
            source = replay(part)
            video = pipeline.generate(part["noise"], part["prompt_embeds"], source, part.get("initial_latent"))
            assert source.consumed == len(source.draws)
            assert_near(video, part["output_latents"])


def test_inference_streams_the_blocks_that_it_returns():
    tensors = load("inference")
    schedule = FlowMatchSchedule(parameters("rollout_params")["timestep_shift"])
    pipeline = CausalInferencePipeline(
        load_generator("reference"), schedule, parameters("inference")["denoising_steps"]
    )
    blocks = list(pipeline.stream(tensors["noise"], tensors["context"], replay(tensors)))
    assert [block.shape[1] for block in blocks] == [3, 3, 3]
    assert torch.equal(
        torch.cat(blocks, dim=1), pipeline.generate(tensors["noise"], tensors["context"], replay(tensors))
    )
