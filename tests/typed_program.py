"""A user's program, for a type checker (test_typing.py): what every public name takes and gives.

A ``type: ignore`` marks what must be refused; a strict checker reports one that has nothing to ignore.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import assert_type

import selfforcing_ext
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
from selfforcing_ext.kv_cache_view import KVCacheView
from selfforcing_ext.mask import SpanTable

mask = BlockCausalMask(4, 6, frames_per_block=2, window_frames=3, sink_frames=1, teacher_forcing=False)
assert_type(mask.seqlen, int)
assert_type(mask.frame_blocks, tuple[tuple[int, int], ...])
assert_type(mask.spans("cpu"), SpanTable)
assert_type(mask.dense(torch.device("cpu")), Tensor)
BlockCausalMask("4", 6)  # type: ignore[arg-type]

q, k, v = (torch.randn(1, 24, 2, 16) for _ in range(3))
assert_type(block_causal_attention(q, k, v), Tensor)
assert_type(block_causal_attention(q, k, v, mask, 0.25, False), Tensor)
assert_type(block_causal_attention(q, k, v, mask, return_lse=True), tuple[Tensor, Tensor])
block_causal_attention(q, k, v, "causal")  # type: ignore[call-overload]

cache = PagedKVCache(1, 2, 16, 6, batch_size=1, max_frames=8, dtype=torch.bfloat16, device="cpu")
assert_type(cache.attend(0, q, k, v, softmax_scale=None), Tensor)
cache.write(0, k, v)
cache.commit(4)
cache.reserve(4)
cache.reset()
assert_type(cache.view(), KVCacheView)
assert_type(cache.view().attend(0, q, k, v), Tensor)
assert_type((cache.num_frames, cache.visible_frames, cache.nbytes, cache.position), tuple[int, int, int, Tensor])
PagedKVCache(1, 2, 16, 6, device=0.5)  # type: ignore[arg-type]

assert_type(rope_3d(q, (4, 2, 3), start_frame=cache.position), Tensor)
assert_type(qk_norm_rope(q.flatten(2), torch.ones(32), 2, [4, 2, 3], 1, 1e-6), Tensor)
rope_3d(q, 24)  # type: ignore[arg-type]

x, noise, sigma = torch.randn(1, 4, 4, 4, 4), torch.randn(1, 4, 4, 4, 4), torch.rand(1, 4)
assert_type(denoise_step(x, x, sigma), tuple[Tensor, Tensor | None])
assert_type(denoise_step(x, x, sigma, sigma_next=sigma, noise=noise)[0], Tensor)
assert_type(guided_denoise_step(x, x, 3.0, x, sigma), tuple[Tensor, Tensor | None])
assert_type(add_noise(x, noise, sigma), Tensor)
assert_type(dmd_gradient(x, x, x, None, guidance_scale=3.0), Tensor)
add_noise(x, noise, 0.5)  # type: ignore[arg-type]

features, modulation = torch.randn(1, 24, 16), torch.randn(1, 4, 16)
assert_type(modulated_layer_norm(features, modulation, modulation, eps=1e-6), Tensor)
assert_type(gated_residual(features, features, modulation), Tensor)

assert_type(selfforcing_ext.__version__, str)
_ = selfforcing_ext.rope_2d  # type: ignore[attr-defined]
