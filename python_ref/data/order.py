"""In which order a finite set is seen when training never ends."""

from functools import lru_cache

import numpy as np

from python_ref.data.moving_digits import hashed_uniform


def shuffled(first: int, size: int, count: int, seed: int) -> list[int]:
    """Items number `first` to `first + size - 1` of an endless sequence: every epoch is a permutation of range(count).

    Depends on its arguments alone.
    """
    places = (divmod(position, count) for position in range(first, first + size))
    return [int(_permutation(seed, epoch, count)[place]) for epoch, place in places]


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.argsort(hashed_uniform(seed, np.asarray([epoch]), count)[0], kind="stable")
