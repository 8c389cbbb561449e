"""block_norm in plain PyTorch: the definition the kernels are judged against."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Groups = str | tuple[int, int]
Weights = Tensor | Sequence[Tensor]


def as_list(weights: Weights) -> list[Tensor]:
    """One weight as a list of one."""
    return [weights] if isinstance(weights, Tensor) else list(weights)


def block_shape(weight: Tensor, groups: Groups) -> tuple[int, int]:
    """Rows and columns of a group in the weight flattened to ``[out, in * kh * kw]``."""
    kernel, columns = weight.shape[2:].numel(), weight.shape[1:].numel()
    named = {"in": (len(weight), kernel), "out": (1, columns), "kernel": (1, kernel)}
    return named[groups] if isinstance(groups, str) else groups


def by_group(weight: Tensor, groups: Groups) -> Tensor:
    """``[grid rows, grid columns, entries]``: a group's entries side by side, the smaller groups filled with zeros."""
    if not weight.numel():
        return weight.reshape(0, 0, 1)
    rows, columns = block_shape(weight, groups)
    matrix = weight.reshape(len(weight), -1)
    matrix = F.pad(matrix, (0, -matrix.shape[1] % columns, 0, -matrix.shape[0] % rows))
    return matrix.unfold(0, rows, rows).unfold(1, columns, columns).flatten(2)


def norm_of(entries: Tensor, norm: str) -> Tensor:
    """Over the last dimension; a maximum that several entries have in common is shared by their gradients."""
    if norm == "l1_linf":
        return entries.abs().amax(-1)
    largest = entries.detach().abs().amax(-1, keepdim=True)  # squares of neither large nor small entries are lost
    scale = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    squares = ((entries / scale) ** 2).sum(-1)
    return torch.where(squares == 0, 1.0, squares).sqrt() * scale.squeeze(-1) * (squares != 0)


def block_norms(weight: Tensor, *, groups: Groups = "in", norm: str = "l1_l2") -> Tensor:
    norms = norm_of(by_group(weight.detach().double(), groups), norm)
    if groups in ("in", "out"):
        norms = norms.flatten()
    return norms.to(weight.dtype if weight.dtype == torch.float64 else torch.float32)


def block_norm(
    weights: Weights,
    *,
    groups: Groups = "in",
    norm: str = "l1_l2",
    teachers: Weights | None = None,
    scale_by_size: bool = False,
) -> Tensor:
    students = as_list(weights)
    others = [None] * len(students) if teachers is None else as_list(teachers)
    dtype = torch.float64 if students and students[0].dtype == torch.float64 else torch.float32
    total = torch.zeros((), dtype=torch.float64, device=students[0].device if students else None)
    for weight, teacher in zip(students, others, strict=True):
        entries = by_group(weight.double(), groups)
        norms, sizes = norm_of(entries, norm), by_group(torch.ones_like(weight.double()), groups).sum(-1)
        if teacher is not None:
            taught = by_group(teacher.detach().double(), groups)
            grid = [max(a, b) for a, b in zip(norms.shape, taught.shape, strict=False)]

            def surrounded(values: Tensor, grid: list[int] = grid) -> Tensor:
                return F.pad(values, (0, grid[1] - values.shape[1], 0, grid[0] - values.shape[0]))

            own, its = surrounded(norms), surrounded(norm_of(taught, norm))
            sizes = surrounded(sizes) + surrounded(by_group(torch.ones_like(teacher.double()), groups).sum(-1))
            if norm == "l1_linf":
                norms = torch.where((own > its) | own.isnan(), own, its)
            else:
                norms = norm_of(torch.stack([own, its], -1), "l1_l2")
        total = total + (norms * sizes.sqrt() if scale_by_size else norms).sum()
    return total.to(dtype)


def block_norm_and_grad(
    weights: Weights,
    *,
    groups: Groups = "in",
    norm: str = "l1_l2",
    teachers: Weights | None = None,
    scale_by_size: bool = False,
    scale: float = 1.0,
    out: Weights | None = None,
    accumulate: bool = False,
) -> tuple[Tensor, Weights]:
    leaves = [weight.detach().requires_grad_() for weight in as_list(weights)]
    with torch.enable_grad():
        value = scale * block_norm(leaves, groups=groups, norm=norm, teachers=teachers, scale_by_size=scale_by_size)
        grads = list(torch.autograd.grad(value, leaves)) if leaves else []
    if out is not None:
        grads = [b.add_(g) if accumulate else b.copy_(g) for b, g in zip(as_list(out), grads, strict=True)]
    return value.detach(), grads[0] if isinstance(weights, Tensor) else grads
