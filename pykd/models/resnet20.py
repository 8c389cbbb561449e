"""The residual network of twenty layers for CIFAR-10 (He, Zhang, Ren & Sun, 2016, arXiv 1512.03385, section 4.2)."""

from torch import Tensor, nn

from pykd.models.dropout import dropout as drop

CHANNELS = (16, 32, 64)  # of the three stages
BLOCKS = 3  # of a stage, two convolutions each


class ResNet20(nn.Sequential):
    """A 3x3 convolution, three stages of three residual blocks, the mean over the last maps, and ``classes``.

    A block is ReLU(x + F(x)) with F two 3x3 convolutions, ReLU between them. The stages have 16, 32 and 64 channels;
    the first block of the second and the third halves the sides. Batch normalisation follows every convolution, which
    has no bias and begins as He et al. (2015) have it, N(0, 2 / inputs of a unit).

    Where a block changes the shape, its shortcut is a 1x1 convolution of stride 2 with batch normalisation: the paper's
    option B, which a model file can hold. Its table for CIFAR-10 has option A, zeros for the new channels, and 2,752
    parameters fewer.

    Args:
        in_shape: (channels, height, width).
        classes: number of logits.
        dropout: share of the means dropped, in training, before the last layer, in [0, 1).

    Raises:
        ValueError: ``dropout`` outside its range.

    Example:
        >>> sum(p.numel() for p in ResNet20(in_shape=(3, 32, 32), classes=10).parameters())
        272474
    """

    def __init__(self, *, in_shape: tuple[int, int, int], classes: int, dropout: float = 0.0) -> None:
        inputs = CHANNELS[0]
        layers: list[nn.Module] = [*_normalised(in_shape[0], inputs, 3), nn.ReLU()]
        for channels in CHANNELS:
            for _ in range(BLOCKS):
                layers.append(_Block(inputs, channels))
                inputs = channels
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), drop(dropout), nn.Linear(inputs, classes))


class _Block(nn.Module):
    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        stride = 1 if inputs == channels else 2
        self.residual = nn.Sequential(
            *_normalised(inputs, channels, 3, stride), nn.ReLU(), *_normalised(channels, channels, 3)
        )
        self.shortcut = nn.Identity() if stride == 1 else nn.Sequential(*_normalised(inputs, channels, 1, stride))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.relu(self.shortcut(x) + self.residual(x))
        return result


def _normalised(inputs: int, channels: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, channels, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
    return [convolution, nn.BatchNorm2d(channels)]
