"""Every public op under torch's modes: autocast, inference, meta and fake tensors, default devices, deterministic
algorithms; and what the ops say about tensors of another dtype or device."""

from __future__ import annotations

import warnings

import pytest
import torch
from _pytest.mark import ParameterSet
from compare import assert_same_bits
from public_ops import OP_CALLS, OpCall
from small_model import CONFIG, FRAME_SEQLEN, LATENT, MASK, inputs, model
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode

from python_ref.models.wan import CausalWanModel
from selfforcing_ext import BlockCausalMask, PagedKVCache, block_causal_attention
from selfforcing_ext.mask import _make_full_span_table

#: Attention is cast as scaled_dot_product_attention is; the others compute in float32 whatever they are given.
CAST_BY_AUTOCAST = {"block_causal_attention", "block_causal_attention without mask", "PagedKVCache.attend"}

every_op = pytest.mark.parametrize("call", OP_CALLS, ids=str)


def shapes_and_dtypes(tensors: tuple[Tensor, ...]) -> list[tuple[list[int], torch.dtype]]:
    return [(list(tensor.shape), tensor.dtype) for tensor in tensors]


@every_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(call: OpCall, dtype: torch.dtype):
    """The same bits as without autocast, on inputs in autocast's dtype where it casts."""
    with torch.autocast("cpu", dtype):
        actual = call.outputs(**call.inputs())
    expected = call.outputs(**call.inputs(dtype=dtype if call.name in CAST_BY_AUTOCAST else torch.float32))
    assert actual[0].dtype == (dtype if call.name in CAST_BY_AUTOCAST else torch.float32)
    for mine, true in zip(actual, expected, strict=True):
        assert_same_bits(mine, true)


@every_op
def test_inference_mode(call: OpCall):
    """The same bits; and what a call in inference mode keeps (span tables) serves a call with gradient."""
    _make_full_span_table.cache_clear()
    with torch.inference_mode():
        actual = call.outputs(**call.inputs())
    arguments = {name: tensor.requires_grad_(name not in call.constants) for name, tensor in call.inputs().items()}
    outputs = call.outputs(**arguments)
    for mine, true in zip(actual, outputs, strict=True):
        assert mine.is_inference()
        assert_same_bits(mine, true)
    if leaves := [tensor for tensor in arguments.values() if tensor.requires_grad]:
        torch.autograd.grad(outputs, leaves, [torch.ones_like(output) for output in outputs])


@every_op
def test_meta_tensors(call: OpCall):
    """Shapes and dtypes, forward and backward, without a kernel (there are none for meta)."""
    arguments = {
        name: tensor.requires_grad_(name not in call.constants)
        for name, tensor in call.inputs(device="meta", dtype=torch.bfloat16).items()
    }
    outputs = call.outputs(**arguments)
    assert all(output.device.type == "meta" for output in outputs)
    assert shapes_and_dtypes(outputs) == shapes_and_dtypes(call.outputs(**call.inputs(dtype=torch.bfloat16)))
    leaves = [tensor for tensor in arguments.values() if tensor.requires_grad]
    if leaves:
        grads = torch.autograd.grad(outputs, leaves, [torch.empty_like(output) for output in outputs])
        assert shapes_and_dtypes(grads) == shapes_and_dtypes(tuple(leaves))


@every_op
def test_fake_tensors(call: OpCall):
    expected = shapes_and_dtypes(call.outputs(**call.inputs()))
    mask_made_outside = call.name == "block_causal_attention"  # its table is a real tensor
    with FakeTensorMode(allow_non_fake_inputs=mask_made_outside):
        outputs = call.outputs(**{name: torch.empty(shape) for name, shape in call.shapes.items()})
    assert all(isinstance(output, FakeTensor) for output in outputs)
    assert shapes_and_dtypes(outputs) == expected


def test_a_fake_table_is_not_kept():
    """Attention over lengths that were first seen under FakeTensorMode."""
    with FakeTensorMode():
        block_causal_attention(*(torch.empty(1, length, 1, 8) for length in (37, 41, 41)))
    out = block_causal_attention(*(torch.ones(1, length, 1, 8) for length in (37, 41, 41)))
    assert type(out) is Tensor
    torch.testing.assert_close(out, torch.ones(1, 37, 1, 8))


@pytest.mark.parametrize("made_on_meta", [True, False])
def test_model_on_meta(made_on_meta: bool):
    """Training and a rollout of a model without memory."""
    if made_on_meta:
        with torch.device("meta"):
            generator = CausalWanModel(CONFIG, backend="ext")
    else:
        generator = model().to("meta")
    x, t, context = (tensor.to("meta") for tensor in inputs())
    flow = generator(x, t, context, mask=MASK)
    assert (flow.device.type, flow.shape) == ("meta", x.shape)
    flow.sum().backward()
    assert all(parameter.grad.device.type == "meta" for parameter in generator.parameters())
    cache = generator.make_cache(x.shape, max_frames=8, window_frames=5, sink_frames=1)
    with torch.no_grad():
        for _ in range(2):
            assert generator(x, t, context, cache=cache, commit=True).shape == x.shape
    assert cache.num_frames == 8
    assert cache.position.device.type == "meta"


