"""Dropout as an argument of a network."""

from torch import nn


def dropout(share: float) -> nn.Dropout:
    """The layer that drops ``share`` of its inputs in training.

    Raises:
        ValueError: ``share`` is not a number in [0, 1).
    """
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
        raise ValueError(f"dropout should be a number in [0, 1), got {share!r}")
    return nn.Dropout(share)
