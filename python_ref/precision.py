"""The numerical precision of the networks."""

import torch


def network_precision(precision: str) -> torch.autocast:
    """Autocast to bfloat16 for "bf16", and none for "fp32"; weights stay float32 in both.

    The cache of cast weights is off: a rollout mixes calls with and without gradient, and a weight that was cast
    without gradient would be reused where gradient is needed.
    """
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)
