"""Flow-matching denoising steps and the distribution-matching gradient.

Words: sigma is the noise level, x_t = (1 - sigma) x0 + sigma noise, and the network predicts flow = noise - x0, so
x0 = x_t - sigma flow.

Source: flow matching (arXiv 2210.02747) with the linear path of rectified flow (arXiv 2209.03003).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selfforcing_ext.checks import check_float_tensor, dtype_name, number_per_entry
from selfforcing_ext.library import call, nvtx_range, ops, register_autograd
from selfforcing_ext.philox import PhiloxNoise


@nvtx_range("denoise_step")
def denoise_step(
    flow: Tensor,  # [B, F, C, H, W]
    x_t: Tensor,  # [B, F, C, H, W]
    sigma: Tensor,  # [B, F]
    sigma_next: Tensor | None = None,  # [B, F]
    noise: Tensor | PhiloxNoise | None = None,  # [B, F, C, H, W]
) -> tuple[Tensor, Tensor | None]:
    """The clean latents that a flow prediction implies, and their noised version for the next step, in one pass.

    Differentiable in flow, x_t and noise; the noise levels are constants. The same bits on every
    instruction set of a CPU (but for bfloat16 results below 2^-126) and in the emulated CUDA kernels.

    Args:
        flow, x_t, noise: float32, bfloat16 or float16; flow and noise are cast to the dtype of x_t. Any strides;
            latents whose [H, W] planes are not dense are copied. A ``PhiloxNoise`` is drawn in the same pass.
        sigma, sigma_next: noise levels of x_t and of the result, in [0, 1]; any floating dtype, used as float32.

    Returns:
        x0 = x_t - sigma flow, and (1 - sigma_next) x0 + sigma_next noise, or None if ``sigma_next`` is None. Both
        [B, F, C, H, W], contiguous, in the dtype of x_t, under autocast too; computed in float32, x0 not rounded in
        between.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: shapes or devices that do not fit each other, only one of ``sigma_next`` and ``noise`` given, or a
            seed or offset of noise that is not one.
    """
    return _denoise(flow, None, 1.0, x_t, sigma, sigma_next, noise)


@nvtx_range("guided_denoise_step")
def guided_denoise_step(
    flow_cond: Tensor,  # [B, F, C, H, W]
    flow_uncond: Tensor,  # [B, F, C, H, W]
    guidance_scale: float,
    x_t: Tensor,  # [B, F, C, H, W]
    sigma: Tensor,  # [B, F]
    sigma_next: Tensor | None = None,  # [B, F]
    noise: Tensor | PhiloxNoise | None = None,  # [B, F, C, H, W]
) -> tuple[Tensor, Tensor | None]:
    """``denoise_step`` with flow = flow_uncond + guidance_scale (flow_cond - flow_uncond), in one pass.

    Differentiable in both flows, x_t and noise. Arguments, results and errors as in ``denoise_step``.

    Source: classifier-free guidance (arXiv 2207.12598), in the parametrisation that Wan2.1 samples with.
    """
    return _denoise(flow_cond, flow_uncond, guidance_scale, x_t, sigma, sigma_next, noise)


@nvtx_range("add_noise")
def add_noise(
    x0: Tensor,  # [B, F, C, H, W]
    noise: Tensor | PhiloxNoise,  # [B, F, C, H, W]
    sigma: Tensor,  # [B, F]
) -> Tensor:
    """x_t = (1 - sigma) x0 + sigma noise. Differentiable in x0 and noise; sigma is a constant.

    Args:
        x0, noise: float32, bfloat16 or float16; noise is cast to the dtype of x0. Strides, and noise that is drawn, as
            in ``denoise_step``.
        sigma: noise level, in [0, 1]; any floating dtype, used as float32.

    Returns:
        [B, F, C, H, W], contiguous, in the dtype of x0, under autocast too; computed in float32.

    Raises:
        TypeError, ValueError: as in ``denoise_step``.
    """
    _check_latents("x0", x0)
    out: Tensor = call(ops.add_noise, x0, *_noise(noise, "x0", x0), _noise_level("sigma", sigma, x0))
    return out


@nvtx_range("dmd_gradient")
def dmd_gradient(
    x: Tensor,  # [B, F, C, H, W]
    x0_fake: Tensor,  # [B, F, C, H, W]
    x0_real_cond: Tensor,  # [B, F, C, H, W]
    x0_real_uncond: Tensor | None = None,  # [B, F, C, H, W]
    guidance_scale: float = 0.0,
) -> Tensor:
    """Gradient of the distribution-matching loss with respect to the generated latents, normalised per video.

    Constant to autograd: no gradient flows to any argument.

    Args:
        x: generated latents, float32, bfloat16 or float16; the others are cast to its dtype. Strides as in
            ``denoise_step``.
        x0_fake: x0 prediction of the critic (score of the generated distribution) from the noised x.
        x0_real_cond, x0_real_uncond: x0 predictions of the teacher with and without caption; without the second no
            guidance is applied.
        guidance_scale: real = cond + guidance_scale (cond - uncond), as Self-Forcing trains.

    Returns:
        (x0_fake - real) / mean |x - real|, the mean over all but the batch dimension; non-finite values replaced as by
        ``torch.nan_to_num``. [B, F, C, H, W], contiguous, in the dtype of x, under autocast too; computed in float32.

    Raises:
        TypeError, ValueError: as in ``denoise_step``.

    Source: DMD (arXiv 2311.18828), equations 7 and 8.
    """
    _check_latents("x", x)
    fake, cond = _like("x0_fake", x0_fake, "x", x), _like("x0_real_cond", x0_real_cond, "x", x)
    uncond = None if x0_real_uncond is None else _like("x0_real_uncond", x0_real_uncond, "x", x).detach()
    out: Tensor = call(ops.dmd_gradient, x.detach(), fake.detach(), cond.detach(), uncond, float(guidance_scale))
    return out


def _denoise(
    flow: Tensor,
    flow_uncond: Tensor | None,
    guidance_scale: float,
    x_t: Tensor,
    sigma: Tensor,
    sigma_next: Tensor | None,
    noise: Tensor | PhiloxNoise | None,
) -> tuple[Tensor, Tensor | None]:
    _check_latents("x_t", x_t)
    flow = _like("flow" if flow_uncond is None else "flow_cond", flow, "x_t", x_t)
    if flow_uncond is not None:
        flow_uncond = _like("flow_uncond", flow_uncond, "x_t", x_t)
    sigma = _noise_level("sigma", sigma, x_t)
    x0: Tensor
    if sigma_next is None and noise is None:
        x0 = call(ops.denoise_x0, flow, flow_uncond, x_t, sigma, float(guidance_scale))
        return x0, None
    if sigma_next is None or noise is None:
        given, missing = ("noise", "sigma_next") if sigma_next is None else ("sigma_next", "noise")
        raise ValueError(f"{missing} is None, but must be given together with {given}")
    sigma_next = _noise_level("sigma_next", sigma_next, x_t)
    x_next: Tensor
    x0, x_next = call(
        ops.denoise_step,
        flow,
        flow_uncond,
        x_t,
        sigma,
        sigma_next,
        *_noise(noise, "x_t", x_t),
        float(guidance_scale),
    )
    return x0, x_next


def _check_latents(name: str, tensor: Tensor) -> None:
    check_float_tensor(name, tensor)
    if tensor.ndim != 5:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, but must have five dimensions [B, F, C, H, W]")


def _like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> Tensor:
    """The tensor in the dtype of ``other``; raises unless it is latents of the same shape on the same device."""
    check_float_tensor(name, tensor)
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, but must have shape {list(other.shape)} like {other_name}"
        )
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, but must be on {other.device} like {other_name}")
    return tensor if tensor.dtype == other.dtype else tensor.to(other.dtype)


def _noise(
    noise: Tensor | PhiloxNoise, other_name: str, other: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As the ops take it: the noise itself, or seed and offset to draw it with."""
    if not isinstance(noise, PhiloxNoise):
        return _like("noise", noise, other_name, other), None, None
    seed, offset = (
        number_per_entry(f"{name} of noise", number, torch.int64, "the latents", other)
        for name, number in zip(noise._fields, noise, strict=True)
    )
    return None, seed, offset


