"""Our attention, rotary embedding and cache in the published Self-Forcing models.

    from selfforcing_ext.integrations.self_forcing import accelerate
    accelerate(generator)

The models are known by their form and not imported: a model has ``blocks``, and each block a ``self_attn`` with the
projections ``q, k, v, o``, the norms ``norm_q, norm_k`` and ``num_heads, head_dim``. A causal one (``CausalWanModel``
of Self-Forcing, arXiv 2506.08009) is called as ``self_attn(x, seq_lens, grid_sizes, freqs, block_mask, kv_cache,
current_start, cache_start)``, a bidirectional one (``WanModel``, arXiv 2503.20314) with the first four alone.

Only ``forward`` of the attention modules changes: parameters, state dict and everything around stay as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import MutableMapping
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from selfforcing_ext.attention import block_causal_attention
from selfforcing_ext.checks import check_head_dim
from selfforcing_ext.integrations.self_forcing_cache import LayerCache, PagedCacheList, attend_with_dict
from selfforcing_ext.kv_cache import PagedKVCache
from selfforcing_ext.mask import BlockCausalMask, SpanTable
from selfforcing_ext.rope import qk_norm_rope, rope_3d

__all__ = ["LayerCache", "PagedCacheList", "accelerate", "make_kv_cache", "restore"]

Model = TypeVar("Model", bound=nn.Module)
Grid = tuple[int, int, int]  # tokens along (frames, rows, columns)

BIDIRECTIONAL_ARGUMENTS = ("x", "seq_lens", "grid_sizes", "freqs")
CAUSAL_ARGUMENTS = (*BIDIRECTIONAL_ARGUMENTS, "block_mask", "kv_cache", "current_start", "cache_start")
ATTENTION_PARTS = ("q", "k", "v", "o", "norm_q", "norm_k", "num_heads", "head_dim")
CAUSAL_PARTS = ("local_attn_size", "sink_size")
CAUSAL_SETTINGS = ("num_frame_per_block", "independent_first_frame", "local_attn_size")  # of the model
MASK_MAKERS = (
    "_prepare_blockwise_causal_attn_mask",
    "_prepare_blockwise_causal_attn_mask_i2v",
    "_prepare_teacher_forcing_mask",
)


def accelerate(model: Model) -> Model:
    """Lets every self-attention of the model compute with our ops. In place; ``restore`` undoes it.

    * Training: the mask follows from the model's ``num_frame_per_block``, ``independent_first_frame`` and
      ``local_attn_size`` and from the latents of the call, so that they may change from call to call; no FlexAttention
      mask is made. One that is there already (``model.block_mask``) is compared with it when it is first used. Any
      batch size, and any length: nothing is padded, and multiples of 128 are lengths like others.
    * Inference and rollouts: ``kv_cache`` is the pipelines' list of dicts, or what ``make_kv_cache`` returns. Cached
      keys and values are constant to autograd (as the paper has it; the published code lets gradient leak through).
    * Bidirectional models: attention over the ``seq_lens`` first tokens.

    Queries and keys are normalised and rotated in one pass in float32 where the norms are RMS norms over all channels;
    other norms are called as they are.

    Args:
        model: a model of the family or a module that holds some, such as a ``WanDiffusionWrapper``.

    Returns:
        The model. Doing it twice changes nothing.

    Raises:
        ValueError: a model that is not of the family, or whose attention was replaced by something else (sequence
            parallelism, for example). The model is unchanged then.
    """
    hosts = _hosts(model)
    forwards = [_make_forward(host, *attention) for host in hosts for attention in _attentions(host)]
    for forward in forwards:
        forward.attn.forward = forward
    for host in hosts:
        for name in MASK_MAKERS:
            if hasattr(host, name):
                setattr(host, name, _no_block_mask)
    return model


def restore(model: Model) -> Model:
    """Undoes ``accelerate``. Caches in dict form can be used further; those of ``make_kv_cache`` cannot.

    Returns:
        The model, as it was. A model that is not accelerated stays as it is.

    Raises:
        ValueError: a model that is not of the family.
    """
    for host in _hosts(model):
        for _, attn in _attentions(host):
            if isinstance(vars(attn).get("forward"), _Forward):
                del attn.forward
        for name in MASK_MAKERS:
            if vars(host).get(name) is _no_block_mask:
                delattr(host, name)
    return model


def make_kv_cache(
    model: nn.Module,
    batch_size: int,
    frame_seqlen: int,
    max_frames: int | None = None,
    page_size: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> PagedCacheList:
    """A cache in pages for an accelerated model, to be held and passed in place of the list of dicts.

    It keeps what a list of dicts of ``local_attn_size`` frames keeps (all frames if that is -1): the ``sink_size``
    first frames and the newest. But eviction moves no memory, and pages are made for what the window holds alone.

    Args:
        model: an accelerated causal model or a module that holds one.
        batch_size: videos generated together.
        frame_seqlen: tokens of a latent frame (a pipeline's ``frame_seq_length``).
        max_frames, page_size: as in ``PagedKVCache``.
        dtype, device: of keys and values. None: those of the model's weights.

    Raises:
        ValueError: not exactly one causal model, or one that is not accelerated; numbers out of range.
        TypeError: a dtype that is not float32, bfloat16 or float16.
    """
    hosts = [host for host in _hosts(model) if hasattr(host, CAUSAL_SETTINGS[0])]
    if len(hosts) != 1:
        raise ValueError(f"model is a {type(model).__name__} with {len(hosts)} causal models, but must have one")
    attentions: list[Any] = [attn for _, attn in _attentions(hosts[0])]
    if not all(isinstance(vars(attn).get("forward"), _CausalForward) for attn in attentions):
        raise ValueError("model is not accelerated, and its own attention cannot use pages: call accelerate(model)")
    attn = attentions[0]
    return PagedCacheList(
        PagedKVCache(
            num_layers=len(attentions),
            num_heads=attn.num_heads,
            head_dim=attn.head_dim,
            frame_seqlen=frame_seqlen,
            batch_size=batch_size,
            window_frames=_window(attn.local_attn_size),
            sink_frames=0 if _window(attn.local_attn_size) is None else attn.sink_size,
            max_frames=max_frames,
            page_size=page_size,
            dtype=attn.q.weight.dtype if dtype is None else dtype,
            device=attn.q.weight.device if device is None else device,
        )
    )


class _Forward:
    """What stands in for ``attn.forward``. No module, so that it appears in no list of modules or parameters.

    Calls stay outside of compiled graphs: sizes and positions are numbers here, which change as a rollout advances.
    """

    def __init__(self, attn: nn.Module) -> None:
        self.attn: Any = attn

    def _project(self, x: Tensor, grid: Grid, start_frame: int = 0, copies: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, normalised and rotated, and values, [B, L, H, D]. ``copies`` sequences of ``grid`` follow
        each other in x and have the same positions."""
        attn = self.attn
        q = self._norm_and_rotate(attn.q(x), attn.norm_q, grid, start_frame, copies)
        k = self._norm_and_rotate(attn.k(x), attn.norm_k, grid, start_frame, copies)
        return q, k, self._split_heads(attn.v(x))

    def _norm_and_rotate(self, x: Tensor, norm: Any, grid: Grid, start_frame: int, copies: int) -> Tensor:
        batch, num_tokens, channels = x.shape
        x = x.reshape(batch * copies, num_tokens // copies, channels)
        if _is_rms_norm(norm, channels):
            rotated = qk_norm_rope(x, norm.weight, self.attn.num_heads, grid, start_frame, norm.eps)
        else:
            rotated = rope_3d(self._split_heads(norm(x).to(x.dtype)), grid, start_frame)
        return rotated.view(batch, num_tokens, *rotated.shape[2:])

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.attn.num_heads, self.attn.head_dim)


class _BidirectionalForward(_Forward):
    @torch.compiler.disable
    def __call__(self, x: Tensor, seq_lens: Tensor, grid_sizes: Tensor, freqs: Tensor) -> Tensor:
        grid = _common_grid(grid_sizes)
        _check_frequencies(freqs, self.attn.head_dim)
        num_tokens = grid[0] * grid[1] * grid[2]
        if set(seq_lens.tolist()) != {num_tokens}:
            raise ValueError(
                f"seq_lens is {seq_lens.tolist()}, but must be {num_tokens}, the tokens of grid_sizes {grid}"
            )
        # Nobody attends to padding, and its output is thrown away.
        q, k, v = self._project(x[:, :num_tokens], grid)
        out: Tensor = self.attn.o(block_causal_attention(q, k, v).flatten(2))
        return nn.functional.pad(out, (0, 0, 0, x.shape[1] - num_tokens))


class _CausalForward(_Forward):
    def __init__(self, attn: nn.Module, host: nn.Module) -> None:
        super().__init__(attn)
        self.host: Any = host

    @torch.compiler.disable
    def __call__(
        self,
        x: Tensor,  # [B, L, C]
        seq_lens: Tensor,  # [B]
        grid_sizes: Tensor,  # [B, 3]
        freqs: Tensor,  # complex [positions, head_dim / 2]
        block_mask: Any,
        kv_cache: MutableMapping[str, Any] | None = None,
        current_start: int = 0,
        cache_start: int | None = None,  # unused, as in the published code
    ) -> Tensor:
        grid = _common_grid(grid_sizes)
        _check_frequencies(freqs, self.attn.head_dim)
        if kv_cache is None:
            out = self._attend_with_mask(x, grid, block_mask)
        else:
            out = self._attend_with_cache(x, grid, grid_sizes, kv_cache, int(current_start))
        attended: Tensor = self.attn.o(out.flatten(2))
        return attended

    def _attend_with_mask(self, x: Tensor, grid: Grid, block_mask: Any) -> Tensor:
        num_frames, frame_seqlen = grid[0], grid[1] * grid[2]
        copies = x.shape[1] // (num_frames * frame_seqlen)
        if x.shape[1] != copies * num_frames * frame_seqlen or copies not in (1, 2):
            raise ValueError(
                f"x has {x.shape[1]} tokens, but must have the {num_frames * frame_seqlen} of grid_sizes {grid}, or "
                "twice as many (teacher forcing)"
            )
        host, teacher_forcing = self.host, copies == 2
        window = None if teacher_forcing else _window(host.local_attn_size)  # as the published masks
        alone = bool(host.independent_first_frame)
        mask = _make_mask(num_frames, frame_seqlen, host.num_frame_per_block, window, alone, teacher_forcing)
        if block_mask is not None:
            _check_block_mask(block_mask, mask)
        return block_causal_attention(*self._project(x, grid, copies=copies), mask)

    def _attend_with_cache(
        self, x: Tensor, grid: Grid, grid_sizes: Tensor, kv_cache: MutableMapping[str, Any], current_start: int
    ) -> Tensor:
        attn, frame_seqlen = self.attn, grid[1] * grid[2]
        if current_start % frame_seqlen:
            raise ValueError(
                f"current_start is {current_start}, but must be a multiple of the {frame_seqlen} tokens of a frame of "
                f"grid_sizes {grid}; a pipeline's frame_seq_length must be that number"
            )
        start_frame = current_start // frame_seqlen
        q, k, v = self._project(x, grid, start_frame)
        if not isinstance(kv_cache, LayerCache):
            rolls, sink = attn.local_attn_size != -1, attn.sink_size * frame_seqlen
            # The published code takes 1560 tokens a frame for granted here; what it does is what it does.
            visible = getattr(attn, "max_attention_size", attn.local_attn_size * frame_seqlen if rolls else None)
            return attend_with_dict(kv_cache, current_start, q, k, v, rolls, sink, visible)
        if kv_cache.frame_seqlen != frame_seqlen:
            raise ValueError(
                f"kv_cache has frame_seqlen {kv_cache.frame_seqlen}, but frames of grid_sizes {grid} have "
                f"{frame_seqlen} tokens"
            )
        return kv_cache.attend(start_frame, grid_sizes, q, k, v)


# ---- Knowing a model by its form


def _hosts(model: nn.Module) -> list[nn.Module]:
    """The modules whose blocks have a self-attention. Wrappers that pass attributes on are none."""
    hosts = [
        module
        for module in model.modules()
        if isinstance(blocks := module._modules.get("blocks"), nn.ModuleList)
        and len(blocks)
        and all(hasattr(block, "self_attn") for block in blocks)
    ]
    if not hosts:
        raise ValueError(
            f"model is a {type(model).__name__}, but must be or hold a Wan model: a module with blocks that have "
            "a self_attn"
        )
    return hosts


def _attentions(host: Any) -> list[tuple[str, nn.Module]]:
    """Names and self-attentions of the blocks."""
    return [(f"blocks[{index}].self_attn", block.self_attn) for index, block in enumerate(host.blocks)]


def _make_forward(host: nn.Module, name: str, attn: nn.Module) -> _Forward:
    """Raises ValueError unless we know what this attention computes."""
    what = f"{name} of {type(host).__name__} is a {type(attn).__name__}"
    for part, module in ((name, attn), (type(host).__name__, host)):
        replaced = vars(module).get("forward")
        if isinstance(replaced, _Forward):
            return replaced
        if replaced is not None:
            by = getattr(replaced, "__qualname__", type(replaced).__name__)
            raise ValueError(
                f"{part} has its forward replaced by {by} (sequence parallelism, perhaps), which is not supported"
            )
    if hasattr(host, "_apply_cache_updates"):
        raise ValueError(f"{type(host).__name__} has _apply_cache_updates, as LongLive's has: not supported")
    arguments = tuple(inspect.signature(attn.forward).parameters)
    causal = arguments == CAUSAL_ARGUMENTS
    if not causal and arguments != BIDIRECTIONAL_ARGUMENTS:
        raise ValueError(
            f"{what} called with ({', '.join(arguments)}), but must be called with "
            f"({', '.join(CAUSAL_ARGUMENTS)}) or the first {len(BIDIRECTIONAL_ARGUMENTS)} of these"
        )
    missing = [part for part in (*ATTENTION_PARTS, *(CAUSAL_PARTS if causal else ())) if not hasattr(attn, part)]
    if missing:
        raise ValueError(f"{what} without {', '.join(missing)}, which is not an attention of the family")
    check_head_dim(f"{name}.head_dim", attn.head_dim)  # type: ignore[arg-type]
    if not causal:
        window = getattr(attn, "window_size", (-1, -1))
        if tuple(window) != (-1, -1):
            raise ValueError(f"{name}.window_size is {window}, but must be (-1, -1): every token sees every token")
        return _BidirectionalForward(attn)
    missing = [setting for setting in CAUSAL_SETTINGS if not hasattr(host, setting)]
    if missing:
        raise ValueError(f"{type(host).__name__} has no {', '.join(missing)}, but its attention is causal")
    _window(attn.local_attn_size)
    return _CausalForward(attn, host)


def _window(local_attn_size: Any) -> int | None:
    """As ``window_frames``."""
    if not isinstance(local_attn_size, int) or local_attn_size == 0 or local_attn_size < -1:
        raise ValueError(f"local_attn_size is {local_attn_size!r}, but must be a positive number of frames, or -1")
    return None if local_attn_size == -1 else local_attn_size


def _is_rms_norm(norm: nn.Module, channels: int) -> bool:
    """Whether ``qk_norm_rope`` may do the norm's work."""
    weight, eps = getattr(norm, "weight", None), getattr(norm, "eps", None)
    return (
        type(norm).__name__.endswith("RMSNorm")
        and isinstance(weight, Tensor)
        and weight.shape == (channels,)
        and isinstance(eps, float)
        and not (norm._forward_hooks or norm._forward_pre_hooks)
    )


# ---- Knowing a call by its arguments


def _common_grid(grid_sizes: Tensor) -> Grid:
    grids = {tuple(sizes) for sizes in grid_sizes.tolist()}
    if len(grids) != 1:
        raise ValueError(f"grid_sizes is {grid_sizes.tolist()}, but all videos of a batch must have one size")
    frames, rows, columns = grids.pop()
    return int(frames), int(rows), int(columns)


@lru_cache(maxsize=64)
def _make_mask(
    num_frames: int, frame_seqlen: int, frames_per_block: int, window: int | None, alone: bool, teacher_forcing: bool
) -> BlockCausalMask:
    return BlockCausalMask(num_frames, frame_seqlen, frames_per_block, window, 0, alone, teacher_forcing)


def _no_block_mask(*_: Any, **__: Any) -> None:
    """In place of a model's mask makers: the attention knows what it needs."""


_checked_masks: MutableMapping[Any, BlockCausalMask] = WeakIdKeyDictionary()
_checked_frequencies: MutableMapping[Tensor, int] = WeakIdKeyDictionary()


def _check_block_mask(block_mask: Any, mask: BlockCausalMask) -> None:
    """Raises ValueError unless a FlexAttention mask shows the first and the last query of every frame what ours shows
    them: masks of this family do not tell the tokens of a frame apart."""
    if _checked_masks.get(block_mask) == mask:
        return
    if not hasattr(block_mask, "mask_mod"):
        raise TypeError(
            f"block_mask is a {type(block_mask).__name__}, but must be a BlockMask of FlexAttention or None"
        )
    advice = "set block_mask of the model to None, and it follows from the model's settings"
    lengths = tuple(block_mask.shape[-2:])
    if min(lengths) < mask.seqlen:
        raise ValueError(f"block_mask is for {lengths} tokens, but x has {mask.seqlen}; {advice}")
    device = block_mask.kv_num_blocks.device
    starts = torch.arange(0, mask.seqlen, mask.frame_seqlen, device=device)
    queries = torch.cat((starts, starts + mask.frame_seqlen - 1)).unsqueeze(1)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    theirs = block_mask.mask_mod(zero, zero, queries, torch.arange(mask.seqlen, device=device))
    ours = _visible_keys(mask.spans(), queries.flatten().tolist()).to(device)
    if not torch.equal(theirs, ours):
        row, key = (int(i) for i in (theirs != ours).nonzero()[0])
        raise ValueError(
            f"block_mask and {mask}, which follows from the model's settings, differ: query {int(queries[row])} "
            f"{'sees' if theirs[row, key] else 'does not see'} key {key} in block_mask; {advice}"
        )
    _checked_masks[block_mask] = mask


def _visible_keys(table: SpanTable, queries: list[int]) -> Tensor:
    """bool [len(queries), keys]"""
    visible = torch.zeros(len(queries), table.num_keys, dtype=torch.bool)
    blocks = torch.searchsorted(table.block_starts, torch.tensor(queries, dtype=torch.int32), right=True) - 1
    offsets, spans = table.span_offsets.tolist(), table.spans.tolist()
    for row, block in enumerate(blocks.tolist()):
        for start, end in spans[offsets[block] : offsets[block + 1]]:
            visible[row, start:end] = True
    return visible


def _check_frequencies(freqs: Tensor, head_dim: int) -> None:
    """Raises ValueError unless the model turns its channels as ``rope_3d`` does."""
    if _checked_frequencies.get(freqs) == head_dim:
        return
    spatial = head_dim // 6
    pairs = [torch.arange(n, dtype=torch.float64) / n for n in (head_dim // 2 - 2 * spatial, spatial, spatial)]
    angles = torch.outer(torch.arange(freqs.shape[0], dtype=torch.float64), 10000.0 ** -torch.cat(pairs))
    ours = torch.polar(torch.ones_like(angles), angles)
    theirs = freqs.to("cpu", torch.complex128)
    if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=0, atol=1e-5):
        raise ValueError(
            "freqs is not the table of rotary embeddings of Wan2.1 (base 10000, channels split over frame, row and "
            "column), which is the only one supported"
        )
    _checked_frequencies[freqs] = head_dim
