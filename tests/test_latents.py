"""Wan2.1's encoders in miniature, what they are run over once, and training from there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file
from small_wan import CHANNELS, TEXT_DIM, write_pipeline
from transformers import AutoTokenizer, UMT5EncoderModel
from video_writing import write_video

from python_ref.checkpoint import load_weights
from python_ref.config import load_config, to_yaml
from python_ref.data.cache_latents import main as cache
from python_ref.data.latents import CachedLatents, LatentsConfig
from python_ref.data.ode_pairs import OdePairs
from python_ref.data.video_files import VideoFiles, VideoFilesConfig
from python_ref.make_ode_pairs import main as make_ode_pairs
from python_ref.metrics import read_metrics
from python_ref.models.captioned import CaptionedModel, GivenTexts
from python_ref.models.umt5 import WanTextEncoder
from python_ref.models.wan_vae import WanVideoAutoencoder
from python_ref.train import main as train

ROOT = Path(__file__).parents[1]
CAPTIONS = ["a cat runs", "two dogs sleep & dream", "a cat sleeps"]
NEGATIVE = "two cat"
TEXT_LEN = 6
SIZES = ["--num-frames", "9", "--rows", "16", "--columns", "24", "--text-len", str(TEXT_LEN), "--threads", "1"]
CONFIG = {"num_frames": 3, "channels": CHANNELS, "frame_size": [2, 3]}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("wan"), " ".join(CAPTIONS).split())


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "one.mp4", 20, size=(32, 48))
    write_video(folder / "two.mp4", 9, size=(32, 48), level=90)
    (folder / "captions.json").write_text(json.dumps({"one.mp4": CAPTIONS[0], "two.mp4": CAPTIONS[1]}))
    return folder


def run(pipeline: Path, output: Path, *options: str) -> int:
    arguments = ["--model", str(pipeline), "--output", str(output), "--negative-prompt", NEGATIVE]
    return cache([*arguments, *SIZES, *options])


@pytest.fixture(scope="module")
def cached(pipeline, videos, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cached")
    assert run(pipeline, folder, "--videos", str(videos)) == 0
    return folder


def test_text_encoder(pipeline):
    """Each caption alone through transformers' encoder gives the same tokens; the rest is zero."""
    text = WanTextEncoder(pipeline, TEXT_LEN, NEGATIVE)
    context = text.embed(["a  cat\nruns", "two dogs sleep &amp; dream", ""])
    assert context.shape == (3, TEXT_LEN, TEXT_DIM)
    encoder = UMT5EncoderModel.from_pretrained(pipeline / "text_encoder").eval()
    tokenizer = AutoTokenizer.from_pretrained(pipeline / "tokenizer")
    for row, caption in zip(context, [*CAPTIONS[:2], NEGATIVE], strict=True):
        ids = tokenizer([caption], return_tensors="pt").input_ids
        with torch.no_grad():
            expected = encoder(ids).last_hidden_state[0]
        torch.testing.assert_close(row[: len(expected)], expected)
        assert not row[len(expected) :].any()
    assert len(WanTextEncoder(pipeline, 3).tokens(["a cat runs"])[0]) == 3  # cut
    with pytest.raises(FileNotFoundError, match="no folder text_encoder"):
        WanTextEncoder(pipeline / "vae")


def test_autoencoder(pipeline):
    """As diffusers' pipelines normalise: latents minus mean over deviation."""
    vae = WanVideoAutoencoder(pipeline)
    torch.manual_seed(1)
    video = torch.rand(2, 5, 3, 16, 24) * 2 - 1
    latents = vae.encode(video)
    assert latents.shape == (2, *vae.latent_shape(5, 16, 24)) == (2, 2, CHANNELS, 2, 3)
    theirs = AutoencoderKLWan.from_pretrained(pipeline / "vae").eval()
    with torch.no_grad():
        raw = theirs.encode(video.transpose(1, 2)).latent_dist.mode()
        decoded = theirs.decode(raw).sample
    mean, std = (
        torch.tensor(values).view(-1, 1, 1, 1) for values in (theirs.config.latents_mean, theirs.config.latents_std)
    )
    torch.testing.assert_close(latents, ((raw - mean) / std).transpose(1, 2))
    torch.testing.assert_close(vae.decode(latents), decoded.clamp(-1, 1).transpose(1, 2), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="6 frames of 16 x 24"):
        vae.encode(torch.zeros(1, 6, 3, 16, 24))
    with pytest.raises(FileNotFoundError, match="no autoencoder"):
        WanVideoAutoencoder(pipeline / "tokenizer")


