"""Until pykd.ops has them: distillation_loss and noisy_logits in plain torch, as far as the methods call them."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pykd.ops import logit_regression_and_grad


def noisy_logits(logits: Tensor, **noise: Any) -> Tensor:
    base = torch.zeros_like if noise["noise_kind"] == "additive" else torch.ones_like
    _, gradient = logit_regression_and_grad(
        torch.zeros_like(logits), base(logits, requires_grad=False), reduction="sum", **noise
    )
    return logits - gradient if noise["noise_kind"] == "additive" else logits * -gradient


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    temperature: float,
    hard_weight: float,
    n_teachers: int = 1,
    **noise: Any,
) -> Tensor:
    if noise:
        _, gradient = logit_regression_and_grad(
            torch.zeros_like(teacher), teacher, n_teachers=n_teachers, reduction="sum", **noise
        )
        teacher = -gradient
    student = student.float()
    divergence = F.kl_div(
        F.log_softmax(student / temperature, -1), F.softmax(teacher.float() / temperature, -1), reduction="batchmean"
    )
    return (1 - hard_weight) * temperature**2 * divergence + hard_weight * F.cross_entropy(student, target)
