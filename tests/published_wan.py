"""A stand-in for the published Self-Forcing models: the same module names, call signatures, masks and cache semantics,
written anew with attention in plain PyTorch. tests/test_self_forcing_integration.py holds it against what the published
implementation computed (tests/golden).

It differs on purpose in two things: nothing is padded to 128 (the published code fails at multiples of it), and cached
keys and values are constant to autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils.checkpoint import checkpoint

PADDING = 128  # FlexAttention's tile, to which the published masks are padded


def rotary_table(head_dim: int, num_positions: int = 1024) -> Tensor:
    """exp(i angle), complex128 [num_positions, head_dim / 2]: pairs of the frame, of the row, of the column."""
    spatial = head_dim // 6
    frequencies = [10000.0 ** (-torch.arange(n).double() / n) for n in (head_dim // 2 - 2 * spatial, spatial, spatial)]
    angles = torch.arange(num_positions).double()[:, None] * torch.cat(frequencies)
    return torch.complex(angles.cos(), angles.sin())


def rotate(x: Tensor, grid_sizes: Tensor, freqs: Tensor, start_frame: int = 0) -> Tensor:
    """x [B, L, H, D]; tokens beyond the grid stay as they are."""
    spatial = freqs.shape[1] // 3
    by_frame, by_row, by_column = freqs.split([freqs.shape[1] - 2 * spatial, spatial, spatial], dim=1)
    rotated = []
    for sample, (frames, rows, columns) in zip(x, grid_sizes.tolist(), strict=True):
        size = (frames, rows, columns, -1)
        factors = torch.cat(
            (
                by_frame[start_frame : start_frame + frames, None, None].expand(size),
                by_row[None, :rows, None].expand(size),
                by_column[None, None, :columns].expand(size),
            ),
            dim=-1,
        ).flatten(0, 2)
        inside = torch.view_as_complex(sample[: len(factors)].double().unflatten(-1, (-1, 2)))
        turned = torch.view_as_real(inside * factors[:, None]).flatten(-2).to(x.dtype)
        rotated.append(torch.cat((turned, sample[len(factors) :])))
    return torch.stack(rotated)


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """[B, L, H, D] each; visible bool [L, L]."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2)


@lru_cache(maxsize=4)
def dense_mask(block_mask: BlockMask, length: int) -> Tensor:
    """bool [length, length]"""
    zero, positions = torch.tensor(0), torch.arange(length)
    return block_mask.mask_mod(zero, zero, positions[:, None], positions)


class WanRMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype) * self.weight


class WanLayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None if part is None else part.float() for part in (self.weight, self.bias))
        return functional.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class WanSelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, qk_norm: bool = True, eps: float = 1e-6) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.window_size = num_heads, dim // num_heads, (-1, -1)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = (WanRMSNorm(dim, eps) if qk_norm else nn.Identity() for _ in range(2))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x)
        return tuple(tensor.unflatten(-1, (self.num_heads, -1)) for tensor in (q, k, v))

    def forward(self, x: Tensor, seq_lens: Tensor, grid_sizes: Tensor, freqs: Tensor) -> Tensor:
        q, k, v = self.project(x)
        visible = torch.arange(x.shape[1]) < seq_lens[:, None, None, None]
        q, k = (rotate(tensor, grid_sizes, freqs) for tensor in (q, k))
        return self.o(attention(q, k, v, visible).flatten(2))


