"""Our ops in the published models' form: against what the published implementation computed, and against a stand-in."""

from __future__ import annotations

import copy
import gc
import io
import re
import subprocess
import sys
import types
import weakref
from pathlib import Path
from types import SimpleNamespace

import published_wan
import pytest
import torch
from compare import assert_as_accurate, assert_close, assert_same_bits, relative_error
from golden_files import assert_gradients_near, assert_near, case, files, load, parameters, replay
from published_wan import make_crossattn_cache, make_dict_cache
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from python_ref.backend import load_backend
from python_ref.pipelines.inference import CausalInferencePipeline
from python_ref.pipelines.training import SelfForcingTrainingPipeline
from python_ref.schedule import FlowMatchSchedule
from selfforcing_ext.integrations.self_forcing import accelerate, make_kv_cache, restore

SEQ_LEN = 32760  # what the published pipelines pass
TOLERANCE = 1e-5

MODELS = ["model_a", "model_b"]
WIDE_FORWARDS = sorted(name for name in parameters("wide/c_train_forward")["cases"] if not name.startswith("wide"))
WIDE_CACHES = sorted(
    name for name, entry in parameters("wide/c_kv_inference")["cases"].items() if entry["model"] == "c_small"
)
WHOSE = ["theirs", "ours"]
CACHES = ["theirs", "ours, dict", "ours, pages"]


def frames_second(tensor: Tensor) -> Tensor:
    """[B, F, C, H, W] to [B, C, F, H, W] and back."""
    return tensor.transpose(1, 2)


def golden_model(kind: type[nn.Module], name: str, whose: str, **settings: int) -> nn.Module:
    """A model with recorded weights, accelerated or not."""
    weights = load(name)
    if not name.startswith("wide"):
        weights = {key.removeprefix("params."): tensor for key, tensor in weights.items() if key.startswith("params.")}
    model = kind(**parameters(name)["config"], **settings)
    model.load_state_dict({key: weight.float() for key, weight in weights.items()}, strict=True)
    return model if whose == "theirs" else accelerate(model)


# ---- What the published implementation computed


@pytest.mark.parametrize("whose", WHOSE)
@pytest.mark.parametrize("name", MODELS)
def test_golden_causal_forward(name, whose):
    entry, tensors = parameters(name), load(name)
    x, t, context = frames_second(tensors["x"]), tensors["timestep"], tensors["context"]

    model = golden_model(published_wan.CausalWanModel, name, whose)
    model.num_frame_per_block = entry["num_frame_per_block"]
    flow = model(x, t, context, SEQ_LEN)
    assert_near(frames_second(flow), tensors["block_causal.flow_pred"])
    frames_second(flow).backward(tensors["grad_out"])
    assert_gradients_near(model, tensors, "block_causal.grad.")

    with torch.no_grad():
        model = golden_model(
            published_wan.CausalWanModel, name, whose, local_attn_size=entry["local_window_frames"], sink_size=1
        )
        model.num_frame_per_block = entry["num_frame_per_block"]
        assert_near(frames_second(model(x, t, context, SEQ_LEN)), tensors["local_window.flow_pred"])

        model = golden_model(published_wan.CausalWanModel, name, whose)
        model.num_frame_per_block, model.independent_first_frame = entry["num_frame_per_block"], True
        frames = entry["first_frame_alone_num_frames"]
        flow = model(x[:, :, :frames], t[:, :frames], context, SEQ_LEN)
        assert_near(frames_second(flow), tensors["first_frame_alone.flow_pred"])


@pytest.mark.parametrize("whose", WHOSE)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_golden_teacher_forcing(name, whose):
    entry, tensors = parameters(name), load(name)
    model = golden_model(published_wan.CausalWanModel, name, whose)
    model.num_frame_per_block = entry["num_frame_per_block"]
    arguments = frames_second(tensors["x"]), tensors["timestep"], tensors["context"], SEQ_LEN
    clean_x = frames_second(tensors["clean_x"])
    flow = model(*arguments, clean_x=clean_x, aug_t=tensors["aug_t"])
    assert_near(frames_second(flow), tensors["teacher_forcing.flow_pred"])
    assert_near(frames_second(model(*arguments, clean_x=clean_x)), tensors["teacher_forcing.flow_pred_no_aug"])


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("whose", WHOSE)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_golden_bidirectional_forward(name, whose, padding):
    tensors = load(name)
    model = golden_model(published_wan.WanModel, name, whose)
    x = frames_second(tensors["x"])
    seq_len = x[0, 0].numel() // 4 + padding
    flow = model(x, tensors["timestep"][:, 0], tensors["context"], seq_len)
    assert_near(frames_second(flow), tensors["bidirectional.flow_pred"])


