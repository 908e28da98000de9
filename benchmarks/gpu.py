"""The CUDA ops beside what else there is, every row with its target: a few minutes on one GPU.

    python benchmarks/gpu.py [--json FILE] [--path mma|hopper ...] [--attention] [--only TEXT] [--seconds S]
    python benchmarks/gpu.py --once       each of our attention kernels once, for a profiler
    python benchmarks/gpu.py --rehearse   all of it on small shapes on the CPU: proves this file, times nothing

A row is a problem and one of our paths: the kernels of every GPU since Ampere ("mma") or Hopper's own ("hopper", chosen
by SELFFORCING_HOPPER, which the ops read at each call; what these do not take runs on the others). Ours, the peers and
the ceiling run in turns in one process; times are medians. A ratio is our rate over the peer's: the peer's time over
ours, where both do the same work. A peer that is not there or fails says so in its row; its outputs are held against
ours before anything is timed. The file is written anew after every case.

Ceilings: a matrix product of 8192 in bfloat16, a copy of 512 MB. GPU times come from events around a call that was
queued while the GPU was still busy, so that launching does not count; the row of launches measures wall time instead.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch._functorch.config
from torch import Tensor
from torch.nn.attention import SDPBackend

sys.path.insert(0, str(Path(__file__).parents[1]))

from denoise_loop import BLOCK_FRAMES, SIZES, Stream
from elementwise import Problem, Size, as_tuple, nbytes, problems
from gpu_report import Peer, Row, benchmark_table, write_whole
from peers import Attention, flash_attn, flex_block_causal, sdpa, sdpa_per_block, with_backend

from selfforcing_ext import BlockCausalMask, GraphedBlock, PagedKVCache, block_causal_attention

DTYPE = torch.bfloat16
REPEATS = 9
PREPARATION_SECONDS = 90  # for a peer, compiling included

Outputs = Tensor | tuple[Tensor, ...]
Call = Callable[[], object]


@dataclass(frozen=True)
class Scale:
    """Sizes of the problems; those of Wan2.1 1.3B at 480 x 832 (arXiv 2503.20314), with a window of 21 frames."""

    device: str = "cuda"
    heads: int = 12
    head_dim: int = 128
    frame: tuple[int, int] = (30, 52)
    window: int = 21
    matmul: int = 8192
    copied: int = 2**28  # elements
    videos: int = 32  # of latents, so that they do not fit into a cache
    latents: tuple[int, int, int] = (16, 60, 104)

    @property
    def tokens(self) -> int:
        return self.frame[0] * self.frame[1]

    def randn(self, num_frames: int) -> Tensor:
        return torch.randn(1, num_frames * self.tokens, self.heads, self.head_dim, device=self.device, dtype=DTYPE)


REHEARSAL = Scale("cpu", 2, 32, (2, 3), 21, 64, 2**12, 2, (2, 4, 6))


@dataclass(frozen=True)
class Competitor:
    """A peer before it is there: ``prepare`` may raise, and takes as long as it takes.

    Attributes:
        work: of one call, if it is another than ours; its outputs are then not ours.
        same: its outputs are held against ours.
        ours: it is ours, too: on each path it is timed on that path.
        times_preparation: say how long preparing and the first call took.
    """

    name: str
    prepare: Callable[[], Callable[[], Outputs]]
    work: float | None = None
    same: bool = True
    ours: bool = False
    times_preparation: bool = False


@dataclass(frozen=True)
class Case:
    """One problem.

    Attributes:
        prepare: makes what is timed of ours.
        work: operations, bytes or blocks of a call; unit and scale: what it is printed in.
        ceiling: "matmul", "copy" or "".
        judged_by, at_least, aim, aim_rate: see ``Row``.
        paths: of our kernels.
        wall: measure wall time, launches included.
    """

    name: str
    prepare: Callable[[], Callable[[], Outputs]]
    work: float
    unit: str
    ceiling: str = ""
    competitors: Sequence[Competitor] = ()
    judged_by: str = ""
    at_least: float | None = None
    aim: float | None = None
    aim_rate: float | None = None
    paths: Sequence[str] = ("",)
    wall: bool = False


UNITS = {"TFLOP/s": 1e12, "GB/s": 1e9, "blocks/s": 1.0}


# ---- Measuring


class Clock:
    """How long calls take."""

    def __init__(self, device: str, seconds: float) -> None:
        self.device, self.seconds = device, seconds

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def wall_seconds(self, call: Call) -> float:
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start

    def gpu_seconds(self, call: Call) -> float:
        if self.device != "cuda":
            return self.wall_seconds(call)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)  # half a millisecond, in which the call is queued
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def in_turns(self, calls: dict[str, Call], wall: bool) -> dict[str, float]:
        """Median seconds of each, after one turn to warm up."""
        measure = self.wall_seconds if wall else self.gpu_seconds
        samples: dict[str, list[float]] = {name: [] for name in calls}
        end = time.perf_counter() + self.seconds
        for turn in range(REPEATS + 1):
            for name, call in calls.items():
                taken = measure(call)
                if turn:
                    samples[name].append(taken)
            if turn >= 3 and time.perf_counter() > end:
                break
        return {name: statistics.median(taken) for name, taken in samples.items()}


@contextlib.contextmanager
def on_path(path: str) -> Iterator[None]:
    """Our ops take this path inside; "" leaves it to them."""
    if not path:
        yield
        return
    before = os.environ.get("SELFFORCING_HOPPER")
    os.environ["SELFFORCING_HOPPER"] = str(int(path == "hopper"))
    try:
        yield
    finally:
        del os.environ["SELFFORCING_HOPPER"]
        if before is not None:
            os.environ["SELFFORCING_HOPPER"] = before


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raises TimeoutError inside when the time is over."""

    def interrupt(*_: object) -> None:
        raise TimeoutError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def reason_of(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:90] if lines else ''}".replace("|", "/")


