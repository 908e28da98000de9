"""Configurations with the keys that Self-Forcing publishes become ours, and what does not is said."""

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from small_wan import CHANNELS, TEXT_DIM, write_pipeline

from python_ref.checkpoint import load_weights
from python_ref.config import load_config
from python_ref.models.captioned import CaptionedModel
from python_ref.models.wan import WanModel
from python_ref.published import config as published
from python_ref.published import convert, generate
from python_ref.published.sizes import model_config
from python_ref.published.weights import load_published

# The keys and hyperparameters of github.com/guandeh17/Self-Forcing, configs/self_forcing_dmd.yaml.
DMD = """
generator_ckpt: checkpoints/ode_init.pt
generator_fsdp_wrap_strategy: size
real_score_fsdp_wrap_strategy: size
fake_score_fsdp_wrap_strategy: size
real_name: Wan2.1-T2V-14B
text_encoder_fsdp_wrap_strategy: size
denoising_step_list: [1000, 750, 500, 250]
warp_denoising_step: true
ts_schedule: false
num_train_timestep: 1000
timestep_shift: 5.0
guidance_scale: 3.0
denoising_loss_type: flow
mixed_precision: true
seed: 0
wandb_host: WANDB_HOST
wandb_key: WANDB_KEY
wandb_entity: WANDB_ENTITY
wandb_project: WANDB_PROJECT
sharding_strategy: hybrid_full
lr: 2.0e-06
lr_critic: 4.0e-07
beta1: 0.0
beta2: 0.999
beta1_critic: 0.0
beta2_critic: 0.999
data_path: prompts/vidprom_filtered_extended.txt
batch_size: 1
ema_weight: 0.99
ema_start_step: 200
total_batch_size: 64
log_iters: 50
negative_prompt: 'static, blurred'
dfake_gen_update_ratio: 5
image_or_video_shape: [1, 21, 16, 60, 104]
distribution_loss: dmd
trainer: score_distillation
gradient_checkpointing: true
num_frame_per_block: 3
load_raw_video: false
model_kwargs:
  timestep_shift: 5.0
"""


def translate(text=DMD, **changes):
    return published.translate(OmegaConf.to_container(OmegaConf.create(text)) | changes)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("wan2.1_1.3b_self_forcing_dmd", {}),
        (
            "wan2.1_1.3b_self_forcing_sid",
            {
                "real_name": "Wan2.1-T2V-1.3B", "lr_critic": 2.0e-6, "weight_decay": 0.0, "sid_alpha": 1.0,
                "distribution_loss": "sid",
            },
        ),
    ],
)  # fmt: skip
def test_our_configurations_say_what_the_published_ones_do(name, changes, tmp_path):
    translation = translate(**changes)
    (tmp_path / "c.yaml").write_text(translation.to_yaml())
    theirs, ours = load_config(tmp_path / "c.yaml"), load_config(f"configs/{name}.yaml")
    assert not translation.unknown
    for section in (
        "stage",
        "device",
        "precision",
        "checkpoint_activations",
        "distributed",
        "model",
        "flow",
        "rollout",
    ):
        assert getattr(theirs, section) == getattr(ours, section), section
    assert theirs.data.latents == ours.data.latents
    assert theirs.logging.checkpoint_every == ours.logging.checkpoint_every
    theirs.self_forcing.steps = ours.self_forcing.steps  # the published code has no end
    if not ours.self_forcing.critic_init:
        assert theirs.self_forcing.critic_init == ours.self_forcing.teacher
        theirs.self_forcing.critic_init = ""
    assert theirs.self_forcing == ours.self_forcing


def test_what_has_no_meaning_or_is_unknown_is_said():
    translation = translate(real_nmae="x", gc_interval=100, validate_first_n=64)
    assert translation.unknown == ["real_nmae", "validate_first_n"]
    assert translation.without_meaning.keys() >= {"batch_size", "ema_start_step", "wandb_key", "gc_interval"}
    report = translation.report()
    assert "unknown, left out: real_nmae" in report
    assert "without meaning here: generator_fsdp_wrap_strategy (FSDP2 shards by layer)" in report
    assert "--part generator --generator --output weights/ode_init.safetensors" in report
    assert "--negative-prompt 'static, blurred'" in report
    translated = {*published.SAME, *published.WITHOUT_MEANING, *published.REQUIRED}
    assert len(translated) == len(published.SAME) + len(published.WITHOUT_MEANING) + len(published.REQUIRED)


def test_values_are_carried_over():
    settings = translate(
        model_kwargs={"timestep_shift": 5.0, "local_attn_size": 9, "sink_size": 3},
        denoising_step_list=[1000, 500, 0],
        num_training_frames=27,
        real_guidance_scale=4.0,
        fake_guidance_scale=0.5,
        i2v=True,
        mixed_precision=False,
        sharding_strategy="no_shard",
        disable_wandb=False,
    ).settings
    assert settings["rollout.window_frames"] == 9
    assert settings["rollout.sink_frames"] == 3
    assert settings["rollout.denoising_steps"] == [1000, 500]
    assert (settings["self_forcing.min_frames"], settings["self_forcing.max_frames"]) == (21, 27)
    assert settings["self_forcing.guidance_scale"] == 4.0
    assert settings["self_forcing.fake_guidance_scale"] == 0.5
    assert settings["self_forcing.given_frames"] == 1
    assert settings["precision"] == "fp32"
    assert settings["distributed.strategy"] == "ddp"
    assert settings["logging.wandb"]


