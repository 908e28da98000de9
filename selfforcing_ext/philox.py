"""Noise that is a function of a seed and of where it is wanted, so that kernels can draw it while they compute."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PhiloxNoise(NamedTuple):
    """Standard normal noise that ``denoise_step``, ``guided_denoise_step`` and ``add_noise`` draw themselves.

    The same seed and offset give the same noise, to the bit, on every processor and GPU, in every dtype (it is float32
    and not rounded before it is used) and whatever the number of threads; draws with different seeds or offsets are
    independent. ``python_ref.ops.philox.normal_noise`` writes the noise down.

    Both numbers are ints, or int64 tensors [1] or [B] on the device of the latents, which are read when the op runs: a
    CUDA graph that counts an offset on replays with new noise. With a seed for each entry of the batch, an entry's
    noise does not depend on which batch it is in.

    Element i of entry b, in the order [F, C, H, W], is number i % 4 of a block: the four words of Philox4x32-10 with
    the seed (low word first) as key and (i // 4, b, low word of the offset, its high word) as counter, 0 in place of b
    where every entry has its own seed, and these words in pairs through the Box-Muller transform.

    Source: Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11); Box and Muller, "A note on the
    generation of random normal deviates", 1958.
    """

    seed: int | Tensor
    #: Counts the draws: every draw of a seed has an offset of its own.
    offset: int | Tensor = 0
