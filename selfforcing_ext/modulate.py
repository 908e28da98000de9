"""Adaptive layer normalisation and gated residual with one modulation per frame.

Source: DiT (arXiv 2212.09748), adaLN-Zero, with a timestep per frame as in CausVid (arXiv 2412.07772).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selfforcing_ext.checks import check_float_tensor, dtype_name
from selfforcing_ext.library import call, nvtx_range, ops, register_autograd


@nvtx_range("modulated_layer_norm")
def modulated_layer_norm(
    x: Tensor,  # [B, L, C], L = F * frame_seqlen
    shift: Tensor,  # [B, F, C]
    scale: Tensor,  # [B, F, C]
    eps: float = 1e-6,
) -> Tensor:
    """layer_norm(x) (1 + scale) + shift over the channels, without other weights. Differentiable in all three.

    Args:
        x: float32, bfloat16 or float16; tokens ordered by frame. The last dimension is contiguous, the other strides
            are free.
        shift, scale: of the tokens of each frame; any floating dtype, used as float32. Strides as for x.
        eps: added to the variance; not below 0.

    Returns:
        [B, L, C], contiguous, in the dtype of x, under autocast too; computed in float32. The gradients of shift and
        scale are summed in float32 in an order that depends on sizes alone.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: ranks, devices or sizes that do not fit each other, L not a multiple of F, or a last dimension that
            is not contiguous.
    """
    _check_features("x", x)
    if not eps >= 0:
        raise ValueError(f"eps is {eps}, but must not be below 0")
    shift, scale = _modulation("shift", shift, x), _modulation("scale", scale, x)
    if shift.shape != scale.shape:
        raise ValueError(f"shift has shape {list(shift.shape)}, but must have shape {list(scale.shape)} like scale")
    y: Tensor
    y, _, _ = call(ops.modulated_layer_norm, x, shift, scale, eps)
    return y


@nvtx_range("gated_residual")
def gated_residual(
    x: Tensor,  # [B, L, C], L = F * frame_seqlen
    y: Tensor,  # [B, L, C]
    gate: Tensor,  # [B, F, C]
) -> Tensor:
    """x + y gate. Differentiable in all three.

    Args:
        x: float32, bfloat16 or float16; tokens ordered by frame. The last dimension is contiguous, the other strides
            are free.
        y: as x; cast to its dtype.
        gate: factor on the tokens of each frame; any floating dtype, used as float32.

    Returns:
        [B, L, C], contiguous, in the dtype of x, under autocast too; computed in float32. The gradient of gate is
        summed in float32 in an order that depends on sizes alone.

    Raises:
        TypeError, ValueError: as in ``modulated_layer_norm``.
    """
    _check_features("x", x)
    _check_features("y", y)
    if y.shape != x.shape:
        raise ValueError(f"y has shape {list(y.shape)}, but must have shape {list(x.shape)} like x")
    if y.device != x.device:
        raise ValueError(f"y is on {y.device}, but must be on {x.device} like x")
    out: Tensor = call(ops.gated_residual, x, y.to(x.dtype), _modulation("gate", gate, x))
    return out


def _check_features(name: str, tensor: Tensor) -> None:
    check_float_tensor(name, tensor)
    if tensor.ndim != 3:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, but must have three dimensions [B, L, C]")
    if tensor.shape[2] > 1 and tensor.stride(2) != 1:
        raise ValueError(f"{name} has stride {tensor.stride(2)} in its last dimension, but must have stride 1 there")


def _modulation(name: str, tensor: Tensor, x: Tensor) -> Tensor:  # float32 [B, F, C]
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = dtype_name(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} is {got}, but must be a floating-point tensor [B, F, C]")
    batch, tokens, channels = x.shape
    if tensor.ndim != 3 or tensor.shape[0] != batch or tensor.shape[2] != channels:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, but must have shape [B, F, C] = [{batch}, F, {channels}]"
        )
    frames = tensor.shape[1]
    if tokens % frames if frames else tokens:
        raise ValueError(f"x has {tokens} tokens, but must have a multiple of the {frames} frames of {name}")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, but must be on {x.device} like x")
    if channels > 1 and tensor.stride(2) != 1:
        raise ValueError(f"{name} has stride {tensor.stride(2)} in its last dimension, but must have stride 1 there")
    return tensor.float()


@torch.library.register_fake("selfforcing::modulated_layer_norm")
def _modulated_layer_norm_fake(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[:2]
    return x.new_empty(x.shape), x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)


@torch.library.register_fake("selfforcing::modulated_layer_norm_backward")
def _modulated_layer_norm_backward_fake(
    grad_y: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


@torch.library.register_fake("selfforcing::gated_residual")
def _gated_residual_fake(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("selfforcing::gated_residual_backward")
def _gated_residual_backward_fake(grad_out: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), gate.new_empty(gate.shape)


def _modulated_layer_norm_setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, _, scale, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, scale, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _modulated_layer_norm_backward(ctx: Any, grad_y: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_x, grad_shift, grad_scale = call(ops.modulated_layer_norm_backward, grad_y, *ctx.saved_tensors)
    return grad_x, grad_shift, grad_scale, None


def _gated_residual_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, y, gate = inputs
    ctx.save_for_backward(y, gate)


def _gated_residual_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    grad_y, grad_gate = call(ops.gated_residual_backward, grad_out, *ctx.saved_tensors)
    return grad_out, grad_y, grad_gate


def _no_second_derivative(*_: Any) -> None:
    raise NotImplementedError("the modulation ops can be differentiated once, but not twice")


register_autograd(
    "modulated_layer_norm",
    _modulated_layer_norm_backward,
    _modulated_layer_norm_setup_context,
)
register_autograd("gated_residual", _gated_residual_backward, _gated_residual_setup_context)
register_autograd("modulated_layer_norm_backward", _no_second_derivative)
register_autograd("gated_residual_backward", _no_second_derivative)
