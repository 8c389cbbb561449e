"""factor_loss in plain torch: the definition."""

import torch
from torch import Tensor


def factor_loss(student: Tensor, teacher: Tensor, *, p: int = 1, reduction: str = "mean") -> Tensor:
    """The distance of normalised factors; see :func:`pykd.ops.factor_loss`."""
    difference = (_normalised(student) - _normalised(teacher)).abs()
    if reduction == "mean":
        return (difference if p == 1 else difference.square()).mean()
    return (difference.sum(1) if p == 1 else difference.square().sum(1).sqrt()).mean()


def _normalised(factor: Tensor) -> Tensor:
    """Each sample as a vector of length 1; a vector of zeros stays one, without gradient."""
    rows = factor.flatten(1)
    largest = rows.detach().abs().amax(1, keepdim=True)
    scaled = rows / torch.where(largest == 0, 1, largest)  # squares of what is below 1e-19 would be 0
    norm = torch.where(largest == 0, torch.ones_like(largest), scaled.norm(dim=1, keepdim=True))
    return torch.where(largest == 0, torch.zeros_like(rows), scaled / norm)
