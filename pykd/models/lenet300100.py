"""LeNet-300-100 (LeCun et al., 1998), the multilayer perceptron of the papers on sparsity."""

from pykd.models.mlp import MLP


class LeNet300100(MLP):
    """Flattens an image; fully connected 300, 100 and ``classes`` with ReLU between them: ``MLP`` of these widths.

    Args:
        in_shape: (channels, height, width).
        classes: number of logits.
        dropout: share of either hidden layer's values that are dropped in training, in [0, 1).

    Raises:
        ValueError: a side or ``classes`` is not a positive integer, or ``dropout`` outside its range.

    Example:
        >>> sum(p.numel() for p in LeNet300100(in_shape=(1, 28, 28), classes=10).parameters())
        266610
    """

    def __init__(self, *, in_shape: tuple[int, int, int], classes: int, dropout: float = 0.0) -> None:
        super().__init__(in_shape=in_shape, classes=classes, widths=(300, 100), dropout=dropout)
