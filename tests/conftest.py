"""What all tests share: few threads, a fixed seed, and Hypothesis without a clock."""

import os

import hypothesis
import pytest
import torch

# Threads of torch times workers of pytest must not exceed the cores by much.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

# Compilation and a loaded machine make single examples slow; the same examples every time make failures repeatable.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, print_blob=True)
# For a search that takes minutes and looks at other examples every time; a failure prints how to repeat it.
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=5000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
