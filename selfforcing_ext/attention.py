"""Block-causal attention: every query of a block sees the same few contiguous runs of keys (spans).

Source: Self-Forcing (arXiv 2506.08009), section 3; softmax attention as in arXiv 1706.03762, equation 1, computed
online as in FlashAttention-2 (arXiv 2307.08691).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from selfforcing_ext.checks import check_alike, check_float_tensor, check_head_dim, check_heads
from selfforcing_ext.library import call, nvtx_range, ops, register_autograd
from selfforcing_ext.mask import BlockCausalMask, SpanTable, full_span_table


@overload
def block_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockCausalMask | None = None,
    softmax_scale: float | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def block_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockCausalMask | None = None,
    softmax_scale: float | None = None,
    *,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@nvtx_range("block_causal_attention")
def block_causal_attention(
    q: Tensor,  # [B, Lq, H, D]
    k: Tensor,  # [B, Lk, H_kv, D]
    v: Tensor,  # [B, Lk, H_kv, D]
    mask: BlockCausalMask | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of each query over the keys that the mask shows it. Differentiable in q, k and v.

    Args:
        q, k, v: float32, bfloat16 or float16, all of one dtype and on one device. D is a multiple of 8 up to 256; H_kv
            divides H, and query head h reads K/V head h // (H / H_kv). The last dimension is contiguous, the other
            strides are free. Under autocast they are cast as scaled_dot_product_attention casts them. Sums are float32.
        mask: who sees whom; Lq and Lk are then its seqlen. None: every query sees every key.
        softmax_scale: factor on q.k before the softmax; None: D ** -0.5.
        return_lse: also return the logarithm of the softmax denominator; gradient flows through it as well.

    Returns:
        out [B, Lq, H, D], contiguous, in the dtype of q; and if asked lse, float32 [B, H, Lq], natural logarithm. A
        query that sees no key gets 0 and -inf. Same inputs, same device and same thread count give the same bits.

    Raises:
        TypeError: a dtype that is not accepted or not shared, or a mask of another type.
        ValueError: devices, ranks or sizes that do not fit each other or the mask, or a last dimension that is not
            contiguous.
    """
    q, k, v = op_inputs(q=q, k=k, v=v)
    check_shapes(q, k, v)
    table = full_table(q.shape[1], k.shape[1], q.device) if mask is None else _table_of(mask, q, k)
    out, lse = attention_over_spans(q, k, v, table, softmax_scale=softmax_scale)
    return (out, lse) if return_lse else out


class Past(NamedTuple):
    """Cached keys and values of one layer, as the op takes them (csrc/geometry/pages.h)."""

    k_pages: Tensor  # [P, page_size, H_kv, D]; quantised int8, float8_e4m3fn, or uint8 [.., D / 2] for int4
    v_pages: Tensor
    page_table: Tensor  # int32 [B, T]
    spans: Tensor  # int32 [B, G, S, 4], see span_records; G is 1 or H_kv
    k_scales: Tensor | None = None  # of quantised pages: bfloat16 [P, page_size, H_kv, 1 (int4: D / 32)]
    v_scales: Tensor | None = None
    k_offset: Tensor | None = None  # float32 [H_kv, D]
    rope_table: Tensor | None = None  # float32 [entries, 2]: keys are rotated when read
    rope_grid: Sequence[int] = ()  # its positions along frames, rows and columns


NO_PAST = (None,) * (len(Past._fields) - 1) + ((),)


def span_records(spans: Tensor, bias: Tensor | float = 0.0, first_token: Tensor | int = 0) -> Tensor:
    """Spans [..., S, 2] of positions as the op takes them: int32 [..., S, 4].

    Args:
        spans: half-open, sorted and disjoint; empty ones have start == end.
        bias: added to the scores, natural units; broadcasts to [..., S].
        first_token: with ``rope_table``: the number of each span's first token, counted from frame 0 of the table.
    """
    shape = spans.shape[:-1]
    biases = torch.as_tensor(bias, dtype=torch.float32, device=spans.device).expand(shape).contiguous()
    tokens = torch.as_tensor(first_token, dtype=torch.int32, device=spans.device).expand(shape)
    return torch.cat((spans.int(), tokens.unsqueeze(-1), biases.view(torch.int32).unsqueeze(-1)), dim=-1)


