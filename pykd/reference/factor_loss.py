"""factor_loss in plain torch: the definition."""

import torch
from torch import Tensor


def factor_loss(student: Tensor, teacher: Tensor, *, p: int = 1, reduction: str = "mean") -> Tensor:
    """The distance of normalised factors; see :func:`pykd.ops.factor_loss`."""
    difference = _normalised(student) - _normalised(teacher)
    if reduction == "mean":
        return difference.abs().pow(p).sum() / max(difference.numel(), 1)
    return torch.linalg.vector_norm(difference, p, 1).sum() / max(len(difference), 1)  # its gradient at 0 is 0


def factor_loss_and_grad(
    student: Tensor, teacher: Tensor, *, p: int = 1, reduction: str = "mean"
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    student, teacher = (factor.detach().requires_grad_() for factor in (student, teacher))
    loss = factor_loss(student, teacher, p=p, reduction=reduction)
    grad_student, grad_teacher = torch.autograd.grad(loss, (student, teacher))
    return loss.detach(), (grad_student, grad_teacher)


def _normalised(factor: Tensor) -> Tensor:
    """Each sample as a vector of length 1; a vector of zeros stays one, without gradient."""
    rows = factor.flatten(1)
    largest = rows.detach().abs().amax(1, keepdim=True)
    scaled = rows / torch.where(largest == 0, 1, largest)  # squares of what is below 1e-19 would be 0
    norm = torch.where(largest == 0, torch.ones_like(largest), scaled.norm(dim=1, keepdim=True))
    return torch.where(largest == 0, torch.zeros_like(rows), scaled / norm)
