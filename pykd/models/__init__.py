"""The papers' networks, by name.

>>> import torch
>>> network = build("mlp", in_shape=(1, 8, 8), classes=10, widths=[32])
>>> network(torch.zeros(2, 1, 8, 8)).shape
torch.Size([2, 10])
"""

from typing import Any

from torch import nn

from pykd.models.lenet5 import LeNet5
from pykd.models.mlp import MLP
from pykd.models.modified_lenet import ModifiedLeNet
from pykd.models.nin import NIN
from pykd.models.shallow_cnn import ShallowCNN

NETWORKS: dict[str, type[nn.Module]] = {
    "lenet5": LeNet5,
    "mlp": MLP,
    "modified_lenet": ModifiedLeNet,
    "nin": NIN,
    "shallow_cnn": ShallowCNN,
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


__all__ = ["MLP", "NETWORKS", "NIN", "LeNet5", "ModifiedLeNet", "ShallowCNN", "build"]
