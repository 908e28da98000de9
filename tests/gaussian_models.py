"""Generator and scores of Gaussian videos, whose best flow is known: small modules with the models' interface."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from python_ref.backend import load_backend
from python_ref.models.wan import WanConfig
from python_ref.schedule import FlowMatchSchedule
from selfforcing_ext.mask import BlockCausalMask

SCHEDULE = FlowMatchSchedule(1.0)
SHAPE = (2, 1, 2, 2)  # [F, C, H, W]


class Gaussian(nn.Module):
    """N(mean, deviation^2) for every element of a video of ``SHAPE``, mean and deviation learned."""

    def __init__(self, mean: float, deviation: float, backend: str = "reference") -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.full(SHAPE, mean))
        self.log_deviation = nn.Parameter(torch.full(SHAPE, deviation).log())
        self.ops = load_backend(backend)

    @property
    def deviation(self) -> Tensor:
        return self.log_deviation.exp()

    def sample(self, noise: Tensor) -> Tensor:
        """Videos [B, F, C, H, W] from standard normal ones."""
        return self.mean + self.deviation * noise


class GaussianScore(Gaussian):
    """The flow that predicts these Gaussians best: x_t = (1 - sigma) x0 + sigma noise is jointly Gaussian with x0."""

    def encode_context(self, context: Tensor) -> Tensor:
        return context

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        sigma = SCHEDULE.sigma_at(t)[:, None, None, None, None]
        signal = (1 - sigma) * self.deviation.square()
        gain = signal / ((1 - sigma) * signal + sigma**2)
        x0 = self.mean + gain * (x_t - (1 - sigma) * self.mean)
        return (x_t - x0) / sigma

    def at_noise_level(self, sigma: float) -> tuple[Tensor, Tensor]:
        """Gain and offset of the ODE's map from its start, standard normal noise, to its state at sigma."""
        return ((1 - sigma) ** 2 * self.deviation.square() + sigma**2).sqrt(), (1 - sigma) * self.mean


class CausalGaussianScore(GaussianScore):
    """With the interface of a causal model: timesteps [B, F], and a mask that does not matter, as frames do not depend
    on each other."""

    def __init__(self, mean: float, deviation: float, backend: str = "reference") -> None:
        super().__init__(mean, deviation, backend)
        self.config = WanConfig(in_dim=SHAPE[1], out_dim=SHAPE[1], patch_size=(1, 1, 1))

    def forward(
        self, x_t: Tensor, t: Tensor, context: Tensor, mask: BlockCausalMask, clean_x: Tensor | None = None
    ) -> Tensor:
        return torch.cat([self._frame(x_t, t, frame) for frame in range(SHAPE[0])], dim=1)

    def _frame(self, x_t: Tensor, t: Tensor, frame: int) -> Tensor:
        whole = super().forward(x_t[:, [frame] * SHAPE[0]], t[:, frame], x_t)
        return whole[:, frame : frame + 1]


class AffineStudent(nn.Module):
    """A causal model that predicts x0 = gain x_t + offset, with both learned for every denoising step."""

    def __init__(self, timesteps: Tensor, backend: str = "reference") -> None:
        super().__init__()
        self.config = WanConfig(in_dim=SHAPE[1], out_dim=SHAPE[1], patch_size=(1, 1, 1))
        self.ops = load_backend(backend)
        self.register_buffer("timesteps", timesteps)
        self.gain = nn.Parameter(torch.ones(len(timesteps)))
        self.offset = nn.Parameter(torch.zeros(len(timesteps)))

    def forward(
        self, x_t: Tensor, t: Tensor, context: Tensor, mask: BlockCausalMask, clean_x: Tensor | None = None
    ) -> Tensor:
        step = (self.timesteps - t[..., None]).abs().argmin(-1)
        gain, offset, sigma = (
            value[:, :, None, None, None] for value in (self.gain[step], self.offset[step], SCHEDULE.sigma_at(t))
        )
        return (x_t - (gain * x_t + offset)) / sigma


class QuadraticDiscriminator(nn.Module):
    """A logit that is quadratic in every element, as the log ratio of two Gaussians is, with coefficients quadratic in
    the noise level."""

    def __init__(self) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.zeros(3, 2, *SHAPE))  # [power of sigma, power of x - 1, ...]

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        powers = SCHEDULE.sigma_at(t)[:, None] ** torch.arange(3)
        at_level = torch.einsum("bp,pq...->bq...", powers, self.coefficients)
        return (at_level[:, 0] * x_t + at_level[:, 1] * x_t.square()).flatten(1).sum(1, keepdim=True)
