"""Two processes on one machine: data-parallel and sharded training compute what one process computes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from compare import assert_close
from small_model import FRAME_SEQLEN, inputs, model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from python_ref.distributed import shard_parameters
from selfforcing_ext import BlockCausalMask

WORLD_SIZE = 2
BATCH, FRAMES, FRAMES_PER_BLOCK = 4, 4, 2
MASK = BlockCausalMask(FRAMES, FRAME_SEQLEN, FRAMES_PER_BLOCK, window_frames=3, sink_frames=1)


def masked_loss(network: nn.Module, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
    """A training step on whole videos."""
    return network(x, t, context, mask=MASK).square().mean()


def rollout_loss(network: nn.Module, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
    """A training step on a rollout: block after block from a cache, whose pages are recycled before backward."""
    generator = network.module if isinstance(network, DistributedDataParallel) else network
    cache = generator.make_cache(x.shape, max_frames=None, window_frames=3, sink_frames=1, page_size=5)
    losses = []
    for start in range(0, FRAMES, FRAMES_PER_BLOCK):
        block = x[:, start : start + FRAMES_PER_BLOCK], t[:, start : start + FRAMES_PER_BLOCK]
        losses.append(network(*block, context, cache=cache).square().mean())
        with torch.no_grad():
            network(*block, context, cache=cache, commit=True)
    return torch.stack(losses).mean()


def with_encoded_context(network: nn.Module, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
    """Captions encoded once, before the model is called."""
    return masked_loss(network, x, t, network.encode_context(context))


def data_parallel(generator: nn.Module) -> nn.Module:
    return DistributedDataParallel(generator)


def sharded(generator: nn.Module) -> nn.Module:
    shard_parameters(generator, mesh=init_device_mesh("cpu", (WORLD_SIZE,)))
    assert all(isinstance(parameter, DTensor) for parameter in generator.parameters())
    return generator


CASES = {
    "ddp, masked": (data_parallel, masked_loss),
    "ddp, rollout": (data_parallel, rollout_loss),
    "fsdp, masked": (sharded, masked_loss),
    "fsdp, rollout": (sharded, rollout_loss),
    "fsdp, encoded context": (sharded, with_encoded_context),
}


def gradients(generator: nn.Module) -> dict[str, Tensor]:
    grads = {name: parameter.grad for name, parameter in generator.named_parameters()}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}


def worker(rank: int, folder: Path) -> None:
    """Every case on this process's share of the batch; the first process saves the gradients."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD_SIZE)
    share = [tensor.chunk(WORLD_SIZE)[rank] for tensor in inputs(BATCH, FRAMES)]
    results = {}
    for name, (parallelise, loss) in CASES.items():
        generator = model()
        network = parallelise(generator)  # must live until backward has run
        loss(network, *share).backward()
        results[name] = gradients(generator)
    if rank == 0:
        torch.save(results, folder / "gradients.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("distributed")
    torch.multiprocessing.spawn(worker, args=(folder,), nprocs=WORLD_SIZE)
    return torch.load(folder / "gradients.pt")


@functools.cache
def whole_batch(loss: Callable[..., Tensor]) -> dict[str, Tensor]:
    generator = model()
    loss(generator, *inputs(BATCH, FRAMES)).backward()
    return gradients(generator)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_one_process(results: dict[str, dict[str, Tensor]], name: str):
    expected = whole_batch(CASES[name][1])
    assert results[name].keys() == expected.keys()
    for parameter, grad in results[name].items():
        assert_close(grad, expected[parameter], 1e-5, parameter)
