"""ODE regression: a few-step causal model learns where the teacher's probability-flow ODE leads, as initialisation.

Source: CausVid (arXiv 2412.07772), section 4.3: for states x_t of the teacher's ODE that ends in x0, with a time per
block, minimise the squared distance of the causal model's x0 prediction to x0. ``python -m python_ref.make_ode_pairs``
makes the states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from python_ref.models.wan import CausalWanModel, EncodedContext
from python_ref.noise import NoiseSource
from python_ref.objectives.blockwise import Blockwise, per_block, pick_steps
from python_ref.schedule import FlowMatchSchedule


@dataclass
class ODERegression(Blockwise):
    """The loss of a block-causal model on solutions of the teacher's ODE.

    Args:
        generator: predicts the flow under a mask.
        schedule: gives the noise levels of the timesteps.
        denoising_steps: falling timesteps, as the generator sees them (see ``FlowMatchSchedule.warp``), at which the
            solutions are given. The last may be 0.
        frames_per_block, first_frame_alone, window_frames, sink_frames: as in ``BlockCausalMask``.
        first_frame_given: frame 0 is clean: the model learns to continue an image.
    """

    generator: CausalWanModel
    schedule: FlowMatchSchedule
    denoising_steps: Sequence[float] | Tensor
    frames_per_block: int = 3
    first_frame_alone: bool = False
    window_frames: int | None = None
    sink_frames: int = 0
    first_frame_given: bool = False
    teacher_forcing = False  # the past of a block is at a noise level of its own, as in diffusion forcing

    def loss(
        self,
        trajectory: Tensor,  # [B, T, F, C, H, W]
        context: Tensor | EncodedContext,  # [B, text_len, text_dim]
        source: NoiseSource,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared distance of the x0 predictions to the clean end, in float32; clean frames do not count.

        Args:
            trajectory: the ODE's states at ``denoising_steps``, and the clean end unless the last step is 0.
            context: text embeddings.
            source: draws one step per frame, of which each block takes that of its first frame.

        Returns:
            The loss, and its log: ``x0`` (the prediction, detached) and ``timestep`` [B, F].

        Raises:
            ValueError: the trajectory has another number of states.
        """
        steps = torch.as_tensor(self.denoising_steps, dtype=torch.float32, device=trajectory.device)
        ends_clean = float(self.denoising_steps[-1]) == 0
        states = len(steps) + (0 if ends_clean else 1)
        if trajectory.dim() != 6 or trajectory.shape[1] != states:
            raise ValueError(
                f"trajectory has shape {list(trajectory.shape)}, but must be [B, {states}, F, C, H, W]: a state for "
                f"each of {len(steps)} denoising_steps" + ("" if ends_clean else ", and the clean end")
            )
        target = trajectory[:, -1]
        mask = self._mask(self.generator.config, target)
        index = per_block(mask, source.randint(0, len(steps), target.shape[:2], target.device))
        if self.first_frame_given:
            index[:, 0] = states - 1
        t = (steps if ends_clean else torch.cat((steps, steps.new_zeros(1))))[index]
        x_t = pick_steps(trajectory, index)
        flow = self.generator(x_t, t, context, mask=mask)
        x0, _ = self.generator.ops.denoise_step(flow, x_t, self.schedule.sigma_at(t))
        error = (x0.float() - target.float()).square().mean(dim=(2, 3, 4))
        counts = t != 0
        # With no frame that counts the loss is 0, not a mean over nothing.
        loss = error.masked_fill(~counts, 0).sum() / counts.sum().clamp(min=1)
        return loss, {"x0": x0.detach(), "timestep": t}
