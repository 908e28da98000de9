"""Training of models of a few thousand parameters through the command line."""

from __future__ import annotations

from pathlib import Path

import torch

from python_ref.checkpoint import read_tensors
from python_ref.metrics import read_metrics

TINY = [
    "threads=1",
    "precision=fp32",
    "model.dim=32",
    "model.num_heads=2",
    "model.num_layers=2",
    "model.ffn_dim=64",
    "model.text_dim=16",
    "data.moving_digits.num_frames=6",
    "rollout.denoising_steps=[1000,500]",
    "teacher.batch_size=4",
    "teacher.sample_steps=2",
    "causal.batch_size=4",
    "self_forcing.batch_size=4",
    "self_forcing.generator_every=2",
    "logging.log_every=1",
    "logging.sample_prompts=2",
    "logging.tensorboard=false",
]


def arguments(config_file: Path, starts: list[str], stage: str, output: Path, *more: str) -> list[str]:
    return ["--config", str(config_file), *TINY, *starts, f"stage={stage}", f"output={output}", *more]


def losses(output: Path, stage: str) -> list[dict[str, float]]:
    """The logged metrics but for the speed, which is not reproducible."""
    entries = read_metrics(output / "logs" / stage / "metrics.jsonl")
    return [{name: value for name, value in entry.items() if name != "steps_per_second"} for entry in entries]


def assert_same_run(one: Path, other: Path, stage: str, step: int) -> None:
    """The checkpoints after `step` steps and the weights hold the same bits."""
    final = Path("checkpoints") / stage / f"step_{step:08d}"
    weights = f"{stage}.safetensors"
    assert sorted(path.name for path in (one / final).iterdir()) == sorted(
        path.name for path in (other / final).iterdir()
    )
    assert (one / final / "state.json").read_bytes() == (other / final / "state.json").read_bytes()
    assert (one / weights).read_bytes() == (other / weights).read_bytes()
    # Of the files of a checkpoint the tensors count: the order of the notes in their headers is arbitrary.
    tensors, others = (read_tensors(next((run / final).glob("*.safetensors"))) for run in (one, other))
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name
