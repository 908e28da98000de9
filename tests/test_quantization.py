"""The definition of quantised keys and values: error bounds, extremes, and what each bit means."""

import math

import pytest
import torch
from compare import assert_same_bits, relative_error

from python_ref.ops.quantization import INT4_GROUP, LARGEST, STORAGE, dequantise, quantise

FORMATS = list(LARGEST)
LEAST_NORMAL = torch.finfo(torch.float32).smallest_normal


def tokens(*shape: int) -> torch.Tensor:
    """Normal random numbers whose size differs from token to token by many orders of magnitude."""
    return torch.randn(shape) * torch.logspace(-20, 20, math.prod(shape[:-1])).view(*shape[:-1], 1)


def per_channel(scales: torch.Tensor, channels: int) -> torch.Tensor:
    return scales.double().repeat_interleave(channels // scales.shape[-1], dim=-1)


@pytest.mark.parametrize("with_offset", [False, True], ids=["", "offset"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_error_bound(format, dtype, with_offset):
    x = tokens(3, 50, 2, 64) if dtype != torch.float16 else torch.randn(3, 50, 2, 64)
    x = x.to(dtype)
    offset = torch.randn(2, 64) if with_offset else None
    elements, scales = quantise(x, format, offset)
    shifted = (x.double() - (0 if offset is None else offset.double())).abs()
    error = (dequantise(elements, scales, format, offset).double() - x.double()).abs()
    scale = per_channel(scales, 64)
    bound = torch.maximum(shifted / 16, scale / 1024) if format == "fp8_e4m3" else scale / 2
    roundings = 2 * torch.finfo(torch.float32).eps * (shifted + x.double().abs())
    assert bool((error <= bound + roundings).all())


@pytest.mark.parametrize("format", FORMATS)
def test_scale_is_the_next_bfloat16(format):
    """Not less than exact, and less by a bit it would be."""
    x = tokens(1000, 32)
    _, scales = quantise(x, format)
    exact = x.double().abs().amax(dim=-1, keepdim=True) / LARGEST[format]
    roundings = 1 + torch.finfo(torch.float32).eps
    assert scales.dtype == torch.bfloat16
    assert bool((scales.double() * roundings >= exact).all())
    below = (scales.view(torch.int16) - 1).view(torch.bfloat16)
    assert bool((below.double() < exact * roundings).all())


@pytest.mark.parametrize("format", FORMATS)
def test_shapes(format):
    elements, scales = quantise(torch.randn(2, 5, 3, 96), format)
    assert elements.dtype == STORAGE[format]
    assert elements.shape == (2, 5, 3, 48 if format == "int4" else 96)
    assert scales.shape == (2, 5, 3, 96 // INT4_GROUP if format == "int4" else 1)
    empty, no_scales = quantise(torch.randn(2, 0, 3, 96), format)
    assert dequantise(empty, no_scales, format).shape == (2, 0, 3, 96)


@pytest.mark.parametrize("format", FORMATS)
def test_what_was_read_back_is_read_back_again(format):
    """Multiples of a scale that reach the largest element are exact."""
    grid = torch.arange(-7.0, 8.0)[torch.randint(15, (20, 64))]
    if format == "int8":
        grid = torch.randint(-127, 128, (20, 64)).float()
    if format == "fp8_e4m3":
        grid = (64 * torch.randn(20, 64)).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    grid[:, ::INT4_GROUP] = LARGEST[format]
    x = grid * torch.tensor([0.5, 3.0, 2.0**-90, 2.0**90]).repeat(5)[:, None]
    assert_same_bits(dequantise(*quantise(x, format), format), x + 0.0)


def test_bits_of_int4():
    """Byte j has channel j in its low four bits and channel j + 16 in its high ones, both plus 8."""
    x = torch.arange(32).remainder(15).float() - 7  # -7 to 7, again, then -7, -6
    elements, scales = quantise(torch.cat([x, 2 * x]), "int4")
    assert scales.tolist() == [1, 2]
    expected = [(int(x[j]) + 8) | (int(x[j + 16]) + 8) << 4 for j in range(16)]
    assert elements.tolist() == expected * 2


def test_ties_go_to_even():
    x = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.0])
    elements, scales = quantise(x, "int8")
    assert scales.tolist() == [1]
    assert elements.tolist() == [127, 0, 2, 2, 0, -2, -2, 0]


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_and_what_is_too_small(format):
    least = LEAST_NORMAL * LARGEST[format]
    x = torch.stack([torch.zeros(32), torch.full((32,), -1e-45), torch.full((32,), least * 0.99)])
    elements, scales = quantise(x, format)
    assert bool((scales == 0).all())
    assert_same_bits(dequantise(elements, scales, format), torch.zeros(3, 32))
    x = torch.full((32,), least)
    assert_same_bits(dequantise(*quantise(x, format), format), x)


@pytest.mark.parametrize("format", FORMATS)
def test_huge(format):
    """Nothing overflows but what bfloat16 rounds up beyond float32 on reading."""
    x = torch.full((2, 32), torch.finfo(torch.float32).max / 1.01)
    x[:, 1::2] *= -0.5
    y = dequantise(*quantise(x, format), format)
    assert relative_error(y, x) < 0.1


@pytest.mark.parametrize("offset", [None, torch.ones(64)], ids=["", "offset"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("format", FORMATS)
def test_tokens_that_are_not_finite_are_read_back_as_nan(format, bad, offset):
    x = torch.randn(3, 64)
    x[1, 40] = bad
    elements, scales = quantise(x, format, offset)
    assert bool((elements[1].view(torch.uint8)[-16:] == (0x88 if format == "int4" else 0)).all())
    y = dequantise(elements, scales, format, offset)
    assert bool(y[1, 32:].isnan().all())
    assert bool(y[1, :32].isnan().all()) == (format != "int4")  # whose other group is as good as ever
    assert bool(y[[0, 2]].isfinite().all())


@pytest.mark.parametrize("format", FORMATS)
def test_offset_helps_channels_that_are_far_from_zero(format):
    x = torch.randn(500, 2, 64)
    offset = torch.zeros(2, 64)
    offset[:, 5::16] = 30.0
    x += offset
    errors = [
        relative_error(dequantise(*quantise(x, format, o), format, o) - offset, x - offset) for o in (None, offset)
    ]
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantise(torch.zeros(8), "int2"), "format is 'int2', but must be one of 'int8', 'fp8_e4m3', 'int4'"),
        (lambda: dequantise(torch.zeros(8), torch.ones(1), "fp8"), "format is 'fp8', but must be one of"),
        (lambda: quantise(torch.zeros(3, 40), "int4"), "x has 40 channels, but int4 takes a multiple of 32"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
