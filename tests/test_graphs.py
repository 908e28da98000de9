"""A block's denoising loop as one graph: what a capture on a GPU needs, proven on a recording that is as blind to the
host as a CUDA graph. test_cuda.py captures and replays on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compare import assert_same_bits
from graph_tape import HostWork, MemoryRead, Tape, memory_of
from small_model import CONFIG, FRAME_SEQLEN, LATENT, model
from torch import Tensor

from python_ref.noise import TorchNoise
from python_ref.pipelines.inference import CausalInferencePipeline
from python_ref.schedule import FlowMatchSchedule
from selfforcing_ext import GraphedBlock, PagedKVCache, PagePool, PhiloxNoise, add_noise, graphs, mask

BATCH, FRAMES, BLOCKS = 2, 2, 9
STEPS = (1000.0, 750.0, 500.0, 250.0)

CACHES = {
    "window": {"window_frames": 5, "sink_frames": 1},
    "window of any length": {"window_frames": 7},
    "limit": {"max_frames": FRAMES * BLOCKS},
    "on_read": {"window_frames": 5, "sink_frames": 1, "rope": "on_read"},
    "int8": {"window_frames": 5, "quantization": "int8"},
    "biased": {"window_frames": 5, "sink_frames": 2, "past_bias": (1.0, -0.5, 0.25)},
}


class Tapes:
    """Stands in for CUDA graphs in ``selfforcing_ext.graphs``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen = MemoryRead()  # by first calls, which are not recorded
        self.growing: list[PagedKVCache] = []  # caches whose memory may be another one now
        self.made: list[Tape] = []
        monkeypatch.setattr(graphs, "recorder_for", lambda device: self._record)
        # As in a capture, where no dispatch mode is active: tables are made once and kept.
        monkeypatch.setattr(mask, "_get_current_dispatch_mode", lambda: None)

    def _record(self, function: Callable, inputs: tuple[Tensor, ...]) -> Tape:
        grown = {memory_of(tensor): tensor for cache in self.growing for tensor in cache.memory_of_block()}
        self.made.append(Tape(function, inputs, self.seen.memory() | grown))
        return self.made[-1]


@pytest.fixture
def tapes(monkeypatch) -> Tapes:
    return Tapes(monkeypatch)


def denoising_of(generator, cache: PagedKVCache) -> Callable[..., Tensor]:
    """Four steps and the clean pass of a block."""
    weight = generator.head.head.weight
    embedding = torch.linspace(-1, 1, BATCH * CONFIG.text_len * CONFIG.text_dim).reshape(BATCH, CONFIG.text_len, -1)
    context = generator.encode_context(embedding.to(weight))
    levels = (torch.tensor(STEPS) / 1000).to(weight.device)

    def denoise(x: Tensor, *noise: Tensor) -> Tensor:
        shape = x.shape[:2]
        for step, timestep in enumerate(STEPS):
            flow = generator(x, x.new_full(shape, timestep), context, cache=cache)
            sigma = levels[step].expand(shape)
            if step + 1 < len(STEPS):
                _, x = generator.ops.denoise_step(flow, x, sigma, levels[step + 1].expand(shape), noise[step])
            else:
                x, _ = generator.ops.denoise_step(flow, x, sigma)
        generator(x, x.new_zeros(shape), context, cache=cache, commit=True)
        return x

    return denoise


