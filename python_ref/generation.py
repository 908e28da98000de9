"""Videos from a trained model, whichever kind it is: what training samples, `generate` and `evaluate` share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from python_ref.config import RolloutConfig
from python_ref.models.captioned import CaptionedModel
from python_ref.models.wan import CausalWanModel, WanModel
from python_ref.noise import TorchNoise
from python_ref.pipelines.bidirectional import sample_bidirectional
from python_ref.pipelines.inference import CausalInferencePipeline
from python_ref.precision import network_precision


@torch.no_grad()
def generate_causal(
    network: CaptionedModel,
    captions: Sequence[str],
    num_frames: int,
    rollout: RolloutConfig,
    generator: torch.Generator,
    precision: str,
    initial_latents: Tensor | None = None,
) -> Tensor:
    """Block by block in a few steps; float32 [B, num_frames, C, H, W] in about -1..1, of any length, on the CPU.

    Args:
        network: with a CausalWanModel.
        captions: B texts.
        num_frames: a multiple of `rollout.frames_per_block`, and one more with `first_frame_alone`, after the given
            frames; may exceed the length of training.
        rollout: blocks, denoising steps, window and sink.
        generator: of all random draws.
        precision: "bf16" or "fp32".
        initial_latents: clean frames [B, F_given, C, H, W] that the videos continue; counted in `num_frames`.
    """
    assert isinstance(network.model, CausalWanModel)
    given = 0 if initial_latents is None else initial_latents.shape[1]
    before = given or int(rollout.first_frame_alone)
    if num_frames < max(1, before) or num_frames == given or (num_frames - before) % rollout.frames_per_block:
        first = f"{before} and " if before else ""
        raise ValueError(
            f"num_frames is {num_frames}; accepted: {first}a multiple of frames_per_block = {rollout.frames_per_block}"
        )
    schedule = network.schedule()
    pipeline = CausalInferencePipeline(
        network.model,
        schedule,
        schedule.warp(rollout.denoising_steps),
        context_noise=rollout.context_noise,
        **rollout.blocks(),
        cache_options=rollout.cache_options(),
        use_cuda_graph=rollout.use_cuda_graph,
    )
    noise = torch.randn(network.latent_shape(len(captions), num_frames - given), generator=generator)
    with network_precision(precision):
        context, _ = network.contexts(captions)
        given_latents = None if initial_latents is None else initial_latents.to(context.device)
        return pipeline.generate(noise.to(context.device), context, TorchNoise(generator), given_latents).cpu()


@torch.no_grad()
def generate_bidirectional(
    network: CaptionedModel,
    captions: Sequence[str],
    steps: int,
    guidance_scale: float,
    generator: torch.Generator,
    precision: str,
) -> Tensor:
    """All frames at once in many steps with guidance; float32 [B, F, C, H, W], F as in training, on the CPU."""
    assert isinstance(network.model, WanModel)
    noise = torch.randn(network.latent_shape(len(captions)), generator=generator)
    with network_precision(precision):
        context, uncond = network.contexts(captions)
        noise = noise.to(context.device)
        videos = sample_bidirectional(network.model, network.schedule(steps), noise, context, uncond, guidance_scale)
        return videos.cpu()
