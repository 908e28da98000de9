"""Stage three: the causal model learns from its own videos (Self-Forcing, arXiv 2506.08009, algorithm 1).

The generator makes videos (`python_ref.stages.clips`), by default exactly as inference does; distribution matching
(`python_ref.stages.matching`) pulls their distribution towards the teacher's or the data's, with a critic that follows
the generator (DMD2, arXiv 2405.14867).
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
from python_ref.models.lora import add_lora
from python_ref.objectives.score_noise import constant_weights
from python_ref.precision import network_precision
from python_ref.randomness import derived_generator
from python_ref.stages.clips import Batch, make_clips
from python_ref.stages.matching import make_matching


class SelfForcingStage:
    """Every step updates the critic, every `generator_every`-th the generator first; see `Stage` for the parts."""

    name = "self_forcing"

    def __init__(self, config: Config, source: TrainingSource) -> None:
        self.config, self.settings, self.source = config, config.self_forcing, source
        self.total_steps = self.settings.steps
        self.network = CaptionedModel.load(self.settings.init, causal=True, backend=config.backend, embed=source.embed)
        self.network.settings["rollout"] = asdict(config.rollout)
        self.network.text.requires_grad_(False)
        self.network.model.checkpoint_layers = config.checkpoint_activations
        if self.settings.lora_rank:
            self._adapt()
        self.average = self.network.average_copy()
        self.clips = make_clips(config, self.network, source.share)
        self.matching = make_matching(config, self.network)
        distribute(config, self.network, *self.matching.networks, self.average, *self.clips.modules.values())
        self.learner = Learner(self.network.model, self.settings.generator, self.generator_updates(self.total_steps))
        self.critic_learner = Learner(self.matching.critic, self.settings.critic, self.total_steps)
        own = {"model": self.network, "critic": self.matching.critic, "average": self.average}
        self.modules = {**own, **self.clips.modules}
        self.optimizers = {"model": self.learner.optimizer, "critic": self.critic_learner.optimizer}

    def _adapt(self) -> None:
        torch.manual_seed(self.config.seed)  # initial weights of the adapters
        add_lora(self.network.model, self.settings.lora_rank, self.settings.lora_alpha)

    def generator_updates(self, steps: int) -> int:
        """Updates of the generator within the first `steps` steps."""
        return -(-steps // self.settings.generator_every)

    def train_step(self, step: int) -> dict[str, float]:
        batches = [self._batch(step, part) for part in range(self.settings.accumulate)]
        metrics: dict[str, float] = {}
        if step % self.settings.generator_every == 0:
            metrics |= self._train_generator(self.generator_updates(step), batches)
        return metrics | self._train_critic(step, batches)

    def _batch(self, step: int, part: int) -> Batch:
        generator = derived_generator(self.config.seed, self.name, "step", step * self.settings.accumulate + part)
        size = self.settings.batch_size
        first = self.clips.batch_number(step, part) * size
        with network_precision(self.config.precision):
            context, uncond = self.network.contexts(self.source.captions_of_part(first, size))
        return Batch(
            step, lambda: self.source.part(first, size)[0], context, uncond, self.source.share.noise(generator)
        )

    def _train_generator(self, update: int, batches: Sequence[Batch]) -> dict[str, float]:
        metrics = MeanMetrics(len(batches))
        for batch in batches:
            with constant_weights(self.matching.critic):  # in backward too, where activations may be recomputed
                with network_precision(self.config.precision):
                    loss, log = self.matching.generator_loss(self.clips(batch), batch)
                (loss / len(batches)).backward()
            metrics.add({"generator_loss": loss, **log})
        learned = self.learner.step(update)
        update_average(self.average, self.network, self.settings.ema_decay, update)
        return metrics.means | {"generator_grad_norm": learned["grad_norm"], "generator_lr": learned["lr"]}

    def _train_critic(self, step: int, batches: Sequence[Batch]) -> dict[str, float]:
        metrics = MeanMetrics(len(batches))
        for batch in batches:
            with network_precision(self.config.precision):
                with torch.no_grad():
                    clip = self.clips(batch)
                loss, log = self.matching.critic_loss(clip, batch)
            (loss / len(batches)).backward()
            metrics.add({"critic_loss": loss, **{f"critic_{name}": value for name, value in log.items()}})
        learned = self.critic_learner.step(step)
        return metrics.means | {"critic_grad_norm": learned["grad_norm"], "critic_lr": learned["lr"]}

    def sample(self, captions: Sequence[str], generator: torch.Generator) -> Tensor:
        """Of captions; with given frames, which belong to the captions of the data, those of the data count."""
        rollout, given = self.config.rollout, self.settings.given_frames
        frames = rollout.frames_within(self.average.settings["num_frames"], given)
        initial = self.source.batch(0, len(captions))[0][:, :given] if given else None
        return generate_causal(self.average, captions, frames, rollout, generator, self.config.precision, initial)


class MeanMetrics:
    """Means over the parts of an accumulated step, of all that is one number."""

    def __init__(self, parts: int) -> None:
        self.parts = parts
        self.means: dict[str, float] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            if value.dim() == 0:
                self.means[name] = self.means.get(name, 0.0) + value.item() / self.parts
