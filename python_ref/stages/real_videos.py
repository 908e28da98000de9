"""What the stages that learn from real videos share: everything but the objective and how they sample."""

from typing import Any

import torch
from torch import Tensor

from python_ref.config import CausalConfig, Config, TeacherConfig
from python_ref.data.source import TrainingSource
from python_ref.distributed import distribute
from python_ref.learning import Learner, update_average
from python_ref.models.captioned import CaptionedModel
from python_ref.models.text import drop_captions
from python_ref.precision import network_precision
from python_ref.randomness import derived_generator


class RealVideoStage:
    """Batches of real videos with dropped captions, accumulated gradients, and a moving average of the weights.

    Args:
        config: of the run.
        settings: of this stage.
        source: of videos and captions.
        network: what learns; frozen parts of it stay as they are.
        objective: has `loss(video, context, noise_source)`, which returns the loss and a log.
    """

    name: str

    def __init__(
        self,
        config: Config,
        settings: TeacherConfig | CausalConfig,
        source: TrainingSource,
        network: CaptionedModel,
        objective: Any,
    ) -> None:
        self.config, self.settings, self.source = config, settings, source
        self.network, self.objective = network, objective
        self.total_steps = settings.steps
        self.average = network.average_copy()
        distribute(config.distributed, network, self.average)
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
        video, captions = self.source.part(batch_number * size, size)
        draws = self.source.share.rows(torch.rand(size, generator=generator))
        captions = drop_captions(captions, draws, self.settings.caption_dropout)
        with network_precision(self.config.precision):
            noise_source = self.source.share.noise(generator)
            loss, _ = self.objective.loss(video, self.network.text(captions), noise_source)
        return loss
