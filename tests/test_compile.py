"""torch.compile(fullgraph=True): one graph without breaks, and no new graph as a rollout advances."""

from __future__ import annotations

import pytest
import torch
from cases import MASKS, AttentionCase, RolloutCase
from compare import assert_close, assert_same_bits
from small_model import CONFIG, LATENT, model
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from python_ref.models.wan import CausalWanModel
from selfforcing_ext import BlockCausalMask, PagedKVCache, block_causal_attention

BATCH, FRAMES = 2, 2  # videos; frames per block
WINDOWED = {"window_frames": 5, "sink_frames": 1, "max_frames": None}
UNLIMITED = {"max_frames": 20 * FRAMES}


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch._dynamo.reset()


def compiled(function, backend: str = "aot_eager"):
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, backend=counter, fullgraph=True), counter


def block(seed: int, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    """x [B, F, C, H, W] and t [B, F]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, FRAMES, *LATENT, generator=generator)
    return x, torch.full((batch, FRAMES), 1000.0 / (1 + seed))


@pytest.mark.parametrize("mask", [None, *MASKS[2:5]], ids=str)
def test_attention(mask: BlockCausalMask | None):
    case = AttentionCase(mask, num_queries=30, num_keys=50, heads=4, head_dim=16)
    inputs = [t.requires_grad_() for t in case.inputs()]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return block_causal_attention(q, k, v, mask, return_lse=True)

    function, counter = compiled(attention)
    out, wanted = function(*inputs), attention(*inputs)
    for mine, true in zip(out, wanted, strict=True):
        assert_same_bits(mine, true)
    weights = [torch.randn_like(t) for t in out]
    grads = torch.autograd.grad(out, inputs, weights)
    for mine, true in zip(grads, torch.autograd.grad(wanted, inputs, weights), strict=True):
        assert_same_bits(mine, true)
    assert counter.frame_count == 1


def test_lengths_without_a_mask_become_symbols():
    """Full attention over other lengths takes the one dynamic graph that torch.compile makes at the second length."""
    function, counter = compiled(block_causal_attention)
    for length in (20, 33, 47, 61):
        q, k, v = (torch.randn(1, n, 2, 8) for n in (length, 2 * length + 1, 2 * length + 1))
        assert_same_bits(function(q, k, v), block_causal_attention(q, k, v))
    assert counter.frame_count == 2


def test_masks_of_one_length_share_a_graph():
    q, k, v = (torch.randn(1, 24, 2, 8) for _ in range(3))
    function, counter = compiled(block_causal_attention)
    for frames_per_block in (1, 2, 3, 4, 6):
        mask = BlockCausalMask(12, 2, frames_per_block, window_frames=7)
        assert_same_bits(function(q, k, v, mask), block_causal_attention(q, k, v, mask))
    assert counter.frame_count <= 2  # the second graph has symbols for the table's sizes


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("teacher_forcing", [False, True])
def test_model_in_training(teacher_forcing: bool, checkpointed: bool):
    generator = model()
    mask = BlockCausalMask(4, 6, 2, window_frames=3, sink_frames=1, teacher_forcing=teacher_forcing)
    x = torch.randn(BATCH, 4, *LATENT)
    t = torch.rand(BATCH, 4) * 1000
    context = torch.randn(BATCH, CONFIG.text_len, CONFIG.text_dim)
    arguments = {"mask": mask, "clean_x": torch.randn_like(x) if teacher_forcing else None}
    function, counter = compiled(lambda: generator(x, t, context, checkpoint_layers=checkpointed, **arguments))
    parameters = list(generator.parameters())
    flow, wanted = function(), generator(x, t, context, **arguments)
    assert_close(flow, wanted, 1e-6, "flow")
    grads = torch.autograd.grad(flow.square().mean(), parameters)
    for (name, _), mine, true in zip(
        generator.named_parameters(), grads, torch.autograd.grad(wanted.square().mean(), parameters), strict=True
    ):
        assert_close(mine, true, 1e-5, name)
    assert counter.frame_count == 1


def rollout(function, generator: CausalWanModel, limits: dict, num_blocks: int, batch: int = BATCH) -> list[Tensor]:
    """Two noisy calls and the clean pass of every block; what all calls returned."""
    cache = generator.make_cache((batch, 1, *LATENT), page_size=5, **limits)
    context = torch.linspace(-1, 1, batch * CONFIG.text_len * CONFIG.text_dim).reshape(batch, CONFIG.text_len, -1)
    outputs = []
    with torch.no_grad():
        for index in range(num_blocks):
            x, t = block(index, batch)
            outputs += [function(x, t, context, cache=cache), function(x + 1, t, context, cache=cache)]
            outputs.append(function(x - 1, t, context, cache=cache, commit=True))
    assert cache.num_frames == num_blocks * FRAMES
    return outputs


@pytest.mark.parametrize("limits", [WINDOWED, UNLIMITED], ids=["windowed", "unlimited"])
def test_rollout_needs_two_graphs(limits: dict):
    """One graph reads the cache, one writes it too; twenty blocks, evictions and other rollouts need no others. Another
    batch size needs one more of each, with a symbol for it, and no third batch size does."""
    generator = model()
    function, counter = compiled(generator)

    def check(num_blocks: int, batch: int, graphs: int) -> None:
        runs = (rollout(call, generator, limits, num_blocks, batch) for call in (function, generator))
        for index, (mine, true) in enumerate(zip(*runs, strict=True)):
            assert_close(mine, true, 1e-6, f"call {index} with batch size {batch}")
        assert counter.frame_count == graphs

    check(num_blocks=20, batch=BATCH, graphs=2)
    check(num_blocks=3, batch=BATCH, graphs=2)
    check(num_blocks=3, batch=BATCH + 1, graphs=4)
    check(num_blocks=20, batch=BATCH + 2, graphs=4)


def test_rollout_under_autocast():
    """The casts are in the graphs."""
    generator = model()
    function, counter = compiled(generator)
    with torch.autocast("cpu", torch.bfloat16):
        runs = [rollout(call, generator, WINDOWED, num_blocks=4) for call in (function, generator)]
    for index, (mine, true) in enumerate(zip(*runs, strict=True)):
        assert_close(mine, true, 1e-2, f"call {index}")
    assert counter.frame_count == 2


@pytest.mark.parametrize("through_view", [False, True])
def test_gradients_of_a_rollout(through_view: bool):
    """Backward of every block at the end, through graphs that read a cache whose pages were recycled since."""
    generator = model()
    function, counter = compiled(generator)
    context = torch.randn(BATCH, CONFIG.text_len, CONFIG.text_dim)

    def gradients(call) -> tuple[Tensor, ...]:
        cache = generator.make_cache((BATCH, 1, *LATENT), page_size=5, **WINDOWED)
        losses = []
        for index in range(5):
            x, t = block(index)
            flow = call(x, t, context, cache=cache.view() if through_view else cache)
            losses.append(flow.square().mean())
            cache.reserve(FRAMES)
            with torch.no_grad():
                call(x, t, context, cache=cache, commit=True)
        return torch.autograd.grad(sum(losses), list(generator.parameters()))

    names = [name for name, _ in generator.named_parameters()]
    for name, mine, true in zip(names, gradients(function), gradients(generator), strict=True):
        assert_close(mine, true, 1e-5, name)
    # The pool has grown since autograd holds pages: to read and to write one graph for its first size, one for any.
    assert counter.frame_count == 4


def test_a_graph_says_how_to_make_room():
    """A compiled graph cannot grow the pool of a cache without limits; reserve() before it can."""
    case = RolloutCase((3,) * 8, num_layers=1, page_size=4)

    def write(cache: PagedKVCache, k: Tensor, v: Tensor) -> None:
        cache.write(0, k, v)
        cache.commit(3)

    function, _ = compiled(write)
    cache = PagedKVCache(**case.cache_arguments())
    blocks = [case.block(3, seed=index)[0] for index in range(8)]
    function(cache, *blocks[0][1:])
    function(cache, *blocks[1][1:])
    with pytest.raises(
        RuntimeError, match=r"a compiled graph cannot grow the pool: call cache\.reserve\(3\) before it"
    ):
        function(cache, *blocks[2][1:])
    assert cache.num_frames == 6
    for _, k, v in blocks[2:]:
        cache.reserve(3)
        function(cache, k, v)
    other = PagedKVCache(**case.cache_arguments())
    for _, k, v in blocks:
        write(other, k, v)
    with torch.no_grad():
        assert_same_bits(cache.attend(0, *blocks[0]), other.attend(0, *blocks[0]))


def test_errors_of_a_graph_are_the_caches():
    cache = PagedKVCache(2, 2, 16, 6, max_frames=4)
    _, k, v = RolloutCase((3,)).block(3)[0]

    def write(cache: PagedKVCache, k: Tensor, v: Tensor, layers: int) -> None:
        for layer in range(layers):
            cache.write(layer, k, v)
        cache.commit(3)

    function, _ = compiled(write)
    with pytest.raises(ValueError, match=r"layers \[1\] of 2 have not written the block"):
        function(cache, k, v, 1)
    assert cache.num_frames == 0
    function(cache, k, v, 2)
    with pytest.raises(ValueError, match="k has 3 frames after 3 committed ones, but max_frames is 4"):
        function(cache, k, v, 2)
    assert cache.num_frames == 3


def test_inductor():
    """The default backend reuses memory, reorders and drops what it can; the cache's ops and pins must survive that."""
    case = RolloutCase((2,) * 5, window_frames=5, sink_frames=1, page_size=5)

    def step(q: Tensor, k: Tensor, v: Tensor, cache: PagedKVCache, commit: bool) -> Tensor:
        for layer in range(case.num_layers):
            q = q + cache.attend(layer, q, k, v * q)
            if commit:
                cache.write(layer, k + q, v)
        if commit:
            cache.commit(2)
        return q + cache.position

    def run(function) -> list[Tensor]:
        cache, results, losses = PagedKVCache(**case.cache_arguments()), [], []
        first = [t.detach().clone().requires_grad_() for t in case.block(2, seed=9)[0]]
        for index in range(5):
            losses.append(function(*first, cache, False).square().mean())
            cache.reserve(2)  # autograd holds pages
            with torch.no_grad():
                results.append(function(*case.block(2, seed=index)[0], cache, True))
        return [*results, *torch.autograd.grad(sum(losses), first)]

    function, _ = compiled(step, "inductor")
    for index, (mine, true) in enumerate(zip(run(function), run(step), strict=True)):
        assert_close(mine, true, 1e-6, f"result {index}")
