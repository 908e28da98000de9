"""Ops for autoregressive video diffusion, in C++ and CUDA with autograd: block-causal attention, a paged KV cache,
rotary embedding, denoising steps and modulation.

``BlockCausalMask`` and ``PhiloxNoise`` need torch alone; every other name loads the compiled ops when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from selfforcing_ext.attention import block_causal_attention
    from selfforcing_ext.denoise import add_noise, denoise_step, dmd_gradient, guided_denoise_step
    from selfforcing_ext.graphs import GraphedBlock
    from selfforcing_ext.kv_cache import PagedKVCache
    from selfforcing_ext.mask import BlockCausalMask
    from selfforcing_ext.modulate import gated_residual, modulated_layer_norm
    from selfforcing_ext.page_pool import PagePool, PoolStats
    from selfforcing_ext.philox import PhiloxNoise
    from selfforcing_ext.rope import qk_norm_rope, rope_3d
    from selfforcing_ext.stream import Stream

__version__ = "0.1.0"

__all__ = [
    "BlockCausalMask",
    "GraphedBlock",
    "PagePool",
    "PagedKVCache",
    "PhiloxNoise",
    "PoolStats",
    "Stream",
    "add_noise",
    "block_causal_attention",
    "denoise_step",
    "dmd_gradient",
    "gated_residual",
    "guided_denoise_step",
    "modulated_layer_norm",
    "qk_norm_rope",
    "rope_3d",
]

_MODULE_OF = {
    "BlockCausalMask": "mask",
    "GraphedBlock": "graphs",
    "PagePool": "page_pool",
    "PagedKVCache": "kv_cache",
    "PhiloxNoise": "philox",
    "PoolStats": "page_pool",
    "Stream": "stream",
    "add_noise": "denoise",
    "block_causal_attention": "attention",
    "denoise_step": "denoise",
    "dmd_gradient": "denoise",
    "gated_residual": "modulate",
    "guided_denoise_step": "denoise",
    "modulated_layer_norm": "modulate",
    "qk_norm_rope": "rope",
    "rope_3d": "rope",
}


if not TYPE_CHECKING:  # to a type checker, a module with this function has every name that anyone asks for

    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value
