"""sparse_linear in plain PyTorch: the definition the kernels are judged against."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pykd.sparse import SparseWeight


def sparse_linear(
    input: Tensor, weight: SparseWeight, bias: Tensor | None = None, *, activation: Literal["relu"] | None = None
) -> Tensor:
    dense = torch.from_numpy(weight.dense()).to(input)
    result = F.linear(input, dense, None if bias is None else bias.to(input))
    return F.relu(result) if activation == "relu" else result
