"""Rollouts against a plain implementation: every key and value in a Python list, and autograd does the rest."""

import pytest
import torch
from compare import relative_error
from golden_files import BACKENDS
from torch.nn.functional import scaled_dot_product_attention

from python_ref.config import RolloutConfig
from python_ref.models.wan import CausalWanModel, WanConfig
from python_ref.noise import ReplayNoise, TorchNoise
from python_ref.pipelines.inference import CausalInferencePipeline
from python_ref.pipelines.self_gradient import SelfGradientPipeline
from python_ref.pipelines.training import CACHE_GRADIENTS, SelfForcingTrainingPipeline
from python_ref.schedule import FlowMatchSchedule
from python_ref.stages.stream import KeptCache

CONFIG = WanConfig(
    dim=16, num_heads=2, num_layers=2, ffn_dim=24, freq_dim=8, text_dim=6, text_len=3, in_dim=2, out_dim=2
)
SCHEDULE = FlowMatchSchedule(3.0)
STEPS = SCHEDULE.warp([1000, 600, 300])
HEIGHT, WIDTH = 4, 4
FRAME_SEQLEN = 4
CONTEXT_NOISE = 50

# Frames per block, frames, first frame alone, window, sink: without eviction, and with it in the middle of the rollout.
GEOMETRIES = {
    "everything visible": (2, 6, False, None, 0),
    "window": (2, 10, False, 4, 0),
    "window and sink": (2, 10, False, 5, 1),
    "first frame alone": (2, 9, True, 4, 1),
    "blocks of one frame": (1, 6, False, 2, 1),
}


class EverythingKept:
    """Stands in for a cache: every frame's keys and values of every layer, for ever, in a Python list."""

    rope = "on_write"

    def __init__(self, window_frames, sink_frames):
        self.window_frames, self.sink_frames = window_frames, sink_frames
        self.frames = [[] for _ in range(CONFIG.num_layers)]
        self.block = [None] * CONFIG.num_layers  # keys and values of the latest call

    @property
    def position(self):
        return torch.tensor([len(self.frames[0])], dtype=torch.int32)

    def is_visible(self, frame, block_end):
        if self.window_frames is None or frame < self.sink_frames:
            return True
        return frame >= block_end - self.window_frames + self.sink_frames

    def attend(self, layer, q, k, v):
        self.block[layer] = (k, v)
        block_end = len(self.frames[layer]) + q.shape[1] // FRAME_SEQLEN
        past = [kv for frame, kv in enumerate(self.frames[layer]) if self.is_visible(frame, block_end)]
        keys = torch.cat([*(kv[0] for kv in past), k], dim=1)
        values = torch.cat([*(kv[1] for kv in past), v], dim=1)
        return scaled_dot_product_attention(q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)).transpose(
            1, 2
        )

    def append(self, keys_and_values):
        for layer, (k, v) in enumerate(keys_and_values):
            self.frames[layer] += zip(k.split(FRAME_SEQLEN, dim=1), v.split(FRAME_SEQLEN, dim=1), strict=True)


def cached(clean, exit_step, cache_gradient):
    """What later blocks see of a tensor of the clean pass."""
    if cache_gradient == "full":
        return clean
    if cache_gradient == "exit_step":
        return exit_step + (clean - exit_step).detach()
    return clean.detach()


