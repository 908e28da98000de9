"""Videos of the model's own for distribution matching: how a training step makes what its losses score."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from python_ref.batch_share import BatchShare
from python_ref.config import Config, RolloutConfig
from python_ref.models.captioned import CaptionedModel
from python_ref.noise import NoiseSource
from python_ref.objectives.causvid import CausVid
from python_ref.pipelines.self_gradient import SelfGradientPipeline
from python_ref.pipelines.training import Rollout, SelfForcingTrainingPipeline
from python_ref.randomness import derived_generator
from python_ref.stages.stream import KeptCache


@dataclass(frozen=True)
class Batch:
    """What a training step starts from. All but `step` may differ between processes."""

    step: int  # of training
    load_videos: Callable[[], Tensor]
    context: Tensor  # [B, text_len, text_dim], of the captions
    uncond: Tensor  # the same of the empty caption
    source: NoiseSource

    @cached_property
    def real(self) -> Tensor:
        """Videos of the data [B, F, C, H, W], loaded only if asked for."""
        return self.load_videos()


@dataclass(frozen=True)
class Clip:
    """What the losses score: at most as long as the teacher's videos."""

    video: Tensor  # [B, F, C, H, W]
    gradient_mask: Tensor | None = None  # bool like video: which frames have gradient; None: all
    timestep_from: int | None = None  # as a Rollout has them
    timestep_to: int | None = None


class ClipMaker(Protocol):
    """Called once for each update of the generator (with gradient) and of the critic (without)."""

    modules: Mapping[str, nn.Module]  # state that a checkpoint must hold

    def batch_number(self, step: int, part: int) -> int:
        """Which batch of the data accumulation part `part` of training step `step` takes."""

    def __call__(self, batch: Batch) -> Clip: ...


def make_clips(config: Config, network: CaptionedModel, share: BatchShare) -> ClipMaker:
    """The maker that `config.self_forcing.videos` and `stream_steps` name, for this process's part of every batch."""
    settings = config.self_forcing
    if settings.videos in ("noised_data", "simulated"):
        return OnePassClips(config, network)
    if settings.stream_steps:
        return StreamClips(config, network, share)
    return RolloutClips(config, network)


class RolloutClips:
    """Rollouts as at inference, of a length drawn anew in every step; the newest frames are scored.

    Raises:
        ValueError: lengths that blocks do not fill or that the given frames exceed, or, with videos = "self_gradient",
            a cache that changes keys and values.
    """

    def __init__(self, config: Config, network: CaptionedModel) -> None:
        self.settings, self.network, self.seed = config.self_forcing, network, config.seed
        self.clip_frames = network.settings["num_frames"]
        self.modules: dict[str, nn.Module] = {}
        settings, schedule = self.settings, network.schedule()
        gradient_frames = min(settings.gradient_frames or self.clip_frames, self.clip_frames)
        if gradient_frames < config.rollout.frames_per_block:
            raise ValueError(
                f"gradient_frames is {gradient_frames}; accepted: frames_per_block = "
                f"{config.rollout.frames_per_block} or more, as blocks have gradient as a whole"
            )
        pipeline = SelfForcingTrainingPipeline(
            network.model,
            schedule,
            schedule.warp(config.rollout.denoising_steps),
            **config.rollout.blocks(),
            same_step_across_blocks=settings.same_step_across_blocks,
            last_step_only=settings.last_step_only,
            context_noise=config.rollout.context_noise,
            gradient_frames=gradient_frames,
            checkpoint_activations=config.checkpoint_activations,
            cache_gradient=settings.cache_gradient,
            cache_options=config.rollout.cache_options(),
        )
        self.pipeline: Any = pipeline
        if settings.videos == "self_gradient":
            _check_plain_cache(config)
            self.pipeline = SelfGradientPipeline(pipeline)
        self.lengths = self._lengths(config)

    def _lengths(self, config: Config) -> range:
        """Frames of whole rollouts, given frames included."""
        given, rollout = self.settings.given_frames, config.rollout
        usual = rollout.frames_within(self.clip_frames, given)
        shortest = self.settings.min_frames or min(usual, self.settings.max_frames or usual)
        longest = self.settings.max_frames or max(usual, shortest)
        if not 0 <= given < shortest <= longest:
            raise ValueError(
                f"given_frames is {given}, min_frames {shortest} and max_frames {longest}; accepted: rising, and 0 or "
                "more given frames"
            )
        for name, frames in (("min_frames", shortest), ("max_frames", longest)):
            if frames != rollout.frames_within(frames, given):
                raise ValueError(
                    f"{name} is {frames}; accepted: {given or int(rollout.first_frame_alone)} and a multiple of "
                    f"frames_per_block = {rollout.frames_per_block}"
                )
        return range(shortest, longest + 1, rollout.frames_per_block)

    def batch_number(self, step: int, part: int) -> int:
        return step * self.settings.accumulate + part

    def __call__(self, batch: Batch) -> Clip:
        given = self.settings.given_frames
        frames = self._length(batch.step) - given
        noise = draw_noise(self.network, batch, frames)
        rollout = self.pipeline.rollout(noise, batch.context, batch.source, batch.real[:, :given] if given else None)
        return self._newest(rollout.video, rollout)

    def _length(self, step: int) -> int:
        """Derived from the step, so that all processes draw the same."""
        generator = derived_generator(self.seed, "rollout length", step)
        return self.lengths[int(torch.randint(0, len(self.lengths), (1,), generator=generator))]

    def _newest(self, video: Tensor, rollout: Rollout) -> Clip:
        """The newest frames of a video that ends with the rollout's."""
        constant = video.shape[1] - rollout.video.shape[1] + rollout.gradient_start
        has_gradient = torch.arange(video.shape[1], device=video.device) >= constant
        clip, has_gradient = video[:, -self.clip_frames :], has_gradient[-self.clip_frames :]
        mask = None
        if clip.requires_grad and not bool(has_gradient.all()):
            mask = has_gradient[:, None, None, None].expand_as(clip)
        return Clip(clip, mask, rollout.timestep_from, rollout.timestep_to)


