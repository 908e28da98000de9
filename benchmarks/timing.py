"""How benchmarks compare: everything runs in turns in one process, and medians count."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

SHORTEST_SAMPLE = 1e-3  # seconds: shorter calls are repeated, so that the clock and waking the threads do not matter
LEAST_SAMPLES = 5


def median_times(functions: Sequence[Callable[[], object]], seconds: float) -> list[float]:
    """Median seconds of a call of each function, from about ``seconds`` in all. Each is called twice before."""
    calls = []
    for function in functions:
        function()
        calls.append(1 + int(SHORTEST_SAMPLE / _time_of(function, 1)))
    samples: list[list[float]] = [[] for _ in functions]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples[0]) < LEAST_SAMPLES:
        for function, count, times in zip(functions, calls, samples, strict=True):
            times.append(_time_of(function, count))
    return [statistics.median(times) for times in samples]


def _time_of(function: Callable[[], object], calls: int) -> float:
    """Seconds of a call, of so many in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls
