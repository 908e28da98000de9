"""Streams of the causal Wan pipeline against the same video made with diffusers' own parts, and without a cache."""

import copy
import itertools
import re
import runpy
import subprocess
import sys
from pathlib import Path

import accelerate as accelerate_library
import numpy as np
import pytest
import torch
from compare import assert_close
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from selfforcing_ext import BlockCausalMask
from selfforcing_ext.integrations.diffusers import accelerate
from selfforcing_ext.integrations.diffusers_pipeline import SelfForcingWanPipeline, StreamingDecoder

ROOT = Path(__file__).parents[1]
PROMPTS = ["a cat runs", "two dogs sleep"]
HEIGHT, WIDTH, TEXT_LENGTH = 32, 48, 8
BLOCK = 2  # frames of latents; the VAE makes 4 frames of each, but one of the first
STEPS = [1000, 600, 200]


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "</s>", "<unk>", *" ".join(PROMPTS).split()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def make_text_encoder() -> UMT5EncoderModel:
    return UMT5EncoderModel(UMT5Config(vocab_size=16, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)).eval()


def make_vae(**config) -> AutoencoderKLWan:
    statistics = {"latents_mean": [0.1, -0.2, 0.0, 0.3], "latents_std": [2.0, 1.5, 3.0, 1.0]}
    sizes = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    return AutoencoderKLWan(**sizes | statistics | config).eval()


def make_transformer() -> WanTransformer3DModel:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "ffn_dim": 64, "freq_dim": 32}
    return WanTransformer3DModel(**sizes, in_channels=4, out_channels=4, text_dim=16, rope_max_seq_len=64).eval()


def make_pipeline(**settings) -> SelfForcingWanPipeline:
    pipeline = SelfForcingWanPipeline(
        make_tokenizer(),
        make_text_encoder(),
        make_vae(),
        FlowMatchEulerDiscreteScheduler(shift=5.0),
        make_transformer(),
        **{"denoising_steps": STEPS, "frames_per_block": BLOCK} | settings,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


CALL = {"height": HEIGHT, "width": WIDTH, "max_sequence_length": TEXT_LENGTH}


def without_cache(pipeline: SelfForcingWanPipeline, num_blocks: int, generator) -> Tensor:
    """Latents of the same video, every step over all frames so far, clean ones and noisy ones, under a mask; steps are
    the scheduler's own."""
    settings = pipeline.config
    host = WanPipeline(**pipeline.components)
    text, _ = host.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, stochastic_sampling=True)
    transformer = copy.deepcopy(pipeline.transformer)
    rows, columns = HEIGHT // 8, WIDTH // 8
    tokens = rows * columns // 4
    clean = torch.zeros(len(PROMPTS), 4, 0, rows, columns)
    for block in range(num_blocks):
        frames = (block + 1) * BLOCK
        accelerate(transformer, BlockCausalMask(frames, tokens, BLOCK, settings.window_frames, settings.sink_frames))
        scheduler.set_timesteps(sigmas=[step / 1000 for step in settings.denoising_steps])
        noisy = torch.randn(len(PROMPTS), 4, BLOCK, rows, columns, generator=generator)
        for timestep in scheduler.timesteps:
            t = torch.full((len(PROMPTS), frames), settings.context_noise)
            t[:, -BLOCK:] = timestep
            flow = transformer(torch.cat((clean, noisy), dim=2), t.repeat_interleave(tokens, dim=1), text).sample
            noisy = scheduler.step(flow[:, :, -BLOCK:], timestep, noisy, generator=generator).prev_sample
        clean = torch.cat((clean, noisy), dim=2)
    return clean


