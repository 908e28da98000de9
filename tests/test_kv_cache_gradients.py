"""Gradients through the cache, of random rollouts: from every block that read a key or value into the tensor that was
written, or the one that stands in for it, against lists of frames in float64."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

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
class Step:
    """A block of a rollout."""

    num_frames: int
    reads: int  # denoising steps that are recorded
    recomputed: bool  # by activation checkpointing, in backward
    writes: int  # clean passes, of which the last counts
    write_has_gradient: bool
    sent_elsewhere: bool  # the gradient of what is written
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
            for _ in range(step.writes):
                written, targets = draw(num_frames, self.kv_heads, 2), draw(num_frames, self.kv_heads, 2)
                with torch.set_grad_enabled(step.write_has_gradient):
                    cache.write(0, *written, grad_to=targets if step.sent_elsewhere else None)
            cache.commit(num_frames)
        return outs, leaves


STEPS = st.builds(
    Step,
    num_frames=st.integers(1, 3),
    reads=st.integers(0, 2),
    recomputed=st.booleans(),
    writes=st.sampled_from((1, 1, 2)),
    write_has_gradient=st.sampled_from((True, True, True, False)),
    sent_elsewhere=st.sampled_from((False, False, True)),
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
    steps=st.lists(STEPS, min_size=2, max_size=8).map(tuple),
)


def compare(rollout: Rollout) -> None:
    outs_and_grads = []
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


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(ROLLOUTS)
def test_gradients_of_random_rollouts(rollout: Rollout):
    compare(rollout)


def test_a_lost_gradient_is_seen(monkeypatch):
    """The comparison would notice a block that keeps what later ones send to it."""
    step = Step(1, 1, False, 1, True, False, None)
    rollout = Rollout(4, 2, 1, 1, ((None, 0),), "on_write", None, None, (step, step, step))
    compare(rollout)
    monkeypatch.setattr(cache_gradient._Sums, "take", lambda sums, places: None)
    with pytest.raises(AssertionError, match="gradients: relative error"):
        compare(rollout)
