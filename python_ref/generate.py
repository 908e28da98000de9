"""Videos from the command line: `python -m python_ref.generate --checkpoint x.safetensors --prompt "a 3 moving left"`.

Every prompt becomes a GIF and an MP4; a contact sheet shows all frames of all prompts.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from python_ref.config import TeacherConfig
from python_ref.data.prompts import read_prompts
from python_ref.evaluate import load_for_generation
from python_ref.generation import generate_bidirectional, generate_causal
from python_ref.randomness import derived_generator
from python_ref.video_output import write_contact_sheet, write_gif, write_mp4


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m python_ref.generate", description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="weights file written by training")
    parser.add_argument("--prompt", action="append", default=[], help='such as "a 3 moving left"; may be repeated')
    parser.add_argument("--prompts-file", help="text file with one prompt a line")
    parser.add_argument("--num-frames", type=int, help="a multiple of the block; may exceed the training length")
    parser.add_argument("--window-frames", type=int, help="frames that stay visible, the block and the sink included")
    parser.add_argument("--sink-frames", type=int, help="first frames that stay visible for ever")
    parser.add_argument("--denoising-steps", type=int, nargs="+", help="falling timesteps such as 1000 750 500 250")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="outputs/generate")
    parser.add_argument("--fps", type=float, default=8)
    parser.add_argument("--scale", type=int, default=8, help="pixels per pixel")
    parser.add_argument("--backend", default="ext", choices=("ext", "reference"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parsed = parser.parse_args(arguments)
    try:
        for path in generate(parsed):
            print(path)
    except (ValueError, FileNotFoundError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def generate(options: argparse.Namespace) -> list[Path]:
    """Generates and writes; returns the files."""
    torch.set_num_threads(options.threads)
    prompts = read_prompts(options.prompt, options.prompts_file)
    network, rollout = load_for_generation(options.checkpoint, options.backend)
    generator = derived_generator(options.seed, "generate")
    length = network.settings["num_frames"]
    if rollout is None:
        if options.num_frames not in (None, length):
            raise ValueError(
                f"num_frames is {options.num_frames}; accepted for a bidirectional model: {length}, as it was trained"
            )
        teacher = TeacherConfig()
        videos = generate_bidirectional(
            network, prompts, teacher.sample_steps, teacher.guidance_scale, generator, options.precision
        )
    else:
        for name in ("window_frames", "sink_frames", "denoising_steps"):
            if getattr(options, name) is not None:
                setattr(rollout, name, getattr(options, name))
        videos = generate_causal(network, prompts, options.num_frames or length, rollout, generator, options.precision)
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, (prompt, video) in enumerate(zip(prompts, videos, strict=True)):
        name = f"{number:03d}_{re.sub(r'[^a-z0-9]+', '_', prompt.lower()).strip('_')}"
        written += [folder / f"{name}.gif", folder / f"{name}.mp4"]
        write_gif(written[-2], video, options.fps, options.scale)
        write_mp4(written[-1], video, options.fps, options.scale)
    written.append(folder / "contact_sheet.png")
    write_contact_sheet(written[-1], videos, prompts, block=rollout.frames_per_block if rollout else None)
    return written


if __name__ == "__main__":
    sys.exit(main())
