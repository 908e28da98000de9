"""Wan-style video diffusion transformers: bidirectional (teacher, critic) and block-causal (generator).

Parameter names are those of Wan2.1 checkpoints (arXiv 2503.20314), so that real checkpoints load strictly, and both
models have the same parameters, so that a causal model starts from a bidirectional one. Both predict flow = noise - x0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from python_ref.backend import load_backend
from selfforcing_ext.mask import BlockCausalMask

Grid = tuple[int, int, int]  # tokens along (frames, rows, columns)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
EncodedContext = Sequence[tuple[Tensor, Tensor]]  # per layer: keys and values [B, text_len, H, D]


@dataclass(frozen=True)
class WanConfig:
    """Sizes of a model; names and meaning as in Wan2.1."""

    dim: int = 1536
    num_heads: int = 12
    num_layers: int = 30
    ffn_dim: int = 8960
    freq_dim: int = 256  # size of the sinusoidal timestep embedding
    text_dim: int = 4096
    text_len: int = 512
    in_dim: int = 16
    out_dim: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)  # latent (frames, rows, columns) per token
    qk_norm: bool = True
    cross_attn_norm: bool = True
    eps: float = 1e-6

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(
                f"num_heads is {self.num_heads}, but must divide dim = {self.dim} into heads of an even size"
            )
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim is {self.freq_dim}, but must be even")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    def grid(self, latents: Sequence[int]) -> Grid:
        """Token grid of latents of shape [B, F, C, H, W]."""
        sizes = (latents[1], latents[3], latents[4])
        if len(latents) != 5 or any(size % patch for size, patch in zip(sizes, self.patch_size, strict=True)):
            raise ValueError(
                f"latents have shape {list(latents)}, but must be [B, F, C, H, W] with F, H and W multiples of "
                f"patch_size = {self.patch_size}"
            )
        frames, rows, columns = (size // patch for size, patch in zip(sizes, self.patch_size, strict=True))
        return frames, rows, columns


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over all channels (arXiv 1910.07467), computed in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(_wide(x), self.weight.shape, _wide(self.weight), self.eps).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation computed in float32, in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(
            _wide(x), self.normalized_shape, _wide(self.weight), _wide(self.bias), self.eps
        ).to(x.dtype)


@dataclass(frozen=True)
class Positions:
    """Where the tokens of a call stand in the video."""

    grid: Grid
    start_frame: int | Tensor = 0  # a cache's position, int32 [1]
    copies: int = 1  # 2 under teacher forcing: the clean and the noisy half have the same positions


class SelfAttention(nn.Module):
    def __init__(self, config: WanConfig, ops: SimpleNamespace) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q, self.norm_k = (_qk_norm(config) for _ in range(2))

    def forward(self, x: Tensor, positions: Positions, attend: Attend) -> tuple[Tensor, Tensor, Tensor]:
        """Output [B, L, dim], and the keys (after rotary embedding) and values [B, L, H, D] for a cache."""
        q = self._rotate(self.q(x), self.norm_q, positions)
        k = self._rotate(self.k(x), self.norm_k, positions)
        v = self.v(x).unflatten(-1, (self.config.num_heads, -1))
        return self.o(attend(q, k, v).flatten(2)), k, v

    def _rotate(self, x: Tensor, norm: nn.Module, positions: Positions) -> Tensor:
        heads = self.config.num_heads
        copies = x.unflatten(1, (positions.copies, -1)).flatten(0, 1)  # [B * copies, F * rows * columns, dim]
        if isinstance(norm, RMSNorm):
            rotated = self.ops.qk_norm_rope(
                copies, norm.weight, heads, positions.grid, positions.start_frame, self.config.eps
            )
        else:
            rotated = self.ops.rope_3d(copies.unflatten(-1, (heads, -1)), positions.grid, positions.start_frame)
        return rotated.unflatten(0, (-1, positions.copies)).flatten(1, 2)


class CrossAttention(nn.Module):
    def __init__(self, config: WanConfig, ops: SimpleNamespace) -> None:
        super().__init__()
        self.num_heads, self.ops = config.num_heads, ops
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q, self.norm_k = (_qk_norm(config) for _ in range(2))

    def keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """[B, text_len, H, D] each, from embedded text [B, text_len, dim]."""
        k, v = self.norm_k(self.k(context)), self.v(context)
        return k.unflatten(-1, (self.num_heads, -1)), v.unflatten(-1, (self.num_heads, -1))

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = self.norm_q(self.q(x)).unflatten(-1, (self.num_heads, -1))
        return self.o(self.ops.block_causal_attention(q, k, v, None).flatten(2))


class WanBlock(nn.Module):
    """Self-attention, cross-attention to the text and feed-forward, the first and last modulated by the timestep."""

    def __init__(self, config: WanConfig, ops: SimpleNamespace) -> None:
        super().__init__()
        self.ops, self.eps = ops, config.eps
        self.self_attn = SelfAttention(config, ops)
        self.norm3 = LayerNorm(config.dim, config.eps) if config.cross_attn_norm else nn.Identity()
        self.cross_attn = CrossAttention(config, ops)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, config.dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)

    def forward(
        self,
        x: Tensor,  # [B, L, dim]
        time: Tensor,  # [B, F, 6, dim]
        context: tuple[Tensor, Tensor],  # [B, text_len, H, D] each
        positions: Positions,
        attend: Attend,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The new x, and this block's keys and values for a cache."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = _wide(time + self.modulation).unbind(2)
        normed = self.ops.modulated_layer_norm(x, shift, scale, self.eps)
        y, k, v = self.self_attn(normed, positions, attend)
        x = self.ops.gated_residual(x, y, gate)
        x = x + self.cross_attn(self.norm3(x), *context)
        normed = self.ops.modulated_layer_norm(x, ffn_shift, ffn_scale, self.eps)
        return self.ops.gated_residual(x, self.ffn(normed), ffn_gate), k, v


class Head(nn.Module):
    def __init__(self, config: WanConfig, ops: SimpleNamespace) -> None:
        super().__init__()
        self.ops, self.eps = ops, config.eps
        patch_frames, patch_rows, patch_columns = config.patch_size
        self.head = nn.Linear(config.dim, patch_frames * patch_rows * patch_columns * config.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, L, dim] and the embedded timesteps [B, F, dim] to patches [B, L, patch volume * out_dim]."""
        shift, scale = _wide(time.unsqueeze(2) + self.modulation).unbind(2)
        return self.head(self.ops.modulated_layer_norm(x, shift, scale, self.eps))


