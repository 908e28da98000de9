"""Are strokes crisp? The energy of the image gradient relative to the energy of the ink."""

from torch import Tensor

from python_ref.measures.tracking import ink


def gradient_energy(video: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels over mean squared ink, per frame: [F], of [B, F, 1, H, W].

    Blurring lowers it, noise raises it. It is compared with that of real videos: 1 is as sharp as those.
    """
    image = ink(video)
    gradient = image.diff(dim=-1).square().sum((0, 2, 3)) + image.diff(dim=-2).square().sum((0, 2, 3))
    return gradient / image.square().sum((0, 2, 3)).clamp_min(1e-6)


def ink_amount(video: Tensor) -> Tensor:
    """Mean ink per frame, [F]: tells fading and flooding."""
    return ink(video).mean((0, 2, 3))
