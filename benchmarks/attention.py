"""Attention against what torch offers: time, ratio, GFLOP/s, and share of the multiply-add ceiling.

    python benchmarks/attention.py [--case NAME ...] [--dtype float32|bfloat16|float16 ...] [--seconds S] [--threads N]
                                   [--flex] [--json FILE]

Every row is a median over rounds in which ours, the peers and the ceilings run in turns in one process. Peers: a loop
over the blocks that calls scaled_dot_product_attention on the keys each block sees ("SDPA per block"), one call with a
boolean mask ("SDPA, mask"), and with --flex a compiled FlexAttention (forward only; compiling takes a minute). GFLOP/s
count the visible pairs alone: 4 D operations a pair forward, 14 D with backward. "ratio" is the peer's time over ours.
The ceiling is a loop of multiply-adds in registers (fma_ceiling.cpp); the matrix product is torch.mm of size 1024.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).parents[1]))

from ceiling import fma_loop, gemm, rate

from selfforcing_ext import BlockCausalMask, block_causal_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # [B, L, H, D] each


@dataclass(frozen=True)
class Case:
    batch: int
    heads: int
    head_dim: int
    queries: int = 0  # without a mask
    keys: int = 0
    mask: BlockCausalMask | None = None

    @property
    def lengths(self) -> tuple[int, int]:
        return (self.queries, self.keys) if self.mask is None else (self.mask.seqlen, self.mask.seqlen)

    @property
    def forward_operations(self) -> float:
        pairs = self.queries * self.keys if self.mask is None else int(self.mask.dense().sum())
        return 4.0 * self.batch * self.heads * self.head_dim * pairs


CASES = {
    # 21 latent frames in blocks of 3, as Self-Forcing trains (arXiv 2506.08009), with about a sixth of its tokens
    "block-causal": Case(1, 4, 64, mask=BlockCausalMask(21, 256, frames_per_block=3)),
    # one block of 3 frames of Wan2.1 1.3B at 480x832 (arXiv 2503.20314): 1560 of its 4680 queries, one block of keys
    "unmasked": Case(1, 12, 128, 1560, 4680),
    # configs/demo.yaml: a rollout's first and fourth block, and a step of teacher forcing
    "demo first block": Case(32, 3, 32, 48, 48),
    "demo fourth block": Case(32, 3, 32, 48, 192),
    "demo teacher forcing": Case(16, 3, 32, mask=BlockCausalMask(12, 16, frames_per_block=3, teacher_forcing=True)),
}


DTYPES = ("float32", "bfloat16", "float16")


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def sdpa_per_block(mask: BlockCausalMask) -> Attention:
    table = mask.spans()
    starts, offsets, spans = (x.tolist() for x in (table.block_starts, table.span_offsets, table.spans))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blocks = []
        for block, (first, end) in enumerate(itertools.pairwise(starts)):
            seen = spans[offsets[block] : offsets[block + 1]]
            keys, values = (
                x[:, seen[0][0] : seen[0][1]] if len(seen) == 1 else torch.cat([x[:, i:j] for i, j in seen], 1)
                for x in (k, v)
            )
            blocks.append(sdpa(q[:, first:end], keys, values))
        return torch.cat(blocks, 1)

    return attend


def flex(case: Case) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block_mask = None
    if case.mask is not None:
        visible = case.mask.dense()
        block_mask = create_block_mask(lambda b, h, i, j: visible[i, j], None, None, *case.lengths, device="cpu")
    compiled = torch.compile(flex_attention)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=block_mask).transpose(1, 2)

    return attend


def peers(case: Case, with_flex: bool) -> dict[str, Attention]:
    if case.mask is None:
        chosen: dict[str, Attention] = {"SDPA": sdpa}
    else:
        chosen = {"SDPA per block": sdpa_per_block(case.mask), "SDPA, mask": partial(sdpa, mask=case.mask.dense())}
    if with_flex:
        chosen["FlexAttention"] = flex(case)
    return chosen


def forward(attend: Attention, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> None:
    attend(q.detach(), k.detach(), v.detach())


def forward_backward(attend: Attention, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> None:
    torch.autograd.grad(attend(q, k, v), (q, k, v), grad)


def medians(functions: dict[str, Callable[[], object]], rates: dict[str, Callable[[], float]], seconds: float) -> dict:
    """Median seconds of each function and median rate of each ceiling, all of them in turns for about ``seconds``."""
    for function in functions.values():
        function()
    samples: dict[str, list[float]] = {name: [] for name in (*functions, *rates)}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(samples.values()))) < 5:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            samples[name].append(time.perf_counter() - start)
        for name, run in rates.items():
            samples[name].append(rate(run))
    return {name: statistics.median(values) for name, values in samples.items()}


def measure(name: str, dtype: torch.dtype, arguments: argparse.Namespace) -> list[dict]:
    case = CASES[name]
    torch.manual_seed(0)
    num_queries, num_keys = case.lengths
    q, grad = (torch.randn(case.batch, num_queries, case.heads, case.head_dim).to(dtype) for _ in range(2))
    k, v = (torch.randn(case.batch, num_keys, case.heads, case.head_dim).to(dtype) for _ in range(2))
    for x in (q, k, v):
        x.requires_grad_(True)
    ceilings = {"ceiling": fma_loop(dtype, arguments.threads), "gemm": gemm(dtype)}
    attends: dict[str, Attention] = {"ours": partial(block_causal_attention, mask=case.mask)}
    attends |= peers(case, arguments.flex)
    rows = []
    for pass_name, run, factor in (("forward", forward, 1.0), ("forward+backward", forward_backward, 3.5)):
        functions = {
            label: partial(run, attend, q, k, v, grad)
            for label, attend in attends.items()
            if label != "FlexAttention" or run is forward
        }
        found = medians(functions, ceilings, arguments.seconds)
        operations = factor * case.forward_operations
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
    parser.add_argument(
        "--dtype", nargs="+", choices=["float32", "bfloat16", "float16"], default=["float32", "bfloat16"]
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="for each pass of each case (default: 5)")
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
