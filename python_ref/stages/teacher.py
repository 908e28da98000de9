"""Stage one: a bidirectional model learns to denoise whole videos by flow matching (arXiv 2210.02747)."""

from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from python_ref.config import Config
from python_ref.data.source import TrainingSource
from python_ref.generation import generate_bidirectional
from python_ref.models.captioned import CaptionedModel
from python_ref.objectives.diffusion import TeacherFlowMatching
from python_ref.stages.examples import ExamplesStage


class TeacherStage(ExamplesStage):
    """Model and text encoder are trained together; see `python_ref.stages.Stage` for the parts."""

    name = "teacher"

    def __init__(self, config: Config, source: TrainingSource) -> None:
        torch.manual_seed(config.seed)  # initial weights
        model_settings = {
            "model": asdict(config.model),
            "flow": asdict(config.flow),
            "words": source.words,
            "num_frames": source.num_frames,
            "channels": source.channels,
            "frame_size": source.frame_size,
        }
        network = CaptionedModel(model_settings, causal=False, backend=config.backend, embed=source.embed)
        super().__init__(config, config.teacher, source, network)
        self.objective = TeacherFlowMatching(network.model, network.schedule(), weighted=False)

    def sample(self, captions: Sequence[str], generator: torch.Generator) -> Tensor:
        settings = self.config.teacher
        return generate_bidirectional(
            self.average,
            captions,
            settings.sample_steps,
            settings.guidance_scale,
            generator,
            self.config.precision,
        )
