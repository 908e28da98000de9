"""The multiply-add ceiling of the CPU, measured: how much a kernel made of products could reach at best."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("fma_ceiling.cpp")
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-std=c++20", "-shared", "-fPIC", "-Wno-psabi")
ITERATIONS = 30_000_000  # a tenth of a second: the workers of torch's pool spin before they leave the cores idle


def fma_loop(dtype: torch.dtype, num_threads: int) -> Callable[[], float]:
    """A function that runs the loop once on ``num_threads`` threads and returns the number of operations done.

    float16 is multiplied as float32; bfloat16 in pairs where the machine can (AVX512-BF16).
    """
    name = "bfloat16_loop" if dtype == torch.bfloat16 else "float32_loop"
    loop = getattr(_library(), name)
    loop.restype, loop.argtypes = ctypes.c_double, [ctypes.c_long]

    def run() -> float:
        threads = [threading.Thread(target=loop, args=(ITERATIONS,)) for _ in range(num_threads - 1)]
        for thread in threads:
            thread.start()
        operations = loop(ITERATIONS)
        for thread in threads:
            thread.join()
        return operations * num_threads

    return run


def gemm(dtype: torch.dtype, size: int = 1024) -> Callable[[], float]:
    """A function that runs torch's own square matrix product and returns the number of operations done."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)

    def run() -> float:
        torch.mm(a, b)
        return 2.0 * size**3

    return run


def rate(run: Callable[[], float]) -> float:
    """Operations per second of one call."""
    start = time.perf_counter()
    operations = run()
    return operations / (time.perf_counter() - start)


def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fma_ceiling.so"
        subprocess.run([os.environ.get("CXX", "c++"), *FLAGS, "-o", path, SOURCE], check=True)
        return ctypes.CDLL(str(path))
