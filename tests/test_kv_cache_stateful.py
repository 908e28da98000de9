"""Random lives of streams on a shared pool: after every step a cache is compared with lists of frames in float64.

The lists are the reference (python_ref/ops/kv_cache.py), which tests/test_reference_kv_cache.py holds to what knows
nothing of caches. Both get the same calls; both must answer alike, or refuse alike, and count the same pages.

HYPOTHESIS_PROFILE=thousands lives 2,000 lives, and others every time (conftest.py).
"""

from __future__ import annotations

import gc
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from compare import assert_close
from hypothesis import HealthCheck, Phase, Verbosity, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

import python_ref.ops.kv_cache as reference
from selfforcing_ext import kv_cache as extension
from selfforcing_ext import past_geometry
from selfforcing_ext.mask import visible_past_of_many
from selfforcing_ext.stream import Stream

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SMALL = st.integers(0, 6)  # which of the streams, frames and so on that there are
STEPS = 25  # of a life
MOST_STREAMS = 4
MOST_BATCHES = 3
MOST_VIEWS = 2


@dataclass(frozen=True)
class Setup:
    """What streams of a pool share."""

    num_pages: int
    page_size: int
    frame_seqlen: int
    num_layers: int
    kv_heads: int
    group: int
    head_dim: int
    dtype: torch.dtype
    quantization: str | None
    has_offset: bool
    rope: str

    def pool(self, package: ModuleType, dtype: torch.dtype, device: str) -> Any:
        shape = self.num_layers, self.kv_heads, self.head_dim
        offset = None
        if self.has_offset and self.quantization is not None:
            offset = torch.linspace(-2, 2, self.num_layers * self.kv_heads * self.head_dim).reshape(shape)
        return package.PagePool(self.num_pages, self.page_size, *shape, dtype, device, self.quantization, offset)

    def batch(self, package: ModuleType, streams: list[Any]) -> Any:
        grid = (1, self.frame_seqlen) if self.rope == "on_read" else None
        return package.PagedKVCache.of_streams(streams, rope=self.rope, rope_grid=grid)


SETUPS = st.builds(
    Setup,
    num_pages=st.integers(4, 80),
    page_size=st.integers(1, 9),
    frame_seqlen=st.integers(1, 4),
    num_layers=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 2),
    head_dim=st.sampled_from((32, 64)),
    dtype=st.sampled_from((torch.float32, torch.float32, torch.bfloat16, torch.float16)),
    quantization=st.sampled_from((None, None, None, "int8", "fp8_e4m3", "int4")),
    has_offset=st.booleans(),
    rope=st.sampled_from(("on_write", "on_read")),
)


@dataclass(frozen=True)
class Video:
    """What a stream is opened with."""

    moving_frames: int | None
    sink_frames: int
    max_frames: int | None
    rollback_frames: int

    def arguments(self) -> dict[str, int | None]:
        window = None if self.moving_frames is None else self.sink_frames + self.moving_frames
        limits = {"max_frames": self.max_frames, "rollback_frames": self.rollback_frames}
        return {"window_frames": window, "sink_frames": self.sink_frames, **limits}


VIDEOS = st.builds(
    Video,
    moving_frames=st.none() | st.integers(1, 5),
    sink_frames=st.integers(0, 2),
    max_frames=st.sampled_from((None, None, None, 4, 12)),
    rollback_frames=st.integers(0, 3),
)


@dataclass(eq=False)
class Pair:
    """The same thing in the package under test and in the reference."""

    tested: Any
    exact: Any


@dataclass(eq=False)
class Batch(Pair):
    streams: list[Pair]
    blocks: list[int] = field(default_factory=list)  # frames of those that are not committed


@dataclass(eq=False)
class Recorded:
    """Attention that waits for its backward."""

    outs: tuple[Tensor, Tensor]
    inputs: list[list[Tensor]]


