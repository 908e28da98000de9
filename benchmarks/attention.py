"""Attention against what torch offers: time, ratio, GFLOP/s, and share of the multiply-add ceiling.

    python benchmarks/attention.py [--case NAME ...] [--dtype float32|bfloat16|float16 ...] [--pass NAME ...]
                                   [--seconds S] [--threads N] [--flex] [--json FILE]

Every row is a median over rounds in which ours, the peers (peers.py) and the ceilings run in turns in one process.
With --flex a compiled FlexAttention takes part in the forward passes under a mask; compiling it takes a minute. GFLOP/s
count the visible pairs alone: 4 D operations a pair forward, 10 D backward. "ratio" is the peer's time over ours. The
ceiling is a loop of multiply-adds in registers (fma_ceiling.cpp); the matrix product is torch.mm of size 1024.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from ceiling import fma_loop, gemm, rate
from peers import Attention, flex, sdpa, sdpa_per_block, sdpa_per_span

from selfforcing_ext import BlockCausalMask, block_causal_attention

ONE_THREAD = "ours, 1 thread"
SHORTEST_TURN = 3e-3  # seconds: short calls are repeated, so that waking the threads counts once and not every time


@dataclass(frozen=True)
class Case:
    batch: int
    heads: int
    head_dim: int
    queries: int = 0  # without a mask
    keys: int = 0
    mask: BlockCausalMask | None = None
    # of "SDPA", "SDPA, mask", "SDPA per block", "SDPA per span" and ONE_THREAD
    peers: tuple[str, ...] = field(default=("SDPA",))

    @property
    def lengths(self) -> tuple[int, int]:
        return (self.queries, self.keys) if self.mask is None else (self.mask.seqlen, self.mask.seqlen)

    @property
    def pairs(self) -> int:
        if self.mask is None:
            return self.queries * self.keys
        table = self.mask.spans()
        rows, widths = table.block_starts.diff(), table.spans.diff(dim=1).squeeze(1)
        return int((rows.repeat_interleave(table.span_offsets.diff()) * widths).sum())

    def operations(self, pass_name: str) -> float:
        per_pair = {"forward": 4.0, "backward": 10.0, "forward+backward": 14.0}[pass_name]
        return per_pair * self.batch * self.heads * self.head_dim * self.pairs


PER_BLOCK, PER_SPAN = ("SDPA per block", "SDPA, mask"), ("SDPA per span",)
THREE = 3  # frames of a block, as Self-Forcing trains (arXiv 2506.08009)
CASES = {
    # Wan2.1 1.3B at 480x832 (arXiv 2503.20314): a third of a block's 4680 queries, on a block of keys and on more
    "1560 on 4680, D128": Case(1, 12, 128, 1560, 4680),
    "1560 on 8190, D128": Case(1, 12, 128, 1560, 8190),
    "1560 on 4680, D64": Case(1, 12, 64, 1560, 4680),
    "1560 on 8190, D64": Case(1, 12, 64, 1560, 8190),
    # 21 latent frames, with about a sixth of their tokens
    "block-causal": Case(1, 4, 64, mask=BlockCausalMask(21, 256, THREE), peers=PER_BLOCK),
    # frames that fill no tile
    "frames of 195": Case(1, 4, 64, mask=BlockCausalMask(21, 195, THREE), peers=PER_SPAN),
    "frames of 195, window, sink": Case(
        1, 4, 64, mask=BlockCausalMask(21, 195, THREE, window_frames=9, sink_frames=1), peers=PER_SPAN
    ),
    "frames of 195, teacher forcing": Case(
        1, 4, 64, mask=BlockCausalMask(21, 195, THREE, teacher_forcing=True), peers=PER_SPAN
    ),
    "frames of 1560": Case(1, 1, 128, mask=BlockCausalMask(21, 1560, THREE), peers=PER_SPAN),
    "frames of 1560, window, sink": Case(
        1, 1, 128, mask=BlockCausalMask(21, 1560, THREE, window_frames=9, sink_frames=1), peers=PER_SPAN
    ),
    # the size of configs/demo.yaml: one video, a batch's first and fourth block, a step of teacher forcing
    "64 on 512, one video": Case(1, 4, 32, 64, 512),
    "64 on 512, eight videos": Case(8, 4, 32, 64, 512),
    "demo's first block": Case(32, 3, 32, 48, 48),
    "demo's fourth block": Case(32, 3, 32, 48, 192),
    "demo's teacher forcing": Case(
        16, 3, 32, mask=BlockCausalMask(12, 16, THREE, teacher_forcing=True), peers=PER_BLOCK
    ),
    # threads that share a head
    "one head": Case(1, 1, 128, 1560, 4680, peers=("SDPA", ONE_THREAD)),
    "one head, few queries": Case(1, 1, 128, 64, 32760, peers=("SDPA", ONE_THREAD)),
}
PASSES = ("forward", "backward", "forward+backward")
DTYPES = ("float32", "bfloat16", "float16")


def peer(name: str, mask: BlockCausalMask | None) -> Attention:
    if mask is None:
        return sdpa
    makers = {"SDPA per block": sdpa_per_block, "SDPA per span": sdpa_per_span}
    return makers[name](mask) if name in makers else partial(sdpa, mask=mask.dense())


def on_threads(num_threads: int, run: Callable[[], object]) -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        return run()
    finally:
        torch.set_num_threads(before)


class Run:
    """One pass of one attention on given inputs; the graph of a backward pass is made once."""

    def __init__(self, attend: Attention, pass_name: str, inputs: tuple[Tensor, Tensor, Tensor], grad: Tensor) -> None:
        if pass_name == "forward":  # FlexAttention refuses inputs with gradient on the CPU, even under no_grad
            inputs = tuple(x.detach() for x in inputs)
        self.attend, self.pass_name, self.inputs, self.grad = attend, pass_name, inputs, grad
        self.out = attend(*inputs) if pass_name == "backward" else None

    def __call__(self) -> None:
        if self.pass_name == "forward":
            self.attend(*self.inputs)
            return
        out = self.attend(*self.inputs) if self.out is None else self.out
        torch.autograd.grad(out, self.inputs, self.grad, retain_graph=self.out is not None)


def once(function: Callable[[], object], calls: int) -> float:
    """Seconds of a call, of so many in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def medians(functions: dict[str, Callable[[], object]], rates: dict[str, Callable[[], float]], seconds: float) -> dict:
    """Median seconds of each function and median rate of each ceiling, all of them in turns for about ``seconds``."""
    for function in functions.values():
        function()
    calls = {name: 1 + int(SHORTEST_TURN / once(function, 1)) for name, function in functions.items()}
    samples: dict[str, list[float]] = {name: [] for name in (*functions, *rates)}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(samples.values()))) < 5:
        for name, function in functions.items():
            samples[name].append(once(function, calls[name]))
        for name, run in rates.items():
            samples[name].append(rate(run))
    return {name: statistics.median(values) for name, values in samples.items()}


