"""Noise that kernels draw: the published words, normal numbers from them, and the same bits everywhere."""

import math

import pytest
import torch
from compare import assert_same_bits
from elementwise import DEVICES, DTYPES, NAMES, num_threads, padded

from python_ref.ops import denoise as definition
from python_ref.ops.philox import box_muller, normal_noise, philox4x32
from selfforcing_ext import PhiloxNoise, add_noise, denoise_step, guided_denoise_step

SHAPES = [(1, 1, 1, 1, 1), (2, 3, 4, 5, 7), (2, 2, 3, 8, 8), (1, 4, 16, 30, 52)]
NOISES = {
    "ints": lambda batch, device: PhiloxNoise(-7, 2**40 + 3),
    "tensors": lambda batch, device: PhiloxNoise(
        torch.tensor([2**61], device=device), torch.tensor([1], device=device)
    ),
    "own seeds and offsets": lambda batch, device: PhiloxNoise(
        torch.arange(batch, device=device), torch.arange(batch, device=device).flip(0)
    ),
}


def drawn(shape: tuple[int, ...], noise: PhiloxNoise) -> torch.Tensor:
    """The noise alone, as an op draws it."""
    return add_noise(torch.zeros(shape), noise, torch.ones(shape[:2]))


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
    ids=["zeros", "ones", "digits of pi"],
)
def test_published_words(counter, key, words):
    """philox4x32 10 in kat_vectors of Random123, the library of the paper."""
    actual = philox4x32([torch.tensor([word]) for word in counter], [torch.tensor([word]) for word in key])
    assert [int(word) for word in actual] == words


def test_numbers_by_heart():
    """Those that csrc/tests/denoise_problems.h has of the reference."""
    numbers = normal_noise((2, 1, 1, 1, 9), PhiloxNoise(0x123456789ABCDEF, 0x300000005)).flatten(1)
    assert [number.hex() for number in numbers[:, ::4].flatten().tolist()] == [
        "-0x1.53c97e0000000p-2",
        "-0x1.86cc060000000p-4",
        "-0x1.3060220000000p-1",
        "0x1.9a38800000000p-1",
        "0x1.58d0520000000p-1",
        "0x1.0ac5520000000p-1",
    ]


def test_box_muller_against_float64():
    """Every quarter turn and its border, and radii from 0 to the largest."""
    radius_words = torch.cat([torch.tensor([0, 1, 2**32 - 1]), torch.randint(0, 2**32, (10000,))])
    turn_words = torch.cat([torch.arange(8) << 29, torch.randint(0, 2**32, (10000,))])
    radius_word, turn_word = torch.cartesian_prod(radius_words[:300], turn_words[:300]).unbind(-1)
    first, second = box_muller(radius_word, turn_word)
    u = (((radius_word >> 1).float() + 0.5) * 2.0**-31).double()  # which is rounded to float32
    radius, turn = (-2 * u.log()).sqrt(), 2 * torch.pi * turn_word.double() / 2**32
    assert first.dtype == torch.float32
    torch.testing.assert_close(first.double(), radius * turn.cos(), rtol=0, atol=1e-6)
    torch.testing.assert_close(second.double(), radius * turn.sin(), rtol=0, atol=1e-6)
    assert 6.6 < float(first.abs().max()) < 6.7


def test_distribution():
    """Moments, and the largest distance from the normal distribution (Kolmogorov and Smirnov) of a million numbers."""
    numbers = drawn((4, 1, 16, 128, 128), PhiloxNoise(1)).flatten().double()
    n = numbers.numel()
    for power, (mean, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}.items():
        assert abs(float((numbers**power).mean()) - mean) < 4 * math.sqrt(variance / n), power
    ranks = torch.arange(n, dtype=torch.float64) / n
    normal = torch.special.ndtr(numbers.sort().values)
    distance = float(torch.maximum(normal - ranks, ranks + 1 / n - normal).max())
    assert distance * math.sqrt(n) < 1.95  # exceeded by chance once in a thousand


