"""The numerical precision of the networks."""

from contextlib import AbstractContextManager, nullcontext

import torch


def network_precision(precision: str) -> torch.autocast:
    """Autocast to bfloat16 for "bf16", and none for "fp32"; weights stay float32 in both.

    The cache of cast weights is off: a rollout mixes calls with and without gradient, and a weight that was cast
    without gradient would be reused where gradient is needed.
    """
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast casts to on this kind of device; None without autocast, which a meta device never has."""
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def without_autocast(device_type: str) -> AbstractContextManager:
    """A context without autocast on this kind of device."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
