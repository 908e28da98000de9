"""The report of `python_ref.reproduce`: tables, plots and sheets of several methods with several seeds."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from python_ref.config import Config
from python_ref.measures.report import Judge
from python_ref.plots import plot_by_frame
from python_ref.run_facts import run_facts

ALL, WINDOW, SINK = VARIANTS = "all frames", "window", "window and sink"
CLOCK_NAMES = {"cpu": "CPU time", "wall": "wall-clock time"}
MEASURES = {"identity": "reads as the digit asked for", "sharpness": "sharpness (real = 1)", "ink": "ink (real = 1)"}


@dataclass(frozen=True)
class FinishedRun:
    """One method with one seed."""

    method: str
    seed: int
    seconds: float | None  # of training; None if it was interrupted
    measures: dict[str, dict[str, Any]]  # by variant, as `Measures.to_json` has them


class Comparison:
    """Finished runs by method, in the order in which methods first appear."""

    def __init__(self, runs: Sequence[FinishedRun]) -> None:
        self.runs = runs
        self.methods = list(dict.fromkeys(run.method for run in runs))

    def by_frame(self, method: str, variant: str, measure: str) -> np.ndarray:
        """[seeds, frames]; what could not be measured is NaN."""
        rows = [run.measures[variant][measure] for run in self.runs if run.method == method]
        return np.asarray(rows, dtype=float)

    def number(self, method: str, variant: str, measure: str) -> np.ndarray:
        """[seeds], of a measure of whole videos."""
        return np.asarray([run.measures[variant][measure] for run in self.runs if run.method == method], dtype=float)


def write_report(path: Path, config: Config, runs: Sequence[FinishedRun], steps: Mapping[str, int]) -> Path:
    """Writes the page and its pictures; returns the page's path."""
    pictures = path.parent / "images" / "results"
    pictures.mkdir(parents=True, exist_ok=True)
    comparison = Comparison(runs)
    digits, block = config.data.moving_digits, config.rollout.frames_per_block
    judge = Judge(digits, block)
    real = judge.measure(
        *judge.real_videos(config.evaluation.num_videos, config.reproduce.long_factor * digits.num_frames)
    )
    _plot(pictures, comparison, digits.num_frames)
    sheets = _copy_sheets(pictures, config, comparison)
    text = "\n\n".join(
        [
            "# Results",
            _introduction(config),
            "## Quality by frame",
            _frame_table(comparison, real.identity, digits.num_frames, block),
            "![Quality by frame, the error bars over seeds](images/results/quality.png)",
            "## What the paper says, and what came out",
            _claims(comparison, digits.num_frames, block),
            "## Rolling on",
            _variant_table(comparison, digits.num_frames),
            "![Identity by frame with and without window and sink](images/results/rolling.png)",
            "## Videos",
            f"The last frame of every block of {config.reproduce.long_factor * digits.num_frames} frames, window of "
            f"training, seed {config.reproduce.seeds[0]}.",
            *(f"**{method}**\n\n![Videos of {method}](images/results/{name})" for method, name in sheets.items()),
            "## How it was made",
            _how(config, comparison, steps),
        ]
    )
    path.write_text(text + "\n", encoding="utf-8")
    (pictures / "runs.json").write_text(json.dumps([vars(run) for run in runs]), encoding="utf-8")
    return path


def _introduction(config: Config) -> str:
    settings, frames = config.reproduce, config.data.moving_digits.num_frames
    return (
        "Ways to train a causal video model on moving digits, compared. Each starts from the same causal model "
        f"({settings.start_steps} steps of teacher forcing from the shipped teacher) and trains for "
        f"{settings.seconds:g} seconds of {CLOCK_NAMES[settings.clock]} on {config.threads} thread(s), with "
        f"{len(settings.seeds)} seed(s), on videos of {frames} frames. It then generates "
        f"{config.evaluation.num_videos} videos of {settings.long_factor * frames} frames in blocks of "
        f"{config.rollout.frames_per_block}, which are measured without any network of ours (`python_ref.measures`). "
        "Numbers are means over seeds, with the standard deviation. This page is written by `make reproduce`."
    )