@pytest.mark.parametrize("whose", WHOSE)
@pytest.mark.parametrize("name", WIDE_FORWARDS)
def test_golden_wide_forward(name, whose):
    entry, tensors = parameters("wide/c_train_forward")["cases"][name], case("wide/c_train_forward", name)
    model = golden_model(
        published_wan.CausalWanModel, f"wide/models/{entry['model']}", whose, local_attn_size=entry["local_attn_size"]
    )
    model.num_frame_per_block = entry["num_frame_per_block"]
    model.independent_first_frame = entry["independent_first_frame"]
    x = tensors["x"].requires_grad_()
    context = (
        tensors["context"]
        if "context" in tensors
        else [tensors[key] for key in sorted(tensors) if key.startswith("context_")]
    )
    clean = {}
    if entry["teacher_forcing"]:
        clean = {"clean_x": tensors["clean_x"].requires_grad_(), "aug_t": tensors.get("aug_t")}
    flow = model(x, tensors["t"], context, SEQ_LEN, **clean)
    assert_near(flow, tensors["out"])
    flow.backward(tensors["w"])
    assert_near(x.grad, tensors["grad_x"], name="grad_x")
    if clean:
        assert_near(clean["clean_x"].grad, tensors["grad_clean_x"], name="grad_clean_x")
    assert_gradients_near(model, tensors, "grad.")


def make_cache(model: nn.Module, form: str, batch: int, frame_seqlen: int, cache_frames: int) -> list:
    if form == "ours, pages":
        return make_kv_cache(model, batch, frame_seqlen)
    return make_dict_cache(model, batch, cache_frames * frame_seqlen)


def set_window(model: nn.Module, frame_seqlen: int) -> None:
    """The published code takes 1560 tokens a frame for granted; the recorded runs set the window as they needed it."""
    for block in model.blocks:
        block.self_attn.max_attention_size = max(model.local_attn_size * frame_seqlen, 0) or SEQ_LEN


@pytest.mark.parametrize("form", CACHES)
@pytest.mark.parametrize("cached", ["full", "rolling", "rolling_sink", "first_frame"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_golden_cached_calls(name, cached, form):
    entry, tensors = parameters(f"{name}_cache_{cached}"), load(f"{name}_cache_{cached}")
    window = {"local_attn_size": entry.get("local_attn_size", -1), "sink_size": entry.get("sink_size", 0)}
    model = golden_model(published_wan.CausalWanModel, name, form.split(",")[0], **window)
    blocks = entry.get("frames_per_call") or [entry["num_frame_per_block"]] * entry["num_blocks"]
    frame_seqlen = entry["frame_seqlen"]
    set_window(model, frame_seqlen)
    batch = len(tensors["context"])
    cache = make_cache(
        model, form, batch, frame_seqlen, sum(blocks) if window["local_attn_size"] == -1 else window["local_attn_size"]
    )
    cross = make_crossattn_cache(model)
    start = 0
    for block, num_frames in enumerate(blocks):
        for step, timestep in enumerate(entry["timesteps"]):
            x = frames_second(tensors[f"call.{block}.{step}.x"])
            t = torch.full((batch, num_frames), timestep)
            flow = model(x, t, tensors["context"], SEQ_LEN, kv_cache=cache, crossattn_cache=cross, current_start=start)
            assert_near(frames_second(flow), tensors[f"call.{block}.{step}.flow_pred"], name=f"call {block}.{step}")
        start += num_frames * frame_seqlen
    assert [int(layer["global_end_index"]) for layer in cache] == [start] * len(cache)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        (name, form)
        for name in WIDE_CACHES
        for form in CACHES
        # Pages hold the window; here the published code has a larger dict, and sees no sink.
        if not (name.startswith("window_only") and form == "ours, pages")
    ],
)
@torch.no_grad()
def test_golden_wide_cached_calls(name, form):
    entry, tensors = parameters("wide/c_kv_inference")["cases"][name], case("wide/c_kv_inference", name)
    model = golden_model(
        published_wan.CausalWanModel,
        f"wide/models/{entry['model']}",
        form.split(",")[0],
        local_attn_size=entry["local_attn_size"],
        sink_size=entry["sink_size"],
    )
    set_window(model, entry["frame_seqlen"])
    cache = make_cache(model, form, entry["B"], entry["frame_seqlen"], entry["cache_frames"])
    cross = make_crossattn_cache(model)
    for call, described in enumerate(entry["calls"]):
        x, t, out = (tensors[f"call{call:02}.{key}"] for key in ("x", "t", "out"))
        start = described["current_start"]
        flow = model(x, t, tensors["context"], SEQ_LEN, kv_cache=cache, crossattn_cache=cross, current_start=start)
        assert_near(flow, out, name=f"call {call}")
        indices = [start, *(int(cache[-1][key]) for key in ("global_end_index", "local_end_index"))]
        assert indices == tensors["indices"][call].tolist()


class Generator(nn.Module):
    """An accelerated model as the generator of python_ref's pipelines, which replay recorded draws: every call goes
    through the published interface, whose only position is where a block starts."""

    def __init__(self, model: nn.Module, form: str, frame_seqlen: int, dict_frames: int | None) -> None:
        super().__init__()
        self.model, self.form, self.frame_seqlen, self.dict_frames = model, form, frame_seqlen, dict_frames
        self.ops = load_backend("ext")

    def make_cache(self, shape: torch.Size, max_frames: int, window_frames: int | None, sink_frames: int):
        assert [window_frames or -1, sink_frames] == [self.model.local_attn_size, self.model.sink_size]
        layers = make_cache(self.model, self.form, shape[0], self.frame_seqlen, self.dict_frames or max_frames)
        return SimpleNamespace(
            layers=layers, num_frames=0, rope="on_write", view=lambda: SimpleNamespace(position=None)
        )

    def encode_context(self, context: Tensor) -> Tensor:
        return context

    def forward(self, x, t, context, cache, commit=False, checkpoint_layers=False) -> Tensor:
        cache = getattr(cache, "cache", cache)
        self.model.gradient_checkpointing = checkpoint_layers
        start = cache.num_frames * self.frame_seqlen
        flow = self.model(frames_second(x), t, context, SEQ_LEN, kv_cache=cache.layers, current_start=start)
        cache.num_frames += x.shape[1] if commit else 0
        return frames_second(flow)