@pytest.mark.parametrize(
    "settings",
    [{}, {"window_frames": 6, "context_noise": 30}, {"window_frames": 5, "sink_frames": 1}],
    ids=["all frames", "window", "window and sink"],
)
@torch.no_grad()
def test_stream_equals_the_video_without_a_cache(settings):
    pipeline = make_pipeline(**settings)
    expected = without_cache(pipeline, 5, seeded())
    latents = pipeline.stream(PROMPTS, num_frames=37, generator=seeded(), output_type="latent", **CALL)
    blocks = list(latents)
    assert [block.shape[2] for block in blocks] == [BLOCK] * 5
    assert_close(torch.cat(blocks, dim=2), expected, 1e-5)

    frames = list(pipeline.stream(PROMPTS, num_frames=37, generator=seeded(), output_type="pt", **CALL))
    assert [block.shape[1] for block in frames] == [5, 8, 8, 8, 8]
    assert_close(torch.cat(frames, dim=1), decode_whole(pipeline.vae, expected), 1e-5)


def decode_whole(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Frames [B, F, 3, H, W] in [0, 1], as WanPipeline makes them of normalised latents."""
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
    return vae.decode(latents * std + mean).sample.transpose(1, 2) / 2 + 0.5


@pytest.mark.parametrize(
    "config",
    [{}, {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12}],
    ids=["Wan2.1", "Wan2.2"],
)
@torch.no_grad()
def test_streaming_decoder_equals_decoding_the_whole(config):
    vae = make_vae(**config)
    latents = torch.randn(2, 4, 6, 4, 6)
    expected = decode_whole(vae, latents)
    decoder, other = StreamingDecoder(vae), StreamingDecoder(vae)
    pieces = []
    for piece in latents.split((1, 3, 2), dim=2):
        pieces.append(decoder(piece))
        other(torch.randn(1, 4, 2, 4, 4))  # a stream of another shape
        vae.decode(torch.randn(1, 4, 2, 4, 4))
    assert [piece.shape[2] for piece in pieces] == [1, 12, 8]
    assert_close(torch.cat(pieces, dim=2).transpose(1, 2) / 2 + 0.5, expected, 1e-6)


def test_call_joins_the_stream_and_repeats_with_its_generator():
    pipeline = make_pipeline()
    call = {"num_frames": 13, **CALL}
    whole = pipeline(PROMPTS, generator=seeded(1), **call).frames
    assert whole.shape == (2, 13, HEIGHT, WIDTH, 3)
    pieces = list(pipeline.stream(PROMPTS, generator=seeded(1), **call))
    assert np.array_equal(np.concatenate(pieces, axis=1), whole)
    assert not np.array_equal(pipeline(PROMPTS, generator=seeded(2), **call).frames, whole)

    (tensors,) = pipeline(PROMPTS, generator=seeded(1), output_type="pt", return_dict=False, **call)
    assert np.array_equal(tensors.permute(0, 1, 3, 4, 2).numpy(), whole)
    images = pipeline(PROMPTS, generator=seeded(1), output_type="pil", **call).frames
    assert [len(video) for video in images] == [13, 13]
    assert isinstance(images[1][12], Image.Image)
    assert np.abs(np.asarray(images[1][12]) / 255 - whole[1, 12]).max() <= 0.5 / 255 + 1e-6
    latents = pipeline(PROMPTS, generator=seeded(1), output_type="latent", **call).frames
    assert latents.shape == (2, 4, 4, HEIGHT // 8, WIDTH // 8)


def test_a_generator_per_video_and_encoded_prompts():
    """A video does not depend on those that are made with it."""
    pipeline = make_pipeline()
    both = pipeline(PROMPTS, num_frames=13, generator=[seeded(1), seeded(2)], output_type="pt", **CALL).frames
    text, _ = pipeline.encode_prompt(PROMPTS[1], None, False, max_sequence_length=TEXT_LENGTH)
    one = pipeline(prompt_embeds=text, num_frames=13, generator=seeded(2), output_type="pt", **CALL).frames
    assert_close(one, both[1:], 1e-5)


def test_streams_without_end_can_be_interleaved():
    pipeline = make_pipeline(window_frames=4)

    def stream(num_frames: int | None, seed: int):
        return pipeline.stream(PROMPTS[seed], num_frames=num_frames, generator=seeded(seed), **CALL)

    endless = stream(None, 0), stream(None, 1)
    pairs = list(itertools.islice(zip(*endless, strict=True), 9))
    for seed, video in enumerate(zip(*pairs, strict=True)):
        expected = list(stream(5 + 8 * 8, seed))
        assert all(np.array_equal(*blocks) for blocks in zip(video, expected, strict=True))


@torch.no_grad()
def test_bfloat16_is_near_float32():
    pipeline = make_pipeline(denoising_steps=[1000])
    call = {"num_frames": 13, "output_type": "latent", **CALL}
    expected = pipeline(PROMPTS, generator=seeded(), **call).frames
    pipeline.to(torch.bfloat16)
    actual = pipeline(PROMPTS, generator=seeded(), **call).frames
    assert actual.dtype == torch.float32
    assert_close(actual, expected, 4 * torch.finfo(torch.bfloat16).eps)
    frames = pipeline(PROMPTS, generator=seeded(), **call | {"output_type": "pt"}).frames
    assert frames.shape == (2, 13, 3, HEIGHT, WIDTH)


def test_saved_pipeline_makes_the_same_video(tmp_path):
    pipeline = make_pipeline(window_frames=4, sink_frames=1, context_noise=10)
    expected = pipeline(PROMPTS, num_frames=21, generator=seeded(), output_type="pt", **CALL).frames
    pipeline.save_pretrained(tmp_path)
    loaded = SelfForcingWanPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    for name in ("denoising_steps", "frames_per_block", "window_frames", "sink_frames", "context_noise"):
        assert loaded.config[name] == pipeline.config[name], name
    assert_close(loaded(PROMPTS, num_frames=21, generator=seeded(), output_type="pt", **CALL).frames, expected, 1e-5)


@torch.no_grad()
def test_encoded_prompts_need_no_text_encoder(tmp_path):
    pipeline = make_pipeline()
    text, _ = pipeline.encode_prompt(PROMPTS, None, False, max_sequence_length=TEXT_LENGTH)
    call = {"num_frames": 5, "output_type": "pt", **CALL}
    expected = pipeline(PROMPTS, generator=seeded(), **call).frames
    pipeline.save_pretrained(tmp_path)
    loaded = SelfForcingWanPipeline.from_pretrained(tmp_path, tokenizer=None, text_encoder=None)
    loaded.set_progress_bar_config(disable=True)
    assert_close(loaded(prompt_embeds=text, generator=seeded(), **call).frames, expected, 1e-5)
    loaded.save_pretrained(tmp_path / "smaller")
    assert SelfForcingWanPipeline.from_pretrained(tmp_path / "smaller").text_encoder is None


@pytest.mark.parametrize("sequential", [False, True])
@torch.no_grad()
def test_offloaded_weights(sequential):
    pipeline = make_pipeline()
    call = {"num_frames": 13, "output_type": "pt", **CALL}
    expected = pipeline(PROMPTS, generator=seeded(), **call).frames
    if sequential:
        for part in (pipeline.transformer, pipeline.vae):
            accelerate_library.cpu_offload(part, torch.device("cpu"))
        assert pipeline.vae.device.type == "meta"
    else:
        pipeline.enable_model_cpu_offload(device="cpu")
    assert_close(pipeline(PROMPTS, generator=seeded(), **call).frames, expected, 1e-5)


def test_pipeline_of_diffusers_as_a_start(tmp_path):
    """Its folder loads, with our settings and a scheduler that fits."""
    components = make_pipeline().components
    host = WanPipeline(**components | {"scheduler": UniPCMultistepScheduler(use_flow_sigmas=True)})
    host.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="scheduler is a UniPCMultistepScheduler, but must be a FlowMatchEuler"):
        SelfForcingWanPipeline.from_pretrained(tmp_path)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    loaded = SelfForcingWanPipeline.from_pretrained(tmp_path, scheduler=scheduler, frames_per_block=1)
    assert loaded.config.frames_per_block == 1
    assert loaded.config.denoising_steps == [1000, 750, 500, 250]
    for name, parameter in loaded.transformer.named_parameters():
        assert torch.equal(parameter, components["transformer"].get_parameter(name)), name


def test_progress_bar_counts_blocks(capsys):
    pipeline = make_pipeline()
    pipeline.set_progress_bar_config(disable=False)
    pipeline(PROMPTS[0], num_frames=21, **CALL)
    assert "3/3" in capsys.readouterr().err


def test_errors_come_with_the_call():
    pipeline = make_pipeline()
    small = CALL | {"height": 24}
    with pytest.raises(ValueError, match="height is 24, but must be a positive multiple of 16"):
        pipeline.stream(PROMPTS, **small)
    with pytest.raises(ValueError, match="exactly one of prompt and prompt_embeds must be given, but neither is"):
        pipeline.stream(**CALL)
    for frames, nearest in ((12, "5 or 13"), (14, "13 or 21"), (-3, "5 or 13"), (1, "5 or 13")):
        with pytest.raises(ValueError, match=f"num_frames is {frames}, but must fill blocks of 2 .*: {nearest}"):
            pipeline.stream(PROMPTS, num_frames=frames, **CALL)
    with pytest.raises(ValueError, match=r"output_type is 'gif', but must be one of \('np', 'pt', 'pil', 'latent'\)"):
        pipeline.stream(PROMPTS, output_type="gif", **CALL)
    with pytest.raises(ValueError, match="generator is a list of 1, but must have one for each of 2 videos"):
        pipeline.stream(PROMPTS, generator=[seeded()], **CALL)
    pipeline.vae.enable_tiling()
    with pytest.raises(ValueError, match="vae decodes in tiles"):
        pipeline.stream(PROMPTS, **CALL)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"denoising_steps": []}, r"denoising_steps is \[\], but must be one or more falling"),
        ({"denoising_steps": [500, 500]}, r"falling timesteps in \(0, 1000\]"),
        ({"denoising_steps": [1001, 500]}, r"falling timesteps in \(0, 1000\]"),
        ({"denoising_steps": [1000, 0]}, r"falling timesteps in \(0, 1000\]"),
        ({"frames_per_block": 0}, "frames_per_block is 0, but must be at least 1"),
        ({"window_frames": 2, "sink_frames": 1}, "window_frames is 2, but must be at least sink_frames"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline(**settings)


def test_transformers_that_need_an_image_are_refused():
    components = make_pipeline().components
    transformer = WanTransformer3DModel(num_layers=1, num_attention_heads=2, attention_head_dim=16, in_channels=36)
    with pytest.raises(ValueError, match="transformer has 36 input and 16 output channels"):
        SelfForcingWanPipeline(**components | {"transformer": transformer})


def test_diffusers_is_needed_by_the_pipeline_alone():
    code = """
import sys
sys.modules["diffusers"] = None  # as if it were not installed
import selfforcing_ext.integrations.diffusers
try:
    import selfforcing_ext.integrations.diffusers_pipeline
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "diffusers_pipeline needs diffusers and transformers" in result.stdout
    assert "pip install diffusers transformers" in result.stdout


def test_example(tmp_path, monkeypatch, capsys):
    example = runpy.run_path(str(ROOT / "examples" / "diffusers_streaming.py"))
    example["tiny_pipeline"]().save_pretrained(tmp_path / "model")
    for model in ([], ["--model", str(tmp_path / "model")]):
        output = tmp_path / "video.gif"
        monkeypatch.setattr("sys.argv", ["example", *model, "--num-frames", "21", "--output", str(output)])
        example["main"]()
        printed = capsys.readouterr().out.splitlines()
        assert [re.sub(r"[\d.]+ s$", "", line) for line in printed] == [
            "  9 frames of 64 x 96 pixels in ",
            " 12 frames of 64 x 96 pixels in ",
            "21 frames in all",
        ]
        with Image.open(output) as image:
            assert (image.n_frames, image.size) == (21, (96, 64))
