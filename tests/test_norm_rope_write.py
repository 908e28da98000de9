"""Keys that are normalised, rotated and written in one pass: the same bits, in the pages and returned, as one after the
other, and what the reference has."""

import pytest
import torch
from compare import assert_same_bits
from elementwise import DEVICES, DTYPES, NAMES, assert_as_accurate, num_threads, padded
from small_model import CONFIG, inputs, model
from torch import Tensor

from python_ref.ops.kv_cache import PagedKVCache as ReferenceCache
from selfforcing_ext import PagedKVCache, qk_norm_rope

HEADS, HEAD_DIM, GRID = 3, 32, (2, 2, 3)
FRAME_SEQLEN, CHANNELS = 6, HEADS * HEAD_DIM
FORMATS = [None, "int8", "fp8_e4m3", "int4"]


def make(kind=PagedKVCache, dtype=torch.float32, quantization=None, device="cpu", **options):
    offset = None if quantization is None else torch.linspace(-1, 1, CHANNELS, device=device).view(1, HEADS, HEAD_DIM)
    sizes = {"batch_size": 2, "window_frames": 5, "sink_frames": 1, "dtype": dtype, "device": device}
    return kind(1, HEADS, HEAD_DIM, FRAME_SEQLEN, **sizes, quantization=quantization, key_offset=offset, **options)


def cleared(cache: PagedKVCache) -> PagedKVCache:
    for tensor in pages(cache):
        tensor.zero_()
    return cache


def block(dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Projected keys and values as slices of one projection, and a weight."""
    both = torch.randn(2, GRID[0] * FRAME_SEQLEN, 2 * CHANNELS).to(dtype).to(device)
    k, v = both.split(CHANNELS, dim=-1)
    return k, v.unflatten(-1, (HEADS, HEAD_DIM)), (1 + 0.2 * torch.randn(CHANNELS)).to(device)


def pages(cache: PagedKVCache) -> list[Tensor]:
    layer = cache.pool.layers[0]
    return [
        x.view(torch.uint8) for x in (layer.k_pages, layer.v_pages, layer.k_scales, layer.v_scales) if x is not None
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_same_bits_as_one_after_the_other(dtype, quantization, threads, device):
    options = {"dtype": dtype, "quantization": quantization, "device": device}
    together, apart = (cleared(make(**options, page_size=7)) for _ in range(2))
    with num_threads(threads):
        for _ in range(4):  # beyond the window, so that pages are recycled
            k, v, weight = block(dtype, device)
            keys = together.norm_rope_write(0, k, v, weight, GRID)
            expected = qk_norm_rope(k, weight, HEADS, GRID, apart.position)
            apart.write(0, expected, v)
            assert_same_bits(keys, expected)
            for actual, right in zip(pages(together), pages(apart), strict=True):
                assert_same_bits(actual, right)
            for cache in (together, apart):
                cache.commit(GRID[0])


@pytest.mark.parametrize("rope", ["on_write", "on_read"])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_what_later_blocks_see(quantization, rope):
    """Of the reference's cache, within what its own float32 is off from float64."""
    options = {"rope": rope, "rope_grid": GRID[1:] if rope == "on_read" else None, "quantization": quantization}
    ours, reference, exact = (
        make(**options),
        make(ReferenceCache, **options),
        make(ReferenceCache, torch.float64, **options),
    )
    for _ in range(3):
        k, v, weight = block()
        for cache, dtype in ((ours, torch.float32), (reference, torch.float32), (exact, torch.float64)):
            keys = cache.norm_rope_write(0, k.to(dtype), v.to(dtype), weight.to(dtype), GRID)
            assert keys.shape == v.shape
            cache.commit(GRID[0])
    q, k, v = torch.randn(3, 2, FRAME_SEQLEN, HEADS, HEAD_DIM)
    if quantization is None:
        seen = [cache.attend(0, *(x.to(cache.dtype) for x in (q, k, v))) for cache in (ours, reference, exact)]
        assert_as_accurate(*seen)
    else:  # an element may be rounded the other way
        torch.testing.assert_close(ours.attend(0, q, k, v), reference.attend(0, q, k, v), rtol=0, atol=2e-2)


def test_a_recorded_call_has_the_gradient_of_its_parts():
    cache = make(grad_through_cache=True)
    k, v, weight = (x.clone().requires_grad_() for x in block())
    keys = cache.norm_rope_write(0, k, v, weight, GRID)
    cache.commit(GRID[0])
    q = torch.randn_like(keys)
    loss = cache.attend(0, q, q, q).square().sum() + keys.sum()
    gradients = torch.autograd.grad(loss, (k, v, weight))
    exact = make(ReferenceCache, torch.float64, grad_through_cache=True)
    wide = [x.detach().double().requires_grad_() for x in (k, v, weight)]
    keys = exact.norm_rope_write(0, *wide, GRID)
    exact.commit(GRID[0])
    loss = exact.attend(0, *[q.double()] * 3).square().sum() + keys.sum()
    for actual, expected in zip(gradients, torch.autograd.grad(loss, wide), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


def test_strides():
    k, v, weight = block()
    results = []
    for arrange in (torch.clone, lambda x: padded(x, (0, 1)), lambda x: padded(x, tuple(range(x.ndim - 1)))):
        cache = cleared(make())
        results.append([cache.norm_rope_write(0, arrange(k), arrange(v), weight, GRID), *pages(cache)])
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=True):
            assert_same_bits(actual, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": torch.zeros(2, 12, 90)}, ValueError, "num_heads is 3|weight has shape|head dim"),
        ({"k": torch.zeros(2, 12, HEADS, HEAD_DIM)}, ValueError, r"k has shape \[2, 12, 3, 32\], but must have three"),
        ({"v": torch.zeros(2, 6, HEADS, HEAD_DIM)}, ValueError, "v has 6 tokens, but must have 12 like k"),
        ({"weight": torch.zeros(3)}, ValueError, r"weight has shape \[3\], but must have shape \[96\]"),
        ({"grid": (1, 2, 3)}, ValueError, r"k has 12 tokens, but grid \(1, 2, 3\) has 6"),
        ({"eps": -1.0}, ValueError, "eps is -1.0, but must not be below 0"),
        ({"layer": 1}, ValueError, r"layer is 1, but must be in \[0, 1\)"),
        (
            {"k": torch.zeros(2, 12, CHANNELS, dtype=torch.float16)},
            TypeError,
            "k is float16, but the cache holds float32",
        ),
    ],
)
def test_bad_input_changes_nothing(change, error, message):
    cache = make()
    k, v, weight = block()
    free = cache.pool.stats()
    with pytest.raises(error, match=message):
        cache.norm_rope_write(**{"layer": 0, "k": k, "v": v, "weight": weight, "grid": GRID} | change)
    assert cache.pool.stats() == free


