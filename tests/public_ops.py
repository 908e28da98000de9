"""One call of every public op, for what torch asks of all of them: autocast, meta tensors, transforms, errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selfforcing_ext import (
    BlockCausalMask,
    PagedKVCache,
    PhiloxNoise,
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

MASK = BlockCausalMask(4, 6, 2, window_frames=3, sink_frames=1)
GRID = (4, 2, 3)  # frames, rows, columns: 24 tokens
LATENTS = (2, 3, 4, 2, 6)


@dataclass(frozen=True)
class OpCall:
    """A function of tensors and the shapes of its arguments."""

    name: str
    function: Callable[..., Any]
    shapes: Mapping[str, tuple[int, ...]]
    constants: frozenset[str] = frozenset()  # arguments that no gradient flows to

    def __str__(self) -> str:
        return self.name

    def inputs(self, seed: int = 0, **options: Any) -> dict[str, Tensor]:
        """Uniform in [0, 1), as noise levels must be, by argument name."""
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.rand(shape, generator=generator).to(**options) for name, shape in self.shapes.items()}

    def outputs(self, **arguments: Tensor) -> tuple[Tensor, ...]:
        result = self.function(**arguments)
        return tuple(tensor for tensor in (result if isinstance(result, tuple) else (result,)) if tensor is not None)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of a block of two frames after a committed one that had the same keys and values."""
    dtype = k.dtype if k.is_floating_point() else torch.float32
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    cache = PagedKVCache(1, 2, 8, 6, batch_size=2, max_frames=4, page_size=5, dtype=dtype, device=k.device)
    cache.write(0, k, v)
    cache.commit(2)
    return cache.attend(0, q, k, v)


Q, KV = (2, 24, 4, 8), (2, 24, 2, 8)
FEATURES, MODULATION = (2, 24, 16), (2, 4, 16)
OP_CALLS = (
    OpCall(
        "block_causal_attention",
        lambda q, k, v: block_causal_attention(q, k, v, MASK, return_lse=True),
        {"q": Q, "k": KV, "v": KV},
    ),
    OpCall(
        "block_causal_attention without mask", block_causal_attention, {"q": Q, "k": (2, 7, 2, 8), "v": (2, 7, 2, 8)}
    ),
    OpCall("PagedKVCache.attend", attend, {"q": (2, 12, 4, 8), "k": (2, 12, 2, 8), "v": (2, 12, 2, 8)}),
    OpCall("rope_3d", lambda x: rope_3d(x, GRID, 3), {"x": (2, 24, 2, 8)}),
    OpCall("qk_norm_rope", lambda x, weight: qk_norm_rope(x, weight, 2, GRID, 3), {"x": FEATURES, "weight": (16,)}),
    OpCall(
        "denoise_step to x0",
        denoise_step,
        {"flow": LATENTS, "x_t": LATENTS, "sigma": LATENTS[:2]},
        frozenset({"sigma"}),
    ),
    OpCall(
        "denoise_step",
        denoise_step,
        {"flow": LATENTS, "x_t": LATENTS, "sigma": LATENTS[:2], "sigma_next": LATENTS[:2], "noise": LATENTS},
        frozenset({"sigma", "sigma_next"}),
    ),
    OpCall(
        "guided_denoise_step",
        lambda **tensors: guided_denoise_step(guidance_scale=3.0, **tensors),
        {
            "flow_cond": LATENTS,
            "flow_uncond": LATENTS,
            "x_t": LATENTS,
            "sigma": LATENTS[:2],
            "sigma_next": LATENTS[:2],
            "noise": LATENTS,
        },
        frozenset({"sigma", "sigma_next"}),
    ),
    OpCall(
        "denoise_step with drawn noise",
        lambda **tensors: denoise_step(noise=PhiloxNoise(7), **tensors),
        {"flow": LATENTS, "x_t": LATENTS, "sigma": LATENTS[:2], "sigma_next": LATENTS[:2]},
        frozenset({"sigma", "sigma_next"}),
    ),
    OpCall("add_noise", add_noise, {"x0": LATENTS, "noise": LATENTS, "sigma": LATENTS[:2]}, frozenset({"sigma"})),
    OpCall(
        "dmd_gradient",
        lambda **tensors: dmd_gradient(guidance_scale=3.0, **tensors),
        {"x": LATENTS, "x0_fake": LATENTS, "x0_real_cond": LATENTS, "x0_real_uncond": LATENTS},
        frozenset({"x", "x0_fake", "x0_real_cond", "x0_real_uncond"}),
    ),
    OpCall("modulated_layer_norm", modulated_layer_norm, {"x": FEATURES, "shift": MODULATION, "scale": MODULATION}),
    OpCall("gated_residual", gated_residual, {"x": FEATURES, "y": FEATURES, "gate": MODULATION}),
)
DIFFERENTIABLE = tuple(call for call in OP_CALLS if set(call.shapes) - call.constants)
