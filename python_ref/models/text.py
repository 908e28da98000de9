"""A small text encoder for captions, trained together with the video model.

It stands where Wan2.1 has a frozen umT5: captions go in, a context [B, text_len, text_dim] for cross-attention comes
out. The vocabulary is a fixed list of words, so a typing error in a prompt is found rather than silently ignored.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class TextEncoderConfig:
    """Sizes of the text encoder; `words` is its vocabulary."""

    words: list[str] = field(default_factory=list)
    text_len: int = 16  # words a caption may have
    text_dim: int = 64
    num_heads: int = 2
    num_layers: int = 1


class Vocabulary:
    """Words to numbers. Number 0 is padding, so the empty caption is all padding."""

    def __init__(self, words: Sequence[str], text_len: int) -> None:
        if not words:
            raise ValueError("words is empty; accepted: at least one word")
        if text_len < 1:
            raise ValueError(f"text_len is {text_len}; accepted: 1 or more")
        self.words = tuple(dict.fromkeys(word.lower() for word in words))
        self.text_len = text_len
        self._number = {word: number for number, word in enumerate(self.words, start=1)}

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Captions to word numbers [B, text_len] int64; ValueError names an unknown word or a caption too long."""
        numbers = torch.zeros(len(captions), self.text_len, dtype=torch.int64)
        for row, caption in enumerate(captions):
            words = caption.lower().replace(",", " ").split()
            if len(words) > self.text_len:
                raise ValueError(
                    f"caption {caption!r} has {len(words)} words; accepted: at most text_len = {self.text_len}"
                )
            for column, word in enumerate(words):
                if word not in self._number:
                    raise ValueError(
                        f"caption {caption!r} holds the unknown word {word!r}; accepted: {' '.join(self.words)}"
                    )
                numbers[row, column] = self._number[word]
        return numbers


class TextLayer(nn.Module):
    """One pre-norm transformer layer over the words; bidirectional, as an encoder of whole captions is."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, text_len, text_dim] to the same shape."""
        batch, length, dim = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, length, 3, self.num_heads, dim // self.num_heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, dim)
        x = x + self.out(attended)
        return x + self.ffn(self.norm2(x))


class TextEncoder(nn.Module):
    """Captions to context [B, text_len, text_dim]; `uncond(batch)` is the context of the empty caption."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        if config.text_dim % config.num_heads:
            raise ValueError(f"text_dim is {config.text_dim}; accepted: a multiple of num_heads = {config.num_heads}")
        self.config = config
        self.vocabulary = Vocabulary(config.words, config.text_len)
        self.word = nn.Embedding(len(self.vocabulary.words) + 1, config.text_dim)
        self.position = nn.Parameter(torch.randn(config.text_len, config.text_dim) * 0.02)
        self.layers = nn.ModuleList(TextLayer(config.text_dim, config.num_heads) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.text_dim)
        nn.init.normal_(self.word.weight, std=0.5)

    def forward(self, captions: Sequence[str]) -> Tensor:
        """Context of B captions, [B, text_len, text_dim]. ValueError for an unknown word or a caption too long."""
        numbers = self.vocabulary.encode(captions).to(self.position.device)
        x = self.word(numbers) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def uncond(self, batch: int) -> Tensor:
        """Context of the empty caption for classifier-free guidance (Ho and Salimans, arXiv 2207.12598)."""
        return self([""]).expand(batch, -1, -1)


def pad_texts(texts: Sequence[Tensor], text_len: int) -> Tensor:
    """Embeddings [tokens, text_dim] of B captions to a context float32 [B, text_len, text_dim], zeros at the end."""
    context = torch.zeros(len(texts), text_len, texts[0].shape[1])
    for row, tokens in zip(context, texts, strict=True):
        row[: len(tokens)] = tokens
    return context


def drop_captions(captions: Sequence[str], draws: Tensor, probability: float) -> list[str]:
    """Empties each caption whose draw [B] in [0, 1) is below `probability`, to learn the unconditional flow too."""
    return ["" if draw < probability else caption for caption, draw in zip(captions, draws.tolist(), strict=True)]
