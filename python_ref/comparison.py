"""The report of `python_ref.reproduce`: tables, plots and sheets of several methods with several seeds."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from python_ref.config import Config
from python_ref.data.source import video_shape
from python_ref.plots import plot_by_frame
from python_ref.run_facts import read_records
from python_ref.yardsticks import Yardstick

ALL, WINDOW, SINK = VARIANTS = "all frames", "window", "window and sink"
CLOCK_NAMES = {"cpu": "CPU time", "wall": "wall-clock time"}


@dataclass(frozen=True)
class FinishedRun:
    """One method with one seed."""

    method: str
    seed: int
    seconds: float | None  # of training; None if it was interrupted
    measures: dict[str, dict[str, Any]]  # by variant, as `Yardstick.measure` gives them


class Comparison:
    """Finished runs by method, in the order in which methods first appear."""

    def __init__(self, runs: Sequence[FinishedRun]) -> None:
        self.runs = runs
        self.methods = list(dict.fromkeys(run.method for run in runs))

    def by_frame(self, method: str, variant: str, measure: str) -> np.ndarray:
        """[seeds, frames]; what could not be measured is NaN."""
        rows = [run.measures[variant][measure] for run in self.runs if run.method == method]
        return np.asarray(rows, dtype=float)

    def num_frames(self, variant: str, measure: str) -> int:
        return len(self.runs[0].measures[variant][measure])

    def number(self, method: str, variant: str, measure: str) -> np.ndarray:
        """[seeds], of a measure of whole videos."""
        return np.asarray([run.measures[variant][measure] for run in self.runs if run.method == method], dtype=float)


def write_report(
    path: Path, config: Config, yardstick: Yardstick, runs: Sequence[FinishedRun], steps: Mapping[str, int]
) -> Path:
    """Writes the page and its pictures; returns the page's path."""
    pictures = path.parent / "images" / path.stem
    pictures.mkdir(parents=True, exist_ok=True)
    comparison = Comparison(runs)
    trained, block = video_shape(config.data)[0], config.rollout.frames_per_block
    num_frames = config.reproduce.long_factor * trained
    real = yardstick.real(config.evaluation.num_videos, num_frames)
    _plot(pictures, comparison, yardstick, trained)
    sheets = _copy_sheets(pictures, config, comparison)
    folder = f"images/{path.stem}"
    text = "\n\n".join(
        [
            f"# Results: {yardstick.subject}",
            _introduction(config, yardstick),
            "## Quality by frame",
            _frame_table(comparison, yardstick, real, trained, block),
            f"![Quality by frame, the error bars over seeds]({folder}/quality.png)",
            "## What the paper says, and what came out",
            _claims(comparison, yardstick, trained, block),
            "## Rolling on",
            _variant_table(comparison, yardstick, trained),
            f"![Quality by frame with and without window and sink]({folder}/rolling.png)",
            "## Videos",
            f"The last frame of every block of {num_frames} frames, window of training, seed "
            f"{config.reproduce.seeds[0]}.",
            *(f"**{method}**\n\n![Videos of {method}]({folder}/{name})" for method, name in sheets.items()),
            "## How it was made",
            _how(config, comparison, steps),
        ]
    )
    path.write_text(text + "\n", encoding="utf-8")
    (pictures / "runs.json").write_text(json.dumps([vars(run) for run in runs]), encoding="utf-8")
    return path


def _introduction(config: Config, yardstick: Yardstick) -> str:
    settings, frames = config.reproduce, video_shape(config.data)[0]
    own = settings.teacher_steps
    teacher = (
        f"a teacher of its own ({own} steps of {config.teacher.batch_size} videos)" if own else "the shipped teacher"
    )
    return (
        f"Ways to train a causal video model on {yardstick.subject}, compared. Each starts from the same causal model "
        f"({settings.start_steps} steps of teacher forcing from {teacher}) and trains for "
        f"{settings.seconds:g} seconds of {CLOCK_NAMES[settings.clock]} on {config.threads} thread(s), with "
        f"{len(settings.seeds)} seed(s), on videos of {frames} frames. It then generates "
        f"{config.evaluation.num_videos} videos of {settings.long_factor * frames} frames in blocks of "
        f"{config.rollout.frames_per_block}, which are measured without any network of ours (`python_ref.measures`). "
        "Numbers are means over seeds, with the standard deviation. This page is written by `make reproduce`."
    )


