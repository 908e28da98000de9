"""Our attention and KV cache in the Wan models of diffusers (``WanTransformer3DModel``).

Two lines give a model our attention, with the numbers it had before::

    from selfforcing_ext.integrations.diffusers import accelerate
    accelerate(pipe.transformer)

With a ``BlockCausalMask`` the model becomes block-causal, for training; ``forward_with_cache`` runs it block by block,
for generation. Parameters and state dict do not change, and ``restore`` undoes it. Generation as a whole is in
``selfforcing_ext.integrations.diffusers_pipeline``.

The model's normalisation and rotation of queries and keys are those of ``qk_norm_rope``: RMSNorm over all heads
together, then pairs of neighbouring channels turned by frame, row and column. But the model hands its rotation to the
attention layers as tables (cos, sin) of frames that start at 0, where our op wants the token grid and the first frame.
So ``accelerate`` also puts a module in the place of ``transformer.rope`` that hands out these. Where a model's tables
are others (for longer videos, say) they are used as they are.

Nothing of diffusers is imported here; the model brings all that is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from selfforcing_ext.attention import block_causal_attention
from selfforcing_ext.checks import check_head_dim
from selfforcing_ext.kv_cache import PagedKVCache
from selfforcing_ext.kv_cache_view import KVCacheView
from selfforcing_ext.mask import BlockCausalMask
from selfforcing_ext.rope import qk_norm_rope, rope_3d

TEXT_TOKENS = 512  # of an image-to-video model's context, after those of the image, as WanAttnProcessor has it
NO_CONTEXT_PARALLELISM = (
    "transformer is under context parallelism, but our attention needs a video's tokens in one place"
)
Tables = tuple[Tensor, Tensor]  # cos and sin [1, L, 1, D], each value twice


def accelerate(transformer: Any, mask: BlockCausalMask | None = None) -> Any:
    """Gives a ``WanTransformer3DModel`` our attention, in place; ``restore`` undoes it.

    Self-attention and cross-attention (that to an image included) run on our ops; projections, fused or not, stay the
    model's. A model that has been accelerated before gets the new mask.

    Args:
        transformer: the model. Its heads must have a multiple of 8 channels, up to 256.
        mask: who sees whom in self-attention; None: every token sees every token, as in the model itself. The latents
            then have ``mask.num_frames`` frames (after patching) of ``mask.frame_seqlen`` tokens; with
            ``teacher_forcing`` twice as many, the clean video followed by the noisy one. Timesteps per frame are given
            per token, as the model takes them: ``timestep.repeat_interleave(mask.frame_seqlen, dim=1)``.

    Returns:
        The model.

    Raises:
        TypeError: not a Wan model of diffusers, or a mask of another type.
        ValueError: heads of a size that the ops do not take, or a model under context parallelism.
    """
    blocks = getattr(transformer, "blocks", None)
    if not (hasattr(transformer, "rope") and blocks and all(hasattr(blocks[0], name) for name in ("attn1", "attn2"))):
        raise TypeError(f"transformer is a {type(transformer).__name__}, but must be a WanTransformer3DModel")
    if mask is not None and not isinstance(mask, BlockCausalMask):
        raise TypeError(f"mask is a {type(mask).__name__}, but must be a BlockCausalMask or None")
    check_head_dim("transformer", transformer.config.attention_head_dim)
    parallel = getattr(transformer, "_parallel_config", None)
    if parallel is not None and parallel.context_parallel_config is not None:
        raise ValueError(NO_CONTEXT_PARALLELISM)
    restore(transformer)
    transformer.rope = RopeStandIn(transformer, mask)
    for layer, block in enumerate(blocks):
        block.attn1.set_processor(SelfForcingAttnProcessor(mask, layer))
        block.attn2.set_processor(SelfForcingAttnProcessor())
    return transformer


def restore(transformer: Any) -> Any:
    """Gives an accelerated model back the attention it had. A model that is not accelerated stays as it is.

    Returns:
        The model.
    """
    if is_accelerated(transformer):
        positions = transformer.rope
        transformer.set_attn_processor(positions.replaced_processors)
        transformer.rope = positions.replaced_rope
    return transformer


def is_accelerated(transformer: Any) -> bool:
    """Whether ``accelerate`` has been called on the model, and not ``restore`` since."""
    return isinstance(getattr(transformer, "rope", None), RopeStandIn)


def make_kv_cache(
    transformer: Any,
    latents: tuple[int, ...],
    window_frames: int | None = None,
    sink_frames: int = 0,
    max_frames: int | None = None,
    **options: Any,
) -> PagedKVCache:
    """An empty cache for videos of a Wan model, in its dtype, or in autocast's under autocast.

    Args:
        transformer: the model, accelerated or not.
        latents: shape [B, C, F, H, W] of the latents that will be generated; C and F do not matter.
        window_frames, sink_frames, max_frames, options: as in ``PagedKVCache``; in frames of latents. The device is the
            model's unless it is given, as it must be for a model whose weights are loaded on demand.
    """
    config = transformer.config
    _, patch_rows, patch_columns = config.patch_size
    device = options.pop("device", transformer.device)
    device_type = torch.device(device).type
    autocast = torch.is_autocast_enabled(device_type)
    return PagedKVCache(
        len(transformer.blocks),
        config.num_attention_heads,
        config.attention_head_dim,
        (latents[3] // patch_rows) * (latents[4] // patch_columns),
        batch_size=latents[0],
        window_frames=window_frames,
        sink_frames=sink_frames,
        max_frames=max_frames,
        dtype=torch.get_autocast_dtype(device_type) if autocast else transformer.dtype,
        device=device,
        **options,
    )


def forward_with_cache(
    transformer: Any,
    cache: PagedKVCache,
    hidden_states: Tensor,  # [B, C, F, H, W]
    timestep: Tensor,  # [B], or [B, L] for one per token
    encoder_hidden_states: Tensor,  # [B, text_len, text_dim]
    commit: bool = False,
    **kwargs: Any,
) -> Tensor:  # [B, C_out, F, H, W]
    """What an accelerated model predicts for the next block of a video, whose past is in the cache.

    The block's frames come after the ``cache.num_frames`` committed ones and see those that the cache still shows, and
    each other. A mask that the model was accelerated with does not matter here.

    Args:
        transformer: an accelerated model.
        cache: keys and values of the past, see ``make_kv_cache``.
        hidden_states: latents of the block.
        timestep, encoder_hidden_states, kwargs: as the model takes them.
        commit: also write the block's keys and values to the cache and make the block part of the past: the pass over
            clean latents that ends a block.

    Autograd: as in ``PagedKVCache.attend``; the past is constant. With gradient checkpointing a block must be committed
    under ``torch.no_grad()``.

    Raises:
        ValueError: the model is not accelerated, the block does not fit the cache, or it would be committed a second
            time in backward.
    """
    if not is_accelerated(transformer):
        raise ValueError("transformer is not accelerated; call accelerate(transformer) first")
    positions = transformer.rope
    recomputes = torch.is_grad_enabled() and transformer.is_gradient_checkpointing
    if commit and recomputes:
        raise ValueError(
            "commit is True, but gradient checkpointing would write the block again in backward; "
            "call with commit under torch.no_grad()"
        )
    # A view stays as it is when the cache goes on, so that recomputed layers see what they saw.
    positions.past = cache.view() if recomputes else cache
    positions.writes_to = cache if commit else None
    try:
        (flow,) = transformer(hidden_states, timestep, encoder_hidden_states, return_dict=False, **kwargs)
    finally:
        positions.past = positions.writes_to = None
    if commit:
        cache.commit(hidden_states.shape[2] // transformer.config.patch_size[0])
    result: Tensor = flow
    return result


class SelfForcingAttnProcessor:
    """Attention processor for the attention layers of ``WanTransformer3DModel``, equal to the model's own.

    ``accelerate`` sets it for a whole model. It also works alone (``transformer.set_attn_processor``), then with the
    model's rotation tables; only the fused normalisation and rotation, teacher forcing and caches need ``accelerate``.

    Args:
        mask: who sees whom in self-attention; None: every token sees every token.
        layer: which layer of a cache is that of this attention.
    """

    def __init__(self, mask: BlockCausalMask | None = None, layer: int = 0) -> None:
        self.mask = mask
        self.layer = layer

    @property
    def _parallel_config(self) -> None:
        """What ``transformer.enable_parallelism`` gives to every processor that has it."""

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        raise ValueError(NO_CONTEXT_PARALLELISM)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,  # [B, L, dim]
        encoder_hidden_states: Tensor | None = None,  # [B, text_len, dim]
        attention_mask: Tensor | None = None,
        rotary_emb: Tables | Positions | None = None,
    ) -> Tensor:  # [B, L, dim]
        """Called by ``WanAttention``; arguments and result are those of ``WanAttnProcessor``.

        Raises:
            ValueError: an ``attention_mask`` is given: masks are ``BlockCausalMask``s here.
        """
        if attention_mask is not None:
            raise ValueError(
                "attention_mask is given, but must be None: pass a BlockCausalMask to accelerate or to the processor"
            )
        image_states = None
        if attn.add_k_proj is not None and encoder_hidden_states is not None:
            image_tokens = encoder_hidden_states.shape[1] - TEXT_TOKENS
            image_states, encoder_hidden_states = encoder_hidden_states.tensor_split((image_tokens,), dim=1)

        query, key, value = _projections(attn, hidden_states, encoder_hidden_states)
        query = _norm_and_rotate(query, attn.norm_q, attn.heads, rotary_emb)
        key = _norm_and_rotate(key, attn.norm_k, attn.heads, rotary_emb)
        value = _split_heads(value, attn.heads)
        if encoder_hidden_states is None:
            out = self._attend(query, key, value, rotary_emb)
        else:
            out = block_causal_attention(query, key, value)
        if image_states is not None:
            key, value = _image_projections(attn, image_states)
            key = _norm_and_rotate(key, attn.norm_added_k, attn.heads, None)
            out = out + block_causal_attention(query, key, _split_heads(value, attn.heads))

        linear, dropout = attn.to_out
        projected: Tensor = dropout(linear(out.flatten(2)))
        return projected

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, where: Tables | Positions | None) -> Tensor:
        """Self-attention, masked or over the past in a cache."""
        if not isinstance(where, Positions) or where.past is None:
            return block_causal_attention(query, key, value, self.mask)
        out = where.past.attend(self.layer, query, key, value)
        if where.writes_to is not None:
            where.writes_to.write(self.layer, key, value)
        return out


@dataclass(frozen=True)
class Positions:
    """Where the tokens of a call stand in the video, and the past that they see. The model hands it to every
    self-attention as ``rotary_emb``, also when gradient checkpointing runs one again."""

    grid: tuple[int, int, int]  # tokens along (frames, rows, columns)
    start_frame: int | Tensor = 0
    copies: int = 1  # 2 under teacher forcing: the clean and the noisy video have the same positions
    tables: Tables | None = None  # if the model's rotation is not that of rope_3d
    past: PagedKVCache | KVCacheView | None = None
    writes_to: PagedKVCache | None = None


class RopeStandIn(nn.Module):
    """What ``accelerate`` puts in the place of ``transformer.rope``: makes the ``Positions`` of a call.

    It keeps what it replaces for ``restore``. The rope module it keeps has no parameters, and buffers that are not part
    of the state dict.
    """

    def __init__(self, transformer: Any, mask: BlockCausalMask | None) -> None:
        super().__init__()
        self.replaced_rope = transformer.rope
        self.replaced_processors = transformer.attn_processors
        self.patch_size: tuple[int, int, int] = tuple(transformer.config.patch_size)
        self.mask = mask
        self.turns_as_rope_3d = _turns_as_rope_3d(
            self.replaced_rope, self.patch_size, transformer.config.rope_max_seq_len
        )
        self.past: PagedKVCache | KVCacheView | None = None  # during forward_with_cache
        self.writes_to: PagedKVCache | None = None

    def forward(self, hidden_states: Tensor) -> Positions:
        """The positions of latents [B, C, F, H, W]."""
        sizes = hidden_states.shape[2:]
        frames, rows, columns = (size // patch for size, patch in zip(sizes, self.patch_size, strict=True))
        mask = self.mask if self.past is None else None
        copies = 1 if mask is None or not mask.teacher_forcing else 2
        if mask is not None and (frames, rows * columns) != (copies * mask.num_frames, mask.frame_seqlen):
            halves = "2 x " if mask.teacher_forcing else ""
            raise ValueError(
                f"hidden_states has {frames} frames of {rows * columns} tokens, but the mask has {halves}"
                f"{mask.num_frames} frames of {mask.frame_seqlen}"
            )
        grid = (frames // copies, rows, columns)
        start_frame = 0 if self.past is None else self.past.position
        tables = None if self.turns_as_rope_3d else self._tables(hidden_states, grid, copies)
        return Positions(grid, start_frame, copies, tables, self.past, self.writes_to)

    def _tables(self, hidden_states: Tensor, grid: tuple[int, int, int], copies: int) -> Tables:
        """The model's own tables. It makes them for a video from frame 0 on; a block takes its part of them."""
        frames, rows, columns = grid
        start = 0 if self.past is None else self.past.num_frames
        video = hidden_states[:, :, :1].expand(-1, -1, (start + frames) * self.patch_size[0], -1, -1)  # no memory
        cos, sin = (table[:, start * rows * columns :].repeat(1, copies, 1, 1) for table in self.replaced_rope(video))
        return cos, sin


