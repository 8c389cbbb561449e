"""The VGG-like network of the papers on sparsity, for small images."""

from torch import nn

from pykd.models.dropout import dropout as drop

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # a max pooling ends each
EPS = 1e-3


def scaled(channels: int, width: float) -> int:
    """``width * channels``, rounded, at least 1.

    Raises:
        ValueError: ``width`` is not a positive number.
    """
    if isinstance(width, bool) or not isinstance(width, (int, float)) or not 0 < width < float("inf"):
        raise ValueError(f"width should be a positive number, got {width!r}")
    return max(1, round(width * channels))


class VGG(nn.Sequential):
    """Thirteen convolutions in five stages, a fully connected layer, and ``classes``.

    With k = ``width``: 3x3 convolutions of 64k, 64k; 128k, 128k; 256k three times; 512k three times; 512k three times,
    each padded by 1, with a max pooling of 2 after each stage; then fully connected 512k and ``classes``. Batch
    normalisation (eps 1e-3) and ReLU follow every layer but the last; a layer before a normalisation has no bias. The
    convolutions begin as He et al. (2015) have it, N(0, 2 / inputs of a unit).

    The network of Molchanov et al. (2017) on CIFAR-10; where its dropout lies could not be established.

    Args:
        in_shape: (channels, height, width), at least 32 x 32.
        classes: number of logits.
        width: k; a layer has 64k rounded, and at least one channel.
        dropout: share dropped, in training, of the values before each of the two fully connected layers, in [0, 1).

    Raises:
        ValueError: the image is too small for five poolings, ``width`` is not a positive number, or ``dropout`` outside
            its range.

    Example:
        >>> sum(p.numel() for p in VGG(in_shape=(3, 32, 32), classes=10, width=0.25).parameters())
        939770
    """

    def __init__(
        self, *, in_shape: tuple[int, int, int], classes: int, width: float = 1.0, dropout: float = 0.0
    ) -> None:
        inputs, *sides = in_shape
        rows, columns = (side // 2 ** len(STAGES) for side in sides)
        if min(rows, columns) < 1:
            raise ValueError(f"vgg needs images of at least 32x32 pixels, got {sides[0]}x{sides[1]}")
        layers: list[nn.Module] = []
        for stage in STAGES:
            for channels in (scaled(each, width) for each in stage):
                convolution = nn.Conv2d(inputs, channels, 3, padding=1, bias=False)
                nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
                layers += [convolution, nn.BatchNorm2d(channels, EPS), nn.ReLU()]
                inputs = channels
            layers.append(nn.MaxPool2d(2))
        super().__init__(
            *layers,
            nn.Flatten(),
            drop(dropout),
            nn.Linear(inputs * rows * columns, inputs, bias=False),
            nn.BatchNorm1d(inputs, EPS),
            nn.ReLU(),
            drop(dropout),
            nn.Linear(inputs, classes),
        )
