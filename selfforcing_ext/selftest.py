"""A test of every public op, in seconds: forward and backward in every dtype against its formula in float64.

The formulas are those of the docstrings, in plain torch. Both sides get the same inputs, those of the dtype under test.
An error is relative, in the Frobenius norm: ||result - exact|| / ||exact||.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selfforcing_ext import (
    BlockCausalMask,
    PagedKVCache,
    add_noise,
    block_causal_attention,
    denoise_step,
    dmd_gradient,
    gated_residual,
    guided_denoise_step,
    modulated_layer_norm,
    qk_norm_rope,
    rope_3d,
)
from selfforcing_ext.checks import FLOAT_DTYPES, dtype_name

#: A few roundings of the dtype; in float32 those of sums of a few hundred terms.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

BATCH = 2
GRID = (FRAMES, ROWS, COLUMNS) = (6, 3, 4)
FRAME_SEQLEN = ROWS * COLUMNS
TOKENS = FRAMES * FRAME_SEQLEN
BLOCK_FRAMES, WINDOW_FRAMES = 2, 4
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
CHANNELS = HEADS * HEAD_DIM
START_FRAME = 3
GUIDANCE = 3.0
EPS = 1e-6

Function = Callable[..., Any]


@dataclass(frozen=True)
class Result:
    """How one op did in one dtype on one device."""

    op: str
    device: str
    dtype: str
    tolerance: float
    forward: float  # the largest error of an output
    backward: float | None  # the largest error of a gradient; None for an op without
    failure: str | None = None  # the error that the op raised; the numbers are infinite then

    @property
    def passed(self) -> bool:
        return max(self.forward, self.backward or 0.0) <= self.tolerance


@dataclass(frozen=True)
class Case:
    """An op, its formula, and the shapes of the arguments of both."""

    name: str
    op: Function
    formula: Function
    shapes: tuple[tuple[int, ...], ...]
    differentiable: bool = True


def run(devices: tuple[torch.device, ...]) -> Iterator[Result]:
    """The results on these devices, one after the other."""
    for device in devices:
        for case in CASES:
            for dtype in FLOAT_DTYPES:
                yield _result(case, device, dtype)


def _result(case: Case, device: torch.device, dtype: torch.dtype) -> Result:
    about = case.name, str(device), dtype_name(dtype), TOLERANCE[dtype]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(device, dtype) for shape in case.shapes]
    try:
        outputs, gradients = _evaluate(case.op, inputs, case.differentiable)
    except Exception as error:  # whatever it is: the report names it and goes on
        failure = "".join(traceback.format_exception_only(error)).strip()
        return Result(*about, math.inf, math.inf, failure)
    exact = _evaluate(case.formula, [tensor.double() for tensor in inputs], case.differentiable)
    forward = max(map(_relative_error, outputs, exact[0]))
    backward = max(map(_relative_error, gradients, exact[1])) if case.differentiable else None
    return Result(*about, forward, backward)


def _evaluate(
    function: Function, inputs: list[Tensor], differentiable: bool
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Outputs, and gradients of the inputs for random gradients of the outputs."""
    arguments = [tensor.detach().requires_grad_(differentiable) for tensor in inputs]
    result = function(*arguments)
    outputs: tuple[Tensor, ...] = result if isinstance(result, tuple) else (result,)
    if not differentiable:
        return outputs, ()
    generator = torch.Generator().manual_seed(1)
    # Small integers, which every dtype holds: the op and its formula get the same.
    gradients = [torch.randint(-4, 5, out.shape, generator=generator).to(out) for out in outputs]
    return outputs, torch.autograd.grad(outputs, arguments, gradients)


def _relative_error(actual: Tensor, exact: Tensor) -> float:
    error = float((actual.detach().double() - exact.detach()).norm() / exact.detach().norm())
    return error if math.isfinite(error) else math.inf


# ---- Formulas


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * HEAD_DIM**-0.5
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), v)


def _windowed_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A token sees the frames of its block and of the window that ends with it."""
    frame = torch.arange(TOKENS, device=q.device) // FRAME_SEQLEN
    block_end = (frame // BLOCK_FRAMES + 1)[:, None] * BLOCK_FRAMES
    return _softmax_attention(q, k, v, (frame < block_end) & (frame >= block_end - WINDOW_FRAMES))


def _attention_with_constant_past(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same block by block; no gradient flows to what a cache holds."""
    blocks = []
    for start in range(0, TOKENS, BLOCK_FRAMES * FRAME_SEQLEN):
        end = start + BLOCK_FRAMES * FRAME_SEQLEN
        first = max(0, end - WINDOW_FRAMES * FRAME_SEQLEN)
        keys, values = (torch.cat([x[:, first:start].detach(), x[:, start:end]], dim=1) for x in (k, v))
        blocks.append(_softmax_attention(q[:, start:end], keys, values))
    return torch.cat(blocks, dim=1)


