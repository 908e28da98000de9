"""Every method of training through the command line: it trains, its options reach it, it resumes to the same bits."""

import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny_runs import arguments, assert_same_run, losses

from python_ref.checkpoint import load_weights
from python_ref.config import load_config
from python_ref.data.sample_videos import copy_sample_videos
from python_ref.data.source import open_source
from python_ref.make_ode_pairs import main as make_ode_pairs
from python_ref.models.lora import merged_weights
from python_ref.stages import Stage
from python_ref.stages.clips import draw_noise
from python_ref.train import main as train
from python_ref.train import make_stage

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
WINDOW = "rollout.window_frames=6"
SINK = "rollout.sink_frames=1"


def self_forcing(*options: str) -> tuple[str, list[str]]:
    """The stage and its overrides; most options are the stage's own."""
    others = ("rollout.", "backend=")
    return "self_forcing", [option if option.startswith(others) else f"self_forcing.{option}" for option in options]


METHODS = {
    "teacher forcing": ("causal", []),
    "teacher forcing, noised past": ("causal", ["causal.clean_noise_steps=100"]),
    "teacher forcing, much noised past": (
        "causal",
        ["causal.clean_noise_steps=100", "causal.published_clean_noise=true"],
    ),
    "diffusion forcing": ("causal", ["causal.forcing=diffusion", SINK, WINDOW]),
    "ode": ("ode", []),
    "consistency": ("consistency", ["consistency.guidance_scale=2", "consistency.solver_steps=2"]),
    "dmd": self_forcing(),
    "dmd, guided critic": self_forcing("fake_guidance_scale=0.5"),
    "dmd, scored below the exit": self_forcing("ts_schedule_max=true"),
    "dmd, scored above the exit": self_forcing("ts_schedule=true"),
    "dmd, scored at high noise": self_forcing("min_score_timestep=900"),
    "sid": self_forcing("objective=sid"),
    "sid, alpha": self_forcing("objective=sid", "sid_alpha=0.5"),
    "gan": self_forcing("objective=gan", "gan.relativistic=false"),
    "gan, relativistic": self_forcing("objective=gan"),
    "gan, penalties": self_forcing("objective=gan", "gan.r1_weight=1", "gan.r2_weight=1", "gan.sees_time=true"),
    "causvid": self_forcing("videos=noised_data"),
    "causvid, clean past": self_forcing("videos=noised_data", "clean_past=true"),
    "causvid, simulated": self_forcing("videos=simulated"),
    "self gradient": self_forcing("videos=self_gradient"),
    "self gradient, sid, image to video": self_forcing("videos=self_gradient", "objective=sid", "given_frames=1"),
    "image to video": self_forcing("given_frames=1"),
    "continuation": self_forcing("given_frames=3"),
    "random length": self_forcing("min_frames=3", "max_frames=6"),
    "long": self_forcing("min_frames=6", "max_frames=15", WINDOW, SINK),
    "few frames with gradient": self_forcing("gradient_frames=3"),
    "first frame alone": self_forcing("rollout.first_frame_alone=true"),
    "last step": self_forcing("last_step_only=true"),
    "steps of their own": self_forcing("same_step_across_blocks=false"),
    "context noise": self_forcing("rollout.context_noise=200"),
    "gradient through the cache": self_forcing("cache_gradient=full", "backend=reference"),
    "gradient to the exit step": self_forcing("cache_gradient=exit_step", "backend=reference"),
    "stream": self_forcing("stream_steps=3", WINDOW, SINK),
    "stream in small parts": self_forcing("stream_steps=4", "stream_frames=3", WINDOW),
    "stream, rotated on reading, int8": self_forcing(
        "stream_steps=3", WINDOW, SINK, "rollout.rope=on_read", "rollout.quantization=int8"
    ),
    "lora": self_forcing("lora_rank=2"),
    "accumulation": self_forcing("accumulate=2"),
}
# What a method differs from by its options.
PLAIN = {
    **{name: "teacher forcing" for name in METHODS if METHODS[name][0] == "causal"},
    **{name: "dmd" for name in METHODS if METHODS[name][0] == "self_forcing"},
    "sid, alpha": "sid",
    "gan, relativistic": "gan",
    "gan, penalties": "gan, relativistic",
    "teacher forcing, much noised past": "teacher forcing, noised past",
    "self gradient, sid, image to video": "self gradient",
    "causvid, clean past": "causvid",
    "stream in small parts": "stream",
    "stream, rotated on reading, int8": "stream",
}


