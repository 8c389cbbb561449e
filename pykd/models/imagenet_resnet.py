"""torchvision's residual networks for ImageNet (He, Zhang, Ren & Sun, 2016, arXiv 1512.03385, section 4.1)."""

from typing import TYPE_CHECKING

from torch import nn

from pykd.models.dropout import dropout as drop

if TYPE_CHECKING:
    import torchvision

SMALL = 64  # pixels of a side, below which images are small


def imagenet_resnet(
    depth: int, *, in_shape: tuple[int, int, int], classes: int, dropout: float = 0.0
) -> "torchvision.models.ResNet":
    """torchvision's ResNet of this depth, its parameters by torchvision's names, for any channels and small images.

    Images of a side below 64 pixels would be two pixels wide where the stages begin: for them the first convolution is
    3x3 of stride 1, and the pooling after it is left out. Transfers of features name ``layer1`` to ``layer4``, each of
    which ends with its ReLU.

    Args:
        depth: 18, 34, 50, 101 or 152.
        in_shape: (channels, height, width).
        classes: number of logits.
        dropout: share of the means dropped, in training, before the last layer, in [0, 1).

    Raises:
        ValueError: ``dropout`` outside its range.

    Example:
        >>> sum(p.numel() for p in imagenet_resnet(18, in_shape=(3, 224, 224), classes=1000).parameters())
        11689512
    """
    import torchvision  # of those who ask for it

    network: torchvision.models.ResNet = getattr(torchvision.models, f"resnet{depth}")(num_classes=classes)
    small, stem = min(in_shape[1:]) < SMALL, network.conv1
    if small or in_shape[0] != stem.in_channels:
        shape = (3, 1, 1) if small else (7, 2, 3)
        network.conv1 = nn.Conv2d(in_shape[0], stem.out_channels, *shape, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    if small:
        network.maxpool = nn.Identity()
    network.avgpool = nn.Sequential(network.avgpool, drop(dropout))
    return network
