"""Stage two: the teacher's weights become a causal model, by teacher forcing (Self-Forcing, arXiv 2506.08009, section
3.1) or diffusion forcing (arXiv 2407.01392) on real videos."""

from python_ref.config import Config
from python_ref.data.source import TrainingSource
from python_ref.models.captioned import CaptionedModel
from python_ref.objectives.diffusion import CausalDiffusion
from python_ref.stages.examples import CausalExamplesStage


class CausalStage(CausalExamplesStage):
    """See `python_ref.stages.Stage` for the parts."""

    name = "causal"

    def __init__(self, config: Config, source: TrainingSource) -> None:
        settings = config.causal
        network = CaptionedModel.load(settings.init, causal=True, backend=config.backend, embed=source.embed)
        super().__init__(config, settings, source, network)
        self.objective = CausalDiffusion(
            network.model,
            network.schedule(),
            **config.rollout.blocks(),
            teacher_forcing=settings.forcing == "teacher",
            clean_noise_steps=settings.clean_noise_steps,
            published_clean_noise=settings.published_clean_noise,
            weighted=False,
        )