def difference(ours: Outputs, theirs: Outputs) -> float:
    """The largest difference, over the largest value of theirs; the worst of several outputs."""
    return max(
        float((a.float() - b.float()).abs().max() / b.float().abs().max())
        for a, b in zip(as_tuple(ours), as_tuple(theirs), strict=True)
    )


@dataclass
class Contest:
    """Everybody who is ready to be timed, and why others are not."""

    clock: Clock
    outputs: dict[str, Outputs] = field(default_factory=dict)  # ours, by path
    failed: dict[str, str] = field(default_factory=dict)
    calls: dict[str, Call] = field(default_factory=dict)
    peers: dict[tuple[str, str], Peer] = field(default_factory=dict)  # by path and name
    call_of: dict[tuple[str, str], str] = field(default_factory=dict)  # of peers

    def admit_ours(self, case: Case, path: str) -> None:
        try:
            with on_path(path):
                call = case.prepare()
                self.outputs[path] = call()
                self.clock.synchronize()
            self.calls[f"ours {path}"] = pathed(call, path)
        except Exception as error:
            self.failed[path] = reason_of(error)

    def admit(self, competitor: Competitor) -> None:
        for paths in [[path] for path in self.outputs] if competitor.ours else [list(self.outputs)]:
            self._admit(competitor, paths, paths[0] if competitor.ours else "")

    def _admit(self, competitor: Competitor, paths: Sequence[str], own_path: str) -> None:
        """A peer of ours on these paths."""
        name = competitor.name
        try:
            with at_most(PREPARATION_SECONDS), on_path(own_path):
                start = time.perf_counter()
                call = competitor.prepare()
                theirs = call()
                self.clock.synchronize()
                note = f"ready after {time.perf_counter() - start:.1f} s" if competitor.times_preparation else ""
                for path in paths:
                    error = difference(self.outputs[path], theirs) if competitor.same else None
                    self.peers[path, name] = Peer(name, error=error, note=note)
                call()  # some can run once alone
                self.clock.synchronize()
        except Exception as error:  # whatever a peer lacks, the others run
            self.peers |= {(path, name): Peer(name, note=reason_of(error)) for path in paths}
            return
        self.calls[f"{name} {own_path}"] = pathed(call, own_path)
        self.call_of |= {(path, name): f"{name} {own_path}" for path in paths}