def _noise_level(name: str, sigma: Tensor, latents: Tensor) -> Tensor:  # float32 [B, F]
    if not isinstance(sigma, Tensor) or not sigma.is_floating_point():
        got = dtype_name(sigma.dtype) if isinstance(sigma, Tensor) else type(sigma).__name__
        raise TypeError(f"{name} is {got}, but must be a floating-point tensor [B, F]")
    if sigma.shape != latents.shape[:2]:
        raise ValueError(
            f"{name} has shape {list(sigma.shape)}, but must have shape [B, F] = {list(latents.shape[:2])}"
        )
    if sigma.device != latents.device:
        raise ValueError(f"{name} is on {sigma.device}, but must be on {latents.device} like the latents")
    return sigma if sigma.dtype == torch.float32 and not sigma.requires_grad else sigma.detach().float()


@torch.library.register_fake("selfforcing::denoise_x0")
def _denoise_x0_fake(
    flow: Tensor, flow_uncond: Tensor | None, x_t: Tensor, sigma: Tensor, guidance_scale: float
) -> Tensor:
    return x_t.new_empty(x_t.shape)


@torch.library.register_fake("selfforcing::denoise_step")
def _denoise_step_fake(flow: Tensor, flow_uncond: Tensor | None, x_t: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x_t.new_empty(x_t.shape), x_t.new_empty(x_t.shape)


@torch.library.register_fake("selfforcing::denoise_backward")
def _denoise_backward_fake(
    grad_x0: Tensor | None,
    grad_x_next: Tensor | None,
    sigma: Tensor,
    sigma_next: Tensor | None,
    guidance_scale: float,
    *needs: bool,
) -> tuple[Tensor, ...]:
    given = grad_x0 if grad_x0 is not None else grad_x_next
    assert given is not None
    return tuple(given.new_empty(given.shape if needed else (0,)) for needed in needs)


@torch.library.register_fake("selfforcing::add_noise")
def _add_noise_fake(x0: Tensor, *_: Any) -> Tensor:
    return x0.new_empty(x0.shape)


@torch.library.register_fake("selfforcing::dmd_gradient")
def _dmd_gradient_fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _gradients(
    grad_x0: Tensor | None,
    grad_x_next: Tensor | None,
    sigma: Tensor,
    sigma_next: Tensor | None,
    guidance_scale: float,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of flow, flow_uncond, x_t and noise, None where not needed."""
    if grad_x0 is None and grad_x_next is None:
        return None, None, None, None
    if grad_x_next is not None:
        grads = call(ops.denoise_backward, grad_x0, grad_x_next, sigma, sigma_next, guidance_scale, *needs)
        return tuple(grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    # x0 = x_t - ...: the gradient of x_t is that of x0 itself.
    grad_flow = grad_uncond = None
    needs_flow, needs_uncond = needs[:2]
    if needs_flow or needs_uncond:
        grad_flow, grad_uncond, _, _ = call(
            ops.denoise_backward,
            grad_x0,
            None,
            sigma,
            None,
            guidance_scale,
            needs_flow,
            needs_uncond,
            False,
            False,
        )
    return grad_flow if needs_flow else None, grad_uncond if needs_uncond else None, grad_x0, None


def _denoise_x0_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, _, sigma, ctx.guidance_scale = inputs
    ctx.guided = inputs[1] is not None
    ctx.save_for_backward(sigma)


def _denoise_x0_backward(ctx: Any, grad_x0: Tensor) -> tuple[Tensor | None, ...]:
    (sigma,) = ctx.saved_tensors
    scale = ctx.guidance_scale if ctx.guided else 1.0
    needs = (*ctx.needs_input_grad[:3], False)
    flow, uncond, x_t, _ = _gradients(grad_x0, None, sigma, None, scale, needs)
    return flow, uncond, x_t, None, None


def _denoise_step_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, _, sigma, sigma_next, _, _, _, ctx.guidance_scale = inputs
    ctx.guided = inputs[1] is not None
    ctx.save_for_backward(sigma, sigma_next)
    ctx.set_materialize_grads(False)


def _denoise_step_backward(ctx: Any, grad_x0: Tensor | None, grad_x_next: Tensor | None) -> tuple[Tensor | None, ...]:
    sigma, sigma_next = ctx.saved_tensors
    scale = ctx.guidance_scale if ctx.guided else 1.0
    needs = (*ctx.needs_input_grad[:3], ctx.needs_input_grad[5])
    flow, uncond, x_t, noise = _gradients(grad_x0, grad_x_next, sigma, sigma_next, scale, needs)
    return flow, uncond, x_t, None, None, noise, None, None, None


def _add_noise_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[4])


def _add_noise_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # add_noise is the second half of a step: there x0 comes from x_t with factor 1.
    (sigma,) = ctx.saved_tensors
    needs = (False, False, ctx.needs_input_grad[0], ctx.needs_input_grad[1])
    _, _, x0, noise = _gradients(None, grad, sigma, sigma, 1.0, needs)
    return x0, noise, None, None, None


def _no_second_derivative(*_: Any) -> None:
    raise NotImplementedError("the denoising steps can be differentiated once, but not twice")


register_autograd("denoise_x0", _denoise_x0_backward, _denoise_x0_setup_context)
register_autograd("denoise_step", _denoise_step_backward, _denoise_step_setup_context)
register_autograd("add_noise", _add_noise_backward, _add_noise_setup_context)
register_autograd("denoise_backward", _no_second_derivative)
