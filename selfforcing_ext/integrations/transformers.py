"""Our attention in models of Hugging Face ``transformers``: ``attn_implementation="selfforcing"``.

``register()`` once, and every model that dispatches through the attention interface can be loaded with it, or switched
by ``model.set_attn_implementation("selfforcing")``. The mask arrives as transformers makes it: its mask function is
read into spans, exactly, once per forward pass. ``block_causal(mask)`` puts a BlockCausalMask in its place.

Token-causal attention of a whole sequence, where no two queries see the same keys, is left to torch's
scaled_dot_product_attention.

Tried with transformers 5.20 and 5.24. Source of the interface: its documentation, "Attention Interface".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from selfforcing_ext.attention import attention_over_spans, check_shapes, full_table, op_inputs
from selfforcing_ext.integrations.flex_attention import table_for
from selfforcing_ext.integrations.span_form import read_spans
from selfforcing_ext.library import nvtx_range
from selfforcing_ext.mask import BlockCausalMask, SpanTable, causal_span_table

NAME = "selfforcing"

# What some models ask of their attention beside a mask, and spans cannot give.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


def register() -> None:
    """Makes ``"selfforcing"`` a value of ``attn_implementation``. Registering again changes nothing."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, mask_spans)


@dataclass(frozen=True)
class PreparedMask:
    """What transformers carries from mask_spans to attention_forward: a span table, or None for token-causal attention
    of a whole sequence, which has one query per block and is left to torch.

    It looks four-dimensional: masks that ``generate`` prepares ahead (for static caches) pass the model's own making of
    masks as they are.
    """

    table: SpanTable | None
    shape: tuple[int, int, int, int]  # 1, 1, queries, keys
    ndim: ClassVar[int] = 4

    def to(self, device: torch.device | str) -> PreparedMask:
        return self if self.table is None else PreparedMask(self.table.to(device), self.shape)

    def contiguous(self) -> PreparedMask:
        """Itself: releases before 5.24 ask this of every prepared mask."""
        return self


class _Active:
    """The mask of ``block_causal``, for the whole process: threads that replicate a model see it as well.

    A plain attribute and not a context variable, so that torch.compile can read it and sees when it changes.
    """

    def __init__(self) -> None:
        self.mask: BlockCausalMask | None = None
        self.used = False


_active = _Active()


@contextmanager
def block_causal(mask: BlockCausalMask) -> Iterator[None]:
    """Models that run inside see by this mask instead of their own, in every layer (those with sliding windows too).

    The first forward pass takes the whole sequence of ``mask.seqlen`` tokens at once. Passes after it, with a cache,
    stand behind the mask's end and go by the model's own mask: ``generate`` prefills block by block and goes on token
    by token. Layers with activation checkpointing may be recomputed outside; a model that is checkpointed as a whole
    must run its backward pass inside as well.

    Raises:
        TypeError: mask is not a BlockCausalMask.
        ValueError: a model runs on another number of tokens, in pieces, or is an encoder with a decoder.
        RuntimeError: nothing inside asked for a mask, so that it had no effect; or block_causal is active already.
    """
    if not isinstance(mask, BlockCausalMask):
        raise TypeError(f"mask is a {type(mask).__name__}, but must be a BlockCausalMask")
    if _active.mask is not None:
        raise RuntimeError("block_causal is active already; masks cannot be nested")
    _active.mask, _active.used = mask, False
    try:
        yield
    finally:
        _active.mask = None
    if not _active.used:
        raise RuntimeError(
            'no model inside block_causal asked for a mask: load it with attn_implementation="selfforcing", and see '
            "that it makes its masks with transformers.masking_utils"
        )