def measure(case: Case, clock: Clock, ceilings: dict[str, tuple[Call, float]], paths: Sequence[str]) -> list[Row]:
    """A row for every path of ours that is asked for."""
    target = {name: getattr(case, name) for name in ("unit", "ceiling", "judged_by", "at_least", "aim", "aim_rate")}
    contest = Contest(clock)
    for path in [path for path in case.paths if path in paths]:
        contest.admit_ours(case, path)
    rows = [Row(case.name, path, **target, note=note) for path, note in contest.failed.items()]
    if not contest.outputs:
        return rows
    for competitor in case.competitors:
        contest.admit(competitor)
    calls = dict(contest.calls)
    if case.ceiling:
        calls["ceiling"] = ceilings[case.ceiling][0]
    seconds = clock.in_turns(calls, case.wall)
    scale = UNITS[case.unit]
    for path in contest.outputs:
        rate = case.work / seconds[f"ours {path}"] / scale
        peers = []
        for competitor in case.competitors:
            peer = contest.peers[path, competitor.name]
            if (path, peer.name) in contest.call_of:
                taken = seconds[contest.call_of[path, peer.name]]
                ratio = rate / ((competitor.work or case.work) / taken / scale)
                peer = replace(peer, milliseconds=1e3 * taken, ratio=ratio)
            peers.append(peer)
        reached = ceilings[case.ceiling][1] / seconds["ceiling"] / scale if case.ceiling else None
        milliseconds = 1e3 * seconds[f"ours {path}"]
        rows.append(Row(case.name, path, milliseconds, rate, **target, ceiling_rate=reached, peers=peers))
    return rows


def pathed(call: Call, path: str) -> Call:
    def run() -> object:
        with on_path(path):
            return call()

    return run


def measured_ceilings(scale: Scale) -> dict[str, tuple[Call, float]]:
    """A call, and the work that it does."""
    n = scale.matmul
    a, b = (torch.randn(n, n, device=scale.device, dtype=DTYPE) for _ in range(2))
    source = torch.zeros(scale.copied, device=scale.device, dtype=DTYPE)
    target = torch.empty_like(source)
    return {
        "matmul": (lambda: torch.mm(a, b), 2.0 * n**3),
        "copy": (lambda: target.copy_(source), 2.0 * source.nbytes),
    }


# ---- The cases

PATHS = ("mma", "hopper")
ATTENTION = {"unit": "TFLOP/s", "ceiling": "matmul", "paths": PATHS}
CUDNN, FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION


def forward_of(attention: Attention, tensors: Sequence[Tensor]) -> Callable[[], Outputs]:
    def call() -> Outputs:
        with torch.no_grad():
            return attention(*tensors)

    return call


def backward_of(attention: Attention, tensors: Sequence[Tensor], grad: Tensor) -> Callable[[], Outputs]:
    """Backward alone: forward has run."""
    inputs = [x.detach().requires_grad_() for x in tensors]
    out = attention(*inputs)
    return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)


def ours(mask: BlockCausalMask | None = None) -> Attention:
    return lambda q, k, v: block_causal_attention(q, k, v, mask)


def without_mask(scale: Scale, num_frames: int, at_least: float, aim: float, aim_rate: float | None) -> Case:
    """A block of the newest frames over the whole window."""
    tensors = scale.randn(num_frames), scale.randn(scale.window), scale.randn(scale.window)
    queries, keys = (x.shape[1] for x in tensors[:2])
    peers = {"cuDNN": lambda: with_backend(sdpa, CUDNN), "SDPA flash": lambda: with_backend(sdpa, FLASH)}
    peers |= {f"flash-attn {version}": lambda version=version: flash_attn(version) for version in (2, 3)}
    return Case(
        f"forward, {queries:,} on {keys:,}",
        lambda: forward_of(ours(), tensors),
        4.0 * queries * keys * scale.heads * scale.head_dim,
        competitors=[Competitor(name, lambda make=make: forward_of(make(), tensors)) for name, make in peers.items()],
        judged_by="cuDNN",
        at_least=at_least,
        aim=aim,
        aim_rate=aim_rate,
        **ATTENTION,
    )


def backward_without_mask(scale: Scale) -> Case:
    tensors = scale.randn(BLOCK_FRAMES), scale.randn(scale.window), scale.randn(scale.window)
    grad = scale.randn(BLOCK_FRAMES)
    queries, keys = (x.shape[1] for x in tensors[:2])
    peers = {"cuDNN": lambda: with_backend(sdpa, CUDNN), "SDPA flash": lambda: with_backend(sdpa, FLASH)}
    peers |= {f"flash-attn {version}": lambda version=version: flash_attn(version) for version in (2, 3)}
    return Case(
        f"backward, {queries:,} on {keys:,}",
        lambda: backward_of(ours(), tensors, grad),
        10.0 * queries * keys * scale.heads * scale.head_dim,
        competitors=[
            Competitor(name, lambda make=make: backward_of(make(), tensors, grad)) for name, make in peers.items()
        ],
        judged_by="cuDNN",
        at_least=0.7,
        aim=1.0,
        aim_rate=450,
        **ATTENTION,
    )


