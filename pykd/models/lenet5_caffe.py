"""LeNet-5 as Caffe's example has it, the convolutional network of the papers on sparsity."""

from torch import nn

from pykd.models.dropout import dropout as drop


class LeNet5Caffe(nn.Sequential):
    """conv5x5-20, max pool 2, conv5x5-50, max pool 2, fully connected 500 and ``classes``.

    The one nonlinearity beside the poolings is the ReLU after the 500; the convolutions are not padded.

    Args:
        in_shape: (channels, height, width), at least 16 x 16.
        classes: number of logits.
        dropout: share of the 500 values that are dropped in training, in [0, 1).

    Raises:
        ValueError: the image is too small for two convolutions and two poolings, or ``dropout`` outside its range.

    Example:
        >>> sum(p.numel() for p in LeNet5Caffe(in_shape=(1, 28, 28), classes=10).parameters())
        431080
    """

    def __init__(self, *, in_shape: tuple[int, int, int], classes: int, dropout: float = 0.0) -> None:
        channels, height, width = in_shape
        rows, columns = (((side - 4) // 2 - 4) // 2 for side in (height, width))
        if min(rows, columns) < 1:
            raise ValueError(f"lenet5_caffe needs images of at least 16x16 pixels, got {height}x{width}")
        super().__init__(
            nn.Conv2d(channels, 20, 5),
            nn.MaxPool2d(2),
            nn.Conv2d(20, 50, 5),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(50 * rows * columns, 500),
            nn.ReLU(),
            drop(dropout),
            nn.Linear(500, classes),
        )
