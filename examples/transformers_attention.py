"""Models of Hugging Face transformers with our attention: a language model, an image encoder, and block-causal prefill.

    python examples/transformers_attention.py

The models are small and random; what is shown is that their outputs stay the same, and how a mask that a model does not
know gets into it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, ViTConfig

sys.path.insert(0, str(Path(__file__).parents[1]))

from selfforcing_ext import BlockCausalMask
from selfforcing_ext.integrations.transformers import block_causal, register

FRAMES, FRAME_TOKENS = 6, 16


def difference(mine: Tensor, theirs: Tensor) -> str:
    return f"{float((mine - theirs).norm() / theirs.norm()):.1e}"


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    register()  # the one line; "selfforcing" is now a value of attn_implementation

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="selfforcing").eval()
    tokens = torch.randint(1, 256, (2, FRAMES * FRAME_TOKENS))
    mine = model(tokens).logits
    model.set_attn_implementation("eager")
    print("Llama, causal: difference to eager attention", difference(mine, model(tokens).logits))

    # A video of discrete tokens: a block of three frames is seen as a whole, and by the blocks after it.
    mask = BlockCausalMask(FRAMES, FRAME_TOKENS, frames_per_block=3)
    dense = torch.where(mask.dense(), 0.0, torch.finfo(torch.float32).min)[None, None]
    theirs = model(tokens, attention_mask=dense).logits
    model.set_attn_implementation("selfforcing")
    with block_causal(mask):
        print("Llama, block-causal: difference to a dense mask", difference(model(tokens).logits, theirs))
        continued = model.generate(tokens, max_new_tokens=20, do_sample=False)
    print("Llama, block-causal prompt, then token by token:", tuple(continued.shape))

    encoder = AutoModel.from_config(
        ViTConfig(hidden_size=192, intermediate_size=384, num_hidden_layers=4, num_attention_heads=3, image_size=64),
        attn_implementation="selfforcing",
    ).eval()
    pixels = torch.randn(2, 3, 64, 64)
    mine = encoder(pixels).last_hidden_state
    encoder.set_attn_implementation("eager")
    print("ViT: difference to eager attention", difference(mine, encoder(pixels).last_hidden_state))


if __name__ == "__main__":
    main()
