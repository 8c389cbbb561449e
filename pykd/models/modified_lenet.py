"""LeNet with padded convolutions, max pooling and one wide layer."""

from torch import nn

from pykd.models.dropout import dropout as drop


class ModifiedLeNet(nn.Sequential):
    """conv5x5-6, max pool 2, conv5x5-16, max pool 2, fully connected 1024 and ``classes``; tanh between them.

    Both convolutions are padded by 2. The student on CIFAR-10 as another public implementation of the noisy-teacher
    paper has it; the paper's own network could not be established.

    Args:
        in_shape: (channels, height, width), at least 4 x 4.
        classes: number of logits.
        dropout: share of the 1024 values that are dropped, in [0, 1).

    Raises:
        ValueError: the image is too small for two poolings, or ``dropout`` outside its range.

    Example:
        >>> sum(p.numel() for p in ModifiedLeNet(in_shape=(3, 32, 32), classes=10).parameters())
        1062722
    """

    def __init__(self, *, in_shape: tuple[int, int, int], classes: int, dropout: float = 0.0) -> None:
        channels, height, width = in_shape
        if min(height, width) < 4:
            raise ValueError(f"modified_lenet needs images of at least 4x4 pixels, got {height}x{width}")
        super().__init__(
            nn.Conv2d(channels, 6, 5, padding=2),
            nn.Tanh(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5, padding=2),
            nn.Tanh(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * (height // 4) * (width // 4), 1024),
            nn.Tanh(),
            drop(dropout),
            nn.Linear(1024, classes),
        )
