"""What a run writes of itself: facts, boards, curves and the drift plot."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import selfforcing_ext
from python_ref.config import Config, load_config
from python_ref.metrics import MetricsLog, WeightsAndBiases, open_boards
from python_ref.run_facts import git_state, record_run
from python_ref.train import main as train

TINY = [
    "threads=1", "precision=fp32", "backend=reference", "model.dim=16", "model.num_heads=2", "model.num_layers=1",
    "model.ffn_dim=32", "model.text_dim=16", "data.moving_digits.num_frames=6", "teacher.batch_size=2",
    "teacher.sample_steps=2", "rollout.denoising_steps=[1000,500]", "causal.batch_size=2", "logging.log_every=1",
    "logging.sample_prompts=2", "logging.tensorboard=false", "evaluation.num_frames=9", "seed=7",
]  # fmt: skip


@pytest.fixture
def stub(monkeypatch):
    """Stands for wandb and keeps what it is told."""
    runs = []

    def init(**options):
        run = SimpleNamespace(options=options, logged=[], finished=False)
        run.log = lambda values, step: run.logged.append((step, values))
        run.finish = lambda: setattr(run, "finished", True)
        runs.append(run)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return runs


def run(tmp_path, *options):
    (tmp_path / "c.yaml").write_text("stage: teacher\n")
    return train(["--config", str(tmp_path / "c.yaml"), *TINY, f"output={tmp_path}", *options])


def test_a_run_records_itself_and_draws_its_curves(tmp_path, stub):
    options = ["logging.wandb=true", "logging.wandb_project=films", "logging.drift_videos=4"]
    assert run(tmp_path, "teacher.steps=2", *options) == 0
    (first,) = facts = json.loads((tmp_path / "logs" / "teacher" / "run.json").read_text())
    assert first["seed"] == first["config"]["seed"] == 7
    assert first["first_step"] == 0
    assert first["threads"] == 1
    assert first["environment"]["selfforcing_ext"] == selfforcing_ext.__version__
    assert first["environment"]["torch"] == torch.__version__
    assert "cpu_kernels" in first["environment"]
    for picture in ("teacher_losses.png", "teacher_000002_drift.png"):
        assert (tmp_path / "samples" / picture).read_bytes().startswith(b"\x89PNG")

    assert run(tmp_path, "teacher.steps=3", "resume=true", *options) == 0
    again = json.loads((tmp_path / "logs" / "teacher" / "run.json").read_text())
    assert again[:1] == facts
    assert again[1]["first_step"] == 2
    before, after = stub
    assert before.options["project"] == "films"
    assert before.options["config"]["model"]["dim"] == 16
    assert before.options["id"] == after.options["id"]
    assert [[step for step, _ in run.logged] for run in stub] == [[1, 2], [3]]
    assert before.logged[0][1].keys() >= {"loss", "lr", "grad_norm"}
    assert before.finished
    assert after.finished

    assert run(tmp_path, "teacher.steps=1", *options) == 0  # from the start: a run of its own
    assert len(json.loads((tmp_path / "logs" / "teacher" / "run.json").read_text())) == 1
    assert stub[-1].options["id"] != before.options["id"]


def test_drift_of_a_causal_model_goes_beyond_training(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("python_ref.drift.plot_drift", lambda *arguments: seen.append(arguments))
    assert run(tmp_path, "teacher.steps=1") == 0
    assert not seen
    options = [f"causal.init={tmp_path}/teacher.safetensors", "stage=causal", "causal.steps=2"]
    assert run(tmp_path, *options, "logging.sample_every=1", "logging.drift_videos=3") == 0
    assert [arguments[0].name for arguments in seen] == ["causal_000001_drift.png", "causal_000002_drift.png"]
    measures = seen[-1][1]
    assert list(measures) == ["real", "causal, step 2"]
    assert [len(found.identity) for found in measures.values()] == [9, 9]


def test_wandb_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="wandb is not installed"):
        WeightsAndBiases(tmp_path, 0, "films", {})
    assert run(tmp_path, "logging.wandb=true", "teacher.steps=1") == 2
    assert "logging.wandb=false" in capsys.readouterr().err


def test_no_boards_unless_asked_for(tmp_path):
    config = Config()
    config.logging.tensorboard = False
    assert open_boards(config, tmp_path, 0) == []
    log = MetricsLog(tmp_path, 0)
    log.write(1, {"loss": 2.0})
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 2.0}


def test_git_state(tmp_path):
    assert git_state(tmp_path) is None
    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    state = git_state(tmp_path)
    assert len(state["commit"]) == 40
    assert not state["changed"]
    record_run(tmp_path, Config(), 0)
    assert git_state(tmp_path) == {"commit": state["commit"], "changed": True}
    assert git_state(tmp_path / "nowhere") is None


def test_what_cannot_be_measured_is_said(tmp_path):
    (tmp_path / "c.yaml").write_text("logging:\n  drift_videos: 4\ndata:\n  source: latents\n")
    with pytest.raises(ValueError, match="only moving digits can be measured"):
        load_config(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("logging:\n  drift_videos: -1\n")
    with pytest.raises(ValueError, match="drift_videos is -1"):
        load_config(tmp_path / "c.yaml")
