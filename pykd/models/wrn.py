"""The wide residual network for small images (Zagoruyko & Komodakis, 2016, arXiv 1605.07146)."""

from collections import OrderedDict

from torch import Tensor, nn

from pykd.models.dropout import dropout as drop

CHANNELS = (16, 32, 64)  # of the three stages, times the width


class WRN(nn.Sequential):
    """WRN-d-k: a 3x3 convolution of 16 channels, three stages of (d - 4) / 6 wide blocks each, batch normalisation,
    ReLU, the mean over the maps, and ``classes``.

    A block is x + F(x), normalised before it is convolved: F is batch normalisation, ReLU, a 3x3 convolution, and the
    same once more. The stages have 16k, 32k and 64k channels; the first block of the second and the third halves the
    sides. Where a block changes the shape, both ways begin with its first normalisation and ReLU, and the shortcut is a
    1x1 convolution. Convolutions have no bias and begin as He et al. (2015) have it, N(0, 2 / inputs of a unit).

    Args:
        in_shape: (channels, height, width).
        classes: number of logits.
        depth: d, 6 n + 4.
        width: k.
        dropout: share dropped, in training, between the two convolutions of each block, in [0, 1).

    Attributes:
        stem, stage1, stage2, stage3: what transfers of features name. The ReLU of the last stage is the head's.

    Raises:
        ValueError: another ``depth`` or ``width``, or ``dropout`` outside its range.

    Example:
        >>> sum(p.numel() for p in WRN(in_shape=(3, 32, 32), classes=100, depth=16, width=2).parameters())
        703284
    """

    def __init__(
        self,
        *,
        in_shape: tuple[int, int, int],
        classes: int,
        depth: int = 16,
        width: int = 2,
        dropout: float = 0.0,
    ) -> None:
        if type(depth) is not int or depth < 10 or depth % 6 != 4:
            raise ValueError(f"depth should be 6 n + 4 with n >= 1, such as 16, got {depth!r}")
        if type(width) is not int or width < 1:
            raise ValueError(f"width should be a positive integer, got {width!r}")
        inputs = CHANNELS[0]
        layers: OrderedDict[str, nn.Module] = OrderedDict(stem=_convolution(in_shape[0], inputs, 3))
        for number, channels in enumerate(CHANNELS, 1):
            outputs = width * channels
            layers[f"stage{number}"] = nn.Sequential(
                *(
                    _Block(inputs if block == 0 else outputs, outputs, 2 if number > 1 and block == 0 else 1, dropout)
                    for block in range((depth - 4) // 6)
                )
            )
            inputs = outputs
        layers["head"] = nn.Sequential(
            nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)
        )
        super().__init__(layers)


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        self.residual = nn.Sequential(
            _convolution(inputs, outputs, 3, stride),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            drop(dropout),
            _convolution(outputs, outputs, 3),
        )
        changes = inputs != outputs or stride > 1
        self.shortcut = _convolution(inputs, outputs, 1, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        active = self.first(x)
        kept = x if self.shortcut is None else self.shortcut(active)
        result: Tensor = kept + self.residual(active)
        return result


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
    return convolution
