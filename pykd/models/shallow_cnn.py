"""A convolutional network of three layers and a classifier."""

from torch import nn

from pykd.models.dropout import dropout as drop


class ShallowCNN(nn.Sequential):
    """conv5x5-64, max pool 2, conv5x5-128, max pool 2, fully connected 1024 and ``classes``; ReLU between them.

    The student on CIFAR-10 as a public implementation of the noisy-teacher paper has it; the paper's own network could
    not be established.

    Args:
        in_shape: (channels, height, width), at least 16 x 16.
        classes: number of logits.
        dropout: share of the 1024 values that are dropped, in [0, 1).

    Raises:
        ValueError: the image is too small for two convolutions and two poolings, or ``dropout`` outside its range.

    Example:
        >>> ShallowCNN(in_shape=(3, 32, 32), classes=10)[-1]
        Linear(in_features=1024, out_features=10, bias=True)
    """

    def __init__(self, *, in_shape: tuple[int, int, int], classes: int, dropout: float = 0.0) -> None:
        channels, height, width = in_shape
        rows, columns = (((side - 4) // 2 - 4) // 2 for side in (height, width))
        if min(rows, columns) < 1:
            raise ValueError(f"shallow_cnn needs images of at least 16x16 pixels, got {height}x{width}")
        super().__init__(
            nn.Conv2d(channels, 64, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(128 * rows * columns, 1024),
            nn.ReLU(),
            drop(dropout),
            nn.Linear(1024, classes),
        )
