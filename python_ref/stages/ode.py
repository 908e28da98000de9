"""Another stage two: the teacher's weights become a few-step causal model by regression on the teacher's ODE (CausVid,
arXiv 2412.07772, section 4.3), whose solutions `python -m python_ref.make_ode_pairs` wrote."""

from dataclasses import replace

import torch
from torch import Tensor

from python_ref.config import Config
from python_ref.data.ode_pairs import OdePairs
from python_ref.data.order import shuffled
from python_ref.data.source import TrainingSource
from python_ref.models.captioned import CaptionedModel
from python_ref.objectives.ode_regression import ODERegression
from python_ref.stages.examples import CausalExamplesStage


class OdeStage(CausalExamplesStage):
    """See `python_ref.stages.Stage` for the parts.

    Raises:
        ValueError: pairs of other denoising steps than the rollout's.
    """

    name = "ode"

    def __init__(self, config: Config, source: TrainingSource) -> None:
        pairs = OdePairs(config.ode.pairs)
        steps = config.rollout.denoising_steps
        if list(steps) != pairs.denoising_steps:
            raise ValueError(
                f"rollout.denoising_steps is {list(steps)}; accepted with the pairs in {config.ode.pairs}: "
                f"{pairs.denoising_steps}"
            )
        network = CaptionedModel.load(config.ode.init, causal=True, backend=config.backend, embed=source.embed)
        batches = ShuffledPairs(pairs, config.seed)
        super().__init__(config, config.ode, replace(source, batch=batches), network)
        schedule = network.schedule()
        self.objective = ODERegression(network.model, schedule, schedule.warp(steps), **config.rollout.blocks())


class ShuffledPairs:
    """Batches of trajectories [B, T, F, C, H, W] and captions, in an order of its own in each pass over the pairs."""

    def __init__(self, pairs: OdePairs, seed: int) -> None:
        self.pairs, self.seed = pairs, seed

    def __call__(self, first: int, size: int) -> tuple[Tensor, list[str]]:
        items = [self.pairs[index] for index in shuffled(first, size, len(self.pairs), self.seed)]
        return torch.stack([trajectory for trajectory, _ in items]), [caption for _, caption in items]
