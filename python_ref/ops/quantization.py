"""How a cache keeps keys and values in fewer bits: the definition of what csrc/geometry/pages.h describes.

Every token and head has a scale of its own (in int4 every group of 32 channels), since keys and values differ in size
from head to head and token to token. Where single channels of the keys are far from 0 at every token, an offset per
channel that is subtracted first makes better use of the range; it is added again on reading.

Source: KV quantisation for Self-Forcing is studied in arXiv 2603.27469; channels of keys with sizes of their own, in
KIVI (arXiv 2402.02750); smoothing by a constant per channel, after SmoothQuant (arXiv 2211.10438).
"""

from __future__ import annotations

import torch
from torch import Tensor

INT4_GROUP = 32  # channels that share a scale
#: Largest element of each format, and what holds the elements: int4 two in a byte.
LARGEST = {"int8": 127.0, "fp8_e4m3": 448.0, "int4": 7.0}
STORAGE = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn, "int4": torch.uint8}


def quantise(
    x: Tensor,  # [..., D]
    format: str,
    offset: Tensor | None = None,  # [..., D]
) -> tuple[Tensor, Tensor]:
    """Elements and scales of which ``dequantise`` makes x again, but for rounding.

    A scale is max |x - offset| / largest element in float32, rounded up to bfloat16; an element is (x - offset) / scale
    in float32, rounded to the nearest even. So no element is too large, and |x - what is read back| is at most half a
    scale (fp8_e4m3: 2^-4 |x - offset| or 2^-10 scale, whichever is more); without an offset 0 is read back as 0.

    Args:
        x: keys or values, any floating dtype; computed in float32.
        format: "int8", "fp8_e4m3" or "int4" (D a multiple of 32).
        offset: float32, of any shape that broadcasts to that of x; None: 0.

    Returns:
        elements: int8 or float8_e4m3fn [..., D]; int4: uint8 [..., D / 2], where of each group byte j has channel j in
            its low four bits and channel j + 16 in its high ones, both as element + 8.
        scales: bfloat16 [..., 1]; int4: [..., D / 32]. Where they would be below 2^-126, the least normal number, scale
            and elements are 0. Where a token has an infinity or NaN, the scale is NaN and the elements are 0, so that
            all of the token (int4: group) is read back as NaN.

    Raises:
        ValueError: an unknown format, or int4 with a D that is not a multiple of 32.
    """
    _check_format(format)
    shifted = x.float() if offset is None else x.float() - offset.float()
    groups = _grouped(shifted, format)
    amax = groups.abs().amax(dim=-1, keepdim=True)
    scales = _rounded_up_to_bfloat16(amax / LARGEST[format]).masked_fill(~amax.isfinite(), torch.nan)
    quotients = torch.where(scales > 0, groups / scales, 0.0)
    scales = scales.squeeze(-1)
    if format == "fp8_e4m3":
        return quotients.flatten(-2).to(torch.float8_e4m3fn), scales
    integers = quotients.round()
    if format == "int8":
        return integers.flatten(-2).to(torch.int8), scales
    low, high = (integers + 8).to(torch.uint8).chunk(2, dim=-1)
    return (low | high << 4).flatten(-2), scales


def dequantise(
    elements: Tensor,
    scales: Tensor,
    format: str,
    offset: Tensor | None = None,  # [..., D]
) -> Tensor:  # float32 [..., D]
    """What is read back: element * scale + offset in float32. The product is exact, so only the sum is rounded.

    Args:
        elements, scales, format, offset: as ``quantise`` has them.

    Raises:
        ValueError: an unknown format, or int4 with a D that is not a multiple of 32.
    """
    _check_format(format)
    if format == "int4":
        nibbles = elements.unflatten(-1, (-1, INT4_GROUP // 2))
        groups = torch.cat([nibbles & 15, nibbles >> 4], dim=-1).float() - 8
    else:
        groups = elements.float().unsqueeze(-2)
    x = (groups * scales.float().unsqueeze(-1)).flatten(-2)
    return x if offset is None else x + offset.float()


def _check_format(format: str) -> None:
    if format not in LARGEST:
        raise ValueError(f"format is {format!r}, but must be one of {', '.join(map(repr, LARGEST))}")


def _grouped(x: Tensor, format: str) -> Tensor:  # [..., groups, channels of a group]
    if format != "int4":
        return x.unsqueeze(-2)
    if x.shape[-1] % INT4_GROUP:
        raise ValueError(f"x has {x.shape[-1]} channels, but int4 takes a multiple of {INT4_GROUP}")
    return x.unflatten(-1, (-1, INT4_GROUP))


def _rounded_up_to_bfloat16(x: Tensor) -> Tensor:
    """Of finite float32 that is not negative; what is below the least normal number becomes 0."""
    bits = (x.view(torch.int32) + 0xFFFF) >> 16
    return bits.to(torch.int16).view(torch.bfloat16).masked_fill(x < torch.finfo(torch.float32).smallest_normal, 0)
