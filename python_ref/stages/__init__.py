"""The stages of training, each a class with the same few parts that the trainer drives."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from python_ref.models.captioned import CaptionedModel


class Stage(Protocol):
    """What a trainer needs of a stage. Everything that changes lies in `modules` and `optimizers`.

    Where several processes train together, a stage works on `TrainingSource.part` of every batch with the draws of
    `TrainingSource.share`, and passes its networks to `python_ref.distributed.distribute` before it makes `Learner`s.
    Buffers of a module that belong to the samples of that part are named, with their batch dimension, in its attribute
    `batch_dims`; all other tensors of a module are the same in every process.
    """

    name: str
    total_steps: int
    modules: Mapping[str, nn.Module]
    optimizers: Mapping[str, torch.optim.Optimizer]
    average: CaptionedModel  # the moving average of the weights, which is what the stage hands on

    def train_step(self, step: int) -> dict[str, float]:
        """Optimizer step `step` (from 0) and its metrics; depends on modules, optimizers, settings and step alone."""

    def sample(self, captions: Sequence[str], generator: torch.Generator) -> Tensor:
        """Videos [B, F, C, H, W] of the averaged model."""
