"""Stage three: the causal model learns from its own rollouts (Self-Forcing, arXiv 2506.08009, algorithm 1).

The generator makes videos exactly as inference does; distribution matching (DMD) pulls their distribution towards the
teacher's, with a critic that follows the generator (DMD2, arXiv 2405.14867). No real video is needed, captions are.
"""

from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from python_ref.config import Config
from python_ref.data.source import TrainingSource
from python_ref.distributed import distribute
from python_ref.generation import generate_causal
from python_ref.learning import Learner, update_average
from python_ref.models.captioned import CaptionedModel
from python_ref.noise import NoiseSource
from python_ref.objectives.dmd import DMD
from python_ref.pipelines.training import SelfForcingTrainingPipeline
from python_ref.precision import network_precision
from python_ref.randomness import derived_generator


class SelfForcingStage:
    """Every step updates the critic, every `generator_every`-th the generator first; see `Stage` for the parts."""

    name = "self_forcing"

    def __init__(self, config: Config, source: TrainingSource) -> None:
        self.config, self.settings, self.source = config, config.self_forcing, source
        self.total_steps = self.settings.steps
        rollout = config.rollout
        self.network = CaptionedModel.load(self.settings.init, causal=True, backend=config.backend, embed=source.embed)
        self.network.settings["rollout"] = asdict(rollout)
        self.network.text.requires_grad_(False)
        self.teacher = CaptionedModel.load(self.settings.teacher, causal=False, backend=config.backend).frozen()
        self.critic = CaptionedModel.load(self.settings.teacher, causal=False, backend=config.backend).model
        self.average = self.network.average_copy()
        distribute(config.distributed, self.network, self.teacher, self.critic, self.average)
        schedule = self.network.schedule()
        self.pipeline = SelfForcingTrainingPipeline(
            self.network.model,
            schedule,
            schedule.warp(rollout.denoising_steps),
            rollout.frames_per_block,
            same_step_across_blocks=self.settings.same_step_across_blocks,
            last_step_only=self.settings.last_step_only,
            context_noise=rollout.context_noise,
            gradient_frames=source.num_frames,
            window_frames=rollout.window_frames,
            sink_frames=rollout.sink_frames,
            cache_gradient=self.settings.cache_gradient,
        )
        self.objective = DMD(
            self.network.model,
            self.teacher.model,
            self.critic,
            schedule,
            guidance_scale=self.settings.guidance_scale,
            timestep_shift=config.flow.shift,
        )
        self.learner = Learner(self.network.model, self.settings.generator, self.generator_updates(self.total_steps))
        self.critic_learner = Learner(self.critic, self.settings.critic, self.total_steps)
        self.modules = {"model": self.network, "critic": self.critic, "average": self.average}
        self.optimizers = {"model": self.learner.optimizer, "critic": self.critic_learner.optimizer}

    def generator_updates(self, steps: int) -> int:
        """Updates of the generator within the first `steps` steps."""
        return -(-steps // self.settings.generator_every)

    def train_step(self, step: int) -> dict[str, float]:
        source = self.source.share.noise(derived_generator(self.config.seed, self.name, "step", step))
        size = self.settings.batch_size
        captions = self.source.captions_of_part(step * size, size)
        with network_precision(self.config.precision):
            context, uncond = self.network.contexts(captions)
        metrics: dict[str, float] = {}
        if step % self.settings.generator_every == 0:
            metrics |= self._train_generator(self.generator_updates(step), context, uncond, source)
        return metrics | self._train_critic(step, context, source)

    def _train_generator(self, update: int, context: Tensor, uncond: Tensor, source: NoiseSource) -> dict[str, float]:
        with network_precision(self.config.precision):
            result = self.pipeline.rollout(self._noise(context, source), context, source)
            loss, log = self.objective.distribution_matching_loss(
                result.video,
                context,
                uncond,
                timestep_from=result.timestep_from,
                timestep_to=result.timestep_to,
                source=source,
            )
        loss.backward()
        learned = self.learner.step(update)
        update_average(self.average, self.network, self.settings.ema_decay, update)
        return {
            "generator_loss": loss.item(),
            "dmd_gradient": log["gradient_norm"].item(),
            "generator_grad_norm": learned["grad_norm"],
            "generator_lr": learned["lr"],
        }

    def _train_critic(self, step: int, context: Tensor, source: NoiseSource) -> dict[str, float]:
        with network_precision(self.config.precision):
            with torch.no_grad():
                video = self.pipeline.rollout(self._noise(context, source), context, source).video
            loss, _ = self.objective.critic_loss(video, context, source=source)
        loss.backward()
        learned = self.critic_learner.step(step)
        return {"critic_loss": loss.item(), "critic_grad_norm": learned["grad_norm"], "critic_lr": learned["lr"]}

    def _noise(self, context: Tensor, source: NoiseSource) -> Tensor:
        return source.randn(self.network.latent_shape(len(context)), torch.float32, context.device)

    def sample(self, captions: Sequence[str], generator: torch.Generator) -> Tensor:
        frames = self.average.settings["num_frames"]
        return generate_causal(self.average, captions, frames, self.config.rollout, generator, self.config.precision)
