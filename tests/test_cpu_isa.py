"""Every instruction set that this machine has passes parity tests of the elementwise ops, of drawn noise and of
quantised writes, each in its own process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
CANNOT = "which this machine lacks"  # csrc/simd/isa.cpp


def run(isa: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"SELFFORCING_CPU_ISA": isa}
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=FOLDER.parent, capture_output=True, text=True
    )


USE = "import torch, selfforcing_ext as ext; x = torch.ones(1, 1, 1, 1, 1); ext.add_noise(x, x, x[0, 0, 0])"
SOME_TESTS = (  # float16 matches bfloat16, too
    "parity and float16 and strided and not planes and not last or quantised_bits or bits_of_the_reference"
)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_parity(isa):
    probe = run(isa, "-c", USE)
    if CANNOT in probe.stderr:
        pytest.skip(f"this machine lacks {isa}")
    assert probe.returncode == 0, probe.stderr
    files = [str(FOLDER / f"test_{op}.py") for op in ("rope", "denoise", "philox", "modulate", "kv_cache_write")]
    tests = run(isa, "-m", "pytest", "-q", "-k", SOME_TESTS, "-p", "no:cacheprovider", *files)
    assert tests.returncode == 0, tests.stdout[-4000:]


def test_unknown_name():
    probe = run("sse9", "-c", USE)
    assert probe.returncode != 0
    assert "SELFFORCING_CPU_ISA is 'sse9', but must be one of baseline, avx2, avx512, avx512_bf16" in probe.stderr