@pytest.mark.parametrize("rope", ["on_write", "on_read"])
def test_a_model_commits_the_same_past_in_one_pass(rope, monkeypatch):
    """Its clean pass without gradient, against that of a cache that has no such call."""
    generator = model()
    x, t, context = inputs()
    layers: list[int] = []

    def counted(cache: PagedKVCache, layer: int, *arguments: object) -> Tensor:
        layers.append(layer)
        return one_pass(cache, layer, *arguments)

    def flow_after_a_commit() -> Tensor:
        cache = generator.make_cache(x.shape, max_frames=8, rope=rope)
        with torch.no_grad():
            generator(x, t, context, cache=cache, commit=True)
            return generator(x, t, context, cache=cache)

    one_pass = PagedKVCache.norm_rope_write
    monkeypatch.setattr(PagedKVCache, "norm_rope_write", counted)
    flow = flow_after_a_commit()
    assert layers == list(range(CONFIG.num_layers))
    monkeypatch.delattr(PagedKVCache, "norm_rope_write")
    assert_same_bits(flow, flow_after_a_commit())


def test_compile_fullgraph():
    """A graph that writes, attends and commits; replays write elsewhere."""

    def step(cache, k, v, weight):
        with torch.no_grad():
            keys = cache.norm_rope_write(0, k, v, weight, GRID)
            out = cache.attend(0, keys, keys, v)
            cache.commit(GRID[0])
            return out

    compiled, caches = torch.compile(step, fullgraph=True, backend="aot_eager"), [cleared(make()) for _ in range(2)]
    for _ in range(3):
        k, v, weight = block()
        assert_same_bits(compiled(caches[0], k, v, weight), step(caches[1], k, v, weight))
    for actual, expected in zip(*map(pages, caches), strict=True):
        assert_same_bits(actual, expected)
