"""distillation_loss in plain PyTorch: the definition the kernels are judged against."""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from pykd.reference.noisy_logits import perturbed


def _expectation(weight: Tensor, value: Tensor) -> Tensor:
    """Sum over the classes of ``weight * value``, in which 0 times infinity is 0, in the gradient too."""
    return (weight * torch.where(weight == 0, 0.0, value)).sum(1)


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
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
    rows, classes = student.shape
    loss = student.new_zeros(rows)
    if hard_weight < 1:
        noisy = perturbed(
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
        log_p, log_q = F.log_softmax(noisy / temperature, 1), F.log_softmax(student / temperature, 1)
        if direction == "forward":
            divergence = _expectation(log_p.exp(), log_p - log_q)
        else:
            divergence = _expectation(log_q.exp(), log_q - log_p)
        divided_by = max(rows, 1) if reduction == "batchmean" else 1
        loss = loss + (1 - hard_weight) * temperature**2 * divergence / divided_by
    if hard_weight > 0:
        if target is None:
            raise ValueError(f"distillation_loss: hard_weight {hard_weight} needs a target")
        ignored = target == ignore_index
        one_hot = F.one_hot(target.masked_fill(ignored, 0), classes).to(student.dtype)
        wanted = (1 - label_smoothing) * one_hot + label_smoothing / classes
        cross_entropy = _expectation(wanted, -F.log_softmax(student, 1)).masked_fill(ignored, 0.0)
        divided_by = max(int((~ignored).sum()), 1) if reduction == "batchmean" else 1
        loss = loss + hard_weight * cross_entropy / divided_by
    return loss if reduction == "none" else loss.sum()


def distillation_loss_and_grad(
    student: Tensor,
    teacher: Tensor,
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
    out: Tensor | None = None,
    accumulate: bool = False,
) -> tuple[Tensor, Tensor]:
    student = student.detach().requires_grad_()
    loss = distillation_loss(
        student,
        teacher,
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
    (grad,) = torch.autograd.grad(loss.sum(), student)
    if out is None:
        return loss.detach(), grad
    return loss.detach(), out.add_(grad) if accumulate else out.copy_(grad)
