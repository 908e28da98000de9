"""What the stages share that learn from given examples, real videos or solutions of an ODE: all but the objective."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from python_ref.config import Config, ExamplesConfig
from python_ref.data.source import TrainingSource
from python_ref.distributed import distribute
from python_ref.generation import generate_causal
from python_ref.learning import Learner, update_average
from python_ref.models.captioned import CaptionedModel
from python_ref.models.text import drop_captions
from python_ref.noise import NoiseSource
from python_ref.precision import network_precision
from python_ref.randomness import derived_generator


class ExamplesStage:
    """Batches of examples with dropped captions, accumulated gradients, and a moving average of the weights.

    Args:
        config: of the run.
        settings: of this stage.
        source: of examples and captions.
        network: what learns; frozen parts of it stay as they are.
    """

    name: str
    objective: Any  # has `loss(examples, context, noise_source)`, which returns the loss and a log

    def __init__(
        self,
        config: Config,
        settings: ExamplesConfig,
        source: TrainingSource,
        network: CaptionedModel,
    ) -> None:
        self.config, self.settings, self.source, self.network = config, settings, source, network
        self.total_steps = settings.steps
        network.model.checkpoint_layers = config.checkpoint_activations
        self.average = network.average_copy()
        distribute(config, network, self.average)
        self.learner = Learner(network, settings.optimizer, self.total_steps)
        self.modules = {"model": network, "average": self.average}
        self.optimizers = {"model": self.learner.optimizer}

    def train_step(self, step: int) -> dict[str, float]:
        total = 0.0
        for part in range(self.settings.accumulate):
            loss = self._loss(step * self.settings.accumulate + part) / self.settings.accumulate
            loss.backward()
            total += loss.item()
        metrics = self.learner.step(step)
        update_average(self.average, self.network, self.settings.ema_decay, step)
        return {"loss": total, **metrics}

    def _loss(self, batch_number: int) -> Tensor:
        size = self.settings.batch_size
        generator = derived_generator(self.config.seed, self.name, "batch", batch_number)
        examples, captions = self.source.part(batch_number * size, size)
        draws = self.source.share.rows(torch.rand(size, generator=generator))
        captions = drop_captions(captions, draws, self.settings.caption_dropout)
        with network_precision(self.config.precision):
            return self._objective_loss(examples, captions, self.source.share.noise(generator))

    def _objective_loss(self, examples: Tensor, captions: Sequence[str], source: NoiseSource) -> Tensor:
        return self.objective.loss(examples, self.network.text(captions), source)[0]


class CausalExamplesStage(ExamplesStage):
    """Of a causal model, whose text encoder stays as the teacher left it."""

    def __init__(
        self,
        config: Config,
        settings: ExamplesConfig,
        source: TrainingSource,
        network: CaptionedModel,
    ) -> None:
        network.settings["rollout"] = asdict(config.rollout)
        network.text.requires_grad_(False)
        super().__init__(config, settings, source, network)

    def sample(self, captions: Sequence[str], generator: torch.Generator) -> Tensor:
        rollout = self.config.rollout
        frames = rollout.frames_within(self.average.settings["num_frames"])
        return generate_causal(self.average, captions, frames, rollout, generator, self.config.precision)