def test_cached_videos(cached, pipeline, videos):
    latents = CachedLatents(LatentsConfig(str(cached), **CONFIG))
    assert latents.captions_of_all == [CAPTIONS[0], CAPTIONS[0], CAPTIONS[1]]  # 20 frames are two clips, 9 are one
    video, captions = latents.batch(0, 6)
    assert video.shape == (6, 3, CHANNELS, 2, 3)
    assert video.dtype == torch.float32
    assert captions == latents.captions(0, 6)
    assert sorted(captions[:3]) == sorted(captions[3:]) == sorted(latents.captions_of_all)
    again = latents.batch(2, 2)
    assert torch.equal(again[0], video[2:4])
    files = VideoFiles(VideoFilesConfig(str(videos), num_frames=9, frame_size=16, frame_columns=24))
    expected = WanVideoAutoencoder(pipeline).encode(files.batch(0, 1)[0])
    assert min((expected - one).norm() / expected.norm() for one in video[:3]) < 1e-5
    text = WanTextEncoder(pipeline, TEXT_LEN, NEGATIVE)
    torch.testing.assert_close(latents.embed([*CAPTIONS[:2], ""]), text.embed([*CAPTIONS[:2], ""]))
    with pytest.raises(ValueError, match="'a bird' is not embedded"):
        latents.embed(["a bird"])