def _turns_as_rope_3d(rope: Any, patch_size: tuple[int, int, int], max_positions: int) -> bool:
    """Whether the model's tables are the rotation of ``rope_3d``, tried at every position of every axis."""
    for axis in range(3):
        grid = [1, 1, 1]
        grid[axis] = max_positions
        latents = [size * patch for size, patch in zip(grid, patch_size, strict=True)]
        cos, sin = rope(torch.empty(1, 1, *latents))
        tolerance = 4 * max(torch.finfo(dtype).eps for dtype in (cos.dtype, torch.float32))  # they move with the model
        east = torch.zeros_like(cos, dtype=torch.float32)  # pairs (1, 0), which a rotation turns into (cos, sin)
        east[..., 0::2] = 1
        turned = rope_3d(east, grid)
        for part, table in ((turned[..., 0::2], cos[..., 0::2]), (turned[..., 1::2], sin[..., 1::2])):
            if not torch.allclose(part, table.float(), rtol=0, atol=tolerance):
                return False
    return True


def _projections(attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None) -> tuple[Tensor, ...]:
    """Query, key and value [B, L, H * D], through one matrix where the model's projections are fused."""
    context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    if not attn.fused_projections:
        return attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
    if attn.is_cross_attention:
        return attn.to_q(hidden_states), *attn.to_kv(context).chunk(2, dim=-1)
    qkv: Tensor = attn.to_qkv(hidden_states)
    return qkv.chunk(3, dim=-1)


