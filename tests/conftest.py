"""What all tests share: few threads, a fixed seed, and Hypothesis without a clock."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch

# Threads of torch times workers of pytest must not exceed the cores by much.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

# Compilation and a loaded machine make single examples slow; the same examples every time make failures repeatable.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, print_blob=True)
# For a search that takes minutes and looks at other examples every time; a failure prints how to repeat it.
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=5000, print_blob=True)
# For sequences of calls, which take longer each.
hypothesis.settings.register_profile("thousands", deadline=None, max_examples=2000, print_blob=True)
hypothesis.settings.register_profile("ten_thousands", deadline=None, max_examples=20000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def config_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text("stage: teacher\n")
    return path


@pytest.fixture(scope="session")
def starts(tmp_path_factory, config_file) -> list[str]:
    """Overrides that let the later stages start from a teacher and a causal model of a few steps."""
    from tiny_runs import TINY  # needs the extras of training, as few tests do

    from python_ref.train import main as train

    folder = tmp_path_factory.mktemp("starts")
    where = [
        f"output={folder}",
        f"causal.init={folder}/teacher.safetensors",
        f"self_forcing.init={folder}/causal.safetensors",
        f"self_forcing.teacher={folder}/teacher.safetensors",
        f"ode.init={folder}/teacher.safetensors",
        f"consistency.init={folder}/causal.safetensors",
        f"consistency.teacher={folder}/causal.safetensors",
    ]
    steps = ["teacher.steps=20", "causal.steps=4", "teacher.optimizer.warmup_steps=2"]
    for stage in ("teacher", "causal"):
        assert train(["--config", str(config_file), *TINY, *where, *steps, f"stage={stage}", "backend=reference"]) == 0
    return where[1:]
