"""Configuration files as Self-Forcing publishes them, in our form: `python -m python_ref.published.config FILE`.

The published code (github.com/guandeh17/Self-Forcing, configs/*.yaml over configs/default_config.yaml) keeps all keys
on one level. Each becomes a key of ours, or is told to have no meaning here, or is told to be unknown; a value that
asks for something that we do not have is an error. What a file leaves out counts as the published code reads it.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from python_ref.command_line import exit_status
from python_ref.config import load_config
from python_ref.published.sizes import model_config

# What the published code takes for keys that a file leaves out: its default_config.yaml, or its calls of getattr.
PUBLISHED_DEFAULTS = {
    "trainer": "score_distillation",
    "causal": True,
    "warp_denoising_step": False,
    "independent_first_frame": False,
    "weight_decay": 0.01,
    "same_step_across_blocks": True,
    "last_step_only": False,
    "i2v": False,
    "num_frame_per_block": 1,
    "num_training_frames": 21,
    "context_noise": 0,
    "ts_schedule": True,
    "ts_schedule_max": False,
    "min_score_timestep": 0,
    "max_grad_norm_generator": 10.0,
    "max_grad_norm_critic": 10.0,
    "timestep_shift": 1.0,
    "model_kwargs.timestep_shift": 8.0,
    "model_kwargs.local_attn_size": -1,
    "model_kwargs.sink_size": 0,
    "model_kwargs.model_name": "Wan2.1-T2V-1.3B",
    "real_name": "Wan2.1-T2V-1.3B",
    "fake_name": "Wan2.1-T2V-1.3B",
}

# Keys whose values are ours too.
SAME = {
    "num_train_timestep": "flow.num_train_timesteps",
    "num_frame_per_block": "rollout.frames_per_block",
    "independent_first_frame": "rollout.first_frame_alone",
    "context_noise": "rollout.context_noise",
    "model_kwargs.sink_size": "rollout.sink_frames",
    "ts_schedule": "self_forcing.ts_schedule",
    "ts_schedule_max": "self_forcing.ts_schedule_max",
    "min_score_timestep": "self_forcing.min_score_timestep",
    "same_step_across_blocks": "self_forcing.same_step_across_blocks",
    "last_step_only": "self_forcing.last_step_only",
    "dfake_gen_update_ratio": "self_forcing.generator_every",
    "sid_alpha": "self_forcing.sid_alpha",
    "ema_weight": "self_forcing.ema_decay",
    "total_batch_size": "self_forcing.batch_size",
    "lr": "self_forcing.generator.lr",
    "beta1": "self_forcing.generator.beta1",
    "beta2": "self_forcing.generator.beta2",
    "max_grad_norm_generator": "self_forcing.generator.max_grad_norm",
    "lr_critic": "self_forcing.critic.lr",
    "beta1_critic": "self_forcing.critic.beta1",
    "beta2_critic": "self_forcing.critic.beta2",
    "max_grad_norm_critic": "self_forcing.critic.max_grad_norm",
    "gradient_checkpointing": "checkpoint_activations",
    "log_iters": "logging.checkpoint_every",
    "seed": "seed",
    "logdir": "output",
    "wandb_project": "logging.wandb_project",
}

# Values without which a file asks for something else than what we train.
REQUIRED: dict[str, tuple[Any, ...]] = {
    "trainer": ("score_distillation",),
    "causal": (True,),
    "warp_denoising_step": (True,),
    "denoising_loss_type": ("flow",),
    "backward_simulation": (True,),
    "load_raw_video": (False,),
    "distribution_loss": ("dmd", "sid"),
}

WITHOUT_MEANING = {
    "batch_size": "each process takes its part of total_batch_size",
    "ema_start_step": "the average is kept from the start, with a smaller decay at first",
    "discriminator_lr_multiplier": "there is no discriminator in score distillation",
    **dict.fromkeys(
        ("generator_fsdp_wrap_strategy", "real_score_fsdp_wrap_strategy", "fake_score_fsdp_wrap_strategy"),
        "FSDP2 shards by layer",
    ),
    **dict.fromkeys(
        ("text_encoder_fsdp_wrap_strategy", "text_encoder_cpu_offload"), "captions are embedded before training"
    ),
    **dict.fromkeys(
        ("wandb_host", "wandb_key", "wandb_entity", "wandb_save_dir"),
        "wandb reads its environment (WANDB_API_KEY, ...)",
    ),
    **dict.fromkeys(("height", "width", "num_frames"), "image_or_video_shape says it"),
    **dict.fromkeys(
        ("ckpt_step", "prompt_name", "prompt_path", "eval_first_n", "num_samples", "no_visualize", "no_save"),
        "of the published evaluation and command line",
    ),
    **dict.fromkeys(("gc_interval", "config_path", "config_name"), "of the published command line"),
}


@dataclass
class Translation:
    """A published configuration in our form.

    Attributes:
        settings: our keys, dotted, with their values.
        to_do: what must be made before a run, as commands.
        without_meaning: published keys that we need not follow, and why.
        unknown: keys that the published code does not have either, as far as we know.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    to_do: list[str] = field(default_factory=list)
    without_meaning: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def report(self) -> str:
        """All but the settings, one line each."""
        lines = [f"to do first: {command}" for command in self.to_do]
        lines += [f"without meaning here: {key} ({why})" for key, why in sorted(self.without_meaning.items())]
        return "\n".join([*lines, *(f"unknown, left out: {key}" for key in self.unknown)])

    def to_yaml(self) -> str:
        """A configuration file of ours; the report stands above as a comment."""
        nested = OmegaConf.create()
        for key, value in self.settings.items():
            OmegaConf.update(nested, key, value)
        comment = "".join(f"# {line}\n" for line in self.report().splitlines())
        return comment + OmegaConf.to_yaml(nested)


