"""Videos from a converted Wan-style generator: `python -m python_ref.published.generate --checkpoint FILE ...`.

Wan2.1's text encoder reads the prompts and its autoencoder makes pixels of the latents; both come from the folder of a
diffusers pipeline. Each prompt becomes an MP4.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from python_ref.checkpoint import load_weights
from python_ref.command_line import add_computing_options, add_prompts, add_window, exit_status, file_stem
from python_ref.config import RolloutConfig
from python_ref.data.prompts import read_prompts
from python_ref.generation import generate_causal
from python_ref.models.captioned import CaptionedModel
from python_ref.models.umt5 import WanTextEncoder
from python_ref.models.wan_vae import WanVideoAutoencoder
from python_ref.processes import process_device
from python_ref.randomness import derived_generator
from python_ref.video_output import write_mp4


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m python_ref.published.generate", description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="file of python_ref.published.convert --generator")
    parser.add_argument("--model", required=True, help="folder with text_encoder/, tokenizer/ and vae/")
    add_prompts(parser, "a lighthouse in a storm")
    parser.add_argument("--num-frames", type=int, help="latent frames, a multiple of the block; any length")
    add_window(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="outputs/generate")
    parser.add_argument("--fps", type=float, default=16)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    add_computing_options(parser)
    parsed = parser.parse_args(arguments)
    return exit_status(lambda: print(*generate(parsed), sep="\n"))


def generate(options: argparse.Namespace) -> list[Path]:
    """Generates and writes; returns the files."""
    torch.set_num_threads(options.threads)
    prompts = read_prompts(options.prompt, options.prompts_file)
    _, settings = load_weights(options.checkpoint)
    if "rollout" not in settings:
        raise ValueError(f"{options.checkpoint} is no generator; accepted: a file of convert --generator")
    rollout = RolloutConfig(**settings["rollout"])
    for name in ("window_frames", "sink_frames"):
        if getattr(options, name) is not None:
            setattr(rollout, name, getattr(options, name))
    device = process_device(options.device)
    text = WanTextEncoder(options.model, settings["model"]["text_len"], device=device)
    vae = WanVideoAutoencoder(options.model, device)
    network = CaptionedModel.load(
        options.checkpoint, True, options.backend, lambda captions: text.embed(captions).to(device)
    )
    network.frozen().to(device)
    frames = options.num_frames or settings["num_frames"]
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, prompt in enumerate(prompts):  # one at a time: a video of real size fills the memory
        generator = derived_generator(options.seed, "generate", number)
        latents = generate_causal(network, [prompt], frames, rollout, generator, options.precision)
        written.append(folder / f"{file_stem(number, prompt)}.mp4")
        write_mp4(written[-1], vae.decode(latents)[0], options.fps, scale=1)
    return written


if __name__ == "__main__":
    sys.exit(main())
