"""Definitions of the ops in plain PyTorch: obviously right, differentiable, any floating dtype, never optimised."""