class Lives(RuleBasedStateMachine):
    """Streams that are opened, written, forked, cut and closed, alone and in batches."""

    package: ModuleType
    device = "cpu"  # of what is tested

    @initialize(setup=SETUPS, videos=st.lists(VIDEOS, min_size=1, max_size=3))
    def make_pool(self, setup: Setup, videos: list[Video]) -> None:
        self.setup = setup
        self.pool = Pair(
            setup.pool(self.package, setup.dtype, self.device), setup.pool(reference, torch.float64, "cpu")
        )
        self.streams: list[Pair] = []
        self.batches: list[Batch] = []
        self.views: list[Batch] = []
        self.recorded: list[Recorded] = []
        self.generator = torch.Generator().manual_seed(0)
        for video in videos:
            self.open_stream(video)
        self.make_batch(0, {1, 2})

    # ---- What is done

    @precondition(lambda self: len(self.streams) < MOST_STREAMS)
    @rule(video=VIDEOS)
    def open_stream(self, video: Video) -> None:
        opened = self._both(self.pool, "open_stream", frame_seqlen=self.setup.frame_seqlen, **video.arguments())
        self.streams.append(opened)

    @precondition(lambda self: self.streams)
    @rule(first=SMALL, others=st.sets(SMALL, max_size=2))
    def make_batch(self, first: int, others: set[int]) -> None:
        chosen = [self.streams[i] for i in {first % len(self.streams)} | {i for i in others if i < len(self.streams)}]
        free = self._free_streams()
        if all(stream in free for stream in chosen):
            self._add_batch(chosen)

    @precondition(lambda self: self.batches)
    @rule(batch=SMALL, block=st.integers(0, 2), num_frames=st.integers(1, 3))
    def write(self, batch: int, block: int, num_frames: int) -> None:
        """A block in all layers, for the first time or again."""
        one = self._pick(self.batches, batch)
        block = min(block, len(one.blocks))
        if not self._is_free(one):
            return
        num_frames = one.blocks[block] if block < len(one.blocks) else num_frames
        for layer in range(self.setup.num_layers):
            _, k, v = self._draw(one, num_frames)
            if not self._both_do(one, "write", (layer, k, v), {"block": block}):
                return
            if block == len(one.blocks):
                one.blocks.append(num_frames)

    @precondition(lambda self: any(batch.blocks for batch in self.batches))
    @rule(batch=SMALL)
    def commit(self, batch: int) -> None:
        one = self._pick([batch for batch in self.batches if batch.blocks], batch)
        if self._both_do(one, "commit", (one.blocks[0],)):
            del one.blocks[0]

    @precondition(lambda self: any(batch.blocks for batch in self.batches))
    @rule(batch=SMALL, block=st.integers(0, 1))
    def drop(self, batch: int, block: int) -> None:
        one = self._pick([batch for batch in self.batches if batch.blocks], batch)
        self._drop(one, block)

    @precondition(lambda self: self.batches)
    @rule(batch=SMALL, blocks=st.lists(st.integers(1, 3), min_size=1, max_size=6))
    def roll_out(self, batch: int, blocks: list[int]) -> None:
        """Blocks one after another, several in a step so that windows fill."""
        one = self._pick(self.batches, batch)
        for num_frames in blocks:
            if not one.blocks:
                self.write(batch, 0, min(num_frames, self._longest_block(one)))
            if one.blocks:
                assert self._both_do(one, "commit", (one.blocks.pop(0),))

    @precondition(lambda self: self.batches)
    @rule(
        batch=SMALL,
        writes=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 2)), min_size=1, max_size=5),
        commits=st.integers(0, 2),
    )
    def cascade(self, batch: int, writes: list[tuple[int, int]], commits: int) -> None:
        """Blocks written before those ahead of them are committed, each as often as one likes."""
        one = self._pick(self.batches, batch)
        for block, num_frames in writes:
            self.write(batch, block, min(num_frames, self._longest_block(one)))
        for _ in range(min(commits, len(one.blocks))):
            assert self._both_do(one, "commit", (one.blocks.pop(0),))

    @precondition(lambda self: self.batches)
    @rule(
        batch=SMALL, num_frames=st.integers(1, 3), bias=st.none() | st.tuples(*[st.sampled_from((-1.5, 0.0, 2.0))] * 3)
    )
    def attend(self, batch: int, num_frames: int, bias: tuple[float, float, float] | None) -> None:
        """The block after the uncommitted ones, under another bias."""
        one = self._pick(self.batches, batch)
        if not self._is_free(one):
            return
        one.tested.past_bias = one.exact.past_bias = bias
        self._compare(one, num_frames, block=len(one.blocks))

    @precondition(lambda self: self.streams and len(self.streams) < MOST_STREAMS)
    @rule(stream=SMALL, blocks=st.lists(st.integers(1, 2), max_size=2))
    def fork(self, stream: int, blocks: list[int]) -> None:
        """A branch, which goes on at once or later."""
        fork = self._both(self._pick(self.streams, stream), "fork")
        if fork is not None:
            self.streams.append(fork)
            self._add_batch([fork])
            self.roll_out(len(self.batches) - 1, blocks)

    @precondition(lambda self: self.streams)
    @rule(stream=SMALL, num_frames=st.integers(0, 4))
    def rollback(self, stream: int, num_frames: int) -> None:
        one = self._pick(self.streams, stream)
        if self._both_do(one, "rollback", (num_frames,)):
            for batch in self.batches:
                if one in batch.streams:  # the others have their blocks still, and cannot go on without this one
                    self._drop(batch, 0)

    @precondition(lambda self: self._free_streams())
    @rule(
        stream=SMALL,
        frames=st.none() | st.lists(st.sets(SMALL, max_size=4), min_size=1, max_size=2),
        forget=st.booleans(),
    )
    def select_frames(self, stream: int, frames: list[set[int]] | None, forget: bool) -> None:
        """Frames counted from the newest, for all heads or for each."""
        one = self._pick(self._free_streams(), stream)
        lists = None
        if frames is not None:
            newest = one.exact.num_frames - 1
            chosen = [[newest - back for back in of_head if back <= newest] for of_head in frames]
            lists = chosen if len(chosen) == self.setup.kv_heads == 2 else chosen[0]
        self._both_do(one, "select_frames", (lists, forget and lists is not None))

    @precondition(lambda self: self._free_streams() and len(self.streams) < MOST_STREAMS)
    @rule(stream=SMALL)
    def save_and_load(self, stream: int) -> None:
        """A stream restarts beside itself."""
        one = self._pick(self._free_streams(), stream)
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder, name) for name in ("tested", "exact")]
            one.tested.save(paths[0])
            one.exact.save(paths[1])
            loads = self.pool.tested.load_stream, self.pool.exact.load_stream
            loaded = self._outcomes(
                *(lambda load=load, path=path: load(path) for load, path in zip(loads, paths, strict=True))
            )
            if loaded is not None:
                self.streams.append(Pair(*loaded))

    @precondition(lambda self: len(self.streams) == MOST_STREAMS)
    @rule(stream=SMALL)
    def close(self, stream: int) -> None:
        one = self._pick(self.streams, stream)
        self._leave(one)
        self.streams.remove(one)
        assert self._both_do(one, "close", ())

    @precondition(lambda self: self.batches)
    @rule(batch=SMALL, really=st.integers(0, 3).map(lambda number: number == 0))
    def reset(self, batch: int, really: bool) -> None:
        one = self._pick(self.batches, batch)
        if really and self._is_free(one):
            assert self._both_do(one, "reset", ())
            one.blocks.clear()

    @precondition(lambda self: any(self._is_free(batch) for batch in self.batches) and len(self.views) < MOST_VIEWS)
    @rule(batch=SMALL, block=SMALL)
    def take_view(self, batch: int, block: int) -> None:
        one = self._pick([batch for batch in self.batches if self._is_free(batch)], batch)
        block = block % (len(one.blocks) + 1)
        self.views.append(Batch(one.tested.view(block), one.exact.view(block), one.streams))

    @precondition(lambda self: self.views)
    @rule(view=SMALL, num_frames=st.integers(1, 2), keep=st.booleans())
    def read_view(self, view: int, num_frames: int, keep: bool) -> None:
        """What was there when it was taken is still there, whatever has been evicted and closed since."""
        one = self._pick(self.views, view)
        try:
            one.exact.attend(0, *(x.double() for x in self._draw(one, num_frames)))
        except ValueError:
            return  # no block of this length could have come next
        self._compare(one, num_frames)
        if not keep:
            self.views.remove(one)

    @precondition(lambda self: any(map(self._is_free, self.batches)) and len(self.recorded) < MOST_VIEWS)
    @rule(batch=SMALL, num_frames=st.integers(1, 2))
    def record(self, batch: int, num_frames: int) -> None:
        """A block that autograd remembers."""
        one = self._pick([batch for batch in self.batches if self._is_free(batch)], batch)
        num_frames, block = min(num_frames, self._longest_block(one)), len(one.blocks)
        drawn = self._draw(one, num_frames)
        inputs = [[x.to(self.device) for x in drawn], [x.double() for x in drawn]]
        for x in (*inputs[0], *inputs[1]):
            x.requires_grad_()
        outs = self._outcomes(
            lambda: one.tested.attend(0, *inputs[0], block=block), lambda: one.exact.attend(0, *inputs[1], block=block)
        )
        if outs is not None:
            self.recorded.append(Recorded(outs, inputs))

    @precondition(lambda self: self.recorded)
    @rule(recorded=SMALL)
    def backward(self, recorded: int) -> None:
        """Its gradient is that of what was there, whatever has been written since."""
        one = self._pick(self.recorded, recorded)
        self.recorded.remove(one)
        grad = torch.randn(one.outs[0].shape, generator=self.generator).to(self.setup.dtype)
        grads = [
            torch.autograd.grad(out, inputs, grad.to(out)) for out, inputs in zip(one.outs, one.inputs, strict=True)
        ]
        tolerance = 4 * TOLERANCE[self.setup.dtype]
        # A block of one token without past has a gradient of 0, which rounding hides: sizes of all three are compared.
        assert_close(
            *(torch.cat([x.double().cpu().flatten() for x in of_side]) for of_side in grads), tolerance, "gradients"
        )

    # ---- What must hold

    @invariant()
    def pages_add_up(self) -> None:
        if not hasattr(self, "pool"):
            return
        tested, exact = self.pool.tested.stats(), self.pool.exact.stats()
        if tested.pinned and not self._has_readers():
            gc.collect()  # batches and their views know each other
            tested = self.pool.tested.stats()
            assert tested.pinned == 0
        assert tested.used + tested.free + tested.pinned == tested.num_pages == self.setup.num_pages
        assert (tested.used, tested.shared) == (exact.used, exact.shared)

    @invariant()
    def streams_agree(self) -> None:
        for stream in getattr(self, "streams", ()):
            for name in ("num_frames", "visible_frames"):
                assert getattr(stream.tested, name) == getattr(stream.exact, name), name

    @invariant()
    def batches_see_the_same(self) -> None:
        for batch in getattr(self, "batches", ()):
            with torch.no_grad():  # else the position is one that autograd may keep, with its pages
                assert batch.tested.position.tolist() == batch.exact.position.tolist()
            if self._is_free(batch):
                for block in range(len(batch.blocks) + 1):
                    self._compare(batch, batch.blocks[block] if block < len(batch.blocks) else 1, block)
                continue
            # Another batch is writing: the block that comes next is as long as that one's.
            lengths = {other.blocks[0] for other in self._writers(batch)}
            if len(lengths) == 1:
                self._compare(batch, lengths.pop())

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.views.clear()
        self.recorded.clear()
        for stream in self.streams:
            self._leave(stream)
            stream.tested.close()
        if self.pool.tested.stats().free < self.setup.num_pages:
            gc.collect()
        assert self.pool.tested.stats().free == self.setup.num_pages, "a page was lost"

    # ---- How

    def _free_streams(self) -> list[Pair]:
        """Those that no batch is writing."""
        busy = [stream for batch in self.batches if batch.blocks for stream in batch.streams]
        return [stream for stream in self.streams if stream not in busy]

    def _add_batch(self, streams: list[Pair]) -> None:
        packages = (self.package, "tested"), (reference, "exact")
        caches = [self.setup.batch(package, [getattr(s, side) for s in streams]) for package, side in packages]
        if len(self.batches) == MOST_BATCHES:
            self._drop(self.batches.pop(0), 0)
        self.batches.append(Batch(*caches, streams))

    def _is_free(self, batch: Batch) -> bool:
        """Whether no other batch is writing its streams."""
        return not self._writers(batch)

    def _writers(self, batch: Batch) -> list[Batch]:
        """The other batches that are writing its streams."""
        others = [other for other in self.batches if other.blocks and other is not batch]
        return [other for other in others if any(stream in other.streams for stream in batch.streams)]

    def _drop(self, batch: Batch, block: int) -> None:
        if batch.blocks:  # those of its streams may be another batch's
            assert self._both_do(batch, "drop", (block,))
            del batch.blocks[block:]

    @staticmethod
    def _longest_block(batch: Batch) -> int:
        """Frames of the longest block that all windows admit."""
        windows = [(stream.exact.window_frames, stream.exact.sink_frames) for stream in batch.streams]
        return min([window - sink for window, sink in windows if window is not None], default=9)

    def _leave(self, stream: Pair) -> None:
        """Batches end with a stream of theirs."""
        for batch in self.batches:
            if stream in batch.streams:
                self._drop(batch, 0)
        self.batches = [batch for batch in self.batches if stream not in batch.streams]

    def _has_readers(self) -> bool:
        return bool(self.views or self.recorded)

    @staticmethod
    def _pick(things: list[Any], number: int) -> Any:
        return things[number % len(things)]

    def _draw(self, batch: Batch, num_frames: int) -> tuple[Tensor, Tensor, Tensor]:
        size, kv_heads = self.setup, self.setup.kv_heads
        return tuple(
            torch.randn(
                len(batch.streams), num_frames * size.frame_seqlen, heads, size.head_dim, generator=self.generator
            ).to(size.dtype)
            for heads in (kv_heads * size.group, kv_heads, kv_heads)
        )

    def _compare(self, batch: Batch, num_frames: int, block: int = 0) -> None:
        """Attention of the last layer over what is there."""
        layer, qkv = self.setup.num_layers - 1, self._draw(batch, num_frames)
        options = {"block": block} if block else {}
        outs = self._outcomes(
            lambda: batch.tested.attend(layer, *(x.to(self.device) for x in qkv), **options).cpu(),
            lambda: batch.exact.attend(layer, *(x.double() for x in qkv), **options),
        )
        if outs is not None:
            assert_close(*outs, TOLERANCE[self.setup.dtype], "attention")

    def _both(self, pair: Pair, name: str, *arguments: Any, **options: Any) -> Pair | None:
        """A call that gives the same thing of both."""
        sides = pair.tested, pair.exact
        results = self._outcomes(*(lambda side=side: getattr(side, name)(*arguments, **options) for side in sides))
        return None if results is None else Pair(*results)

    def _both_do(
        self, pair: Pair, name: str, arguments: tuple[Any, ...], options: dict[str, Any] | None = None
    ) -> bool:
        """A call of both for what it does; the reference gets tensors in float64. Whether it was done."""
        tested = [x.to(self.device) if isinstance(x, Tensor) else x for x in arguments]
        exact = [x.double() if isinstance(x, Tensor) else x for x in arguments]
        results = self._outcomes(
            lambda: getattr(pair.tested, name)(*tested, **(options or {})),
            lambda: getattr(pair.exact, name)(*exact, **(options or {})),
        )
        return results is not None

    def _outcomes(self, tested: Any, exact: Any) -> tuple[Any, Any] | None:
        """What both calls return, or None if both refuse for the same kind of reason."""
        try:
            result = tested()
        except (ValueError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and self._has_readers():
                return None  # they pin pages, which lists do not know
            try:
                exact()
            except type(error):
                return None
            raise
        return result, exact()


class ReferenceLives(Lives):
    package = reference


class ExtensionLives(Lives):
    package = extension

    @precondition(lambda self: self.batches)
    @rule(
        batch=SMALL,
        name=st.sampled_from(("drop", "commit", "reserve", "view", "attend", "write", "rollback", "select")),
    )
    def misuse(self, batch: int, name: str) -> None:
        """What nobody can do is refused, and changes nothing: the reference does not even hear of it."""
        one = self._pick(self.batches, batch)
        cache, beyond = one.tested, len(one.blocks) + 1
        q, k, v = (x.to(self.device) for x in self._draw(one, 1))
        calls = {
            "drop": lambda: cache.drop(-1),
            "commit": lambda: cache.commit(one.blocks[0] + 1 if one.blocks else 1),
            "reserve": lambda: cache.reserve(0),
            "view": lambda: cache.view(beyond),
            "attend": lambda: cache.attend(0, q, k, v, block=beyond),
            "write": lambda: cache.write(self.setup.num_layers, k, v),
            "rollback": lambda: cache.streams[0].rollback(cache.streams[0].num_frames + 1),
            "select": lambda: cache.streams[0].select_frames([cache.streams[0].num_frames]),
        }
        with pytest.raises(ValueError, match=r"but|called"):
            calls[name]()


class GpuLives(ExtensionLives):
    device = "cuda"


def live(machine: type[Lives], **options: Any) -> None:
    """As many lives as the Hypothesis profile says, or ``options``."""
    suppressed = HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much
    run_state_machine_as_test(
        machine, settings=settings(stateful_step_count=STEPS, suppress_health_check=suppressed, **options)
    )


def test_the_cache_is_lists_of_frames():
    live(ExtensionLives)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_cache_on_a_gpu_is_lists_of_frames():
    live(GpuLives, max_examples=20)


def test_the_reference_in_float32_is_the_reference_in_float64():
    """Whatever fails here is wrong with the lives, not with a cache."""
    live(ReferenceLives, max_examples=30)


def pages_are_not_copied(pool: Any, steps: list[Any], may_grow: bool = False) -> None:
    shortage, _ = pool.table.advance(steps)
    if shortage:
        raise RuntimeError("the pool is exhausted")


def a_frame_too_many(starts: Any, lengths: Any, moving: Any, sinks: Any) -> Any:
    return visible_past_of_many(starts, lengths, moving + 1, sinks)


PLANTED = {
    "a closed stream keeps its pages": (Stream, "close", lambda stream: None),
    "a rolled back stream keeps its pages": (
        Stream,
        "retain",
        lambda stream, uncommitted_frames=0: [batch.refresh() for batch in stream._batches],
    ),
    "shared pages are replaced, but not copied": (extension.PagePool, "advance", pages_are_not_copied),
    "the window shows a frame too many": (past_geometry, "visible_past_of_many", a_frame_too_many),
    "a batch misses what another does": (extension.PagedKVCache, "refresh_others", lambda cache: None),
}


@pytest.mark.parametrize(("owner", "name", "wrong"), PLANTED.values(), ids=PLANTED)
def test_a_planted_bug_is_found(monkeypatch, owner, name, wrong):
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(AssertionError):
        live(
            ExtensionLives,
            max_examples=500,
            phases=(Phase.generate,),
            derandomize=True,
            report_multiple_bugs=False,
            verbosity=Verbosity.quiet,
        )
