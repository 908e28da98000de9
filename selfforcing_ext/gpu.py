"""Which GPUs the kernels of this build run on.

Architectures have CMake's names: "80" is machine code for compute capability 8.x from 8.0 on, and PTX that the
driver compiles for every later GPU; "90a" is code for 9.0 alone; "100f" is code for its family, 10.x. Source: CUDA C++
Programming Guide, section "Compute Capabilities".
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

import torch

from selfforcing_ext import library

#: The kernels copy asynchronously and multiply with mma.sync, as GPUs do since Ampere.
OLDEST_CAPABILITY = (8, 0)


def capability_name(architecture: str) -> str:
    """An architecture as TORCH_CUDA_ARCH_LIST names it: "90a" is "9.0a"."""
    return re.sub(r"(\d)([af]?)$", r".\1\2", architecture)


def architecture_for(capability: tuple[int, int], built: Sequence[str]) -> str | None:
    """The newest of the built architectures that a GPU of this compute capability runs, or None."""

    def parts(architecture: str) -> tuple[tuple[int, int], str]:
        digits = architecture.rstrip("af")
        return divmod(int(digits), 10), architecture[len(digits) :]

    def runs(architecture: str) -> bool:
        made_for, suffix = parts(architecture)
        if suffix == "a":
            return made_for == capability
        return made_for <= capability and (suffix == "" or made_for[0] == capability[0])

    return max(filter(runs, built), key=parts, default=None)


@functools.cache
def obstacle(device: torch.device) -> str | None:
    """Why no op of this build runs on a GPU, in half a sentence; None if they run."""
    if not library.HAS_CUDA:
        return "this build has CPU ops alone; build it under a CUDA torch with SELFFORCING_CUDA=1"
    capability = torch.cuda.get_device_capability(device)
    if architecture_for(capability, library.BUILT_ARCHITECTURES) is not None:
        return None
    built = " and ".join(capability_name(name) for name in library.BUILT_ARCHITECTURES)
    number = "{}.{}".format(*capability)
    remedy = (
        f"build it with TORCH_CUDA_ARCH_LIST={number}"
        if capability >= OLDEST_CAPABILITY
        else "the kernels need {}.{} or newer".format(*OLDEST_CAPABILITY)
    )
    gpu = torch.cuda.get_device_name(device)
    return f"this build is for compute capability {built}, and {gpu} has {number}: {remedy}"


def check_gpu(name: str, device: torch.device) -> None:
    """Raises RuntimeError unless the ops of this build run on the GPU that the named tensor is on."""
    reason = obstacle(device)
    if reason is not None:
        raise RuntimeError(f"{name} is on {device}, but {reason}")
