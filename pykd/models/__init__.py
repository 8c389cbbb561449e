"""The papers' networks, by name.

>>> import torch
>>> network = build("mlp", in_shape=(1, 8, 8), classes=10, widths=[32])
>>> network(torch.zeros(2, 1, 8, 8)).shape
torch.Size([2, 10])
"""

from typing import Any

from torch import nn

from pykd.models.lenet5 import LeNet5
from pykd.models.lenet5_caffe import LeNet5Caffe
from pykd.models.lenet300100 import LeNet300100
from pykd.models.mlp import MLP
from pykd.models.modified_lenet import ModifiedLeNet
from pykd.models.nin import NIN
from pykd.models.resnet20 import ResNet20
from pykd.models.shallow_cnn import ShallowCNN
from pykd.models.vgg import VGG

NETWORKS: dict[str, type[nn.Module]] = {
    "lenet300100": LeNet300100,
    "lenet5": LeNet5,
    "lenet5_caffe": LeNet5Caffe,
    "mlp": MLP,
    "modified_lenet": ModifiedLeNet,
    "nin": NIN,
    "resnet20": ResNet20,
    "shallow_cnn": ShallowCNN,
    "vgg": VGG,
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
    "LeNet5",
    "LeNet5Caffe",
    "LeNet300100",
    "ModifiedLeNet",
    "ResNet20",
    "ShallowCNN",
    "build",
]