def golden_generator(name: str, form: str, window: int, sink: int, dict_frames: int | None = None) -> Generator:
    entry = parameters(name)
    settings = {"local_attn_size": window, "sink_size": sink}
    model = golden_model(published_wan.CausalWanModel, f"wide/models/{entry['model']}", "ours", **settings)
    set_window(model, entry["frame_seqlen"])
    return Generator(model, form, entry["frame_seqlen"], dict_frames)


@pytest.mark.parametrize("form", CACHES[1:])
@pytest.mark.parametrize("name", files("wide/e_rollout/"))
def test_golden_training_rollouts(name, form):
    """With checkpointing, as the published code trains; gradients with cached keys and values as constants."""
    entry, tensors = parameters(name), load(name)
    options = entry["params"]
    generator = golden_generator(name, form, options["loc"], 0)  # the published rollout never evicts
    pipeline = SelfForcingTrainingPipeline(
        generator,
        FlowMatchSchedule(options["shift"]),
        tensors["denoising_step_list"],
        frames_per_block=options["nf"],
        first_frame_alone=options["ind"],
        same_step_across_blocks=options["same"],
        last_step_only=options["last"],
        context_noise=options["cn"],
        gradient_frames=21,
        window_frames=None if options["loc"] == -1 else options["loc"],
        checkpoint_activations=True,
    )
    initial = tensors.get("initial_latent")
    result = pipeline.rollout(tensors["noise"], tensors["prompt_embeds"], replay(tensors), initial_latents=initial)
    assert_near(result.video, tensors["output"])
    result.video.backward(tensors["w"])
    assert_gradients_near(generator.model, tensors, "grad_detached.")


@pytest.mark.parametrize("form", CACHES[1:])
@pytest.mark.parametrize("name", files("wide/g_inference/"))
def test_golden_inference(name, form):
    entry, tensors = parameters(name), load(name)
    options = entry["args"]
    window, sink = entry["params"].get("loc"), entry["params"].get("sink", 0)
    pipeline = CausalInferencePipeline(
        golden_generator(name, form, window or -1, sink, window),
        FlowMatchSchedule(options["model_kwargs"]["timestep_shift"]),
        tensors["denoising_step_list"],
        frames_per_block=options["num_frame_per_block"],
        first_frame_alone=options["independent_first_frame"],
        context_noise=options["context_noise"],
        window_frames=window,
        sink_frames=sink,
    )
    initial = tensors.get("initial_latent")
    video = pipeline.generate(tensors["noise"], tensors["prompt_embeds"], replay(tensors), initial)
    assert_near(video, tensors["output_latents"])


# ---- What the stand-in computes: lengths that are a multiple of 128, gradients, everything the records lack

CONFIG = {
    "text_len": 5,
    "in_dim": 4,
    "dim": 64,
    "ffn_dim": 96,
    "freq_dim": 16,
    "text_dim": 12,
    "out_dim": 4,
    "num_heads": 2,
    "num_layers": 2,
}
BATCH, FRAMES, LATENT_ROWS, LATENT_COLUMNS = 2, 4, 8, 16
FRAME_SEQLEN = 32  # so that the video has 128 tokens

TRAINING = {
    "bidirectional": None,
    "causal": {},
    "blocks": {"num_frame_per_block": 2},
    "window": {"num_frame_per_block": 2, "local_attn_size": 3},
    "first frame": {"num_frame_per_block": 3, "independent_first_frame": True},
    "teacher forcing": {"num_frame_per_block": 2, "teacher_forcing": True},
    "teacher forcing, window": {"local_attn_size": 2, "teacher_forcing": True},
    "no norm": {"num_frame_per_block": 2, "qk_norm": False},
}


def make_model(settings: dict | None = None) -> nn.Module:
    """With random norms, and a bidirectional one for None."""
    if settings is None:
        model = published_wan.WanModel(**CONFIG)
    else:
        config = {key: settings[key] for key in ("local_attn_size", "sink_size", "qk_norm") if key in settings}
        model = published_wan.CausalWanModel(**CONFIG, **config)
        model.num_frame_per_block = settings.get("num_frame_per_block", 1)
        model.independent_first_frame = settings.get("independent_first_frame", False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 1.0, 0.2)
    return model


def inputs_of(settings: dict | None, frames: int = FRAMES) -> tuple[list, dict]:
    """Arguments and options of a training forward."""
    x = torch.randn(BATCH, CONFIG["in_dim"], frames, LATENT_ROWS, LATENT_COLUMNS, requires_grad=True)
    t = 1000 * torch.rand(BATCH) if settings is None else 1000 * torch.rand(BATCH, frames)
    context = torch.randn(BATCH, CONFIG["text_len"], CONFIG["text_dim"])
    options = {}
    if settings is not None and settings.get("teacher_forcing"):
        options = {"clean_x": torch.randn_like(x, requires_grad=True), "aug_t": 100 * torch.rand(BATCH, frames)}
    return [x, t, context, frames * FRAME_SEQLEN], options