def test_draws_are_independent():
    """Of entries of a batch, of seeds and of offsets that differ in either word; and neighbours in a draw."""
    shape = (2, 1, 1, 256, 256)
    draws = [drawn(shape, PhiloxNoise(*numbers)) for numbers in ((1, 0), (2, 0), (1, 1), (1 << 32, 0), (1, 1 << 32))]
    rows = torch.cat(draws).flatten(1).double()
    rows = torch.cat([rows, rows[:1].roll(1, 1), rows[:1].roll(2, 1)])
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert float(correlation.abs().max()) < 5 / math.sqrt(rows.shape[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_of_the_reference(shape, dtype, noise, device):
    """Drawn noise, and with it x0, guidance and the next step, contiguous and not."""
    cond, uncond, x_t = (torch.randn(shape).to(dtype) for _ in range(3))
    sigma, sigma_next = torch.rand(shape[:2]), torch.rand(shape[:2])
    here, there = NOISES[noise](shape[0], "cpu"), NOISES[noise](shape[0], device)
    for arrange in (lambda x: x.to(device), lambda x: padded(x.to(device), (0, 1, 2))):
        latents, levels = [arrange(x) for x in (cond, uncond, x_t)], [x.to(device) for x in (sigma, sigma_next)]
        actual = guided_denoise_step(*latents[:2], 3.1, latents[2], *levels, there)
        expected = definition.guided_denoise_step(cond, uncond, 3.1, x_t, sigma, sigma_next, here)
        noised = add_noise(latents[2], there, levels[0]), definition.add_noise(x_t, here, sigma)
        for mine, true in (*zip(actual, expected, strict=True), noised):
            assert_same_bits(mine.cpu(), true)


def test_an_entry_with_its_own_seed_is_the_same_in_every_batch():
    shape = (3, 2, 4, 6, 6)
    seeds, offsets = torch.tensor([5, 6, 7]), torch.tensor([2])
    together = drawn(shape, PhiloxNoise(seeds, offsets))
    for entry, seed in enumerate(seeds.tolist()):
        assert_same_bits(together[entry : entry + 1], drawn((1, *shape[1:]), PhiloxNoise(seed, 2)))
    assert_same_bits(drawn(shape, PhiloxNoise(torch.tensor([5]).expand(3), 2))[2], together[0])


def test_a_draw_reads_its_numbers_when_it_runs():
    """As the replays of a graph need it: counted on in place, the offset gives the next draw."""
    shape, offset = (1, 1, 1, 8, 8), torch.tensor([0])
    noise = PhiloxNoise(torch.tensor([3]), offset)
    draws = []
    for _ in range(2):
        draws.append(drawn(shape, noise))
        offset += 1
    for number, draw in enumerate(draws):
        assert_same_bits(draw, drawn(shape, PhiloxNoise(3, number)))
    assert not torch.equal(*draws)


def test_same_bits_with_any_number_of_threads():
    shape = SHAPES[-1]
    results = []
    for threads in (1, 2):
        with num_threads(threads):
            results.append(drawn(shape, PhiloxNoise(9)))
    assert_same_bits(*results)


def test_gradients():
    """Drawn noise is a constant: gradients are those of the same noise given."""
    shape, noise = (2, 3, 2, 4, 4), PhiloxNoise(4, 2)
    sigma, sigma_next = torch.rand(shape[:2]), torch.rand(shape[:2])
    flow, x_t, weight = (
        torch.randn(shape, requires_grad=True),
        torch.randn(shape, requires_grad=True),
        torch.randn(shape),
    )
    gradients = []
    for given in (noise, normal_noise(shape, noise)):
        x0, x_next = denoise_step(flow, x_t, sigma, sigma_next, given)
        loss = (weight * (x0 + 2 * x_next + add_noise(x0, given, sigma))).sum()
        gradients.append(torch.autograd.grad(loss, (flow, x_t)))
    for actual, expected in zip(*gradients, strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("tensors", [False, True], ids=["ints", "tensors"])
def test_compile_fullgraph(tensors):
    """One graph draws anew with every offset."""
    shape = (2, 3, 2, 4, 4)
    sigma, x = torch.rand(shape[:2]), torch.randn(shape, requires_grad=True)

    def step(x, noise):
        return denoise_step(x, x, sigma, sigma, noise)[1] + add_noise(x, noise, sigma)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for offset in range(3):
        noise = PhiloxNoise(torch.tensor([3]), torch.tensor([offset])) if tensors else PhiloxNoise(3, offset)
        actual, expected = compiled(x, noise), step(x, noise)
        assert_same_bits(actual.detach(), expected.detach())
        (gradient,) = torch.autograd.grad(actual.sum(), x)
        assert_same_bits(gradient, torch.autograd.grad(expected.sum(), x)[0])
