"""Writes into quantised pages: the bits of the definition (python_ref/ops/quantization.py), in the pages that the table
names and nowhere else. test_cpu_isa.py runs those that are named for bits on every instruction set."""

import pytest
import torch
from cases import DTYPES, LAYOUTS, strided
from compare import assert_same_bits
from elementwise import num_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from python_ref.ops.quantization import INT4_GROUP, LARGEST, STORAGE, dequantise, quantise
from selfforcing_ext.library import ops

FORMATS = list(LARGEST)
SPARE_PAGES = 3


def empty_pages(format: str, pages: int, page_size: int, heads: int, head_dim: int) -> dict[str, Tensor]:
    """Pages and scales whose every byte is 0x5a."""
    int4 = format == "int4"
    shape = (pages, page_size, heads)
    made = {}
    for side in ("k", "v"):
        made[f"{side}_pages"] = torch.zeros(*shape, head_dim // 2 if int4 else head_dim, dtype=STORAGE[format])
        made[f"{side}_scales"] = torch.zeros(*shape, head_dim // INT4_GROUP if int4 else 1, dtype=torch.bfloat16)
    for tensor in made.values():
        tensor.view(torch.uint8).fill_(0x5A)
    return made


def check_write(
    format: str, k: Tensor, v: Tensor, write_start: list[int], page_size: int, k_offset: Tensor | None = None
) -> None:
    """Writes k and v [B, L, H, D] and compares every bit of all pages and scales with the definition."""
    batch, tokens, heads, head_dim = k.shape
    row = (max(write_start) + tokens - 1) // page_size + 1
    count = batch * row + SPARE_PAGES
    page_table = torch.randperm(count)[: batch * row].reshape(batch, row).to(torch.int32)
    actual, expected = (empty_pages(format, count, page_size, heads, head_dim) for _ in range(2))
    start = torch.tensor(write_start, dtype=torch.int32)
    ops.kv_cache_write(
        actual["k_pages"], actual["v_pages"], page_table, start, k, v, actual["k_scales"], actual["v_scales"], k_offset
    )
    positions = start[:, None] + torch.arange(tokens)
    pages, offsets = page_table.gather(1, positions // page_size).long(), positions % page_size
    for side, x, offset in (("k", k, k_offset), ("v", v, None)):
        elements, scales = quantise(x, format, offset)
        # Byte for byte, since not every dtype can be indexed.
        expected[f"{side}_pages"].view(torch.uint8)[pages, offsets] = elements.view(torch.uint8)
        expected[f"{side}_scales"][pages, offsets] = scales
    for name, tensor in actual.items():
        assert_same_bits(tensor.view(torch.uint8), expected[name].view(torch.uint8), name)


@pytest.mark.parametrize("with_offset", [False, True], ids=["", "offset"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_quantised_bits(format, dtype, with_offset):
    head_dims = (32, 64, 128, 96, 256) if format == "int4" else (8, 24, 64, 128, 136, 256)
    for head_dim in head_dims:
        k, v = torch.randn(2, 2, 19, 3, head_dim).to(dtype)
        k_offset = torch.randn(3, head_dim) if with_offset else None
        check_write(format, k, v, [5, 0], 7, k_offset)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("format", FORMATS)
def test_layouts(format, layout):
    generator = torch.Generator().manual_seed(1)
    k, v = (strided((2, 11, 2, 64), layout, torch.bfloat16, generator) for _ in range(2))
    check_write(format, k, v, [3, 9], 4, torch.randn(2, 64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_quantised_bits_at_the_edges(format, dtype):
    """Zeros, infinities and NaN, the smallest and the largest numbers, sizes that differ from token to token."""
    info = torch.finfo(dtype)
    k, v = torch.randn(2, 1, 60, 2, 64)
    for x in (k, v):
        x *= torch.logspace(-38, 37, 60)[:, None, None]
        x[0, 0] = 0
        x[0, 1, 0, ::3] = -0.0
        x[0, 2, 0, 5], x[0, 3, 0, 6], x[0, 4, 1, 40] = torch.inf, torch.nan, -torch.inf
        x[0, 5] = info.max
        x[0, 6, 0, ::2] = info.min
        x[0, 7] = torch.nextafter(torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype))
        x[0, 8] = info.tiny
        x[0, 9, :, 1::2] = 0
    check_write(format, k.to(dtype), v.to(dtype), [0], 16)
    check_write(format, k.to(dtype), v.to(dtype), [0], 16, torch.randn(2, 64))


@pytest.mark.parametrize("format", FORMATS)
def test_quantised_bits_of_every_rounding(format):
    """Of every bfloat16 number up to the largest element, ties among them, and of its neighbours in float32."""
    numbers = torch.arange(-0x8000, 0x8000, dtype=torch.int16).view(torch.bfloat16).float()
    numbers = numbers[(numbers.abs() <= LARGEST[format]) & (numbers.abs() >= 2.0**-12)]
    groups = numbers.split(31)
    x = torch.full((len(groups), 32), LARGEST[format])  # so that the scale is 1
    for row, group in zip(x, groups, strict=True):
        row[: group.numel()] = group
    x = x[None, :, None, :] / 64
    below, above = (torch.nextafter(x, torch.full((), end)).clamp(-x.max(), x.max()) for end in (-9.0, 9.0))
    check_write(format, x, -x, [0], 64)
    check_write(format, below, above, [0], 64)


@settings(max_examples=60)
@given(
    format=st.sampled_from(FORMATS),
    dtype=st.sampled_from(DTYPES),
    page_size=st.integers(1, 40),
    write_start=st.lists(st.integers(0, 90), min_size=1, max_size=3),
    tokens=st.integers(0, 50),
    heads=st.integers(1, 4),
    eighths=st.integers(1, 20),
    seed=st.integers(0, 9),
)
def test_any_shape(format, dtype, page_size, write_start, tokens, heads, eighths, seed):
    torch.manual_seed(seed)
    head_dim = 32 * (eighths % 8 + 1) if format == "int4" else 8 * eighths
    k, v = torch.randn(2, len(write_start), tokens, heads, head_dim).to(dtype)
    check_write(format, k, v, write_start, page_size, torch.randn(heads, head_dim) if seed % 2 else None)


@pytest.mark.parametrize("format", FORMATS)
def test_any_number_of_threads(format):
    k, v = torch.randn(2, 2, 300, 3, 64)
    for threads in (1, 2, 3):
        with num_threads(threads):
            check_write(format, k, v, [3, 40], 32)


@pytest.mark.parametrize("format", FORMATS)
def test_written_again(format):
    """The last write counts."""
    pages = empty_pages(format, 1, 8, 2, 32)
    where = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    for x in torch.randn(2, 1, 8, 2, 32):
        ops.kv_cache_write(pages["k_pages"], pages["v_pages"], *where, x, -x, pages["k_scales"], pages["v_scales"])
        assert_same_bits(
            dequantise(pages["k_pages"], pages["k_scales"], format), dequantise(*quantise(x[0], format), format)[None]
        )


def arguments(format: str = "int8", head_dim: int = 64, **changes: Tensor | None) -> dict[str, Tensor | None]:
    good = {
        **empty_pages(format, 5, 4, 2, head_dim),
        "page_table": torch.tensor([[3, 1], [0, 4]], dtype=torch.int32),
        "write_start": torch.tensor([1, 2], dtype=torch.int32),
        "k": torch.randn(2, 6, 2, head_dim),
        "v": torch.randn(2, 6, 2, head_dim),
    }
    return good | changes


SCALES = torch.zeros(5, 4, 2, 1, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            arguments(k_scales=None),
            "k_scales and v_scales must be given exactly when the pages are quantised, which they",
        ),
        (
            arguments(k_pages=torch.zeros(5, 4, 2, 64), v_pages=torch.zeros(5, 4, 2, 64)),
            "k_scales and v_scales must be given exactly when the pages are quantised, which they are not",
        ),
        (
            arguments(
                k_pages=torch.zeros(5, 4, 2, 64),
                v_pages=torch.zeros(5, 4, 2, 64),
                k_scales=None,
                v_scales=None,
                k_offset=torch.zeros(2, 64),
            ),
            "k_offset is given, but the pages are not quantised",
        ),
        (
            arguments(k_pages=torch.zeros(5, 4, 2, 64, dtype=torch.int16)),
            r"k_pages is .*, but must be float32 like k, or int8, float8_e4m3fn or uint8 \(int4\)",
        ),
        (arguments(v_pages=torch.zeros(5, 4, 2, 64)), "v_pages is float32, but must be int8 like k_pages"),
        (arguments(v_pages=torch.zeros(5, 4, 2, 32, dtype=torch.int8)), r"v_pages has shape \[5, 4, 2, 32\]"),
        (
            arguments("int4", k=torch.zeros(2, 6, 2, 40), v=torch.zeros(2, 6, 2, 40)),
            "k has head dim 40, but int4 pages",
        ),
        (arguments("int4", k_pages=torch.zeros(5, 4, 2, 64, dtype=torch.uint8)), r"k_pages has shape \[5, 4, 2, 64\]"),
        (arguments("int4", v_scales=SCALES), r"v_scales has shape .* = \[5, 4, 2, 2\]"),
        (arguments(k_scales=SCALES.float()), "k_scales is float32, but must be bfloat16"),
        (arguments(v_scales=SCALES.repeat(1, 1, 1, 2)[..., :1]), "v_scales is not contiguous"),
        (arguments(k_offset=torch.zeros(64)), r"k_offset has shape \[64\], but must be \[H_kv, D\] = \[2, 64\]"),
        (arguments(k_offset=torch.zeros(2, 64).half()), "k_offset is float16, but must be float32"),
        (arguments(k_offset=torch.zeros(64, 2).mT), "k_offset is not contiguous"),
        (arguments(write_start=torch.tensor([1, 3], dtype=torch.int32)), r"write_start\[1\] is 3, but its 6 tokens"),
    ],
)
def test_bad_input_writes_nothing(call, message):
    before = {name: tensor.clone() for name, tensor in call.items() if tensor is not None}
    with pytest.raises(RuntimeError, match=f"kv_cache_write: {message}"):
        ops.kv_cache_write(**call)
    for name, tensor in before.items():
        after = call[name]
        assert after is not None
        assert_same_bits(after, tensor, name)
