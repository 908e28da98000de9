"""Compiles every CUDA source for every architecture and prints what each kernel needs; needs nvcc but no GPU.

Sources and flags are those of the build, which CMake is asked for (CMakeLists.txt).

Fails on a compiler error or warning, and when a kernel spills registers or uses local memory: that would be device
memory in the inner loop. Also where the compiler makes Hopper's asynchronous products wait for each other, or does not
let warpgroups exchange registers.

python scripts/check_cuda_kernels.py [ARCHITECTURE ...]   (default: 80 90a 100a 120a)
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPORT = ["-Xptxas=-v", "-Werror=all-warnings"]
# The test of the instructions that a GPU runs first, and how scripts/gpu_check.sh compiles it.
INSTRUCTIONS_TEST = ROOT / "tests/cuda_emulation/test_ptx.cpp"
INSTRUCTIONS_TEST_FLAGS = ["-x", "cu", "-std=c++20"]
# ptxas says these as information: a kernel with asynchronous products that became synchronous, or whose warpgroups keep
# the registers that they start with.
LOST_ON_HOPPER = {
    re.compile(
        r"wgmma\.mma_async instructions are serialized|warpgroup\.\w+ is injected"
    ): "the compiler lets products of warpgroups wait for each other",
    re.compile(r"'setmaxnreg' ignored"): "the compiler lets warpgroups exchange no registers",
}
# Kernels whose warpgroups exchange registers start with as many for each thread as all of three or four could have.
EXCHANGES_REGISTERS = re.compile(r"hopper_(forward|grad_q|grad_kv)_kernel")
REGISTERS_AT_START = {65536 // (128 * warpgroups) // 8 * 8 for warpgroups in (3, 4)}
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Job:
    source: Path
    architecture: str
    flags: list[str]


@dataclass(frozen=True)
class Kernel:
    source: str
    architecture: str
    name: str
    registers: int
    shared_bytes: int  # static; dynamic shared memory is chosen at launch
    local_bytes: int
    spilled_bytes: int

    @property
    def fault(self) -> str:
        if self.local_bytes + self.spilled_bytes > 0:
            return "uses local memory"
        if EXCHANGES_REGISTERS.match(self.name) and self.registers not in REGISTERS_AT_START:
            return f"starts with {self.registers} registers, but must with one of {sorted(REGISTERS_AT_START)}"
        return ""


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    nvcc = str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).exists():
        message = "nvcc was not found; set CUDA_HOME to a toolkit"
        if os.environ.get("CI") == "true":
            raise SystemExit(message)
        print(f"WARNING: {message}. The CUDA kernels were NOT COMPILED.", file=sys.stderr)
        raise SystemExit(0)
    return nvcc


def jobs_of_build(nvcc: str, architectures: list[str]) -> list[Job]:
    """What the build would compile for these architectures, each source for each that it is compiled for."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["cmake", "-S", str(ROOT), "-B", folder, "-G", "Ninja", "-DSELFFORCING_CUDA=ON"]
        command += [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(architectures)}"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(f"{result.stdout}{result.stderr}\n{shlex.join(command)} failed")
        entries = json.loads(Path(folder, "compile_commands.json").read_text())
    jobs = []
    for entry in sorted(entries, key=lambda entry: str(entry["file"])):
        if not entry["file"].endswith(".cu"):
            continue
        words = shlex.split(entry["command"])[1:]
        words = words[: words.index("-c")]  # then come the source and the object
        # Its architectures are compiled one by one, and warnings about spills are told from the report.
        flags = [word for word in words if not word.startswith(("--generate-code=", "-Xptxas=-warn"))]
        named = {name for word in words for name in re.findall(r"\bsm_(\w+)", word)}
        jobs += [Job(Path(entry["file"]), name, flags) for name in architectures if name in named]
    return jobs


def demangle(names: list[str]) -> list[str]:
    """``attention_forward_kernel<float, 64>`` for each mangled name: no namespaces, no parameters."""
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    plain = [
        re.sub(r"\(anonymous namespace\)::|selfforcing::|\w+_cuda::|ptx::", "", line) for line in text.splitlines()
    ]
    return [re.sub(r"^void |\(.*", "", line) for line in plain]


def compile_source(nvcc: str, job: Job) -> list[Kernel]:
    target = f"-gencode=arch=compute_{job.architecture},code=sm_{job.architecture}"
    with tempfile.TemporaryDirectory() as folder:
        files = ["-c", str(job.source), "-o", str(Path(folder, "object.o"))]
        command = [nvcc, *job.flags, *REPORT, target, *files]
        result = subprocess.run(command, capture_output=True, text=True)
    output = result.stdout + result.stderr
    if result.returncode:
        raise SystemExit(f"{output}\n{shlex.join(command)} failed")
    for pattern, meaning in LOST_ON_HOPPER.items():
        if pattern.search(output):
            raise SystemExit(f"{output}\n{job.source.name}: {meaning}")
    entries = list(ENTRY.finditer(output))
    if output.count("Compiling entry function") != len(entries):
        raise SystemExit(f"{output}\nnot every kernel's report was understood")
    names = demangle([entry["name"] for entry in entries])
    kernels = []
    for entry, name in zip(entries, names, strict=True):
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        kernels.append(
            Kernel(
                source=str(job.source.relative_to(ROOT)),
                architecture=job.architecture,
                name=name,
                registers=int(entry["registers"]),
                shared_bytes=int(shared[1]) if shared else 0,
                local_bytes=int(entry["stack"]),
                spilled_bytes=int(entry["stores"]) + int(entry["loads"]),
            )
        )
    return kernels


def main(architectures: list[str]) -> None:
    nvcc = find_nvcc()
    jobs = jobs_of_build(nvcc, architectures)
    jobs += [Job(INSTRUCTIONS_TEST, architecture, INSTRUCTIONS_TEST_FLAGS) for architecture in architectures]
    with ThreadPoolExecutor(max_workers=int(os.environ.get("MAX_JOBS", "2"))) as pool:
        kernels = [kernel for found in pool.map(lambda job: compile_source(nvcc, job), jobs) for kernel in found]
    print(f"{'kernel':66} {'sm':>4} {'registers':>9} {'static smem':>11} {'local':>6} {'spilled':>7}")
    for kernel in kernels:
        print(
            f"{kernel.name[:66]:66} {kernel.architecture:>4} {kernel.registers:9} {kernel.shared_bytes:11} "
            f"{kernel.local_bytes:6} {kernel.spilled_bytes:7}"
        )
    failed = [kernel for kernel in kernels if kernel.fault]
    for kernel in failed:
        print(f"FAILED  {kernel.name} for sm_{kernel.architecture} {kernel.fault}", file=sys.stderr)
    sources = {kernel.source for kernel in kernels}
    print(f"{len(kernels)} kernels from {len(sources)} files, {len(failed)} with a fault")
    if failed or sources <= {str(INSTRUCTIONS_TEST.relative_to(ROOT))}:
        raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1:] or ["80", "90a", "100a", "120a"])
