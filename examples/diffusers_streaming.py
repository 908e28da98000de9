"""Streams a video of any length from the parts of a diffusers Wan pipeline, block by block.

    python examples/diffusers_streaming.py [--model FOLDER] [--prompt TEXT] [--num-frames N] [--output video.gif]

FOLDER is a text-to-video Wan pipeline of diffusers whose transformer was trained block-causally. Without one, tiny
parts with random weights are made here: they show how it works, on a CPU in seconds, but their video is noise.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

sys.path.insert(0, str(Path(__file__).parents[1]))

from selfforcing_ext.integrations.diffusers_pipeline import SelfForcingWanPipeline


def tiny_pipeline() -> SelfForcingWanPipeline:
    """Every part as in Wan2.1, but small and with random weights; a tokenizer that knows three words."""
    torch.manual_seed(0)
    words = {word: index for index, word in enumerate(("<pad>", "</s>", "<unk>", "a", "cat", "runs"))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    channels = 8
    return SelfForcingWanPipeline(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ),
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=len(words), d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
        ),
        vae=AutoencoderKLWan(
            base_dim=8, z_dim=channels, num_res_blocks=1, latents_mean=[0.0] * channels, latents_std=[1.0] * channels
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=WanTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=32,
            num_layers=4,
            ffn_dim=512,
            in_channels=channels,
            out_channels=channels,
            text_dim=32,
        ),
        frames_per_block=3,
        window_frames=9,
        sink_frames=3,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or name of a pipeline")
    parser.add_argument("--prompt", default="a cat runs")
    parser.add_argument("--num-frames", type=int, default=69)
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), default=(64, 96))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="an animated image, .gif or .webp")
    arguments = parser.parse_args()

    if arguments.model is None:
        pipeline = tiny_pipeline()
    else:
        pipeline = SelfForcingWanPipeline.from_pretrained(
            arguments.model, scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0), dtype=torch.bfloat16
        )
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")

    height, width = arguments.size
    blocks, start = [], time.perf_counter()
    for block in pipeline.stream(
        arguments.prompt,
        height=height,
        width=width,
        num_frames=arguments.num_frames,
        generator=torch.Generator().manual_seed(arguments.seed),
    ):
        seconds, start = time.perf_counter() - start, time.perf_counter()
        print(f"{block.shape[1]:3d} frames of {block.shape[2]} x {block.shape[3]} pixels in {seconds:.2f} s")
        blocks.append(block)

    video = np.concatenate(blocks, axis=1)[0]  # [frames, height, width, 3] in [0, 1]
    print(f"{len(video)} frames in all")
    if arguments.output:
        images = [Image.fromarray(frame) for frame in (video * 255).round().astype(np.uint8)]
        images[0].save(arguments.output, save_all=True, append_images=images[1:], duration=1000 // 16, loop=0)


if __name__ == "__main__":
    main()
