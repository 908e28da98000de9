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
from tiny_runs import TINY, losses

from python_ref.checkpoint import Checkpointer, read_tensors
from python_ref.train import main as train

ROOT = Path(__file__).resolve().parents[1]
HALF, WHOLE = 2, 4  # steps
# Batches are added up in another order; far below what two steps change.
RELATIVE_TOLERANCE, METRIC_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-6, 1e-6

CASES: dict[str, tuple[str, list[str]]] = {
    "teacher": ("teacher", ["teacher.caption_dropout=0.5", "teacher.accumulate=2"]),
    "causal": ("causal", []),
    "self-forcing": ("self_forcing", []),
    "one pass": (
        "self_forcing",
        ["self_forcing.videos=noised_data", "self_forcing.objective=sid", "checkpoint_activations=true"],
    ),
    # A relativistic loss does not see what moves all logits alike, whose rounding Adam would magnify.
    "gan": (
        "self_forcing",
        ["self_forcing.objective=gan", "self_forcing.gan.layers=[0,1]", "self_forcing.gan.relativistic=false"],
    ),
    "stream": (
        "self_forcing",
        ["self_forcing.stream_steps=3", "self_forcing.stream_frames=3", "rollout.window_frames=6"],
    ),
    "lora": ("self_forcing", ["self_forcing.lora_rank=2"]),
    "consistency": ("consistency", ["consistency.guidance_scale=2", "consistency.solver_steps=2"]),
}
# "<strategy>": in two processes. "one to <strategy>": resumed from half of the run of one process; and the other way
# round. "context": both processes on all samples, each with half of the tokens and heads.
BOTH = ["ddp", "one to ddp", "ddp to one", "fsdp", "one to fsdp", "fsdp to one"]
RUNS = {
    "teacher": BOTH,
    "causal": ["fsdp"],
    "self-forcing": [*BOTH, "context"],
    "one pass": ["fsdp"],
    "gan": ["fsdp", "context"],
    "stream": ["ddp", "one to ddp", "ddp to one"],
    "lora": ["fsdp", "fsdp to one"],
    "consistency": ["fsdp"],
}


class Runs:
    """Trainings of a few steps in subfolders `case/name` of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "config.yaml"
        self.config.write_text("stage: teacher\n")

    def arguments(self, case: str, name: str, *more: str, steps: int = WHOLE) -> list[str]:
        stage, options = CASES[case]
        teacher, causal = (f"{self.folder}/start/{stage}.safetensors" for stage in ("teacher", "causal"))
        return [
            *("--config", str(self.config), *TINY, f"stage={stage}", f"{stage}.steps={steps}", *options),
            *("logging.checkpoint_every=2", f"output={self.folder / case / name}", "consistency.batch_size=4"),
            *(f"causal.init={teacher}", f"self_forcing.init={causal}", f"self_forcing.teacher={teacher}"),
            *(f"consistency.init={causal}", f"consistency.teacher={causal}", "teacher.optimizer.warmup_steps=2", *more),
        ]

    def start(self) -> None:
        """Trains what later stages start from."""
        for stage in ("teacher", "causal"):
            assert train(self.arguments(stage, "", f"output={self.folder}/start", steps=10)) == 0

    def checkpoint(self, case: str, name: str, step: int) -> Path:
        return Checkpointer(self.folder / case / name / "checkpoints" / CASES[case][0]).path(step)

    def copy_half(self, case: str, source: str, target: str) -> None:
        """What a run had left when it was killed after HALF steps."""
        shutil.copytree(self.checkpoint(case, source, HALF), self.checkpoint(case, target, HALF))

    def torchrun(self, runs: list[list[str]], **orders: object) -> subprocess.CompletedProcess:
        """Runs them in two processes; see torchrun_trainings.py for more orders."""
        file = self.folder / "orders.json"
        file.write_text(json.dumps({"runs": runs, **orders}))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        worker = [str(ROOT / "tests" / "torchrun_trainings.py"), str(file)]
        return subprocess.run([*command, *worker], env=environment, capture_output=True, text=True, timeout=600)

    def weights(self, case: str, name: str) -> dict[str, torch.Tensor]:
        return read_tensors(self.folder / case / name / f"{CASES[case][0]}.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All of RUNS, and "one" in one process."""
    runs = Runs(tmp_path_factory.mktemp("runs"))
    runs.start()
    together = []
    for case, names in RUNS.items():
        assert train(runs.arguments(case, "one")) == 0
        for name in names:
            options = [f"distributed.strategy={name.removeprefix('one to ')}"]
            if name.startswith("one to"):
                runs.copy_half(case, "one", name)
                options.append("resume=true")
            elif name == "context":
                options = ["distributed.strategy=fsdp", "distributed.context_parallel=2"]
            if not name.endswith("to one"):
                together.append(runs.arguments(case, name, *options))
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
    for case, names in RUNS.items():
        for name in names:
            if name.endswith("to one"):
                runs.copy_half(case, name.removesuffix(" to one"), name)
                assert train(runs.arguments(case, name, "resume=true")) == 0
    return runs


