"""sparse_conv2d in plain PyTorch: the definition the kernels are judged against."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pykd.sparse import SparseWeight


def sparse_conv2d(
    input: Tensor,
    weight: SparseWeight,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    activation: Literal["relu"] | None = None,
) -> Tensor:
    dense = torch.from_numpy(weight.dense()).to(input)
    result = F.conv2d(input, dense, None if bias is None else bias.to(input), stride, padding, dilation, groups)
    return F.relu(result) if activation == "relu" else result
