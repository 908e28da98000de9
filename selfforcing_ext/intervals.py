"""Half-open intervals ``[start, end)`` of whole numbers, in sorted lists in which none is empty and none touch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Interval = tuple[int, int]


def merge(intervals: Iterable[Interval]) -> list[Interval]:
    """Any intervals as such a list."""
    merged: list[Interval] = []
    for start, end in sorted(interval for interval in intervals if interval[0] < interval[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def intersect(a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval]:
    """What lies in both lists."""
    return merge((max(x[0], y[0]), min(x[1], y[1])) for x in a for y in b)


def subtract(a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval]:
    """What lies in ``a`` alone."""
    left = list(a)
    for start, end in b:
        left = [part for x in left for part in ((x[0], min(x[1], start)), (max(x[0], end), x[1]))]
    return merge(left)


def count(intervals: Iterable[Interval]) -> int:
    return sum(end - start for start, end in intervals)


def of_numbers(numbers: Iterable[int]) -> list[Interval]:
    """The intervals that hold exactly these numbers."""
    return merge((number, number + 1) for number in numbers)


def scale(intervals: Iterable[Interval], factor: int) -> list[Interval]:
    return [(start * factor, end * factor) for start, end in intervals]
