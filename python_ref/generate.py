"""Videos from the command line: `python -m python_ref.generate --checkpoint x.safetensors --prompt "a 3 moving left"`.

Every prompt becomes a GIF and an MP4; a contact sheet shows all frames of all prompts.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from python_ref.command_line import add_computing_options, add_prompts, add_window, exit_status, file_stem
from python_ref.config import TeacherConfig
from python_ref.data.prompts import read_prompts
from python_ref.data.video_files import read_video
from python_ref.evaluate import load_for_generation
from python_ref.generation import generate_bidirectional, generate_causal
from python_ref.models.captioned import CaptionedModel, rows_and_columns
from python_ref.randomness import derived_generator
from python_ref.video_output import write_contact_sheet, write_gif, write_mp4


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m python_ref.generate", description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="weights file written by training")
    add_prompts(parser, "a 3 moving left")
    parser.add_argument("--num-frames", type=int, help="a multiple of the block; may exceed the training length")
    add_window(parser)
    parser.add_argument("--denoising-steps", type=int, nargs="+", help="falling timesteps such as 1000 750 500 250")
    parser.add_argument("--continue-video", help="a video or an image whose first frames every video goes on from")
    parser.add_argument("--given-frames", type=int, default=1, help="how many of them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="outputs/generate")
    parser.add_argument("--fps", type=float, default=8)
    parser.add_argument("--scale", type=int, default=8, help="pixels per pixel")
    add_computing_options(parser)
    parsed = parser.parse_args(arguments)
    return exit_status(lambda: print(*generate(parsed), sep="\n"))


def generate(options: argparse.Namespace) -> list[Path]:
    """Generates and writes; returns the files."""
    torch.set_num_threads(options.threads)
    prompts = read_prompts(options.prompt, options.prompts_file)
    network, rollout = load_for_generation(options.checkpoint, options.backend)
    generator = derived_generator(options.seed, "generate")
    length = network.settings["num_frames"]
    initial = given_frames(options, network, len(prompts))
    if rollout is None:
        if initial is not None:
            raise ValueError(
                "continue_video is given; accepted for a bidirectional model: none, as it makes whole videos"
            )
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
        frames = options.num_frames or rollout.frames_within(length, 0 if initial is None else initial.shape[1])
        videos = generate_causal(network, prompts, frames, rollout, generator, options.precision, initial)
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, (prompt, video) in enumerate(zip(prompts, videos, strict=True)):
        name = file_stem(number, prompt)
        written += [folder / f"{name}.gif", folder / f"{name}.mp4"]
        write_gif(written[-2], video, options.fps, options.scale)
        write_mp4(written[-1], video, options.fps, options.scale)
    written.append(folder / "contact_sheet.png")
    write_contact_sheet(written[-1], videos, prompts, block=rollout.frames_per_block if rollout else None)
    return written


def given_frames(options: argparse.Namespace, network: CaptionedModel, count: int) -> Tensor | None:
    """The frames that `count` videos go on from, [count, F, C, H, W] in -1..1, if any."""
    if options.continue_video is None:
        return None
    settings = network.settings
    frames = read_video(Path(options.continue_video), rows_and_columns(settings["frame_size"]), settings["channels"])
    if not 1 <= options.given_frames <= len(frames):
        raise ValueError(
            f"given_frames is {options.given_frames}; accepted: 1 to {len(frames)}, as {options.continue_video} holds"
        )
    return (frames[: options.given_frames] / 127.5 - 1).expand(count, -1, -1, -1, -1)


if __name__ == "__main__":
    sys.exit(main())
