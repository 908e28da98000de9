"""A published checkpoint as a weights file that training and generation take: `python -m python_ref.published.convert`.

The file also says what the model is: its sizes, its noise schedule, the shape of its videos, and of a generator how it
rolls out. All of that comes from the configuration.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict

from python_ref.command_line import exit_status
from python_ref.config import load_config
from python_ref.data.source import video_shape
from python_ref.models.captioned import CaptionedModel
from python_ref.published.sizes import NAMES, model_config
from python_ref.published.weights import load_published


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m python_ref.published.convert", description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="published file, index of shards, or folder of either")
    parser.add_argument("--part", help="which model of a file of several: generator, generator_ema, critic")
    parser.add_argument("--config", required=True, help="such as configs/wan2.1_1.3b_self_forcing_dmd.yaml")
    parser.add_argument("--model", choices=NAMES, help="sizes other than those of the configuration")
    parser.add_argument("--generator", action="store_true", help="a causal model, to be rolled out as configured")
    parser.add_argument("--output", required=True)
    parsed = parser.parse_args(arguments)

    def run() -> None:
        convert(parsed)
        print(parsed.output)

    return exit_status(run)


def convert(options: argparse.Namespace) -> None:
    """Reads, checks and writes; nothing is written if the checkpoint does not fit."""
    config = load_config(options.config)
    frames, channels, frame_size = video_shape(config.data)
    settings = {
        "model": asdict(model_config(options.model) if options.model else config.model),
        "flow": asdict(config.flow),
        "words": [],
        "num_frames": frames,
        "channels": channels,
        "frame_size": frame_size,
    }
    if options.generator:
        settings["rollout"] = asdict(config.rollout)
    network = CaptionedModel(settings, causal=options.generator, backend="reference")
    load_published(network.model, options.checkpoint, options.part)
    network.save(options.output, source=str(options.checkpoint), part=options.part)


if __name__ == "__main__":
    sys.exit(main())