def _frame_table(
    comparison: Comparison, yardstick: Yardstick, real: Mapping[str, Sequence[float]], trained: int, block: int
) -> str:
    num_frames = comparison.num_frames(WINDOW, yardstick.quality)
    frames = sorted({1, block, trained, *range(2 * trained, num_frames + 1, trained)})
    rows = [[name, *(f"{values[frame - 1]:.3f}" for frame in frames), "1.00"] for name, values in real.items()]
    for method in comparison.methods:
        quality = comparison.by_frame(method, WINDOW, yardstick.quality)
        sharpness = comparison.by_frame(method, WINDOW, "sharpness").mean(axis=1)
        rows.append(
            [method, *(_with_deviation(quality[:, frame - 1]) for frame in frames), _with_deviation(sharpness, 2)]
        )
    header = ["videos", *(f"frame {frame}" for frame in frames), "sharpness"]
    return f"{yardstick.quality_means}; window of training; training videos have {trained} frames.\n\n" + _table(
        header, rows
    )


def _variant_table(comparison: Comparison, yardstick: Yardstick, trained: int) -> str:
    rows = []
    for method in comparison.methods:
        beyond = [
            comparison.by_frame(method, variant, yardstick.quality)[:, trained:].mean(axis=1) for variant in VARIANTS
        ]
        jumps = comparison.number(method, WINDOW, "jump_ratio")
        rows.append([method, *(_with_deviation(values) for values in beyond), _with_deviation(jumps, 2)])
    return (
        "The same over all frames beyond the length of training, by what a block sees of its past; and "
        f"{yardstick.jump_means}.\n\n" + _table(["videos", *VARIANTS, "borders / inside"], rows)
    )


def _claims(comparison: Comparison, yardstick: Yardstick, trained: int, block: int) -> str:
    """For each method what became of the quality of the first block."""
    rows = []
    for method in comparison.methods:
        quality = comparison.by_frame(method, WINDOW, yardstick.quality)
        first = quality[:, :block].mean(axis=1)
        kept = [
            quality[:, end - block : end].mean(axis=1) / np.maximum(first, 1e-9) for end in (trained, quality.shape[1])
        ]
        rows.append([method, *(_with_deviation(values, 2) for values in kept)])
    return (
        "Self-Forcing (arXiv 2506.08009) says that the quality of models trained on given videos decays along a "
        "rollout, and that it stays if they are trained on their own. The last block as a multiple of the first block, "
        f"by {yardstick.kept_means}:\n\n" + _table(["videos", "within the length of training", "at the end"], rows)
    )


def _how(config: Config, comparison: Comparison, steps: Mapping[str, int]) -> str:
    rows = []
    for method in comparison.methods:
        seconds = [run.seconds for run in comparison.runs if run.method == method]
        took = ", ".join("interrupted" if value is None else f"{value:.0f}" for value in seconds)
        rows.append([method, str(steps[method]), took, f"`{' '.join(config.reproduce.methods[method])}`"])
    starts = read_records(Path(config.output) / "runs")
    commits = sorted({f"`{start['git']['commit']}`" if start["git"] else "unknown" for start in starts})
    versions = sorted({start["environment"]["torch"] for start in starts})
    return (
        f"Trained at commit {', '.join(commits)} with torch {', '.join(versions)}. Steps were chosen before training "
        "from the time that a step takes. The time of what all start from, and of the solutions of the teacher's ODE "
        "that ODE regression learns from, does not count.\n\n"
        + _table(
            ["method", "steps", f"seconds of training ({CLOCK_NAMES[config.reproduce.clock]}), by seed", "settings"],
            rows,
        )
    )


def _plot(pictures: Path, comparison: Comparison, yardstick: Yardstick, trained: int) -> None:
    panels = {
        label: {method: comparison.by_frame(method, WINDOW, name) for method in comparison.methods}
        for name, label in yardstick.panels.items()
    }
    plot_by_frame(pictures / "quality.png", panels, trained)
    panels = {
        method: {variant: comparison.by_frame(method, variant, yardstick.quality) for variant in VARIANTS}
        for method in comparison.methods
    }
    plot_by_frame(pictures / "rolling.png", panels, trained)


def _copy_sheets(pictures: Path, config: Config, comparison: Comparison) -> dict[str, str]:
    """Sheets of the first seed; method to file name."""
    names = {}
    for method in comparison.methods:
        folder = Path(config.output) / "runs" / folder_name(method)
        names[method] = f"{folder.name}.png"
        shutil.copyfile(folder / f"seed_{config.reproduce.seeds[0]}" / f"{WINDOW}.png", pictures / names[method])
    return names


def folder_name(method: str) -> str:
    """Of a method's runs."""
    return method.lower().replace(", ", "_").replace(" ", "_")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _with_deviation(values: np.ndarray, digits: int = 3) -> str:
    """Mean and, of several values, the sample's standard deviation."""
    known = values[~np.isnan(values)]
    if not len(known):
        return "not measured"
    mean = f"{known.mean():.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ± {known.std(ddof=1):.{digits}f}"
