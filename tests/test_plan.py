"""Plans of small runs against what the runs really do, and of Wan2.1's as far as is known."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from python_ref import plan as planning
from python_ref.config import Config, load_config
from python_ref.costs import count_parameters
from python_ref.data.source import TrainingSource, video_shape
from python_ref.generation import generate_causal
from python_ref.models.captioned import CaptionedModel, wan_config
from python_ref.models.wan_layers import WanConfig
from python_ref.noise import TorchNoise
from python_ref.pipelines.training import SelfForcingTrainingPipeline
from python_ref.plan import cache_bytes, make_plan, training_cache_bytes
from python_ref.stages.causal import CausalStage
from python_ref.stages.self_forcing import SelfForcingStage

FRAMES = 4
SMALL = [
    "threads=1", "backend=reference", "precision=fp32", "data.source=latents", f"data.latents.num_frames={FRAMES}",
    "data.latents.channels=4", "data.latents.frame_size=[16,20]", "model.dim=96", "model.num_heads=4",
    "model.num_layers=3", "model.ffn_dim=320", "model.freq_dim=32", "model.text_dim=48", "model.text_len=20",
    "model.patch_size=[1,2,2]", "model.position_embedding=false", "rollout.frames_per_block=2",
    "rollout.denoising_steps=[1000,500]", "self_forcing.last_step_only=true", "self_forcing.generator_every=1",
    "self_forcing.batch_size=2", "causal.batch_size=2",
]  # fmt: skip


def small_config(folder, *more) -> Config:
    keys = ("self_forcing.init", "self_forcing.teacher", "causal.init")
    return load_config(None, [*SMALL, *(f"{key}={folder}/start.safetensors" for key in keys), *more])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    torch.manual_seed(0)
    config = small_config(folder)
    frames, channels, frame_size = video_shape(config.data)
    settings = {"model": vars(config.model), "flow": vars(config.flow), "words": [], "num_frames": frames}
    settings |= {"channels": channels, "frame_size": frame_size}
    CaptionedModel(settings, causal=False, backend="reference").save(folder / "start.safetensors")
    return folder


def source() -> TrainingSource:
    """Random videos, and captions that cost nothing to embed."""
    return TrainingSource(
        batch=lambda first, size: (torch.randn(size, FRAMES, 4, 16, 20), ["a"] * size),
        captions=lambda first, size: ["a"] * size,
        words=[],
        num_frames=FRAMES,
        channels=4,
        frame_size=(16, 20),
        embed=lambda captions: torch.ones(len(captions), 20, 48),
    )


@pytest.mark.parametrize(
    "options",
    [
        ["self_forcing.objective=dmd"],
        ["self_forcing.objective=sid", "self_forcing.fake_guidance_scale=0.5"],
        ["checkpoint_activations=true", "rollout.window_frames=3", "rollout.sink_frames=1"],
        ["stage=causal"],
        ["stage=causal", "causal.forcing=diffusion"],
    ],
)
def test_operations_of_a_training_step(options, folder):
    """torch's counter sees every product of the reference, whose backward of attention keeps the scores."""
    config = small_config(folder, "stage=self_forcing", *options)
    stage = (CausalStage if config.stage == "causal" else SelfForcingStage)(config, source())
    with FlopCounterMode(display=False) as counter:
        stage.train_step(0)
    counts = counter.get_flop_counts()["Global"]
    attention = sum(count for op, count in counts.items() if "bmm" in str(op))
    linear = sum(counts.values()) - attention
    plan = make_plan(config)
    work = {name: (flops, times * plan.videos) for name, (flops, times) in plan.work.items()}
    expected = sum(
        flops.attention * times * (2 / 2.5 if "backward" in name else 1) for name, (flops, times) in work.items()
    )
    # Without a gradient to the inputs of the first products; a mask is dense to the reference.
    assert linear == pytest.approx(sum(flops.linear * times for flops, times in work.values()), rel=0.03)
    if config.stage == "self_forcing":
        assert attention == pytest.approx(expected, rel=0.03)
    else:
        assert attention > expected


@pytest.mark.parametrize(("window", "sink"), [(None, 0), (3, 1)])
@pytest.mark.parametrize(
    ("precision", "options"),
    [("fp32", []), ("bf16", []), ("bf16", ["rollout.quantization=int8", "rollout.rope=on_read"])],
)
def test_cache_of_a_rollout(precision, options, window, sink, folder, monkeypatch):
    config = small_config(folder, f"precision={precision}", "backend=ext", *options)
    config.rollout.window_frames, config.rollout.sink_frames = window, sink
    network = CaptionedModel.load(folder / "start.safetensors", True, "ext", source().embed)
    caches = []
    make_cache = network.model.make_cache
    monkeypatch.setattr(network.model, "make_cache", lambda *a, **o: caches.append(make_cache(*a, **o)) or caches[-1])
    generate_causal(network, ["a", "b"], 8, config.rollout, torch.Generator(), precision)
    assert caches[0].nbytes == cache_bytes(config, 8, 2, window, sink)


