"""The settings of a run: typed, read from YAML, overridden from the command line as `section.key=value`.

Every key is declared here, so a misspelt one is an error that names the accepted keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from python_ref.data.latents import LatentsConfig
from python_ref.data.moving_digits import MovingDigitsConfig
from python_ref.data.video_files import VideoFilesConfig

STAGES = ("teacher", "causal", "self_forcing")


def _check_choice(name: str, value: str, accepted: Sequence[str]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} is {value!r}; accepted: {', '.join(map(repr, accepted))}")


def _check_positive(owner: Any, *names: str) -> None:
    for name in names:
        if getattr(owner, name) <= 0:
            raise ValueError(f"{name} is {getattr(owner, name)}; accepted: above 0")


@dataclass
class DataConfig:
    """Where videos come from; the section of the chosen source counts."""

    source: str = "moving_digits"  # or "video_files" or "latents"
    moving_digits: MovingDigitsConfig = field(default_factory=MovingDigitsConfig)
    video_files: VideoFilesConfig = field(default_factory=VideoFilesConfig)
    latents: LatentsConfig = field(default_factory=LatentsConfig)

    def __post_init__(self) -> None:
        _check_choice("data.source", self.source, ("moving_digits", "video_files", "latents"))


@dataclass
class ModelConfig:
    """Sizes of the video model and of its text encoder."""

    dim: int = 96
    num_heads: int = 3
    num_layers: int = 4
    ffn_dim: int = 384
    freq_dim: int = 64  # channels of the sinusoidal timestep embedding
    patch_size: list[int] = field(default_factory=lambda: [1, 6, 6])  # frames, rows, columns
    position_embedding: bool = True  # learned absolute positions beside the rotary ones, for frames of one size
    text_len: int = 16  # words
    text_dim: int = 64
    text_heads: int = 2
    text_layers: int = 1


@dataclass
class FlowConfig:
    """Flow matching: sigma is drawn uniformly, then shifted towards noise (SD3, arXiv 2403.03206, eq. 23)."""

    shift: float = 3.0
    num_train_timesteps: int = 1000

    def __post_init__(self) -> None:
        _check_positive(self, "shift", "num_train_timesteps")


@dataclass
class OptimizerConfig:
    """AdamW with linear warm-up, then a cosine down to a floor, and clipping of the gradient's norm."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.01
    warmup_steps: int = 100
    final_lr_ratio: float = 0.05  # of lr, at the last step; 1: constant
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        _check_positive(self, "lr", "max_grad_norm")
        if not 0 <= self.final_lr_ratio <= 1:
            raise ValueError(f"final_lr_ratio is {self.final_lr_ratio}; accepted: 0 to 1")


@dataclass
class RolloutConfig:
    """How a causal model generates: blocks, denoising steps, and what a block sees of its past."""

    frames_per_block: int = 3
    denoising_steps: list[int] = field(default_factory=lambda: [1000, 750, 500, 250])  # before the shift
    window_frames: int | None = None
    sink_frames: int = 0
    context_noise: int = 0  # timestep at which the clean pass of a block is run


@dataclass
class TeacherConfig:
    """Bidirectional flow matching from scratch."""

    steps: int = 4000
    batch_size: int = 32
    accumulate: int = 1  # batches per optimizer step
    caption_dropout: float = 0.1
    ema_decay: float = 0.999
    sample_steps: int = 40
    guidance_scale: float = 2.0  # flow = uncond + scale (cond - uncond)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        _check_positive(self, "steps", "batch_size", "accumulate", "sample_steps")


@dataclass
class CausalConfig:
    """Causal initialisation: the teacher's weights under a block-causal mask, by teacher or diffusion forcing."""

    init: str = "assets/teacher.safetensors"
    steps: int = 600
    batch_size: int = 24
    accumulate: int = 1
    caption_dropout: float = 0.0
    forcing: str = "teacher"  # or "diffusion"
    ema_decay: float = 0.99
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=5e-4, warmup_steps=50))

    def __post_init__(self) -> None:
        _check_choice("causal.forcing", self.forcing, ("teacher", "diffusion"))
        _check_positive(self, "steps", "batch_size", "accumulate")


