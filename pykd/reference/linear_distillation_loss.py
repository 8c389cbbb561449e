"""linear_distillation_loss in plain PyTorch: the definition the chunks are judged against."""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from pykd.reference.distillation_loss import distillation_loss


def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 1.0,
    hard_weight: float = 0.0,
    direction: str = "forward",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    n_teachers: int = 1,
    reduction: str = "batchmean",
    sigma: float = 0.0,
    alpha: float = 1.0,
    noise_shape: str = "logit",
    noise_kind: str = "multiplicative",
    seed: Tensor | None = None,
    generator: Generator | None = None,
    row_offset: int = 0,
) -> Tensor:
    return distillation_loss(
        F.linear(student_hidden, student_weight),
        F.linear(teacher_hidden, teacher_weight),
        target,
        temperature=temperature,
        hard_weight=hard_weight,
        direction=direction,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        n_teachers=n_teachers,
        reduction=reduction,
        sigma=sigma,
        alpha=alpha,
        noise_shape=noise_shape,
        noise_kind=noise_kind,
        seed=seed,
        generator=generator,
        row_offset=row_offset,
    )


def linear_distillation_loss_and_grad(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 1.0,
    hard_weight: float = 0.0,
    direction: str = "forward",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    n_teachers: int = 1,
    reduction: str = "batchmean",
    sigma: float = 0.0,
    alpha: float = 1.0,
    noise_shape: str = "logit",
    noise_kind: str = "multiplicative",
    seed: Tensor | None = None,
    generator: Generator | None = None,
    row_offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    student_hidden, student_weight = (x.detach().requires_grad_() for x in (student_hidden, student_weight))
    loss = linear_distillation_loss(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        target,
        temperature=temperature,
        hard_weight=hard_weight,
        direction=direction,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        n_teachers=n_teachers,
        reduction=reduction,
        sigma=sigma,
        alpha=alpha,
        noise_shape=noise_shape,
        noise_kind=noise_kind,
        seed=seed,
        generator=generator,
        row_offset=row_offset,
    )
    grad_hidden, grad_weight = torch.autograd.grad(loss.sum(), (student_hidden, student_weight))
    return loss.detach(), grad_hidden, grad_weight
