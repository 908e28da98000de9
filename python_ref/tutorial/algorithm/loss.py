"""Losses that pull generated videos to a target."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": functional.mse_loss,
    "l1": functional.l1_loss,
    "huber": functional.smooth_l1_loss,
}


class SelfForcingLoss:
    """The distance of generated videos from a target that gets no gradient.

    A real video as the target would be wrong: nothing says which one a rollout should have become. What fits is where
    the video should move. The DMD loss is exactly that: half of "mse" with the target video - dmd_gradient, whose
    gradient with respect to the video is the DMD gradient over the number of elements.

    Args:
        loss_type: "mse", "l1" or "huber".

    Raises:
        ValueError: another type.

    Source: DMD (arXiv 2311.18828), equations 7 and 8.
    """

    def __init__(self, loss_type: str = "mse") -> None:
        if loss_type not in LOSSES:
            raise ValueError(f"loss_type is {loss_type!r}, but must be one of {', '.join(map(repr, LOSSES))}")
        self.loss_type = loss_type

    def compute_loss(
        self,
        generated: Tensor,  # [B, F, C, H, W]
        target: Tensor,  # [B, F, C, H, W]
    ) -> Tensor:
        """The mean over all elements, a scalar; gradient flows to ``generated`` alone.

        Raises:
            ValueError: the shapes differ.
        """
        if generated.shape != target.shape:
            raise ValueError(f"target has shape {list(target.shape)}, but must have {list(generated.shape)}")
        return LOSSES[self.loss_type](generated, target.detach())