def translate(published: Mapping[str, Any]) -> Translation:
    """Our form of a published configuration, already merged over its defaults if they are at hand.

    Raises:
        ValueError: values that ask for what we do not have, all of them.
    """
    given = {key: value for key, value in published.items() if key != "model_kwargs"}
    given |= {f"model_kwargs.{key}": value for key, value in (published.get("model_kwargs") or {}).items()}
    values = PUBLISHED_DEFAULTS | given
    _check_required(values)
    precision = "bf16" if values.get("mixed_precision") else "fp32"
    result = Translation({"stage": "self_forcing", "device": "cuda", "precision": precision})
    used = {*REQUIRED, *SAME, "mixed_precision"}
    result.settings |= {ours: values[theirs] for theirs, ours in SAME.items() if theirs in values}
    for rule in (_networks, _data, _rollout, _matching, _optimizers, _spread):
        used |= rule(values, result)
    for key in given:
        if key in WITHOUT_MEANING:
            result.without_meaning[key] = WITHOUT_MEANING[key]
        elif key not in used:
            result.unknown.append(key)
    return result


def _check_required(values: Mapping[str, Any]) -> None:
    wrong = [
        f"{key} is {values[key]!r} (accepted: {', '.join(map(repr, accepted))})"
        for key, accepted in REQUIRED.items()
        if key in values and values[key] not in accepted
    ]
    shifts = {values[key] for key in ("timestep_shift", "model_kwargs.timestep_shift") if key in values}
    if len(shifts) > 1:
        wrong.append(f"timestep_shift is both of {sorted(shifts)} (accepted: one shift, model_kwargs' the same)")
    if wrong:
        raise ValueError("this configuration cannot be followed: " + "; ".join(wrong))


# Each rule translates some keys, and returns which.


def _networks(values: Mapping[str, Any], result: Translation) -> set[str]:
    sizes = vars(model_config(values["model_kwargs.model_name"]))
    result.settings |= {f"model.{name}": size for name, size in sizes.items()}
    result.settings["flow.shift"] = values["model_kwargs.timestep_shift"]
    convert = "python -m python_ref.published.convert --config THIS_FILE"
    models = {"self_forcing.teacher": values["real_name"], "self_forcing.critic_init": values["fake_name"]}
    for key, name in models.items():
        result.settings[key] = f"weights/{name}.safetensors"
    for name in dict.fromkeys(models.values()):
        model_config(name)  # an unknown name is an error here rather than in the command
        result.to_do.append(
            f"{convert} --model {name} --checkpoint wan_models/{name} --output weights/{name}.safetensors"
        )
    if "generator_ckpt" in values:
        output = f"weights/{Path(values['generator_ckpt']).stem}.safetensors"
        result.settings["self_forcing.init"] = output
        result.to_do.append(
            f"{convert} --checkpoint {values['generator_ckpt']} --part generator --generator --output {output}"
        )
    return {"generator_ckpt", "real_name", "fake_name", "timestep_shift", "model_kwargs.timestep_shift"} | {
        "model_kwargs.model_name"
    }


