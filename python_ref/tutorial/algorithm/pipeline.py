"""The rollout of Self-Forcing behind one method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from python_ref.models.wan import CausalWanModel
from python_ref.noise import TorchNoise
from python_ref.pipelines.inference import CausalInferencePipeline
from python_ref.pipelines.training import SelfForcingTrainingPipeline
from python_ref.schedule import FlowMatchSchedule


class SimplifiedSelfForcingPipeline:
    """Makes videos as Self-Forcing does, in training and in inference.

    Args:
        generator: predicts flow, see ``CausalWanModel``.
        scheduler: the noise levels; its table has an entry for every training timestep.
        num_frames_per_block: frames that are denoised together.
        denoising_steps: falling timesteps in [0, 1000] before the schedule's shift.

    Random draws are those of torch's default generator: ``torch.manual_seed`` repeats them.

    Attributes:
        training: the ``SelfForcingTrainingPipeline`` behind ``simulate_inference``.
        inference: the ``CausalInferencePipeline`` with the same settings.

    Raises:
        ValueError: denoising steps that do not fall or are out of range.

    Source: Self-Forcing (arXiv 2506.08009), algorithms 1 and 2.
    """

    def __init__(
        self,
        generator: CausalWanModel,
        scheduler: FlowMatchSchedule,
        num_frames_per_block: int = 3,
        denoising_steps: Sequence[int] = [1000, 750, 500, 250],
    ) -> None:
        self.generator = generator
        self.scheduler = scheduler
        self.num_frames_per_block = num_frames_per_block
        self.denoising_steps = tuple(denoising_steps)
        timesteps = scheduler.warp(self.denoising_steps)
        self.training = SelfForcingTrainingPipeline(generator, scheduler, timesteps, num_frames_per_block)
        self.inference = CausalInferencePipeline(generator, scheduler, timesteps, num_frames_per_block)

    def simulate_inference(
        self,
        noise: Tensor,  # [B, F, C, H, W]
        conditional_dict: Mapping[str, Tensor],
    ) -> Tensor:  # [B, F, C, H, W]
        """Videos as inference would make them, for training: all blocks stop at one random denoising step, and gradient
        flows through that step alone.

        Args:
            noise: where the videos start.
            conditional_dict: ``"prompt_embeds"`` holds the text embeddings [B, text_len, text_dim].

        Raises:
            KeyError: there are no ``"prompt_embeds"``.
            ValueError: frames that do not fill blocks, or embeddings that are not the model's.
        """
        return self.training.rollout(noise, prompt_embeds(conditional_dict), default_noise()).video

    def generate(
        self,
        noise: Tensor,  # [B, F, C, H, W]
        conditional_dict: Mapping[str, Tensor],
    ) -> Tensor:  # [B, F, C, H, W]
        """Videos by inference itself: through all denoising steps, without gradient.

        Args:
            noise, conditional_dict: as in ``simulate_inference``.

        Raises:
            KeyError, ValueError: as there.
        """
        return self.inference.generate(noise, prompt_embeds(conditional_dict), default_noise())


def default_noise() -> TorchNoise:
    """Draws from torch's default generator."""
    return TorchNoise(torch.default_generator)


def prompt_embeds(conditional_dict: Mapping[str, Tensor]) -> Tensor:
    """The text embeddings of a conditional dict."""
    if "prompt_embeds" not in conditional_dict:
        raise KeyError(f"conditional_dict holds {sorted(conditional_dict)}, but must hold 'prompt_embeds'")
    return conditional_dict["prompt_embeds"]
