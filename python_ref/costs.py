"""What a Wan-style model costs: parameters, floating-point operations, and the memory that backward needs.

Plain arithmetic over the sizes of a model, so that it can be planned without a GPU. tests/test_plan.py holds it against
what torch counts and what autograd really keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from python_ref.models.wan import WanModel
from python_ref.models.wan_layers import WanConfig

WIDE = 4  # bytes: the residual stream and statistics are float32


@dataclass(frozen=True)
class Flops:
    """Floating-point operations, a multiplication and an addition being two; small elementwise ones are left out."""

    linear: float = 0.0  # in products with weights
    attention: float = 0.0  # in products of queries, keys and values

    @property
    def total(self) -> float:
        return self.linear + self.attention

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.linear + other.linear, self.attention + other.attention)

    def __mul__(self, factor: float) -> Flops:
        return Flops(self.linear * factor, self.attention * factor)

    def backward(self, weights: bool = True) -> Flops:
        """Of the backward pass of these operations: a product per input, and one for the weights where they learn.
        Attention recomputes its scores, five products for the two of forward (arXiv 2205.14135)."""
        return Flops(self.linear * (2 if weights else 1), self.attention * 2.5)


def count_parameters(config: WanConfig) -> int:
    """Weights of a model of these sizes, counted on one without memory."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in WanModel(config, backend="reference").parameters())


def text_flops(config: WanConfig) -> Flops:
    """Of a caption: its embedding, and the keys and values of every layer (``encode_context``)."""
    embedding = config.text_dim * config.dim + config.dim**2
    keys_and_values = 2 * config.num_layers * config.dim**2
    return Flops(linear=2.0 * config.text_len * (embedding + keys_and_values))


def forward_flops(config: WanConfig, tokens: int, pairs: float, timesteps: int) -> Flops:
    """Of one video's pass through the model, its caption being encoded already.

    Args:
        config: sizes of the model.
        tokens: positions that are computed, L.
        pairs: how many keys the queries see, summed over queries; L * L in a bidirectional pass.
        timesteps: that are embedded: one, or one per frame.
    """
    dim, patch = config.dim, torch.Size(config.patch_size).numel()
    layer = 4 * dim**2 + 2 * dim**2 + 2 * dim * config.ffn_dim  # self-attention, cross-attention, feed-forward
    ends = patch * (config.in_dim + config.out_dim) * dim
    time = config.freq_dim * dim + dim**2 + 6 * dim**2
    keys = pairs + tokens * config.text_len
    return Flops(
        linear=2.0 * (tokens * (config.num_layers * layer + ends) + timesteps * time),
        attention=4.0 * config.num_layers * keys * dim,
    )


def layer_activation_bytes(config: WanConfig, tokens: int, timesteps: int, narrow: int) -> int:
    """What autograd keeps of one layer for its backward, per video and call, without weights and the caption.

    Args:
        config: sizes of the model.
        tokens, timesteps: as in ``forward_flops``.
        narrow: bytes of the dtype of products: 2 under autocast, 4 without.
    """
    dim = config.dim
    # float32: the residual stream where each of three norms and two gates reads it. In the dtype of products: inputs of
    # the projections (3), queries and keys before their norm (3), q, k, v and output of self-attention and q and output
    # of cross-attention (6); the feed-forward's hidden layer before and after its activation.
    channels = 5 * dim * WIDE + (12 * dim + 2 * config.ffn_dim) * narrow
    statistics = (3 * 2 + 3 + 2 * config.num_heads) * WIDE  # of the norms, of queries and keys, and of both softmaxes
    return tokens * (channels + statistics) + timesteps * 6 * dim * WIDE


def cast_weight_bytes(config: WanConfig, narrow: int) -> int:
    """The weights of a layer's products in the dtype of autocast, which each call that is differentiated makes anew and
    keeps for backward; none without autocast."""
    return 0 if narrow == WIDE else (6 * config.dim**2 + 2 * config.dim * config.ffn_dim) * narrow


def text_activation_bytes(config: WanConfig, videos: int, narrow: int) -> int:
    """What autograd keeps of the captions: keys before and after their norm and values, for every layer; and the
    weights that make them in the dtype of autocast."""
    texts = videos * config.text_len * config.num_layers * (3 * config.dim * narrow + WIDE)
    weights = 2 * config.num_layers * config.dim**2 + config.text_dim * config.dim + config.dim**2
    return texts + (0 if narrow == WIDE else weights * narrow)


def activation_bytes(
    config: WanConfig,
    tokens: int,
    timesteps: int,
    narrow: int,
    calls: int = 1,
    videos: int = 1,
    recompute: bool = False,
) -> int:
    """What autograd keeps of ``calls`` passes of equal length for backward, at its most.

    Args:
        config: sizes of the model.
        tokens, timesteps: of a call and video, as in ``forward_flops``.
        narrow: as in ``layer_activation_bytes``.
        calls: passes through the model before backward, all with the same captions.
        videos: that are computed together.
        recompute: activation checkpointing: of each layer only its input stays, and one layer at a time is whole.
    """
    layer = videos * layer_activation_bytes(config, tokens, timesteps, narrow) + cast_weight_bytes(config, narrow)
    texts = text_activation_bytes(config, videos, narrow)
    ends = videos * tokens * config.dim * (WIDE + narrow)  # what the head reads
    if not recompute:
        return calls * (config.num_layers * layer + ends) + texts
    inputs = config.num_layers * videos * tokens * config.dim * WIDE
    return calls * (inputs + ends) + layer + texts
