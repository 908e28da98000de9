"""What a generator's videos are trained for, and the module that learns along: a critic or a discriminator."""

from typing import Protocol

import torch
from torch import Tensor, nn

from python_ref.config import Config
from python_ref.models.captioned import CaptionedModel
from python_ref.models.discriminator import Discriminator
from python_ref.objectives.dmd import DMD
from python_ref.objectives.gan import GAN
from python_ref.objectives.sid import SID
from python_ref.stages.clips import Batch, Clip

Loss = tuple[Tensor, dict[str, Tensor]]


class Matching(Protocol):
    """The two losses of a training step."""

    critic: nn.Module
    networks: tuple[nn.Module, ...]  # the critic, and what does not learn

    def generator_loss(self, clip: Clip, batch: Batch) -> Loss: ...

    def critic_loss(self, clip: Clip, batch: Batch) -> Loss: ...


def make_matching(config: Config, network: CaptionedModel) -> Matching:
    """What `config.self_forcing.objective` names."""
    start = config.self_forcing.critic_init or config.self_forcing.teacher
    critic = CaptionedModel.load(start, causal=False, backend=config.backend).model
    critic.checkpoint_layers = config.checkpoint_activations
    kind = AdversarialMatching if config.self_forcing.objective == "gan" else ScoreMatching
    return kind(config, network, critic)


def _noise_options(config: Config) -> dict[str, float]:
    """At which noise levels videos are compared: options that all objectives have."""
    settings = config.self_forcing
    names = ("ts_schedule", "ts_schedule_max", "min_score_timestep")
    return {"timestep_shift": config.flow.shift, **{name: getattr(settings, name) for name in names}}


class ScoreMatching:
    """DMD or SiD: the critic is the score of the generated videos, to be compared with the teacher's."""

    def __init__(self, config: Config, network: CaptionedModel, critic: nn.Module) -> None:
        settings = config.self_forcing
        teacher = CaptionedModel.load(settings.teacher, causal=False, backend=config.backend).frozen().model
        teacher.checkpoint_layers = config.checkpoint_activations  # SiD differentiates it
        self.critic, self.networks = critic, (teacher, critic)
        options = {
            "guidance_scale": settings.guidance_scale,
            "fake_guidance_scale": settings.fake_guidance_scale,
            **_noise_options(config),
        }
        scored = network.model, teacher, critic, network.schedule()
        if settings.objective == "sid":
            self.objective: DMD = SID(*scored, **options, sid_alpha=settings.sid_alpha)
        else:
            self.objective = DMD(*scored, **options)

    def generator_loss(self, clip: Clip, batch: Batch) -> Loss:
        return self.objective.distribution_matching_loss(
            clip.video,
            batch.context,
            batch.uncond,
            clip.gradient_mask,
            clip.timestep_from,
            clip.timestep_to,
            source=batch.source,
        )

    def critic_loss(self, clip: Clip, batch: Batch) -> Loss:
        return self.objective.critic_loss(
            clip.video, batch.context, clip.timestep_from, clip.timestep_to, source=batch.source
        )


class AdversarialMatching:
    """GAN: the critic is a discriminator on the teacher's features, and real videos are needed."""

    def __init__(self, config: Config, network: CaptionedModel, critic: nn.Module) -> None:
        gan = config.self_forcing.gan
        torch.manual_seed(config.seed)  # initial weights of the registers
        self.critic = Discriminator(critic, gan.layers, sees_time=gan.sees_time)
        self.networks = (self.critic,)
        names = ("relativistic", "generator_weight", "discriminator_weight")
        penalties = ("r1_weight", "r1_sigma", "r2_weight", "r2_sigma")
        self.objective = GAN(
            network.model,
            self.critic,
            network.schedule(),
            **{name: getattr(gan, name) for name in (*names, *penalties)},
            **_noise_options(config),
        )

    def generator_loss(self, clip: Clip, batch: Batch) -> Loss:
        return self.objective.distribution_matching_loss(*self._pairs(clip, batch), source=batch.source)

    def critic_loss(self, clip: Clip, batch: Batch) -> Loss:
        return self.objective.critic_loss(*self._pairs(clip, batch), source=batch.source)

    @staticmethod
    def _pairs(clip: Clip, batch: Batch) -> tuple[Tensor, Tensor, Tensor, int | None, int | None]:
        real = batch.real[:, : clip.video.shape[1]]
        return clip.video, batch.context, real, clip.timestep_from, clip.timestep_to