def _data(values: Mapping[str, Any], result: Translation) -> set[str]:
    result.settings["data.source"] = "latents"
    if "image_or_video_shape" in values:
        _, frames, channels, rows, columns = values["image_or_video_shape"]
        shape = {"num_frames": frames, "channels": channels, "frame_size": [rows, columns]}
        result.settings |= {f"data.latents.{name}": value for name, value in shape.items()}
    if "data_path" in values:
        folder = f"data/{Path(values['data_path']).stem}"
        result.settings["data.latents.folder"] = folder
        result.to_do.append(
            "python -m python_ref.data.cache_latents --model FOLDER_OF_A_DIFFUSERS_PIPELINE --dtype bfloat16 "
            f"--prompts-file {values['data_path']} --output {folder}"
            f" --negative-prompt '{values.get('negative_prompt', '')}'"
        )
    return {"image_or_video_shape", "data_path", "negative_prompt"}


def _rollout(values: Mapping[str, Any], result: Translation) -> set[str]:
    window = values["model_kwargs.local_attn_size"]
    result.settings["rollout.window_frames"] = None if window == -1 else window
    if "denoising_step_list" in values:
        steps = list(values["denoising_step_list"])
        result.settings["rollout.denoising_steps"] = steps[:-1] if steps[-1] == 0 else steps
    result.settings["self_forcing.given_frames"] = int(values["i2v"])
    if values["num_training_frames"] != 21:  # rollouts have 21 frames to so many
        result.settings |= {
            "self_forcing.min_frames": 21,
            "self_forcing.max_frames": values["num_training_frames"],
        }
    return {"model_kwargs.local_attn_size", "denoising_step_list", "i2v", "num_training_frames"}


def _matching(values: Mapping[str, Any], result: Translation) -> set[str]:
    result.settings["self_forcing.objective"] = values.get("distribution_loss", "dmd")
    real = values.get("real_guidance_scale", values.get("guidance_scale"))
    if real is not None:
        result.settings["self_forcing.guidance_scale"] = real
    if "real_guidance_scale" in values:
        result.settings["self_forcing.fake_guidance_scale"] = values.get("fake_guidance_scale", 0.0)
    return {"guidance_scale", "real_guidance_scale", "fake_guidance_scale"}


def _optimizers(values: Mapping[str, Any], result: Translation) -> set[str]:
    for name in ("generator", "critic"):
        constant = {"weight_decay": values["weight_decay"], "warmup_steps": 0, "final_lr_ratio": 1.0}
        result.settings |= {f"self_forcing.{name}.{key}": value for key, value in constant.items()}
    if "lr" in values:
        result.settings.setdefault("self_forcing.critic.lr", values["lr"])
    return {"weight_decay"}


def _spread(values: Mapping[str, Any], result: Translation) -> set[str]:
    if "sharding_strategy" in values:
        result.settings["distributed.strategy"] = "ddp" if values["sharding_strategy"] == "no_shard" else "fsdp"
    if "disable_wandb" in values:
        result.settings["logging.wandb"] = not values["disable_wandb"]
    return {"sharding_strategy", "disable_wandb"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m python_ref.published.config", description=__doc__)
    parser.add_argument("files", nargs="+", help="published YAML files, each over those before it")
    parser.add_argument("--output", required=True, help="configuration file of ours to write")
    parsed = parser.parse_args(arguments)

    def write() -> None:
        for file in parsed.files:
            if not Path(file).is_file():
                raise FileNotFoundError(f"config file {file} does not exist")
        merged = OmegaConf.merge(*(OmegaConf.load(file) for file in parsed.files))
        translation = translate(OmegaConf.to_container(merged))
        output = Path(parsed.output)
        checked = output.with_name(f"{output.name}.writing")
        checked.write_text(translation.to_yaml(), encoding="utf-8")
        load_config(checked)
        checked.rename(output)
        print(translation.report())
        print(f"written: {parsed.output}")

    return exit_status(write)


if __name__ == "__main__":
    sys.exit(main())
