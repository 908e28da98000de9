"""The check of arguments that are counts or numbers of things. It needs no compiled part."""

from __future__ import annotations


def check_integer(name: str, value: object, least: int) -> None:
    """Raises TypeError for what is no int, ValueError below ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}, but must be an int")
    if value < least:
        raise ValueError(f"{name} is {value}, but must be at least {least}")