def results_of(model: nn.Module, arguments: list, options: dict, weight: Tensor) -> dict[str, Tensor]:
    """The output and every gradient of its weighted sum."""
    leaves = dict(model.named_parameters()) | {"x": arguments[0]}
    if "clean_x" in options:
        leaves["clean_x"] = options["clean_x"]
    out = model(*arguments, **options)
    grads = torch.autograd.grad((out * weight).sum(), list(leaves.values()))
    return {"out": out} | dict(zip(leaves, grads, strict=True))


def assert_all_near(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    for name, tensor in theirs.items():
        # A bias that all keys share has no effect where nothing rotates or norms them: its gradient is rounding alone.
        if not name.endswith("attn.k.bias") or tensor.norm() > 1e-5:
            assert_close(ours[name], tensor, tolerance, name)


@pytest.mark.parametrize("name", TRAINING)
def test_training(name):
    settings = TRAINING[name]
    model = make_model(settings)
    arguments, options = inputs_of(settings)
    weight = torch.randn(arguments[0].shape)
    theirs = results_of(model, arguments, options, weight)
    if settings is not None:
        model.block_mask = None  # else it is checked, which is another test
    assert_all_near(results_of(accelerate(model), arguments, options, weight), theirs)


def test_training_with_checkpointing():
    settings = TRAINING["window"]
    model = make_model(settings)
    arguments, options = inputs_of(settings)
    weight = torch.randn(arguments[0].shape)
    theirs = results_of(model, arguments, options, weight)
    model.gradient_checkpointing = True
    assert_all_near(results_of(accelerate(model), arguments, options, weight), theirs)


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16 weights", "autocast"])
@torch.no_grad()
def test_bfloat16(autocast):
    model = make_model(TRAINING["blocks"]).bfloat16()
    (x, t, context, seq_len), _ = inputs_of({})
    x, context = x.bfloat16(), context.bfloat16()
    exact = copy.deepcopy(model).float()(x.float(), t, context.float(), seq_len)
    if autocast:
        model, x, context = model.float(), x.float(), context.float()

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(x, t, context, seq_len)

    theirs = run()
    accelerate(model)
    assert_as_accurate(run(), theirs, exact)


def test_settings_may_change():
    """The published code keeps its first mask whatever comes after."""
    model = accelerate(make_model({}))
    for frames_per_block, frames, teacher_forcing in ((2, 4, False), (2, 4, True), (3, 6, False), (1, 5, True)):
        settings = {"num_frame_per_block": frames_per_block, "teacher_forcing": teacher_forcing}
        arguments, options = inputs_of(settings, frames)
        model.num_frame_per_block = frames_per_block
        ours = model(*arguments, **options)
        restore(model)
        theirs = model(*arguments, **options)
        model.block_mask = None
        accelerate(model)
        assert_close(ours, theirs, TOLERANCE)


@pytest.mark.parametrize("name", ["blocks", "window", "first frame", "teacher forcing"])
def test_a_mask_that_is_there_is_checked(name):
    settings = TRAINING[name]
    model = make_model(settings)
    arguments, options = inputs_of(settings)
    theirs = model(*arguments, **options)
    assert model.block_mask is not None
    accelerate(model)
    assert_close(model(*arguments, **options), theirs, TOLERANCE)

    model.num_frame_per_block = 1
    with pytest.raises(ValueError, match=r"block_mask and BlockCausalMask.*differ: query .* key .* in block_mask"):
        model(*arguments, **options)
    model.num_frame_per_block = settings["num_frame_per_block"]
    longer, options = inputs_of(settings, frames=2 * FRAMES + (2 if name == "first frame" else 0))
    with pytest.raises(ValueError, match=r"block_mask is for .* tokens, but x has"):
        model(*longer, **options)
    model.block_mask = None
    assert model(*longer, **options).isfinite().all()


# ---- Rollouts

STEPS = 3


def roll_out(model: nn.Module, cache: list, noise: Tensor, recorded: bool, frames_per_block: int = 2) -> Tensor:
    """A rollout as the published pipelines run it, all calls of a block at the same start: denoising steps, the last of
    them with gradient if ``recorded``, then the clean pass."""
    context = torch.linspace(-1, 1, CONFIG["text_len"] * CONFIG["text_dim"]).view(1, CONFIG["text_len"], -1)
    context, cross = context.repeat(len(noise), 1, 1), make_crossattn_cache(model)
    latents = []
    for index, x in enumerate(noise.split(frames_per_block, dim=2)):
        start = index * frames_per_block * FRAME_SEQLEN
        for step in range(STEPS + 1):
            is_exit = step == STEPS - 1
            t = torch.full((len(x), x.shape[2]), 1000.0 * (1 - step / STEPS))
            with torch.set_grad_enabled(recorded and is_exit):
                options = {"kv_cache": cache, "crossattn_cache": None if recorded else cross, "current_start": start}
                flow = model(x, t, context, SEQ_LEN, **options)
            if step < STEPS:
                x = x - flow / STEPS
            if is_exit:
                latents.append(x)
                x = x.detach()
    return torch.cat(latents, dim=2)


def rollout_noise(blocks: int, frames_per_block: int = 2) -> Tensor:
    return torch.randn(BATCH, CONFIG["in_dim"], blocks * frames_per_block, LATENT_ROWS, LATENT_COLUMNS)


WINDOWS = [{}, {"local_attn_size": 4}, {"local_attn_size": 5, "sink_size": 1}, {"local_attn_size": 4, "sink_size": 2}]


@pytest.mark.parametrize("form", ["ours, dict", "ours, pages"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_rollout_without_gradient(window, form):
    """Many blocks, and then another video on the same cache."""
    model, blocks = make_model(window), 7
    cache_frames = window.get("local_attn_size", 2 * blocks)
    videos = [rollout_noise(blocks) for _ in range(2)]
    theirs = [
        roll_out(model, make_dict_cache(model, BATCH, cache_frames * FRAME_SEQLEN), noise, False) for noise in videos
    ]
    accelerate(model)
    cache = make_cache(model, form, BATCH, FRAME_SEQLEN, cache_frames)
    for noise, wanted in zip(videos, theirs, strict=True):
        assert_close(roll_out(model, cache, noise, False), wanted, TOLERANCE)
        assert int(cache[0]["global_end_index"]) == 2 * blocks * FRAME_SEQLEN
        assert int(cache[0]["local_end_index"]) == cache_frames * FRAME_SEQLEN
        for layer in cache:  # as the pipelines reset it
            layer["global_end_index"] = torch.tensor([0])
            layer["local_end_index"] = torch.tensor([0])


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@torch.no_grad()
def test_pages_hold_what_the_dict_holds(window):
    model, blocks = accelerate(make_model(window)), 7
    cache_frames = window.get("local_attn_size", 2 * blocks)
    dicts = make_dict_cache(model, BATCH, cache_frames * FRAME_SEQLEN)
    pages = make_kv_cache(model, BATCH, FRAME_SEQLEN, page_size=24)
    noise = rollout_noise(blocks)
    for cache in (dicts, pages):
        roll_out(model, cache, noise, False)
    for mine, theirs in zip(pages, dicts, strict=True):
        for key in ("k", "v"):
            assert_close(mine[key], theirs[key], TOLERANCE, key)
    with pytest.raises(KeyError):
        pages[0]["is_init"]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("window", "form"), [*((window, "ours, pages") for window in WINDOWS), ({}, "ours, dict")], ids=str
)
def test_rollout_with_gradient(window, form, checkpointing):
    """Cached keys and values are constant; checkpoints see what the cache held when they were made."""
    model, blocks = make_model(window), 5
    cache_frames = window.get("local_attn_size", 2 * blocks)
    noise = rollout_noise(blocks)
    weight = torch.randn(noise.shape)

    def results(cache: list) -> dict[str, Tensor]:
        video = roll_out(model, cache, noise, recorded=True)
        grads = torch.autograd.grad((video * weight).sum(), list(model.parameters()))
        return {"video": video} | dict(zip(dict(model.named_parameters()), grads, strict=True))

    theirs = results(make_dict_cache(model, BATCH, cache_frames * FRAME_SEQLEN))
    accelerate(model)
    model.gradient_checkpointing = checkpointing
    cache = make_cache(model, form, BATCH, FRAME_SEQLEN, cache_frames)
    if form == "ours, dict" and not checkpointing:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # as the published code
            results(cache)
    else:
        assert_all_near(results(cache), theirs)


def test_a_checkpointed_rollout_leaves_the_cache_as_it_was():
    """Backward neither writes to the cache nor keeps its pages."""
    model = accelerate(make_model({"local_attn_size": 4}))
    model.gradient_checkpointing = True
    cache, noise = make_kv_cache(model, BATCH, FRAME_SEQLEN), rollout_noise(4)
    video = roll_out(model, cache, noise, recorded=True)
    before = [layer["k"] for layer in cache]
    video.sum().backward()
    for layer, keys in zip(cache, before, strict=True):
        assert_same_bits(layer["k"], keys)
    nbytes = cache.cache.nbytes
    del video
    for _ in range(3):
        roll_out(model, cache, noise, recorded=False)
    assert cache.cache.nbytes == nbytes


def test_evicted_tokens_that_backward_needs():
    model = accelerate(make_model({"local_attn_size": 4}))
    model.gradient_checkpointing = True
    video = roll_out(model, make_dict_cache(model, BATCH, 4 * FRAME_SEQLEN), rollout_noise(4), recorded=True)
    with pytest.raises(RuntimeError, match=r"evicted tokens that the block at .* saw.*use make_kv_cache"):
        video.sum().backward()


def test_reentrant_checkpoints_have_no_record(monkeypatch):
    def reentrant(function, x, use_reentrant, **arguments):
        return torch.utils.checkpoint.checkpoint(lambda x: function(x, **arguments), x, use_reentrant=True)

    monkeypatch.setattr(published_wan, "checkpoint", reentrant)
    model = accelerate(make_model({}))
    model.gradient_checkpointing = True
    video = roll_out(model, make_kv_cache(model, BATCH, FRAME_SEQLEN), rollout_noise(2), recorded=True)
    with pytest.raises(RuntimeError, match="was not recorded: checkpoint with use_reentrant=False"):
        video.sum().backward()


@torch.no_grad()
def test_a_cache_of_another_dtype():
    model = make_model({})
    noise = rollout_noise(3)
    theirs = roll_out(model, make_dict_cache(model, BATCH, 6 * FRAME_SEQLEN), noise, False)
    accelerate(model)
    pages = make_kv_cache(model, BATCH, FRAME_SEQLEN, dtype=torch.bfloat16)
    dicts = make_dict_cache(model.bfloat16(), BATCH, 6 * FRAME_SEQLEN)
    model.float()
    ours = [roll_out(model, cache, noise, False) for cache in (pages, dicts)]
    assert pages[0]["k"].dtype == dicts[0]["k"].dtype == torch.bfloat16
    assert_close(ours[0], ours[1], TOLERANCE)
    assert 1e-4 < relative_error(ours[0], theirs) < 1e-2


@pytest.mark.parametrize("form", CACHES[1:])
def test_a_cache_keeps_its_dtype_under_autocast(form):
    model, noise = make_model({"local_attn_size": 4}), rollout_noise(3)
    theirs = roll_out(model, make_dict_cache(model, BATCH, 4 * FRAME_SEQLEN), noise, False)
    accelerate(model)
    cache = make_cache(model, form, BATCH, FRAME_SEQLEN, 4)
    with torch.autocast("cpu", torch.bfloat16):
        ours = roll_out(model, cache, noise, False)
    assert cache[0]["k"].dtype == torch.float32
    assert 1e-4 < relative_error(ours, theirs) < 2e-2


@torch.no_grad()
def test_a_video_may_begin_anew_at_any_time():
    """Also with blocks of another length, after one that was not finished."""
    model, noise = accelerate(make_model({})), rollout_noise(3)
    wanted = roll_out(model, make_kv_cache(model, BATCH, FRAME_SEQLEN), noise, False)
    cache = make_kv_cache(model, BATCH, FRAME_SEQLEN)
    roll_out(model, cache, noise[:, :, :3], False, frames_per_block=3)
    assert_close(roll_out(model, cache, noise, False), wanted, TOLERANCE)


@pytest.mark.parametrize("form", CACHES[1:])
def test_training_after_inference_mode(form):
    """Nothing that is kept belongs to inference mode, which autograd does not take."""
    model, noise = accelerate(make_model({"num_frame_per_block": 2})), rollout_noise(2)
    model.gradient_checkpointing = True
    arguments, _ = inputs_of({})
    with torch.inference_mode():
        roll_out(model, make_cache(model, form, BATCH, FRAME_SEQLEN, 4), noise, False)
        model(*arguments)
    roll_out(model, make_cache(model, form, BATCH, FRAME_SEQLEN, 4), noise, True).sum().backward()
    model(*arguments).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_caches_are_freed_at_once():
    """Without the garbage collector, which knows nothing of a GPU's memory."""
    model = accelerate(make_model({}))
    model.gradient_checkpointing = True
    cache = make_kv_cache(model, BATCH, FRAME_SEQLEN)
    video = roll_out(model, cache, rollout_noise(2), recorded=True)
    alive = weakref.ref(cache.cache)
    gc.disable()
    try:
        del cache
        video.sum().backward()
        del video
        assert alive() is None
    finally:
        gc.enable()


# ---- The model stays what it was


def test_restore():
    model = make_model(TRAINING["blocks"])
    arguments, _ = inputs_of({})
    keys = list(model.state_dict())
    tensors = [id(parameter) for parameter in model.parameters()]
    attributes = [set(vars(module)) for module in model.modules()]
    modules = [id(module) for module in model.modules()]
    before = model(*arguments)
    model.block_mask = None

    assert accelerate(model) is model
    assert list(model.state_dict()) == keys
    assert [id(parameter) for parameter in model.parameters()] == tensors
    assert [id(module) for module in model.modules()] == modules
    forwards = [block.self_attn.forward for block in model.blocks]
    accelerate(model)  # again: nothing happens
    assert [block.self_attn.forward for block in model.blocks] == forwards
    assert model(*arguments) is not None
    assert model.block_mask is None

    assert restore(model) is model
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert_same_bits(model(*arguments), before)
    assert model.block_mask is not None
    restore(model)


def test_models_within_modules():
    """A wrapper, or a pipeline that holds a generator and its scores."""
    pipeline = nn.ModuleDict({"generator": nn.ModuleDict({"model": make_model({})}), "score": make_model(None)})
    accelerate(pipeline)
    for model, settings in ((pipeline["generator"]["model"], {}), (pipeline["score"], None)):
        arguments, _ = inputs_of(settings)
        ours = model(*arguments)
        restore(model)
        assert_close(ours, model(*arguments), TOLERANCE)
        accelerate(model)
    assert make_kv_cache(pipeline, BATCH, FRAME_SEQLEN).cache.num_layers == CONFIG["num_layers"]
    accelerate(torch.compile(pipeline["score"], backend="eager"))  # a wrapper that passes attributes on
    restore(pipeline)
    with pytest.raises(ValueError, match="model is not accelerated"):
        make_kv_cache(pipeline, BATCH, FRAME_SEQLEN)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(how):
    """Copies are accelerated and independent: an EMA model, a saved model."""
    model = accelerate(make_model(TRAINING["blocks"]))
    arguments, _ = inputs_of({})
    if how == "deepcopy":
        copied = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert_same_bits(copied(*arguments), model(*arguments))
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert copied(*arguments).abs().max() == 0
    restore(copied)
    assert model(*arguments).abs().max() > 0


def test_hooks_of_the_norms_run():
    model = accelerate(make_model({}))
    arguments, _ = inputs_of({})
    wanted = model(*arguments)
    calls = []
    for block in model.blocks:
        block.self_attn.norm_q.register_forward_hook(lambda *_: calls.append(1))
    assert_close(model(*arguments), wanted, TOLERANCE)
    assert len(calls) == CONFIG["num_layers"]


def test_compiled():
    """torch.compile keeps the numbers, and needs no new graphs as a rollout advances."""
    torch._dynamo.reset()
    model = accelerate(make_model({"local_attn_size": 4}))
    noise = rollout_noise(6)
    wanted = roll_out(model, make_kv_cache(model, BATCH, FRAME_SEQLEN), noise, False)
    counter = CompileCounterWithBackend("eager")
    for block in model.blocks:
        block.compile(backend=counter)
    counts = []
    cache = make_kv_cache(model, BATCH, FRAME_SEQLEN)
    for blocks in (3, 6):
        ours = roll_out(model, cache, noise[:, :, : 2 * blocks], False)
        counts.append(counter.frame_count)
    assert_close(ours, wanted, TOLERANCE)
    assert counts[0] == counts[1] > 0


# ---- What is not supported says so


def usp_attn_forward(self, x, seq_lens, grid_sizes, freqs):
    """As sequence parallelism puts it in place of forward."""
    return x


def replaced_forward(model: nn.Module) -> None:
    attn = model.blocks[1].self_attn
    attn.forward = types.MethodType(usp_attn_forward, attn)


def replaced_model_forward(model: nn.Module) -> None:
    model.forward = types.MethodType(usp_attn_forward, model)


class OlderAttention(published_wan.CausalWanSelfAttention):
    def forward(self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, current_end=0):
        return x


def older_attention(model: nn.Module) -> None:
    model.blocks[1].self_attn = OlderAttention(64, 2, -1, 0, True, 1e-6)


def without_norm(model: nn.Module) -> None:
    del model.blocks[1].self_attn.norm_k


def odd_head_dim(model: nn.Module) -> None:
    model.blocks[1].self_attn.head_dim = 20


def list_of_windows(model: nn.Module) -> None:
    model.blocks[1].self_attn.local_attn_size = [3, 6]


def without_settings(model: nn.Module) -> None:
    del model.num_frame_per_block


def deferred_updates(model: nn.Module) -> None:
    model._apply_cache_updates = lambda: None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced_forward, r"blocks\[1\].self_attn has its forward replaced by usp_attn_forward"),
        (replaced_model_forward, r"CausalWanModel has its forward replaced by usp_attn_forward"),
        (older_attention, r"blocks\[1\].self_attn .* a OlderAttention called with \(x, .*, current_end\), but must"),
        (without_norm, r"is a CausalWanSelfAttention without norm_k, which is not"),
        (odd_head_dim, r"blocks\[1\].self_attn.head_dim has head dim 20"),
        (list_of_windows, r"local_attn_size is \[3, 6\], but must be"),
        (without_settings, r"CausalWanModel has no num_frame_per_block, but its attention is causal"),
        (deferred_updates, r"CausalWanModel has _apply_cache_updates, as LongLive's has"),
    ],
)
def test_models_of_another_form(change, message):
    """The error names what is there, and nothing is changed."""
    model = make_model({})
    change(model)
    with pytest.raises(ValueError, match=message):
        accelerate(model)
    assert "forward" not in vars(model.blocks[0].self_attn)


