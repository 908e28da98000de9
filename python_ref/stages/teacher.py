"""Stage one: a bidirectional model learns to denoise whole videos by flow matching (arXiv 2210.02747)."""

from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from python_ref.config import Config
from python_ref.data.source import TrainingSource
from python_ref.generation import generate_bidirectional
from python_ref.learning import Learner, update_average
from python_ref.models.captioned import CaptionedModel
from python_ref.models.text import drop_captions
from python_ref.noise import TorchNoise
from python_ref.objectives.diffusion import TeacherFlowMatching
from python_ref.precision import network_precision
from python_ref.randomness import derived_generator


class TeacherStage:
    """Model and text encoder are trained together; see `python_ref.stages.Stage` for the parts."""

    name = "teacher"

    def __init__(self, config: Config, source: TrainingSource) -> None:
        self.config, self.settings, self.source = config, config.teacher, source
        self.total_steps = self.settings.steps
        torch.manual_seed(config.seed)  # initial weights
        model_settings = {
            "model": asdict(config.model),
            "flow": asdict(config.flow),
            "words": source.words,
            "num_frames": source.num_frames,
            "channels": source.channels,
            "frame_size": source.frame_size,
        }
        self.network = CaptionedModel(model_settings, causal=False, backend=config.backend)
        self.average = self.network.average_copy()
        self.objective = TeacherFlowMatching(self.network.model, self.network.schedule(), weighted=False)
        self.learner = Learner(self.network, self.settings.optimizer, self.total_steps)
        self.modules = {"model": self.network, "average": self.average}
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
        """Mean squared error of the flow on one batch."""
        size = self.settings.batch_size
        generator = derived_generator(self.config.seed, self.name, "batch", batch_number)
        video, captions = self.source.batch(batch_number * size, size)
        captions = drop_captions(captions, torch.rand(size, generator=generator), self.settings.caption_dropout)
        with network_precision(self.config.precision):
            loss, _ = self.objective.loss(video, self.network.text(captions), TorchNoise(generator))
        return loss

    def sample(self, captions: Sequence[str], generator: torch.Generator) -> Tensor:
        return generate_bidirectional(
            self.average,
            captions,
            self.settings.sample_steps,
            self.settings.guidance_scale,
            generator,
            self.config.precision,
        )
