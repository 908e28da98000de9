"""CUDA graphs without a GPU: a recording that is as blind as theirs to what the host does.

A tape keeps every op that ran with the very tensors that it read and made, and replays the ops on the same memory. What
Python computed in between is frozen, as in a captured graph, and recording changes nothing that was there before, as a
capture, which runs nothing. A recording is refused where a capture on a GPU would fail
or go wrong: an op that hands values to the host, and an op that reads memory which neither an op of the tape has made
nor was there before (what Python made in between and would have to copy to the GPU).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
#: Ops that wait for the device to tell the host a number, or a size.
READS_TO_HOST = {
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
}


class HostWork(AssertionError):
    """What was recorded does something that a captured graph cannot repeat."""


def tensors_of(*values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def bytes_of(tensor: Tensor) -> Tensor:
    """All of the memory that it is a view of."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


class MemoryRead(TorchDispatchMode):
    """Collects the memory that ops read without having made it. The tensors stay alive, so that no other memory can
    have their addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.external: dict[int, Tensor] = {}
        self._made: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.saw(tensors_of(args, kwargs), tensors_of(result))
        return result

    def memory(self) -> dict[int, Tensor]:
        """All that there was, made or not."""
        return self.external | self._made

    def saw(self, read: list[Tensor], made: list[Tensor]) -> None:
        for tensor in read:
            if memory_of(tensor) not in self._made:
                self.external.setdefault(memory_of(tensor), tensor)
        for tensor in made:
            if memory_of(tensor) not in self.external:
                self._made[memory_of(tensor)] = tensor


class Tape(MemoryRead):
    """The recording of ``selfforcing_ext.graphs`` that a test puts in the place of a CUDA graph.

    Args:
        function, inputs: what is recorded.
        known: memory that was there before the recording.
    """

    def __init__(self, function: Callable[..., Any], inputs: Sequence[Tensor], known: dict[int, Tensor]) -> None:
        super().__init__()
        self._inputs = [x.clone() for x in inputs]
        self._known = set(known) | {memory_of(x) for x in self._inputs}
        self._calls: list[tuple[Any, Any, Any, list[Tensor | None]]] = []
        saved = [(memory, memory.clone()) for memory in map(bytes_of, known.values())]
        with self:
            self._outputs = function(*self._inputs)
        for memory, before in saved:
            memory.copy_(before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in READS_TO_HOST:
            raise HostWork(f"{func} tells the host a value")
        read = tensors_of(args, kwargs)
        result = func(*args, **kwargs)
        made = tensors_of(result)
        self.saw(read, made)
        unknown = set(self.external) - self._known
        if unknown:
            shapes = [list(self.external[address].shape) for address in unknown]
            raise HostWork(f"{func} reads memory of shape {shapes} that no recorded op has made")
        own = {memory_of(tensor) for tensor in read}
        self._calls.append((func, args, kwargs, [x if memory_of(x) not in own else None for x in made]))
        return result

    def replay(self, inputs: Sequence[Tensor]) -> Any:
        for held, given in zip(self._inputs, inputs, strict=True):
            held.copy_(given)
        for func, args, kwargs, made in self._calls:
            again = tensors_of(func(*args, **kwargs))
            for target, value in zip(made, again, strict=True):
                if target is not None:  # a view or a change in place has its values already
                    target.copy_(value)
        return self._outputs.clone()
