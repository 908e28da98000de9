"""Random generators that derive from what they are for, so that no generator state has to be kept or restored."""

import hashlib

import torch


def derived_generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator that depends on the seed and on what it is for, e.g. `("teacher", "step", 120)`."""
    digest = hashlib.blake2b(repr((seed, *purpose)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