@pytest.fixture(scope="session")
def options(config_file, starts, tmp_path_factory):
    """Method and more overrides to arguments of the command line."""
    pairs = tmp_path_factory.mktemp("pairs")
    teacher = starts[0].split("=")[1]
    sizes = ["--pairs", "10", "--sample-steps", "2", "--denoising-steps", "1000", "500", "--threads", "1"]
    assert make_ode_pairs(["--checkpoint", teacher, "--output", str(pairs), "--precision", "fp32", *sizes]) == 0
    small = [f"ode.pairs={pairs}", "ode.batch_size=4", "consistency.batch_size=4", "self_forcing.gan.layers=[0,1]"]

    def make(method: str, output: Path, *more: str) -> list[str]:
        stage, own = METHODS[method]
        # With this seed the first rollouts exit at both steps.
        return arguments(config_file, starts, stage, output, "seed=4", *small, f"{stage}.steps=4", *own, *more)

    return make


@pytest.fixture(scope="session")
def runs(options, tmp_path_factory):
    """Runs of 4 steps with a checkpoint at every second, made when first asked for."""
    made: dict[str, Path] = {}

    def run(method: str) -> Path:
        if method not in made:
            made[method] = tmp_path_factory.mktemp("run")
            assert train(options(method, made[method], "logging.checkpoint_every=2", "logging.sample_every=4")) == 0
        return made[method]

    return run


@pytest.mark.parametrize("method", METHODS)
def test_a_method_resumes_to_the_same_bits(method, options, runs, tmp_path):
    """From the checkpoint in the middle, all tensors and metrics are those of the uninterrupted run."""
    stage, whole = METHODS[method][0], runs(method)
    middle = Path("checkpoints") / stage / "step_00000002"
    shutil.copytree(whole / middle, tmp_path / middle)
    assert train(options(method, tmp_path, "resume=true", "logging.checkpoint_every=2")) == 0
    assert_same_run(whole, tmp_path, stage, 4)
    assert losses(whole, stage)[2:] == losses(tmp_path, stage)
    assert len(losses(tmp_path, stage)) == 2
    assert (whole / "samples" / f"{stage}_000004.png").is_file()


@pytest.mark.parametrize("method", [name for name, plain in PLAIN.items() if name != plain])
def test_options_reach_a_method(method, runs):
    """With them it does not train as without."""
    stage = METHODS[method][0]
    assert losses(runs(method), stage) != losses(runs(PLAIN[method]), stage)


def test_what_a_method_tells(runs):
    seen = {method: set().union(*losses(runs(method), "self_forcing")) for method in ("dmd", "sid", "gan, penalties")}
    assert {"generator_loss", "critic_loss", "gradient_norm"} < seen["dmd"]
    assert "score_difference" in seen["sid"]
    assert {"fake_logit", "real_logit", "critic_fake_logit", "critic_r1", "critic_r2"} < seen["gan, penalties"]


@pytest.mark.parametrize(
    "method", ["ode", "consistency", "sid", "gan", "causvid, simulated", "self gradient", "stream"]
)
def test_both_backends_train_alike(method, options, runs, tmp_path):
    stage = METHODS[method][0]
    assert train(options(method, tmp_path, "backend=reference")) == 0
    for reference, ext in zip(losses(tmp_path, stage), losses(runs(method), stage), strict=True):
        assert reference.keys() == ext.keys()
        for name, value in reference.items():
            assert ext[name] == pytest.approx(value, rel=2e-3, abs=1e-6), name


@pytest.mark.parametrize("method", ["sid", "gan", "causvid", "self gradient", "stream", "consistency"])
def test_recomputed_activations_and_half_precision(method, options, runs, tmp_path):
    """Recomputing changes nothing; bfloat16 little."""
    stage = METHODS[method][0]
    assert train(options(method, tmp_path / "recomputed", "checkpoint_activations=true")) == 0
    assert losses(tmp_path / "recomputed", stage) == losses(runs(method), stage)
    assert train(options(method, tmp_path / "half", "precision=bf16", f"{stage}.steps=2")) == 0
    half, full = losses(tmp_path / "half", stage)[0], losses(runs(method), stage)[0]
    name = "loss" if "loss" in full else "critic_loss"
    assert half[name] == pytest.approx(full[name], rel=0.05)
    assert half[name] != full[name]


