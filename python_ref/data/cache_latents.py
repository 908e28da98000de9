"""Runs Wan2.1's encoders over captions and videos once: `python -m python_ref.data.cache_latents --model FOLDER ...`.

The folder is that of a pipeline of diffusers (text_encoder/, tokenizer/ and, for videos, vae/). Each video file gets a
shard of its clips, or each few captions a shard. A shard is written whole or not at all, and the same command goes on
where it was interrupted. `data.source=latents data.latents.folder=...` trains on the result.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from python_ref.checkpoint import save_weights
from python_ref.command_line import exit_status
from python_ref.data.latents import UNCOND_FILE
from python_ref.data.prompts import read_prompts
from python_ref.data.shards import is_written, read_settings
from python_ref.data.video_files import find_videos, read_captions, read_video
from python_ref.metrics import ProgressLine
from python_ref.models.umt5 import WanTextEncoder
from python_ref.models.wan_vae import WanVideoAutoencoder
from python_ref.processes import process_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m python_ref.data.cache_latents", description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a diffusers pipeline such as Wan2.1's")
    parser.add_argument("--output", required=True)
    parser.add_argument("--videos", help="folder of video files with captions, as for data.video_files")
    parser.add_argument("--prompt", action="append", default=[], help="caption without a video; may be repeated")
    parser.add_argument("--prompts-file", help="text file with one caption a line")
    parser.add_argument("--negative-prompt", default="", help="what stands for no caption")
    parser.add_argument("--text-len", type=int, default=512, help="tokens of a context")
    parser.add_argument(
        "--num-frames", type=int, default=81, help="frames of a clip; Wan2.1 makes latents of 1, 5, 9, ..."
    )
    parser.add_argument("--rows", type=int, default=480, help="pixels")
    parser.add_argument("--columns", type=int, default=832, help="pixels")
    parser.add_argument("--fps", type=float, help="frames per second of the clips; left out: those of each file")
    parser.add_argument("--shard-size", type=int, default=64, help="captions per file, without videos")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of what is kept")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the encoders run")
    parser.add_argument("--threads", type=int, default=2)
    parsed = parser.parse_args(arguments)
    return exit_status(
        lambda: print(f"{cache(parsed)} captions in {parsed.output}"),
        if_interrupted="the same command goes on with the next shard",
    )


def cache(options: argparse.Namespace) -> int:
    """Writes the shards that are not there yet; returns how many captions the folder now has.

    Raises:
        ValueError: neither or both of videos and captions, sizes that the autoencoder does not take, or a shard in the
            folder that was made in another way.
    """
    texts_given = bool(options.prompt or options.prompts_file)
    if texts_given == bool(options.videos):
        raise ValueError("accepted: either --videos, or --prompt and --prompts-file")
    if options.shard_size < 1 or options.text_len < 1:
        raise ValueError(
            f"shard_size is {options.shard_size} and text_len {options.text_len}; accepted: 1 or more of each"
        )
    torch.set_num_threads(options.threads)
    video_options = ("num_frames", "rows", "columns", "fps")
    recipe: dict[str, Any] = {name: getattr(options, name) for name in ("text_len", "negative_prompt", "dtype")}
    recipe["video"] = {name: getattr(options, name) for name in video_options} if options.videos else None
    encoders = _Encoders(options, recipe)
    folder = Path(options.output)
    if not is_written(folder / UNCOND_FILE, recipe, [""]):
        encoders.write(folder / UNCOND_FILE, [""])
    shards = list(_video_shards(options) if options.videos else _caption_shards(options))
    progress = ProgressLine("caching", 0, len(shards))
    count = 0
    try:
        for number, (name, captions, video) in enumerate(shards):
            path = folder / f"shard_{name}.safetensors"
            if video is not None:
                count += encoders.write_clips(path, captions[0], video)
            else:
                count += len(captions)
                if not is_written(path, recipe, captions):
                    encoders.write(path, captions)
            progress.update(number + 1, {})
    finally:
        progress.close()
    return count


Shard = tuple[str, list[str], Path | None]  # name, captions, and the video that they belong to


def _video_shards(options: argparse.Namespace) -> Iterator[Shard]:
    folder = Path(options.videos)
    paths = find_videos(folder)
    captions = read_captions(folder, paths)
    for path in paths:
        yield path.name, [captions[path]], path


def _caption_shards(options: argparse.Namespace) -> Iterator[Shard]:
    prompts = list(dict.fromkeys(read_prompts(options.prompt, options.prompts_file)))
    for first in range(0, len(prompts), options.shard_size):
        yield f"{first // options.shard_size:06d}", prompts[first : first + options.shard_size], None


class _Encoders:
    """The encoders, loaded when there is something to encode, and the writing of shards."""

    def __init__(self, options: argparse.Namespace, recipe: dict[str, Any]) -> None:
        self.options, self.recipe = options, recipe
        self.dtype = DTYPES[options.dtype]
        self._text: WanTextEncoder | None = None
        self._vae: WanVideoAutoencoder | None = None

    @property
    def text(self) -> WanTextEncoder:
        if self._text is None:
            options = self.options
            self._text = WanTextEncoder(
                options.model, options.text_len, options.negative_prompt, device=process_device(options.device)
            )
        return self._text

    @property
    def vae(self) -> WanVideoAutoencoder:
        if self._vae is None:
            self._vae = WanVideoAutoencoder(self.options.model, process_device(self.options.device))
        return self._vae

    def write(self, path: Path, captions: list[str], latents: Tensor | None = None) -> None:
        different = list(dict.fromkeys(captions))
        embedded = dict(zip(different, self.text.tokens(different), strict=True))
        texts = [embedded[caption] for caption in captions]
        tensors = {"texts": torch.cat(texts).to(self.dtype)}
        if latents is not None:
            tensors["latents"] = latents.to(self.dtype)
        lengths = [len(tokens) for tokens in texts]
        save_weights(path, tensors, {"recipe": self.recipe, "captions": captions, "text_lengths": lengths})

    def write_clips(self, path: Path, caption: str, video: Path) -> int:
        """Writes the clips of a video file if they are not there; returns how many there are."""
        if is_written(path, self.recipe, [caption]):
            return len(read_settings(path)["captions"])
        options = self.options
        self.vae.latent_shape(options.num_frames, options.rows, options.columns)
        frames = read_video(video, (options.rows, options.columns), 3, options.fps)
        clips = frames.split(options.num_frames)
        whole = [clip for clip in clips if len(clip) == options.num_frames]
        if not whole:
            raise ValueError(
                f"{video} has {len(frames)} frames at {options.fps or 'its own'} fps; accepted: at least num_frames = "
                f"{options.num_frames}"
            )
        latents = torch.cat([self.vae.encode(clip[None].float() / 127.5 - 1) for clip in whole])
        self.write(path, [caption] * len(whole), latents)
        return len(whole)


if __name__ == "__main__":
    sys.exit(main())
