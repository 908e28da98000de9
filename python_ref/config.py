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

STAGES = ("teacher", "causal", "ode", "consistency", "self_forcing")


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
    first_frame_alone: bool = False  # frame 0 is a block of its own
    rope: str = "on_write"  # or "on_read": positions are counted from the first visible frame, so that they never grow
    quantization: str | None = None  # of cached keys and values: "int8", "fp8_e4m3", "int4"
    past_bias: list[float] | None = None  # added to the scores of (sink, past, own block)
    use_cuda_graph: bool = False  # generation: every block as one CUDA graph, on a GPU

    def __post_init__(self) -> None:
        _check_choice("rollout.rope", self.rope, ("on_write", "on_read"))
        if self.quantization is not None:
            _check_choice("rollout.quantization", self.quantization, ("int8", "fp8_e4m3", "int4"))
        if self.past_bias is not None and len(self.past_bias) != 3:
            raise ValueError(f"rollout.past_bias is {self.past_bias}; accepted: three numbers")

    def cache_options(self) -> dict[str, Any]:
        """Of `PagedKVCache`, besides window and sink."""
        bias = None if self.past_bias is None else tuple(self.past_bias)
        return {"rope": self.rope, "quantization": self.quantization, "past_bias": bias}

    def blocks(self) -> dict[str, Any]:
        """What masks, pipelines and objectives call by the same names: blocks, window and sink."""
        names = ("frames_per_block", "first_frame_alone", "window_frames", "sink_frames")
        return {name: getattr(self, name) for name in names}

    def frames_within(self, limit: int, given_frames: int = 0) -> int:
        """The most frames up to `limit` that blocks fill, after the given ones if there are any."""
        before = given_frames or int(self.first_frame_alone)
        return before + max(0, limit - before) // self.frames_per_block * self.frames_per_block


@dataclass
class ExamplesConfig:
    """What the stages share that learn from given examples."""

    steps: int = 4000
    batch_size: int = 32
    accumulate: int = 1  # batches per optimizer step
    caption_dropout: float = 0.0
    ema_decay: float = 0.99
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        _check_positive(self, "steps", "batch_size", "accumulate")


@dataclass
class TeacherConfig(ExamplesConfig):
    """Bidirectional flow matching from scratch."""

    caption_dropout: float = 0.1
    ema_decay: float = 0.999
    sample_steps: int = 40
    guidance_scale: float = 2.0  # flow = uncond + scale (cond - uncond)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(self, "sample_steps")


def _fine_tuning() -> OptimizerConfig:
    return OptimizerConfig(lr=5e-4, warmup_steps=50)


@dataclass
class CausalConfig(ExamplesConfig):
    """Causal initialisation: the teacher's weights under a block-causal mask, by teacher or diffusion forcing."""

    init: str = "assets/teacher.safetensors"
    steps: int = 600
    batch_size: int = 24
    forcing: str = "teacher"  # or "diffusion"
    clean_noise_steps: int = 0  # teacher forcing: the clean past is noised by one of so many lowest levels; 0: not
    published_clean_noise: bool = False  # draw from the highest levels instead, as the published code does
    optimizer: OptimizerConfig = field(default_factory=_fine_tuning)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("causal.forcing", self.forcing, ("teacher", "diffusion"))
        if self.clean_noise_steps and self.forcing != "teacher":
            raise ValueError(
                f"causal.clean_noise_steps is {self.clean_noise_steps}; accepted with forcing = {self.forcing!r}: 0, "
                "as its past is noised already"
            )


@dataclass
class OdeConfig(ExamplesConfig):
    """Causal initialisation by regression on the teacher's ODE (CausVid, arXiv 2412.07772, section 4.3)."""

    init: str = "assets/teacher.safetensors"
    pairs: str = "outputs/ode_pairs"  # a folder written by python_ref.make_ode_pairs
    steps: int = 600
    batch_size: int = 24
    optimizer: OptimizerConfig = field(default_factory=_fine_tuning)


@dataclass
class ConsistencyConfig(ExamplesConfig):
    """Causal initialisation by consistency distillation of a causal teacher (arXiv 2605.15141)."""

    init: str = "outputs/demo/causal.safetensors"  # the student
    teacher: str = "outputs/demo/causal.safetensors"  # trained by teacher forcing
    steps: int = 600
    batch_size: int = 24
    solver_steps: int = 48  # of the teacher's ODE from noise to video
    guidance_scale: float = 1.0  # of the teacher: flow = uncond + scale (cond - uncond); 1: none
    optimizer: OptimizerConfig = field(default_factory=_fine_tuning)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(self, "solver_steps")


@dataclass
class GanConfig:
    """The discriminator, a copy of the teacher with registers, and its losses; see `python_ref.objectives.gan`."""

    layers: list[int] = field(default_factory=lambda: [1, 2, 3])  # of the teacher, whose outputs the registers read
    sees_time: bool = False
    relativistic: bool = True
    generator_weight: float = 1.0
    discriminator_weight: float = 1.0
    r1_weight: float = 0.0
    r1_sigma: float = 0.1
    r2_weight: float = 0.0
    r2_sigma: float = 0.1


def _constant_rate(lr: float) -> OptimizerConfig:
    return OptimizerConfig(lr=lr, beta1=0.0, weight_decay=0.0, warmup_steps=0, final_lr_ratio=1)