def plain_rollout(generator, noise, context, source, blocks, exit_steps, gradient_from, geometry, cache_gradient):
    """The definition: nothing is recomputed, shared or forgotten."""
    cache = EverythingKept(*geometry[3:])
    sigmas = SCHEDULE.sigma_at(STEPS).to(noise.dtype)
    context_sigma = SCHEDULE.sigma_at(torch.tensor(float(CONTEXT_NOISE))).to(noise.dtype)
    results, start = [], 0
    for frames, exit_step in zip(blocks, exit_steps, strict=True):
        x = noise[:, start : start + frames]
        for step in range(exit_step + 1):
            with torch.set_grad_enabled(step == exit_step and start >= gradient_from):
                flow = generator(x, STEPS[step].expand(x.shape[:2]), context, cache=cache)
                x0 = x - sigmas[step] * flow
            if step < exit_step:
                fresh = source.randn(x.shape, x.dtype, x.device)
                x = (1 - sigmas[step + 1]) * x0 + sigmas[step + 1] * fresh
        exit_kv = list(cache.block)
        with torch.set_grad_enabled(cache_gradient == "full" and start >= gradient_from):
            clean = (1 - context_sigma) * x0 + context_sigma * source.randn(x.shape, x.dtype, x.device)
            generator(clean, torch.full(x.shape[:2], float(CONTEXT_NOISE)), context, cache=cache)
        cache.append(
            [
                tuple(cached(clean, exit_, cache_gradient) for clean, exit_ in zip(*pair, strict=True))
                for pair in zip(cache.block, exit_kv, strict=True)
            ]
        )
        results.append(x0)
        start += frames
    return torch.cat(results, dim=1)


def make_inputs(geometry, batch, dtype, backend):
    torch.manual_seed(0)
    generator = CausalWanModel(CONFIG, backend=backend).to(dtype)
    torch.nn.init.normal_(generator.head.head.weight, std=0.3)  # it starts at zero, which would hide everything
    noise, grad_out = torch.randn(2, batch, geometry[1], 2, HEIGHT, WIDTH, dtype=dtype)
    return generator, noise, torch.randn(batch, 3, 6, dtype=dtype), grad_out


class RecordingNoise(TorchNoise):
    """Draws, and keeps what it drew."""

    def __init__(self, seed):
        super().__init__(seed)
        self.draws = []

    def randn(self, *arguments):
        self.draws.append(super().randn(*arguments))
        return self.draws[-1]

    def randint(self, *arguments):
        self.draws.append(super().randint(*arguments))
        return self.draws[-1]


def gradients(generator, video, grad_out):
    generator.zero_grad()
    video.backward(grad_out)
    return {name: parameter.grad.clone() for name, parameter in generator.named_parameters()}