@pytest.mark.parametrize(("frames", "window", "sink"), [(12, 4, 0), (24, 4, 2), (22, 6, 3), (20, None, 0)])
def test_cache_of_a_rollout_with_gradient(frames, window, sink, folder, monkeypatch):
    """A windowed pool grows, since backward reads what has left the window."""
    config = small_config(folder, "backend=ext")
    config.rollout.window_frames, config.rollout.sink_frames = window, sink
    network = CaptionedModel.load(folder / "start.safetensors", True, "ext", source().embed)
    caches = []
    make_cache = network.model.make_cache
    monkeypatch.setattr(network.model, "make_cache", lambda *a, **o: caches.append(make_cache(*a, **o)) or caches[-1])
    pipeline = SelfForcingTrainingPipeline(
        network.model, network.schedule(), [1000.0], **config.rollout.blocks(), gradient_frames=frames
    )
    result = pipeline.rollout(torch.randn(2, frames, 4, 16, 20), torch.randn(2, 20, 48), TorchNoise(0))
    assert result.video.requires_grad
    assert caches[0].nbytes == training_cache_bytes(config, frames, 2)


def test_states(folder):
    config = small_config(folder, "stage=self_forcing", "distributed.strategy=fsdp")
    parameters = count_parameters(wan_config(config.model, 4, (16, 20)))
    plan = make_plan(config)
    assert plan.parameters == dict.fromkeys(("generator", "average", "critic", "teacher"), parameters)
    assert plan.states["weights"] == 4 * 4 * parameters
    assert plan.states["AdamW's moments"] == 2 * 2 * 4 * parameters
    half = make_plan(config, processes=2)
    assert half.states["weights"] == plan.states["weights"] / 2
    assert half.per_process == 1
    assert half.states["KV cache"] == plan.states["KV cache"] / 2
    assert half.flops() == plan.flops()
    whole = make_plan(small_config(folder, "stage=self_forcing", "distributed.strategy=ddp"), processes=2)
    assert whole.states["weights"] == plan.states["weights"]
    larger = make_plan(config, teacher=WanConfig(dim=192, num_heads=4, num_layers=3))
    assert larger.parameters["critic"] == larger.parameters["teacher"] > parameters
    config.self_forcing.critic_init = "other.safetensors"
    assert make_plan(config, teacher=WanConfig(dim=192, num_heads=4, num_layers=3)).parameters["critic"] == parameters


def test_published_run(capsys):
    """64 H100s, 600 steps in under two hours (the README of github.com/guandeh17/Self-Forcing): 12 seconds a step."""
    arguments = ["--config", "configs/wan2.1_1.3b_self_forcing_dmd.yaml", "--processes", "64"]
    assert planning.main([*arguments, "--teacher", "Wan2.1-T2V-14B"]) == 0
    printed = capsys.readouterr().out
    assert "1,418,996,800" in printed
    assert "14,288,491,584" in printed
    (h100,) = [gpu for gpu in planning.GPUS if gpu.name == "H100 SXM"]
    config = load_config(arguments[1])
    _, channels, shape = video_shape(config.data)
    plan = make_plan(config, 64, wan_config(planning.model_config("Wan2.1-T2V-14B"), channels, shape))
    assert 2 < plan.flops() / (64 * h100.peak_tflops * 1e12) < 6  # at the peak it would take a part of that
    # All pages of 21 frames of 1560 tokens: 30 layers, keys and values, 1536 channels of bfloat16.
    assert plan.states["KV cache"] == 30 * 2 * 1536 * 2 * 32768
    assert plan.memory(recompute=True) / 1e9 < h100.memory_gb < plan.memory(recompute=False) / 1e9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["stage=ode"], "stage is 'ode'"),
        (["stage=self_forcing", "self_forcing.objective=gan"], "objective is 'gan'"),
        (["stage=self_forcing", "self_forcing.lora_rank=4"], "lora_rank is 4"),
        (["stage=self_forcing", "self_forcing.batch_size=5"], "processes is 2"),
        (["stage=teacher", "distributed.strategy=none"], "strategy=none"),
        (["stage=teacher", "data.latents.num_frames=4", "model.patch_size=[2,2,2]"], "one frame per token"),
    ],
)
def test_what_is_not_planned(options, message, folder):
    with pytest.raises(ValueError, match=message):
        make_plan(small_config(folder, "distributed.strategy=ddp", *options), processes=2)


def test_errors_on_the_command_line(capsys):
    assert planning.main(["--config", "configs/teacher.yaml", "--utilisation", "0"]) == 2
    assert planning.main(["--config", "nowhere.yaml"]) == 2
    assert planning.main(["--config", "configs/teacher.yaml"]) == 0
    assert "utilisation is 0.0" in capsys.readouterr().err