class CausalWanSelfAttention(WanSelfAttention):
    def __init__(self, dim: int, num_heads: int, local_attn_size: int, sink_size: int, qk_norm: bool, eps: float):
        super().__init__(dim, num_heads, qk_norm, eps)
        del self.window_size
        self.local_attn_size, self.sink_size = local_attn_size, sink_size
        self.max_attention_size = 32760 if local_attn_size == -1 else local_attn_size * 1560

    def forward(
        self,
        x: Tensor,
        seq_lens: Tensor,
        grid_sizes: Tensor,
        freqs: Tensor,
        block_mask: BlockMask | None,
        kv_cache: dict[str, Tensor] | None = None,
        current_start: int = 0,
        cache_start: int | None = None,
    ) -> Tensor:
        q, k, v = self.project(x)
        if kv_cache is None:
            halves = 2 if x.shape[1] == 2 * seq_lens[0] else 1
            q, k = (
                torch.cat([rotate(half, grid_sizes, freqs) for half in tensor.chunk(halves, dim=1)], dim=1)
                for tensor in (q, k)
            )
            out = attention(q, k, v, dense_mask(block_mask, x.shape[1]))
        else:
            frame_seqlen = int(grid_sizes[0, 1] * grid_sizes[0, 2])
            q, k = (rotate(tensor, grid_sizes, freqs, current_start // frame_seqlen) for tensor in (q, k))
            out = self.attend_and_write(q, k, v, kv_cache, current_start, self.sink_size * frame_seqlen)
        return self.o(out.flatten(2))

    def attend_and_write(
        self, q: Tensor, k: Tensor, v: Tensor, kv_cache: dict[str, Tensor], start: int, sink: int
    ) -> Tensor:
        end = start + k.shape[1]
        ahead = end - int(kv_cache["global_end_index"])
        local_end = int(kv_cache["local_end_index"])
        overflow = local_end + k.shape[1] - kv_cache["k"].shape[1]
        with torch.no_grad():
            if self.local_attn_size != -1 and ahead > 0 and overflow > 0:
                for key in ("k", "v"):
                    window = kv_cache[key][:, sink:local_end]
                    window[:, : window.shape[1] - overflow] = window[:, overflow:].clone()
                local_end -= overflow
            local_end += ahead
            local_start = local_end - k.shape[1]
            kv_cache["k"][:, local_start:local_end] = k
            kv_cache["v"][:, local_start:local_end] = v
            kv_cache["global_end_index"].fill_(end)
            kv_cache["local_end_index"].fill_(local_end)
        past = slice(max(0, local_end - self.max_attention_size), local_start)
        keys, values = (torch.cat((kv_cache[key][:, past], new), dim=1) for key, new in (("k", k), ("v", v)))
        return attention(q, keys, values)


class WanT2VCrossAttention(WanSelfAttention):
    def forward(
        self, x: Tensor, context: Tensor, context_lens: None, crossattn_cache: dict[str, Tensor] | None = None
    ) -> Tensor:
        q = self.norm_q(self.q(x)).unflatten(-1, (self.num_heads, -1))
        if crossattn_cache is not None and crossattn_cache["is_init"]:
            k, v = crossattn_cache["k"], crossattn_cache["v"]
        else:
            k = self.norm_k(self.k(context)).unflatten(-1, (self.num_heads, -1))
            v = self.v(context).unflatten(-1, (self.num_heads, -1))
            if crossattn_cache is not None:
                crossattn_cache["is_init"].fill_(True)
                crossattn_cache["k"], crossattn_cache["v"] = k, v
        return self.o(attention(q, k, v).flatten(2))


class WanAttentionBlock(nn.Module):
    def __init__(self, self_attn: nn.Module, dim: int, ffn_dim: int, num_heads: int, qk_norm: bool, eps: float) -> None:
        super().__init__()
        self.norm1 = WanLayerNorm(dim, eps, elementwise_affine=False)
        self.self_attn = self_attn
        self.norm3 = WanLayerNorm(dim, eps)
        self.cross_attn = WanT2VCrossAttention(dim, num_heads, qk_norm, eps)
        self.norm2 = WanLayerNorm(dim, eps, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        x: Tensor,
        e: Tensor,
        seq_lens: Tensor,
        grid_sizes: Tensor,
        freqs: Tensor,
        context: Tensor,
        context_lens: None = None,
        crossattn_cache: dict[str, Tensor] | None = None,
        **causal: object,
    ) -> Tensor:
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (
            part.repeat_interleave(x.shape[1] // e.shape[1], dim=1) for part in (e + self.modulation[:, None]).unbind(2)
        )
        y = self.norm1(x) * (1 + scale) + shift
        # By position, as the published block does.
        names = ("block_mask", "kv_cache", "current_start", "cache_start")
        x = x + gate * self.self_attn(
            y, seq_lens, grid_sizes, freqs, *(causal[name] for name in names if name in causal)
        )
        x = x + self.cross_attn(self.norm3(x), context, context_lens, crossattn_cache=crossattn_cache)
        return x + ffn_gate * self.ffn(self.norm2(x) * (1 + ffn_scale) + ffn_shift)


class Head(nn.Module):
    def __init__(self, dim: int, out_channels: int, eps: float) -> None:
        super().__init__()
        self.norm = WanLayerNorm(dim, eps, elementwise_affine=False)
        self.head = nn.Linear(dim, out_channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        shift, scale = (
            part.repeat_interleave(x.shape[1] // e.shape[1], dim=1)
            for part in (e.unsqueeze(2) + self.modulation[:, None]).unbind(2)
        )
        return self.head(self.norm(x) * (1 + scale) + shift)


class WanModel(nn.Module):
    """Latents [B, C, F, H, W]; here bidirectional, with timesteps [B]."""

    def __init__(
        self,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        text_len: int = 512,
        in_dim: int = 16,
        dim: int = 2048,
        ffn_dim: int = 8192,
        freq_dim: int = 256,
        text_dim: int = 4096,
        out_dim: int = 16,
        num_heads: int = 16,
        num_layers: int = 32,
        local_attn_size: int = -1,
        sink_size: int = 0,
        qk_norm: bool = True,
        cross_attn_norm: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        assert cross_attn_norm
        self.patch_size, self.text_len, self.freq_dim = tuple(patch_size), text_len, freq_dim
        self.local_attn_size, self.sink_size = local_attn_size, sink_size
        self.patch_embedding = nn.Conv3d(in_dim, dim, self.patch_size, self.patch_size)
        self.text_embedding, self.time_embedding = (
            nn.Sequential(nn.Linear(size, dim), activation, nn.Linear(dim, dim))
            for size, activation in ((text_dim, nn.GELU(approximate="tanh")), (freq_dim, nn.SiLU()))
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(
            WanAttentionBlock(
                self.make_self_attention(dim, num_heads, qk_norm, eps), dim, ffn_dim, num_heads, qk_norm, eps
            )
            for _ in range(num_layers)
        )
        self.head = Head(dim, torch.Size(self.patch_size).numel() * out_dim, eps)
        self.freqs = rotary_table(dim // num_heads)
        self.gradient_checkpointing = False

    def make_self_attention(self, dim: int, num_heads: int, qk_norm: bool, eps: float) -> nn.Module:
        return WanSelfAttention(dim, num_heads, qk_norm, eps)

    def embed(self, x: Tensor) -> Tensor:
        return self.patch_embedding(x).flatten(2).transpose(1, 2)

    def embed_time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t [B, F] to [B, F, dim] and [B, F, 6, dim]."""
        half = self.freq_dim // 2
        angles = t.double().unsqueeze(-1) * 10000.0 ** (-torch.arange(half).double() / half)
        e = self.time_embedding(torch.cat((angles.cos(), angles.sin()), -1).to(self.patch_embedding.weight.dtype))
        return e, self.time_projection(e).unflatten(-1, (6, -1))

    def embed_text(self, context: Tensor | list[Tensor]) -> Tensor:
        padded = [functional.pad(text, (0, 0, 0, self.text_len - len(text))) for text in context]
        return self.text_embedding(torch.stack(padded))

    def sizes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """seq_lens and grid_sizes: new tensors for each call, as the published model makes them."""
        grid = torch.tensor([size // patch for size, patch in zip(x.shape[2:], self.patch_size, strict=True)])
        return grid.prod().repeat(len(x)), grid.repeat(len(x), 1)

    def run_block(self, block: nn.Module, x: Tensor, **arguments: object) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, **arguments, use_reentrant=False)
        return block(x, **arguments)

    def unpatchify(self, x: Tensor, grid_sizes: Tensor) -> Tensor:
        grid = grid_sizes[0].tolist()
        x = x[:, : grid[0] * grid[1] * grid[2]].unflatten(1, grid).unflatten(-1, (*self.patch_size, -1))
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def forward(self, x: Tensor, t: Tensor, context: Tensor | list[Tensor], seq_len: int) -> Tensor:
        seq_lens, grid_sizes = self.sizes(x)
        tokens = self.embed(x)
        tokens = functional.pad(tokens, (0, 0, 0, seq_len - tokens.shape[1]))
        e, e_blocks = self.embed_time(t[:, None])
        text = self.embed_text(context)
        for block in self.blocks:
            tokens = self.run_block(
                block,
                tokens,
                e=e_blocks,
                seq_lens=seq_lens,
                grid_sizes=grid_sizes,
                freqs=self.freqs,
                context=text,
            )
        return self.unpatchify(self.head(tokens, e), grid_sizes)


class CausalWanModel(WanModel):
    """Timesteps [B, F]. With ``kv_cache`` the next block, else a whole video, with ``clean_x`` by teacher forcing."""

    def __init__(self, **config: object) -> None:
        super().__init__(**config)
        self.block_mask = None
        self.num_frame_per_block = 1
        self.independent_first_frame = False

    def make_self_attention(self, dim: int, num_heads: int, qk_norm: bool, eps: float) -> nn.Module:
        return CausalWanSelfAttention(dim, num_heads, self.local_attn_size, self.sink_size, qk_norm, eps)

    @staticmethod
    def _prepare_blockwise_causal_attn_mask(
        device: str, num_frames: int, frame_seqlen: int, num_frame_per_block: int = 1, local_attn_size: int = -1
    ) -> BlockMask:
        ends = block_ends(frame_seqlen * num_frame_per_block)
        return make_block_mask(causal(ends, frame_seqlen, local_attn_size), num_frames * frame_seqlen, device)

    @staticmethod
    def _prepare_blockwise_causal_attn_mask_i2v(
        device: str, num_frames: int, frame_seqlen: int, num_frame_per_block: int = 4, local_attn_size: int = -1
    ) -> BlockMask:
        ends = block_ends(frame_seqlen * num_frame_per_block, first=frame_seqlen)
        return make_block_mask(causal(ends, frame_seqlen, local_attn_size), num_frames * frame_seqlen, device)

    @staticmethod
    def _prepare_teacher_forcing_mask(
        device: str, num_frames: int, frame_seqlen: int, num_frame_per_block: int = 1
    ) -> BlockMask:
        clean, block = num_frames * frame_seqlen, frame_seqlen * num_frame_per_block
        ends = block_ends(block)

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            own_start = ends(q) - block  # of a noisy query, in the sequence [clean; noisy]
            past = (k < own_start - clean) & (q >= clean)
            own = (k >= own_start) & (k < ends(q)) & (q >= clean)
            return past | own | ((q < clean) & (k < ends(q))) | (q == k)

        return make_block_mask(visible, 2 * clean, device)

    def forward(self, *arguments: object, **options: object) -> Tensor:
        if options.get("kv_cache") is not None:
            return self._forward_inference(*arguments, **options)
        return self._forward_train(*arguments, **options)

    def _forward_train(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | list[Tensor],
        seq_len: int,
        clean_x: Tensor | None = None,
        aug_t: Tensor | None = None,
    ) -> Tensor:
        seq_lens, grid_sizes = self.sizes(x)
        num_frames, frame_seqlen = int(grid_sizes[0, 0]), int(grid_sizes[0, 1] * grid_sizes[0, 2])
        if self.block_mask is None:
            sizes = ("cpu", num_frames, frame_seqlen, self.num_frame_per_block)
            if clean_x is not None:
                self.block_mask = self._prepare_teacher_forcing_mask(*sizes)
            elif self.independent_first_frame:
                self.block_mask = self._prepare_blockwise_causal_attn_mask_i2v(*sizes, self.local_attn_size)
            else:
                self.block_mask = self._prepare_blockwise_causal_attn_mask(*sizes, self.local_attn_size)
        tokens, (e, e_blocks) = self.embed(x), self.embed_time(t)
        if clean_x is not None:
            clean_t = torch.zeros_like(t) if aug_t is None else aug_t
            tokens = torch.cat((self.embed(clean_x), tokens), dim=1)
            e_blocks = torch.cat((self.embed_time(clean_t)[1], e_blocks), dim=1)
        text = self.embed_text(context)
        for block in self.blocks:
            tokens = self.run_block(
                block,
                tokens,
                e=e_blocks,
                seq_lens=seq_lens,
                grid_sizes=grid_sizes,
                freqs=self.freqs,
                context=text,
                block_mask=self.block_mask,
            )
        return self.unpatchify(self.head(tokens[:, -seq_lens[0] :], e), grid_sizes)

    def _forward_inference(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | list[Tensor],
        seq_len: int,
        kv_cache: list[dict[str, Tensor]],
        crossattn_cache: list[dict[str, Tensor]] | None = None,
        current_start: int = 0,
        cache_start: int = 0,
    ) -> Tensor:
        seq_lens, grid_sizes = self.sizes(x)
        tokens, (e, e_blocks) = self.embed(x), self.embed_time(t)
        text = self.embed_text(context)
        recorded = self.gradient_checkpointing and torch.is_grad_enabled()
        for index, block in enumerate(self.blocks):
            tokens = self.run_block(
                block,
                tokens,
                e=e_blocks,
                seq_lens=seq_lens,
                grid_sizes=grid_sizes,
                freqs=self.freqs,
                context=text,
                block_mask=self.block_mask,
                kv_cache=kv_cache[index],
                crossattn_cache=None if recorded or crossattn_cache is None else crossattn_cache[index],
                current_start=current_start,
                cache_start=cache_start,
            )
        return self.unpatchify(self.head(tokens, e), grid_sizes)


def block_ends(block: int, first: int = 0) -> Callable[[Tensor], Tensor]:
    """The end of a token's block, if blocks follow the ``first`` tokens, which are a block of their own."""
    return lambda q: torch.where(q < first, first, first + ((q - first) // block + 1) * block)


def causal(ends: Callable[[Tensor], Tensor], frame_seqlen: int, local_attn_size: int) -> Callable[..., Tensor]:
    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        near = k >= ends(q) - local_attn_size * frame_seqlen if local_attn_size != -1 else k >= 0
        return ((k < ends(q)) & near) | (q == k)

    return visible


def make_block_mask(visible: Callable[..., Tensor], length: int, device: str) -> BlockMask:
    padded = -(-length // PADDING) * PADDING
    return create_block_mask(visible, None, None, padded, padded, device=device)


def make_dict_cache(model: CausalWanModel, batch_size: int, num_tokens: int) -> list[dict[str, Tensor]]:
    """As the published pipelines make it."""
    attn = model.blocks[0].self_attn
    weight = model.patch_embedding.weight
    shape = (batch_size, num_tokens, attn.num_heads, attn.head_dim)
    return [
        {
            "k": torch.zeros(shape, dtype=weight.dtype),
            "v": torch.zeros(shape, dtype=weight.dtype),
            "global_end_index": torch.tensor([0]),
            "local_end_index": torch.tensor([0]),
        }
        for _ in model.blocks
    ]


def make_crossattn_cache(model: CausalWanModel) -> list[dict[str, Tensor]]:
    return [{"is_init": torch.zeros(1, dtype=torch.bool)} for _ in model.blocks]
