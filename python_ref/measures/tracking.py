"""Where the digit is in every frame: the centre of its ink."""

import torch
from torch import Tensor

INK_THRESHOLD = 0.15  # of full ink; fainter grey is background noise of a generator


def ink(video: Tensor) -> Tensor:
    """Video [B, F, 1, H, W] in -1..1 to ink [B, F, H, W] in 0..1."""
    return ((video[:, :, 0].float() + 1) / 2).clamp(0, 1)


def ink_centres(video: Tensor) -> Tensor:
    """(row, column) of the centre of ink per frame, [B, F, 2] in pixels; the middle of an empty frame."""
    weight = (ink(video) - INK_THRESHOLD).clamp_min(0)
    height, width = weight.shape[-2:]
    mass = weight.sum((-1, -2))
    rows = (weight.sum(-1) * torch.arange(height)).sum(-1)
    columns = (weight.sum(-2) * torch.arange(width)).sum(-1)
    middle = torch.tensor([(height - 1) / 2, (width - 1) / 2])
    centres = torch.stack([rows, columns], dim=-1) / mass.clamp_min(1e-6)[..., None]
    return torch.where(mass[..., None] > 1e-3, centres, middle)


def crop_around(images: Tensor, centres: Tensor, size: int) -> Tensor:
    """Square crops [..., size, size] of images [..., H, W] around subpixel centres [..., 2]; outside is empty.

    Bilinear sampling at a subpixel offset is separable, as in the renderer of the data.
    """
    texel = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
    rows = centres[..., :1] + texel  # [..., size]
    columns = centres[..., 1:] + texel
    row_weights = _tent(rows, images.shape[-2])
    column_weights = _tent(columns, images.shape[-1])
    return row_weights @ images @ column_weights.transpose(-1, -2)


def _tent(positions: Tensor, length: int) -> Tensor:
    """Bilinear weights [..., size, length] of sampling at positions [..., size]."""
    return (1 - (positions[..., None] - torch.arange(length, dtype=torch.float32)).abs()).clamp_min(0)
