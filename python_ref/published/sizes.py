"""The sizes of Wan2.1's text-to-video models (arXiv 2503.20314, table 2; their published configurations)."""

from python_ref.config import ModelConfig

_COMMON = {"freq_dim": 256, "patch_size": [1, 2, 2], "position_embedding": False, "text_len": 512, "text_dim": 4096}
_DIFFERING = {
    "Wan2.1-T2V-1.3B": {"dim": 1536, "num_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    "Wan2.1-T2V-14B": {"dim": 5120, "num_heads": 40, "num_layers": 40, "ffn_dim": 13824},
}
NAMES = tuple(_DIFFERING)


def model_config(name: str) -> ModelConfig:
    """The sizes of a published model; ValueError for another name."""
    if name not in _DIFFERING:
        raise ValueError(f"model is {name!r}; accepted: {', '.join(NAMES)}")
    return ModelConfig(**_COMMON, **_DIFFERING[name])
