"""Pruning: zeroes groups of weights, and takes out physically what the zeroes made useless.

>>> import torch
>>> from torch import nn
>>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
>>> _ = nn.init.zeros_(network[2].weight[:, 3:])
>>> remove_dead(network, torch.zeros(1, 4)).get_submodule("0")
Linear(in_features=4, out_features=3, bias=True)
"""

from pykd.pruning.budget import within
from pykd.pruning.flops import flops
from pykd.pruning.groups import prune_groups_
from pykd.pruning.masks import mask_, unmask_
from pykd.pruning.remove_dead import Prunable, prunable, remove_dead

__all__ = [
    "Prunable",
    "flops",
    "mask_",
    "prunable",
    "prune_groups_",
    "remove_dead",
    "unmask_",
    "within",
]