def _rotated(x: Tensor) -> Tensor:
    spatial = HEAD_DIM // 6
    pairs = (HEAD_DIM // 2 - 2 * spatial, spatial, spatial)  # of the frame, row and column axes
    position = torch.cartesian_prod(*(torch.arange(size).to(x) for size in GRID))  # [L, 3]
    position[:, 0] += START_FRAME
    angles = [position[:, axis, None] * 10000.0 ** (-torch.arange(n).to(x) / n) for axis, n in enumerate(pairs)]
    angle = torch.cat(angles, dim=1)[:, None]  # [L, 1, D / 2]
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack([even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()], dim=-1)
    return turned.flatten(-2)


def _rms_normed(x: Tensor, weight: Tensor) -> Tensor:
    normed = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight
    return normed.view(BATCH, TOKENS, HEADS, HEAD_DIM)


def _of_tokens(modulation: Tensor) -> Tensor:  # [B, F, C] -> [B, L, C]
    return modulation.repeat_interleave(FRAME_SEQLEN, dim=1)


def _sigma(latents: Tensor) -> Tensor:  # [B, F]
    return torch.linspace(0.2, 0.95, BATCH * FRAMES, device=latents.device).view(BATCH, FRAMES)


def _sigma_next(latents: Tensor) -> Tensor:  # [B, F]
    return 0.5 * _sigma(latents)


def _noised(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    level = sigma[:, :, None, None, None]
    return (1 - level) * x0 + level * noise


def _denoised(flow: Tensor, x_t: Tensor) -> Tensor:
    return x_t - _sigma(x_t)[:, :, None, None, None] * flow


def _stepped(flow: Tensor, x_t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    x0 = _denoised(flow, x_t)
    return x0, _noised(x0, noise, _sigma_next(x_t))


def _dmd(x: Tensor, fake: Tensor, cond: Tensor, uncond: Tensor) -> Tensor:
    real = cond + GUIDANCE * (cond - uncond)
    return (fake - real) / (x - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)


# ---- Ops with what their formulas assume


def _rollout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    cache = PagedKVCache(
        1,
        KV_HEADS,
        HEAD_DIM,
        FRAME_SEQLEN,
        BATCH,
        window_frames=WINDOW_FRAMES,
        page_size=16,  # blocks and window end within pages
        dtype=q.dtype,
        device=q.device,
    )
    blocks = []
    for block in zip(*(torch.split(x, BLOCK_FRAMES * FRAME_SEQLEN, dim=1) for x in (q, k, v)), strict=True):
        blocks.append(cache.attend(0, *block))
        cache.write(0, *block[1:])
        cache.commit(BLOCK_FRAMES)
    return torch.cat(blocks, dim=1)


MASK = BlockCausalMask(FRAMES, FRAME_SEQLEN, BLOCK_FRAMES, WINDOW_FRAMES)
QUERIES, KEYS = (BATCH, TOKENS, HEADS, HEAD_DIM), (BATCH, TOKENS, KV_HEADS, HEAD_DIM)
FEATURES, MODULATION = (BATCH, TOKENS, CHANNELS), (BATCH, FRAMES, CHANNELS)
LATENTS = (BATCH, FRAMES, 4, 6, 8)

CASES = (
    Case(
        "block_causal_attention",
        lambda q, k, v: block_causal_attention(q, k, v, MASK),
        _windowed_attention,
        (QUERIES, KEYS, KEYS),
    ),
    Case("PagedKVCache", _rollout, _attention_with_constant_past, (QUERIES, KEYS, KEYS)),
    Case("rope_3d", lambda x: rope_3d(x, GRID, START_FRAME), _rotated, (QUERIES,)),
    Case(
        "qk_norm_rope",
        lambda x, weight: qk_norm_rope(x, weight, HEADS, GRID, START_FRAME, EPS),
        lambda x, weight: _rotated(_rms_normed(x, weight)),
        (FEATURES, (CHANNELS,)),
    ),
    Case(
        "denoise_step, x0 alone",
        lambda flow, x_t: denoise_step(flow, x_t, _sigma(x_t))[0],
        _denoised,
        (LATENTS, LATENTS),
    ),
    Case(
        "denoise_step",
        lambda flow, x_t, noise: denoise_step(flow, x_t, _sigma(x_t), _sigma_next(x_t), noise),
        _stepped,
        (LATENTS, LATENTS, LATENTS),
    ),
    Case(
        "guided_denoise_step",
        lambda cond, uncond, x_t, noise: guided_denoise_step(
            cond, uncond, GUIDANCE, x_t, _sigma(x_t), _sigma_next(x_t), noise
        ),
        lambda cond, uncond, x_t, noise: _stepped(uncond + GUIDANCE * (cond - uncond), x_t, noise),
        (LATENTS, LATENTS, LATENTS, LATENTS),
    ),
    Case(
        "add_noise",
        lambda x0, noise: add_noise(x0, noise, _sigma(x0)),
        lambda x0, noise: _noised(x0, noise, _sigma(x0)),
        (LATENTS, LATENTS),
    ),
    Case(
        "dmd_gradient",
        lambda x, fake, cond, uncond: dmd_gradient(x, fake, cond, uncond, GUIDANCE),
        _dmd,
        (LATENTS, LATENTS, LATENTS, LATENTS),
        differentiable=False,
    ),
    Case(
        "modulated_layer_norm",
        lambda x, shift, scale: modulated_layer_norm(x, shift, scale, EPS),
        lambda x, shift, scale: (
            torch.nn.functional.layer_norm(x, (CHANNELS,), eps=EPS) * (1 + _of_tokens(scale)) + _of_tokens(shift)
        ),
        (FEATURES, MODULATION, MODULATION),
    ),
    Case(
        "gated_residual",
        lambda x, y, gate: gated_residual(x, y, gate),
        lambda x, y, gate: x + y * _of_tokens(gate),
        (FEATURES, FEATURES, MODULATION),
    ),
)