def test_no_model_at_all():
    for function in (accelerate, restore, lambda model: make_kv_cache(model, 1, 4)):
        with pytest.raises(ValueError, match="model is a Linear, but must be or hold a Wan model"):
            function(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="with 0 causal models, but must have one"):
        make_kv_cache(accelerate(make_model(None)), 1, 4)


def test_bidirectional_models_of_another_form():
    model = make_model(None)
    model.blocks[0].self_attn.window_size = (8, 8)
    with pytest.raises(ValueError, match=r"window_size is \(8, 8\), but must be \(-1, -1\)"):
        accelerate(model)


GRID = (2, 4, 8)  # frames of FRAME_SEQLEN tokens


def call(attn: nn.Module, grids: list | None = None, tokens: int | None = None, freqs: Tensor | None = None, **options):
    """The attention as a block calls it, on two videos of two frames."""
    grid_sizes = torch.tensor(grids or [GRID, GRID])
    x = torch.randn(BATCH, tokens or 2 * FRAME_SEQLEN, CONFIG["dim"])
    freqs = published_wan.rotary_table(attn.head_dim) if freqs is None else freqs
    return attn(x, torch.tensor([2 * FRAME_SEQLEN] * BATCH), grid_sizes, freqs, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grids": [GRID, (2, 8, 4)]}, r"grid_sizes is .*, but all videos of a batch must have one size"),
        ({"tokens": 3 * FRAME_SEQLEN}, r"x has 96 tokens, but must have the 64 of grid_sizes \(2, 4, 8\), or twice"),
        ({"freqs": published_wan.rotary_table(32) ** 0.5}, r"freqs is not the table of rotary embeddings of Wan2.1"),
        ({"grids": [(4, 4, 4)] * 2}, r"num_frames is 4, but must be a multiple of frames_per_block = 3"),
    ],
)
def test_training_calls_that_do_not_fit(options, message):
    model = accelerate(make_model({"num_frame_per_block": 2}))
    if "multiple" in message:
        model.num_frame_per_block = 3
    with pytest.raises(ValueError, match=message):
        call(model.blocks[0].self_attn, block_mask=None, **options)