def test_model_of_fake_tensors():
    with FakeTensorMode():
        generator = model()
        x, t, context = torch.empty(2, 4, *LATENT), torch.empty(2, 4), torch.empty(2, CONFIG.text_len, CONFIG.text_dim)
        flow = generator(x, t, context, mask=BlockCausalMask(4, FRAME_SEQLEN, 2))
        flow.sum().backward()
        cache = generator.make_cache(x.shape, max_frames=8)
        with torch.no_grad():
            generator(x, t, context, cache=cache, commit=True)
        cached = generator(x, t, context, cache=cache)
    for tensor in (flow, cached, *(parameter.grad for parameter in generator.parameters())):
        assert isinstance(tensor, FakeTensor)
    assert flow.shape == cached.shape == x.shape


def test_a_default_device_does_not_move_the_books():
    """Masks and caches of CPU tensors work where new tensors would go to another device."""
    q, k, v = (torch.randn(1, 24, 2, 8) for _ in range(3))
    with torch.device("meta"):
        mask = BlockCausalMask(4, 6, 2)
        cache = PagedKVCache(1, 2, 8, 6, window_frames=3, device="cpu")
    whole = block_causal_attention(q, k, v, mask)
    with torch.device("meta"), torch.no_grad():
        for block in range(2):
            rows = slice(12 * block, 12 * (block + 1))
            cached = cache.attend(0, q[:, rows], k[:, rows], v[:, rows])
            cache.write(0, k[:, rows], v[:, rows])
            cache.commit(2)
            assert cached.device.type == "cpu"
            if block == 0:
                torch.testing.assert_close(cached, whole[:, rows])
    assert cache.num_frames == 4
    assert mask.dense().device.type == "cpu"


@every_op
def test_deterministic_algorithms(call: OpCall):
    """No op refuses the flag, warns, or gives other bits under it."""
    results = []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                arguments = {
                    name: tensor.requires_grad_(name not in call.constants) for name, tensor in call.inputs().items()
                }
                outputs = call.outputs(**arguments)
                leaves = [tensor for tensor in arguments.values() if tensor.requires_grad]
                grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs]) if leaves else ()
        finally:
            torch.use_deterministic_algorithms(False)
        results.append((*outputs, *grads))
    for plain, deterministic in zip(*results, strict=True):
        assert_same_bits(deterministic.detach(), plain.detach())


def arguments_of_ops() -> list[ParameterSet]:
    return [pytest.param(call, name, id=f"{call} {name}") for call in OP_CALLS for name in call.shapes]


@pytest.mark.parametrize(("call", "name"), [case for case in arguments_of_ops() if len(case.values[0].shapes) > 1])
def test_another_device_is_refused(call: OpCall, name: str):
    arguments = call.inputs()
    arguments[name] = arguments[name].to("meta")
    # The first tensor says where the op runs: where it is elsewhere, the message is about one of the others.
    with pytest.raises(
        ValueError, match=r"(\w+) is on (meta|cpu), but (must be on|the cache is on) (cpu|meta)"
    ) as error:
        call.outputs(**arguments)
    assert str(error.value).split()[0] in call.shapes


@pytest.mark.parametrize(("call", "name"), arguments_of_ops())
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_a_dtype_that_is_no_float_is_refused(call: OpCall, name: str, dtype: torch.dtype):
    arguments = call.inputs()
    arguments[name] = arguments[name].to(dtype)
    with pytest.raises(TypeError, match=rf"{name} is {str(dtype).removeprefix('torch.')}, but must be"):
        call.outputs(**arguments)


@pytest.mark.parametrize(("call", "name"), arguments_of_ops())
def test_dtypes_are_promoted_as_documented(call: OpCall, name: str):
    """Attention takes one dtype, as scaled_dot_product_attention does. Everywhere else the latents or features (x, x_t,
    x0) decide the dtype of the result, and the other tensors are cast."""
    arguments = call.inputs()
    arguments[name] = arguments[name].bfloat16()
    if call.name in CAST_BY_AUTOCAST:
        with pytest.raises(TypeError, match=r"[qkv] is (bfloat16|float32), but (must be|the cache holds)"):
            call.outputs(**arguments)
        return
    decides = next(key for key in ("x", "x_t", "x0") if key in call.shapes)
    for output in call.outputs(**arguments):
        assert output.dtype == (torch.bfloat16 if name == decides else torch.float32)
