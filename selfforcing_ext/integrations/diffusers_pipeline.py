"""Videos block by block, with the transformer, VAE, text encoder and scheduler of a diffusers Wan pipeline.

Source: Self-Forcing (arXiv 2506.08009), algorithm 2, with the rolling cache of its section 3.4.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import nvtx
import torch
from torch import Tensor

try:
    from diffusers import (
        AutoencoderKLWan,
        DiffusionPipeline,
        FlowMatchEulerDiscreteScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )
    from diffusers.loaders import WanLoraLoaderMixin
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify
    from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
    from diffusers.utils.torch_utils import get_module_execution_device, randn_tensor
    from diffusers.video_processor import VideoProcessor
    from transformers import AutoTokenizer, UMT5EncoderModel
except ImportError as error:
    raise ImportError(
        f"{__name__} needs diffusers and transformers ({error}); run `pip install diffusers transformers`"
    ) from error

from selfforcing_ext.denoise import denoise_step
from selfforcing_ext.integrations.diffusers import accelerate, forward_with_cache, is_accelerated, make_kv_cache
from selfforcing_ext.mask import check_window

OUTPUT_TYPES = ("np", "pt", "pil", "latent")
Generator = torch.Generator | list[torch.Generator]


class SelfForcingWanPipeline(DiffusionPipeline, WanLoraLoaderMixin):
    """Text to video, a block of frames at a time, for as long as wanted.

    Each block is denoised in a few steps, with fresh noise between them, while it attends to the cached blocks before
    it; a pass over the clean block then writes it to the cache. A ``DiffusionPipeline``: ``from_pretrained``,
    ``save_pretrained`` (which keeps the settings below), ``to``, LoRA and progress bar work as usual, and prompts are
    encoded as ``WanPipeline`` does.

    Args:
        tokenizer, text_encoder, vae, transformer: the components of a text-to-video ``WanPipeline``. The transformer is
            accelerated when the first video is generated; weights should come from block-causal training. The first
            two may be None where prompts come encoded.
        scheduler: a ``FlowMatchEulerDiscreteScheduler``; its shift is applied to the denoising steps.
        denoising_steps: falling timesteps in (0, num_train_timesteps], before the shift. None: 1000, 750, 500, 250.
        frames_per_block: frames of latents that are denoised together.
        window_frames, sink_frames: frames of latents that stay visible, see ``BlockCausalMask``. With a window, memory
            and time per block do not grow with the length of the video.
        context_noise: timestep that the clean pass of a finished block is given.

    Raises:
        TypeError: a scheduler of another kind.
        ValueError: a transformer that takes more than noisy latents, steps that do not fall, blocks without frames, or
            a window that does not hold the sink and a block.
    """

    model_cpu_offload_seq = "text_encoder"
    # These two take turns at every block, so that moving them would cost more than it saves.
    _exclude_from_cpu_offload: ClassVar[list[str]] = ["transformer", "vae"]
    _optional_components: ClassVar[list[str]] = ["tokenizer", "text_encoder"]

    encode_prompt = WanPipeline.encode_prompt
    _get_t5_prompt_embeds = WanPipeline._get_t5_prompt_embeds  # which it calls

    def __init__(
        self,
        tokenizer: AutoTokenizer | None,
        text_encoder: UMT5EncoderModel | None,
        vae: AutoencoderKLWan,
        scheduler: FlowMatchEulerDiscreteScheduler,
        transformer: WanTransformer3DModel,
        denoising_steps: list[int] | None = None,
        frames_per_block: int = 3,
        window_frames: int | None = None,
        sink_frames: int = 0,
        context_noise: float = 0.0,
    ) -> None:
        super().__init__()
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            raise TypeError(
                f"scheduler is a {type(scheduler).__name__}, but must be a FlowMatchEulerDiscreteScheduler; pass "
                "scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0), say"
            )
        if transformer.config.in_channels != transformer.config.out_channels:
            raise ValueError(
                f"transformer has {transformer.config.in_channels} input and {transformer.config.out_channels} output "
                "channels, but must have as many of both: one that turns noise and text into a video"
            )
        steps = [1000, 750, 500, 250] if denoising_steps is None else list(denoising_steps)
        first, falls = scheduler.config.num_train_timesteps, all(a > b for a, b in itertools.pairwise([*steps, 0]))
        if not steps or steps[0] > first or not falls:
            raise ValueError(f"denoising_steps is {steps}, but must be one or more falling timesteps in (0, {first}]")
        if frames_per_block < 1:
            raise ValueError(f"frames_per_block is {frames_per_block}, but must be at least 1")
        check_window(window_frames, sink_frames, frames_per_block)
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, scheduler=scheduler, transformer=transformer
        )
        self.register_to_config(
            denoising_steps=steps,
            frames_per_block=frames_per_block,
            window_frames=window_frames,
            sink_frames=sink_frames,
            context_noise=float(context_noise),
        )
        self.vae_scale_factor_temporal = vae.config.scale_factor_temporal
        self.vae_scale_factor_spatial = vae.config.scale_factor_spatial
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        generator: Generator | None = None,
        prompt_embeds: Tensor | None = None,
        output_type: str = "np",
        max_sequence_length: int = 512,
        return_dict: bool = True,
    ) -> WanPipelineOutput | tuple[Any]:
        """A whole video. Arguments as in ``stream``; result as of ``WanPipeline``: frames [B, num_frames, ...]."""
        blocks = list(
            self.stream(prompt, height, width, num_frames, generator, prompt_embeds, output_type, max_sequence_length)
        )
        frames: Any
        if output_type == "pil":
            frames = [list(itertools.chain(*pieces)) for pieces in zip(*blocks, strict=True)]
        elif output_type == "np":
            frames = np.concatenate(blocks, axis=1)
        else:
            frames = torch.cat(blocks, dim=2 if output_type == "latent" else 1)
        return WanPipelineOutput(frames=frames) if return_dict else (frames,)

    @torch.no_grad()
    def stream(
        self,
        prompt: str | list[str] | None = None,
        height: int = 480,
        width: int = 832,
        num_frames: int | None = None,
        generator: Generator | None = None,
        prompt_embeds: Tensor | None = None,
        output_type: str = "np",
        max_sequence_length: int = 512,
    ) -> Iterator[Any]:
        """Yields each block's frames as soon as they are decoded.

        Args:
            prompt: what to show; a list for as many videos at once.
            height, width: of a frame in pixels, multiples of the VAE's and the transformer's patches (16 for Wan2.1).
            num_frames: frames of the video; their latents fill blocks. None: no end; stop when you have enough.
            generator: for the same video again; a list for one per video.
            prompt_embeds: encoded prompts [B, text_len, text_dim] instead of ``prompt``.
            output_type: "np" for arrays [B, frames, height, width, 3] in [0, 1], "pt" for tensors
                [B, frames, 3, height, width], "pil" for a list of images per video, "latent" for latents
                [B, C, frames, rows, columns] that are not decoded.
            max_sequence_length: tokens that prompts are padded or cut to.

        Raises:
            ValueError: sizes or numbers that do not fit, prompts missing or given twice, an unknown output type, or a
                VAE that decodes in tiles.
        """
        if (prompt is None) == (prompt_embeds is None):
            given = "neither is" if prompt is None else "both are"
            raise ValueError(f"exactly one of prompt and prompt_embeds must be given, but {given}")
        _, patch_rows, patch_columns = self.transformer.config.patch_size
        for name, pixels, patch in (("height", height, patch_rows), ("width", width, patch_columns)):
            multiple = self.vae_scale_factor_spatial * patch
            if pixels < 1 or pixels % multiple:
                raise ValueError(f"{name} is {pixels}, but must be a positive multiple of {multiple}")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}, but must be one of {OUTPUT_TYPES}")
        latent_frames = None if num_frames is None else self._latent_frames(num_frames)
        decoder = None if output_type == "latent" else StreamingDecoder(self.vae)
        prompt_embeds, _ = self.encode_prompt(
            prompt,
            do_classifier_free_guidance=False,
            prompt_embeds=prompt_embeds,
            max_sequence_length=max_sequence_length,
        )
        self.maybe_free_model_hooks()  # the text encoder is not needed any more
        batch_size = prompt_embeds.shape[0]
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"generator is a list of {len(generator)}, but must have one for each of {batch_size} videos"
            )
        latents = self._generate(prompt_embeds, height, width, latent_frames, generator)
        if decoder is None:
            return latents
        return (self.video_processor.postprocess_video(decoder(x0), output_type=output_type) for x0 in latents)

    @torch.no_grad()
    def _generate(
        self,
        prompt_embeds: Tensor,  # [B, text_len, text_dim]
        height: int,
        width: int,
        latent_frames: int | None,
        generator: Generator | None,
    ) -> Iterator[Tensor]:
        """Yields the clean latents [B, C, frames_per_block, rows, columns] of each block."""
        transformer, settings = self.transformer, self.config
        device = get_module_execution_device(transformer)
        if not is_accelerated(transformer):
            accelerate(transformer)
        batch_size, block_frames = prompt_embeds.shape[0], settings.frames_per_block
        rows, columns = height // self.vae_scale_factor_spatial, width // self.vae_scale_factor_spatial
        shape = (batch_size, transformer.config.in_channels, block_frames, rows, columns)
        cache = make_kv_cache(
            transformer, shape, settings.window_frames, settings.sink_frames, latent_frames, device=device
        )
        prompt_embeds = prompt_embeds.to(device, transformer.dtype)

        def predict_flow(latents: Tensor, timestep: Tensor, commit: bool = False) -> Tensor:
            latents, timestep = latents.to(transformer.dtype), timestep.expand(batch_size)
            return forward_with_cache(transformer, cache, latents, timestep, prompt_embeds, commit)

        timesteps, sigmas = self._denoising_table(device)
        clean_timestep = torch.tensor(settings.context_noise, device=device)
        num_blocks = None if latent_frames is None else latent_frames // block_frames
        for block in self.progress_bar(itertools.count() if num_blocks is None else range(num_blocks)):
            latents = randn_tensor(shape, generator, device, torch.float32)
            with nvtx.annotate("denoise_block", domain="selfforcing"):
                for timestep, levels in zip(timesteps, itertools.pairwise(sigmas), strict=True):
                    flow = predict_flow(latents, timestep)
                    # The last level is 0: what is left then is the clean latents.
                    noise = randn_tensor(shape, generator, device, torch.float32)
                    latents = _renoise(flow, latents, noise, *levels)
            yield latents
            if block + 1 != num_blocks:
                with nvtx.annotate("clean_pass", domain="selfforcing"):
                    predict_flow(latents, clean_timestep, commit=True)

    def _denoising_table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Timesteps [steps] and noise levels [steps + 1], the last of them 0, after the scheduler's shift."""
        num_timesteps = self.scheduler.config.num_train_timesteps
        unshifted = [step / num_timesteps for step in self.config.denoising_steps]
        self.scheduler.set_timesteps(sigmas=unshifted, device=device)
        return self.scheduler.timesteps, self.scheduler.sigmas

    def _latent_frames(self, num_frames: int) -> int:
        """Frames of latents of a video of ``num_frames`` frames: the first latent is one frame, the others several."""
        scale, block = self.vae_scale_factor_temporal, self.config.frames_per_block
        blocks, rest = divmod(num_frames - 1 + scale, scale * block)
        if rest or blocks < 1:
            least = max(1, blocks)
            nearest = [count * scale * block - scale + 1 for count in (least, least + 1)]
            raise ValueError(
                f"num_frames is {num_frames}, but must fill blocks of {block} frames of latents: {nearest[0]} or "
                f"{nearest[1]}, for example"
            )
        latent_frames: int = blocks * block
        return latent_frames


