"""The layers of a Wan-style transformer, and the sizes that they share. Parameter names are those of Wan2.1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional

from python_ref.context_parallel import ContextParallel
from python_ref.ops.attention import cast_to_autocast_dtype

Grid = tuple[int, int, int]  # tokens along (frames, rows, columns)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
# Projected keys, values, the weight of the keys' norm, grid and eps, to keys: a cache's norm_rope_write, of one layer.
WriteKeys = Callable[[Tensor, Tensor, Tensor, Grid, float], Tensor]


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
    # Learned absolute positions for token grids of exactly these (rows, columns). Wan2.1 has none (None): its rotary
    # embedding is relative and does not say where the frame ends.
    position_grid: tuple[int, int] | None = None

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
        if self.position_grid not in (None, (rows, columns)):
            raise ValueError(
                f"latents have shape {list(latents)}, a token grid of {rows} x {columns}, but the model has "
                f"position_grid = {self.position_grid}"
            )
        return frames, rows, columns


class RMSNorm(nn.Module):
    """The weight of a root-mean-square normalisation over all channels (arXiv 1910.07467), which the attention layers
    apply together with the rotary embedding."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class LayerNorm(nn.LayerNorm):
    """Layer normalisation computed in float32, in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(wide(x), self.normalized_shape, wide(self.weight), wide(self.bias), self.eps).to(
            x.dtype
        )


@dataclass(frozen=True)
class Positions:
    """Where the tokens of a call stand in the video."""

    grid: Grid
    # A cache's position, int32 [1] or [B]. None: its cache rotates queries and keys, with positions of its own.
    start_frame: int | Tensor | None = 0
    copies: int = 1  # 2 under teacher forcing: the clean and the noisy half have the same positions


class Attention(nn.Module):
    """The projections that self- and cross-attention have in common."""

    def __init__(self, config: WanConfig, ops: SimpleNamespace) -> None:
        super().__init__()
        self.num_heads, self.eps, self.ops = config.num_heads, config.eps, ops
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q, self.norm_k = (RMSNorm(config.dim) if config.qk_norm else nn.Identity() for _ in range(2))

    def split_heads(self, x: Tensor) -> Tensor:
        """[B, L, dim] to [B, L, H, D]."""
        return x.unflatten(-1, (self.num_heads, -1))

    def _norm(self, x: Tensor, norm: nn.Module) -> Tensor:
        """[B, L, dim] to [B, L, H, D]. At position 0 ``qk_norm_rope`` does not rotate; its one pass over the tensor
        replaces the ten of a normalisation made of elementwise operations."""
        if not isinstance(norm, RMSNorm):
            return self.split_heads(x)
        tokens = x.flatten(0, 1).unsqueeze(1)  # each token a sequence of its own
        normed = self.ops.qk_norm_rope(tokens, norm.weight, self.num_heads, (1, 1, 1), 0, self.eps)
        return normed.view(*x.shape[:2], self.num_heads, -1)


class SelfAttention(Attention):
    parallel: ContextParallel | None = None  # over the processes that hold the other tokens of x

    def forward(
        self, x: Tensor, positions: Positions, attend: Attend, write_keys: WriteKeys | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output [B, L, dim], and the keys (as the cache wants them) and values [B, L, H, D] for a cache: of all tokens
        and this process's heads, where x has a share of the tokens. With ``write_keys`` the cache has them already."""
        (x,) = cast_to_autocast_dtype(x)  # once rather than in each of the three projections
        if self.parallel is not None:
            return self._forward_in_parallel(x, positions, attend, self.parallel)
        q = self._norm_and_rotate(self.q(x), self.norm_q, positions)
        k, v = self.k(x), self.split_heads(self.v(x))
        if write_keys is None:
            k = self._norm_and_rotate(k, self.norm_k, positions)
        else:
            k = write_keys(k, v, self.norm_k.weight, positions.grid, self.eps)
        return self.o(attend(q, k, v).flatten(2)), k, v

    def _forward_in_parallel(
        self, x: Tensor, positions: Positions, attend: Attend, parallel: ContextParallel
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Norms need all heads of a token, and so come before the exchange; rotations need all tokens of a frame."""
        frames = positions.copies * positions.grid[0]
        normed = self._norm(self.q(x), self.norm_q), self._norm(self.k(x), self.norm_k)
        q, k, v = parallel.tokens_to_heads(frames, *normed, self.split_heads(self.v(x)))
        q, k = self._rotate(q, positions), self._rotate(k, positions)
        return self.o(parallel.heads_to_tokens(frames, attend(q, k, v)).flatten(2)), k, v

    def _rotate(self, x: Tensor, positions: Positions) -> Tensor:
        if positions.start_frame is None:
            return x
        halves = x.unflatten(1, (positions.copies, -1)).flatten(0, 1)
        rotated = self.ops.rope_3d(halves, positions.grid, positions.start_frame)
        return rotated.unflatten(0, (-1, positions.copies)).flatten(1, 2)

    def _norm_and_rotate(self, x: Tensor, norm: nn.Module, positions: Positions) -> Tensor:
        if not isinstance(norm, RMSNorm):
            return self._rotate(self.split_heads(x), positions)
        if positions.start_frame is None:
            return self._norm(x, norm)
        halves = x.unflatten(1, (positions.copies, -1)).flatten(0, 1)  # [B * copies, F * rows * columns, dim]
        where = positions.grid, positions.start_frame
        rotated = self.ops.qk_norm_rope(halves, norm.weight, self.num_heads, *where, self.eps)
        return rotated.unflatten(0, (-1, positions.copies)).flatten(1, 2)


class CrossAttention(Attention):
    def keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """[B, text_len, H, D] each, from embedded text [B, text_len, dim]."""
        return self._norm(self.k(context), self.norm_k), self.split_heads(self.v(context))

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.o(self.ops.block_causal_attention(self._norm(self.q(x), self.norm_q), k, v, None).flatten(2))


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
        write_keys: WriteKeys | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The new x, and this block's keys and values for a cache."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = wide(time + self.modulation).unbind(2)
        normed = self.ops.modulated_layer_norm(x, shift, scale, self.eps)
        y, k, v = self.self_attn(normed, positions, attend, write_keys)
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
        shift, scale = wide(time.unsqueeze(2) + self.modulation).unbind(2)
        return self.head(self.ops.modulated_layer_norm(x, shift, scale, self.eps))


def wide(x: Tensor) -> Tensor:
    """In float32, or float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