def test_masks_that_are_none():
    attn = accelerate(make_model({})).blocks[0].self_attn
    with pytest.raises(TypeError, match="block_mask is a Tensor, but must be a BlockMask of FlexAttention or None"):
        call(attn, block_mask=torch.ones(64, 64))


def test_padding_of_unequal_lengths():
    attn = accelerate(make_model(None)).blocks[0].self_attn
    with pytest.raises(ValueError, match=r"seq_lens is \[64, 64\], but must be 32"):
        call(attn, grids=[(1, 4, 8)] * 2)


def small_dict(**changes: object) -> dict:
    shape = (BATCH, 6 * FRAME_SEQLEN, 2, 32)
    cache = {"k": torch.zeros(shape), "v": torch.zeros(shape)}
    cache |= {"global_end_index": torch.tensor([0]), "local_end_index": torch.tensor([0])} | changes
    return {key: value for key, value in cache.items() if value is not None}


@pytest.mark.parametrize(
    ("cache", "start", "message"),
    [
        ({}, 5, r"current_start is 5, but must be a multiple of the 32 tokens .* frame_seq_length must be that number"),
        ({"is_init": torch.zeros(1)}, 0, r"kv_cache has k, v, .*, is_init, but must have .* \(and no is_init\)"),
        (
            {"local_end_index": None},
            0,
            r"kv_cache has k, v, global_end_index, but must have k, v, global_end_index, lo",
        ),
        (
            {"v": torch.zeros(1, 192, 2, 32)},
            0,
            r"kv_cache\['v'\] has shape \[1, 192, 2, 32\], but must have .*\[2, 192",
        ),
        ({}, 64, r"current_start is 64 for 64 tokens, but kv_cache can go on at 0 or repeat"),
        (
            {"global_end_index": torch.tensor([32])},
            0,
            r"current_start is 0 for 64 tokens, but kv_cache can go on at 32",
        ),
    ],
)
def test_dicts_that_do_not_fit(cache, start, message):
    """The cache is unchanged then."""
    attn, cache = accelerate(make_model({})).blocks[0].self_attn, small_dict(**cache)
    before = copy.deepcopy(cache)
    with pytest.raises(ValueError, match=message):
        call(attn, block_mask=None, kv_cache=cache, current_start=start)
    for key, tensor in before.items():
        assert_same_bits(cache[key], tensor)


