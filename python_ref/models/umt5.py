"""Wan2.1's text encoder: the umT5 of `transformers` (arXiv 2304.09151), frozen.

`pip install selfforcing_ext[real]` brings what is needed.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from python_ref.models.text import pad_texts


class WanTextEncoder:
    """Captions to contexts. It is no part of a model and is not saved with it.

    Args:
        folder: of a pipeline of diffusers, with `text_encoder/` (UMT5EncoderModel) and `tokenizer/`.
        text_len: tokens of a context; longer captions are cut.
        negative_prompt: what stands for the empty caption, as Wan2.1 samples and Self-Forcing trains.
        dtype: of the encoder's weights.
        device: where it runs; what it returns is on the CPU.

    Raises:
        ImportError: without transformers.
        FileNotFoundError: a folder without the two.
    """

    def __init__(
        self,
        folder: str | Path,
        text_len: int = 512,
        negative_prompt: str = "",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        for part in ("text_encoder", "tokenizer"):
            if not (Path(folder) / part).is_dir():
                raise FileNotFoundError(f"{folder} has no folder {part}; accepted: the folder of a diffusers pipeline")
        from transformers import AutoTokenizer, UMT5EncoderModel  # optional, and slow to import

        self.tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "tokenizer", local_files_only=True)
        self.encoder = UMT5EncoderModel.from_pretrained(
            Path(folder) / "text_encoder", local_files_only=True, dtype=dtype
        )
        self.encoder.eval().requires_grad_(False).to(device)
        self.text_len = text_len
        self.negative_prompt = negative_prompt

    @torch.no_grad()
    def tokens(self, captions: Sequence[str]) -> list[Tensor]:
        """The embeddings of each caption's tokens, [tokens, text_dim] each; the last token ends the text."""
        texts = [clean(caption or self.negative_prompt) for caption in captions]
        encoded = self.tokenizer(
            texts, padding="longest", max_length=self.text_len, truncation=True, return_tensors="pt"
        ).to(self.encoder.device)
        hidden = self.encoder(encoded.input_ids, encoded.attention_mask).last_hidden_state.cpu()
        return [row[:length] for row, length in zip(hidden, encoded.attention_mask.sum(1).tolist(), strict=True)]

    def embed(self, captions: Sequence[str]) -> Tensor:
        """Context float32 [B, text_len, text_dim], zeros after a caption's tokens."""
        return pad_texts(self.tokens(captions), self.text_len)


def clean(text: str) -> str:
    """Without HTML entities, with single spaces. Wan2.1 also repairs broken encodings (ftfy), which this does not."""
    return " ".join(html.unescape(html.unescape(text)).split())
