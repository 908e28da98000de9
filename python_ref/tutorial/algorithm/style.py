"""How the pictures look."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

INK = "#1d2b36"  # text and outlines
MUTED = "#6b7a86"  # captions
FAINT = "#e6eaed"  # what is not there
ACCENT = "#d1495b"  # the block at work, and gradient
PAST = "#00798c"  # what is cached
SINK = "#edae49"
NOISE = "#b9c3ca"

# A decorator: what a function draws looks like this, and other pictures of the process stay as they are.
in_tutorial_style = matplotlib.rc_context(
    {
        "font.size": 10,
        "text.color": INK,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "figure.facecolor": "white",
    }
)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches. Not of pyplot: it needs no screen and leaves the reader's own figures alone."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.09)
    return figure


def new_axes(figure: Figure, rows: int, columns: int, **options: Any) -> np.ndarray:
    """A grid of axes [rows, columns]."""
    return figure.subplots(rows, columns, squeeze=False, **options)


def save(figure: Figure, path: str | Path, caption: str = "") -> Path:
    """Writes a PNG with a caption below the picture, and returns its path."""
    if caption:
        figure.supxlabel(caption, fontsize=9.5, color=MUTED)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def show_frames(axis: Axes, frames: Tensor | Sequence[Tensor], gap: int = 1) -> None:
    """Frames [F, C, H, W] in about -1..1 side by side in one axis; the first channel is shown."""
    images = [frame[0].detach().float().cpu().numpy() for frame in frames]
    separator = np.full((images[0].shape[0], gap), np.nan)
    strip = np.hstack([part for image in images for part in (separator, image)][1:])
    axis.imshow(np.ma.masked_invalid(strip), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    axis.set(xticks=[], yticks=[])


def outline(axis: Axes, colour: str, width: float = 2.5) -> None:
    """A frame around an axis."""
    for spine in axis.spines.values():
        spine.set(visible=True, edgecolor=colour, linewidth=width)
