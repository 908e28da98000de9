"""Causal consistency distillation: a few-step causal model from a causal teacher, without solving whole ODEs.

Causal Forcing++ (arXiv 2605.15141) proposes it as initialisation. From there is the idea: distil the probability-flow
ODE of a *causal* teacher, so that what the student learns is a function of what it will see at inference. The loss is
that of consistency models (arXiv 2303.01469, algorithm 2), and putting it into blocks is our construction: every block
has a noise level of its own and sees the clean frames before it, as under teacher forcing. On a grid of falling
timesteps t_0 > t_1 > ... > 0 with noise levels s_n, with c the clean frames that a block sees and
x_n = (1 - s_n) x + s_n noise,

    x_{n+1} = x_n + (s_{n+1} - s_n) teacher(x_n, t_n | c)          one Euler step of the teacher's ODE
    loss    = mean of (f(x_n, t_n | c) - f*(x_{n+1}, t_{n+1} | c))^2,   f(x, t | c) = x - s flow(x, t | c),

where f* is a moving average of f, without gradient, and f*(x, 0 | c) = x.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from python_ref.models.wan import CausalWanModel
from python_ref.noise import NoiseSource
from python_ref.objectives.blockwise import Blockwise, per_block
from python_ref.schedule import FlowMatchSchedule


@dataclass
class ConsistencyDistillation(Blockwise):
    """The loss of a student that jumps to the end of the teacher's ODE from anywhere on it.

    Args:
        generator: the student, predicts the flow under a mask.
        target: f* above, a moving average of the student.
        teacher: a causal model trained by teacher forcing, frozen.
        solver: its table is the grid: ``num_steps`` Euler steps from noise to video.
        frames_per_block, first_frame_alone, window_frames, sink_frames: as in ``BlockCausalMask``.
        guidance_scale: of the teacher: flow = uncond + scale (cond - uncond); 1: none.
    """

    generator: CausalWanModel
    target: CausalWanModel
    teacher: CausalWanModel
    solver: FlowMatchSchedule
    frames_per_block: int = 3
    first_frame_alone: bool = False
    window_frames: int | None = None
    sink_frames: int = 0
    guidance_scale: float = 1.0
    teacher_forcing = True

    def loss(
        self,
        clean: Tensor,  # [B, F, C, H, W]
        context: Tensor,  # [B, text_len, text_dim]
        source: NoiseSource,
        uncond: Tensor | None = None,  # [B, text_len, text_dim]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, in float32.

        Args:
            clean: videos of the data.
            context: text embeddings of the captions.
            source: draws the noise, then one grid index per frame, of which each block takes that of its first frame.
            uncond: text embeddings of the empty caption, for guidance.

        Returns:
            The loss, and its log: ``x0`` (the prediction, detached) and ``timestep`` [B, F].
        """
        mask = self._mask(self.generator.config, clean)
        noise = source.randn(clean.shape, clean.dtype, clean.device)
        index = per_block(mask, source.randint(0, self.solver.num_steps, clean.shape[:2], clean.device))
        grid = torch.cat((self.solver.timesteps, torch.zeros(1))).to(clean.device)
        levels = torch.cat((self.solver.sigmas, torch.zeros(1))).to(clean.device)
        t, sigma, t_next, sigma_next = grid[index], levels[index], grid[index + 1], levels[index + 1]
        x_t = self.generator.ops.add_noise(clean, noise, sigma)
        with torch.no_grad():
            flow = self._teacher_flow(x_t, t, context, uncond, clean).float()
            x_next = (x_t + (sigma_next - sigma)[:, :, None, None, None] * flow).to(x_t.dtype)
            jump = self.target(x_next, t_next, context, mask=mask, clean_x=clean)
            wanted = self.generator.ops.denoise_step(jump, x_next, sigma_next)[0]  # x_next itself where sigma is 0
        flow = self.generator(x_t, t, context, mask=mask, clean_x=clean)
        x0, _ = self.generator.ops.denoise_step(flow, x_t, sigma)
        loss = (x0.float() - wanted.float()).square().mean()
        return loss, {"x0": x0.detach(), "timestep": t}

    def _teacher_flow(self, x_t: Tensor, t: Tensor, context: Tensor, uncond: Tensor | None, clean: Tensor) -> Tensor:
        mask = self._mask(self.teacher.config, clean)
        cond = self.teacher(x_t, t, context, mask=mask, clean_x=clean)
        if uncond is None or self.guidance_scale == 1:
            return cond
        free = self.teacher(x_t, t, uncond, mask=mask, clean_x=clean)
        return free + self.guidance_scale * (cond - free)
