"""The tolerance code itself: it must see what it is there to see."""

import pytest
import torch
from compare import assert_as_accurate, assert_close, assert_same_bits, relative_error, worst_coordinate


def test_relative_error_is_the_quotient_of_norms():
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(exact + torch.tensor([0.0, 0.5]), exact) == pytest.approx(0.1)
    assert relative_error(exact, exact) == 0


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_an_error(wrong):
    exact = torch.tensor([1.0, 2.0])
    assert relative_error(torch.tensor([1.0, wrong]), exact) == float("inf")


def test_equal_infinities_are_no_error():
    exact = torch.tensor([1.0, -float("inf")])
    assert relative_error(exact.clone(), exact) == 0
    assert relative_error(torch.tensor([1.1, -float("inf")]), exact) == pytest.approx(0.1)


def test_zeros_have_no_tolerance():
    assert relative_error(torch.tensor([1e-30]), torch.zeros(1)) == float("inf")


def test_messages_name_the_worst_coordinate():
    exact = torch.zeros(2, 3)
    actual = exact.clone()
    actual[1, 2], actual[0, 1] = 5, 4
    assert worst_coordinate(actual, exact) == "worst at [1, 2]: 5 instead of 0"
    actual[0, 1] = float("nan")
    assert worst_coordinate(actual, exact) == "worst at [0, 1]: nan instead of 0"
    with pytest.raises(AssertionError, match=r"lse: relative error inf > 0.1; worst at \[0, 1\]"):
        assert_close(actual, exact, 0.1, "lse")


def test_other_shapes_are_never_close():
    with pytest.raises(AssertionError, match="shape"):
        assert_close(torch.zeros(2, 1), torch.zeros(2, 2), 1.0)


def test_accuracy_is_measured_against_the_baseline():
    exact = torch.ones(100, dtype=torch.float64)
    baseline = torch.full((100,), 1 + 1e-4)
    assert_as_accurate(torch.full((100,), 1 + 1.05e-4), baseline, exact)
    with pytest.raises(AssertionError, match=r"1\.1 x that of torch"):
        assert_as_accurate(torch.full((100,), 1 + 1.2e-4), baseline, exact)
    # Sums of few terms may be off by chance, large results may not.
    with pytest.raises(AssertionError, match=r"relative error 3\.\d+e-07 > 1\.\d+e-07 = 1\.1 x"):
        assert_as_accurate(torch.full((100,), 1 + 3e-7), torch.full((100,), 1 + 1e-7), exact, sum_rounding=0)
    assert_as_accurate(torch.full((100,), 1 + 3e-7), torch.full((100,), 1 + 1e-7), exact)
    # Better than half a unit in the last place cannot be asked for.
    assert_as_accurate(torch.full((100,), 1 + 1e-3, dtype=torch.bfloat16), exact, exact)


def test_same_bits_means_bits():
    a = torch.tensor([0.0, float("nan")])
    assert_same_bits(a, a.clone())
    with pytest.raises(AssertionError, match="1 bytes differ"):
        assert_same_bits(torch.tensor([-0.0, float("nan")]), a)
    with pytest.raises(AssertionError, match=r"torch\.float64"):
        assert_same_bits(a.double(), a)
