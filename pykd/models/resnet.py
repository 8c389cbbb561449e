"""The residual networks for CIFAR-10 (He, Zhang, Ren & Sun, 2016, arXiv 1512.03385, section 4.2)."""

from collections import OrderedDict

from torch import Tensor, nn

from pykd.models.dropout import dropout as drop

CHANNELS = (16, 32, 64)  # of the three stages


class ResNet(nn.Sequential):
    """A 3x3 convolution, three stages of (depth - 2) / 6 residual blocks, the mean over the last maps, and ``classes``.

    A block is ReLU(x + F(x)) with F two 3x3 convolutions, ReLU between them. The stages have 16, 32 and 64 channels;
    the first block of the second and the third halves the sides. Batch normalisation follows every convolution, which
    has no bias and begins as He et al. (2015) have it, N(0, 2 / inputs of a unit).

    Where a block changes the shape, its shortcut is a 1x1 convolution of stride 2 with batch normalisation: the paper's
    option B, which a model file can hold. Its table for CIFAR-10 has option A, zeros for the new channels, and 2,752
    parameters fewer.

    Args:
        depth: layers with weights, 6 n + 2: 20, 32, 44, 56 and 110 in the paper.
        in_shape: (channels, height, width).
        classes: number of logits.
        dropout: share of the means dropped, in training, before the last layer, in [0, 1).

    Attributes:
        stem, stage1, stage2, stage3: what transfers of features name; each ends with its ReLU.

    Raises:
        ValueError: another ``depth``, or ``dropout`` outside its range.

    Example:
        >>> sum(p.numel() for p in ResNet(20, in_shape=(3, 32, 32), classes=10).parameters())
        272474
    """

    def __init__(self, depth: int = 20, *, in_shape: tuple[int, int, int], classes: int, dropout: float = 0.0) -> None:
        if type(depth) is not int or depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth should be 6 n + 2 with n >= 1, such as 20, got {depth!r}")
        inputs = CHANNELS[0]
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            stem=nn.Sequential(*_normalised(in_shape[0], inputs, 3), nn.ReLU())
        )
        for number, channels in enumerate(CHANNELS, 1):
            blocks = [_Block(inputs if block == 0 else channels, channels) for block in range((depth - 2) // 6)]
            layers[f"stage{number}"] = nn.Sequential(*blocks)
            inputs = channels
        layers["head"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), drop(dropout), nn.Linear(inputs, classes))
        super().__init__(layers)


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