def test_a_stream_resumes_in_half_precision(options, tmp_path):
    """Its cache then holds bfloat16."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    more = ["precision=bf16", "logging.checkpoint_every=2", "self_forcing.stream_steps=4"]
    assert train(options("stream", whole, *more)) == 0
    middle = Path("checkpoints/self_forcing/step_00000002")
    shutil.copytree(whole / middle, resumed / middle)
    assert train(options("stream", resumed, *more, "resume=true")) == 0
    assert (whole / "self_forcing.safetensors").read_bytes() == (resumed / "self_forcing.safetensors").read_bytes()


def stage_of(arguments: list[str]) -> Stage:
    _, file, *overrides = arguments
    config = load_config(file, overrides)
    return make_stage(config, open_source(config.data))


def test_long_rollouts_are_scored_at_their_end(options, tmp_path):
    """Their length depends on seed and step alone, takes every value, and exceeds the window and the teacher's."""
    stage = stage_of(options("long", tmp_path, "self_forcing.gradient_frames=3"))
    lengths = [stage.clips._length(step) for step in range(40)]
    assert set(lengths) == {6, 9, 12, 15}
    another = stage_of(options("long", tmp_path))
    assert lengths == [another.clips._length(step) for step in range(40)]

    step = lengths.index(15)
    batch, again = stage._batch(step, 0), stage._batch(step, 0)
    clip = stage.clips(batch)
    noise = draw_noise(stage.network, again, 15)
    rollout = stage.clips.pipeline.rollout(noise, again.context, again.source)
    assert torch.equal(clip.video, rollout.video[:, -6:])
    assert rollout.gradient_start == 12
    mask = clip.gradient_mask
    assert mask.shape == clip.video.shape
    assert not mask[:, :3].any()
    assert mask[:, 3:].all()
    with torch.no_grad():
        assert stage.clips(stage._batch(step, 0)).gradient_mask is None  # the critic learns from all


def test_a_stream_goes_on_until_its_steps_are_over(options, tmp_path):
    stage = stage_of(options("stream in small parts", tmp_path))
    kept = stage.clips.kept
    videos, frames = [], []
    for step in range(6):  # 4 to a stream; the generator trains, too, in every second
        batch = stage._batch(step, 0)
        for _ in range(1 + (step % 2 == 0)):
            with torch.no_grad():
                videos.append(stage.clips(batch).video)
            frames.append((kept.num_frames, videos[-1].shape[1]))
    assert frames == [(3, 3), (6, 6), (9, 6), (12, 6), (15, 6), (18, 6), (3, 3), (6, 6), (9, 6)]
    for before, after in pairwise(videos[1:6]):
        assert torch.equal(before[:, 3:], after[:, :3])
    assert torch.equal(stage._batch(0, 0).context, stage._batch(3, 0).context)  # of the same captions
    assert not torch.equal(stage._batch(0, 0).context, stage._batch(4, 0).context)


def test_given_frames_are_those_of_the_data(options, tmp_path):
    stage = stage_of(options("image to video", tmp_path))
    batch = stage._batch(0, 0)
    clip = stage.clips(batch)
    assert clip.video.shape[1] == 4  # what blocks of 3 fill of the teacher's 6
    assert torch.equal(clip.video[:, :1], batch.real[:, :1])
    assert not clip.gradient_mask[:, 0].any()
    assert clip.gradient_mask[:, 1:].all()
    videos = stage.sample(["a 1", "a 2"], torch.Generator().manual_seed(0))
    assert torch.equal(videos[:, :1], stage.source.batch(0, 2)[0][:, :1])