def _frame_table(comparison: Comparison, real: Sequence[float], trained: int, block: int) -> str:
    frames = sorted({1, block, trained, *range(2 * trained, len(real) + 1, trained)})
    rows = [["real videos", *(f"{real[frame - 1]:.3f}" for frame in frames), "1.00"]]
    for method in comparison.methods:
        identity = comparison.by_frame(method, WINDOW, "identity")
        sharpness = comparison.by_frame(method, WINDOW, "sharpness").mean(axis=1)
        rows.append(
            [method, *(_with_deviation(identity[:, frame - 1]) for frame in frames), _with_deviation(sharpness, 2)]
        )
    header = ["videos", *(f"frame {frame}" for frame in frames), "sharpness"]
    return (
        "Share of videos that read as the digit asked for, window of training; training videos have "
        f"{trained} frames.\n\n" + _table(header, rows)
    )


def _variant_table(comparison: Comparison, trained: int) -> str:
    rows = []
    for method in comparison.methods:
        beyond = [comparison.by_frame(method, variant, "identity")[:, trained:].mean(axis=1) for variant in VARIANTS]
        jumps = comparison.number(method, WINDOW, "jump_ratio")
        rows.append([method, *(_with_deviation(values) for values in beyond), _with_deviation(jumps, 2)])
    return (
        "The same share over all frames beyond the length of training, by what a block sees of its past; and how much "
        "more the digit's path bends at the borders of blocks than inside them.\n\n"
        + _table(["videos", *VARIANTS, "bend at borders / inside"], rows)
    )


def _claims(comparison: Comparison, trained: int, block: int) -> str:
    """For each method how much of the quality of the first block the last frames keep."""
    rows = []
    for method in comparison.methods:
        identity = comparison.by_frame(method, WINDOW, "identity")
        first = identity[:, :block].mean(axis=1)
        kept = [
            identity[:, end - block : end].mean(axis=1) / np.maximum(first, 1e-9)
            for end in (trained, identity.shape[1])
        ]
        rows.append([method, *(_with_deviation(values, 2) for values in kept)])
    return (
        "Self-Forcing (arXiv 2506.08009) says that the quality of models trained on given videos decays along a "
        "rollout, and that it stays if they are trained on their own. What the last block keeps of the first block's "
        "share of digits that read right:\n\n" + _table(["videos", "within the length of training", "at the end"], rows)
    )


def _how(config: Config, comparison: Comparison, steps: Mapping[str, int]) -> str:
    rows = []
    for method in comparison.methods:
        seconds = [run.seconds for run in comparison.runs if run.method == method]
        took = ", ".join("interrupted" if value is None else f"{value:.0f}" for value in seconds)
        rows.append([method, str(steps[method]), took, f"`{' '.join(config.reproduce.methods[method])}`"])
    facts = run_facts(config, 0)
    commit = facts["git"]["commit"] if facts["git"] else "unknown"
    return (
        f"Commit `{commit}`, torch {facts['environment']['torch']}. Steps were chosen before training from the time "
        "that a step takes. The solutions of the teacher's ODE, which ODE regression learns from, were made beforehand "
        f"and their time does not count.\n\n"
        + _table(
            ["method", "steps", f"seconds of training ({CLOCK_NAMES[config.reproduce.clock]}), by seed", "settings"],
            rows,
        )
    )


def _plot(pictures: Path, comparison: Comparison, trained: int) -> None:
    panels = {
        label: {method: comparison.by_frame(method, WINDOW, name) for method in comparison.methods}
        for name, label in MEASURES.items()
    }
    plot_by_frame(pictures / "quality.png", panels, trained)
    panels = {
        method: {variant: comparison.by_frame(method, variant, "identity") for variant in VARIANTS}
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