def measure(name: str, dtype: torch.dtype, arguments: argparse.Namespace) -> list[dict]:
    case = CASES[name]
    torch.manual_seed(0)
    num_queries, num_keys = case.lengths
    q, grad = (torch.randn(case.batch, num_queries, case.heads, case.head_dim).to(dtype) for _ in range(2))
    k, v = (torch.randn(case.batch, num_keys, case.heads, case.head_dim).to(dtype) for _ in range(2))
    inputs = tuple(x.requires_grad_() for x in (q, k, v))
    ceilings = {"ceiling": fma_loop(dtype, arguments.threads), "gemm": gemm(dtype)}
    ours = partial(block_causal_attention, mask=case.mask)
    attends: dict[str, Attention] = {"ours": ours}
    attends |= {label: ours if label == ONE_THREAD else peer(label, case.mask) for label in case.peers}
    if arguments.flex and case.mask is not None:
        attends["FlexAttention"] = flex(case.mask)
    rows = []
    for pass_name in arguments.passes:
        functions: dict[str, Callable[[], object]] = {}
        for label, attend in attends.items():
            if label == "FlexAttention" and pass_name != "forward":
                continue
            run = Run(attend, pass_name, inputs, grad)
            functions[label] = partial(on_threads, 1, run) if label == ONE_THREAD else run
        found = medians(functions, ceilings, arguments.seconds)
        operations = case.operations(pass_name)
        rows += [
            {
                "case": name,
                "dtype": str(dtype).removeprefix("torch."),
                "pass": pass_name,
                "what": label,
                "milliseconds": found[label] * 1e3,
                "gflops": operations / found[label] / 1e9,
                "of_ceiling": operations / found[label] / found["ceiling"],
                "ratio": found[label] / found["ours"],
                "ceiling_gflops": found["ceiling"] / 1e9,
                "gemm_gflops": found["gemm"] / 1e9,
            }
            for label in functions
        ]
    return rows


def show(rows: list[dict]) -> None:
    for row in rows:
        if row["what"] == "ours":
            print(
                f"\n{row['case']}, {row['dtype']}, {row['pass']}   "
                f"(ceiling {row['ceiling_gflops']:.0f} GFLOP/s, torch.mm {row['gemm_gflops']:.0f})"
            )
        print(
            f"  {row['what']:<16} {row['milliseconds']:10.3f} ms {row['gflops']:8.1f} GFLOP/s "
            f"{row['of_ceiling']:6.1%} of ceiling   ratio {row['ratio']:5.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--pass", nargs="+", choices=PASSES, default=list(PASSES), dest="passes")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each pass of each case (default: 2)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--flex", action="store_true", help="also a compiled FlexAttention, forward")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} threads, {torch.backends.cpu.get_cpu_capability()}")
    rows = []
    for name in arguments.case:
        for dtype in arguments.dtype:
            rows += measure(name, getattr(torch, dtype), arguments)
            show([row for row in rows if row["case"] == name and row["dtype"] == dtype])
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