class StreamingDecoder:
    """Decodes a video's latents in pieces, with the numbers of ``vae.decode`` on the whole.

    The VAE's decoder is causal in time; what it has to know of the frames before stands in its feature caches, which
    ``vae.decode`` clears at its end and this object keeps. So other videos can be decoded in between.

    Args:
        vae: the VAE of a Wan pipeline.

    Raises:
        ValueError: the VAE is set to decode in tiles, which have caches of their own.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        if vae.use_tiling:
            raise ValueError("vae decodes in tiles, but streams are decoded whole; call vae.disable_tiling()")
        self.vae = vae
        self._features: list[Any] = [None] * sum(isinstance(layer, WanCausalConv3d) for layer in vae.decoder.modules())
        self._started = False

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """The next frames [B, 3, frames, height, width] in [-1, 1], from latents [B, C, F, rows, columns] as the
        transformer sees them (normalised). The first latent of a video is one frame, the others several."""
        vae, config = self.vae, self.vae.config
        latents = latents.to(get_module_execution_device(vae), vae.dtype)
        mean, std = (
            latents.new_tensor(values).view(-1, 1, 1, 1) for values in (config.latents_mean, config.latents_std)
        )
        pieces = []
        for latent in vae.post_quant_conv(latents * std + mean).split(1, dim=2):
            pieces.append(vae.decoder(latent, feat_cache=self._features, feat_idx=[0], first_chunk=not self._started))
            self._started = True
        frames = torch.cat(pieces, dim=2)
        if config.patch_size is not None:
            frames = unpatchify(frames, config.patch_size)
        return frames.clamp(-1, 1)


def _renoise(flow: Tensor, latents: Tensor, noise: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Latents [B, C, F, rows, columns] at the next noise level, from the flow at this one and fresh noise."""
    flow, latents, noise = (tensor.transpose(1, 2) for tensor in (flow, latents, noise))  # frames first
    frames = latents.shape[:2]
    _, noised = denoise_step(flow, latents, sigma.expand(frames), sigma_next.expand(frames), noise)
    assert noised is not None
    return noised.transpose(1, 2)
