"""The reference ops: gradients against finite differences in float64, and properties of their definitions."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn.functional import scaled_dot_product_attention

from python_ref.backend import PUBLIC_NAMES, load_backend
from python_ref.ops.attention import block_causal_attention, masked_softmax_attention
from python_ref.ops.denoise import add_noise, denoise_step, dmd_gradient, guided_denoise_step
from python_ref.ops.kv_cache import PagedKVCache
from python_ref.ops.modulate import gated_residual, modulated_layer_norm
from python_ref.ops.rope import qk_norm_rope, rope_3d
from selfforcing_ext.mask import BlockCausalMask

MASKS = {
    "full": None,
    "block causal": BlockCausalMask(4, 2, 2),
    "window and sink": BlockCausalMask(4, 2, 1, window_frames=2, sink_frames=1),
    "teacher forcing": BlockCausalMask(2, 2, 1, teacher_forcing=True),
}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_attention_gradcheck(mask, kv_heads):
    q, k, v = random(1, 8, 2, 4), random(1, 8, kv_heads, 4), random(1, 8, kv_heads, 4)
    assert gradcheck(lambda *qkv: block_causal_attention(*qkv, mask, softmax_scale=0.7, return_lse=True), (q, k, v))


def test_attention_is_torchs():
    q, k, v = random(2, 8, 4, 8), random(2, 8, 2, 8), random(2, 8, 2, 8)
    mask = MASKS["window and sink"]
    expected = scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask.dense(), enable_gqa=True
    )
    torch.testing.assert_close(block_causal_attention(q, k, v, mask), expected.transpose(1, 2))


def test_attention_of_a_row_without_keys():
    q, k, v = random(1, 3, 1, 4), random(1, 2, 1, 4), random(1, 2, 1, 4)
    visible = torch.tensor([[True, False], [False, False], [True, True]])
    out, lse = masked_softmax_attention(q, k, v, visible)
    assert torch.equal(out[:, 1], torch.zeros_like(out[:, 1]))
    assert lse[0, 0, 1] == -math.inf
    gradients = torch.autograd.grad(out.sum() + lse[:, :, [0, 2]].sum(), (q, k, v))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert torch.equal(gradients[0][:, 1], torch.zeros_like(gradients[0][:, 1]))


def test_attention_of_half_precision_is_computed_in_float32():
    q, k, v = (torch.randn(1, 8, 2, 8).bfloat16() for _ in range(3))
    out, lse = block_causal_attention(q, k, v, None, return_lse=True)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    wide = block_causal_attention(q.float(), k.float(), v.float(), None)
    assert torch.equal(out, wide.bfloat16())


def test_attention_under_autocast():
    q, k, v = (torch.randn(1, 8, 2, 8) for _ in range(3))
    cache = PagedKVCache(1, 2, 8, frame_seqlen=4, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert block_causal_attention(q, k, v, None).dtype == torch.bfloat16
        assert block_causal_attention(q.double(), k.double(), v.double(), None).dtype == torch.float64
        assert cache.attend(0, q, k, v).dtype == torch.bfloat16
        cache.write(0, k, v)
    cache.commit(2)


def test_attention_refuses_a_mask_of_another_length():
    q = torch.randn(1, 6, 2, 8)
    with pytest.raises(ValueError, match=r"q has 6 tokens, but mask.seqlen is 8"):
        block_causal_attention(q, q, q, MASKS["block causal"])


@pytest.mark.parametrize("starts", [None, [3], [3, 0]], ids=str)
def test_rope_gradcheck(starts):
    start_frame = 0 if starts is None else torch.tensor(starts, dtype=torch.int32)
    assert gradcheck(lambda x: rope_3d(x, (2, 1, 2), start_frame), random(2, 4, 2, 8))
    assert gradcheck(
        lambda x, weight: qk_norm_rope(x, weight, 2, (2, 1, 2), start_frame), (random(2, 4, 16), random(16))
    )


def test_rope_start_frame_moves_the_frame_axis_only():
    x = random(1, 24, 2, 16)
    whole = rope_3d(x, (4, 2, 3))
    torch.testing.assert_close(rope_3d(x[:, 12:], (2, 2, 3), start_frame=2), whole[:, 12:])
    torch.testing.assert_close(whole.norm(dim=-1), x.norm(dim=-1))
    ragged = rope_3d(torch.cat([x[:, 12:], x[:, :12]]), (2, 2, 3), torch.tensor([2, 0], dtype=torch.int32))
    torch.testing.assert_close(ragged, torch.cat([whole[:, 12:], whole[:, :12]]))
    with pytest.raises(ValueError, match=r"x has 24 tokens, but grid \(4, 2, 2\) has 16"):
        rope_3d(x, (4, 2, 2))


def test_denoise_gradcheck():
    flow, uncond, x_t, noise = (random(2, 3, 1, 2, 2) for _ in range(4))
    sigma, sigma_next = torch.rand(2, 2, 3, dtype=torch.float64)
    assert gradcheck(lambda flow, x_t: denoise_step(flow, x_t, sigma)[0], (flow, x_t))
    assert gradcheck(lambda flow, x_t, noise: denoise_step(flow, x_t, sigma, sigma_next, noise), (flow, x_t, noise))
    assert gradcheck(
        lambda *args: guided_denoise_step(args[0], args[1], 2.5, args[2], sigma, sigma_next, args[3]),
        (flow, uncond, x_t, noise),
    )
    assert gradcheck(lambda x0, noise: add_noise(x0, noise, sigma), (x_t, noise))


def test_denoise_undoes_noise():
    x0, noise = torch.randn(2, 2, 3, 1, 2, 2, dtype=torch.float64)
    sigma, sigma_next = torch.rand(2, 2, 3, dtype=torch.float64)
    x_t = add_noise(x0, noise, sigma)
    got, x_next = denoise_step(noise - x0, x_t, sigma, sigma_next, noise)
    torch.testing.assert_close(got, x0)
    torch.testing.assert_close(x_next, add_noise(x0, noise, sigma_next))
    assert denoise_step(noise - x0, x_t, sigma)[1] is None
    with pytest.raises(ValueError, match="noise is None, but must be given together with sigma_next"):
        denoise_step(noise - x0, x_t, sigma, sigma_next)


def test_dmd_gradient():
    x, fake, cond, uncond = (random(2, 3, 1, 2, 2) for _ in range(4))
    gradient = dmd_gradient(x, fake, cond, uncond, 3.0)
    assert not gradient.requires_grad
    real = cond + 3.0 * (cond - uncond)
    for video in range(2):
        expected = (fake[video] - real[video]) / (x[video] - real[video]).abs().mean()
        torch.testing.assert_close(gradient[video], expected.detach())
    torch.testing.assert_close(dmd_gradient(x, fake, cond), dmd_gradient(x, fake, cond, uncond, 0.0))
    # A generator that hits the score exactly has no distance to normalise by: no gradient rather than NaN.
    assert torch.equal(dmd_gradient(x, x, x), torch.zeros_like(x))


def test_modulate_gradcheck():
    x, y = random(2, 6, 4), random(2, 6, 4)
    shift, scale, gate = (random(2, 3, 4) for _ in range(3))
    assert gradcheck(modulated_layer_norm, (x, shift, scale))
    assert gradcheck(gated_residual, (x, y, gate))
    with pytest.raises(ValueError, match="x has 6 tokens, but must have a multiple of the 4 frames"):
        modulated_layer_norm(x, random(2, 4, 4), random(2, 4, 4))


def test_modulation_is_per_frame():
    x, shift, scale = random(1, 6, 4), random(1, 3, 4), random(1, 3, 4)
    whole = modulated_layer_norm(x, shift, scale)
    for frame in range(3):
        alone = modulated_layer_norm(x[:, 2 * frame : 2 * frame + 2], shift[:, [frame]], scale[:, [frame]])
        torch.testing.assert_close(whole[:, 2 * frame : 2 * frame + 2], alone)


def cached_attention(grad_through_cache, q, k, v, q2, k2, v2):
    """Two blocks of two frames through a cache with a window of three frames."""
    cache = PagedKVCache(
        1, 1, 4, frame_seqlen=1, window_frames=3, dtype=torch.float64, grad_through_cache=grad_through_cache
    )
    first = cache.attend(0, q, k, v)
    cache.write(0, k, v)
    cache.commit(2)
    return first, cache.attend(0, q2, k2, v2)


def test_cache_gradcheck():
    blocks = [random(1, 2, 1, 4) for _ in range(6)]
    assert gradcheck(lambda *tensors: cached_attention(True, *tensors), blocks)
    _, second = cached_attention(False, *blocks)
    gradients = torch.autograd.grad(second.sum(), blocks, allow_unused=True)
    assert [gradient is None for gradient in gradients] == [True, True, True, False, False, False]


def test_cache_gradient_can_be_sent_elsewhere():
    q, k, v, k_exit, v_exit = (random(1, 2, 1, 4) for _ in range(5))
    results = {}
    for way, grad_to in (("own", None), ("elsewhere", (k_exit, v_exit))):
        cache = PagedKVCache(1, 1, 4, frame_seqlen=1, dtype=torch.float64, grad_through_cache=True)
        with torch.set_grad_enabled(grad_to is None):
            cache.write(0, k, v, grad_to=grad_to)
        cache.commit(2)
        out = cache.attend(0, q, k.detach(), v.detach())
        results[way] = (out, *torch.autograd.grad(out.sum(), (k, v) if grad_to is None else grad_to))
    for own, elsewhere in zip(*results.values(), strict=True):
        assert torch.equal(own, elsewhere)
    cache = PagedKVCache(1, 1, 4, frame_seqlen=1, dtype=torch.float64)
    with pytest.raises(ValueError, match="grad_to is given, but grad_through_cache is False"):
        cache.write(0, k, v, grad_to=(k_exit, v_exit))


def test_backend_names():
    backend = load_backend("reference")
    assert {"name", *(name for names in PUBLIC_NAMES.values() for name in names)} == set(vars(backend))
    with pytest.raises(ValueError, match="backend is 'cuda', but must be one of 'reference', 'ext'"):
        load_backend("cuda")