@dataclass
class SelfForcingConfig:
    """Distribution matching (DMD) on the model's own rollouts (Self-Forcing, arXiv 2506.08009, algorithm 1)."""

    init: str = "outputs/demo/causal.safetensors"  # the generator
    teacher: str = "assets/teacher.safetensors"  # the real score; the critic starts from it too
    steps: int = 400
    batch_size: int = 16
    generator_every: int = 3  # critic steps per generator step, DMD2's two time-scale rule (arXiv 2405.14867)
    guidance_scale: float = 1.0  # of the real score: cond + scale (cond - uncond)
    ema_decay: float = 0.95  # per generator step
    cache_gradient: str = "constant"
    last_step_only: bool = False
    same_step_across_blocks: bool = True
    generator: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=1e-4, beta1=0.0, weight_decay=0.0, warmup_steps=0, final_lr_ratio=1)
    )
    critic: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=2e-4, beta1=0.0, weight_decay=0.0, warmup_steps=0, final_lr_ratio=1)
    )

    def __post_init__(self) -> None:
        _check_positive(self, "steps", "batch_size", "generator_every")
        _check_choice("self_forcing.cache_gradient", self.cache_gradient, ("constant", "exit_step", "full"))


@dataclass
class DistributedConfig:
    """How the processes that torchrun started share the work; of no effect in a run of one process."""

    strategy: str = "none"  # "ddp": each holds all weights; "fsdp": weights, gradients and moments are sharded (FSDP2)
    context_parallel: int = 1  # so many processes work on the same videos, each on a share of the tokens and heads

    def __post_init__(self) -> None:
        _check_positive(self, "context_parallel")
        _check_choice("distributed.strategy", self.strategy, ("none", "ddp", "fsdp"))


@dataclass
class LoggingConfig:
    """How often a run tells, shows and keeps what it has; all in steps."""

    log_every: int = 10
    sample_every: int = 500
    sample_prompts: int = 8
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    drift_videos: int = 0  # that the drift plot measures beside every sample, of moving digits; 0: no plot
    tensorboard: bool = True
    wandb: bool = False  # Weights & Biases, where it is installed
    wandb_project: str = "selfforcing"

    def __post_init__(self) -> None:
        _check_positive(self, "log_every", "sample_every", "sample_prompts", "checkpoint_every", "keep_checkpoints")
        if self.drift_videos < 0:
            raise ValueError(f"drift_videos is {self.drift_videos}; accepted: 0 or more")


@dataclass
class EvaluationConfig:
    """What `python -m python_ref.evaluate` and the demo generate and measure."""

    num_videos: int = 200
    num_frames: int = 36
    batch_size: int = 100
    seed: int = 1234

    def __post_init__(self) -> None:
        _check_positive(self, "num_videos", "num_frames", "batch_size")


@dataclass
class Config:
    """All settings of a run."""

    stage: str = "teacher"
    output: str = "outputs/run"
    seed: int = 0
    resume: bool = False
    backend: str = "ext"
    threads: int = 2
    precision: str = "bf16"  # autocast of the networks; "fp32": none. Weights and optimizer are always float32
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    causal: CausalConfig = field(default_factory=CausalConfig)
    self_forcing: SelfForcingConfig = field(default_factory=SelfForcingConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        _check_choice("stage", self.stage, STAGES)
        _check_choice("backend", self.backend, ("ext", "reference"))
        _check_choice("precision", self.precision, ("bf16", "fp32"))
        if self.logging.drift_videos and self.data.source != "moving_digits":
            raise ValueError(
                f"logging.drift_videos is {self.logging.drift_videos}; accepted with data.source = "
                f"{self.data.source!r}: 0, since only moving digits can be measured"
            )
        _check_positive(self, "threads")


def load_config(file: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Defaults, then a YAML file, then `section.key=value` overrides. ValueError tells what is not accepted."""
    layers: list[tuple[str, Any]] = []
    if file is not None:
        if not Path(file).is_file():
            raise FileNotFoundError(f"config file {file} does not exist; accepted: a YAML file as in configs/")
        layers.append((str(file), OmegaConf.load(file)))
    for override in overrides:
        key, separator, _ = override.partition("=")
        if not separator or not key:
            raise ValueError(f"override {override!r} has no value; accepted: section.key=value")
        layers.append((override, OmegaConf.from_dotlist([override])))
    merged = OmegaConf.structured(Config)
    for origin, layer in layers:
        _check_keys(origin, layer, Config)
        try:
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            raise ValueError(f"{origin}: {str(error).splitlines()[0]}") from error
    return OmegaConf.to_object(merged)  # type: ignore[return-value]


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML, to be kept beside the results it made."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _check_keys(origin: str, layer: Any, schema: type, path: str = "") -> None:
    known = {f.name: f.type for f in fields(schema)}
    for key, value in OmegaConf.to_container(layer).items() if OmegaConf.is_config(layer) else layer.items():
        if key not in known:
            raise ValueError(f"{origin}: unknown key {path + str(key)!r}; accepted: {', '.join(known)}")
        section = known[key]
        if isinstance(section, type) and is_dataclass(section):
            if not isinstance(value, dict):
                raise ValueError(f"{origin}: {path + str(key)} is {value!r}; accepted: a section of keys")
            _check_keys(origin, value, section, f"{path}{key}.")