@pytest.mark.parametrize(("case", "name"), [(case, name) for case, names in RUNS.items() for name in names])
def test_two_processes_compute_what_one_does(case: str, name: str, runs: Runs):
    stage = CASES[case][0]
    expected, found = (losses(runs.folder / case / run, stage) for run in ("one", name))
    for one, two in zip(expected[HALF:] if "to" in name.split() else expected, found, strict=True):
        assert two == pytest.approx(one, rel=RELATIVE_TOLERANCE, abs=METRIC_TOLERANCE), one["step"]
    weights = runs.weights(case, name)
    for key, one in runs.weights(case, "one").items():
        assert torch.allclose(weights[key], one, rtol=0, atol=WEIGHT_TOLERANCE), key


@pytest.mark.parametrize("case", CASES)
def test_the_tolerance_is_below_what_half_a_run_changes(case: str, runs: Runs):
    half, whole = (
        read_tensors(next(runs.checkpoint(case, "one", step).glob("*.safetensors"))) for step in (HALF, WHOLE)
    )
    changes = [(whole[key] - half[key]).abs().max() for key in whole if key.startswith("modules.model.model.")]
    assert max(changes) > 30 * WEIGHT_TOLERANCE


def test_both_processes_write_their_shards(runs: Runs):
    """Sharded weights lie in both files, each its rows; the files of replicated ones hold every tensor once."""
    name = "modules.model.model.blocks.0.ffn.0.weight"  # [64, 32]
    for strategy, wanted in (("fsdp", [32, 32]), ("ddp", [64])):
        files = sorted(runs.checkpoint("teacher", strategy, WHOLE).glob("*.safetensors"))
        assert len(files) == 2
        assert [len(tensors[name]) for tensors in map(read_tensors, files) if name in tensors] == wanted


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", ["teacher", "self-forcing"])
def test_a_gpu_computes_what_the_cpu_does(case: str, tmp_path: Path):
    runs = Runs(tmp_path)
    runs.start()
    for device in ("cpu", "cuda"):
        assert train(runs.arguments(case, device, f"device={device}")) == 0
    expected, found = (losses(tmp_path / case / device, CASES[case][0]) for device in ("cpu", "cuda"))
    for cpu, cuda in zip(expected, found, strict=True):
        assert cuda == pytest.approx(cpu, rel=1e-3), cpu["step"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.parametrize("options", [["ddp"], ["fsdp"], ["fsdp", "distributed.context_parallel=2"]], ids="-".join)
def test_two_gpus_compute_what_the_cpu_does(options: list[str], tmp_path: Path):
    runs = Runs(tmp_path)
    runs.start()
    assert train(runs.arguments("self-forcing", "one")) == 0
    strategy, *others = options
    two = runs.arguments("self-forcing", "two", "device=cuda", f"distributed.strategy={strategy}", *others)
    done = runs.torchrun([two], device="cuda")
    assert done.returncode == 0, done.stderr
    expected, found = (losses(tmp_path / "self-forcing" / name, "self_forcing") for name in ("one", "two"))
    for one, both in zip(expected, found, strict=True):
        assert both == pytest.approx(one, rel=1e-3), one["step"]


@pytest.mark.parametrize(("rank", "function"), [(1, "_write_shards"), (0, "_write_text")], ids=["shards", "state"])
def test_a_process_killed_while_saving_leaves_the_previous_checkpoint(rank: int, function: str, tmp_path: Path):
    """One process dies in its second save, which takes the other along; one process goes on from the first save."""
    runs = Runs(tmp_path)
    arguments = runs.arguments("teacher", "killed", "logging.keep_checkpoints=1")
    together = [*arguments, "distributed.strategy=fsdp"]
    assert runs.torchrun([together], kill={"rank": rank, "function": function, "time": 2}).returncode != 0
    checkpoints = runs.checkpoint("teacher", "killed", HALF).parent
    assert len(list(checkpoints.iterdir())) == 2  # what the killed write left ...
    assert Checkpointer(checkpoints).steps() == [HALF]  # ... does not count
    assert train([*arguments, "resume=true"]) == 0
    assert [entry["step"] for entry in losses(tmp_path / "teacher/killed", "teacher")] == [1, 2, 3, 4]
