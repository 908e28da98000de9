"""The numerical precision of the networks."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch


@contextmanager
def network_precision(precision: str) -> Iterator[None]:
    """Autocast to bfloat16 for "bf16", and none for "fp32", on every device; weights stay float32 in both.

    The cache of cast weights is off: a rollout mixes calls with and without gradient, and a weight that was cast
    without gradient would be reused where gradient is needed.
    """
    wanted = precision == "bf16"
    with ExitStack() as stack:
        for device_type in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            stack.enter_context(torch.autocast(device_type, torch.bfloat16, enabled=wanted, cache_enabled=False))
        yield


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