def block_inputs(index: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(index)
    return [torch.randn(BATCH, FRAMES, *LATENT, generator=generator) for _ in STEPS]


@pytest.mark.parametrize("options", CACHES.values(), ids=CACHES)
@torch.no_grad()
def test_replayed_blocks_are_the_eager_ones(options: dict, tapes: Tapes):
    """Bit for bit, over evictions and wrapped rings, though Python ran for the first two blocks alone."""
    generator = model()
    caches = [generator.make_cache((BATCH, 1, *LATENT), page_size=5, **{"max_frames": None, **options}) for _ in "12"]
    eager = denoising_of(generator, caches[0])
    graphed = GraphedBlock(caches[1], FRAMES, denoising_of(generator, caches[1]))
    for index in range(BLOCKS):
        inputs = block_inputs(index)
        with tapes.seen if index == 0 else torch.no_grad():
            found = graphed(*inputs)
        assert_same_bits(found, eager(*inputs), f"block {index}")
        assert caches[1].num_frames == caches[0].num_frames == FRAMES * (index + 1)
        assert caches[1].visible_frames == caches[0].visible_frames
    assert len(tapes.made) == 1


@torch.no_grad()
def test_a_cache_that_grows_is_captured_again(tapes: Tapes):
    """Its memory moves: a graph of the old memory would read what is no longer written."""
    generator = model()
    cache = generator.make_cache((BATCH, 1, *LATENT), None, page_size=5)
    eager_cache = generator.make_cache((BATCH, 1, *LATENT), None, page_size=5)
    tapes.growing.append(cache)
    graphed, eager = GraphedBlock(cache, FRAMES, denoising_of(generator, cache)), denoising_of(generator, eager_cache)
    sizes = set()
    for index in range(2 * BLOCKS):
        with tapes.seen if index == 0 else torch.no_grad():
            found = graphed(*block_inputs(index))
        assert_same_bits(found, eager(*block_inputs(index)), f"block {index}")
        sizes.add(cache.pool.num_pages)
    assert len(sizes) > 2
    assert len(sizes) - 1 <= len(tapes.made) <= 2 * len(sizes)  # pages and their table grow


@torch.no_grad()
def test_streams_of_other_lengths_and_a_new_start(tapes: Tapes):
    """Positions are data: streams that are not in step, a reset, and an eager block in between need no other graph."""
    generator = model()
    outputs = []
    for use_graph in (False, True):
        pool = PagePool(40, 5, CONFIG.num_layers, CONFIG.num_heads, CONFIG.head_dim)
        streams = [pool.open_stream(5, 1, frame_seqlen=FRAME_SEQLEN) for _ in range(BATCH)]
        ahead = PagedKVCache.of_streams(streams[:1])
        for layer in range(CONFIG.num_layers):
            k, v = (torch.randn(1, 3 * FRAME_SEQLEN, 2, 16, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
            ahead.write(layer, k, v)
        ahead.commit(3)
        cache = PagedKVCache.of_streams(streams)
        denoise = denoising_of(generator, cache)
        run = GraphedBlock(cache, FRAMES, denoise) if use_graph else denoise
        found = []
        for index in range(8):
            if index == 4:
                cache.reset()
            if index == 6:
                found.append(denoise(*block_inputs(index)))
                continue
            with tapes.seen if index == 0 else torch.no_grad():
                found.append(run(*block_inputs(index)))
        outputs.append(found)
    for index, (eager, replayed) in enumerate(zip(*outputs, strict=True)):
        assert_same_bits(replayed, eager, f"block {index}")
    assert len(tapes.made) == 1


@torch.no_grad()
def test_what_a_stream_sees_is_chosen_between_blocks(tapes: Tapes):
    """Biases and a selection with room are data; one with more spans than there was room for is captured anew."""
    generator = model()
    outputs = []
    for use_graph in (False, True):
        pool = PagePool(60, 5, CONFIG.num_layers, CONFIG.num_heads, CONFIG.head_dim)
        streams = [pool.open_stream(frame_seqlen=FRAME_SEQLEN, max_frames=14) for _ in range(BATCH)]
        cache = PagedKVCache.of_streams(streams)
        tapes.growing = [cache]
        denoise = denoising_of(generator, cache)
        run = GraphedBlock(cache, FRAMES, denoise) if use_graph else denoise
        found, recordings = [], []
        for index in range(7):
            if index == 3:
                cache.past_bias = (0.0, -1.0, 0.5)
                streams[0].select_frames([0, 1])
            if index == 5:
                streams[1].select_frames([0, 3, 6])
            with tapes.seen if index == 0 else torch.no_grad():
                found.append(run(*block_inputs(index)))
            recordings.append(len(tapes.made))
        outputs.append(found)
    for index, (eager, replayed) in enumerate(zip(*outputs, strict=True)):
        assert_same_bits(replayed, eager, f"block {index}")
    assert recordings == [0, 1, 1, 1, 1, 2, 3]  # three spans, then four, where there was room for two


def test_outputs_and_inputs_stay_the_callers(tapes: Tapes):
    generator = model()
    cache = generator.make_cache((BATCH, 1, *LATENT), None, window_frames=5)
    graphed = GraphedBlock(cache, FRAMES, denoising_of(generator, cache))
    with tapes.seen:
        graphed(*block_inputs(0))
    second, inputs = graphed(*block_inputs(1)), block_inputs(2)
    kept, given = second.clone(), [x.clone() for x in inputs]
    graphed(*inputs)
    assert_same_bits(second, kept)
    for index, (x, before) in enumerate(zip(inputs, given, strict=True)):
        assert_same_bits(x, before, f"input {index}")


def test_the_pipeline_makes_the_same_video(tapes: Tapes, monkeypatch):
    """Blocks of two lengths have a graph each."""
    generator = model()
    noise = torch.randn(BATCH, 9, *LATENT)
    context = torch.randn(BATCH, CONFIG.text_len, CONFIG.text_dim)
    videos = []
    for use_cuda_graph in (False, True):
        pipeline = CausalInferencePipeline(
            generator,
            FlowMatchSchedule(5.0),
            [1000, 625, 250],
            FRAMES,
            first_frame_alone=True,
            window_frames=5,
            sink_frames=1,
            use_cuda_graph=use_cuda_graph,
        )
        with tapes.seen:
            videos.append(pipeline.generate(noise, context, TorchNoise(torch.Generator().manual_seed(3))))
    assert_same_bits(videos[1], videos[0])


@torch.no_grad()
def test_noise_that_is_counted_on(tapes: Tapes):
    """An offset on the device moves on in the graph, and a replay draws other noise."""
    cache = model().make_cache((BATCH, 1, *LATENT), None, window_frames=5)

    def noisy_block(offset: Tensor) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            out = add_noise(x, PhiloxNoise(7, offset), x.new_full(x.shape[:2], 0.5))
            offset.add_(1)
            for layer in range(cache.num_layers):
                cache.write(layer, *(x.new_zeros(BATCH, FRAMES * FRAME_SEQLEN, 2, 16) for _ in "kv"))
            return out

        return run

    graphed = GraphedBlock(cache, FRAMES, noisy_block(torch.zeros(1, dtype=torch.int64)))
    x = block_inputs(0)[0]
    sigma, found = torch.full((BATCH, FRAMES), 0.5), []
    for index in range(4):
        with tapes.seen if index == 0 else torch.no_grad():
            found.append(graphed(x))
        assert_same_bits(found[-1], add_noise(x, PhiloxNoise(7, index), sigma), f"block {index}")
    assert len(tapes.made) == 1


def reads_a_number(x: Tensor, cache: PagedKVCache) -> Tensor:
    return x * cache.position[0].item()


def makes_a_tensor(x: Tensor, cache: PagedKVCache) -> Tensor:
    return x * torch.tensor(float(cache.num_frames))


def commits_itself(x: Tensor, cache: PagedKVCache) -> Tensor:
    for layer in range(cache.num_layers):
        cache.write(layer, *(x.new_zeros(BATCH, FRAMES * FRAME_SEQLEN, 2, 16) for _ in "kv"))
    cache.commit(FRAMES)
    return x


@pytest.mark.parametrize("function", [reads_a_number, makes_a_tensor, commits_itself])
@torch.no_grad()
def test_the_tape_refuses_what_a_capture_would_not_repeat(function: Callable):
    """Planted: a number that the host reads, a tensor that it makes, and a cache whose host's part is in the graph."""
    cache = model().make_cache((BATCH, 1, *LATENT), None, window_frames=5)
    x = torch.ones(3)
    with MemoryRead() as seen:
        x = x + cache.position[:1] + sum(tensor.sum() for tensor in cache.memory_of_block())
    with pytest.raises(HostWork):
        Tape(lambda x: function(x, cache), [x], seen.memory())


@torch.no_grad()
def test_wrong_calls(tapes: Tapes):
    generator = model()
    shape = (BATCH, 1, *LATENT)
    with pytest.raises(ValueError, match=r"cache has grad_through_cache, but a graph records no gradient"):
        GraphedBlock(generator.make_cache(shape, 4, grad_through_cache=True), FRAMES, lambda: None)
    cache = generator.make_cache(shape, max_frames=2 * FRAMES)
    graphed = GraphedBlock(cache, FRAMES, denoising_of(generator, cache))
    x, *noise = block_inputs(0)
    with tapes.seen:
        graphed(x, *noise)
    with pytest.raises(ValueError, match=r"3 inputs are given, but the first call had 4"):
        graphed(x, *noise[:-1])
    with pytest.raises(ValueError, match=r"input 0 is float32 \[2, 1, 4, 4, 6\] on cpu, but must be float32 \[2, 2"):
        graphed(x[:, :1], *noise)
    graphed(x, *noise)
    with pytest.raises(ValueError, match=r"max_frames is 4"):
        graphed(x, *noise)
    assert cache.num_frames == 2 * FRAMES
    forgetful = generator.make_cache(shape, None, window_frames=5)
    with pytest.raises(ValueError, match=r"layers \[0, 1\] of 2 have not written the block"):
        GraphedBlock(forgetful, FRAMES, lambda x: x)(x)


def test_only_on_a_gpu_and_only_ours():
    cache = model().make_cache((BATCH, 1, *LATENT), 4)
    with pytest.raises(ValueError, match=r"cache is on cpu, but a CUDA graph needs one on a CUDA device"):
        GraphedBlock(cache, FRAMES, lambda x: x)
    reference = type(model())(CONFIG, backend="reference")
    with pytest.raises(ValueError, match=r"use_cuda_graph is True, but needs backend 'ext'"):
        CausalInferencePipeline(reference, FlowMatchSchedule(5.0), [1000], use_cuda_graph=True)
