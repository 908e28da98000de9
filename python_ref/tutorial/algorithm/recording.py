"""Every call of the generator, looked at from outside: what rollouts really do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from python_ref.models.wan import CausalWanModel
from python_ref.schedule import FlowMatchSchedule


@dataclass(frozen=True)
class ModelCall:
    """One call of the generator on one block.

    Attributes:
        block, start_frame: which block, and its first frame.
        timestep: its noise level in [0, 1000].
        x_t: the block it was given [B, frames, C, H, W].
        x0: the clean block that it predicts.
        clean_pass: whether the call wrote the block's keys and values to the cache; what it predicts is not used then.
    """

    block: int
    start_frame: int
    timestep: float
    x_t: Tensor
    x0: Tensor
    clean_pass: bool


@contextmanager
def record_calls(generator: CausalWanModel, scheduler: FlowMatchSchedule) -> Iterator[list[ModelCall]]:
    """Within the context, calls of the generator with a cache are appended to the list that it yields.

    Args:
        generator: the model to watch, by a forward hook.
        scheduler: turns its flow into x0.
    """
    calls: list[ModelCall] = []

    def record(_module: Any, arguments: tuple[Tensor, ...], options: dict[str, Any], flow: Tensor) -> None:
        if "cache" not in options:
            return
        x_t, t = arguments[:2]
        block = start_frame = 0
        if calls:
            last = calls[-1]
            block = last.block + int(last.clean_pass)
            start_frame = last.start_frame + (last.x_t.shape[1] if last.clean_pass else 0)
        x0 = scheduler.flow_to_x0(flow.detach(), x_t.detach(), t)
        calls.append(
            ModelCall(block, start_frame, float(t[0, 0]), x_t.detach(), x0, clean_pass=options.get("commit", False))
        )

    hook = generator.register_forward_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()
