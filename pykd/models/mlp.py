"""A multilayer perceptron of any widths."""

import itertools
import math
from collections.abc import Sequence

from torch import nn

from pykd.models.dropout import dropout as drop


class MLP(nn.Sequential):
    """Flattens an image; fully connected layers with ReLU between them; no widths give a linear classifier.

    Args:
        in_shape: (channels, height, width).
        classes: number of logits.
        widths: of the hidden layers, in order.
        dropout: share of every hidden layer's values that are dropped in training, in [0, 1).

    Raises:
        ValueError: a width, a side or ``classes`` is not a positive integer, or ``dropout`` outside its range.

    Example:
        >>> MLP(in_shape=(1, 28, 28), classes=10, widths=(800, 800))[-1]
        Linear(in_features=800, out_features=10, bias=True)
    """

    def __init__(
        self,
        *,
        in_shape: tuple[int, int, int],
        classes: int,
        widths: Sequence[int] = (800, 800),
        dropout: float = 0.0,
    ) -> None:
        if not isinstance(widths, (list, tuple)):
            raise ValueError(f"widths should be a list of positive integers, got {widths!r}")
        sizes = [math.prod(in_shape), *widths, classes]
        if not all(isinstance(size, int) and not isinstance(size, bool) and size >= 1 for size in sizes):
            raise ValueError(f"widths and classes should be positive integers, got {list(widths)!r} and {classes!r}")
        activation = nn.Sequential(nn.ReLU(), drop(dropout))  # one layer: the weights have the same names without it
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in itertools.pairwise(sizes[:-1]):
            layers += [nn.Linear(inputs, outputs), activation]
        super().__init__(*layers, nn.Linear(sizes[-2], sizes[-1]))
