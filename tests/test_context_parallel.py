"""Context parallelism over two processes: flow, rollouts and gradients are those of one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from compare import assert_close
from small_model import CONFIG, FRAME_SEQLEN, inputs, model
from torch import Tensor, nn

from python_ref.context_parallel import ContextParallel
from python_ref.models.discriminator import Discriminator
from python_ref.models.wan import WanConfig, WanModel
from python_ref.processes import average_gradients
from selfforcing_ext import BlockCausalMask

WORLD_SIZE = 2
FRAMES, FRAMES_PER_BLOCK = 4, 2
TOLERANCE = 1e-5  # float32; sums over tokens and heads are in another order


def causal() -> nn.Module:
    return model()


def bidirectional(config: WanConfig = CONFIG) -> nn.Module:
    torch.manual_seed(0)
    network = WanModel(config, backend="ext")
    nn.init.normal_(network.head.head.weight, std=0.1)
    return network


def without_norms() -> nn.Module:
    """Queries and keys are only rotated."""
    network = bidirectional(replace(CONFIG, qk_norm=False))
    for block in network.blocks:
        block.cross_attn.k.bias.requires_grad_(False)  # a softmax does not see it: its gradient is rounding
    return network


def discriminator() -> nn.Module:
    return Discriminator(bidirectional(), layers=[0, 1], sees_time=True)


def masked(network: nn.Module, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
    return network(x, t, context, mask=BlockCausalMask(FRAMES, FRAME_SEQLEN, FRAMES_PER_BLOCK, 3, 1))


def teacher_forcing(network: nn.Module, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
    mask = BlockCausalMask(FRAMES, FRAME_SEQLEN, FRAMES_PER_BLOCK, teacher_forcing=True)
    return network(x, t, context, mask=mask, clean_x=x.flip(0))


def rollout(network: nn.Module, x: Tensor, t: Tensor, context: Tensor, **options: str) -> Tensor:
    """Block after block from a cache that forgets, layers recomputed in backward."""
    cache = network.make_cache(x.shape, max_frames=None, window_frames=3, sink_frames=1, page_size=5, **options)
    flows = []
    for start in range(0, FRAMES, FRAMES_PER_BLOCK):
        block = x[:, start : start + FRAMES_PER_BLOCK], t[:, start : start + FRAMES_PER_BLOCK]
        flows.append(network(*block, context, cache=cache.view(), checkpoint_layers=True))
        with torch.no_grad():
            network(*block, context, cache=cache, commit=True)
    return torch.cat(flows, dim=1)


def rotated_on_reading(network: nn.Module, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
    return rollout(network, x, t, context, rope="on_read")


def one_time(network: nn.Module, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
    return network(x, t[:, 0], context)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "masked": (causal, masked),
    "teacher forcing": (causal, teacher_forcing),
    "rollout": (causal, rollout),
    "rotated on reading": (causal, rotated_on_reading),
    "bidirectional": (bidirectional, one_time),
    "without norms": (without_norms, one_time),
    "discriminator": (discriminator, one_time),
}


def run(name: str, parallel: ContextParallel | None) -> dict[str, Tensor]:
    """The output of a case, and its gradients with respect to the latents and to every weight."""
    make, call = CASES[name]
    network = make()
    if parallel is not None:
        getattr(network, "model", network).split_context(parallel)
    x, t, context = inputs(2, FRAMES)
    x = nn.Parameter(x)
    out = call(network, x, t, context)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    average_gradients([x, *network.parameters()])
    gradients = {key: weight.grad for key, weight in network.named_parameters() if weight.grad is not None}
    return {"output": out.detach(), "latents": x.grad, **gradients}


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD_SIZE)
    parallel = ContextParallel()
    results = {name: run(name, parallel) for name in CASES}
    whole, split = model(), model()
    split.split_context(parallel)
    cache_bytes = [network.make_cache(inputs()[0].shape, max_frames=4).nbytes for network in (whole, split)]
    with pytest.raises(ValueError, match="num_heads is 3, but must be a multiple of the 2 processes' number"):
        parallel.check(3)
    with pytest.raises(ValueError, match="a frame has 3 tokens, but must have a multiple of the 2 processes' number"):
        parallel.own_tokens(torch.zeros(1, 6, 8), frames=2)
    torch.save((results, cache_bytes), folder / f"results_{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, dict[str, Tensor]], list[int]]]:
    """Of each process."""
    folder = tmp_path_factory.mktemp("context_parallel")
    torch.multiprocessing.spawn(worker, args=(folder,), nprocs=WORLD_SIZE)
    return [torch.load(folder / f"results_{rank}.pt") for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("rank", range(WORLD_SIZE))
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_are_those_of_one_process(name: str, rank: int, results: list):
    expected, found = run(name, None), results[rank][0][name]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert_close(found[key], value, TOLERANCE, key)


def test_a_cache_holds_the_heads_of_its_process(results: list):
    for _, (whole, share) in results:
        assert share * WORLD_SIZE == whole > 0
