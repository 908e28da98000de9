"""The algorithm in one picture."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from python_ref.tutorial.algorithm.style import (
    ACCENT,
    FAINT,
    INK,
    MUTED,
    NOISE,
    PAST,
    SINK,
    in_tutorial_style,
    new_figure,
    save,
)

# Rows from top to bottom, in inches.
LOSS_Y, VIDEO_Y, EXIT_Y, STEPS_Y, NOISE_Y, CACHE_Y = 6.6, 5.2, 3.9, 2.9, 1.9, 0.5
COLUMN_WIDTH, BLOCK_STEP = 2.3, 4.2


@in_tutorial_style
def create_algorithm_diagram(path: str | Path) -> Path:
    """Draws one training step of Self-Forcing on three blocks. Returns the path of the PNG."""
    width = 2 * BLOCK_STEP + COLUMN_WIDTH
    figure = new_figure(11.4, 7.5)
    axis = figure.add_subplot()
    axis.set(xlim=(-0.3, width + 0.3), ylim=(0.35, 7.5), aspect="equal")
    axis.axis("off")
    _box(axis, 0, LOSS_Y, width, 0.7, "loss on the whole video: teacher against critic (DMD), SiD or GAN", SINK, INK)
    _box(axis, 0, CACHE_Y, width, 0.7, "", FAINT)
    axis.text(0.2, CACHE_Y + 0.35, "KV cache", ha="left", va="center", weight="bold", fontsize=11)
    for block in range(3):
        _draw_block(axis, block)
    return save(
        figure,
        path,
        "red: the only step with gradient, in every block the same random one; blue-green: constants to autograd",
    )


def _draw_block(axis: Axes, block: int) -> None:
    left = block * BLOCK_STEP
    inner, middle = COLUMN_WIDTH, left + COLUMN_WIDTH / 2
    _box(axis, left, NOISE_Y, inner, 0.6, f"noise of block {block + 1}", NOISE, INK)
    _box(axis, left, STEPS_Y, inner, 0.6, "steps 1 … $s - 1$, no gradient", "white", MUTED, edge=MUTED, size=10)
    _box(axis, left, EXIT_Y, inner, 0.6, "exit step $s$", ACCENT, "white")
    _box(axis, left, VIDEO_Y, inner, 0.7, f"block {block + 1}:  $x_0$", "white", INK, edge=INK)
    _arrow(axis, (middle, NOISE_Y + 0.6), (middle, STEPS_Y))
    _arrow(axis, (middle, STEPS_Y + 0.6), (middle, EXIT_Y))
    _arrow(axis, (middle - 0.25, EXIT_Y + 0.6), (middle - 0.25, VIDEO_Y))
    _arrow(axis, (middle - 0.25, VIDEO_Y + 0.7), (middle - 0.25, LOSS_Y))
    _arrow(axis, (middle + 0.25, LOSS_Y), (middle + 0.25, VIDEO_Y + 0.7), ACCENT, dashed=True)
    _arrow(axis, (middle + 0.25, VIDEO_Y), (middle + 0.25, EXIT_Y + 0.6), ACCENT, dashed=True)
    if block == 0:
        axis.text(middle + 0.4, (LOSS_Y + VIDEO_Y + 0.7) / 2, "gradient", va="center", fontsize=9.5, color=ACCENT)
    if block < 2:
        _draw_clean_pass(axis, left + inner, block)


def _draw_clean_pass(axis: Axes, right: float, block: int) -> None:
    """From a finished block down into the cache, and from there into the steps of the next block."""
    down, next_left = right + 0.45, right + BLOCK_STEP - COLUMN_WIDTH
    axis.plot([right, down], [VIDEO_Y + 0.35] * 2, color=PAST, lw=1.8, solid_capstyle="butt")
    _arrow(axis, (down, VIDEO_Y + 0.35), (down, CACHE_Y + 0.6), PAST)
    axis.text(
        down + 0.1,
        VIDEO_Y + 0.35,
        "clean pass,\nno gradient",
        va="center",
        fontsize=9.5,
        color=PAST,
    )
    _box(axis, down - 0.55, CACHE_Y + 0.1, 1.1, 0.5, f"K, V of {block + 1}", PAST, "white", size=9.5)
    up = next_left - 0.45
    axis.plot([up, up], [CACHE_Y + 0.7, EXIT_Y + 0.3], color=PAST, lw=1.8)
    for row in (STEPS_Y, EXIT_Y):
        _arrow(axis, (up, row + 0.3), (next_left, row + 0.3), PAST)
    axis.text(up + 0.08, NOISE_Y - 0.3, "attends to\nthe past", va="center", fontsize=9.5, color=PAST)


def _box(
    axis: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    text: str,
    fill: str,
    colour: str = INK,
    edge: str = "none",
    size: float = 11,
) -> None:
    style = "round,pad=0,rounding_size=0.12"
    axis.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=fill, edgecolor=edge, lw=1.4))
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=colour)


def _arrow(
    axis: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK, dashed: bool = False
) -> None:
    axis.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=13,
            color=colour,
            lw=1.8,
            linestyle=(0, (3, 1.5)) if dashed else "-",
            shrinkA=0,
            shrinkB=0,
        )
    )
