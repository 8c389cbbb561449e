"""Modules over :mod:`pykd.ops`: variational layers, group-sparse Bayesian layers, the block-sparse regulariser,
sparse layers for inference.

>>> import torch
>>> VariationalLinear(4, 2)(torch.zeros(3, 4)).shape
torch.Size([3, 2])
"""

from pykd.nn.block_sparse import BlockSparseRegularizer
from pykd.nn.group_variational import GroupVariationalConv2d, GroupVariationalLinear
from pykd.nn.sparse import SparseConv2d, SparseLinear, sparsify
from pykd.nn.variational import (
    VariationalConv2d,
    VariationalLinear,
    kl,
    plain,
    set_noise,
    variational,
    variational_layers,
)

__all__ = [
    "BlockSparseRegularizer",
    "GroupVariationalConv2d",
    "GroupVariationalLinear",
    "SparseConv2d",
    "SparseLinear",
    "VariationalConv2d",
    "VariationalLinear",
    "kl",
    "plain",
    "set_noise",
    "sparsify",
    "variational",
    "variational_layers",
]