def test_caching_goes_on_where_it_stopped(cached, pipeline, videos, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(cached, folder)
    kept, lost = folder / "shard_one.mp4.safetensors", folder / "shard_two.mp4.safetensors"
    whole, before = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    assert run(pipeline, folder, "--videos", str(videos)) == 0
    assert "3 captions" in capsys.readouterr().out
    assert lost.read_bytes() == whole
    assert kept.stat().st_mtime_ns == before
    assert not list(folder.glob(".writing*"))
    assert run(pipeline, folder, "--videos", str(videos), "--dtype", "bfloat16") == 2
    assert "made with another dtype" in capsys.readouterr().err


def test_captions_alone(pipeline, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(CAPTIONS))
    options = ["--prompts-file", str(prompts), "--shard-size", "2", "--dtype", "bfloat16"]
    assert run(pipeline, tmp_path / "texts", *options) == 0
    shards = sorted(path.name for path in (tmp_path / "texts").iterdir())
    assert shards == ["shard_000000.safetensors", "shard_000001.safetensors", "uncond.safetensors"]
    assert load_file(tmp_path / "texts" / shards[0])["texts"].dtype == torch.bfloat16
    latents = CachedLatents(LatentsConfig(str(tmp_path / "texts")))
    assert sorted(latents.captions(0, 3)) == sorted(CAPTIONS)
    wanted = WanTextEncoder(pipeline, TEXT_LEN).embed(CAPTIONS)
    torch.testing.assert_close(latents.embed(CAPTIONS), wanted, rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match="captions without videos"):
        latents.batch(0, 1)
    assert run(pipeline, tmp_path / "both", *options, "--videos", str(tmp_path)) == 2
    assert run(pipeline, tmp_path / "none") == 2
    assert capsys.readouterr().err.count("accepted: either --videos, or --prompt") == 2


def test_folders_that_do_not_fit(cached, tmp_path):
    with pytest.raises(FileNotFoundError, match="lacks shards"):
        CachedLatents(LatentsConfig(str(tmp_path)))
    with pytest.raises(ValueError, match=r"\[3, 4, 2, 3\].*\[3, 4, 2, 5\]"):
        CachedLatents(LatentsConfig(str(cached), **CONFIG | {"frame_size": [2, 5]}))
    with pytest.raises(ValueError, match="accepted: \\[rows, columns\\]"):
        LatentsConfig(frame_size=[4])


def test_given_texts_are_shared_and_not_saved():
    settings = {"model": {"position_embedding": False}, "flow": {}, "words": [], "num_frames": 3, "channels": 4}
    model = CaptionedModel(
        settings | {"frame_size": [12, 18]}, True, "reference", lambda captions: torch.ones(len(captions), 16, 64)
    )
    assert model.average_copy().text is model.text
    assert model.latent_shape(2) == (2, 3, 4, 12, 18)
    assert not [name for name in model.state_dict() if name.startswith("text")]
    assert model.contexts(["a", "b"])[1].shape == (2, 16, 64)
    with pytest.raises(ValueError, match="without a text encoder"):
        GivenTexts(None)(["a"])
    with pytest.raises(ValueError, match="a text encoder of their own"):
        CaptionedModel(settings | {"words": ["a"], "frame_size": 12}, True, "reference", len)


TINY = [
    "threads=1", "precision=fp32", "backend=reference", "data.source=latents", f"data.latents.channels={CHANNELS}",
    "data.latents.num_frames=3", "data.latents.frame_size=[2,3]", "model.position_embedding=false",
    "model.patch_size=[1,1,1]", "model.dim=16", "model.num_heads=2", "model.num_layers=1", "model.ffn_dim=32",
    f"model.text_len={TEXT_LEN}", f"model.text_dim={TEXT_DIM}", "rollout.frames_per_block=1",
    "rollout.denoising_steps=[1000,500]", "teacher.batch_size=2", "teacher.sample_steps=2", "causal.batch_size=2",
    "self_forcing.batch_size=2", "logging.tensorboard=false", "logging.log_every=1", "logging.sample_prompts=2",
]  # fmt: skip


def test_every_stage_trains_on_latents(cached, pipeline, tmp_path):
    (tmp_path / "c.yaml").write_text("stage: teacher\n")
    where = [
        f"output={tmp_path}", f"data.latents.folder={cached}", f"causal.init={tmp_path}/teacher.safetensors",
        f"self_forcing.init={tmp_path}/causal.safetensors", f"self_forcing.teacher={tmp_path}/teacher.safetensors",
    ]  # fmt: skip
    for stage in ("teacher", "causal", "self_forcing"):
        shown = [f"data.latents.vae={pipeline}"] if stage == "causal" else []
        options = [*TINY, *where, *shown, f"stage={stage}", f"{stage}.steps=2"]
        assert train(["--config", str(tmp_path / "c.yaml"), *options]) == 0
        assert (tmp_path / "samples" / f"{stage}_000002.gif").stat().st_size > 100
        tensors, settings = load_weights(tmp_path / f"{stage}.safetensors")
        assert settings["frame_size"] == [2, 3]
        assert all(name.startswith("model.") for name in tensors)
        assert len(read_metrics(tmp_path / "logs" / stage / "metrics.jsonl")) == 2

    (tmp_path / "latents.yaml").write_text(to_yaml(load_config(None, [*TINY, *where])))
    pairs = ["--checkpoint", str(tmp_path / "teacher.safetensors"), "--config", str(tmp_path / "latents.yaml")]
    sizes = ["--pairs", "2", "--denoising-steps", "1000", "500", "--sample-steps", "2", "--threads", "1"]
    assert make_ode_pairs([*pairs, *sizes, "--output", str(tmp_path / "pairs"), "--backend", "reference"]) == 0
    trajectory, caption = OdePairs(tmp_path / "pairs")[0]
    assert trajectory.shape == (3, 3, CHANNELS, 2, 3)
    assert caption in CAPTIONS
    options = [*TINY, *where, "stage=ode", f"ode.pairs={tmp_path}/pairs", f"ode.init={tmp_path}/teacher.safetensors"]
    assert train(["--config", str(tmp_path / "c.yaml"), *options, "ode.steps=1", "ode.batch_size=2"]) == 0


def test_rollouts_need_captions_alone(cached, pipeline, tmp_path, capsys):
    """Self-forcing trains without videos, in two processes as in one; a stage that needs them says so."""
    texts = tmp_path / "texts"
    assert run(pipeline, texts, *(f"--prompt={caption}" for caption in CAPTIONS)) == 0
    (tmp_path / "c.yaml").write_text("stage: teacher\n")
    where = [
        f"output={tmp_path}", f"self_forcing.init={tmp_path}/teacher.safetensors",
        f"self_forcing.teacher={tmp_path}/teacher.safetensors",
    ]  # fmt: skip
    for stage, folder, code in (("teacher", cached, 0), ("self_forcing", texts, 0), ("teacher", texts, 2)):
        options = [*TINY, *where, f"data.latents.folder={folder}", f"stage={stage}", f"{stage}.steps=1"]
        assert train(["--config", str(tmp_path / "c.yaml"), *options]) == code
    assert "captions without videos" in capsys.readouterr().err

    alone = read_metrics(tmp_path / "logs" / "self_forcing" / "metrics.jsonl")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "python_ref.train"]
    options = [*TINY, *where, f"data.latents.folder={texts}", "stage=self_forcing", "self_forcing.steps=1"]
    sharded = [*launch, "--config", str(tmp_path / "c.yaml"), *options, "distributed.strategy=fsdp"]
    subprocess.run(sharded, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    together = read_metrics(tmp_path / "logs" / "self_forcing" / "metrics.jsonl")
    assert together[0]["critic_loss"] == pytest.approx(alone[0]["critic_loss"], rel=1e-4)
