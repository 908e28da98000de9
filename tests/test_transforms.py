"""Ways in which torch calls a function again: activation checkpointing, torch.func, forward-mode differentiation."""

from __future__ import annotations

import pytest
import torch
from compare import assert_close, assert_same_bits
from public_ops import DIFFERENTIABLE, OP_CALLS, OpCall
from small_model import MASK, inputs, model
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from selfforcing_ext import PagedKVCache

FRAMES = 2  # of a block


def loss(flow: Tensor) -> Tensor:
    return flow.square().mean()


def parameter_gradients(generator: torch.nn.Module, value: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*generator.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(value, parameters), strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool):
    """The same bits as without; recomputing a call computes what the call computed."""
    generator = model()
    x, t, context = inputs()
    expected = parameter_gradients(generator, loss(generator(x, t, context, mask=MASK)))
    x.requires_grad_()  # what the reentrant form needs
    flow = checkpoint(lambda x: generator(x, t, context, mask=MASK), x, use_reentrant=use_reentrant)
    loss(flow).backward()
    for name, parameter in generator.named_parameters():
        assert_same_bits(parameter.grad, expected[name], name)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_of_a_rollout(use_reentrant: bool):
    """Blocks are recomputed in backward, when the cache has moved on and recycled pages: on views of it."""
    generator = model()
    x, t, context = inputs(frames=4 * FRAMES)

    def rollout_loss(checkpointed: bool) -> Tensor:
        cache = generator.make_cache(x.shape, max_frames=None, window_frames=5, sink_frames=1, page_size=5)
        losses = []
        for start in range(0, x.shape[1], FRAMES):
            rows = slice(start, start + FRAMES)
            call = x[:, rows].clone().requires_grad_(), t[:, rows], context
            if checkpointed:
                view = cache.view()
                run = lambda x, t, context, view=view: generator(x, t, context, cache=view)  # noqa: E731
                flow = checkpoint(run, *call, use_reentrant=use_reentrant)
            else:
                flow = generator(*call, cache=cache)
            losses.append(loss(flow))
            with torch.no_grad():
                generator(*call, cache=cache, commit=True)
        return torch.stack(losses).sum()

    expected = parameter_gradients(generator, rollout_loss(checkpointed=False))
    rollout_loss(checkpointed=True).backward()
    for name, parameter in generator.named_parameters():
        assert_same_bits(parameter.grad, expected[name], name)


def test_functional_call():
    """Other parameters than the module's own, and gradient to them alone."""
    generator, other = model(seed=0), model(seed=1)
    x, t, context = inputs()
    parameters = {name: parameter.detach().clone().requires_grad_() for name, parameter in other.named_parameters()}
    flow = torch.func.functional_call(generator, parameters, (x, t, context), {"mask": MASK})
    expected = other(x, t, context, mask=MASK)
    assert_same_bits(flow, expected)
    grads = torch.autograd.grad(loss(flow), list(parameters.values()))
    for (name, true), mine in zip(parameter_gradients(other, loss(expected)).items(), grads, strict=True):
        assert_same_bits(mine, true, name)
    assert all(parameter.grad is None for parameter in generator.parameters())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("call", OP_CALLS, ids=str)
def test_vmap(call: OpCall):
    """torch calls an op without a batching rule once per element; gradient flows through that."""
    samples = [call.inputs(seed) for seed in range(3)]
    stacked = {name: torch.stack([sample[name] for sample in samples]) for name in call.shapes}
    leaves = [tensor.requires_grad_() for name, tensor in stacked.items() if name not in call.constants]
    expected = [
        torch.stack(outputs) for outputs in zip(*(call.outputs(**slices(stacked, i)) for i in range(3)), strict=True)
    ]
    if call.name == "PagedKVCache.attend":  # a cache is no tensor: what each element writes would have to be one
        with pytest.raises(RuntimeError, match="Batching rule not implemented for selfforcing::kv_cache_write"):
            torch.func.vmap(lambda tensors: call.outputs(**tensors))(stacked)
        return
    outputs = torch.func.vmap(lambda tensors: call.outputs(**tensors))(stacked)
    for mine, true in zip(outputs, expected, strict=True):
        assert_same_bits(mine, true)
    if not leaves:
        return
    weights = [torch.randn_like(output) for output in outputs]
    grads = [torch.autograd.grad(results, leaves, weights) for results in (outputs, expected)]
    for mine, true in zip(*grads, strict=True):
        assert_close(mine, true, 1e-6)


def slices(stacked: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    return {name: tensor[index] for name, tensor in stacked.items()}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_over_a_cache_that_is_read():
    """Several candidates for a block, over one past."""
    cache = PagedKVCache(1, 2, 8, 6, window_frames=4)
    past, candidates = torch.randn(2, 1, 12, 2, 8), torch.randn(5, 3, 1, 12, 2, 8)
    cache.write(0, *past)
    cache.commit(2)
    with torch.no_grad():
        outputs = torch.func.vmap(lambda qkv: cache.attend(0, *qkv))(candidates)
        for output, qkv in zip(outputs, candidates, strict=True):
            assert_same_bits(output, cache.attend(0, *qkv))


def total(outputs: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([output.square().sum() for output in outputs]).sum()


@pytest.mark.parametrize("call", DIFFERENTIABLE, ids=str)
def test_func_grad(call: OpCall):
    """The gradients of autograd, in every argument that has one."""
    arguments = call.inputs()
    names = tuple(name for name in arguments if name not in call.constants)

    def loss_of(*values: Tensor) -> Tensor:
        return total(call.outputs(**{**arguments, **dict(zip(names, values, strict=True))}))

    values = [arguments[name] for name in names]
    grads = torch.func.grad(loss_of, argnums=tuple(range(len(names))))(*values)
    leaves = [value.clone().requires_grad_() for value in values]
    expected = torch.autograd.grad(loss_of(*leaves), leaves)
    for name, mine, true in zip(names, grads, expected, strict=True):
        assert_close(mine, true, 1e-6, name)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("call", [call for call in DIFFERENTIABLE if call.name != "PagedKVCache.attend"], ids=str)
def test_gradients_per_sample(call: OpCall):
    """vmap over grad: one gradient for each of several calls."""
    samples = [call.inputs(seed) for seed in range(3)]
    stacked = {name: torch.stack([sample[name] for sample in samples]) for name in call.shapes}
    grads = torch.func.vmap(torch.func.grad(lambda tensors: total(call.outputs(**tensors))))(stacked)
    for index, sample in enumerate(samples):
        leaves = {name: tensor.requires_grad_() for name, tensor in sample.items() if name not in call.constants}
        expected = torch.autograd.grad(total(call.outputs(**sample)), list(leaves.values()))
        for name, true in zip(leaves, expected, strict=True):
            assert_close(grads[name][index], true, 1e-6, name)


@pytest.mark.parametrize(("call", "name"), [(call, name) for call in OP_CALLS for name in call.shapes], ids=str)
def test_forward_mode_is_refused(call: OpCall, name: str):
    """No op has a rule for tangents, and none loses them. Not even where an argument is constant to autograd."""
    arguments = call.inputs()

    def outputs(value: Tensor) -> tuple[Tensor, ...]:
        return call.outputs(**{**arguments, name: value})

    value = arguments[name]
    message = r"has no forward-mode derivative, but an argument has a tangent"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(outputs, (value,), (torch.ones_like(value),))
    for requires_grad in (False, True):
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
            outputs(forward_ad.make_dual(value.requires_grad_(requires_grad), torch.ones_like(value)))
    with forward_ad.dual_level():
        call.outputs(**arguments)  # without a tangent
