"""The self-forcing rollout: training simulates inference, with gradient through one step of each block.

Source: Self-Forcing (arXiv 2506.08009), section 3.2 and algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import nvtx
import torch
from torch import Tensor

from python_ref.models.wan import CausalWanModel, EncodedContext
from python_ref.noise import NoiseSource
from python_ref.pipelines.blocks import given_frames_of, plan_blocks
from python_ref.pipelines.inference import denoising_table
from python_ref.schedule import FlowMatchSchedule

CACHE_GRADIENTS = ("constant", "exit_step", "full")


@dataclass(frozen=True)
class Rollout:
    """What a rollout made.

    Attributes:
        video: [B, F_given + F, C, H, W], the given frames included. Gradient flows through the exit step of each block.
        exit_steps: for each generated block the index of the denoising step whose prediction is its result.
        timestep_from, timestep_to: uniform timesteps (before ``FlowMatchSchedule.warp``) of the exit step and of the
            step after it (0 after the last), between which the result lies in noise level; None unless all blocks
            exit at the same step.
        gradient_start: the first frame that has gradient; the number of frames if none has.
        exit_states: [B, F, C, H, W], what each generated block's exit step denoised.
        past: [B, F_given + F, C, H, W], what later blocks had in sight of each block: its frames with context noise.
    """

    video: Tensor
    exit_steps: tuple[int, ...]
    timestep_from: int | None
    timestep_to: int | None
    gradient_start: int
    exit_states: Tensor
    past: Tensor


class SelfForcingTrainingPipeline:
    """Generates videos as inference does, and keeps the gradient of each block's last (exit) step.

    Args:
        generator: predicts flow, see ``CausalWanModel``.
        schedule: gives the sigmas of the timesteps.
        denoising_steps: falling timesteps in [0, 1000], as the generator sees them (see ``FlowMatchSchedule.warp``).
        frames_per_block: frames that are denoised together.
        first_frame_alone: frame 0 is a block of its own.
        same_step_across_blocks: all blocks exit at the same random step, otherwise each at its own.
        last_step_only: blocks exit at the last step.
        context_noise: noise level, as a timestep, of a finished block when its keys and values are cached. The nearest
            entry of the schedule's table counts, so that 0 means the least noise, not none.
        gradient_frames: only blocks within the newest ``gradient_frames`` frames get gradient.
        window_frames, sink_frames: how much of the past stays visible, see ``BlockCausalMask``.
        checkpoint_activations: recompute each layer of an exit step in backward instead of keeping its activations.
        cache_gradient: what cached keys and values are to autograd. "constant": constants, as the paper describes.
            "exit_step": values of the clean pass, gradient to the keys and values of that block's exit step, as the
            published code computes it. "full": the clean pass is differentiated too, down to its input: exact
            backpropagation through time.
        cache_options: further options of ``PagedKVCache``, such as ``rope`` or ``quantization``.

    Raises:
        ValueError: an unknown ``cache_gradient``, or denoising steps that do not fall.
    """

    def __init__(
        self,
        generator: CausalWanModel,
        schedule: FlowMatchSchedule,
        denoising_steps: Sequence[float] | Tensor,
        frames_per_block: int = 3,
        first_frame_alone: bool = False,
        same_step_across_blocks: bool = True,
        last_step_only: bool = False,
        context_noise: float = 0,
        gradient_frames: int = 21,
        window_frames: int | None = None,
        sink_frames: int = 0,
        checkpoint_activations: bool = False,
        cache_gradient: str = "constant",
        cache_options: Mapping[str, Any] | None = None,
    ) -> None:
        if cache_gradient not in CACHE_GRADIENTS:
            raise ValueError(f"cache_gradient is {cache_gradient!r}, but must be one of {CACHE_GRADIENTS}")
        self.generator = generator
        self.schedule = schedule
        self.timesteps, self.sigmas = denoising_table(schedule, denoising_steps)
        self.frames_per_block = frames_per_block
        self.first_frame_alone = first_frame_alone
        self.same_step_across_blocks = same_step_across_blocks
        self.last_step_only = last_step_only
        self.context_noise = context_noise
        self.gradient_frames = gradient_frames
        self.window_frames = window_frames
        self.sink_frames = sink_frames
        self.checkpoint_activations = checkpoint_activations
        self.cache_gradient = cache_gradient
        self.cache_options = dict(cache_options or {})

    def rollout(
        self,
        noise: Tensor,  # [B, F, C, H, W]
        context: Tensor,  # [B, text_len, text_dim]
        source: NoiseSource,
        initial_latents: Tensor | None = None,  # [B, F_given, C, H, W]
        cache: Any = None,
    ) -> Rollout:
        """Generates videos from noise. Call it under ``torch.no_grad()`` for videos that need no gradient.

        Args:
            noise: where the blocks start; its frames are the frames to generate.
            context: text embeddings.
            source: draws the exit steps (one integer per block, whether used or not), then for each block the noise
                between its denoising steps and the context noise.
            initial_latents: clean frames that the video continues, an image for instance.
            cache: of the blocks before the first, which the rollout continues. It takes all new blocks, the last one
                too, so that another rollout can go on from there. None: one of the rollout's own.

        Raises:
            ValueError: frames that do not fill blocks, shapes that do not fit each other, or given frames after cached
                ones.
        """
        continues = cache is not None
        start = cache.num_frames if continues else 0
        if start and initial_latents is not None:
            raise ValueError(f"initial_latents are given, but the cache holds {start} frames already")
        plan = plan_blocks(
            noise.shape[1],
            self.frames_per_block,
            self.first_frame_alone and start == 0,
            given_frames_of(initial_latents, noise),
        )
        exit_steps = self._draw_exit_steps(len(plan.generated), source, noise.device)
        if not continues:
            cache = self.make_cache(noise.shape, plan.num_frames)
        encoded = self.generator.encode_context(context)

        blocks, past, exit_states = [], [], []
        gradient_start = plan.num_frames
        if initial_latents is not None:
            with torch.no_grad(), nvtx.annotate("selfforcing.given_frames"):
                for frames in initial_latents.to(noise.dtype).split(plan.given, dim=1):
                    self.generator(frames, frames.new_zeros(frames.shape[:2]), encoded, cache=cache, commit=True)
                    blocks.append(frames)
                    past.append(frames)
        for index, x_t in enumerate(noise.split(plan.generated, dim=1)):
            frame = sum(block.shape[1] for block in blocks)
            wants_gradient = torch.is_grad_enabled() and frame >= plan.num_frames - self.gradient_frames
            gradient_start = min(gradient_start, frame) if wants_gradient else gradient_start
            x_t = self._denoise_until(exit_steps[index], x_t, encoded, cache, source)
            with torch.set_grad_enabled(wants_gradient), nvtx.annotate("selfforcing.exit_step"):
                keeps_block = self.cache_gradient == "exit_step"
                access = _CacheAccess(cache, keeps_block) if wants_gradient else cache
                x0 = self._predict_x0(exit_steps[index], x_t, encoded, access)
            blocks.append(x0)
            exit_states.append(x_t)
            with torch.set_grad_enabled(wants_gradient and self.cache_gradient == "full"):
                clean = self._add_context_noise(x0, source)
                if continues or index + 1 < len(plan.generated):
                    self._write_clean_block(clean, encoded, cache, access)
            past.append(clean.detach())
        return Rollout(
            torch.cat(blocks, dim=1),
            exit_steps,
            *self._noise_levels(exit_steps),
            gradient_start,
            torch.cat(exit_states, dim=1),
            torch.cat(past, dim=1),
        )

    def make_cache(self, latents: Sequence[int], max_frames: int | None) -> Any:
        """An empty cache for videos of shape [B, F, C, H, W] of up to ``max_frames`` frames."""
        options = self.cache_options | ({} if self.cache_gradient == "constant" else {"grad_through_cache": True})
        return self.generator.make_cache(latents, max_frames, self.window_frames, self.sink_frames, **options)

    def _draw_exit_steps(self, num_blocks: int, source: NoiseSource, device: torch.device) -> tuple[int, ...]:
        drawn = source.randint(0, len(self.timesteps), (num_blocks,), device).tolist()
        if self.last_step_only:
            return (len(self.timesteps) - 1,) * num_blocks
        return (drawn[0],) * num_blocks if self.same_step_across_blocks else tuple(drawn)

    @torch.no_grad()
    def _denoise_until(
        self, exit_step: int, x_t: Tensor, encoded: EncodedContext, cache: Any, source: NoiseSource
    ) -> Tensor:
        """The input of a block's exit step."""
        with nvtx.annotate("selfforcing.denoise_block"):
            for step in range(exit_step):
                flow = self.generator(x_t, self._per_frame(self.timesteps, step, x_t), encoded, cache=cache)
                fresh = source.randn(x_t.shape, x_t.dtype, x_t.device)
                _, x_t = self.generator.ops.denoise_step(
                    flow,
                    x_t,
                    self._per_frame(self.sigmas, step, x_t),
                    self._per_frame(self.sigmas, step + 1, x_t),
                    fresh,
                )
        return x_t

    def _predict_x0(self, step: int, x_t: Tensor, encoded: EncodedContext, cache: Any) -> Tensor:
        flow = self.generator(
            x_t,
            self._per_frame(self.timesteps, step, x_t),
            encoded,
            cache=cache,
            checkpoint_layers=self.checkpoint_activations,
        )
        return self.generator.ops.denoise_step(flow, x_t, self._per_frame(self.sigmas, step, x_t))[0]

    def _add_context_noise(self, x0: Tensor, source: NoiseSource) -> Tensor:
        sigma = self.schedule.sigma_at(self._context_t(x0))
        return self.generator.ops.add_noise(x0, source.randn(x0.shape, x0.dtype, x0.device), sigma)

    def _context_t(self, x0: Tensor) -> Tensor:  # [B, F]
        return x0.new_full(x0.shape[:2], self.context_noise, dtype=torch.float32)

    def _write_clean_block(self, clean: Tensor, encoded: EncodedContext, cache: Any, exit_access: Any) -> None:
        """Runs a finished block through the generator once more, to cache its keys and values."""
        access = cache
        if isinstance(exit_access, _CacheAccess) and exit_access.keeps_block:
            access = _CacheAccess(cache, grad_to=exit_access.block)
        elif torch.is_grad_enabled():
            access = _CacheAccess(cache)
        with nvtx.annotate("selfforcing.clean_pass"):
            self.generator(
                clean,
                self._context_t(clean),
                encoded,
                cache=access,
                commit=True,
                checkpoint_layers=self.checkpoint_activations,
            )

    def _noise_levels(self, exit_steps: tuple[int, ...]) -> tuple[int | None, int | None]:
        if not (self.same_step_across_blocks or self.last_step_only):
            return None, None
        step = exit_steps[0]
        is_last = step + 1 == len(self.timesteps)
        timestep_to = 0 if is_last else self.schedule.unwarp(self.timesteps[step + 1])
        return self.schedule.unwarp(self.timesteps[step]), timestep_to

    @staticmethod
    def _per_frame(table: Tensor, step: int, x_t: Tensor) -> Tensor:  # [B, F]
        return torch.full(x_t.shape[:2], float(table[step]), device=x_t.device)


class _CacheAccess:
    """One differentiated call's access to a cache: it reads what was there when the call began, also when a
    checkpointed layer is recomputed in backward.

    Args:
        cache: what is read and written.
        keeps_block: keep the call's own keys and values in ``block``, by layer.
        grad_to: keys and values by layer that get the gradient of what is written.
    """

    def __init__(
        self, cache: Any, keeps_block: bool = False, grad_to: dict[int, tuple[Tensor, Tensor]] | None = None
    ) -> None:
        self.cache = cache
        self.past = cache.view()
        self.position, self.rope = self.past.position, cache.rope
        self.keeps_block = keeps_block
        self.grad_to = grad_to
        self.block: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.keeps_block:
            self.block.setdefault(layer, (k, v))  # not those of a recomputation, whose graph is another
        return self.past.attend(layer, q, k, v)

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        self.cache.write(layer, k, v, grad_to=self.grad_to[layer] if self.grad_to else None)

    def commit(self, num_frames: int) -> None:
        self.cache.commit(num_frames)
