"""Where random draws come from. Everything random goes through a source, so that a run can be replayed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class NoiseSource(Protocol):
    """What pipelines and objectives draw from."""

    def randn(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Standard normal numbers."""
        ...

    def randint(self, low: int, high: int, shape: Sequence[int], device: torch.device) -> Tensor:
        """int64 numbers in [low, high)."""
        ...


class TorchNoise:
    """Draws from a generator, on the generator's device, so that a seed means the same on every device.

    Args:
        generator: a ``torch.Generator``, or a seed for a new one on the CPU.
    """

    def __init__(self, generator: torch.Generator | int) -> None:
        self.generator = torch.Generator().manual_seed(generator) if isinstance(generator, int) else generator

    def randn(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)  # half types get the rounded float32 numbers
        drawn = torch.randn(tuple(shape), generator=self.generator, dtype=wide, device=self.generator.device)
        return drawn.to(device=device, dtype=dtype)

    def randint(self, low: int, high: int, shape: Sequence[int], device: torch.device) -> Tensor:
        return torch.randint(low, high, tuple(shape), generator=self.generator, device=self.generator.device).to(device)


class ReplayNoise:
    """Hands out recorded draws in order, reshaped to what is asked for.

    Raises:
        ValueError: the record is exhausted, or the next draw has another number of elements, another kind (normal or
            integer), or integers out of range: the run is not the recorded one.
    """

    def __init__(self, draws: Sequence[Tensor]) -> None:
        self.draws = list(draws)
        self.consumed = 0

    def randn(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        draw = self._next("randn", shape)
        if not draw.is_floating_point():
            raise ValueError(f"draw {self.consumed - 1} is {draw.dtype}, but randn was asked for")
        return draw.to(device=device, dtype=dtype)

    def randint(self, low: int, high: int, shape: Sequence[int], device: torch.device) -> Tensor:
        draw = self._next("randint", shape)
        if draw.is_floating_point() or (draw.numel() and (int(draw.min()) < low or int(draw.max()) >= high)):
            raise ValueError(f"draw {self.consumed - 1} is {draw}, but integers in [{low}, {high}) were asked for")
        return draw.to(device)

    def _next(self, kind: str, shape: Sequence[int]) -> Tensor:
        if self.consumed == len(self.draws):
            raise ValueError(f"{kind} {list(shape)} was asked for, but all {len(self.draws)} draws are consumed")
        draw = self.draws[self.consumed]
        if draw.numel() != torch.Size(shape).numel():
            raise ValueError(
                f"draw {self.consumed} has shape {list(draw.shape)}, but {kind} {list(shape)} was asked for"
            )
        self.consumed += 1
        return draw.reshape(tuple(shape))
