"""Gradients through the cache, of random rollouts: from every block that read a key or value into the tensor that was
written, or the one that stands in for it, against lists of frames in float64; and the pages of gradients on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from compare import assert_close
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import python_ref.ops.kv_cache as reference
from selfforcing_ext import cache_gradient
from selfforcing_ext import kv_cache as extension

HEAD_DIM = 32
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Write:
    """What the gradient of a clean pass goes to."""

    has_graph: bool  # else it is made under no_grad
    sent_elsewhere: bool  # to other tensors, under no_grad too


@dataclass(frozen=True)
class Step:
    """A block of a rollout."""

    num_frames: int
    reads: int  # denoising steps that are recorded
    recomputed: bool  # by activation checkpointing, in backward
    writes: tuple[Write, ...]  # clean passes, of which the last counts
    selected: tuple[frozenset[int], ...] | None  # frames counted from the newest: one set, or one per head


@dataclass(frozen=True)
class Rollout:
    page_size: int
    frame_seqlen: int
    kv_heads: int
    group: int
    windows: tuple[tuple[int | None, int], ...]  # of each stream: frames that move through it, and the sink
    rope: str
    bias: tuple[float, float, float] | None
    quantization: str | None
    steps: tuple[Step, ...]

    def run(self, package: ModuleType, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """All outputs, and all tensors that may have a gradient."""
        generator = torch.Generator().manual_seed(0)
        pool = package.PagePool(
            500,
            self.page_size,
            1,
            self.kv_heads,
            HEAD_DIM,
            dtype,
            quantization=self.quantization,
            grad_through_cache=True,
        )
        streams = [
            pool.open_stream(None if moving is None else moving + sink, sink, frame_seqlen=self.frame_seqlen)
            for moving, sink in self.windows
        ]
        grid = (1, self.frame_seqlen) if self.rope == "on_read" else None
        cache = package.PagedKVCache.of_streams(streams, rope=self.rope, rope_grid=grid, past_bias=self.bias)
        longest = min([moving for moving, _ in self.windows if moving is not None], default=9)
        outs, leaves = [], []

        def draw(num_frames: int, heads: int, count: int) -> list[Tensor]:
            shape = len(streams), num_frames * self.frame_seqlen, heads, HEAD_DIM
            drawn = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(count)]
            leaves.extend(drawn)
            return drawn

        for step in self.steps:
            num_frames = min(step.num_frames, longest)
            for stream, (moving, _) in zip(streams, self.windows, strict=True):
                if step.selected is not None:
                    there = min(stream.num_frames, 9 if moving is None else moving)
                    chosen = [[stream.num_frames - 1 - back for back in set_ if back < there] for set_ in step.selected]
                    stream.select_frames(chosen if len(chosen) == self.kv_heads == 2 else chosen[0])
            view = cache.view()
            for _ in range(step.reads):
                (q,), kv = draw(num_frames, self.kv_heads * self.group, 1), draw(num_frames, self.kv_heads, 2)
                outs.append(
                    checkpoint(view.attend, 0, q, *kv, use_reentrant=False)
                    if step.recomputed
                    else cache.attend(0, q, *kv)
                )
            for write in step.writes:
                written, targets = draw(num_frames, self.kv_heads, 2), draw(num_frames, self.kv_heads, 2)
                with torch.set_grad_enabled(write.has_graph):
                    cache.write(0, *written, grad_to=targets if write.sent_elsewhere else None)
            cache.commit(num_frames)
        return outs, leaves


@dataclass
class Accounting:
    """What pages of gradients were in use for."""

    most_held: int = 0  # pages that streams held at a time, for values
    most_in_use: int = 0  # pages of gradients of a layer
    remaining: int = 0


@contextmanager
def accounting() -> Iterator[Accounting]:
    """Follows the pages of gradients, and asserts that each is in use for what earlier writes are still to get."""
    account, all_sums, writes = Accounting(), set(), []
    record, table_of, take = (
        cache_gradient.CacheGradient.record,
        cache_gradient._Sums.table_of,
        cache_gradient._Sums.take,
    )

    def watched_record(gradient: Any, layer: int, k: Tensor, v: Tensor, grad_to: Any, places: Any) -> None:
        before = gradient.links[layer]
        record(gradient, layer, k, v, grad_to, places)
        if gradient.links[layer] is not before:
            writes.append(places)
        account.most_held = max(account.most_held, gradient._pool.stats().used)

    def watched_table_of(sums: Any, pages: Any) -> Tensor:
        table = table_of(sums, pages)
        all_sums.add(sums)
        account.most_in_use = max(account.most_in_use, len(sums.k_pages), len(sums.v_pages))
        return table

    def watched_take(sums: Any, places: Any, opened: Any) -> Any:
        taken = take(sums, places, opened)
        index = next(i for i, written in enumerate(writes) if written is places)
        in_use = set(np.flatnonzero(sums._slot >= 0).tolist())
        assert in_use <= {page for pages, _ in writes[:index] for page in pages.flatten().tolist()}, "a page leaks"
        return taken

    with (
        patch.object(cache_gradient.CacheGradient, "record", watched_record),
        patch.object(cache_gradient._Sums, "table_of", watched_table_of),
        patch.object(cache_gradient._Sums, "take", watched_take),
    ):
        yield account
    account.remaining = max((len(pages) for sums in all_sums for pages in (sums.k_pages, sums.v_pages)), default=0)


STEPS = st.builds(
    Step,
    num_frames=st.integers(1, 3),
    reads=st.sampled_from((0, 0, 1, 2)),
    recomputed=st.booleans(),
    writes=st.lists(
        st.builds(Write, has_graph=st.sampled_from((True, True, False)), sent_elsewhere=st.booleans()),
        min_size=1,
        max_size=2,
    ).map(tuple),
    selected=st.none()
    | st.none()
    | st.lists(st.frozensets(st.integers(0, 5), max_size=3), min_size=1, max_size=2).map(tuple),
)
ROLLOUTS = st.builds(
    Rollout,
    page_size=st.integers(1, 9),
    frame_seqlen=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 2),
    windows=st.lists(st.tuples(st.none() | st.integers(1, 5), st.integers(0, 2)), min_size=1, max_size=2).map(tuple),
    rope=st.sampled_from(("on_write", "on_read")),
    bias=st.none() | st.just((1.0, -0.5, 0.3)),
    quantization=st.sampled_from((None, None, "int8", "fp8_e4m3", "int4")),
    steps=st.lists(STEPS, min_size=2, max_size=12).map(tuple),
)


def compare(rollout: Rollout) -> None:
    outs_and_grads = []
    with accounting() as account:
        for package, dtype in ((extension, torch.float32), (reference, torch.float64)):
            outs, leaves = rollout.run(package, dtype)
            if not outs:
                return
            generator = torch.Generator().manual_seed(1)
            weights = [torch.randn(out.shape, generator=generator).to(dtype) for out in outs]
            grads = torch.autograd.grad(outs, leaves, weights, materialize_grads=True, allow_unused=True)
            outs_and_grads.append(([out.detach() for out in outs], grads))
    for index, name in enumerate(("outputs", "gradients")):
        both = [torch.cat([x.double().flatten() for x in of_package[index]]) for of_package in outs_and_grads]
        assert_close(*both, TOLERANCE, name)
    assert account.most_in_use <= account.most_held
    assert account.remaining == 0


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(ROLLOUTS)
def test_gradients_of_random_rollouts(rollout: Rollout):
    compare(rollout)


OWN, CONSTANT = Write(True, False), Write(False, False)


def rollout_of(steps: list[Step], page_size: int, frame_seqlen: int, moving: int | None) -> Rollout:
    return Rollout(page_size, frame_seqlen, 1, 1, ((moving, 0),), "on_write", None, None, tuple(steps))


@pytest.mark.parametrize(("page_size", "frame_seqlen", "moving", "every"), [(7, 4, 3, 4), (6, 4, 21, 1), (3, 1, 2, 5)])
def test_pages_of_gradients_are_those_of_a_window(page_size, frame_seqlen, moving, every):
    """However many blocks there are, and whichever of them read."""
    most_pages = -(-((moving - 1) * frame_seqlen + page_size - 1) // page_size)
    for num_blocks in (25, 100):
        steps = [Step(1, int(i % every == every - 1), False, (OWN,), None) for i in range(num_blocks)]
        with accounting() as account:
            outs, _ = rollout_of(steps, page_size, frame_seqlen, moving).run(extension, torch.float32)
            torch.stack(outs).sum().backward()
        assert 0 < account.most_in_use <= most_pages
        assert account.remaining == 0


def test_nothing_remains_of_gradients_that_nobody_asked_for():
    """Where only the newest blocks want a gradient, the writes that opened the pages have no backward."""
    steps = [Step(1, 1, False, (OWN,), None)] * 6
    with accounting() as account:
        outs, leaves = rollout_of(steps, 3, 2, None).run(extension, torch.float32)
        torch.autograd.grad(outs[-1].sum(), leaves[-11:-9])  # what the last block but one has written
    assert account.most_in_use > account.remaining == 0


@pytest.mark.parametrize("page_size", [2, 3])
def test_what_is_replaced_gets_no_gradient(page_size):
    """Neither by constants, in a page that begins with the block or before it."""
    step = Step(1, 1, False, (OWN,), None)
    for writes in ((OWN, CONSTANT), (CONSTANT, OWN), (OWN, CONSTANT, OWN), (OWN, OWN, CONSTANT)):
        compare(rollout_of([step, Step(1, 1, False, writes, None), step, step], page_size, 2, None))


STEPS_THAT_READ = [Step(1, 1, False, (OWN,), None)] * 3


def test_a_lost_gradient_is_seen(monkeypatch):
    """The comparison would notice a block that keeps what later ones send to it."""
    rollout = rollout_of(STEPS_THAT_READ, 4, 2, None)
    compare(rollout)
    take = cache_gradient._Sums.take

    def take_and_lose(sums: Any, places: Any, opened: Any) -> None:
        take(sums, places, opened)

    monkeypatch.setattr(cache_gradient._Sums, "take", take_and_lose)
    with pytest.raises(AssertionError, match="gradients: relative error"):
        compare(rollout)


def test_a_lost_page_is_seen(monkeypatch):
    """The accounting would notice a page that outlives its writes."""
    take = cache_gradient._Sums.take
    monkeypatch.setattr(cache_gradient._Sums, "take", lambda sums, places, opened: take(sums, places, opened[:0]))
    with pytest.raises(AssertionError, match="a page leaks"):
        compare(rollout_of(STEPS_THAT_READ, 4, 2, None))
