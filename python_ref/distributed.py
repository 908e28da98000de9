"""Models over several processes."""

from __future__ import annotations

from typing import Any

from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from python_ref.models.wan import WanBackbone


def shard_parameters(model: WanBackbone, **options: Any) -> None:
    """Shards parameters, gradients and optimizer state with FSDP2, in place: one group per layer.

    A caption is encoded apart from the layers' forward, and may be encoded once for several calls. So each
    cross-attention is a group of its own, gathered for ``keys_and_values`` as well.

    Args:
        model: on the device that it will run on, before its optimizer is made.
        options: of ``fully_shard``, such as ``mesh``, ``mp_policy`` or ``reshard_after_forward``.
    """
    for block in model.blocks:
        fully_shard(block.cross_attn, **options)
        register_fsdp_forward_method(block.cross_attn, "keys_and_values")
        fully_shard(block, **options)
    fully_shard(model, **options)
    register_fsdp_forward_method(model, "encode_context")
