"""The part of every batch that one process works on, and the noise that belongs to it.

Processes that share a batch compute what one process would on all of it: each takes neighbouring rows, and a draw for
a batch is the one that a single process makes, of which each process keeps its rows. So a run does not depend on the
number of its processes but for the order of floating-point sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from python_ref.noise import NoiseSource, TorchNoise


@dataclass(frozen=True)
class BatchShare:
    """Part `index` of `count` equal parts of every batch."""

    index: int = 0
    count: int = 1

    def place(self, first: int, size: int) -> tuple[int, int]:
        """First sample and number of samples of this part of the batch of `size` samples from `first` on.

        Raises:
            ValueError: the batch has no equal parts.
        """
        if size % self.count:
            raise ValueError(f"batch_size is {size}; accepted with {self.count} data-parallel processes: a multiple")
        return first + self.index * (size // self.count), size // self.count

    def rows(self, values: Tensor) -> Tensor:
        """This part of values that were made for the whole batch, [B, ...]."""
        start, size = self.place(0, len(values))
        return values[start : start + size]

    def noise(self, generator: torch.Generator) -> NoiseSource:
        """This part of what the generator draws for whole batches."""
        return TorchNoise(generator) if self.count == 1 else _NoiseOfShare(TorchNoise(generator), self)


class _NoiseOfShare:
    """Draws with the batch size of the share for the whole batch, and hands out the share's rows.

    Integers of one dimension or none belong to no sample (exit steps, lengths of rollouts): all shares get the same.
    """

    def __init__(self, whole: NoiseSource, share: BatchShare) -> None:
        self.whole, self.share = whole, share

    def randn(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.share.rows(self.whole.randn(self._whole_shape(shape), dtype, device))

    def randint(self, low: int, high: int, shape: Sequence[int], device: torch.device) -> Tensor:
        if len(shape) < 2:
            return self.whole.randint(low, high, shape, device)
        return self.share.rows(self.whole.randint(low, high, self._whole_shape(shape), device))

    def _whole_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (shape[0] * self.share.count, *shape[1:])