def test_what_is_left_out_counts_as_published():
    kept = "generator_ckpt: x.pt\nwarp_denoising_step: true\nlr: 1.0e-6\ntimestep_shift: 8.0\nmixed_precision: true\n"
    settings = translate(kept).settings
    assert settings["self_forcing.ts_schedule"]  # which self_forcing_dmd.yaml turns off
    assert settings["rollout.frames_per_block"] == 1
    assert settings["flow.shift"] == 8.0
    assert settings["self_forcing.critic.lr"] == 1e-6
    assert settings["self_forcing.generator.weight_decay"] == 0.01
    assert settings["self_forcing.critic.max_grad_norm"] == 10.0
    assert settings["self_forcing.teacher"] == "weights/Wan2.1-T2V-1.3B.safetensors"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer": "gan"}, "trainer is 'gan'"),
        ({"warp_denoising_step": False}, "warp_denoising_step is False"),
        ({"distribution_loss": "causvid"}, "distribution_loss is 'causvid'"),
        ({"denoising_loss_type": "x0", "causal": False}, "causal is False.*denoising_loss_type is 'x0'"),
        ({"timestep_shift": 3.0}, r"both of \[3.0, 5.0\]"),
        ({"real_name": "Wan2.2"}, "model is 'Wan2.2'"),
    ],
)
def test_what_cannot_be_followed_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        translate(**changes)


def test_command_line(tmp_path, capsys):
    (tmp_path / "default.yaml").write_text("weight_decay: 0.5\nwarp_denoising_step: false\nheight: 480\n")
    (tmp_path / "dmd.yaml").write_text(DMD)
    files = [str(tmp_path / "default.yaml"), str(tmp_path / "dmd.yaml")]
    output = tmp_path / "ours.yaml"
    assert published.main([*files, "--output", str(output)]) == 0
    assert load_config(output).self_forcing.critic.weight_decay == 0.5
    assert "without meaning here: height" in capsys.readouterr().out
    assert output.read_text().startswith("# to do first: python -m python_ref.published.convert")
    output.unlink()
    assert published.main([files[0], "--output", str(output)]) == 2  # steps that are not warped
    assert published.main(["nowhere.yaml", "--output", str(output)]) == 2
    assert "warp_denoising_step is False" in capsys.readouterr().err
    assert not output.exists()


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A configuration and published weights of a model with the encoders' small sizes."""
    (tmp_path / "c.yaml").write_text(
        f"""
data: {{source: latents, latents: {{num_frames: 3, channels: {CHANNELS}, frame_size: [2, 4]}}}}
model: {{dim: 16, num_heads: 2, num_layers: 1, ffn_dim: 32, freq_dim: 8, patch_size: [1, 2, 2], text_len: 6,
  text_dim: {TEXT_DIM}, position_embedding: false}}
rollout: {{frames_per_block: 1, denoising_steps: [1000, 500]}}
"""
    )
    config = load_config(tmp_path / "c.yaml")
    settings = {"model": vars(config.model), "flow": vars(config.flow), "words": [], "num_frames": 3}
    torch.manual_seed(0)
    model = CaptionedModel(settings | {"channels": CHANNELS, "frame_size": [2, 4]}, False, "reference").model
    torch.nn.init.normal_(model.head.head.weight)
    torch.save({"generator_ema": {f"model.{n}": t for n, t in model.state_dict().items()}}, tmp_path / "x.pt")
    return tmp_path, model


def test_converted_weights_generate_videos(small, capsys):
    folder, model = small
    weights = folder / "weights" / "x.safetensors"
    common = ["--config", str(folder / "c.yaml"), "--checkpoint", str(folder / "x.pt"), "--output", str(weights)]
    assert convert.main([*common, "--part", "generator_ema", "--generator"]) == 0
    tensors, settings = load_weights(weights)
    assert settings["rollout"]["denoising_steps"] == [1000, 500]
    assert settings["frame_size"] == [2, 4]
    assert all(torch.equal(tensors[f"model.{name}"], tensor) for name, tensor in model.state_dict().items())
    loaded = WanModel(model.config, "reference")
    load_published(loaded, weights)  # a converted file is also read as a published one
    assert torch.equal(loaded.head.head.weight, model.head.head.weight)

    pipeline = write_pipeline(folder / "wan", ["a", "cat", "runs"])
    options = ["--checkpoint", str(weights), "--model", str(pipeline), "--threads", "1", "--backend", "reference"]
    output = ["--prompt", "a cat runs", "--num-frames", "4", "--output", str(folder / "made"), "--precision", "fp32"]
    assert generate.main([*options, *output, "--window-frames", "2"]) == 0
    assert (folder / "made" / "000_a_cat_runs.mp4").stat().st_size > 100
    assert convert.main(common) == 0  # not as a generator
    assert generate.main([*options, *output]) == 2
    assert "is no generator" in capsys.readouterr().err


def test_nothing_is_written_if_weights_do_not_fit(small, capsys):
    folder, model = small
    save_file(
        {name: tensor for name, tensor in model.state_dict().items() if "head" not in name}, folder / "y.safetensors"
    )
    options = ["--config", str(folder / "c.yaml"), "--checkpoint", str(folder / "y.safetensors")]
    assert convert.main([*options, "--output", str(folder / "z.safetensors")]) == 2
    assert "missing: head.head.bias" in capsys.readouterr().err
    assert not (folder / "z.safetensors").exists()


def test_sizes_have_names():
    assert model_config("Wan2.1-T2V-1.3B").dim == 1536
    with pytest.raises(ValueError, match=r"accepted: Wan2\.1-T2V-1\.3B, Wan2\.1-T2V-14B"):
        model_config("Wan")
