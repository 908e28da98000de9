"""Compiles every CUDA source for every architecture and prints what each kernel needs; needs nvcc but no GPU.

Fails on a compiler error or warning, and when an attention kernel spills registers or uses local memory: that would be
device memory in the inner loop. Also where the compiler makes Hopper's asynchronous products wait for each other.

python scripts/check_cuda_kernels.py [ARCHITECTURE ...]   (default: 80 90a 100a 120a)
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["-std=c++20", "-O3", "-Xptxas=-v", "-Werror=all-warnings"]
HOPPER = "90a"  # the only architecture that csrc/attention/cuda_hopper*.cu are compiled for
# ptxas says these as information: a kernel with asynchronous products that became synchronous.
STALLED_PRODUCTS = re.compile(r"wgmma\.mma_async instructions are serialized|warpgroup\.\w+ is injected")
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


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
    def fails(self) -> bool:
        return self.source.startswith("csrc/attention/") and self.local_bytes + self.spilled_bytes > 0


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


def demangle(names: list[str]) -> list[str]:
    """``attention_forward_kernel<float, 64>`` for each mangled name: no namespaces, no parameters."""
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    plain = [
        re.sub(r"\(anonymous namespace\)::|selfforcing::|\w+_cuda::|ptx::", "", line) for line in text.splitlines()
    ]
    return [re.sub(r"^void |\(.*", "", line) for line in plain]


def compile_source(nvcc: str, source: Path, architecture: str) -> list[Kernel]:
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *FLAGS, target, "-x", "cu", "-c", str(source), "-o", str(Path(folder, "object.o"))]
        result = subprocess.run(command, capture_output=True, text=True)
    output = result.stdout + result.stderr
    if result.returncode:
        raise SystemExit(f"{output}\n{' '.join(command)} failed")
    if STALLED_PRODUCTS.search(output):
        raise SystemExit(f"{output}\n{source.name}: the compiler lets products of warpgroups wait for each other")
    entries = list(ENTRY.finditer(output))
    if output.count("Compiling entry function") != len(entries):
        raise SystemExit(f"{output}\nnot every kernel's report was understood")
    names = demangle([entry["name"] for entry in entries])
    kernels = []
    for entry, name in zip(entries, names, strict=True):
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        kernels.append(
            Kernel(
                source=str(source.relative_to(ROOT)),
                architecture=architecture,
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
    sources = sorted(ROOT.glob("csrc/*/cuda*.cu"))
    # The test of the instructions that a GPU runs first (scripts/gpu_check.sh).
    sources.append(ROOT / "tests/cuda_emulation/test_ptx.cpp")
    jobs = [
        (nvcc, source, architecture)
        for source in sources
        for architecture in architectures
        if architecture == HOPPER or "hopper" not in source.name
    ]
    with ThreadPoolExecutor(max_workers=int(os.environ.get("MAX_JOBS", "2"))) as pool:
        kernels = [kernel for found in pool.map(lambda job: compile_source(*job), jobs) for kernel in found]
    print(f"{'kernel':66} {'sm':>4} {'registers':>9} {'static smem':>11} {'local':>6} {'spilled':>7}")
    for kernel in kernels:
        print(
            f"{kernel.name[:66]:66} {kernel.architecture:>4} {kernel.registers:9} {kernel.shared_bytes:11} "
            f"{kernel.local_bytes:6} {kernel.spilled_bytes:7}"
        )
    failed = [kernel for kernel in kernels if kernel.fails]
    for kernel in failed:
        print(f"FAILED  {kernel.name} for sm_{kernel.architecture} uses local memory", file=sys.stderr)
    attention = sum(kernel.source.startswith("csrc/attention/") for kernel in kernels)
    print(
        f"{len(kernels)} kernels from {len(sources)} files, {attention} of attention, {len(failed)} with local memory"
    )
    if failed or not attention:
        raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1:] or ["80", "90a", "100a", "120a"])
