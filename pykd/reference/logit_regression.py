"""logit_regression in plain PyTorch: the definition the kernels are judged against."""

import torch
from torch import Generator, Tensor

from pykd.reference.noisy_logits import perturbed


def logit_regression(
    student: Tensor,
    teacher: Tensor,
    *,
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
    target = perturbed(
        teacher,
        sigma=sigma,
        alpha=alpha,
        noise_shape=noise_shape,
        noise_kind=noise_kind,
        n_teachers=n_teachers,
        seed=seed,
        generator=generator,
        row_offset=row_offset,
    )
    loss = 0.5 * (student - target).square().sum(1)
    if reduction == "none":
        return loss
    return loss.sum() / max(len(student), 1) if reduction == "batchmean" else loss.sum()


def logit_regression_and_grad(
    student: Tensor,
    teacher: Tensor,
    *,
    n_teachers: int = 1,
    reduction: str = "batchmean",
    sigma: float = 0.0,
    alpha: float = 1.0,
    noise_shape: str = "logit",
    noise_kind: str = "multiplicative",
    seed: Tensor | None = None,
    generator: Generator | None = None,
    row_offset: int = 0,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> tuple[Tensor, Tensor]:
    student = student.detach().requires_grad_()
    loss = logit_regression(
        student,
        teacher,
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
    (grad,) = torch.autograd.grad(loss.sum(), student)
    if out is None:
        return loss.detach(), grad
    return loss.detach(), out.add_(grad) if accumulate else out.copy_(grad)
