"""scripts/gpu_check.sh without a GPU: a rehearsal of the whole script, and its report from numbers that are known."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "gpu_check.sh"


def load_report():
    spec = importlib.util.spec_from_file_location("gpu_report", ROOT / "benchmarks" / "gpu_report.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_report"] = module
    spec.loader.exec_module(module)
    return module


gpu_report = load_report()
Peer, Row = gpu_report.Peer, gpu_report.Row


def run(mode: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "COMMIT": "abc1234", **variables}
    environment |= {"RESULTS": str(folder / "results"), "WORK": str(folder / "work")}
    return subprocess.run([SCRIPT, mode], env=environment, capture_output=True, text=True, cwd=folder)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


FORWARD = Row(
    "forward, 4,680 on 32,760",
    "hopper",
    milliseconds=1.5,
    rate=628.0,
    unit="TFLOP/s",
    ceiling="matmul",
    ceiling_rate=785.0,
    judged_by="cuDNN",
    at_least=0.85,
    aim=1.05,
    aim_rate=650,
    peers=[Peer("cuDNN", 1.56, 1.04, 0.0031), Peer("flash-attn 3", note="ModuleNotFoundError: none | at all")],
)


def test_value_target_and_aim_stand_side_by_side():
    lines = gpu_report.benchmark_table([FORWARD]).splitlines()
    assert {line.count("|") for line in (lines[0], lines[2], lines[3])} == {len(gpu_report.HEADINGS) + 1}
    ours = "forward, 4,680 on 32,760", "hopper", "1.500", "628 TFLOP/s", "80% of matmul"
    assert cells(lines[2]) == [*ours, "cuDNN", "1.560", "1.04", "0.85", "1.05, 650 TFLOP/s", "at least", "3.1e-03"]
    reason = "ModuleNotFoundError: none / at all"
    assert cells(lines[3]) == ["", "", "", "", "", "flash-attn 3", reason, "", "", "", "", ""]


@pytest.mark.parametrize(
    ("ratio", "rate", "verdict"),
    [
        (0.84, 700.0, "below"),
        (0.85, 510.0, "at least"),
        (1.06, 640.0, "at least"),  # as fast as is aimed at beside the peer, but not in itself
        (1.05, 650.0, "aim"),
        (None, 650.0, "not measured"),
    ],
)
def test_verdicts(ratio: float | None, rate: float, verdict: str):
    row = Row(
        "forward",
        rate=rate,
        judged_by="cuDNN",
        at_least=0.85,
        aim=1.05,
        aim_rate=650,
        peers=[Peer("cuDNN", 1.0, ratio)],
    )
    assert row.verdict == verdict


def test_rows_that_have_no_target_or_did_not_run():
    plain = Row("attend, pages int8", "mma", 2.0, 100.0, "TFLOP/s", peers=[Peer("plain pages", 1.0, 0.5)])
    failed = Row("rope_3d", unit="GB/s", judged_by="copy", at_least=0.8, aim=0.9, note="RuntimeError: no")
    assert (plain.verdict, plain.of_ceiling, failed.verdict) == ("", None, "not measured")
    lines = gpu_report.benchmark_table([plain, failed]).splitlines()[2:]
    assert cells(lines[0])[2:] == ["2.000", "100 TFLOP/s", "", "plain pages", "1.000", "0.50", "", "", "", ""]
    assert cells(lines[1])[:4] == ["rope_3d", "", "RuntimeError: no", ""]


def test_rows_survive_json():
    saved = json.loads(json.dumps(FORWARD.to_json()))
    assert Row.from_json(saved) == FORWARD
    assert (saved["value"], saved["verdict"], saved["of_ceiling"]) == (1.04, "at least", 0.8)


NCU = """==PROF== Connected to process 12
"ID","Kernel Name","gpu__time_duration.sum","sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",\
"dram__bytes.sum","launch__registers_per_thread","sm__warps_active.avg.pct_of_peak_sustained_active"
"","","ns","%","byte","register/thread","%"
"0","mma_forward_kernel","3,876,000","41.5","229,500,000","254","12.5"
"1","hopper_forward_kernel","1,500,000","n/a","230000000","168","18.75"
==PROF== Disconnected
"""


def test_ncu():
    kernels = gpu_report.ncu_rows(NCU)
    assert kernels[0] == {
        "kernel": "mma_forward_kernel",
        "ms": pytest.approx(3.876),
        "tensor pipe, %": 41.5,
        "DRAM, MB": pytest.approx(229.5),
        "registers": 254.0,
        "occupancy, %": 12.5,
    }
    table = gpu_report.ncu_table(kernels).splitlines()
    assert cells(table[2]) == ["mma_forward_kernel", "3.876", "41.5", "229.5", "254", "12.5"]
    assert cells(table[3]) == ["hopper_forward_kernel", "1.500", "", "230.0", "168", "18.8"]
    assert gpu_report.ncu_rows("==ERROR== ERR_NVGPUCTRPERM - no permission\n") == []


def test_a_report_of_what_is_there_so_far(tmp_path: Path):
    """A machine that is taken away in the middle of the benchmarks leaves all that was found."""
    work = tmp_path / "work"
    work.mkdir()
    (work / "facts.json").write_text(json.dumps({"device": "some-gpu", "commit": "abc1234", "torch": "2.11"}))
    (work / "parts.tsv").write_text("build\tpassed\t41\nGPU tests\tFAILED\t61\n")
    (work / "GPU-tests.log").write_text("...\n1 failed | 1224 passed\n\n")
    (work / "benchmarks.json").write_text(json.dumps([FORWARD.to_json()]))
    report = [sys.executable, ROOT / "benchmarks" / "gpu_report.py", work, tmp_path / "new" / "some-gpu"]
    subprocess.run(report, check=True)
    found = json.loads((tmp_path / "new" / "some-gpu.json").read_text())
    assert [part["outcome"] for part in found["parts"]] == ["passed", "FAILED"]
    assert found["benchmarks"][0]["verdict"] == "at least"
    text = (tmp_path / "new" / "some-gpu.md").read_text()
    assert text.startswith("# some-gpu, commit abc1234")
    assert "| GPU tests | FAILED | 61 s | 1 failed / 1224 passed |" in text
    assert gpu_report.benchmark_table([FORWARD]) in text


def test_a_dry_run_prints_every_part_and_leaves_nothing(tmp_path: Path):
    result = run("--dry-run", tmp_path, TORCH_CUDA_ARCH_LIST="9.0a")
    assert result.returncode == 0, result.stderr
    titles = [line.split("  ", 1)[1] for line in result.stdout.splitlines() if line.startswith("===")]
    for name in ("instructions", "build", "self-test", "GPU tests", "benchmarks", "benchmarks, Hopper's path", "ncu"):
        assert name in titles
    assert not list(tmp_path.iterdir())
    older = run("--dry-run", tmp_path, TORCH_CUDA_ARCH_LIST="8.0")
    assert "Hopper" not in older.stdout


def test_no_part_starts_without_time(tmp_path: Path):
    result = run("--rehearse", tmp_path, LIMIT="0")
    assert result.returncode == 1
    report = json.loads((tmp_path / "results" / "rehearse-abc1234.json").read_text())
    outcomes = {part["name"]: part["outcome"] for part in report["parts"]}
    assert outcomes["self-test"] == outcomes["benchmarks"] == "NOT RUN, no time is left"


def test_what_a_profiler_runs():
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--once", "--rehearse"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "could not be made" not in result.stderr


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}")
    path.chmod(0o755)


class StandIn:
    """A machine with a Hopper GPU whose programs answer at once, as the test wants: what is left is the script."""

    def __init__(self, folder: Path, hopper_tests: int = 0, self_test: str = "echo 66 passed, 0 failed") -> None:
        self.folder = folder
        (folder / "rows.json").write_text(json.dumps([FORWARD.to_json()]))
        (folder / "kernels.csv").write_text(NCU)
        after = r"""after() { while [ $# -gt 1 ]; do [ "$1" != "$wanted" ] || echo "$2"; shift; done; }"""
        program(
            folder / "cuda/bin/nvcc",
            f'{after}; wanted=-o; program=$(after "$@"); '
            "printf '#!/bin/sh\necho 12 passed, 0 failed\n' >$program; chmod +x $program",
        )
        program(folder / "cuda/bin/compute-sanitizer", "echo ERROR SUMMARY: 0 errors")
        program(
            folder / "cuda/bin/ncu", f'{after}; wanted=--log-file; cp {folder}/kernels.csv $(after "$@"); echo "$*"'
        )
        program(
            folder / "python",
            f"""{after}
case "$*" in
*is_available* | *setup.py* | *check_registration*) ;;
*get_device_name*) echo stand-in ;;
*get_device_capability*) echo 9.0a ;;
*"import xdist"*) exit 1 ;;
*selfforcing_ext.info*) {self_test} ;;
*"-m pytest"*) echo 3 passed; [ "${{SELFFORCING_HOPPER:-0}}" = 0 ] || exit {hopper_tests} ;;
*gpu.py*) echo "$*"; wanted=--json; cp {folder}/rows.json "$(after "$@")" ;;
*) exec {sys.executable} "$@" ;;
esac
""",
        )

    def run(self, **variables: str) -> tuple[int, dict]:
        """How the script ends, and its report."""
        environment = {"PYTHON": str(self.folder / "python"), "CUDA_HOME": str(self.folder / "cuda"), **variables}
        result = run("", self.folder, **environment)
        report = self.folder / "results" / "stand-in-abc1234.json"
        assert report.exists(), result.stdout + result.stderr
        return result.returncode, json.loads(report.read_text())


def test_the_flow_where_all_is_well(tmp_path: Path):
    status, report = StandIn(tmp_path).run()
    assert status == 0
    assert {part["outcome"] for part in report["parts"]} == {"passed"}
    names = [part["name"] for part in report["parts"]]
    assert names == [
        *("instructions", "build", "registration", "self-test", "GPU tests", "GPU tests, Hopper's path"),
        *("benchmarks", "benchmarks, Hopper's path", "ncu"),
        *("memcheck", "memcheck, Hopper's path"),
        *("racecheck", "racecheck, Hopper's path, for information"),
        *("synccheck", "synccheck, Hopper's path, for information"),
    ]
    assert report["parts"][0]["last_line"] == "12 passed, 0 failed"
    assert [row["case"] for row in report["benchmarks"]] == 2 * [FORWARD.case]
    assert [kernel["kernel"] for kernel in report["kernels"]] == ["mma_forward_kernel", "hopper_forward_kernel"]
    assert (report["device"], report["architecture"]) == ("stand-in", "9.0a")
    with tarfile.open(tmp_path / "results" / "stand-in-abc1234-logs.tar.gz") as logs:
        assert {"./build.log", "./ncu.log", "./benchmarks-hopper.json"} <= set(logs.getnames())


def test_parts_that_are_run_again_add_to_the_report(tmp_path: Path):
    machine = StandIn(tmp_path)
    machine.run(PARTS="instructions build tests")
    status, report = machine.run(PARTS="ncu sanitizers")
    assert status == 0
    names = [part["name"] for part in report["parts"]]
    assert names[:3] == ["instructions", "build", "registration"]
    assert {"GPU tests", "ncu", "memcheck, Hopper's path"} <= set(names)
    assert "benchmarks" not in names
    unknown = run("--dry-run", tmp_path, PARTS="sanitize")
    assert unknown.returncode == 1
    assert "PARTS has sanitize, but accepted are: instructions build tests" in unknown.stderr


def test_what_a_bare_machine_lacks_is_said_at_once(tmp_path: Path):
    StandIn(tmp_path)
    program(tmp_path / "bare", f'exec {sys.executable} -S "$@"')  # without packages
    result = run("", tmp_path, PYTHON=str(tmp_path / "bare"), CUDA_HOME=str(tmp_path / "cuda"), PYTHONPATH="")
    assert result.returncode == 1
    assert "nvtx" in result.stderr
    assert "pip download" in result.stderr
    assert not (tmp_path / "results").exists()


def test_a_folder_with_packages_stays_on_the_path(tmp_path: Path):
    _, report = StandIn(tmp_path, self_test='echo "$PYTHONPATH"').run(PYTHONPATH="/packages")
    assert {part["name"]: part["last_line"] for part in report["parts"]}["self-test"] == f"{ROOT}:/packages"


def test_a_path_that_fails_its_tests_is_timed_on_its_own(tmp_path: Path):
    """It may hang or end the process: the rows of the other path are safe by then, and slow tools leave it out."""
    status, report = StandIn(tmp_path, hopper_tests=1).run()
    assert status == 1
    failed = [part["name"] for part in report["parts"] if part["outcome"] == "FAILED"]
    assert failed == ["GPU tests, Hopper's path"]
    last_lines = {part["name"]: part["last_line"] for part in report["parts"]}
    assert "--path mma" in last_lines["benchmarks"]
    assert "--path hopper" in last_lines["benchmarks, Hopper's path"]
    assert last_lines["ncu"].endswith("--once --path mma")
    assert "memcheck" in last_lines
    assert "memcheck, Hopper's path" not in last_lines
    assert len(report["benchmarks"]) == 2


@pytest.mark.slow
def test_a_part_that_hangs_is_ended(tmp_path: Path):
    status, report = StandIn(tmp_path, self_test="sleep 1000").run(LIMIT="13")
    outcomes = {part["name"]: part["outcome"] for part in report["parts"]}
    assert status == 1
    assert outcomes["build"] == "passed"
    assert outcomes["self-test"] == "TIMED OUT"
    assert outcomes["ncu"] == "NOT RUN, no time is left"


@pytest.mark.slow
def test_the_rehearsal(tmp_path: Path):
    """All that needs no GPU really runs: self-test, collection of the GPU tests, every case of the benchmarks."""
    result = run("--rehearse", tmp_path, OMP_NUM_THREADS="1", LIMIT="300")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    report = json.loads((tmp_path / "results" / "rehearse-abc1234.json").read_text())
    outcomes = {part["name"]: part["outcome"] for part in report["parts"]}
    assert {name for name, outcome in outcomes.items() if outcome == "passed"} == {
        "self-test",
        "GPU tests",
        "benchmarks",
    }
    assert outcomes["build"] == outcomes["ncu"] == "NOT RUN, there is no GPU"
    rows = {row["case"]: row for row in report["benchmarks"]}
    with_target = [row for row in rows.values() if row["at_least"] is not None]
    # What the targets speak of: three forward, two backward, the ring, launches and eleven elementwise ops.
    assert len(with_target) == 18
    needs_a_gpu = {row["case"] for row in rows.values() if row["note"]}
    assert needs_a_gpu == {"a block of the demo's model as one CUDA graph"}
    for row in rows.values():
        for peer in row["peers"]:
            assert peer["milliseconds"] or peer["note"], (row["case"], peer["name"])
            assert peer["error"] is None or peer["error"] < 0.2, (row["case"], peer["name"])
    text = (tmp_path / "results" / "rehearse-abc1234.md").read_text()
    assert f"| {with_target[0]['case']} | mma |" in text