@pytest.mark.parametrize("window", [{}, {"local_attn_size": 3, "sink_size": 2}], ids=str)
@torch.no_grad()
def test_dicts_that_are_too_small(window):
    attn, cache = accelerate(make_model(window)).blocks[0].self_attn, small_dict()
    for key in ("k", "v"):
        cache[key] = cache[key][:, : 3 * FRAME_SEQLEN]
    call(attn, block_mask=None, kv_cache=cache, current_start=0)
    with pytest.raises(ValueError, match=r"kv_cache has room for 96 tokens, but must have it for 128 \(or, with a win"):
        call(attn, block_mask=None, kv_cache=cache, current_start=2 * FRAME_SEQLEN)


@torch.no_grad()
def test_pages_that_do_not_fit():
    model = accelerate(make_model({}))
    attn, cache = model.blocks[0].self_attn, make_kv_cache(model, BATCH, FRAME_SEQLEN)
    with pytest.raises(
        ValueError, match="current_start is frame 4 for 2 frames, but the cache can go on at frame 0, or"
    ):
        call(attn, block_mask=None, kv_cache=cache[0], current_start=4 * FRAME_SEQLEN)
    with pytest.raises(ValueError, match=r"kv_cache has frame_seqlen 16, but frames of grid_sizes \(2, 4, 8\) have 32"):
        call(attn, block_mask=None, kv_cache=make_kv_cache(model, BATCH, 16)[0])
    call(attn, block_mask=None, kv_cache=cache[0], current_start=0)
    with pytest.raises(ValueError, match="can go on at frame 0 with 2 frames again, at 2, or begin anew at 0"):
        call(attn, block_mask=None, kv_cache=cache[0], current_start=FRAME_SEQLEN)
    with pytest.raises(ValueError, match=r"layers \[1\] of 2 have not written the block"):
        call(attn, block_mask=None, kv_cache=cache[0], current_start=2 * FRAME_SEQLEN)


@torch.no_grad()
def test_indices_that_a_pipeline_made_numbers():
    model = accelerate(make_model({}))
    for cache in (make_kv_cache(model, BATCH, FRAME_SEQLEN)[0], small_dict()):
        cache["global_end_index"] = cache["local_end_index"] = 0
        call(model.blocks[0].self_attn, block_mask=None, kv_cache=cache)
        assert cache["global_end_index"].tolist() == cache["local_end_index"].tolist() == [2 * FRAME_SEQLEN]


def test_example():
    """It runs as its docstring says, with the same numbers before and after."""
    example = Path(__file__).parents[1] / "examples" / "self_forcing.py"
    result = subprocess.run([sys.executable, example], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    errors = [float(error) for error in re.findall(r"relative error (\S+)", result.stdout)]
    assert len(errors) == 2
    assert max(errors) < TOLERANCE