class StreamClips(RolloutClips):
    """Rollouts that go on from one training step to the next, the cache kept (streaming long tuning): every call adds
    `stream_frames` frames to the same videos until `stream_steps` steps are over and new videos begin.

    What is scored are the newest frames up to the teacher's length; those of earlier calls are constant.

    Raises:
        ValueError: options that streams do not have.
    """

    def __init__(self, config: Config, network: CaptionedModel, share: BatchShare) -> None:
        settings = config.self_forcing
        for name, accepted in (
            ("videos", "rollout"), ("accumulate", 1), ("given_frames", 0), ("min_frames", None), ("max_frames", None),
            ("cache_gradient", "constant"),
        ):  # fmt: skip
            if getattr(settings, name) != accepted:
                raise ValueError(f"{name} is {getattr(settings, name)!r}; accepted with stream_steps: {accepted!r}")
        if config.distributed.context_parallel != 1:
            raise ValueError(
                f"distributed.context_parallel is {config.distributed.context_parallel}; accepted with stream_steps: 1"
            )
        if config.rollout.window_frames is None:
            raise ValueError("rollout.window_frames is None; accepted with stream_steps: a window, as streams are long")
        super().__init__(config, network)
        rollout = config.rollout
        self.frames = settings.stream_frames or self.clip_frames
        if self.frames % rollout.frames_per_block or rollout.first_frame_alone:
            raise ValueError(
                f"stream_frames is {self.frames} and first_frame_alone is {rollout.first_frame_alone}; accepted: a "
                f"multiple of frames_per_block = {rollout.frames_per_block}, and False"
            )
        shape = network.latent_shape(share.place(0, settings.batch_size)[1])
        self.kept = KeptCache(
            lambda: self.pipeline.make_cache(shape, None), network.model.config, shape, rollout, config.precision
        )
        self.modules = {"stream": self.kept}

    def batch_number(self, step: int, part: int) -> int:
        return step // self.settings.stream_steps

    def __call__(self, batch: Batch) -> Clip:
        self.kept.go_on_with(batch.step // self.settings.stream_steps)
        noise = draw_noise(self.network, batch, self.frames)
        earlier = self.kept.newest_frames()
        rollout = self.pipeline.rollout(noise, batch.context, batch.source, cache=self.kept)
        video = torch.cat((earlier, rollout.video), dim=1)
        self.kept.keep_newest(video)
        return self._newest(video, rollout)


class OnePassClips:
    """CausVid: no rollout, all blocks at once from noised data or from simulated states."""

    def __init__(self, config: Config, network: CaptionedModel) -> None:
        schedule = network.schedule()
        self.settings, self.network = config.self_forcing, network
        self.modules: dict[str, nn.Module] = {}
        self.causvid = CausVid(
            network.model,
            schedule,
            schedule.warp(config.rollout.denoising_steps),
            **config.rollout.blocks(),
            teacher_forcing=self.settings.clean_past,
        )

    def batch_number(self, step: int, part: int) -> int:
        return step * self.settings.accumulate + part

    def __call__(self, batch: Batch) -> Clip:
        if self.settings.videos == "noised_data":
            states = self.causvid.noise_data(batch.real, batch.source)
        else:
            noise = draw_noise(self.network, batch, self.network.settings["num_frames"])
            states = self.causvid.simulate(noise, batch.context, batch.source)
        clean = batch.real if self.settings.clean_past else None
        return Clip(self.causvid.generate(states, batch.context, batch.source, clean))


def _check_plain_cache(config: Config) -> None:
    """A parallel pass has the values of a rollout only if the cache holds what the pass computes."""
    plain = RolloutConfig()
    for name in config.rollout.cache_options():
        value, accepted = getattr(config.rollout, name), getattr(plain, name)
        if value != accepted:
            raise ValueError(f"rollout.{name} is {value!r}; accepted with videos = 'self_gradient': {accepted!r}")


def draw_noise(network: CaptionedModel, batch: Batch, frames: int) -> Tensor:
    shape = network.latent_shape(len(batch.context), frames)
    return batch.source.randn(shape, torch.float32, batch.context.device)
