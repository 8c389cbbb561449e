"""The papers' networks, by name.

>>> import torch
>>> network = build("mlp", in_shape=(1, 8, 8), classes=10, widths=[32])
>>> network(torch.zeros(2, 1, 8, 8)).shape
torch.Size([2, 10])
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from pykd.models.imagenet_resnet import imagenet_resnet
from pykd.models.lenet5 import LeNet5
from pykd.models.lenet5_caffe import LeNet5Caffe
from pykd.models.lenet300100 import LeNet300100
from pykd.models.mlp import MLP
from pykd.models.modified_lenet import ModifiedLeNet
from pykd.models.nin import NIN
from pykd.models.resnet import ResNet
from pykd.models.shallow_cnn import ShallowCNN
from pykd.models.small_vgg import SmallVGG
from pykd.models.vgg import VGG
from pykd.models.wrn import WRN

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "lenet300100": LeNet300100,
    "lenet5": LeNet5,
    "lenet5_caffe": LeNet5Caffe,
    "mlp": MLP,
    "modified_lenet": ModifiedLeNet,
    "nin": NIN,
    "resnet": ResNet,
    **{f"resnet{depth}": partial(ResNet, depth) for depth in (20, 32, 44, 56, 110)},
    **{f"resnet{depth}": partial(imagenet_resnet, depth) for depth in (18, 34, 50, 101, 152)},
    "shallow_cnn": ShallowCNN,
    "vgg": VGG,
    "vgg13": partial(SmallVGG, 13),
    "vgg16": partial(SmallVGG, 16),
    "wrn": WRN,
}


def build(name: str, *, in_shape: tuple[int, int, int], classes: int, **arguments: Any) -> nn.Module:
    """The network called ``name`` for images of shape ``in_shape`` = (channels, height, width).

    Args:
        name: a key of ``NETWORKS``.
        in_shape: of one image.
        classes: number of logits.
        arguments: the network's own.

    Raises:
        ValueError: unknown name, or a value that the network cannot have.
        TypeError: an argument that the network does not take.
    """
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}; known are {', '.join(NETWORKS)}")
    return NETWORKS[name](in_shape=in_shape, classes=classes, **arguments)


__all__ = [
    "MLP",
    "NETWORKS",
    "NIN",
    "VGG",
    "WRN",
    "LeNet5",
    "LeNet5Caffe",
    "LeNet300100",
    "ModifiedLeNet",
    "ResNet",
    "ShallowCNN",
    "SmallVGG",
    "build",
    "imagenet_resnet",
]
