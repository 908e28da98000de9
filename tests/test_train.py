"""Training end to end through its command line: every stage, resuming to the same bits, both backends, errors."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_runs import TINY, arguments, assert_same_run, losses
from video_writing import write_video

from python_ref import evaluate, generate
from python_ref.checkpoint import load_weights, read_tensors
from python_ref.config import load_config
from python_ref.data.video_files import read_video
from python_ref.demo import main as demo
from python_ref.train import main as train

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("teacher", "causal", "self_forcing")


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_writes_all_it_should(stage, config_file, starts, tmp_path, capsys):
    options = [f"{stage}.steps=3", "logging.tensorboard=true", "precision=bf16", "backend=ext"]
    assert train(arguments(config_file, starts, stage, tmp_path, *options)) == 0
    assert f"weights: {tmp_path}/{stage}.safetensors" in capsys.readouterr().out
    assert [entry["step"] for entry in losses(tmp_path, stage)] == [1, 2, 3]
    assert any((tmp_path / "logs" / stage / "tensorboard").glob("events.*"))
    for suffix in (".png", ".gif"):
        assert (tmp_path / "samples" / f"{stage}_000003").with_suffix(suffix).stat().st_size > 500
    _, settings = load_weights(tmp_path / f"{stage}.safetensors")
    assert settings["stage"] == stage
    assert settings["step"] == 3
    assert ("rollout" in settings) == (stage != "teacher")
    assert load_config(tmp_path / f"{stage}.yaml").model.dim == 32  # the settings can be read back


def test_the_teacher_learns(config_file, tmp_path):
    options = ["teacher.steps=60", "teacher.optimizer.lr=3e-3", "teacher.optimizer.warmup_steps=5", "backend=ext"]
    assert train(["--config", str(config_file), *TINY, *options, f"output={tmp_path}"]) == 0
    loss = [entry["loss"] for entry in losses(tmp_path, "teacher")]
    assert sum(loss[-10:]) / 10 < 0.7 * loss[0]


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_goes_on_to_the_same_bits(stage, config_file, starts, tmp_path):
    """kill -9 in the middle of a run, then resume=true: tensors and metrics are those of an uninterrupted run."""
    steps = 30 if stage == "teacher" else 16
    options = [f"{stage}.steps={steps}", "logging.checkpoint_every=4", "logging.keep_checkpoints=1", "backend=ext"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train(arguments(config_file, starts, stage, whole, *options)) == 0

    command = [sys.executable, "-m", "python_ref.train", *arguments(config_file, starts, stage, killed, *options)]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    checkpoints = killed / "checkpoints" / stage
    while process.poll() is None and not list(checkpoints.glob("step_*")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (checkpoints / f"step_{steps:08d}").exists()

    assert train(arguments(config_file, starts, stage, killed, *options, "resume=true")) == 0
    assert_same_run(whole, killed, stage, steps)
    assert losses(whole, stage) == losses(killed, stage)


def test_another_seed_gives_other_bits(config_file, tmp_path):
    """What is compared above does depend on the run."""
    found = []
    for seed in (0, 1):
        options = ["teacher.steps=2", f"seed={seed}", "backend=ext", f"output={tmp_path / str(seed)}"]
        assert train(["--config", str(config_file), *TINY, *options]) == 0
        found.append(losses(tmp_path / str(seed), "teacher"))
    assert found[0][0]["loss"] != found[1][0]["loss"]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-4), ("bf16", 3e-2)])
@pytest.mark.parametrize("stage", STAGES)
def test_both_backends_give_the_same_losses(stage, precision, tolerance, config_file, starts, tmp_path):
    runs = {}
    for backend in ("reference", "ext"):
        options = [f"{stage}.steps=6", f"backend={backend}", f"precision={precision}"]
        assert train(arguments(config_file, starts, stage, tmp_path / backend, *options)) == 0
        runs[backend] = losses(tmp_path / backend, stage)
    for reference, ext in zip(runs["reference"], runs["ext"], strict=True):
        assert reference.keys() == ext.keys()
        for name, value in reference.items():
            assert ext[name] == pytest.approx(value, rel=tolerance), name
    reference, ext = (read_tensors(tmp_path / backend / f"{stage}.safetensors") for backend in runs)
    assert any(not torch.equal(ext[name], value) for name, value in reference.items())  # they are two computations


def test_diffusion_forcing_and_accumulation(config_file, starts, tmp_path):
    options = ["causal.steps=2", "causal.forcing=diffusion", "causal.accumulate=2", "backend=ext"]
    assert train(arguments(config_file, starts, "causal", tmp_path / "a", *options)) == 0
    assert train(arguments(config_file, starts, "causal", tmp_path / "b", "causal.steps=2", "backend=ext")) == 0
    assert losses(tmp_path / "a", "causal")[0]["loss"] != losses(tmp_path / "b", "causal")[0]["loss"]


def test_training_on_video_files(config_file, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    for number, caption in enumerate(("a square moving right", "a bright square")):
        write_video(videos / f"{number}.mp4", 8, level=60 * number)
        (videos / f"{number}.txt").write_text(caption)
    options = ["data.source=video_files", f"data.video_files.folder={videos}", "data.video_files.num_frames=4"]
    output = tmp_path / "run"
    assert train(["--config", str(config_file), *TINY, *options, "teacher.steps=2", f"output={output}"]) == 0
    _, settings = load_weights(output / "teacher.safetensors")
    assert settings["words"] == ["a", "bright", "moving", "right", "square"]
    assert settings["channels"] == 3
    assert (output / "samples" / "teacher_000002.png").is_file()


def test_generate_and_evaluate(config_file, starts, tmp_path, capsys):
    causal, teacher = (option.split("=")[1] for option in starts[1:3])
    made = tmp_path / "videos"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a 5\n")
    options = ["--checkpoint", causal, "--prompt", "a 3 moving left", "--prompts-file", str(prompts), "--threads", "1"]
    long = ["--num-frames", "18", "--window-frames", "6", "--sink-frames", "3", "--scale", "1"]
    assert generate.main([*options, *long, "--output", str(made)]) == 0
    names = {"000_a_3_moving_left.gif", "000_a_3_moving_left.mp4", "001_a_5.gif", "001_a_5.mp4", "contact_sheet.png"}
    assert {path.name for path in made.iterdir()} == names
    for suffix in ("mp4", "gif"):
        assert read_video(made / f"001_a_5.{suffix}", (24, 24), 1).shape == (18, 1, 24, 24)
    assert generate.main([*options, "--num-frames", "17"]) == 2
    assert generate.main([*options[:2], "--prompt", "a cat"]) == 2
    errors = capsys.readouterr().err
    assert "num_frames is 17; accepted: a multiple of frames_per_block = 3" in errors
    assert "unknown word 'cat'" in errors

    again = tmp_path / "again"
    given = ["--continue-video", str(made / "001_a_5.gif"), "--given-frames", "4", "--num-frames", "10", "--scale", "1"]
    assert generate.main([*options, *given, "--output", str(again)]) == 0
    frames, old = (read_video(folder / "001_a_5.gif", (24, 24), 1) for folder in (again, made))
    assert frames.shape == (10, 1, 24, 24)
    assert (frames[:4].float() - old[:4].float()).abs().mean() < 3  # but for rounding
    assert (frames[4:].float() - old[4:10].float()).abs().mean() > 3
    assert generate.main([*options, *given[:2], "--given-frames", "19"]) == 2
    assert generate.main(["--checkpoint", teacher, "--prompt", "a 5", *given[:2]]) == 2
    errors = capsys.readouterr().err
    assert "given_frames is 19; accepted: 1 to 18" in errors
    assert "continue_video is given; accepted for a bidirectional model: none" in errors

    output = tmp_path / "evaluation"
    options = ["--num-videos", "8", "--num-frames", "12", "--batch-size", "4", "--threads", "1"]
    assert evaluate.main(["--checkpoint", teacher, causal, *options, "--output", str(output)]) == 0
    document = json.loads((output / "results.json").read_text())
    assert list(document["results"]) == ["real", teacher, causal]
    assert len(document["results"][causal]["identity"]) == 12
    assert len(document["results"][teacher]["identity"]) == 6  # a bidirectional model has its own length
    assert (output / "drift.png").is_file()
    assert evaluate.main(["--checkpoint", str(tmp_path / "none.safetensors")]) == 2
    assert "none.safetensors does not exist" in capsys.readouterr().err


def test_the_demo(config_file, starts, tmp_path, capsys):
    options = ["causal.steps=2", "self_forcing.steps=2", "evaluation.num_videos=10", "evaluation.num_frames=12"]
    assert demo(["--config", str(config_file), *TINY, *starts, *options, f"output={tmp_path}"]) == 0
    shown = {path.name for path in tmp_path.iterdir() if path.is_file()}
    sets = ("real", "teacher", "teacher_forced", "self_forced")
    assert {f"{name}.{suffix}" for name in sets for suffix in ("png", "gif", "mp4")} < shown
    assert {"losses.png", "drift.png", "results.json"} < shown
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["results"]) == ["real", "teacher", "teacher-forced", "self-forced"]
    assert not all(results["claims"].values())  # two steps teach nothing
    assert "self-forced reads better than teacher-forced in every frame" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["teacher.stepz=3"], "unknown key 'teacher.stepz'; accepted: steps, batch_size"),
        (["teacher.steps=many"], "teacher.steps=many"),
        (["teacher.steps=0"], "steps is 0; accepted: above 0"),
        (["teacher"], "override 'teacher' has no value"),
        (["teacher=3"], "teacher is 3; accepted: a section"),
        (["stage=first"], "stage is 'first'; accepted: 'teacher', 'causal', 'ode'"),
        (["backend=cuda"], "backend is 'cuda'"),
        (["precision=fp8"], "precision is 'fp8'"),
        (["device=cuda:1"], "device is 'cuda:1'; accepted: 'cpu', 'cuda'"),
        (["data.moving_digits.num_digits=7"], "num_digits is 7; accepted: 1 or 2"),
        (["causal.forcing=self"], "causal.forcing is 'self'"),
        (["stage=causal", "causal.init=/nowhere/teacher.safetensors"], "/nowhere/teacher.safetensors does not exist"),
        (["resume=true", "output=/nowhere"], "/nowhere/checkpoints/teacher holds no checkpoint"),
    ],
)
def test_bad_settings_are_explained(options, message, config_file, capsys):
    assert train(["--config", str(config_file), *TINY, *options]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_config_and_a_wrong_seed_are_explained(config_file, tmp_path, capsys):
    assert train(["--config", "configs/none.yaml"]) == 2
    assert "configs/none.yaml does not exist" in capsys.readouterr().err
    run = ["--config", str(config_file), *TINY, f"output={tmp_path}", "teacher.steps=1"]
    assert train(run) == 0
    assert train([*run, "resume=true", "seed=5"]) == 2
    assert "seed is 5, but the checkpoint was made with seed 0" in capsys.readouterr().err


def test_the_demo_needs_digits(config_file, capsys):
    assert demo(["--config", str(config_file), "data.source=video_files"]) == 2
    assert "data.source is 'video_files'; accepted by the demo: 'moving_digits'" in capsys.readouterr().err
