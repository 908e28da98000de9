"""`python -m selfforcing_ext.info`: what it says, and that its self-test finds what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import selfforcing_ext
from selfforcing_ext import _C, gpu, info, library, selftest
from selfforcing_ext.attention import block_causal_attention

ROOT = Path(__file__).parents[1]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "selfforcing_ext.info", *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, cwd=ROOT, check=False)


def test_the_report_as_text():
    result = run(OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    rows = dict(line.split(maxsplit=1) for line in result.stdout.splitlines()[:6])
    assert rows["selfforcing_ext"] == f"{selfforcing_ext.__version__} in {ROOT / 'selfforcing_ext'}"
    assert rows["torch"] == torch.__version__
    assert rows["settings"].endswith("OMP_NUM_THREADS=1")
    assert f"{_C.cpu_isa()} of {', '.join(_C.cpu_isas())}\n" in result.stdout
    assert "threads         1\n" in result.stdout
    assert result.stdout.splitlines()[-1] == f"{3 * len(selftest.CASES)} passed, 0 failed"


def test_the_report_as_json(capsys):
    assert info.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"]
    assert report["python"] == sys.version.split()[0]
    assert report["compiler"] == _C.compiler
    assert report["built_with_torch"] == _C.torch_version
    assert report["cpu_kernels"] in report["cpu_isas"]
    assert report["threads"] == torch.get_num_threads()
    assert report["cuda_ops_loaded"] == library.HAS_CUDA
    errors = {(result["op"], result["dtype"]): result["forward"] for result in report["self_test"]}
    assert 0 < errors["rope_3d", "float32"] < 1e-6 < errors["rope_3d", "bfloat16"] < 1e-2


def test_every_public_op_is_tested():
    ops = set(selfforcing_ext.__all__) - {
        "BlockCausalMask",
        "GraphedBlock",
        "PagePool",
        "PhiloxNoise",
        "PoolStats",
        "Stream",
    }
    assert {case.name.partition(",")[0] for case in selftest.CASES} == ops


def broken_forward(*arguments, **options):
    return block_causal_attention(*arguments, **options) * 1.02


def broken_backward(*arguments, **options):
    """The right numbers, and gradients that are off by a fiftieth."""
    out = block_causal_attention(*arguments, **options)
    return out.detach() + 1.02 * (out - out.detach())


def nothing_but_nan(*arguments, **options):
    return block_causal_attention(*arguments, **options) * float("nan")


@pytest.mark.parametrize(
    ("broken", "off"),
    [
        (broken_forward, {"forward", "backward"}),
        (broken_backward, {"backward"}),
        (nothing_but_nan, {"forward", "backward"}),
    ],
)
def test_a_planted_error_is_found(monkeypatch, capsys, broken, off):
    monkeypatch.setattr(selftest, "block_causal_attention", broken)
    assert info.main(["--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["passed"]
    for result in report["self_test"]:
        wrong = {part for part in ("forward", "backward") if not (result[part] or 0) <= result["tolerance"]}
        assert wrong == (off if result["op"] == "block_causal_attention" else set())
        assert result["passed"] == (not wrong)
    assert info.main([]) == 1
    text = capsys.readouterr().out
    assert "FAILED: block_causal_attention, bfloat16, cpu: error above 0.01" in text
    assert text.endswith(f"{3 * len(selftest.CASES) - 3} passed, 3 failed\n")


def test_an_op_that_raises_is_named(monkeypatch, capsys):
    def refuse(*_):
        raise ValueError("x is not to my liking")

    monkeypatch.setattr(selftest, "rope_3d", refuse)
    assert info.main([]) == 1
    text = capsys.readouterr().out
    assert "FAILED: rope_3d, float16, cpu: ValueError: x is not to my liking" in text
    assert info.main(["--json"]) == 1
    failures = [result["failure"] for result in json.loads(capsys.readouterr().out)["self_test"] if result["failure"]]
    assert failures == ["ValueError: x is not to my liking"] * 3


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_a_compiled_part_that_cannot_be_used_is_reported(arguments):
    result = run(*arguments, SELFFORCING_CPU_ISA="sse9")
    assert result.returncode == 1
    assert result.stderr == ""
    assert "SELFFORCING_CPU_ISA is 'sse9', but must be one of baseline" in result.stdout
    assert selfforcing_ext.__version__ in result.stdout


@pytest.fixture
def gpus(monkeypatch):
    """A machine with GPUs of these names and compute capabilities, and a build for these architectures."""

    def make(architectures: str, **capabilities: tuple[int, int]) -> None:
        names, numbers = list(capabilities), list(capabilities.values())
        monkeypatch.setattr(library, "HAS_CUDA", True)
        monkeypatch.setattr(library, "BUILT_ARCHITECTURES", tuple(architectures.split()))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[torch.device(device).index])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: numbers[torch.device(device).index])

    gpu.obstacle.cache_clear()
    yield make
    gpu.obstacle.cache_clear()


def test_gpus_are_reported(gpus, monkeypatch, capsys):
    gpus("80 90a", V100=(7, 0), A10=(8, 6), H100=(9, 0), B200=(10, 0))
    monkeypatch.setattr(info, "self_test", lambda gpus: [])
    assert info.main([]) == 0
    text = capsys.readouterr().out
    assert "GPU 0           V100, compute capability 7.0: this build is for compute capability 8.0 and" in text
    assert "GPU 1           A10, compute capability 8.6: runs the kernels for 8.0\n" in text
    assert "GPU 2           H100, compute capability 9.0: runs the kernels for 9.0a\n" in text
    assert "GPU 3           B200, compute capability 10.0: runs the kernels for 8.0\n" in text


def test_the_self_test_runs_on_usable_gpus(monkeypatch):
    tested = []
    monkeypatch.setattr(selftest, "run", lambda devices: tested.extend(map(str, devices)) or iter(()))
    info.self_test([{"obstacle": "too old"}, {"obstacle": None}])
    assert tested == ["cpu", "cuda:1"]


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((8, 0), "80 90a", "80"),
        ((8, 9), "80 86 90a", "86"),  # newer code of its major
        ((9, 0), "80 90 90a", "90a"),
        ((9, 0), "80", "80"),  # PTX
        ((10, 0), "80 90a", "80"),  # what 90a needs is gone
        ((10, 3), "80 100f", "100f"),
        ((12, 0), "100f 90a", None),
        ((7, 5), "80 90a", None),
        ((8, 0), "", None),
    ],
)
def test_which_architecture_a_gpu_runs(capability, built, runs):
    assert gpu.architecture_for(capability, built.split()) == runs


@pytest.mark.parametrize(
    ("name", "capability", "built", "sentence"),
    [
        (
            "V100",
            (7, 0),
            "80 90a",
            "x is on cuda:0, but this build is for compute capability 8.0 and 9.0a, and V100 has 7.0: "
            "the kernels need 8.0 or newer",
        ),
        (
            "B200",
            (10, 0),
            "90a",
            "x is on cuda:0, but this build is for compute capability 9.0a, and B200 has 10.0: "
            "build it with TORCH_CUDA_ARCH_LIST=10.0",
        ),
    ],
)
def test_an_unsupported_gpu_is_said(gpus, monkeypatch, name, capability, built, sentence):
    gpus(built, **{name: capability})
    with pytest.raises(RuntimeError) as caught:
        on_gpu(monkeypatch)
    assert str(caught.value) == sentence


def test_a_build_without_cuda_ops_is_said(gpus, monkeypatch):
    gpus("", A10=(8, 6))
    monkeypatch.setattr(library, "HAS_CUDA", False)
    with pytest.raises(RuntimeError, match=r"^x is on cuda:0, but this build has CPU ops alone; build"):
        on_gpu(monkeypatch)


def test_a_supported_gpu_is_let_through(gpus, monkeypatch):
    gpus("80", A10=(8, 6))
    assert on_gpu(monkeypatch).shape == (1, 6, 2, 8)


def on_gpu(monkeypatch) -> torch.Tensor:
    """An op on a tensor of the first GPU, as far as it gets without one: to the result's shape."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(1, 6, 2, 8, device="cuda:0")
        return selfforcing_ext.rope_3d(x, (1, 2, 3))
