"""Data for ODE regression: `python -m python_ref.make_ode_pairs --checkpoint assets/teacher.safetensors`.

Solves the teacher's ODE from noise to video and keeps its states at the denoising steps and the clean end (CausVid,
arXiv 2412.07772, section 4.3). The same command goes on where it was interrupted; a pair depends on the seed and its
number alone.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from python_ref.checkpoint import save_weights
from python_ref.command_line import add_computing_options, exit_status
from python_ref.config import load_config
from python_ref.data.prompts import read_prompts
from python_ref.data.shards import is_written
from python_ref.data.source import TrainingSource, open_source
from python_ref.metrics import ProgressLine
from python_ref.models.captioned import CaptionedModel
from python_ref.pipelines.bidirectional import solve_bidirectional
from python_ref.precision import network_precision
from python_ref.randomness import derived_generator

Captions = Callable[[int, int], list[str]]  # of the pairs [first, first + count)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m python_ref.make_ode_pairs", description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="weights file of a teacher")
    parser.add_argument("--output", default="outputs/ode_pairs")
    parser.add_argument("--pairs", type=int, default=1024)
    parser.add_argument("--prompt", action="append", default=[], help="caption; may be repeated, pairs take turns")
    parser.add_argument("--prompts-file", help="text file with one caption a line")
    parser.add_argument("--config", help="whose data gives captions where no prompt is given, and their embeddings")
    parser.add_argument("--denoising-steps", type=int, nargs="+", default=[1000, 750, 500, 250])
    parser.add_argument("--sample-steps", type=int, default=48, help="Euler steps of the solution")
    parser.add_argument("--guidance-scale", type=float, default=2.0, help="flow = uncond + scale (cond - uncond)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--shard-size", type=int, default=128, help="pairs per file")
    parser.add_argument("--seed", type=int, default=0)
    add_computing_options(parser)
    parsed = parser.parse_args(arguments)
    return exit_status(
        lambda: print(*make_pairs(parsed), sep="\n"), if_interrupted="the same command goes on with the next shard"
    )


def make_pairs(options: argparse.Namespace) -> list[Path]:
    """Writes the shards that are not there yet; returns all files.

    Raises:
        ValueError: sizes below 1, denoising steps that the solution does not pass or that do not begin at 1000, or
            shards in the folder that were made in another way.
    """
    for name in ("pairs", "sample_steps", "batch_size", "shard_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} is {getattr(options, name)}; accepted: 1 or more")
    torch.set_num_threads(options.threads)
    source = open_source(load_config(options.config).data)
    network = CaptionedModel.load(options.checkpoint, False, options.backend, source.embed).frozen()
    states = states_at(options.denoising_steps, options.sample_steps, network.schedule().num_train_timesteps)
    captions = _captions(options, source)
    recipe = {
        "teacher": network.settings,
        "denoising_steps": options.denoising_steps,
        "sample_steps": options.sample_steps,
        "guidance_scale": options.guidance_scale,
        "seed": options.seed,
        "shard_size": options.shard_size,
        "precision": options.precision,
    }
    paths = []
    progress = ProgressLine("ODE pairs", 0, options.pairs)
    try:
        for number, first in enumerate(range(0, options.pairs, options.shard_size)):
            path = Path(options.output) / f"shard_{number:05d}.safetensors"
            texts = captions(first, min(options.shard_size, options.pairs - first))
            paths.append(path)
            if is_written(path, recipe, texts):
                progress.update(first + len(texts), {})
                continue
            parts = []
            for start in range(0, len(texts), options.batch_size):
                batch = texts[start : start + options.batch_size]
                parts.append(solve(network, batch, first + start, states, options))
                progress.update(first + start + len(batch), {})
            save_weights(path, {"trajectory": torch.cat(parts)}, {"recipe": recipe, "captions": texts})
    finally:
        progress.close()
    return paths


@torch.no_grad()
def solve(
    network: CaptionedModel, captions: Sequence[str], first: int, states: Sequence[int], options: argparse.Namespace
) -> Tensor:
    """float32 [B, T, F, C, H, W]: states number ``states`` of the solutions of the pairs from ``first`` on."""
    shape = network.latent_shape(1)[1:]
    noise = torch.stack(
        [
            torch.randn(shape, generator=derived_generator(options.seed, "ode pair", first + number))
            for number in range(len(captions))
        ]
    )
    with network_precision(options.precision):
        solution = solve_bidirectional(
            network.model,
            network.schedule(options.sample_steps),
            noise,
            *network.contexts(captions),
            options.guidance_scale,
        )
        return torch.stack([state for number, state in enumerate(solution) if number in states], dim=1)


def states_at(denoising_steps: Sequence[int], sample_steps: int, num_train_timesteps: int) -> list[int]:
    """Which states of a solution in ``sample_steps`` steps are those at the denoising steps, and the clean end.

    Uniform timesteps: the shift moves the solution's and the generator's alike.
    """
    falling = all(high > low for high, low in pairwise(denoising_steps))
    on_the_way = all(
        0 < step <= num_train_timesteps and step * sample_steps % num_train_timesteps == 0 for step in denoising_steps
    )
    if not falling or not on_the_way or denoising_steps[0] != num_train_timesteps:
        raise ValueError(
            f"denoising_steps is {list(denoising_steps)}; accepted: falling from {num_train_timesteps}, each a "
            f"multiple of num_train_timesteps / sample_steps = {num_train_timesteps} / {sample_steps}, and above 0"
        )
    return [sample_steps - step * sample_steps // num_train_timesteps for step in denoising_steps] + [sample_steps]


def _captions(options: argparse.Namespace, source: TrainingSource) -> Captions:
    if options.prompt or options.prompts_file:
        prompts = read_prompts(options.prompt, options.prompts_file)
        return lambda first, count: [prompts[number % len(prompts)] for number in range(first, first + count)]
    return source.captions


if __name__ == "__main__":
    sys.exit(main())
