"""Flow-matching losses on real videos: for a bidirectional teacher, and to start a causal model.

Source: flow matching (arXiv 2210.02747); diffusion forcing (arXiv 2407.01392); teacher forcing as in Self-Forcing
(arXiv 2506.08009), section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from python_ref.models.wan import CausalWanModel, EncodedContext, WanModel
from python_ref.noise import NoiseSource
from python_ref.objectives.blockwise import Blockwise, per_block
from python_ref.schedule import FlowMatchSchedule


def flow_matching_loss(
    flow: Tensor,  # [B, F, C, H, W]
    clean: Tensor,  # [B, F, C, H, W]
    noise: Tensor,  # [B, F, C, H, W]
    weight: Tensor | None = None,  # [B, F] or [B, 1]
) -> Tensor:
    """Mean over frames of weight * mean (flow - (noise - clean))^2, in float32."""
    error = (flow.float() - (noise.float() - clean.float())).square().mean(dim=(2, 3, 4))
    return (error if weight is None else error * weight).mean()


@dataclass
class TeacherFlowMatching:
    """The loss of a bidirectional model: one noise level per video.

    Args:
        model: predicts the flow of whole videos.
        schedule: timesteps are drawn uniformly from its table, so that its shift decides their density.
        weighted: weigh by the schedule's training weights.
    """

    model: WanModel
    schedule: FlowMatchSchedule
    weighted: bool = True

    def loss(
        self,
        clean: Tensor,  # [B, F, C, H, W]
        context: Tensor | EncodedContext,  # [B, text_len, text_dim]
        source: NoiseSource,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its log: ``x0`` (the prediction, detached) and ``timestep`` [B, 1].

        Draws the noise, then one table index per video.
        """
        noise = source.randn(clean.shape, clean.dtype, clean.device)
        index = source.randint(0, self.schedule.num_steps, (clean.shape[0], 1), clean.device)
        t = self.schedule.timesteps.to(clean.device)[index]
        sigma = self.schedule.sigma_at(t).expand(clean.shape[:2])
        noisy = self.model.ops.add_noise(clean, noise, sigma)
        flow = self.model(noisy, t[:, 0], context)
        loss = flow_matching_loss(flow, clean, noise, self.schedule.training_weight_at(t) if self.weighted else None)
        return loss, {"x0": _x0(self.model, flow, noisy, sigma), "timestep": t}


@dataclass
class CausalDiffusion(Blockwise):
    """The losses of a block-causal model: diffusion forcing, where the past is noisy too, and teacher forcing, where
    it is clean. Every block has its own noise level.

    Args:
        model: predicts the flow under a mask.
        schedule: timesteps are drawn uniformly from its table.
        frames_per_block, first_frame_alone, window_frames, sink_frames: as in ``BlockCausalMask``.
        teacher_forcing: the past of each block is clean; otherwise it is as noisy as its own blocks.
        clean_noise_steps: teacher forcing only: noise the clean past by a level drawn per block from the so many lowest
            entries of the schedule's table (0: not at all), so that the model learns to live with its own errors.
        published_clean_noise: draw from the *highest* entries instead, as the published code does, which indexes the
            falling table from its start.
        weighted: weigh by the schedule's training weights.
    """

    model: CausalWanModel
    schedule: FlowMatchSchedule
    frames_per_block: int = 3
    first_frame_alone: bool = False
    window_frames: int | None = None
    sink_frames: int = 0
    teacher_forcing: bool = False
    clean_noise_steps: int = 0
    published_clean_noise: bool = False
    weighted: bool = True

    def loss(
        self,
        clean: Tensor,  # [B, F, C, H, W]
        context: Tensor | EncodedContext,  # [B, text_len, text_dim]
        source: NoiseSource,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its log: ``x0`` (the prediction, detached) and ``timestep`` [B, F].

        Draws the noise, then one table index per frame, of which each block takes that of its first frame, then, if
        the clean past is noised (by the same noise), as many again.
        """
        mask = self._mask(self.model.config, clean)
        timesteps = self.schedule.timesteps.to(clean.device)
        noise = source.randn(clean.shape, clean.dtype, clean.device)
        t = timesteps[per_block(mask, source.randint(0, self.schedule.num_steps, clean.shape[:2], clean.device))]
        sigma = self.schedule.sigma_at(t)
        noisy = self.model.ops.add_noise(clean, noise, sigma)
        clean_x = clean if self.teacher_forcing else None
        clean_t = None
        if self.teacher_forcing and self.clean_noise_steps:
            index = source.randint(0, self.clean_noise_steps, clean.shape[:2], clean.device)
            index = index if self.published_clean_noise else self.schedule.num_steps - 1 - index
            clean_t = timesteps[per_block(mask, index)]
            clean_x = self.model.ops.add_noise(clean, noise, self.schedule.sigma_at(clean_t))
        flow = self.model(noisy, t, context, mask=mask, clean_x=clean_x, clean_t=clean_t)
        loss = flow_matching_loss(flow, clean, noise, self.schedule.training_weight_at(t) if self.weighted else None)
        return loss, {"x0": _x0(self.model, flow, noisy, sigma), "timestep": t}


@torch.no_grad()
def _x0(model: WanModel | CausalWanModel, flow: Tensor, noisy: Tensor, sigma: Tensor) -> Tensor:
    return model.ops.denoise_step(flow.detach(), noisy, sigma)[0]
