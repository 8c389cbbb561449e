"""The weights and their groups, as several ops take them."""

from collections.abc import Sequence
from operator import index

from torch import Tensor

Groups = str | tuple[int, int]
Weights = Tensor | Sequence[Tensor]

_NAMED = {"in": 0, "out": 1, "kernel": 2}
_BLOCKS = 3
_LINF = {"l1_l2": False, "l1_linf": True}


def as_list(op: str, argument: str, weights: Weights | None) -> list[Tensor]:
    """One weight as a list of one, none as an empty list."""
    if weights is None:
        return []
    if isinstance(weights, Tensor):
        return [weights]
    found = list(weights) if isinstance(weights, Sequence) else [weights]
    for weight in found:
        if not isinstance(weight, Tensor):
            raise TypeError(f"{op}: {argument} must be a Tensor or a list of them, got {type(weight).__name__}")
    return found


def packed(op: str, groups: Groups, norm: str) -> tuple[int, int, int, bool]:
    """As the schema has them: groups, rows, columns, linf."""
    if not isinstance(norm, str) or norm not in _LINF:
        raise ValueError(f"{op}: norm must be one of {', '.join(_LINF)}, got {norm!r}")
    if isinstance(groups, str) and groups in _NAMED:
        return _NAMED[groups], 0, 0, _LINF[norm]
    try:
        rows, columns = (index(size) for size in (() if isinstance(groups, str) else groups))
    except (TypeError, ValueError):
        rows = columns = 0
    if not (1 <= rows < 2**63 and 1 <= columns < 2**63):
        raise ValueError(f"{op}: groups must be in, out, kernel or (rows, columns) of ints >= 1, got {groups!r}")
    return _BLOCKS, rows, columns, _LINF[norm]
