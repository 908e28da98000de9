"""Wan-style video diffusion transformers and the caption encoder."""
