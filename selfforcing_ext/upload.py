"""Small tables of the host, copied to where kernels read them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def copy_to_device(target: Tensor, values: NDArray[np.int32]) -> None:
    """Overwrites a tensor of the same shape. The host does not wait for a GPU: from pinned memory, which torch's
    allocator does not hand out again before the copy is done."""
    source = torch.from_numpy(values)
    if target.is_cuda and type(target) is Tensor:  # and not one of FakeTensorMode
        source = source.pin_memory()
    target.copy_(source, non_blocking=True)


def on_device(values: NDArray[np.int32], device: torch.device) -> Tensor:
    """A new int32 tensor with these values."""
    target = torch.empty(values.shape, dtype=torch.int32, device=device)
    copy_to_device(target, values)
    return target
