"""Flow-matching denoising steps and the distribution-matching gradient.

Words: sigma is the noise level, x_t = (1 - sigma) x0 + sigma noise, and the network predicts flow = noise - x0, so
x0 = x_t - sigma flow.

Source: flow matching (arXiv 2210.02747) with the linear path of rectified flow (arXiv 2209.03003).
"""

from __future__ import annotations

import torch
from torch import Tensor

from python_ref.ops.philox import normal_noise
from selfforcing_ext.philox import PhiloxNoise


def denoise_step(
    flow: Tensor,  # [B, F, C, H, W]
    x_t: Tensor,  # [B, F, C, H, W]
    sigma: Tensor,  # [B, F]
    sigma_next: Tensor | None = None,  # [B, F]
    noise: Tensor | PhiloxNoise | None = None,  # [B, F, C, H, W]
) -> tuple[Tensor, Tensor | None]:
    """The clean latents that a flow prediction implies, and their noised version for the next step.

    Args:
        noise: given, or drawn as ``PhiloxNoise`` says.

    Returns:
        x0 = x_t - sigma flow, and (1 - sigma_next) x0 + sigma_next noise, or None if ``sigma_next`` is None. Both in
        the dtype of x_t, computed in float32 (float64 for float64), x0 not rounded in between.

    Raises:
        ValueError: only one of ``sigma_next`` and ``noise`` is given.
    """
    if (sigma_next is None) != (noise is None):
        given, missing = ("noise", "sigma_next") if sigma_next is None else ("sigma_next", "noise")
        raise ValueError(f"{missing} is None, but must be given together with {given}")
    dtype = torch.promote_types(x_t.dtype, torch.float32)
    x0 = x_t.to(dtype) - _per_frame(sigma, dtype) * flow.to(dtype)
    if sigma_next is None or noise is None:
        return x0.to(x_t.dtype), None
    return x0.to(x_t.dtype), add_noise(x0, noise, sigma_next).to(x_t.dtype)


def guided_denoise_step(
    flow_cond: Tensor,  # [B, F, C, H, W]
    flow_uncond: Tensor,  # [B, F, C, H, W]
    guidance_scale: float,
    x_t: Tensor,  # [B, F, C, H, W]
    sigma: Tensor,  # [B, F]
    sigma_next: Tensor | None = None,  # [B, F]
    noise: Tensor | PhiloxNoise | None = None,  # [B, F, C, H, W]
) -> tuple[Tensor, Tensor | None]:
    """``denoise_step`` with flow = flow_uncond + guidance_scale (flow_cond - flow_uncond).

    Source: classifier-free guidance (arXiv 2207.12598), in the parametrisation that Wan2.1 samples with.
    """
    dtype = torch.promote_types(x_t.dtype, torch.float32)
    flow_cond, flow_uncond = flow_cond.to(dtype), flow_uncond.to(dtype)
    return denoise_step(flow_uncond + guidance_scale * (flow_cond - flow_uncond), x_t, sigma, sigma_next, noise)


def add_noise(
    x0: Tensor,  # [B, F, C, H, W]
    noise: Tensor | PhiloxNoise,  # [B, F, C, H, W]
    sigma: Tensor,  # [B, F]
) -> Tensor:
    """x_t = (1 - sigma) x0 + sigma noise, in the dtype of x0."""
    if isinstance(noise, PhiloxNoise):
        noise = normal_noise(x0.shape, noise, x0.device)
    dtype = torch.promote_types(x0.dtype, torch.float32)
    level = _per_frame(sigma, dtype)
    return ((1 - level) * x0.to(dtype) + level * noise.to(dtype)).to(x0.dtype)


@torch.no_grad()
def dmd_gradient(
    x: Tensor,  # [B, F, C, H, W]
    x0_fake: Tensor,  # [B, F, C, H, W]
    x0_real_cond: Tensor,  # [B, F, C, H, W]
    x0_real_uncond: Tensor | None = None,  # [B, F, C, H, W]
    guidance_scale: float = 0.0,
) -> Tensor:
    """Gradient of the distribution-matching loss with respect to the generated latents, normalised per video.

    Args:
        x: generated latents.
        x0_fake: x0 prediction of the critic (score of the generated distribution) from the noised x.
        x0_real_cond, x0_real_uncond: x0 predictions of the teacher with and without caption; without the second no
            guidance is applied.
        guidance_scale: real = cond + guidance_scale (cond - uncond), as Self-Forcing trains.

    Returns:
        (x0_fake - real) / mean |x - real|, the mean over all but the batch dimension; non-finite values replaced as by
        ``torch.nan_to_num``. In the dtype of x, constant to autograd.

    Source: DMD (arXiv 2311.18828), equations 7 and 8.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    real = x0_real_cond.to(dtype)
    if x0_real_uncond is not None:
        real = real + guidance_scale * (real - x0_real_uncond.to(dtype))
    distance = (x.to(dtype) - real).abs().mean(dim=tuple(range(1, x.dim())), keepdim=True)
    return torch.nan_to_num((x0_fake.to(dtype) - real) / distance).to(x.dtype)


def _per_frame(sigma: Tensor, dtype: torch.dtype) -> Tensor:
    return sigma.to(dtype)[:, :, None, None, None]
