"""Low-rank adapters on a video model (LoRA, arXiv 2106.09685), by the `peft` library: W becomes W + (alpha / rank) B A,
and only A and B learn."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from python_ref.models.wan import WanBackbone

ADAPTED = r"blocks\.\d+\.(self_attn|cross_attn)\.[qkvo]|blocks\.\d+\.ffn\.[02]"  # the projections of every layer


def add_lora(model: WanBackbone, rank: int, alpha: float) -> None:
    """Puts adapters on the projections of every layer, in place; all other weights are fixed from now on.

    At first the model computes what it did before. A is drawn from torch's default generator.

    Raises:
        ImportError: `peft` is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError(
            "adapters need the package peft: pip install peft, or set self_forcing.lora_rank=0"
        ) from error
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=ADAPTED), model)


@torch.no_grad()
def merged_weights(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module as if it had no adapters: their products are added to the weights that they are on, which
    have their usual names."""
    weights = dict(module.state_dict())
    for name, layer in module.named_modules():
        if hasattr(layer, "get_delta_weight"):  # a layer with an adapter
            state = {key: weights.pop(key) for key in list(weights) if key.startswith(f"{name}.")}
            weights[f"{name}.weight"] = state[f"{name}.base_layer.weight"] + layer.get_delta_weight("default")
            weights[f"{name}.bias"] = state[f"{name}.base_layer.bias"]
    return weights
