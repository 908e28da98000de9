"""The algorithm in small pieces that work, and the pictures that explain them.

Thin: the rollout, the models and the schedule are those of ``python_ref``; only the ring cache is written out again, as
plainly as it can be.
"""

from python_ref.tutorial.algorithm.attention_pictures import (
    attention_by_frame,
    visualize_attention_by_frame,
    visualize_attention_masks,
)
from python_ref.tutorial.algorithm.cache import SimpleKVCache
from python_ref.tutorial.algorithm.cache_pictures import visualize_kv_cache_growth
from python_ref.tutorial.algorithm.diagram import create_algorithm_diagram
from python_ref.tutorial.algorithm.explanation import explain_self_forcing
from python_ref.tutorial.algorithm.generation_pictures import (
    visualize_autoregressive_generation,
    visualize_denoising_process,
    visualize_videos,
)
from python_ref.tutorial.algorithm.loss import SelfForcingLoss
from python_ref.tutorial.algorithm.pipeline import SimplifiedSelfForcingPipeline
from python_ref.tutorial.algorithm.recording import ModelCall, record_calls

__all__ = [
    "ModelCall",
    "SelfForcingLoss",
    "SimpleKVCache",
    "SimplifiedSelfForcingPipeline",
    "attention_by_frame",
    "create_algorithm_diagram",
    "explain_self_forcing",
    "record_calls",
    "visualize_attention_by_frame",
    "visualize_attention_masks",
    "visualize_autoregressive_generation",
    "visualize_denoising_process",
    "visualize_kv_cache_growth",
    "visualize_videos",
]
