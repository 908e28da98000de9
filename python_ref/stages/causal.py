"""Stage two: the teacher's weights become a causal model, by teacher forcing (Self-Forcing, arXiv 2506.08009, section
3.1) or diffusion forcing (arXiv 2407.01392) on real videos."""

from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from python_ref.config import Config
from python_ref.data.source import TrainingSource
from python_ref.generation import generate_causal
from python_ref.learning import Learner, update_average
from python_ref.models.captioned import CaptionedModel
from python_ref.models.text import drop_captions
from python_ref.noise import TorchNoise
from python_ref.objectives.diffusion import CausalDiffusion
from python_ref.precision import network_precision
from python_ref.randomness import derived_generator


class CausalStage:
    """The text encoder stays as the teacher left it; see `python_ref.stages.Stage` for the parts."""

    name = "causal"

    def __init__(self, config: Config, source: TrainingSource) -> None:
        self.config, self.settings, self.source = config, config.causal, source
        self.total_steps = self.settings.steps
        self.network = CaptionedModel.load(self.settings.init, causal=True, backend=config.backend)
        self.network.settings["rollout"] = asdict(config.rollout)
        self.network.text.requires_grad_(False)
        self.average = self.network.average_copy()
        self.objective = CausalDiffusion(
            self.network.model,
            self.network.schedule(),
            config.rollout.frames_per_block,
            window_frames=config.rollout.window_frames,
            sink_frames=config.rollout.sink_frames,
            teacher_forcing=self.settings.forcing == "teacher",
            weighted=False,
        )
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
        size = self.settings.batch_size
        generator = derived_generator(self.config.seed, self.name, "batch", batch_number)
        video, captions = self.source.batch(batch_number * size, size)
        captions = drop_captions(captions, torch.rand(size, generator=generator), self.settings.caption_dropout)
        with network_precision(self.config.precision):
            context, _ = self.network.contexts(captions)
            loss, _ = self.objective.loss(video, context, TorchNoise(generator))
        return loss

    def sample(self, captions: Sequence[str], generator: torch.Generator) -> Tensor:
        frames = self.average.settings["num_frames"]
        return generate_causal(self.average, captions, frames, self.config.rollout, generator, self.config.precision)
