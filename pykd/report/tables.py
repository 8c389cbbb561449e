"""Tables, and the figures in their cells."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

CONFIDENCE = 0.95


def interval(differences: Sequence[float]) -> tuple[float, list[float] | None]:
    """The mean of paired differences and its 95 % interval by Student's t; None where there is one difference alone.

    >>> interval([0.5])
    (0.5, None)
    """
    from scipy.stats import t

    mean, count = statistics.fmean(differences), len(differences)
    if count == 1:
        return mean, None
    half = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * statistics.stdev(differences) / count**0.5
    return mean, [mean - half, mean + half]


def percent(shares: Sequence[float]) -> str:
    """Mean and sample standard deviation, in per cent.

    >>> percent([0.01, 0.02, 0.03]), percent([0.5])
    ('2.00 ± 1.00', '50.00')
    """
    deviation = f" ± {100 * statistics.stdev(shares):.2f}" if len(shares) > 1 else ""
    return f"{100 * statistics.fmean(shares):.2f}{deviation}"


def signed_percent(mean: float, low_high: Sequence[float] | None, digits: int = 2) -> str:
    """A difference with its interval, in per cent or points.

    >>> signed_percent(0.002, [-0.001, 0.005])
    '+0.20 [-0.10, +0.50]'
    """
    ends = [f"{100 * each:+.{digits}f}" for each in low_high or []]
    return f"{100 * mean:+.{digits}f}" + (f" [{', '.join(ends)}]" if ends else "")


def ran_with(environment: Mapping[str, Any]) -> dict[str, Any]:
    """What a record says of a run folder's ``environment.json``.

    >>> ran_with({"pykd": "1.0", "git": None, "argv": ["pykd", "compare"]})
    {'pykd': '1.0'}
    """
    return {key: environment[key] for key in ("pykd", "git", "torch", "cpu") if environment.get(key)}


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, aligned for a terminal; the first row is its head.

    >>> print(table([["a", "long"], ["10", "1"]]))
    | a  | long |
    | -- | ---- |
    | 10 | 1    |
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join("| " + " | ".join(map(str.ljust, cells, widths)) + " |" for cells in lines)
