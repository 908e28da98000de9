"""The processes of a run: one, or as many as torchrun started. What they do together is here; with one it is free.

Gradients are averaged by one all-reduce of our own after backward, not by the `DistributedDataParallel` wrapper. That
one counts on a single forward through the wrapper before each backward, whereas a rollout calls the generator once per
block and denoising step, with and without gradient, encodes captions apart, and goes through methods other than
`forward`. What the wrapper would win is overlap with backward; `fsdp` (see `python_ref.distributed`) has that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

BUCKET_BYTES = 64 * 2**20  # of gradients that are reduced together: large messages, little extra memory


@contextmanager
def process_group(device: str = "cpu") -> Iterator[None]:
    """Within it, the processes that torchrun started can talk to each other, about tensors on the CPU and on a device
    of this kind. Does nothing in a run of one process.

    Raises:
        ValueError: as `process_device`.
    """
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        yield
        return
    process_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def process_device(kind: str) -> torch.device:
    """This process's device of a kind, "cpu" or "cuda". GPUs go by the process's number on its machine.

    Raises:
        ValueError: there is no such GPU.
    """
    if kind != "cuda":
        return torch.device(kind)
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count:
        raise ValueError(f"device is 'cuda', but process {number} of this machine finds {count} GPUs; accepted: 'cpu'")
    torch.cuda.set_device(number)
    return torch.device(kind, number)


def process_count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def process_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_first_process() -> bool:
    """Whether this is the process that writes files and shows progress."""
    return process_rank() == 0


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if process_count() > 1:
        dist.barrier()


def mean_over_processes(values: Mapping[str, float]) -> dict[str, float]:
    """The mean of each value over the processes, which must all have the same names."""
    if process_count() == 1:
        return dict(values)
    names = sorted(values)
    total = torch.tensor([values[name] for name in names], dtype=torch.float64)
    dist.all_reduce(total)
    means = dict(zip(names, (total / process_count()).tolist(), strict=True))
    return {name: means[name] for name in values}


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Gives every process the mean of all processes' gradients. Those of sharded parameters are averaged already.

    A parameter without gradient must have none in any process.
    """
    if process_count() == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    for bucket in _buckets(grads):
        flat = torch.cat([grad.flatten() for grad in bucket])
        dist.all_reduce(flat)
        flat /= process_count()
        for grad, mean in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(mean.view_as(grad))


def _buckets(grads: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, `BUCKET_BYTES` or a single larger tensor at a time."""
    bucket: list[Tensor] = []
    size = 0
    for grad in grads:
        if bucket and (size + grad.nbytes > BUCKET_BYTES or grad.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(grad)
        size += grad.nbytes
    if bucket:
        yield bucket


def share_first_weights(module: nn.Module) -> None:
    """Copies the first process's weights and buffers to all others."""
    if process_count() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), src=0)


def local_tensors(tensors: Iterator[Tensor]) -> list[Tensor]:
    """This process's parts of sharded tensors, and other tensors as they are. Writing to them writes to the tensors."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def part_of_batch(tensor: Tensor, dim: int) -> Tensor:
    """The tensor as one of all processes' equal parts of a sharded one. Writing to its part writes to the tensor."""
    if process_count() == 1:
        return tensor
    return DTensor.from_local(tensor, init_device_mesh(tensor.device.type, (process_count(),)), [Shard(dim)])


def whole_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sharded tensors put together, on the CPU of the first process; nothing in the others, which must call it too."""
    whole = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if is_first_process():
            whole[name] = full.detach().contiguous().cpu()
    return whole
