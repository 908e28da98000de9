"""The only tolerance code of the tests: errors are relative to a float64 computation, in the Frobenius norm.

    ||actual - exact|| / ||exact||

A message names the coordinate where the two differ most.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Our error may be this many times that of torch's own kernel on the same inputs and dtype.
ACCURACY_FACTOR = 1.1
#: Half a unit in the last place of the result's dtype is what rounding the exact result may cost.
RESULT_ROUNDING = 0.5
#: Sums of a few hundred float32 terms are off by a few units, more or less by the chance of their order.
SUM_ROUNDING = 4


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """||actual - exact|| / ||exact||. Equal infinities do not differ; a NaN or an unequal infinity gives infinity."""
    error = float(_difference(actual, exact).norm())
    if error == 0:
        return 0.0
    norm = float(torch.where(exact.isfinite(), exact, 0).detach().double().norm())
    return error / norm if norm > 0 and math.isfinite(error) else math.inf


def assert_close(actual: Tensor, exact: Tensor, tolerance: float, name: str = "result") -> None:
    """The relative error is at most ``tolerance``."""
    error = relative_error(actual, exact)
    assert error <= tolerance, (
        f"{name}: relative error {error:.3g} > {tolerance:.3g}; {worst_coordinate(actual, exact)}"
    )


def assert_within_terms(actual: Tensor, exact: Tensor, terms: Tensor, tolerance: float, name: str = "result") -> None:
    """||actual - exact|| is at most ``tolerance`` times ||terms||, the sums of the absolute values of what was summed.

    For sums that may cancel: rounding is in proportion to the terms, not to what is left of them.
    """
    error, size = float(_difference(actual, exact).norm()), float(terms.norm())
    assert error <= tolerance * size, (
        f"{name}: error {error:.3g} > {tolerance:.3g} x {size:.3g}, the size of its terms; "
        f"{worst_coordinate(actual, exact)}"
    )


def assert_as_accurate(
    actual: Tensor, baseline: Tensor, exact: Tensor, name: str = "result", sum_rounding: float = SUM_ROUNDING
) -> None:
    """The relative error is at most ACCURACY_FACTOR times that of ``baseline``, torch's result in the same dtype.

    An error that rounding alone explains passes too. With ``sum_rounding`` 0, for results large enough that chance
    averages out, only the rounding of the result counts as such.
    """
    error, allowed = relative_error(actual, exact), ACCURACY_FACTOR * relative_error(baseline, exact)
    units = torch.finfo(actual.dtype).eps, torch.finfo(torch.float32).eps
    rounding = max(RESULT_ROUNDING * units[0], sum_rounding * units[1])
    assert error <= max(allowed, rounding), (
        f"{name}: relative error {error:.3g} > {allowed:.3g} = {ACCURACY_FACTOR} x that of torch; "
        f"{worst_coordinate(actual, exact)}"
    )


def assert_same_bits(actual: Tensor, expected: Tensor, name: str = "result") -> None:
    """Both are the same to the last bit, NaN included."""
    assert actual.dtype == expected.dtype, f"{name} is {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{name} has shape {list(actual.shape)}, expected {list(expected.shape)}"
    same = actual.contiguous().view(torch.uint8) == expected.contiguous().view(torch.uint8)
    assert bool(same.all()), f"{name}: {int((~same).sum())} bytes differ; {worst_coordinate(actual, expected)}"


def worst_coordinate(actual: Tensor, exact: Tensor) -> str:
    """Where the two differ most, and by how much."""
    if actual.numel() == 0:
        return "both are empty"
    flat = int(_difference(actual, exact).abs().nan_to_num(nan=float("inf")).argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), actual.shape))
    return f"worst at {list(index)}: {actual[index].item():.9g} instead of {exact[index].item():.9g}"


def _difference(actual: Tensor, exact: Tensor) -> Tensor:
    assert actual.shape == exact.shape, f"shape {list(actual.shape)}, expected {list(exact.shape)}"
    actual, exact = actual.detach().double().cpu(), exact.detach().double().cpu()
    return torch.where(actual == exact, 0.0, actual - exact)
