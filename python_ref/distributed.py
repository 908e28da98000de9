"""How a run is spread over its processes: which samples each works on, and which weights it holds."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from python_ref.batch_share import BatchShare
from python_ref.config import Config, DistributedConfig
from python_ref.context_parallel import ContextParallel
from python_ref.models.wan import WanBackbone
from python_ref.processes import process_count, process_device, process_rank, share_first_weights


def batch_share(config: DistributedConfig) -> BatchShare:
    """The part of every batch that this process works on.

    Raises:
        ValueError: several processes, but no strategy for them, or a number that groups of ``context_parallel`` do not
            make up.
    """
    count, group_size = process_count(), config.context_parallel
    if count > 1 and config.strategy == "none":
        raise ValueError(f"distributed.strategy is 'none', but there are {count} processes; accepted: 'ddp', 'fsdp'")
    if count == 1:
        return BatchShare()
    if count % group_size:
        raise ValueError(f"distributed.context_parallel is {group_size}; accepted: a divisor of {count} processes")
    return BatchShare(process_rank() // group_size, count // group_size)


def distribute(config: Config, *modules: nn.Module) -> None:
    """Moves modules to this process's device and prepares them for several processes, in place.

    All processes go on with the weights of the first. With "fsdp" each keeps only its part of them; with "ddp" it keeps
    them all, and `python_ref.learning.Learner` averages the gradients. With `context_parallel` neighbouring processes
    share the tokens of their videos; see `python_ref.context_parallel`, also for why all gradients may be averaged.

    Args:
        config: of the run; its `device` and `distributed` count.
        modules: all networks of a stage, frozen ones and averages too, each before its optimizer is made. A module that
            is no `WanBackbone` is sharded by its parts, which must then be called as modules.
    """
    device = process_device(config.device)
    count, group_size = process_count(), config.distributed.context_parallel
    if count > 1 and group_size > 1:
        groups = init_device_mesh(device.type, (count // group_size, group_size), mesh_dim_names=("batch", "context"))
        parallel = ContextParallel(groups["context"].get_group())
        for backbone in (part for module in modules for part in module.modules() if isinstance(part, WanBackbone)):
            backbone.split_context(parallel)
    for module in modules:  # one at a time, so that only one is whole on the device
        module.to(device)
        share_first_weights(module)
        if count > 1 and config.distributed.strategy == "fsdp":
            # Our models change nothing in place, so that views may be returned.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
            # Nothing stays gathered after a forward, so that weights that change without a backward (averages) are
            # gathered anew in the next one.
            _shard_parts(module, mesh=init_device_mesh(device.type, (count,)), reshard_after_forward=True)


def _shard_parts(module: nn.Module, **options: Any) -> None:
    if isinstance(module, WanBackbone):
        shard_parameters(module, **options)
        return
    for part in module.children():
        is_container = type(part).forward is nn.Module.forward  # it has parts that are called, and is not called itself
        if is_container or isinstance(part, WanBackbone):
            _shard_parts(part, **options)
        elif any(True for _ in part.parameters()):
            fully_shard(part, **options)


def shard_parameters(model: WanBackbone, **options: Any) -> None:
    """Shards parameters, gradients and optimizer state with FSDP2, in place: one group per layer.

    A caption is encoded apart from the layers' forward, and may be encoded once for several calls. So each
    cross-attention is a group of its own, gathered for ``keys_and_values`` as well. Methods of the model that are
    called in place of ``forward`` gather its weights as ``forward`` does.

    Args:
        model: on the device that it will run on, before its optimizer is made.
        options: of ``fully_shard``, such as ``mesh``, ``mp_policy`` or ``reshard_after_forward``.
    """
    for block in model.blocks:
        fully_shard(block.cross_attn, **options)
        register_fsdp_forward_method(block.cross_attn, "keys_and_values")
        fully_shard(block, **options)
    fully_shard(model, **options)
    for method in ("encode_context", "features"):
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)
