"""Pictures of videos in the making: block after block, and step after step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from torch import Tensor

from python_ref.tutorial.algorithm.pipeline import SimplifiedSelfForcingPipeline
from python_ref.tutorial.algorithm.recording import ModelCall, record_calls
from python_ref.tutorial.algorithm.style import (
    ACCENT,
    INK,
    MUTED,
    PAST,
    in_tutorial_style,
    new_axes,
    new_figure,
    outline,
    save,
    show_frames,
)


@in_tutorial_style
def visualize_autoregressive_generation(
    pipeline: SimplifiedSelfForcingPipeline,
    noise: Tensor,  # [B, F, C, H, W]
    conditional_dict: Mapping[str, Tensor],
    path: str | Path,
) -> Path:
    """Generates a video and draws it after every block: what is past, what was just made, what is noise still.

    Args:
        pipeline: makes the video.
        noise, conditional_dict: as in ``SimplifiedSelfForcingPipeline.generate``; the first video is drawn.
        path: the PNG.

    Returns:
        The path.
    """
    blocks = [calls[-1].x0[0] for calls in _denoising_calls(pipeline, noise, conditional_dict)]
    waiting = noise[0].split(pipeline.num_frames_per_block)
    count = len(blocks)
    figure = new_figure(1.9 * count + 1.1, 0.68 * count + 1.0)
    axes = new_axes(figure, count, count)
    for now, row in enumerate(axes):
        row[0].set_ylabel(f"block {now + 1}", rotation=0, ha="right", va="center", color=ACCENT, weight="bold")
        for block, axis in enumerate(row):
            show_frames(axis, blocks[block] if block <= now else waiting[block])
            if block > now:
                axis.images[0].set_alpha(0.3)
            outline(axis, PAST if block < now else ACCENT if block == now else "white")
    for block, axis in enumerate(axes[0]):
        first = block * pipeline.num_frames_per_block
        axis.set_title(f"frames {first}-{first + pipeline.num_frames_per_block - 1}", fontsize=10, weight="normal")
    return save(
        figure,
        path,
        "a row is a turn: red is denoised while it attends to the cached past (blue-green); the rest is noise still",
    )


@in_tutorial_style
def visualize_denoising_process(
    pipeline: SimplifiedSelfForcingPipeline,
    noise: Tensor,  # [B, F, C, H, W]
    conditional_dict: Mapping[str, Tensor],
    path: str | Path,
    block: int = 0,
) -> Path:
    """Generates a video and draws what the generator was given and what it predicted in each step of one block.

    Args:
        pipeline: makes the video.
        noise, conditional_dict: as in ``SimplifiedSelfForcingPipeline.generate``; the first video is drawn.
        path: the PNG.
        block: which block.

    Returns:
        The path.

    Raises:
        IndexError: the video has no such block.
    """
    steps = _denoising_calls(pipeline, noise, conditional_dict)[block]
    sigmas = pipeline.scheduler.sigma_at(torch.tensor([call.timestep for call in steps])).tolist()
    figure = new_figure(2.3 * len(steps) + 1.2, 2.7)
    axes = new_axes(figure, 2, len(steps))
    for (given, predicted), call, sigma in zip(axes.T, steps, sigmas, strict=True):
        given.set_title(rf"$t$ = {call.timestep:.0f},  $\sigma$ = {sigma:.2f}", fontsize=10, weight="normal")
        show_frames(given, call.x_t[0])
        show_frames(predicted, call.x0[0])
        outline(given, MUTED, 1.0)
        outline(predicted, MUTED, 1.0)
        _arrow(given, predicted, (0.5, 0.0), (0.5, 1.0))
    for before, after in zip(axes[1, :-1], axes[0, 1:], strict=True):
        _arrow(before, after, (1.0, 0.6), (0.0, 0.4), ACCENT)
    outline(axes[1, -1], ACCENT)
    for axis, label in zip(axes[:, 0], ("given\n$x_t$", "predicted\n$x_0$"), strict=True):
        axis.set_ylabel(label, rotation=0, ha="right", va="center", labelpad=10)
    return save(
        figure,
        path,
        r"down: $x_0 = x_t - \sigma \cdot \mathrm{flow}$; red: noised to the next $\sigma$; last $x_0$: the block",
    )


@in_tutorial_style
def visualize_videos(
    videos: Mapping[str, Tensor],  # [F, C, H, W] each
    path: str | Path,
    frames_per_block: int = 3,
) -> Path:
    """Draws videos of one length as rows of frames, their names in front and gaps between their blocks.

    Args:
        videos: from names.
        path: the PNG.
        frames_per_block: frames between two gaps.

    Returns:
        The path.
    """
    rows = [video.split(frames_per_block) for video in videos.values()]
    figure = new_figure(1.3 * len(rows[0]) + 1.6, 0.52 * len(rows) + 0.6)
    axes = new_axes(figure, len(rows), len(rows[0]))
    for row, (name, blocks) in enumerate(zip(videos, rows, strict=True)):
        axes[row, 0].set_ylabel(name, rotation=0, ha="right", va="center", labelpad=6)
        for axis, block in zip(axes[row], blocks, strict=True):
            show_frames(axis, block)
            axis.spines[:].set_visible(False)
    for block, axis in enumerate(axes[0]):
        axis.set_title(f"block {block + 1}", fontsize=10, weight="normal")
    return save(figure, path)


def _denoising_calls(
    pipeline: SimplifiedSelfForcingPipeline, noise: Tensor, conditional_dict: Mapping[str, Tensor]
) -> Sequence[list[ModelCall]]:
    """The denoising calls of each block, without the clean passes."""
    with record_calls(pipeline.generator, pipeline.scheduler) as calls:
        pipeline.generate(noise, conditional_dict)
    blocks: list[list[ModelCall]] = [[] for _ in range(calls[-1].block + 1)]
    for call in calls:
        if not call.clean_pass:
            blocks[call.block].append(call)
    return blocks


def _arrow(
    start: Axes, end: Axes, start_at: tuple[float, float], end_at: tuple[float, float], colour: str = INK
) -> None:
    """From a point of one axis to a point of another, in fractions of the axes."""
    end.annotate(
        "",
        xy=end_at,
        xycoords=end.transAxes,
        xytext=start_at,
        textcoords=start.transAxes,
        arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.4, "shrinkA": 2, "shrinkB": 2},
        annotation_clip=False,
    )
