"""The folder of a diffusers pipeline of Wan2.1 in miniature: random tokenizer, text encoder and autoencoder."""

from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

TEXT_DIM = 16
CHANNELS = 4  # of the latents


def write_pipeline(folder: Path, words: Iterable[str]) -> Path:
    """Writes it, for captions of these words."""
    torch.manual_seed(0)
    vocabulary = {word: number for number, word in enumerate(("<pad>", "</s>", "<unk>", *dict.fromkeys(words)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "tokenizer")
    UMT5EncoderModel(
        UMT5Config(vocab_size=len(vocabulary), d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    ).save_pretrained(folder / "text_encoder")
    AutoencoderKLWan(
        base_dim=4,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.0, 0.3],
        latents_std=[2.0, 1.5, 3.0, 1.0],
    ).save_pretrained(folder / "vae")
    return folder
