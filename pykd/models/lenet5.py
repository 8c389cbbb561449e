"""LeNet-5 (LeCun et al., 1998) with average pooling and plain full connections."""

from torch import nn

from pykd.models.dropout import dropout as drop


class LeNet5(nn.Sequential):
    """6-16-120-84 with tanh: conv5x5-6, pool, conv5x5-16, pool, then fully connected 120, 84 and ``classes``.

    Images smaller than the original's 32x32 are padded by 2 on every side, as MNIST's 28x28 were.

    Args:
        in_shape: (channels, height, width), at least 12 x 12.
        classes: number of logits.
        dropout: share of the 120 and of the 84 values that are dropped in training, in [0, 1).

    Raises:
        ValueError: the image is too small for two convolutions and two poolings, or ``dropout`` outside its range.

    Example:
        >>> sum(p.numel() for p in LeNet5(in_shape=(1, 28, 28), classes=10).parameters())
        61706
    """

    def __init__(self, *, in_shape: tuple[int, int, int], classes: int, dropout: float = 0.0) -> None:
        channels, height, width = in_shape
        padding = 2 if min(height, width) < 32 else 0
        rows, columns = (((side + 2 * padding - 4) // 2 - 4) // 2 for side in (height, width))
        if min(rows, columns) < 1:
            raise ValueError(f"lenet5 needs images of at least 12x12 pixels, got {height}x{width}")
        activation = nn.Sequential(nn.Tanh(), drop(dropout))  # one layer: the weights have the same names without it
        super().__init__(
            nn.Conv2d(channels, 6, 5, padding=padding),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * rows * columns, 120),
            activation,
            nn.Linear(120, 84),
            activation,
            nn.Linear(84, classes),
        )
