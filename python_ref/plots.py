"""Pictures of a training and of an evaluation."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

from python_ref.measures.report import Measures

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def smoothed(values: Sequence[float], window: int) -> np.ndarray:
    """Mean over the last `window` values at each point, fewer at the start."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(0, end - window)
    return (sums[end] - sums[start]) / (end - start)


def plot_losses(path: str | Path, logs: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """One panel per stage with its losses over steps, raw and smoothed.

    Args:
        path: the PNG.
        logs: entries of `metrics.jsonl` per stage.
    """
    figure, axes = plt.subplots(1, len(logs), figsize=(5 * len(logs), 3.5), squeeze=False)
    for axis, (stage, entries) in zip(axes[0], logs.items(), strict=True):
        for name in sorted({key for entry in entries for key in entry if key.endswith("loss")}):
            steps = [entry["step"] for entry in entries if name in entry]
            values = [entry[name] for entry in entries if name in entry]
            (line,) = axis.plot(steps, values, alpha=0.25)
            axis.plot(steps, smoothed(values, max(1, len(values) // 20)), color=line.get_color(), label=name)
        axis.set(title=stage.replace("_", " "), xlabel="step", ylabel="loss")
        axis.legend()
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_drift(path: str | Path, results: Mapping[str, Measures], training_frames: int, frames_per_block: int) -> None:
    """Every measure over the frame index, one line per set of videos; block borders and training length are marked."""
    panels = {
        "identity": "reads as the digit asked for",
        "motion_angle": "course against caption (degrees)",
        "bend": "bend of the path (pixels / frame²)",
        "sharpness": "sharpness (real = 1)",
        "ink": "ink (real = 1)",
    }
    first_frame = {"motion_angle": 0.5, "bend": 1.0}  # a step lies between two frames, a triple around its middle
    figure, axes = plt.subplots(len(panels), 1, figsize=(10, 2.4 * len(panels)), sharex=True)
    frames = max(len(measures.identity) for measures in results.values())
    for axis, (name, label) in zip(axes, panels.items(), strict=True):
        for border in range(frames_per_block, frames, frames_per_block):
            axis.axvline(border - 0.5, color="0.9", linewidth=0.8)
        if training_frames < frames:
            axis.axvline(training_frames - 0.5, color="0.4", linestyle="--", linewidth=1)
        for row, measures in results.items():
            values = getattr(measures, name)
            axis.plot(np.arange(len(values)) + first_frame.get(name, 0), values, marker=".", label=row)
        axis.set_ylabel(label, fontsize=8)
        axis.set_ylim(bottom=0)
    axes[0].set_ylim(0, 1.02)
    axes[0].legend(fontsize=8)
    axes[-1].set_xlabel("frame (dashed: length of the training videos)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_by_frame(path: str | Path, panels: Mapping[str, Mapping[str, np.ndarray]], training_frames: int) -> None:
    """One panel per measure over the frame index: the mean of several runs, and their standard deviation as error bars.

    Args:
        path: the PNG.
        panels: label to the name of a line to its values [runs, frames]; NaN where nothing was measured.
        training_frames: where the training videos end, which is marked.
    """
    figure, axes = plt.subplots(len(panels), 1, figsize=(10, 2.6 * len(panels)), sharex=True, squeeze=False)
    for axis, (label, lines) in zip(axes[:, 0], panels.items(), strict=True):
        for number, (name, values) in enumerate(lines.items()):
            frames = np.arange(values.shape[1])
            spread = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(len(frames))
            (line,) = axis.plot(frames, values.mean(axis=0), label=name, linewidth=1.2)
            shown = frames[number % 4 :: 4]  # bars of different lines stand side by side
            axis.errorbar(
                shown, values.mean(axis=0)[shown], spread[shown], fmt="none", capsize=2, color=line.get_color()
            )
        axis.axvline(training_frames - 0.5, color="0.4", linestyle="--", linewidth=1)
        axis.set_ylabel(label, fontsize=8)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes[-1, 0].set_xlabel("frame (dashed: length of the training videos)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
