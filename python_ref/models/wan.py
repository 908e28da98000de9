"""Wan-style video diffusion transformers: bidirectional (teacher, critic) and block-causal (generator).

Parameter names are those of Wan2.1 checkpoints (arXiv 2503.20314), so that real checkpoints load strictly, and both
models have the same parameters, so that a causal model starts from a bidirectional one. Both predict flow = noise - x0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from python_ref.backend import load_backend
from python_ref.context_parallel import ContextParallel
from python_ref.models.wan_layers import Attend, Grid, Head, Positions, WanBlock, WanConfig, wide
from python_ref.precision import autocast_dtype, without_autocast
from selfforcing_ext.mask import BlockCausalMask

EncodedContext = Sequence[tuple[Tensor, Tensor]]  # per layer: keys and values [B, text_len, H, D]


class WanBackbone(nn.Module):
    """What the bidirectional and the causal model share: everything but who sees whom.

    Attributes:
        checkpoint_layers: recompute each layer in backward, as the argument of the same name does, in every call.
    """

    def __init__(self, config: WanConfig, backend: str = "ext") -> None:
        super().__init__()
        self.config = config
        self.ops = load_backend(backend)
        self.checkpoint_layers = False
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch_size, config.patch_size)
        if config.position_grid is not None:
            rows, columns = config.position_grid
            self.position_embedding = nn.Parameter(torch.zeros(rows * columns, dim))
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(WanBlock(config, self.ops) for _ in range(config.num_layers))
        self.head = Head(config, self.ops)
        self.parallel: ContextParallel | None = None
        self._initialise()

    def split_context(self, parallel: ContextParallel) -> None:
        """Spreads every later call over the processes of ``parallel``, each with a share of the tokens and, in
        self-attention and in caches, of the heads. All make the same calls, and get the whole flow.

        Raises:
            ValueError: the heads cannot be split evenly; in a call, the tokens of a frame.
        """
        parallel.check(self.config.num_heads)
        self.parallel = parallel
        for block in self.blocks:
            block.self_attn.parallel = parallel

    def whole_tokens(self, tokens: Tensor, frames: int) -> Tensor:
        """All tokens [B, L, ...] of the frames, from those that this process holds."""
        return tokens if self.parallel is None else self.parallel.all_tokens(tokens, frames)

    def encode_context(self, context: Tensor) -> EncodedContext:
        """Cross-attention keys and values of every layer, which several calls on the same caption can share.

        Args:
            context: text embeddings [B, text_len, text_dim].
        """
        return self._encode_context(context)

    def _encode_context(self, context: Tensor) -> EncodedContext:
        expected = [self.config.text_len, self.config.text_dim]
        if context.dim() != 3 or list(context.shape[1:]) != expected:
            raise ValueError(
                f"context has shape {list(context.shape)}, but must be [B, text_len, text_dim] = "
                f"[B, {expected[0]}, {expected[1]}]"
            )
        text = self.text_embedding(context)
        return [block.cross_attn.keys_and_values(text) for block in self.blocks]

    def _embed_patches(self, x: Tensor) -> Tensor:
        """Latents [B, F, C, H, W] to the tokens [B, L, dim] that this process holds; the convolution has stride =
        kernel, so it is one GEMM."""
        batch = x.shape[0]
        frames, rows, columns = self.config.grid(x.shape)
        patch_frames, patch_rows, patch_columns = self.config.patch_size
        patches = x.reshape(batch, frames, patch_frames, -1, rows, patch_rows, columns, patch_columns)
        patches = patches.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4).flatten(1, 3)
        weight = self.patch_embedding.weight
        tokens = functional.linear(patches.to(weight.dtype), weight.flatten(1), self.patch_embedding.bias)
        if autocast_dtype(x.device.type) is not None:
            tokens = wide(tokens)  # the residual stream stays in float32
        if self.config.position_grid is not None:
            tokens = (tokens.unflatten(1, (frames, -1)) + self.position_embedding).flatten(1, 2)
        return tokens if self.parallel is None else self.parallel.own_tokens(tokens, frames)

    def _unpatchify(self, patches: Tensor, grid: Grid) -> Tensor:
        """The tokens [B, L, patch volume * out_dim] that this process holds to latents [B, F, out_dim, H, W]."""
        frames, rows, columns = grid
        patches = self.whole_tokens(patches, frames)
        patch_frames, patch_rows, patch_columns = self.config.patch_size
        split = patches.reshape(-1, frames, rows, columns, patch_frames, patch_rows, patch_columns, self.config.out_dim)
        return split.permute(0, 1, 4, 7, 2, 5, 3, 6).reshape(
            -1, frames * patch_frames, self.config.out_dim, rows * patch_rows, columns * patch_columns
        )

    def _embed_time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps [B, F] to the head's embedding [B, F, dim] and the blocks' [B, F, 6, dim], in float32 even under
        autocast: bfloat16 cannot tell neighbouring timesteps apart."""
        with without_autocast(t.device.type):
            weight = self.time_embedding[0].weight
            half = self.config.freq_dim // 2
            frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=t.device) / half)
            angles = t.to(torch.float64).unsqueeze(-1) * frequencies
            time = self.time_embedding(torch.cat((angles.cos(), angles.sin()), dim=-1).to(weight.dtype))
            return time, self.time_projection(time).unflatten(-1, (6, -1))

    def _run_blocks(
        self,
        x: Tensor,
        time: Tensor,
        context: Tensor | EncodedContext,
        positions: Positions,
        attend: Callable[[int], Attend],
        checkpoint_layers: bool,
        after_layer: Callable[[int, Tensor, Tensor], None] | None = None,
        write_keys: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        encoded = self._encode_context(context) if isinstance(context, Tensor) else context
        for layer, block in enumerate(self.blocks):
            write = None if write_keys is None else partial(write_keys, layer)
            arguments = (x, time, encoded[layer], positions, attend(layer), write)
            if (checkpoint_layers or self.checkpoint_layers) and torch.is_grad_enabled():
                x, k, v = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x, k, v = block(*arguments)
            if after_layer is not None:
                after_layer(layer, k, v)
        return x

    def _initialise(self) -> None:
        """As Wan2.1: Xavier for projections, small normal embeddings, and a head that starts at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for embedding in (self.text_embedding, self.time_embedding):
            for module in embedding:
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)


class WanModel(WanBackbone):
    """The bidirectional model: every token sees every token, one timestep per video."""

    def forward(
        self,
        x: Tensor,  # [B, F, C, H, W]
        t: Tensor,  # [B]
        context: Tensor | EncodedContext,  # [B, text_len, text_dim]
        checkpoint_layers: bool = False,
    ) -> Tensor:
        """Flow prediction [B, F, out_dim, H, W].

        Args:
            x: noisy latents.
            t: timesteps in [0, 1000].
            context: text embeddings, or what ``encode_context`` made of them.
            checkpoint_layers: recompute each layer in backward instead of keeping its activations.
        """
        tokens, time = self._transform(x, t, context, checkpoint_layers)
        return self._unpatchify(self.head(tokens, time), self.config.grid(x.shape)).to(x.dtype)

    def features(
        self,
        x: Tensor,  # [B, F, C, H, W]
        t: Tensor,  # [B]
        context: Tensor | EncodedContext,  # [B, text_len, text_dim]
        layers: Sequence[int],
    ) -> tuple[list[Tensor], Tensor]:
        """What a discriminator reads: the tokens [B, L, dim] after each of ``layers``, and the embedded timestep
        [B, 1, dim]. Arguments as of ``forward``."""
        seen: dict[nn.Module, Tensor] = {}

        def keep(block: nn.Module, arguments: Any, output: tuple[Tensor, ...]) -> None:
            seen[block] = output[0]

        blocks = [self.blocks[layer] for layer in layers]
        with ExitStack() as hooks:
            for block in blocks:
                hooks.enter_context(block.register_forward_hook(keep))
            _, time = self._transform(x, t, context)
        frames = self.config.grid(x.shape)[0]
        return [self.whole_tokens(seen[block], frames) for block in blocks], time

    def _transform(
        self, x: Tensor, t: Tensor, context: Tensor | EncodedContext, checkpoint_layers: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Tokens [B, L, dim] after the last layer, and the embedded timestep [B, 1, dim]."""
        if t.dim() != 1:
            raise ValueError(
                f"t has shape {list(t.shape)}, but must be [B]: the bidirectional model has one timestep per video"
            )
        time, block_time = self._embed_time(t.unsqueeze(1))
        attention = self.ops.block_causal_attention
        tokens = self._run_blocks(
            self._embed_patches(x),
            block_time,
            context,
            Positions(self.config.grid(x.shape)),
            lambda layer: lambda q, k, v: attention(q, k, v, None),
            checkpoint_layers,
        )
        return tokens, time


class CausalWanModel(WanBackbone):
    """The block-causal model: masked on whole videos in training, with a cache block by block in a rollout."""

    def forward(
        self,
        x: Tensor,  # [B, F, C, H, W]
        t: Tensor,  # [B, F]
        context: Tensor | EncodedContext,  # [B, text_len, text_dim]
        mask: BlockCausalMask | None = None,
        clean_x: Tensor | None = None,  # [B, F, C, H, W]
        clean_t: Tensor | None = None,  # [B, F]
        cache: Any = None,
        commit: bool = False,
        checkpoint_layers: bool = False,
    ) -> Tensor:
        """Flow prediction [B, F, out_dim, H, W].

        Args:
            x: noisy latents of the whole video (with ``mask``) or of the next block (with ``cache``).
            t: a timestep in [0, 1000] per frame of tokens; F counts latent frames, so that t has F / patch_size[0].
            context: text embeddings, or what ``encode_context`` made of them.
            mask: who sees whom. With ``teacher_forcing`` the clean latents are given too.
            clean_x, clean_t: teacher forcing: the clean half and its timesteps (None: 0).
            cache: a ``PagedKVCache``; the block's position is its ``position``.
            commit: write this call's keys and values to the cache and make the block part of the past (the clean pass).
            checkpoint_layers: recompute each layer in backward instead of keeping its activations. With a cache that
                is written before backward, pass ``cache.view()``.
        """
        if (mask is None) == (cache is None):
            given = "neither is" if mask is None else "both are"
            raise ValueError(f"exactly one of mask and cache must be given, but {given}")
        if commit and cache is None:
            raise ValueError("commit is True, but there is no cache to commit to")
        teacher_forcing = mask is not None and mask.teacher_forcing
        if teacher_forcing != (clean_x is not None):
            raise ValueError(
                f"clean_x is {'missing' if teacher_forcing else 'given'}, but must be given exactly when "
                f"mask.teacher_forcing, which is {teacher_forcing}"
            )
        grid = self.config.grid(x.shape)
        if list(t.shape) != [x.shape[0], grid[0]]:
            raise ValueError(f"t has shape {list(t.shape)}, but must be [B, F] = {[x.shape[0], grid[0]]}")

        tokens = self._embed_patches(x)
        time, block_time = self._embed_time(t)
        positions = Positions(grid)
        if cache is not None:
            positions = Positions(grid, start_frame=None if cache.rope == "on_read" else cache.position)
        elif clean_x is not None:
            clean_t = torch.zeros_like(t) if clean_t is None else clean_t
            tokens = torch.cat((self._embed_patches(clean_x), tokens), dim=1)
            block_time = torch.cat((self._embed_time(clean_t)[1], block_time), dim=1)
            positions = Positions(grid, copies=2)

        tokens = self._run_blocks(
            tokens,
            block_time,
            context,
            positions,
            self._masked(mask) if cache is None else self._cached(cache),
            checkpoint_layers,
            after_layer=cache.write if commit and not self._writes_in_one_pass(cache) else None,
            write_keys=cache.norm_rope_write if commit and self._writes_in_one_pass(cache) else None,
        )
        if commit:
            cache.commit(grid[0])
        if teacher_forcing:
            tokens = tokens.chunk(2, dim=1)[1]
        return self._unpatchify(self.head(tokens, time), grid).to(x.dtype)

    def make_cache(
        self,
        latents: Sequence[int],
        max_frames: int | None,
        window_frames: int | None = None,
        sink_frames: int = 0,
        **options: Any,
    ) -> Any:
        """An empty ``PagedKVCache`` for videos of this model, in the autocast dtype under autocast.

        Args:
            latents: shape [B, F, C, H, W] of the latents that will be generated; F does not matter.
            max_frames, window_frames, sink_frames, options: as in ``PagedKVCache``; with rope="on_read" the grid of
                tokens need not be given.
        """
        weight = self.patch_embedding.weight
        _, rows, columns = self.config.grid(latents)
        if options.get("rope") == "on_read":
            options["rope_grid"] = (rows, columns)
        return self.ops.PagedKVCache(
            self.config.num_layers,
            self.config.num_heads // (self.parallel.size if self.parallel is not None else 1),
            self.config.head_dim,
            rows * columns,
            batch_size=latents[0],
            window_frames=window_frames,
            sink_frames=sink_frames,
            max_frames=max_frames,
            dtype=autocast_dtype(weight.device.type) or weight.dtype,
            device=weight.device,
            **options,
        )

    def _writes_in_one_pass(self, cache: Any) -> bool:
        """Whether keys are normalised, rotated and written at once: where layers are not run again in backward, and the
        cache can (one that also keeps what is written elsewhere cannot)."""
        whole = self.config.qk_norm and self.parallel is None
        return whole and not torch.is_grad_enabled() and hasattr(cache, "norm_rope_write")

    def _masked(self, mask: BlockCausalMask | None) -> Callable[[int], Attend]:
        attention = self.ops.block_causal_attention
        return lambda layer: lambda q, k, v: attention(q, k, v, mask)

    @staticmethod
    def _cached(cache: Any) -> Callable[[int], Attend]:
        return lambda layer: lambda q, k, v: cache.attend(layer, q, k, v)