def block_causal(scale: Scale, backward: bool) -> Case:
    """The mask of training: the whole window as a video of blocks."""
    mask = BlockCausalMask(scale.window, scale.tokens, BLOCK_FRAMES)
    tensors = tuple(scale.randn(scale.window) for _ in range(3))
    grad = scale.randn(scale.window)
    pairs = sum((end - start) * end for start, end in mask.frame_blocks) * scale.tokens**2
    per_pair = (10.0 if backward else 4.0) * scale.heads * scale.head_dim

    def prepared(make: Callable[[], Attention]) -> Callable[[], Callable[[], Outputs]]:
        if backward:
            return lambda: backward_of(make(), tensors, grad)
        return lambda: forward_of(make(), tensors)

    def flex() -> Attention:
        # With it a compiled backward can run once alone.
        torch._functorch.config.donated_buffer = False
        return flex_block_causal(mask, scale.device, compiled=scale.device == "cuda")

    return Case(
        f"{'backward' if backward else 'forward'}, block-causal, {mask.seqlen:,} tokens",
        prepared(lambda: ours(mask)),
        per_pair * pairs,
        competitors=[
            Competitor("FlexAttention", prepared(flex), times_preparation=True),
            Competitor("SDPA flash per block", prepared(lambda: with_backend(sdpa_per_block(mask), FLASH))),
            Competitor("cuDNN per block", prepared(lambda: with_backend(sdpa_per_block(mask), CUDNN))),
            Competitor(
                "cuDNN without mask, by rate",
                prepared(lambda: with_backend(sdpa, CUDNN)),
                work=per_pair * mask.seqlen**2,
                same=False,
            ),
        ],
        judged_by="cuDNN without mask, by rate" if backward else "FlexAttention",
        at_least=0.7 if backward else 1.5,
        aim=1.0 if backward else 2.0,
        aim_rate=450 if backward else 570,
        **ATTENTION,
    )


