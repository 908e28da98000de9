"""A block of a rollout as one CUDA graph: the host launches one thing instead of thousands of kernels.

Source: CUDA C++ Programming Guide, section "CUDA Graphs".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from selfforcing_ext.checks import dtype_name
from selfforcing_ext.kv_cache import PagedKVCache
from selfforcing_ext.library import nvtx_range

Outputs = Tensor | tuple[Tensor, ...]
Function = Callable[..., Outputs]
Layout = tuple[torch.Size, torch.dtype, torch.device]


class Recording(Protocol):
    """What was captured; later calls do the same work on the same memory."""

    def replay(self, inputs: Sequence[Tensor]) -> Outputs: ...


class GraphedBlock:
    """A block's whole work on a cache (the denoising steps and the clean pass) as one CUDA graph, which is replayed for
    block after block with new positions.

    Called with the block's inputs, it returns what ``function`` returns, and the block has become the past. The first
    call runs ``function`` as it is, which also warms up what a capture must find ready; the second captures; the others
    replay. When memory of the cache had to grow in between, the next call captures again. No gradient is recorded.

    Args:
        cache: on a CUDA device, without ``grad_through_cache``. It may be used and ``reset`` between the calls.
        num_frames: frames of a block.
        function: takes and returns tensors. It attends to the cache, writes every layer and commits, and does nothing
            else on the host that has to happen at every call: Python runs while the graph is captured and never again.
            Random numbers are inputs, or a ``PhiloxNoise`` of tensors. What it reads besides its inputs (weights, an
            encoded caption) must stay where it is, and the caller keeps it alive.

    Raises:
        ValueError: a cache of another kind; when called, inputs unlike those of the first call, a block that cannot be
            the next one, or a function that did not write every layer.
        RuntimeError: when called, the pool has too few free pages.
    """

    def __init__(self, cache: PagedKVCache, num_frames: int, function: Function) -> None:
        if cache.grad_through_cache:
            raise ValueError("cache has grad_through_cache, but a graph records no gradient")
        self._record = recorder_for(cache.device)
        self._cache, self._num_frames, self._function = cache, num_frames, function
        self._layouts: list[Layout] = []  # of the first call's inputs
        self._warm = False
        self._memory: list[Tensor] = []  # what the recording reads and writes
        self._recording: Recording | None = None

    @nvtx_range("graphed_block")
    def __call__(self, *inputs: Tensor) -> Outputs:
        """The outputs are the caller's: later calls do not change them."""
        self._check_inputs(inputs)
        with torch.no_grad(), _uncached_autocast(), self._cache.prepared_block(self._num_frames) as written:
            if not self._warm:
                outputs = self._function(*inputs)
                self._warm = True
                return outputs
            memory = self._cache.memory_of_block()
            if self._recording is None or not _same(memory, self._memory):
                self._recording = None  # its memory is free before more is taken
                self._recording, self._memory = self._record(self._function, inputs), memory
            outputs = self._recording.replay(inputs)
            written.update(range(self._cache.num_layers))
            return outputs

    def _check_inputs(self, inputs: Sequence[Tensor]) -> None:
        layouts = [(x.shape, x.dtype, x.device) for x in inputs]
        if not self._warm:
            self._layouts = layouts
        if len(layouts) != len(self._layouts):
            raise ValueError(f"{len(layouts)} inputs are given, but the first call had {len(self._layouts)}")
        for index, (given, wanted) in enumerate(zip(layouts, self._layouts, strict=True)):
            if given != wanted:
                raise ValueError(
                    f"input {index} is {_described(given)}, but must be {_described(wanted)} as at the first call"
                )


class _CudaRecording:
    def __init__(self, function: Function, inputs: Sequence[Tensor]) -> None:
        self._inputs = [x.clone() for x in inputs]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = function(*self._inputs)

    def replay(self, inputs: Sequence[Tensor]) -> Outputs:
        for held, given in zip(self._inputs, inputs, strict=True):
            held.copy_(given)
        self._graph.replay()
        if isinstance(self._outputs, Tensor):
            return self._outputs.clone()
        return tuple(output.clone() for output in self._outputs)


def recorder_for(device: torch.device) -> Callable[[Function, Sequence[Tensor]], Recording]:
    """What captures on this device."""
    if device.type != "cuda":
        raise ValueError(f"cache is on {device}, but a CUDA graph needs one on a CUDA device")
    return _CudaRecording


@contextmanager
def _uncached_autocast() -> Iterator[None]:
    """Autocast keeps the weights that it has cast until it ends; a graph would read them afterwards."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def _same(memory: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(memory) == len(others) and all(a is b for a, b in zip(memory, others, strict=True))


def _described(layout: Layout) -> str:
    shape, dtype, device = layout
    return f"{dtype_name(dtype)} {list(shape)} on {device}"
