"""Evaluation from the command line: `python -m python_ref.evaluate --checkpoint outputs/demo/self_forcing.safetensors`.

Videos of fixed prompts are measured without any network of ours: see `python_ref.measures`.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from python_ref.command_line import add_computing_options, add_window, exit_status
from python_ref.config import EvaluationConfig, RolloutConfig, TeacherConfig
from python_ref.data.moving_digits import MovingDigitsConfig
from python_ref.data.prompts import evaluation_prompts
from python_ref.generation import generate_bidirectional, generate_causal
from python_ref.measures.report import Judge, Measures, print_table
from python_ref.models.captioned import CaptionedModel, rows_and_columns
from python_ref.plots import plot_drift
from python_ref.randomness import derived_generator


def load_for_generation(path: str | Path, backend: str) -> tuple[CaptionedModel, RolloutConfig | None]:
    """A model ready to generate, and how it rolls out; None for a bidirectional teacher."""
    probe = CaptionedModel.load(path, causal=False, backend=backend)
    if "rollout" not in probe.settings:
        return probe.frozen(), None
    return CaptionedModel.load(path, causal=True, backend=backend).frozen(), RolloutConfig(**probe.settings["rollout"])


def generate_set(
    network: CaptionedModel,
    rollout: RolloutConfig | None,
    prompts: Sequence[str],
    settings: EvaluationConfig,
    precision: str,
) -> Tensor:
    """Videos of all prompts [N, F, C, H, W], in batches; a video depends on the seed and its batch alone."""
    videos = []
    for first in range(0, len(prompts), settings.batch_size):
        part = prompts[first : first + settings.batch_size]
        generator = derived_generator(settings.seed, "evaluation", first)
        if rollout is None:
            teacher = TeacherConfig()
            videos.append(
                generate_bidirectional(
                    network, part, teacher.sample_steps, teacher.guidance_scale, generator, precision
                )
            )
        else:
            videos.append(generate_causal(network, part, settings.num_frames, rollout, generator, precision))
    return torch.cat(videos)


def write_results(path: str | Path, results: Mapping[str, Measures], facts: Mapping[str, Any]) -> None:
    """results.json: facts of the run, the reader's own accuracy, and the measures of every set."""
    document = {**facts, "results": {name: measures.to_json() for name, measures in results.items()}}
    Path(path).write_text(json.dumps(document, indent=1), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    defaults = {f.name: f.default for f in fields(EvaluationConfig)}
    parser = argparse.ArgumentParser(prog="python -m python_ref.evaluate", description=__doc__)
    parser.add_argument("--checkpoint", nargs="+", required=True, help="weights files written by training")
    parser.add_argument("--num-videos", type=int, default=defaults["num_videos"])
    parser.add_argument("--num-frames", type=int, default=defaults["num_frames"])
    parser.add_argument("--batch-size", type=int, default=defaults["batch_size"])
    parser.add_argument("--seed", type=int, default=defaults["seed"])
    add_window(parser)
    parser.add_argument("--digit-size", type=int, default=MovingDigitsConfig.digit_size, help="pixels, of the data")
    parser.add_argument("--output", default="outputs/evaluation")
    add_computing_options(parser)
    parsed = parser.parse_args(arguments)
    return exit_status(lambda: evaluate(parsed))


def evaluate(options: argparse.Namespace) -> None:
    """Generates, measures and writes results.json, drift.png and the table."""
    torch.set_num_threads(options.threads)
    settings = EvaluationConfig(options.num_videos, options.num_frames, options.batch_size, options.seed)
    prompts = evaluation_prompts(settings.num_videos)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    networks = {}
    for path in options.checkpoint:
        network, rollout = load_for_generation(path, options.backend)
        if rollout is not None:
            rollout.window_frames = rollout.window_frames if options.window_frames is None else options.window_frames
            rollout.sink_frames = rollout.sink_frames if options.sink_frames is None else options.sink_frames
        networks[str(path)] = network, rollout
    first, first_rollout = next(iter(networks.values()))
    digits = MovingDigitsConfig(
        frame_size=rows_and_columns(first.settings["frame_size"])[0],
        digit_size=options.digit_size,
        num_frames=first.settings["num_frames"],
    )
    block = (first_rollout or RolloutConfig()).frames_per_block
    judge = Judge(digits, block)
    results = {"real": judge.measure(*judge.real_videos(settings.num_videos, settings.num_frames))}
    for name, (network, rollout) in networks.items():
        results[name] = judge.measure(generate_set(network, rollout, prompts, settings, options.precision), prompts)
    facts = {"options": vars(options), "reader_held_out_accuracy": judge.reader.held_out_accuracy}
    write_results(output / "results.json", results, facts)
    plot_drift(output / "drift.png", results, first.settings["num_frames"], block)
    print(f"digit reader on held-out scans: {judge.reader.held_out_accuracy:.3f}")
    print_table(results, f"{settings.num_videos} videos each")
    print(f"written: {output / 'results.json'}, {output / 'drift.png'}")


if __name__ == "__main__":
    sys.exit(main())