def filled_cache(scale: Scale, **options: object) -> PagedKVCache:
    """A window of pages that has gone around its ring."""
    cache = PagedKVCache(
        1,
        scale.heads,
        scale.head_dim,
        scale.tokens,
        window_frames=scale.window,
        dtype=DTYPE,
        device=scale.device,
        **options,
    )
    generator = torch.Generator(device=scale.device).manual_seed(0)
    shape = (1, BLOCK_FRAMES * scale.tokens, scale.heads, scale.head_dim)
    with torch.no_grad():
        for _ in range(scale.window // BLOCK_FRAMES + 2):
            k, v = (torch.randn(shape, device=scale.device, dtype=DTYPE, generator=generator) for _ in range(2))
            cache.write(0, k, v)
            cache.commit(BLOCK_FRAMES)
    return cache


def contiguous_past(scale: Scale, cache: PagedKVCache) -> tuple[Tensor, Tensor]:
    """What the next block sees of the cache, in one piece."""
    stream, pages = cache.streams[0], cache.pool.layers[0]
    newest = stream.num_frames - (scale.window - BLOCK_FRAMES)
    page, slot = stream.places([(newest, stream.num_frames)])
    k, v = (tensor[page, slot].unsqueeze(0) for tensor in (pages.k_pages, pages.v_pages))
    return k, v


def paged(scale: Scale) -> Case:
    cache = filled_cache(scale)
    block = tuple(scale.randn(BLOCK_FRAMES) for _ in range(3))
    q, *own = block
    k, v = (torch.cat(pair, dim=1) for pair in zip(contiguous_past(scale, cache), own, strict=True))
    attend = forward_of(lambda q, k, v: cache.attend(0, q, k, v), block)
    return Case(
        f"attend, {q.shape[1]:,} on {k.shape[1]:,} in a paged ring",
        lambda: attend,
        4.0 * q.shape[1] * k.shape[1] * scale.heads * scale.head_dim,
        competitors=[Competitor("ours, contiguous", lambda: forward_of(ours(), (q, k, v)), ours=True)],
        judged_by="ours, contiguous",
        at_least=0.97,
        aim=1.0,
        **ATTENTION,
    )


def other_pages(scale: Scale, name: str, options: dict[str, object]) -> Case:
    """Another way to read the past, beside plain pages."""
    plain, other = filled_cache(scale), filled_cache(scale, **options)
    block = tuple(scale.randn(BLOCK_FRAMES) for _ in range(3))
    tokens = scale.window * scale.tokens

    def attend(cache: PagedKVCache) -> Callable[[], Outputs]:
        return forward_of(lambda q, k, v: cache.attend(0, q, k, v), block)

    return Case(
        f"attend, pages {name}",
        lambda: attend(other),
        4.0 * block[0].shape[1] * tokens * scale.heads * scale.head_dim,
        competitors=[Competitor("plain pages", lambda: attend(plain), same="quantization" in options, ours=True)],
        **ATTENTION,
    )


PAGES: dict[str, dict[str, object]] = {
    "int8": {"quantization": "int8"},
    "fp8_e4m3": {"quantization": "fp8_e4m3"},
    "int4": {"quantization": "int4"},
    "rotated on reading": {"rope": "on_read"},
}

#: Ops on latents; the others are on tokens.
LATENT_OPS = ("denoise_x0", "denoise_step", "guided_denoise_step", "add_noise", "dmd_gradient")


def elementwise(scale: Scale) -> Iterator[Callable[[], Case]]:
    """Fused ops against a copy of as many bytes."""
    whole = Size(1, (scale.window, *scale.frame), scale.heads, scale.head_dim, (1, 1, 1))
    many = Size(scale.videos, (scale.window, 1, 1), 1, 8, scale.latents)
    for size, on_latents in ((whole, False), (many, True)):
        with torch.device(scale.device):
            made = [problem for problem in problems(size, DTYPE) if (problem.name in LATENT_OPS) == on_latents]
        for problem in made:
            yield lambda problem=problem: fused(scale, problem)
    yield from cache_writes(scale)


def fused(scale: Scale, problem: Problem) -> Case:
    def call() -> Outputs:
        with torch.no_grad():
            return problem.ours(*problem.inputs, *problem.constants)

    moved = nbytes([*problem.inputs, *problem.constants]) + nbytes(as_tuple(call()))
    return against_copy(scale, problem.name, call, moved)


def cache_writes(scale: Scale) -> Iterator[Callable[[], Case]]:
    """A window at once, so that it does not fit into a cache of the GPU; alone, and with what comes before it."""
    shape = scale.heads, scale.head_dim, scale.tokens
    cache = PagedKVCache(1, *shape, window_frames=scale.window, dtype=DTYPE, device=scale.device)
    k, v = scale.randn(scale.window), scale.randn(scale.window)
    projected = k.flatten(2)
    weight = torch.rand(projected.shape[2], device=scale.device)
    grid = (scale.window, *scale.frame)

    def write() -> Outputs:
        cache.write(0, k, v)
        return ()

    def norm_rope_write() -> Outputs:
        with torch.no_grad():
            return cache.norm_rope_write(0, projected, v, weight, grid)

    yield lambda: against_copy(scale, "kv_cache write", write, 4 * k.nbytes)
    yield lambda: against_copy(scale, "norm_rope_write", norm_rope_write, 5 * k.nbytes)


def against_copy(scale: Scale, name: str, call: Callable[[], Outputs], moved: int) -> Case:
    source = torch.zeros(moved // 2, device=scale.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return Case(
        name,
        lambda: call,
        moved,
        "GB/s",
        "copy",
        [Competitor("a copy of as many bytes", lambda: lambda: target.copy_(source), same=False)],
        judged_by="a copy of as many bytes",
        at_least=0.8,
        aim=0.9,
    )


def launches(scale: Scale) -> Case:
    """Four steps and the clean pass of a model whose kernels take less time than launching them."""

    def prepared(graphed: bool) -> Callable[[], Callable[[], Outputs]]:
        def prepare() -> Callable[[], Outputs]:
            with torch.no_grad():
                stream = Stream(SIZES["demo"], DTYPE, "ext", scale.device)
            block = GraphedBlock(stream.cache, BLOCK_FRAMES, stream.block) if graphed else without_grad(stream.block)
            for _ in range(2):  # a graph's first call runs as it is, the second captures
                block()
            return block

        return prepare

    return Case(
        "a block of the demo's model as one CUDA graph",
        prepared(graphed=True),
        1.0,
        "blocks/s",
        competitors=[Competitor("eager", prepared(graphed=False))],
        judged_by="eager",
        at_least=3.0,
        aim=5.0,
        wall=True,
    )


def without_grad(call: Callable[[], Outputs]) -> Callable[[], Outputs]:
    def run() -> Outputs:
        with torch.no_grad():
            return call()

    return run


def unmasked(scale: Scale) -> Iterator[Callable[[], Case]]:
    """Attention over a window, contiguous and in pages."""
    yield lambda: without_mask(scale, BLOCK_FRAMES, 0.85, 1.05, 650)
    yield lambda: without_mask(scale, 1, 0.8, 1.0, None)
    yield lambda: backward_without_mask(scale)
    yield lambda: paged(scale)
    for name, options in PAGES.items():
        grid = {"rope_grid": scale.frame} if "rope" in options else {}
        yield lambda name=name, options=options | grid: other_pages(scale, name, options)


def masked(scale: Scale) -> Iterator[Callable[[], Case]]:
    for backward in (False, True):
        yield lambda backward=backward: block_causal(scale, backward)


def all_cases(scale: Scale) -> Iterator[Callable[[], Case]]:
    """Made when it is their turn; FlexAttention, which has to be compiled, comes last."""
    yield from unmasked(scale)
    yield lambda: launches(scale)
    yield from elementwise(scale)
    yield from masked(scale)


def attention_cases(scale: Scale) -> Iterator[Callable[[], Case]]:
    return itertools.chain(unmasked(scale), masked(scale))


def available_paths(device: str) -> tuple[str, ...]:
    has_hopper = device == "cuda" and torch.cuda.get_device_capability() == (9, 0)
    return PATHS if has_hopper else PATHS[:1]


def named(makers: Iterator[Callable[[], Case]], text: str) -> Iterator[Case]:
    """Cases whose name has the text; one that cannot be made is reported and left out."""
    for make in makers:
        try:
            case = make()
        except Exception as error:
            print(f"a case could not be made: {reason_of(error)}", file=sys.stderr)
            continue
        if text in case.name:
            yield case


def run_once(scale: Scale, text: str, paths: Sequence[str]) -> None:
    """Every attention kernel of ours once, on every path."""
    for case in named(attention_cases(scale), text):
        for path in paths:
            with on_path(path):
                case.prepare()()


def rows_of(case: Case, clock: Clock, ceilings: dict[str, tuple[Call, float]], paths: Sequence[str]) -> list[Row]:
    try:
        return measure(case, clock, ceilings, ("", *paths))
    except Exception as error:  # memory, for example: the other cases run
        return [Row(case.name, note=reason_of(error))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument(
        "--path", nargs="+", choices=PATHS, help="of our attention kernels; those of this GPU if not given"
    )
    parser.add_argument("--only", default="", help="cases whose name has this text")
    parser.add_argument("--attention", action="store_true", help="cases of attention alone, which have paths")
    parser.add_argument("--seconds", type=float, default=3.0, help="per case, at most about")
    parser.add_argument("--once", action="store_true", help="run each of our attention kernels once and time nothing")
    parser.add_argument("--rehearse", action="store_true", help="small shapes on the CPU")
    arguments = parser.parse_args()
    if not arguments.rehearse and not torch.cuda.is_available():
        print("no CUDA device: nothing is measured")
        return
    scale = REHEARSAL if arguments.rehearse else Scale()
    paths = arguments.path or available_paths(scale.device)
    torch.manual_seed(0)
    if arguments.once:
        run_once(scale, arguments.only, paths)
        return
    clock, ceilings, rows = Clock(scale.device, arguments.seconds), measured_ceilings(scale), []
    makers = attention_cases(scale) if arguments.attention else all_cases(scale)
    for case in named(makers, arguments.only):
        rows += rows_of(case, clock, ceilings, paths)
        if arguments.json:
            write_whole(arguments.json, json.dumps([row.to_json() for row in rows], indent=1) + "\n")
        print(f"{case.name}: done", file=sys.stderr, flush=True)
    print(benchmark_table(rows))


if __name__ == "__main__":
    main()