def test_adapters_learn_alone_and_are_merged(runs, starts):
    """What a run leaves has the names of any other, and differs from its start by matrices of low rank."""
    trained, _ = load_weights(runs("lora") / "self_forcing.safetensors")
    start, _ = load_weights(next(option for option in starts if option.startswith("self_forcing.init")).split("=")[1])
    assert trained.keys() == start.keys()
    adapted = [name for name, weight in trained.items() if not torch.equal(weight, start[name])]
    assert len(adapted) == 2 * (2 * 4 + 2)  # of two layers: the projections of both attentions, the feed-forward
    for name in adapted:
        assert torch.linalg.matrix_rank((trained[name] - start[name]).double(), rtol=1e-3) <= 2


def test_adapters_change_nothing_at_first(options, tmp_path):
    adapted, plain = stage_of(options("lora", tmp_path)), stage_of(options("dmd", tmp_path))
    assert sum(weight.requires_grad for weight in adapted.network.parameters()) == 2 * 20  # A and B of 20 projections
    with torch.no_grad():
        videos = [stage.clips(stage._batch(0, 0)).video for stage in (adapted, plain)]
    assert torch.equal(*videos)
    for name, weight in merged_weights(adapted.network).items():
        assert torch.equal(weight, plain.network.state_dict()[name])


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("[!w]*.yaml")), ids=lambda file: file.stem)  # not those of Wan2.1
def test_the_shipped_configs_make_their_stage(file, tmp_path):
    """Also those that start from what other commands leave: the shipped teacher stands for it."""
    teacher = "assets/teacher.safetensors"
    starts = [f"{name}={teacher}" for name in ("consistency.init", "consistency.teacher", "self_forcing.init")]
    config = load_config(file, [*starts, f"ode.pairs={tmp_path}", f"data.video_files.folder={tmp_path}/videos"])
    if config.data.source == "video_files":
        copy_sample_videos(tmp_path / "videos")
    assert config.output == f"outputs/{file.stem}"
    if config.stage == "ode":
        arguments = ["--checkpoint", teacher, "--output", str(tmp_path), "--pairs", "1", "--sample-steps", "4"]
        assert make_ode_pairs(arguments) == 0
    assert make_stage(config, open_source(config.data)).total_steps > 0


def test_the_method_is_kept_with_the_weights(runs):
    _, settings = load_weights(runs("first frame alone") / "self_forcing.safetensors")
    assert settings["rollout"]["first_frame_alone"] is True


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ("dmd", "self_forcing.objective=vae", "self_forcing.objective is 'vae'; accepted: 'dmd', 'sid', 'gan'"),
        ("dmd", "self_forcing.videos=none", "self_forcing.videos is 'none'; accepted: 'rollout', 'self_gradient'"),
        ("dmd", "self_forcing.max_frames=7", "max_frames is 7; accepted: 0 and a multiple of frames_per_block = 3"),
        ("dmd", "self_forcing.given_frames=6", "given_frames is 6, min_frames 6 and max_frames 6; accepted: rising"),
        ("dmd", "self_forcing.gradient_frames=2", "gradient_frames is 2; accepted: frames_per_block = 3 or more"),
        ("dmd", "self_forcing.clean_past=true", "clean_past is True; accepted with videos = 'rollout': False"),
        ("gan", "self_forcing.gan.layers=[7]", "layers is [7], but must name some of the model's 0 to 1"),
        ("stream", "self_forcing.accumulate=2", "accumulate is 2; accepted with stream_steps: 1"),
        ("stream", "self_forcing.videos=self_gradient", "accepted with stream_steps: 'rollout'"),
        ("stream", "self_forcing.stream_frames=4", "stream_frames is 4"),
        (
            "stream",
            "distributed.context_parallel=2",
            "distributed.context_parallel is 2; accepted with stream_steps: 1",
        ),
        ("self gradient", "rollout.quantization=int8", "rollout.quantization is 'int8'; accepted with videos = 'self"),
        ("stream", "rollout.window_frames=null", "rollout.window_frames is None; accepted with stream_steps: a window"),
        (
            "ode",
            "rollout.denoising_steps=[1000,250]",
            "rollout.denoising_steps is [1000, 250]; accepted with the pairs",
        ),
        (
            "diffusion forcing",
            "causal.clean_noise_steps=5",
            "clean_noise_steps is 5; accepted with forcing = 'diffusion'",
        ),
    ],
)
def test_bad_options_are_explained(method, more, message, options, tmp_path, capsys):
    assert train(options(method, tmp_path, more)) == 2
    assert message in capsys.readouterr().err