def attention_over_spans(
    q: Tensor,  # [B, Lq, H, D]
    k: Tensor,  # [B, Lk, H_kv, D]
    v: Tensor,  # [B, Lk, H_kv, D]
    table: SpanTable,
    past: Past | None = None,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The op behind the public functions: out [B, Lq, H, D] and lse [B, H, Lq].

    ``past``: keys that every query sees besides those of the table, constant to autograd.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    out, lse = call(ops.attention, q, k, v, *table.tensors(), *(past or NO_PAST), scale)
    return out, lse


def op_inputs(**tensors: Tensor) -> tuple[Tensor, ...]:
    """The named tensors in a dtype that the op takes: in autocast's, as scaled_dot_product_attention sees them, or as
    they are without autocast. Raises TypeError for what is no float32, bfloat16 or float16 tensor."""
    for name, tensor in tensors.items():
        check_float_tensor(name, tensor)
    values = tuple(tensors.values())
    device_type = values[0].device.type
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return values
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(tensor.to(dtype) for tensor in values)


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises TypeError or ValueError unless q, k and v fit each other and the op."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_heads(name, tensor, "[B, Lq, H, D]" if name == "q" else "[B, Lk, H_kv, D]")
    check_alike("k", k, "q", q)
    check_alike("v", v, "q", q)
    batch, _, heads, head_dim = q.shape
    key_batch, _, key_heads, key_dim = k.shape
    check_head_dim("q", head_dim)
    if key_batch != batch or key_dim != head_dim:
        raise ValueError(
            f"k has shape {list(k.shape)}, but must have the batch size {batch} and head dim {head_dim} of q"
        )
    if key_heads == 0 or heads % key_heads:
        raise ValueError(
            f"k has {key_heads} heads, but must have a number of heads that divides the {heads} heads of q"
        )
    if v.shape != k.shape:
        raise ValueError(f"v has shape {list(v.shape)}, but must have shape {list(k.shape)} like k")


def _table_of(mask: BlockCausalMask, q: Tensor, k: Tensor) -> SpanTable:
    if not isinstance(mask, BlockCausalMask):
        raise TypeError(f"mask is a {type(mask).__name__}, but must be a BlockCausalMask or None")
    for name, tensor in (("q", q), ("k", k)):
        if tensor.shape[1] != mask.seqlen:
            raise ValueError(f"{name} has {tensor.shape[1]} tokens, but mask.seqlen is {mask.seqlen}")
    return mask.spans(q.device)


def full_table(num_queries: int, num_keys: int, device: torch.device) -> SpanTable:
    """The table in which every query sees every key, made once per shape and device."""
    if not torch.compiler.is_compiling():
        return full_span_table(num_queries, num_keys, device)
    # In a compiled graph the lengths may be symbols: the table is made from them, so that others need no new graph.
    values = torch.tensor([0, num_queries, 0, num_keys, 0, 1], dtype=torch.int32, device=device)
    queries, keys, offsets = values[0:2], values[2:4], values[4:6]
    return SpanTable(queries, offsets, keys.view(1, 2), keys, offsets, queries.view(1, 2))


@torch.library.register_fake("selfforcing::attention")
def _attention_fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


@torch.library.register_fake("selfforcing::attention_backward")
def _attention_backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


torch.library.register_fake("selfforcing::attention_backward_through_past", _attention_backward_fake)

_NUM_GEOMETRY = 6 + len(Past._fields)  # arguments after q, k, v: the span table, the past


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *geometry, ctx.rope_grid, ctx.softmax_scale = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, *geometry)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, *geometry = ctx.saved_tensors
    nothing = (None,) * (_NUM_GEOMETRY + 1)
    if grad_out is None and grad_lse is None:
        return (None, None, None, *nothing)
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    arguments = (grad_out, grad_lse, q, k, v, out, lse, *geometry, ctx.rope_grid, ctx.softmax_scale)
    return (*call(ops.attention_backward, *arguments), *nothing)


def _no_second_derivative(*_: Any) -> None:
    raise NotImplementedError("attention can be differentiated once, but not twice")


register_autograd("attention", _backward, _setup_context)
register_autograd("attention_backward", _no_second_derivative)