@dataclass
class SelfForcingConfig:
    """Training on the model's own videos (Self-Forcing, arXiv 2506.08009, algorithm 1, and its relatives)."""

    init: str = "outputs/demo/causal.safetensors"  # the generator
    teacher: str = "assets/teacher.safetensors"  # the real score
    critic_init: str = ""  # what the critic starts from; left out: the teacher
    steps: int = 400
    batch_size: int = 16
    accumulate: int = 1  # batches per optimizer step, of the generator and of the critic
    generator_every: int = 3  # critic steps per generator step, DMD2's two time-scale rule (arXiv 2405.14867)
    ema_decay: float = 0.95  # per generator step
    lora_rank: int = 0  # of adapters on the generator, which then learn alone; 0: all weights learn
    lora_alpha: float = 16.0  # the adapters' product counts alpha / rank times

    # What the videos are trained for.
    objective: str = "dmd"  # "sid", "gan"
    guidance_scale: float = 1.0  # of the real score: cond + scale (cond - uncond)
    fake_guidance_scale: float = 0.0  # of the critic, in the same way
    sid_alpha: float = 1.0
    ts_schedule: bool = False  # videos are scored at timesteps from where they were denoised to
    ts_schedule_max: bool = False  # and up to where they came from
    min_score_timestep: int = 0
    gan: GanConfig = field(default_factory=GanConfig)

    # How the videos are made: "rollout"; "self_gradient", a rollout whose gradient comes from one parallel pass (Self
    # Gradient Forcing); "noised_data" or "simulated", in one pass without a rollout (CausVid).
    videos: str = "rollout"
    clean_past: bool = False  # with "noised_data": blocks see the clean data before them rather than the noised
    cache_gradient: str = "constant"
    last_step_only: bool = False
    same_step_across_blocks: bool = True
    given_frames: int = 0  # real frames that every video continues; 1: image to video
    min_frames: int | None = None  # of a rollout, whose length is drawn in every step; None: the teacher's length
    max_frames: int | None = None  # None: as min_frames; beyond the teacher's length, the newest frames are scored
    gradient_frames: int | None = None  # only the newest get gradient; None: all that are scored
    stream_steps: int = 0  # training steps for which a rollout goes on, its cache kept; 0: each starts anew
    stream_frames: int | None = None  # that a stream goes on by at a time; None: the teacher's length

    generator: OptimizerConfig = field(default_factory=lambda: _constant_rate(1e-4))
    critic: OptimizerConfig = field(default_factory=lambda: _constant_rate(2e-4))

    def __post_init__(self) -> None:
        _check_positive(self, "steps", "batch_size", "accumulate", "generator_every")
        _check_choice("self_forcing.objective", self.objective, ("dmd", "sid", "gan"))
        _check_choice("self_forcing.videos", self.videos, ("rollout", "self_gradient", "noised_data", "simulated"))
        if self.clean_past and self.videos != "noised_data":
            raise ValueError(f"self_forcing.clean_past is True; accepted with videos = {self.videos!r}: False")
        _check_choice("self_forcing.cache_gradient", self.cache_gradient, ("constant", "exit_step", "full"))
        for name in ("min_frames", "max_frames", "gradient_frames", "stream_frames"):
            if getattr(self, name) is not None:
                _check_positive(self, name)


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
class ReproduceConfig:
    """What `python -m python_ref.reproduce` compares. Every method starts from the same causal model and trains for the
    same time."""

    methods: dict[str, list[str]] = field(default_factory=dict)  # name to overrides such as "stage=causal"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    seconds: float = 600.0  # of training, for each method and seed
    clock: str = "cpu"  # what they are measured in: "cpu", of the process, or "wall"
    workers: int = 2  # runs at a time
    teacher_steps: int = 0  # that a teacher of one's own is trained for; 0: self_forcing.teacher is there already
    start_steps: int = 300  # of teacher forcing, which the common start is trained for
    pairs: int = 512  # of the teacher's ODE, for ODE regression
    long_factor: int = 5  # videos are measured up to so many times the length of training
    sink_frames: int = 3  # where generation is compared with and without window and sink
    report: str = "docs/results.md"  # its pictures go to images/results/ beside it

    def __post_init__(self) -> None:
        _check_positive(self, "seconds", "workers", "start_steps", "pairs", "long_factor", "sink_frames")
        _check_choice("reproduce.clock", self.clock, ("cpu", "wall"))


@dataclass
class Config:
    """All settings of a run."""

    stage: str = "teacher"
    output: str = "outputs/run"
    seed: int = 0
    resume: bool = False
    backend: str = "ext"
    device: str = "cpu"  # or "cuda": each process has a GPU of its own
    threads: int = 2
    precision: str = "bf16"  # autocast of the networks; "fp32": none. Weights and optimizer are always float32
    checkpoint_activations: bool = False  # recompute each layer in backward rather than keep its activations
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    causal: CausalConfig = field(default_factory=CausalConfig)
    ode: OdeConfig = field(default_factory=OdeConfig)
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    self_forcing: SelfForcingConfig = field(default_factory=SelfForcingConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    reproduce: ReproduceConfig = field(default_factory=ReproduceConfig)

    def __post_init__(self) -> None:
        _check_choice("stage", self.stage, STAGES)
        _check_choice("backend", self.backend, ("ext", "reference"))
        _check_choice("device", self.device, ("cpu", "cuda"))
        _check_choice("precision", self.precision, ("bf16", "fp32"))
        if self.logging.drift_videos and self.data.source != "moving_digits":
            raise ValueError(
                f"logging.drift_videos is {self.logging.drift_videos}; accepted with data.source = "
                f"{self.data.source!r}: 0, since only moving digits can be measured"
            )
        _check_positive(self, "threads")

    @property
    def samples_continue_data(self) -> bool:
        """Whether samples start with frames of the data, so that they need its captions too."""
        return self.stage == "self_forcing" and self.self_forcing.given_frames > 0


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
            merged = OmegaConf.unsafe_merge(merged, layer)  # in place: copies cost seven times as much
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
