"""Network-in-Network (Lin, Chen & Yan, 2014, arXiv 1312.4400) for small images."""

from torch import nn

from pykd.models.dropout import dropout as drop


class NIN(nn.Sequential):
    """Nine convolutions in three blocks, ReLU between them, and the mean over the last maps as logits.

    conv5x5-192, 1x1-160, 1x1-96, max pool 3/2, dropout; conv5x5-192, 1x1-192, 1x1-192, average pool 3/2, dropout;
    conv3x3-192, 1x1-192, 1x1-``classes``, mean over all places. Weights begin as N(0, 0.05²), biases as 0.

    The teacher on CIFAR-10 as public implementations of the noisy-teacher paper have it; the paper's own network could
    not be established.

    Args:
        in_shape: (channels, height, width), at least 6 x 6.
        classes: number of logits.
        dropout: share of values dropped after each pooling, in [0, 1).

    Raises:
        ValueError: the image is too small for two poolings, or ``dropout`` outside its range.

    Example:
        >>> sum(p.numel() for p in NIN(in_shape=(3, 32, 32), classes=10).parameters())
        966986
    """

    def __init__(self, *, in_shape: tuple[int, int, int], classes: int, dropout: float = 0.5) -> None:
        channels, height, width = in_shape
        if min(height, width) < 6:
            raise ValueError(f"nin needs images of at least 6x6 pixels, got {height}x{width}")
        super().__init__(
            nn.Conv2d(channels, 192, 5, padding=2),
            nn.ReLU(),
            nn.Conv2d(192, 160, 1),
            nn.ReLU(),
            nn.Conv2d(160, 96, 1),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            drop(dropout),
            nn.Conv2d(96, 192, 5, padding=2),
            nn.ReLU(),
            nn.Conv2d(192, 192, 1),
            nn.ReLU(),
            nn.Conv2d(192, 192, 1),
            nn.ReLU(),
            nn.AvgPool2d(3, 2, ceil_mode=True),
            drop(dropout),
            nn.Conv2d(192, 192, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(192, 192, 1),
            nn.ReLU(),
            nn.Conv2d(192, classes, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        for name, value in self.named_parameters():
            nn.init.normal_(value, std=0.05) if name.endswith("weight") else nn.init.zeros_(value)
