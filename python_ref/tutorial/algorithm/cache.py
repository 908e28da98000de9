"""A ring cache of keys and values in its simplest form."""

from __future__ import annotations

import torch
from torch import Tensor


class SimpleKVCache:
    """The newest ``max_length`` tokens of one attention layer, in memory that is taken once and never moved.

    Token number n lives in slot n mod ``max_length``: once the memory is full, a new token overwrites the oldest. The
    paged cache of the package does the same with pages of tokens, keeps sink frames out of the ring, and lets attention
    read pages where they are; here ``get_cache`` puts the tokens in order.

    Args:
        batch_size: videos that are generated together.
        max_length: tokens that are kept.
        num_heads: K/V heads.
        head_dim: channels per head.

    Attributes:
        num_tokens: tokens that were ever written.

    Source: the rolling KV cache of Self-Forcing (arXiv 2506.08009), section 3.4.
    """

    def __init__(self, batch_size: int, max_length: int, num_heads: int, head_dim: int) -> None:
        for name, value in (("batch_size", batch_size), ("max_length", max_length), ("num_heads", num_heads)):
            if value < 1:
                raise ValueError(f"{name} is {value}, but must be at least 1")
        self.max_length = max_length
        self.num_tokens = 0
        self._k = torch.zeros(batch_size, max_length, num_heads, head_dim)
        self._v = torch.zeros_like(self._k)

    @property
    def length(self) -> int:
        """Tokens that are kept."""
        return min(self.num_tokens, self.max_length)

    def update(
        self,
        k: Tensor,  # [B, L, H, D]
        v: Tensor,  # [B, L, H, D]
    ) -> None:
        """Takes the keys and values of the next L tokens, detached: the past is constant to autograd.

        The first update decides dtype and device.

        Raises:
            ValueError: a shape that is not the cache's, or more tokens at once than the cache holds.
        """
        batch, _, heads, channels = self._k.shape
        for name, tensor in (("k", k), ("v", v)):
            if tensor.dim() != 4 or tensor.shape != (batch, k.shape[1], heads, channels):
                raise ValueError(
                    f"{name} has shape {list(tensor.shape)}, but must be [B, L, H, D] = [{batch}, L, {heads}, "
                    f"{channels}], with one L for k and v"
                )
        new = k.shape[1]
        if new > self.max_length:
            raise ValueError(f"k has {new} tokens, but the cache holds max_length = {self.max_length}")
        if self.num_tokens == 0:
            self._k, self._v = self._k.to(k), self._v.to(v)
        slots = torch.arange(self.num_tokens, self.num_tokens + new, device=k.device) % self.max_length
        self._k[:, slots] = k.detach()
        self._v[:, slots] = v.detach()
        self.num_tokens += new

    def get_cache(self) -> tuple[Tensor, Tensor]:
        """Copies of the kept keys and values [B, length, H, D], oldest first."""
        oldest = self.num_tokens - self.length
        slots = torch.arange(oldest, self.num_tokens, device=self._k.device) % self.max_length
        return self._k[:, slots], self._v[:, slots]
