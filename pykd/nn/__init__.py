"""Modules over :mod:`pykd.ops`: variational layers, group-sparse Bayesian layers, the block-sparse regulariser,
sparse layers for inference, the paraphraser and translator of factor transfer; ``features`` of any network.

>>> import torch
>>> VariationalLinear(4, 2)(torch.zeros(3, 4)).shape
torch.Size([3, 2])
"""

from pykd.nn.block_sparse import BlockSparseRegularizer
from pykd.nn.factor import Paraphraser, Translator
from pykd.nn.features import features
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
    "Paraphraser",
    "SparseConv2d",
    "SparseLinear",
    "Translator",
    "VariationalConv2d",
    "VariationalLinear",
    "features",
    "kl",
    "plain",
    "set_noise",
    "sparsify",
    "variational",
    "variational_layers",
]