@pytest.mark.parametrize("checkpoint_activations", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cache_gradient", CACHE_GRADIENTS)
def test_rollout_equals_the_plain_one(backend, cache_gradient, geometry, batch, checkpoint_activations):
    dtype, tolerance = (torch.float64, 1e-9) if backend == "reference" else (torch.float32, 1e-5)
    frames_per_block, num_frames, first_frame_alone, window_frames, sink_frames = GEOMETRIES[geometry]
    generator, noise, context, grad_out = make_inputs(GEOMETRIES[geometry], batch, dtype, backend)
    pipeline = SelfForcingTrainingPipeline(
        generator,
        SCHEDULE,
        STEPS,
        frames_per_block=frames_per_block,
        first_frame_alone=first_frame_alone,
        same_step_across_blocks=False,
        context_noise=CONTEXT_NOISE,
        gradient_frames=num_frames - 1,  # the first block gets none
        window_frames=window_frames,
        sink_frames=sink_frames,
        checkpoint_activations=checkpoint_activations,
        cache_gradient=cache_gradient,
    )
    source = RecordingNoise(seed=1)
    result = pipeline.rollout(noise, context, source)
    got = gradients(generator, result.video, grad_out)

    blocks = [1] * first_frame_alone + [frames_per_block] * (num_frames // frames_per_block)
    assert len(set(result.exit_steps)) > 1
    expected_video = plain_rollout(
        generator,
        noise,
        context,
        ReplayNoise(source.draws[1:]),
        blocks,
        result.exit_steps,
        gradient_from=1,
        geometry=GEOMETRIES[geometry],
        cache_gradient=cache_gradient,
    )
    expected = gradients(generator, expected_video, grad_out)
    assert relative_error(result.video, expected_video) < tolerance
    for name, gradient in got.items():
        assert relative_error(gradient, expected[name]) < tolerance, name


@pytest.mark.parametrize("geometry", ["everything visible", "window and sink"])
def test_the_three_ways_differ(geometry):
    """Otherwise the test above could not tell them apart."""
    frames_per_block, _, _, window_frames, sink_frames = GEOMETRIES[geometry]
    generator, noise, context, grad_out = make_inputs(GEOMETRIES[geometry], 1, torch.float64, "reference")
    found = []
    for cache_gradient in CACHE_GRADIENTS:
        pipeline = SelfForcingTrainingPipeline(
            generator,
            SCHEDULE,
            STEPS,
            frames_per_block,
            window_frames=window_frames,
            sink_frames=sink_frames,
            cache_gradient=cache_gradient,
        )
        video = pipeline.rollout(noise, context, TorchNoise(1)).video
        found.append(gradients(generator, video, grad_out)["blocks.0.self_attn.v.weight"])
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert relative_error(found[first], found[second]) > 0.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_is_its_videos(backend):
    """No video of a batch sees another: every video's draws replayed alone give the same video."""
    geometry = GEOMETRIES["window and sink"]
    generator, noise, context, _ = make_inputs(geometry, 3, torch.float32, backend)
    pipeline = SelfForcingTrainingPipeline(generator, SCHEDULE, STEPS, geometry[0], window_frames=5, sink_frames=1)
    source = RecordingNoise(seed=1)
    with torch.no_grad():
        together = pipeline.rollout(noise, context, source).video
        for video in range(3):
            draws = [source.draws[0], *(draw[video] for draw in source.draws[1:])]
            alone = pipeline.rollout(noise[video : video + 1], context[video : video + 1], ReplayNoise(draws)).video
            assert relative_error(alone[0], together[video]) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_is_the_last_step_rollout_without_context_noise(backend):
    """With the noise of the clean pass replaced by the block itself, which leaves it as it is."""
    geometry = GEOMETRIES["window and sink"]
    generator, noise, context, _ = make_inputs(geometry, 2, torch.float32, backend)
    source = RecordingNoise(seed=1)
    inference = CausalInferencePipeline(generator, SCHEDULE, STEPS, 2, window_frames=5, sink_frames=1)
    video = inference.generate(noise, context, source)

    draws = [torch.zeros(5, dtype=torch.int64)]
    for block in range(5):
        draws += [*source.draws[2 * block : 2 * block + 2], video[:, 2 * block : 2 * block + 2]]
    training = SelfForcingTrainingPipeline(
        generator, SCHEDULE, STEPS, 2, last_step_only=True, window_frames=5, sink_frames=1
    )
    with torch.no_grad():
        assert relative_error(training.rollout(noise, context, ReplayNoise(draws)).video, video) < 1e-5


def through_the_context(generator, result, context, geometry):
    """The exit steps of a rollout, block by block, with gradient through the context's keys and values, but not to the
    frames they are of."""
    frames_per_block, num_frames, first_frame_alone, *window = geometry
    blocks = [1] * first_frame_alone + [frames_per_block] * (num_frames // frames_per_block)
    cache, parts, start = EverythingKept(*window), [], 0
    for frames, exit_step in zip(blocks, result.exit_steps, strict=True):
        x = result.exit_states[:, start : start + frames]
        flow = generator(x, STEPS[exit_step].expand(x.shape[:2]), context, cache=cache)
        parts.append(x - SCHEDULE.sigma_at(STEPS).to(x.dtype)[exit_step] * flow)
        past = result.past[:, start : start + frames]
        generator(past, torch.full(x.shape[:2], float(CONTEXT_NOISE)), context, cache=cache)
        cache.append(cache.block)
        start += frames
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_self_gradient_is_that_of_the_rollout_through_its_context(geometry, backend):
    dtype, tolerance = (torch.float64, 1e-9) if backend == "reference" else (torch.float32, 1e-5)
    frames_per_block, _, first_frame_alone, window_frames, sink_frames = GEOMETRIES[geometry]
    generator, noise, context, grad_out = make_inputs(GEOMETRIES[geometry], 2, dtype, backend)
    pipeline = SelfForcingTrainingPipeline(
        generator,
        SCHEDULE,
        STEPS,
        frames_per_block=frames_per_block,
        first_frame_alone=first_frame_alone,
        same_step_across_blocks=False,
        context_noise=CONTEXT_NOISE,
        window_frames=window_frames,
        sink_frames=sink_frames,
    )
    with torch.no_grad():
        plain = pipeline.rollout(noise, context, TorchNoise(1))
    result = SelfGradientPipeline(pipeline).rollout(noise, context, TorchNoise(1))
    assert result.exit_steps == plain.exit_steps
    assert relative_error(result.video, plain.video) < tolerance  # the values are the rollout's
    got = gradients(generator, result.video, grad_out)
    expected = gradients(generator, through_the_context(generator, plain, context, GEOMETRIES[geometry]), grad_out)
    constant = gradients(generator, pipeline.rollout(noise, context, TorchNoise(1)).video, grad_out)
    for name, gradient in expected.items():
        assert relative_error(got[name], gradient) < 10 * tolerance, name
    key = "blocks.0.self_attn.k.weight"
    assert relative_error(constant[key], expected[key]) > 1e-2  # a constant context gives another


def test_self_gradient_of_one_block_is_the_plain_one():
    """There is no context whose gradient could be missing."""
    generator, noise, context, grad_out = make_inputs((3, 3, False, None, 0), 2, torch.float64, "reference")
    pipeline = SelfForcingTrainingPipeline(generator, SCHEDULE, STEPS, 3)
    found = [
        gradients(generator, kind.rollout(noise, context, TorchNoise(1)).video, grad_out)
        for kind in (pipeline, SelfGradientPipeline(pipeline))
    ]
    for name, gradient in found[0].items():
        assert relative_error(found[1][name], gradient) < 1e-9, name


@pytest.mark.parametrize(("given", "first_frame_alone"), [(1, False), (2, False), (3, True), (1, True)])
def test_self_gradient_after_given_frames(given, first_frame_alone):
    generator, noise, context, _ = make_inputs(GEOMETRIES["everything visible"], 2, torch.float64, "reference")
    pipeline = SelfForcingTrainingPipeline(
        generator,
        SCHEDULE,
        STEPS,
        2,
        first_frame_alone=first_frame_alone,
        context_noise=CONTEXT_NOISE,
        gradient_frames=4,
    )
    initial = torch.randn(2, given, 2, HEIGHT, WIDTH, dtype=torch.float64)
    plain = pipeline.rollout(noise, context, TorchNoise(1), initial)
    result = SelfGradientPipeline(pipeline).rollout(noise, context, TorchNoise(1), initial)
    assert torch.equal(result.video[:, :given], initial)
    assert relative_error(result.video, plain.video) < 1e-9
    assert result.gradient_start == plain.gradient_start == given + 2


def test_self_gradient_refuses_what_no_mask_describes():
    generator, noise, context, _ = make_inputs(GEOMETRIES["everything visible"], 2, torch.float64, "reference")
    pipeline = SelfGradientPipeline(SelfForcingTrainingPipeline(generator, SCHEDULE, STEPS, 3))
    with pytest.raises(ValueError, match="initial_latents has 2 frames, but must have a multiple of frames_per_block"):
        pipeline.rollout(noise, context, TorchNoise(1), noise[:, :2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rollout_that_goes_on_is_one_long_rollout(backend):
    """Also from a cache whose state was saved and loaded between the parts."""
    window, sink = 5, 1
    generator, noise, context, _ = make_inputs((2, 12, False, window, sink), 2, torch.float32, backend)
    options = {"window_frames": window, "sink_frames": sink}
    pipeline = SelfForcingTrainingPipeline(
        generator, SCHEDULE, STEPS, 2, context_noise=CONTEXT_NOISE, last_step_only=True, **options
    )
    shape = noise[:, :4].shape

    def new_cache():
        cache = KeptCache(lambda: pipeline.make_cache(shape, None), CONFIG, shape, RolloutConfig(**options), "fp32")
        cache.go_on_with(0)
        return cache

    kept, videos, draws = new_cache(), [], []
    for number, part in enumerate(noise.split(4, dim=1)):
        loaded, source = new_cache(), RecordingNoise(seed=number)
        loaded.load_state_dict(kept.state_dict())
        videos.append(pipeline.rollout(part, context, source, cache=kept).video)
        draws.append(source.draws)
        assert torch.equal(pipeline.rollout(part, context, TorchNoise(number), cache=loaded).video, videos[-1])
    exits = torch.cat([drawn[0] for drawn in draws])
    source = ReplayNoise([exits, *(draw for drawn in draws for draw in drawn[1:])])
    whole = pipeline.rollout(noise, context, source).video
    assert source.consumed == len(source.draws)
    assert relative_error(torch.cat(videos, dim=1), whole) < 1e-6


def test_given_frames_do_not_follow_cached_ones():
    generator, noise, context, _ = make_inputs(GEOMETRIES["everything visible"], 1, torch.float32, "reference")
    pipeline = SelfForcingTrainingPipeline(generator, SCHEDULE, STEPS, 2)
    cache = pipeline.make_cache(noise.shape, None)
    pipeline.rollout(noise, context, TorchNoise(1), noise[:, :2], cache=cache)  # before there are any
    assert cache.num_frames == 8
    with pytest.raises(ValueError, match="initial_latents are given, but the cache holds 8 frames already"):
        pipeline.rollout(noise, context, TorchNoise(1), noise[:, :2], cache=cache)


def test_gradient_reaches_only_the_newest_frames():
    generator, noise, context, _ = make_inputs(GEOMETRIES["everything visible"], 1, torch.float32, "reference")
    pipeline = SelfForcingTrainingPipeline(generator, SCHEDULE, STEPS, 2, gradient_frames=4)
    video = pipeline.rollout(noise, context, TorchNoise(1)).video
    for frame in range(6):
        (gradient,) = torch.autograd.grad(
            video[:, frame].sum(), generator.head.head.weight, retain_graph=True, allow_unused=True
        )
        assert bool(gradient.abs().sum() > 0) == (frame >= 2)


BAD_CALLS = {
    "cache_gradient is 'none', but must be one of": {"cache_gradient": "none"},
    r"denoising_steps is \[250.0, 500.0\], but must be one or more falling": {"denoising_steps": [250, 500]},
    "noise has 6 frames, but must have a multiple of frames_per_block = 4": {"frames_per_block": 4},
    "noise has 6 frames, but must have one more than a multiple": {"frames_per_block": 2, "first_frame_alone": True},
    "window_frames is 2, but must be at least": {"window_frames": 2, "sink_frames": 1, "frames_per_block": 2},
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_settings(message):
    generator, noise, context, _ = make_inputs(GEOMETRIES["everything visible"], 1, torch.float32, "reference")
    settings = {"denoising_steps": STEPS, **BAD_CALLS[message]}
    with pytest.raises(ValueError, match=message):
        SelfForcingTrainingPipeline(generator, SCHEDULE, **settings).rollout(noise, context, TorchNoise(0))


def test_bad_initial_latents():
    generator, noise, context, _ = make_inputs(GEOMETRIES["everything visible"], 1, torch.float32, "reference")
    pipeline = CausalInferencePipeline(generator, SCHEDULE, STEPS, 2)
    with pytest.raises(ValueError, match=r"initial_latents has shape \[1, 1, 3, 4, 4\], but must be"):
        pipeline.generate(noise, context, TorchNoise(0), torch.zeros(1, 1, 3, 4, 4))
    pipeline = CausalInferencePipeline(generator, SCHEDULE, STEPS, 2, first_frame_alone=True)
    with pytest.raises(ValueError, match="initial_latents has 2 frames, but must have one more than a multiple"):
        pipeline.generate(noise, context, TorchNoise(0), torch.zeros(1, 2, 2, 4, 4))


def test_replay_refuses_another_run():
    source = ReplayNoise([torch.zeros(2, dtype=torch.int64), torch.zeros(3)])
    with pytest.raises(ValueError, match=r"draw 0 is torch.int64, but randn was asked for"):
        ReplayNoise(source.draws).randn((2,), torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"draw 0 has shape \[2\], but randint \[3\] was asked for"):
        source.randint(0, 4, (3,), torch.device("cpu"))
    source.randint(0, 4, (2,), torch.device("cpu"))
    source.randn((3, 1), torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="all 2 draws are consumed"):
        source.randn((3,), torch.float32, torch.device("cpu"))
