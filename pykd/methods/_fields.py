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


def switch(name: str, value: object) -> None:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} should be true or false, got {value!r}")


def number(name: str, value: object) -> None:
    """A finite number."""
    if not _between(value, -math.inf, math.inf) or value == -math.inf:
        raise ValueError(f"{name} should be a finite number, got {value!r}")


def interval(low_name: str, low: object, high_name: str, high: object) -> None:
    """Two numbers in [0, 1] in order."""
    share(low_name, low)
    share(high_name, high)
    if low > high:  # type: ignore[operator]  # share has seen that they are numbers
        raise ValueError(f"{low_name} should not be above {high_name}, got {low!r} and {high!r}")


def names(name: str, value: object) -> None:
    """A list of names."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(each, str) for each in value):
        raise ValueError(f"{name} should be a list of names, got {value!r}")


def groups(name: str, value: object) -> None:
    """The groups of a block norm."""
    if value in ("in", "out", "kernel"):
        return
    if not (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and all(isinstance(side, int) and not isinstance(side, bool) and 1 <= side < 2**63 for side in value)
    ):
        raise ValueError(f"{name} should be in, out, kernel or two whole numbers of at least 1, got {value!r}")
