"""Another stage two: a causal model trained by teacher forcing becomes a few-step one by consistency distillation
(Causal Forcing++, arXiv 2605.15141) on real videos."""

from collections.abc import Sequence

from torch import Tensor

from python_ref.config import Config
from python_ref.data.source import TrainingSource
from python_ref.distributed import distribute
from python_ref.models.captioned import CaptionedModel
from python_ref.noise import NoiseSource
from python_ref.objectives.consistency import ConsistencyDistillation
from python_ref.stages.examples import CausalExamplesStage


class ConsistencyStage(CausalExamplesStage):
    """The target is the moving average of the student's weights; see `python_ref.stages.Stage` for the parts."""

    name = "consistency"

    def __init__(self, config: Config, source: TrainingSource) -> None:
        settings = config.consistency
        network = CaptionedModel.load(settings.init, causal=True, backend=config.backend, embed=source.embed)
        super().__init__(config, settings, source, network)
        teacher = CaptionedModel.load(settings.teacher, causal=True, backend=config.backend).frozen().model
        distribute(config, teacher)
        self.objective = ConsistencyDistillation(
            network.model,
            self.average.model,
            teacher,
            network.schedule(settings.solver_steps),
            **config.rollout.blocks(),
            guidance_scale=settings.guidance_scale,
        )

    def _objective_loss(self, examples: Tensor, captions: Sequence[str], source: NoiseSource) -> Tensor:
        context, uncond = self.network.contexts(captions)
        return self.objective.loss(examples, context, source, uncond)[0]
