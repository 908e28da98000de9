"""What the tests of rope, denoise and modulate share: inputs with odd strides, parity of an op with its definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from compare import ACCURACY_FACTOR, assert_close, relative_error
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def padded(tensor: Tensor, dims: tuple[int, ...] = (0, 1)) -> Tensor:
    """The same values as a view into a larger tensor of NaN, with gaps along ``dims``; gradient flows through."""
    shape = [size + (3 if dim in dims else 0) for dim, size in enumerate(tensor.shape)]
    view = torch.full(shape, torch.nan, dtype=tensor.dtype, device=tensor.device)
    for dim, size in enumerate(tensor.shape):
        view = view.narrow(dim, 1 if dim in dims and size else 0, size)
    return view.copy_(tensor)


@contextmanager
def num_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_parity(
    ours: Callable[..., Any],
    definition: Callable[..., Any],
    inputs: Mapping[str, Tensor],  # float64
    dtypes: Mapping[str, torch.dtype],
    layout: Callable[[Tensor], Tensor] | None = None,
    device: str = "cpu",
    constants: Mapping[str, Tensor] | None = None,
) -> None:
    """Outputs and all gradients of an op are as close to float64 as those of its definition in the same dtypes.

    Both get the inputs as keyword arguments, rounded to ``dtypes``; ours on ``device`` and in the memory layout that
    ``layout`` gives. Constants are passed as they are, without gradient.
    """
    constants = constants or {}
    rounded = {name: tensor.to(dtypes[name]) for name, tensor in inputs.items()}
    exact = _outputs_and_gradients(definition, {name: tensor.double() for name, tensor in rounded.items()}, constants)
    expected = _outputs_and_gradients(definition, rounded, constants)
    actual = _outputs_and_gradients(ours, rounded, constants, layout, device)
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        assert value.dtype == expected[name].dtype, name
        assert_as_accurate(value, expected[name], exact[name], name)


def assert_whole_is_its_parts(
    op: Callable[..., Tensor], batched: Mapping[str, Tensor], shared: Mapping[str, Tensor] | None = None
) -> None:
    """A call gives what calls for each element of the batch give, but for the last bit and the order of sums.

    For results that kernels store past the caches, which small ones are not.
    """
    shared = shared or {}

    def outcome(batched: Mapping[str, Tensor], grad: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in {**batched, **shared}.items()}
        output = op(**leaves)
        return output.detach(), *torch.autograd.grad(output, list(leaves.values()), grad(output))

    grads: list[Tensor] = []

    def drawn(output: Tensor) -> Tensor:
        grads.append(torch.randn_like(output))
        return grads[0]

    output, *gradients = outcome(batched, drawn)
    parts = [
        outcome({name: tensor[i : i + 1] for name, tensor in batched.items()}, lambda _, i=i: grads[0][i : i + 1])
        for i in range(output.shape[0])
    ]
    outputs, *part_gradients = zip(*parts, strict=True)
    tolerance = 1e-6 if output.dtype == torch.float32 else 1e-4  # one vector not written would be an error of 1e-3
    assert_close(output, torch.cat(outputs), tolerance)
    for name, whole, part in zip([*batched, *shared], gradients, part_gradients, strict=True):
        assert_close(whole, sum(part) if name in shared else torch.cat(part), tolerance, f"gradient of {name}")


def assert_as_accurate(actual: Tensor, expected: Tensor, exact: Tensor, name: str = "result") -> None:
    """As ``compare.assert_as_accurate``, plus a few float32 roundings: over small tensors they do not average out."""
    roundings = 2 * torch.finfo(torch.float32).eps
    assert_close(actual, exact, ACCURACY_FACTOR * relative_error(expected, exact) + roundings, name)


def _outputs_and_gradients(
    function: Callable[..., Any],
    inputs: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    layout: Callable[[Tensor], Tensor] | None = None,
    device: str = "cpu",
) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    arguments = {name: leaf.to(device) for name, leaf in leaves.items()}
    if layout:
        arguments = {name: layout(argument) for name, argument in arguments.items()}
    result = function(**arguments, **{name: constant.to(device) for name, constant in constants.items()})
    outputs = [output for output in (result if isinstance(result, tuple) else (result,)) if output is not None]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(output.shape, generator=generator, dtype=torch.float64) for output in outputs]
    torch.autograd.backward(outputs, [weight.to(output) for weight, output in zip(weights, outputs, strict=True)])
    values = {f"output {i}": output.detach().cpu() for i, output in enumerate(outputs)}
    return values | {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
