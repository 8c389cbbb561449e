"""What a method's fields may be: each function raises a ``ValueError`` that says so."""

import math


def _between(value: object, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high and value < math.inf


def share(name: str, value: object) -> None:
    """A number in [0, 1]."""
    if not _between(value, 0, 1):
        raise ValueError(f"{name} should be in [0, 1], got {value!r}")


def deviation(name: str, value: object) -> None:
    """A finite number that is not negative."""
    if not _between(value, 0, math.inf):
        raise ValueError(f"{name} should be finite and not negative, got {value!r}")


def positive(name: str, value: object) -> None:
    """A finite number above 0."""
    if not _between(value, 0, math.inf) or not value:
        raise ValueError(f"{name} should be finite and above 0, got {value!r}")


def count(name: str, value: object) -> None:
    """A whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} should be a whole number of at least 1, got {value!r}")


def word(name: str, value: object, *known: str) -> None:
    """One of the ``known`` words."""
    if value not in known:
        raise ValueError(f"{name} should be {' or '.join(known)}, got {value!r}")
