"""Sampling of the bidirectional model: whole videos by Euler steps along the flow, with guidance.

Source: classifier-free guidance (arXiv 2207.12598) in the parametrisation that Wan2.1 samples with.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from python_ref.models.wan import WanModel
from python_ref.schedule import FlowMatchSchedule


@torch.no_grad()
def solve_bidirectional(
    model: WanModel,
    schedule: FlowMatchSchedule,
    noise: Tensor,  # [B, F, C, H, W]
    context: Tensor,  # [B, text_len, text_dim]
    uncond: Tensor,  # [B, text_len, text_dim]
    guidance_scale: float,
) -> Iterator[Tensor]:
    """The solution of the model's ODE: videos [B, F, C, H, W] at every entry of the schedule, then the clean ones.

    Args:
        model: the teacher.
        schedule: its `num_steps` is the number of Euler steps.
        noise: where the videos start.
        context, uncond: text embeddings of the captions and of the empty caption.
        guidance_scale: flow = uncond + guidance_scale (cond - uncond).
    """
    encoded = model.encode_context(torch.cat((context, uncond)))
    x = noise
    yield x
    for timestep in schedule.timesteps.to(x.device):
        t = timestep.expand(x.shape[0])
        cond, free = model(torch.cat((x, x)), torch.cat((t, t)), encoded).float().chunk(2)
        x = schedule.step(free + guidance_scale * (cond - free), t, x)
        yield x


def sample_bidirectional(
    model: WanModel,
    schedule: FlowMatchSchedule,
    noise: Tensor,  # [B, F, C, H, W]
    context: Tensor,  # [B, text_len, text_dim]
    uncond: Tensor,  # [B, text_len, text_dim]
    guidance_scale: float,
) -> Tensor:
    """Videos [B, F, C, H, W]: where ``solve_bidirectional``, which has the same arguments, ends."""
    x = noise
    for state in solve_bidirectional(model, schedule, noise, context, uncond, guidance_scale):
        x = state
    return x
