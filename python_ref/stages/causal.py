"""Stage two: the teacher's weights become a causal model, by teacher forcing (Self-Forcing, arXiv 2506.08009, section
3.1) or diffusion forcing (arXiv 2407.01392) on real videos."""

from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from python_ref.config import Config
from python_ref.data.source import TrainingSource
from python_ref.generation import generate_causal
from python_ref.models.captioned import CaptionedModel
from python_ref.objectives.diffusion import CausalDiffusion
from python_ref.stages.real_videos import RealVideoStage


class CausalStage(RealVideoStage):
    """The text encoder stays as the teacher left it; see `python_ref.stages.Stage` for the parts."""

    name = "causal"

    def __init__(self, config: Config, source: TrainingSource) -> None:
        network = CaptionedModel.load(config.causal.init, causal=True, backend=config.backend, embed=source.embed)
        network.settings["rollout"] = asdict(config.rollout)
        network.text.requires_grad_(False)
        objective = CausalDiffusion(
            network.model,
            network.schedule(),
            config.rollout.frames_per_block,
            window_frames=config.rollout.window_frames,
            sink_frames=config.rollout.sink_frames,
            teacher_forcing=config.causal.forcing == "teacher",
            weighted=False,
        )
        super().__init__(config, config.causal, source, network, objective)

    def sample(self, captions: Sequence[str], generator: torch.Generator) -> Tensor:
        frames = self.average.settings["num_frames"]
        return generate_causal(self.average, captions, frames, self.config.rollout, generator, self.config.precision)
