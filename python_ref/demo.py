"""The whole story in one command: `python -m python_ref.demo --config configs/demo.yaml` (what `make demo` runs).

A small pre-trained teacher becomes a causal model by teacher forcing, and that one learns from its own rollouts by
Self-Forcing. Both then generate videos three times as long as those they were trained on, and are measured.

In the output folder: contact sheets and videos of both models, losses.png, drift.png, results.json, and what training
keeps (weights, logs, samples).
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from python_ref.command_line import add_overrides, exit_status
from python_ref.config import Config, load_config
from python_ref.data.prompts import evaluation_prompts
from python_ref.evaluate import generate_set, load_for_generation, write_results
from python_ref.measures.report import Judge, Measures, print_table
from python_ref.metrics import read_metrics
from python_ref.plots import plot_drift, plot_losses
from python_ref.train import train
from python_ref.video_output import grid, write_contact_sheet, write_gif, write_mp4

SHOWN_VIDEOS = 10  # rows of the contact sheets; the first ten prompts show ten digits
ROWS = {"causal": "teacher-forced", "self_forcing": "self-forced"}


def run_demo(config: Config) -> dict[str, Measures]:
    """Trains both stages, generates, measures, writes everything; returns the measures of each row of the table."""
    start = time.monotonic()
    output = Path(config.output)
    seconds: dict[str, float] = {}
    weights = {}
    for stage in ROWS:
        began = time.monotonic()
        weights[stage] = train(replace(config, stage=stage))
        seconds[stage] = time.monotonic() - began

    began = time.monotonic()
    prompts = evaluation_prompts(config.evaluation.num_videos)
    judge = Judge(config.data.moving_digits, config.rollout.frames_per_block)
    real, real_prompts = judge.real_videos(config.evaluation.num_videos, config.evaluation.num_frames)
    results = {"real": judge.measure(real, real_prompts)}
    show(output, "real", real, real_prompts, config)
    teacher, no_rollout = load_for_generation(config.self_forcing.teacher, config.backend)
    videos = generate_set(teacher, no_rollout, prompts, config.evaluation, config.precision)
    results["teacher"] = judge.measure(videos, prompts)
    show(output, "teacher", videos, prompts, config)
    for stage, row in ROWS.items():
        network, _ = load_for_generation(weights[stage], config.backend)
        videos = generate_set(network, config.rollout, prompts, config.evaluation, config.precision)
        results[row] = judge.measure(videos, prompts)
        show(output, row, videos, prompts, config)
    seconds["evaluation"] = time.monotonic() - began

    logs = {stage: read_metrics(output / "logs" / stage / "metrics.jsonl") for stage in ROWS}
    plot_losses(output / "losses.png", logs)
    plot_drift(output / "drift.png", results, config.data.moving_digits.num_frames, config.rollout.frames_per_block)
    seconds["all"] = time.monotonic() - start
    facts = {
        "seed": config.seed,
        "backend": config.backend,
        "precision": config.precision,
        "threads": config.threads,
        "torch": torch.__version__,
        "seconds": seconds,
        "reader_held_out_accuracy": judge.reader.held_out_accuracy,
        "claims": check_claims(results),
    }
    write_results(output / "results.json", results, facts)
    report(output, results, facts)
    return results


def check_claims(results: dict[str, Measures]) -> dict[str, bool]:
    """What Self-Forcing promises, answered by the measures."""
    forced, ours = results["teacher-forced"], results["self-forced"]
    first, last = (ours.summary[f"identity_{which}_block"] for which in ("first", "last"))
    return {
        "self-forced reads better than teacher-forced in every frame": all(
            b > a for a, b in zip(forced.identity, ours.identity, strict=True)
        ),
        "self-forced keeps its identity: last block within 10 % of the first": last >= 0.9 * first,
        "self-forced is smooth across block borders: jump ratio at most 1.25": ours.jump_ratio <= 1.25,
    }


def show(output: Path, name: str, videos: Tensor, prompts: Sequence[str], config: Config) -> None:
    """A contact sheet, a GIF and an MP4 of the first videos."""
    shown, texts = videos[:SHOWN_VIDEOS], prompts[:SHOWN_VIDEOS]
    name = name.replace("-", "_")
    write_contact_sheet(output / f"{name}.png", shown, texts, block=config.rollout.frames_per_block)
    together = grid(shown, columns=5)
    write_gif(output / f"{name}.gif", together)
    write_mp4(output / f"{name}.mp4", together)


def report(output: Path, results: dict[str, Measures], facts: dict) -> None:
    """The table and the answers on the terminal."""
    console = Console(width=150)
    console.print(f"digit reader on held-out scans: {facts['reader_held_out_accuracy']:.3f}")
    print_table(results, f"demo, seed {facts['seed']}")
    for claim, holds in facts["claims"].items():
        console.print(f"[{'green]yes' if holds else 'red]NO '}[/]  {claim}")
    times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in facts["seconds"].items())
    console.print(f"time: {times}")
    files = sorted(path.name for path in output.iterdir() if path.suffix in (".png", ".gif", ".mp4", ".json"))
    console.print(f"in {output}/: {', '.join(files)}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m python_ref.demo", description=__doc__)
    parser.add_argument("--config", default="configs/demo.yaml")
    add_overrides(parser)
    parsed = parser.parse_args(arguments)

    def demo() -> None:
        config = load_config(parsed.config, parsed.overrides)
        if config.data.source != "moving_digits":
            raise ValueError(f"data.source is {config.data.source!r}; accepted by the demo: 'moving_digits'")
        # The second stage starts where the first one ended, wherever the output goes.
        config.self_forcing.init = str(Path(config.output) / "causal.safetensors")
        run_demo(config)

    return exit_status(demo)


if __name__ == "__main__":
    sys.exit(main())