def _image_projections(attn: Any, image_states: Tensor) -> tuple[Tensor, ...]:
    """Key and value [B, image_tokens, H * D] of an image-to-video model."""
    if not attn.fused_projections:
        return attn.add_k_proj(image_states), attn.add_v_proj(image_states)
    key_value: Tensor = attn.to_added_kv(image_states)
    return key_value.chunk(2, dim=-1)


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, L, H * D] to [B, L, H, D]."""
    return x.view(*x.shape[:2], num_heads, -1)


def _norm_and_rotate(x: Tensor, norm: Any, num_heads: int, where: Tables | Positions | None) -> Tensor:
    """Normalised, rotated if there are positions, and split into heads: [B, L, H * D] to [B, L, H, D]."""
    if isinstance(where, Positions) and where.tables is not None:
        where = where.tables
    if isinstance(where, tuple):
        return _rotate(_split_heads(norm(x), num_heads), *where)
    if where is None:
        # At position 0 nothing turns: one pass over memory, where RMSNorm makes several. A token is a sequence then.
        sequences, where = x.reshape(-1, 1, x.shape[2]), Positions((1, 1, 1))
    else:
        sequences = x.reshape(x.shape[0] * where.copies, -1, x.shape[2])
    if norm.weight.device == x.device:
        y = qk_norm_rope(sequences, norm.weight, num_heads, where.grid, where.start_frame, norm.eps)
    else:  # an offloading hook brings the weight, but only when the module is called
        y = rope_3d(_split_heads(norm(sequences), num_heads), where.grid, where.start_frame)
    return y.view(*x.shape[:2], num_heads, -1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of channels (2j, 2j + 1) of x [B, L, H, D] turned by the tables' angles, in the dtype of x."""
    left, right = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    turned = torch.stack((left * cos - right * sin, left * sin + right * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)
