"""The flow-matching noise schedule: which sigma belongs to which timestep.

Source: flow matching (arXiv 2210.02747); the shift of sigma towards noise is that of Stable Diffusion 3
(arXiv 2403.03206), section 5.3.2, as Wan2.1 uses it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class FlowMatchSchedule:
    """A table of falling sigmas, their timesteps and training weights; any timestep means its nearest table entry.

    sigma = shift s / (1 + (shift - 1) s) for s falling linearly from 1, timestep = num_train_timesteps * sigma.

    Args:
        shift: above 1 spends more of the steps at high noise.
        num_train_timesteps: the timestep of sigma 1.
        num_steps: entries of the table: 1000 for training, the number of sampling steps for sampling.
        sigma_min: where s ends.
        extra_one_step: s ends one step before ``sigma_min`` rather than at it, so that ``step`` arrives there last.

    Attributes:
        sigmas, timesteps: float32 [num_steps], falling.
        training_weights: float32 [num_steps], a bell around the middle timestep with mean 1.
    """

    def __init__(
        self,
        shift: float = 5.0,
        num_train_timesteps: int = 1000,
        num_steps: int = 1000,
        sigma_min: float = 0.0,
        extra_one_step: bool = True,
    ) -> None:
        if shift <= 0:
            raise ValueError(f"shift is {shift}, but must be positive")
        if num_steps < 1:
            raise ValueError(f"num_steps is {num_steps}, but must be at least 1")
        self.shift = shift
        self.num_train_timesteps = num_train_timesteps
        self.num_steps = num_steps
        uniform = torch.linspace(1.0, sigma_min, num_steps + int(extra_one_step))[:num_steps]
        self.sigmas = shift * uniform / (1 + (shift - 1) * uniform)
        self.timesteps = self.sigmas * num_train_timesteps
        bell = torch.exp(-2 * ((self.timesteps - num_steps / 2) / num_steps) ** 2)
        bell = bell - bell.min()
        self.training_weights = bell * (num_steps / bell.sum())
        self._device_tables: dict[torch.device, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def sigma_at(self, t: Tensor) -> Tensor:
        """float32 noise levels of timesteps of any shape."""
        return self._tables(t.device)[1][self._nearest(t)]

    def training_weight_at(self, t: Tensor) -> Tensor:
        """float32 loss weights of timesteps of any shape."""
        return self._tables(t.device)[3][self._nearest(t)]

    def add_noise(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """(1 - sigma) x + sigma noise, in the dtype of x. t has the leading dimensions of x: [B] or [B, F], say."""
        sigma = _expand(self.sigma_at(t), x)
        return ((1 - sigma) * x + sigma * noise).to(x.dtype)

    def step(self, flow: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """One Euler step from each timestep to the next in the table, and to sigma 0 from the last."""
        index = self._nearest(t)
        _, sigmas, next_sigmas, _ = self._tables(t.device)
        return (x + flow * _expand(next_sigmas[index] - sigmas[index], x)).to(x.dtype)

    def flow_to_x0(self, flow: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x_t - sigma flow, in the dtype of x_t."""
        return (x_t - _expand(self.sigma_at(t), x_t) * flow).to(x_t.dtype)

    def x0_to_flow(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """(x_t - x0) / sigma, in the dtype of x_t."""
        return ((x_t - x0) / _expand(self.sigma_at(t), x_t)).to(x_t.dtype)

    def warp(self, steps: Sequence[int]) -> Tensor:
        """Shifted timesteps of uniform ones: [1000, 750, 500, 250] becomes [1000, 937.5, 833.3, 625] at shift 5.

        Args:
            steps: integers in [0, num_train_timesteps].

        Returns:
            float32 [len(steps)].
        """
        self._check_training_table("warp")
        for step in steps:
            if not 0 <= step <= self.num_train_timesteps:
                raise ValueError(f"steps holds {step}, but they must lie in [0, {self.num_train_timesteps}]")
        table = torch.cat((self.timesteps, torch.zeros(1)))
        return table[[self.num_train_timesteps - int(step) for step in steps]]

    def unwarp(self, timestep: float | Tensor) -> int:
        """The uniform timestep whose shifted one is nearest: the inverse of ``warp``."""
        self._check_training_table("unwarp")
        return int(self._nearest(torch.as_tensor(timestep, dtype=torch.float32))) + 1

    def _check_training_table(self, method: str) -> None:
        if self.num_steps != self.num_train_timesteps:
            raise ValueError(
                f"num_steps is {self.num_steps}, but must be num_train_timesteps = {self.num_train_timesteps}: "
                f"{method} looks uniform timesteps up in the training table"
            )

    def _nearest(self, t: Tensor) -> Tensor:
        """Index into the rising tables of the nearest timestep, the higher of two equally near ones."""
        rising = self._tables(t.device)[0]
        t = t.to(rising.dtype)
        above = torch.searchsorted(rising, t).clamp_(max=len(rising) - 1)
        below = (above - 1).clamp_(min=0)
        return torch.where(rising[above] - t <= t - rising[below], above, below)

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rising timesteps (float64), sigmas, next lower sigmas and training weights on a device."""
        if device not in self._device_tables:
            sigmas = self.sigmas.flip(0)
            next_sigmas = torch.cat((torch.zeros(1), sigmas[:-1]))
            tables = (self.timesteps.flip(0).double(), sigmas, next_sigmas, self.training_weights.flip(0))
            self._device_tables[device] = tuple(table.to(device) for table in tables)
        return self._device_tables[device]


def _expand(values: Tensor, x: Tensor) -> Tensor:
    """Values of x's leading dimensions, ready to broadcast over the rest."""
    return values.reshape(*values.shape, *(1,) * (x.dim() - values.dim()))
