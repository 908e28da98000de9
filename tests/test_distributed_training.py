"""Training in two processes under torchrun: what one process computes with the same batches, saved by two and resumed
by one and the other way round, and killed while it saves."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_train import TINY

from python_ref.checkpoint import Checkpointer, read_tensors
from python_ref.metrics import read_metrics
from python_ref.train import main as train

ROOT = Path(__file__).resolve().parents[1]
STRATEGIES = ("ddp", "fsdp")
STAGES = ("teacher", "causal", "self_forcing")
HALF, WHOLE = 2, 4  # steps
# Batches are added up in another order; far below what two steps change.
RELATIVE_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-6


class Runs:
    """Trainings of a few steps in subfolders of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "config.yaml"
        self.config.write_text("stage: teacher\n")

    def arguments(self, stage: str, name: str, *more: str, steps: int = WHOLE) -> list[str]:
        return [
            *("--config", str(self.config), *TINY, f"stage={stage}", f"{stage}.steps={steps}"),
            *("logging.checkpoint_every=2", f"output={self.folder / name}", "teacher.optimizer.warmup_steps=2"),
            *(f"causal.init={self.folder}/start/teacher.safetensors", "teacher.caption_dropout=0.5"),
            *(f"self_forcing.init={self.folder}/start/causal.safetensors", "teacher.accumulate=2"),
            *(f"self_forcing.teacher={self.folder}/start/teacher.safetensors", *more),
        ]

    def copy_half(self, stage: str, source: str, target: str) -> None:
        """What a run had left when it was killed after HALF steps."""
        name = Path("checkpoints") / stage / f"step_{HALF:08d}"
        shutil.copytree(self.folder / source / name, self.folder / target / name)

    def torchrun(self, runs: list[list[str]], **orders: object) -> subprocess.CompletedProcess:
        """Runs them in two processes; see torchrun_trainings.py for more orders."""
        file = self.folder / "orders.json"
        file.write_text(json.dumps({"runs": runs, **orders}))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        worker = [str(ROOT / "tests" / "torchrun_trainings.py"), str(file)]
        return subprocess.run([*command, *worker], env=environment, capture_output=True, text=True, timeout=300)

    def weights(self, stage: str, name: str) -> dict[str, torch.Tensor]:
        return read_tensors(self.folder / name / f"{stage}.safetensors")

    def metrics(self, stage: str, name: str) -> list[dict[str, float]]:
        entries = read_metrics(self.folder / name / "logs" / stage / "metrics.jsonl")
        return [{name: value for name, value in entry.items() if name != "steps_per_second"} for entry in entries]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All runs: "one" in one process, "<strategy>" in two, "one to <strategy>" and "<strategy> to one"."""
    runs = Runs(tmp_path_factory.mktemp("runs"))
    for stage in ("teacher", "causal"):
        assert train(runs.arguments(stage, "start", steps=10)) == 0
    together = []
    for stage in STAGES:
        assert train(runs.arguments(stage, "one")) == 0
        for strategy in STRATEGIES:
            option = f"distributed.strategy={strategy}"
            together.append(runs.arguments(stage, strategy, option))
            runs.copy_half(stage, "one", f"one to {strategy}")
            together.append(runs.arguments(stage, f"one to {strategy}", option, "resume=true"))
    # Both processes on all samples, each with half of the tokens and heads.
    split = ("distributed.strategy=fsdp", "distributed.context_parallel=2")
    together.append(runs.arguments("self_forcing", "context", *split))
    refused = [
        runs.arguments("teacher", "refused"),
        runs.arguments("teacher", "refused", "distributed.strategy=ddp", "teacher.batch_size=5"),
        runs.arguments("teacher", "refused", "distributed.strategy=ddp", "distributed.context_parallel=3"),
    ]
    done = runs.torchrun(together, refused=refused)
    assert done.returncode == 0, done.stderr
    for message in (
        "distributed.strategy is 'none', but there are 2 processes; accepted: 'ddp', 'fsdp'",
        "batch_size is 5; accepted with 2 data-parallel processes: a multiple",
        "distributed.context_parallel is 3; accepted: a divisor of 2 processes",
    ):
        assert done.stderr.count(f"error: {message}") == 2
    for stage in STAGES:
        for strategy in STRATEGIES:
            runs.copy_half(stage, strategy, f"{strategy} to one")
            assert train(runs.arguments(stage, f"{strategy} to one", "resume=true")) == 0
    return runs


NAMES = [name.format(strategy) for strategy in STRATEGIES for name in ("{}", "one to {}", "{} to one")]


@pytest.mark.parametrize(
    ("stage", "name"), [*((stage, name) for stage in STAGES for name in NAMES), ("self_forcing", "context")]
)
def test_two_processes_compute_what_one_does(stage: str, name: str, runs: Runs):
    expected, found = runs.metrics(stage, "one"), runs.metrics(stage, name)
    if "to" in name:
        expected = expected[HALF:]
    for one, two in zip(expected, found, strict=True):
        assert two == pytest.approx(one, rel=RELATIVE_TOLERANCE), one["step"]
    weights = runs.weights(stage, name)
    for key, one in runs.weights(stage, "one").items():
        assert torch.allclose(weights[key], one, rtol=0, atol=WEIGHT_TOLERANCE), key


@pytest.mark.parametrize("stage", STAGES)
def test_the_tolerance_is_below_what_half_a_run_changes(stage: str, runs: Runs):
    half, whole = (
        read_tensors(next((runs.folder / "one/checkpoints" / stage).glob(f"step_{step:08d}/*.safetensors")))
        for step in (HALF, WHOLE)
    )
    changes = [(whole[key] - half[key]).abs().max() for key in whole if key.startswith("modules.model.model.")]
    assert max(changes) > 30 * WEIGHT_TOLERANCE


def test_both_processes_write_their_shards(runs: Runs):
    """Sharded weights lie in both files, each its rows; the files of replicated ones hold every tensor once."""
    for strategy in STRATEGIES:
        folder = Checkpointer(runs.folder / strategy / "checkpoints" / "teacher").path(WHOLE)
        first, second = (read_tensors(file) for file in sorted(folder.glob("*.safetensors")))
        name = "modules.model.model.blocks.0.ffn.0.weight"  # [64, 32]
        rows = [len(tensors[name]) for tensors in (first, second) if name in tensors]
        assert rows == ([32, 32] if strategy == "fsdp" else [64])


@pytest.mark.parametrize(("rank", "function"), [(1, "_write_shards"), (0, "_write_text")], ids=["shards", "state"])
def test_a_process_killed_while_saving_leaves_the_previous_checkpoint(rank: int, function: str, tmp_path: Path):
    """One process dies in its second save, which takes the other along; one process goes on from the first save."""
    runs = Runs(tmp_path)
    arguments = runs.arguments("teacher", "killed", "logging.keep_checkpoints=1")
    together = [*arguments, "distributed.strategy=fsdp"]
    assert runs.torchrun([together], kill={"rank": rank, "function": function, "time": 2}).returncode != 0
    checkpoints = tmp_path / "killed/checkpoints/teacher"
    assert len(list(checkpoints.iterdir())) == 2  # what the killed write left ...
    assert Checkpointer(checkpoints).steps() == [HALF]  # ... does not count
    assert train([*arguments, "resume=true"]) == 0
    assert [entry["step"] for entry in runs.metrics("teacher", "killed")] == [1, 2, 3, 4]
