"""VGG-13 and VGG-16 (Simonyan & Zisserman, 2015, arXiv 1409.1556, configurations B and D) as small images have them."""

from collections import OrderedDict

from torch import nn

from pykd.models.dropout import dropout as drop
from pykd.models.vgg import scaled

CHANNELS = (64, 128, 256, 512, 512)  # of the five stages
CONVOLUTIONS = {13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3)}  # of each stage


class SmallVGG(nn.Sequential):
    """Five stages of 3x3 convolutions, the mean over the last maps, and ``classes``.

    Batch normalisation and ReLU follow every convolution, which has no bias and begins as He et al. (2015) have it,
    N(0, 2 / inputs of a unit). A max pooling of 2 begins each stage but the first, as long as there are two pixels to
    pool. One fully connected layer takes the place of the paper's three, which are for images of 224x224.

    Args:
        depth: 13 or 16, counted with the paper's three fully connected layers.
        in_shape: (channels, height, width).
        classes: number of logits.
        width: a layer has ``width`` times the paper's channels, rounded, and at least one.
        dropout: share of the means dropped, in training, before the last layer, in [0, 1).

    Attributes:
        stage1, stage2, stage3, stage4, stage5: what transfers of features name; each ends with its ReLU.

    Raises:
        ValueError: another ``depth``, ``width`` is not a positive number, or ``dropout`` outside its range.

    Example:
        >>> sum(p.numel() for p in SmallVGG(13, in_shape=(3, 32, 32), classes=10).parameters())
        9413066
    """

    def __init__(
        self, depth: int, *, in_shape: tuple[int, int, int], classes: int, width: float = 1.0, dropout: float = 0.0
    ) -> None:
        if depth not in CONVOLUTIONS:
            raise ValueError(f"depth should be 13 or 16, got {depth!r}")
        inputs, *sides = in_shape
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for number, (full, count) in enumerate(zip(CHANNELS, CONVOLUTIONS[depth], strict=True), 1):
            channels = scaled(full, width)
            stage: list[nn.Module] = []
            if number > 1 and min(sides) > 1:
                stage.append(nn.MaxPool2d(2))
                sides = [side // 2 for side in sides]
            for _ in range(count):
                convolution = nn.Conv2d(inputs, channels, 3, padding=1, bias=False)
                nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
                stage += [convolution, nn.BatchNorm2d(channels), nn.ReLU()]
                inputs = channels
            layers[f"stage{number}"] = nn.Sequential(*stage)
        layers["head"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), drop(dropout), nn.Linear(inputs, classes))
        super().__init__(layers)
