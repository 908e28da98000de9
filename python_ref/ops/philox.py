"""Standard normal noise as a function of a seed, an offset and the place of an element.

Source: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11); Box and Muller, "A note on
the generation of random normal deviates", 1958.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from selfforcing_ext.philox import PhiloxNoise

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85  # what the halves of the key grow by every round: golden ratio and sqrt(3) - 1
ROUNDS = 10
WORD = 0xFFFFFFFF

# Taylor coefficients of sin and cos (pi / 2 x), highest power first.
SINE = (1.60441185e-4, -4.68175414e-3, 7.96926262e-2, -6.45964098e-1, 1.57079633)
COSINE = (-2.52020424e-5, 9.19260274e-4, -2.08634807e-2, 2.53669508e-1, -1.23370055, 1.0)
ATANH = (2 / 9, 2 / 7, 2 / 5, 2 / 3, 2.0)  # of 2 atanh(t) / t in t^2


def normal_noise(shape: Sequence[int], noise: PhiloxNoise, device: torch.device | str = "cpu") -> Tensor:
    """The noise that ops draw for latents [B, F, C, H, W] of this shape, in float32.

    Every operation is rounded by itself, so that these are the bits of the kernels.
    """
    batch, elements = shape[0], math.prod(shape[1:])
    entries = torch.arange(batch, device=device)
    seed, offset = (_per_entry(number, batch, device) for number in noise)
    if isinstance(noise.seed, Tensor) and len(noise.seed) > 1:
        entries = torch.zeros_like(entries)
    blocks = torch.arange(-(-elements // 4), device=device)
    counter = [blocks, entries[:, None], (offset & WORD)[:, None], (offset >> 32 & WORD)[:, None]]
    key = [(seed & WORD)[:, None], (seed >> 32 & WORD)[:, None]]
    words = philox4x32(torch.broadcast_tensors(*counter), key)
    numbers = torch.stack([*box_muller(words[0], words[1]), *box_muller(words[2], words[3])], dim=-1)
    return numbers.flatten(1)[:, :elements].reshape(tuple(shape))


def philox4x32(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """Four random words of every counter (four words) and key (two): int64 tensors with values of 32 bits."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # what is beyond 63 bits wraps into the sign
        c0, c1, c2, c3 = (
            (product1 >> 32 & WORD) ^ c1 ^ k0,
            product1 & WORD,
            (product0 >> 32 & WORD) ^ c3 ^ k1,
            product0 & WORD,
        )
        k0, k1 = k0 + WEYL[0] & WORD, k1 + WEYL[1] & WORD
    return [c0, c1, c2, c3]


def box_muller(radius_word: Tensor, turn_word: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normal numbers, float32, of two random words: radius sqrt(-2 ln u), and a turn."""
    # u in (0, 1] as 2^exponent * m, m in [sqrt(1/2), sqrt(2)); ln m = 2 atanh(t) with t = (m - 1) / (m + 1).
    u = ((radius_word >> 1).float() + 0.5) * 2.0**-31
    bits = u.view(torch.int32)
    exponent = bits - 0x3F3504F3 >> 23
    m = (bits - (exponent << 23)).view(torch.float32)
    t = (m - 1) / (m + 1)
    logarithm = exponent.float() * 0.693147181 + _polynomial(ATANH, t * t) * t
    # torch's float32 square root is off by a bit now and then; that of a float64, rounded, never is.
    radius = (logarithm * -2).double().sqrt().float()

    # The nearest quarter turn, and the rest x in [-1/2, 1/2] of one.
    quadrant = (turn_word + (1 << 29) & WORD) >> 30
    rest = turn_word - (quadrant << 30)
    x = torch.where(rest > 1 << 30, rest - (1 << 32), rest).float() * 2.0**-30
    sine, cosine = _polynomial(SINE, x * x) * x, _polynomial(COSINE, x * x)

    odd = quadrant % 2 == 1
    along, across = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    along = torch.where((quadrant == 1) | (quadrant == 2), -along, along)
    across = torch.where(quadrant >= 2, -across, across)
    return radius * along, radius * across


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """By Horner's rule, the coefficients rounded to float32."""
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


def _per_entry(number: int | Tensor, batch: int, device: torch.device | str) -> Tensor:  # int64 [B]
    tensor = number if isinstance(number, Tensor) else torch.tensor([number], device=device)
    return tensor.expand(batch)
