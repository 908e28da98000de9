"""The argument checks that the public functions share. Messages name the argument, what it got and what it takes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, bfloat16, dtype, float16, float32

from selfforcing_ext.gpu import check_gpu

FLOAT_DTYPES = (float32, bfloat16, float16)


def dtype_name(value: dtype) -> str:
    return str(value).removeprefix("torch.")


def check_float_tensor(name: str, tensor: object) -> None:
    """Raises TypeError unless it is a float32, bfloat16 or float16 tensor, RuntimeError if no op runs on its GPU."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, but must be a torch.Tensor")
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} is {dtype_name(tensor.dtype)}, but must be float32, bfloat16 or float16")
    # A tensor on a GPU that torch has not touched is not real: it has a shape alone.
    if tensor.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        check_gpu(name, tensor.device)


def check_heads(name: str, tensor: Tensor, layout: str = "[B, L, H, D]") -> None:
    """Raises ValueError unless the tensor is [B, L, H, D] with a contiguous last dimension."""
    if tensor.ndim != 4:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, but must have four dimensions {layout}")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} has stride {tensor.stride(-1)} in its last dimension, but must have stride 1 there; "
            f"call {name}.contiguous()"
        )


def check_head_dim(name: str, head_dim: int) -> None:
    if head_dim % 8 or not 8 <= head_dim <= 256:
        raise ValueError(f"{name} has head dim {head_dim}, but must have a multiple of 8 up to 256")


def check_alike(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raises TypeError for another dtype, ValueError for another device."""
    if tensor.dtype != other.dtype:
        raise TypeError(
            f"{name} is {dtype_name(tensor.dtype)}, but must be {dtype_name(other.dtype)} like {other_name}"
        )
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, but must be on {other.device} like {other_name}")


def number_per_entry(
    name: str, number: int | Tensor, integers: dtype, other_name: str, other: Tensor
) -> Tensor:  # [1] or [B]
    """A number that all entries of a batch share, or a tensor [1] or [B], as a tensor on the device of ``other``.

    Raises TypeError for another dtype than ``integers``, ValueError for a number that does not fit into it, and for
    another shape or device than that of ``other``, which has a batch dimension.
    """
    if isinstance(number, int | np.integer | torch.SymInt):
        limits = torch.iinfo(integers)
        if not limits.min <= number <= limits.max:
            raise ValueError(f"{name} is {number}, but must be in [{limits.min}, {limits.max}]")
        return torch.full((1,), number, dtype=integers, device=other.device)
    if not isinstance(number, Tensor) or number.dtype != integers:
        got = dtype_name(number.dtype) if isinstance(number, Tensor) else type(number).__name__
        raise TypeError(f"{name} is {got}, but must be an int or an {dtype_name(integers)} tensor")
    if number.ndim != 1 or number.shape[0] not in (1, other.shape[0]):
        raise ValueError(
            f"{name} has shape {list(number.shape)}, but must be an int or have shape [1] or [{other.shape[0]}] "
            f"like the batch of {other_name}"
        )
    if number.device != other.device:
        raise ValueError(f"{name} is on {number.device}, but must be on {other.device} like {other_name}")
    return number
