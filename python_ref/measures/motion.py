"""Does the digit move as its caption says?"""

import torch
from torch import Tensor


def start_angles(centres: Tensor, directions: Tensor, steps: int = 3) -> Tensor:
    """Angle between the caption's direction and the displacement over the first `steps` steps.

    Args:
        centres: [B, F, 2] (row, column) per frame, pixels.
        directions: [B, 2] unit vectors.
        steps: how many steps; the data never bounces in its first three.

    Returns:
        [B] degrees, 0 to 180; 90 for a digit that does not move.
    """
    return _degrees(centres[:, steps] - centres[:, 0], directions)


def angles_by_frame(centres: Tensor, directions: Tensor, bounced: Tensor) -> Tensor:
    """Angle between the course and the caption with the signs of both left out, which bouncing preserves.

    A wall turns one component of the velocity round, so |row| and |column| keep telling the caption's direction for as
    long as the digit keeps its course.

    Args:
        centres: [B, F, 2]; directions: [B, 2].
        bounced: [B, F - 2] bool, the triples of frames (f, f + 1, f + 2) in which a wall was touched; their steps are
            left out.

    Returns:
        [F - 1] mean degrees (0 to 90) of the step from frame f to f + 1; nan where all touch a wall.
    """
    step = centres[:, 1:] - centres[:, :-1]
    touched = torch.zeros(step.shape[:2], dtype=torch.bool)
    touched[:, :-1] |= bounced
    touched[:, 1:] |= bounced
    angles = _degrees(step.abs(), directions.abs()[:, None].expand_as(step))
    return angles.masked_fill(touched, float("nan")).nanmean(0)


def _degrees(moved: Tensor, wanted: Tensor) -> Tensor:
    cosine = (moved * wanted).sum(-1) / moved.norm(dim=-1).clamp_min(1e-6)
    return torch.rad2deg(torch.acos(cosine.clamp(-1, 1)))