@nvtx_range("transformers.attention_forward")
def attention_forward(
    module: nn.Module,
    query: Tensor,  # [B, H, Lq, D]
    key: Tensor,  # [B, H_kv, Lk, D]
    value: Tensor,  # [B, H_kv, Lk, D]
    attention_mask: PreparedMask | BlockMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in every layer.

    Args:
        module: the attention layer; its ``is_causal`` counts where there is neither a mask nor the argument.
        query, key, value: float32, bfloat16 or float16; D is a multiple of 8 up to 256. H_kv may divide H: keys and
            values are not repeated.
        attention_mask: what mask_spans returned, or a FlexAttention BlockMask of span form that was passed to the
            model. None: full attention, or token-causal if is_causal and Lq > 1.
        dropout: 0.
        scaling: factor on query.key; None: D ** -0.5.
        is_causal: see attention_mask.

    Returns:
        ([B, Lq, H, D], None): no attention weights.

    Raises:
        TypeError: attention_mask is of another type (a dense mask, for one), or a dtype is not accepted.
        ValueError: dropout, attention weights, soft capping, sinks or position biases are asked for, or shapes do not
            fit each other.
    """
    if dropout > 0:
        raise ValueError(f"dropout is {dropout}, but must be 0: set the attention dropout of the config to 0")
    if kwargs.get("output_attentions"):
        raise ValueError(
            'output_attentions is True, but there are no attention weights; use attn_implementation="eager"'
        )
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(
                f'this model\'s attention uses {name}, which spans do not have; use attn_implementation="eager"'
            )
    q, k, v = op_inputs(query=query.transpose(1, 2), key=key.transpose(1, 2), value=value.transpose(1, 2))
    check_shapes(q, k, v)
    table: SpanTable | None
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        table = (_causal_table if causal else full_table)(q.shape[1], k.shape[1], q.device)
    elif isinstance(attention_mask, PreparedMask):
        table = attention_mask.table
    elif isinstance(attention_mask, BlockMask):
        table = table_for(attention_mask, q, k)
    else:
        raise TypeError(
            f"attention_mask is a {type(attention_mask).__name__} made by the caller or by the model itself, but must "
            "be None, two-dimensional or a BlockMask when the model is called; for block-causal attention, call the "
            "model inside block_causal(mask)"
        )
    if table is not None:
        return attention_over_spans(q, k, v, table, softmax_scale=scaling)[0], None
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2), None


def mask_spans(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | PreparedMask | None = None,  # bool [B, tokens seen and new]
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **_: Any,
) -> PreparedMask:
    """The mask that transformers passes to every layer, as spans. Called once per forward pass and kind of layer.

    ``mask_function(batch, head, query, key)`` says who sees whom, at the positions that the offsets give; together with
    ``attention_mask``, which is False at padding. All sequences of the batch must see alike.

    Raises:
        ValueError: the sequences of the batch see different keys (prompts padded to one length, packed differently), a
            query sees too many runs of keys, or the lengths are not those of the mask of ``block_causal``.

    Warns:
        UserWarning: a long mask with few queries per block (a sliding window, a packed sequence): exact, but slow.
    """
    if isinstance(attention_mask, PreparedMask):
        return attention_mask
    shape = (1, 1, q_length, kv_length)
    if _active.mask is not None:
        table = _block_causal_table(_active.mask, q_length, kv_length, q_offset, kv_offset, device, config)
        if table is not None:
            return PreparedMask(table, shape)
    if attention_mask is None or (attention_mask.shape[1] >= kv_offset + kv_length and bool(attention_mask.all())):
        if mask_function is bidirectional_mask_function:
            return PreparedMask(full_table(q_length, kv_length, torch.device(device)), shape)
        if mask_function is causal_mask_function and q_offset + q_length == kv_offset + kv_length:
            return PreparedMask(_causal_table(q_length, kv_length, torch.device(device)), shape)

    def rows(start: int, end: int) -> Tensor:
        visible: Tensor = sdpa_mask(
            batch_size=batch_size,
            q_length=end - start,
            kv_length=kv_length,
            q_offset=q_offset + start,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=device,
        )[:, 0]  # [B, end - start, kv_length]
        unlike = visible != visible[:1]
        if bool(unlike.any()):
            batch, query, key = unlike.nonzero()[0].tolist()
            raise ValueError(
                f"all sequences of a batch must see alike, but query {start + query} sees key {key} in only one of the "
                f"sequences 0 and {batch}: run sequences of different lengths or packings one by one, without padding"
            )
        return visible[0]

    return PreparedMask(read_spans(rows, q_length, kv_length, name="the mask").to(device), shape)


def _causal_table(q_length: int, kv_length: int, device: torch.device) -> SpanTable | None:
    """The last query stands at the last key. None: the whole sequence, of more than one token."""
    if q_length == 1:
        return full_table(q_length, kv_length, device)
    return None if q_length == kv_length else causal_span_table(q_length, kv_length, device)


def _block_causal_table(
    mask: BlockCausalMask,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    device: torch.device | str,
    config: Any,
) -> SpanTable | None:
    """The table of a forward pass inside ``block_causal``; None behind the end of the mask."""
    _active.used = True
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            "block_causal is for models with self-attention alone, but this one is an encoder with a decoder"
        )
    if q_offset >= mask.seqlen:
        return None
    if q_offset != 0 or kv_offset != 0 or q_length != mask.seqlen or kv_length != mask.seqlen:
        raise ValueError(
            f"the model runs on tokens {int(q_offset)} to {int(q_offset) + q_length} with room for {kv_length} keys, "
            f"but inside block_causal the first pass must be on all {mask.seqlen} tokens of the mask, with no cache or "
            "one that grows"
        )
    return mask.spans(device)