class WanBackbone(nn.Module):
    """What the bidirectional and the causal model share: everything but who sees whom."""

    def __init__(self, config: WanConfig, backend: str = "ext") -> None:
        super().__init__()
        self.config = config
        self.ops = load_backend(backend)
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch_size, config.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(WanBlock(config, self.ops) for _ in range(config.num_layers))
        self.head = Head(config, self.ops)
        self._initialise()

    def encode_context(self, context: Tensor) -> EncodedContext:
        """Cross-attention keys and values of every layer, which several calls on the same caption can share.

        Args:
            context: text embeddings [B, text_len, text_dim].
        """
        expected = [self.config.text_len, self.config.text_dim]
        if context.dim() != 3 or list(context.shape[1:]) != expected:
            raise ValueError(
                f"context has shape {list(context.shape)}, but must be [B, text_len, text_dim] = "
                f"[B, {expected[0]}, {expected[1]}]"
            )
        text = self.text_embedding(context)
        return [block.cross_attn.keys_and_values(text) for block in self.blocks]

    def _embed_patches(self, x: Tensor) -> Tensor:
        """Latents [B, F, C, H, W] to tokens [B, L, dim]; the convolution has stride = kernel, so it is one GEMM."""
        batch = x.shape[0]
        frames, rows, columns = self.config.grid(x.shape)
        patch_frames, patch_rows, patch_columns = self.config.patch_size
        patches = x.reshape(batch, frames, patch_frames, -1, rows, patch_rows, columns, patch_columns)
        patches = patches.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4).flatten(1, 3)
        # The residual stream stays in float32 under autocast.
        return _wide(functional.linear(patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias))

    def _unpatchify(self, patches: Tensor, grid: Grid) -> Tensor:
        """Tokens [B, L, patch volume * out_dim] to latents [B, F, out_dim, H, W]."""
        frames, rows, columns = grid
        patch_frames, patch_rows, patch_columns = self.config.patch_size
        split = patches.reshape(-1, frames, rows, columns, patch_frames, patch_rows, patch_columns, self.config.out_dim)
        return split.permute(0, 1, 4, 7, 2, 5, 3, 6).reshape(
            -1, frames * patch_frames, self.config.out_dim, rows * patch_rows, columns * patch_columns
        )

    def _embed_time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps [B, F] to the head's embedding [B, F, dim] and the blocks' [B, F, 6, dim], in float32 even under
        autocast: bfloat16 cannot tell neighbouring timesteps apart."""
        with torch.autocast(t.device.type, enabled=False):
            weight = self.time_embedding[0].weight
            angles = t.to(torch.float64).unsqueeze(-1) * _timestep_frequencies(self.config.freq_dim, t.device)
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
    ) -> Tensor:
        encoded = self.encode_context(context) if isinstance(context, Tensor) else context
        for layer, block in enumerate(self.blocks):
            arguments = (x, time, encoded[layer], positions, attend(layer))
            if checkpoint_layers and torch.is_grad_enabled():
                x, k, v = checkpoint(block, *arguments, use_reentrant=False)
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
        if t.dim() != 1:
            raise ValueError(
                f"t has shape {list(t.shape)}, but must be [B]: the bidirectional model has one timestep per video"
            )
        grid = self.config.grid(x.shape)
        time, block_time = self._embed_time(t.unsqueeze(1))
        attention = self.ops.block_causal_attention
        tokens = self._run_blocks(
            self._embed_patches(x),
            block_time,
            context,
            Positions(grid),
            lambda layer: lambda q, k, v: attention(q, k, v, None),
            checkpoint_layers,
        )
        return self._unpatchify(self.head(tokens, time), grid).to(x.dtype)


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
            positions = Positions(grid, start_frame=cache.position)
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
            after_layer=cache.write if commit else None,
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
            max_frames, window_frames, sink_frames, options: as in ``PagedKVCache``.
        """
        weight = self.patch_embedding.weight
        autocast = torch.is_autocast_enabled(weight.device.type)
        _, rows, columns = self.config.grid(latents)
        return self.ops.PagedKVCache(
            self.config.num_layers,
            self.config.num_heads,
            self.config.head_dim,
            rows * columns,
            batch_size=latents[0],
            window_frames=window_frames,
            sink_frames=sink_frames,
            max_frames=max_frames,
            dtype=torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype,
            device=weight.device,
            **options,
        )

    def _masked(self, mask: BlockCausalMask | None) -> Callable[[int], Attend]:
        attention = self.ops.block_causal_attention
        return lambda layer: lambda q, k, v: attention(q, k, v, mask)

    @staticmethod
    def _cached(cache: Any) -> Callable[[int], Attend]:
        return lambda layer: lambda q, k, v: cache.attend(layer, q, k, v)


def _wide(x: Tensor) -> Tensor:
    """In float32, or float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _qk_norm(config: WanConfig) -> nn.Module:
    return RMSNorm(config.dim, config.eps) if config.qk_norm else nn.Identity()


@lru_cache
def _timestep_frequencies(freq_dim: int, device: torch.device) -> Tensor:  # float64 [freq_dim / 2]
    half = freq_dim // 2
    return 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=device) / half)
