"""Prunes one layer under its reconstruction problem."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pykd.ops import block_norms
from pykd.pruning.reconstruction import Reconstruction


def largest(weight: Tensor, groups: str, count: int) -> Tensor:
    """A mask that keeps ``count`` groups of the weight: those of the largest norm, of equal ones the first.

    Args:
        weight: ``[out_channels, in_channels, ...]``.
        groups: ``"in"``, input channels by their l2 norm, or ``"weight"``, single weights by their size.
        count: of groups.

    Returns:
        bool, of the weight's shape.

    Example:
        >>> largest(torch.tensor([[3.0, -1.0], [0.0, 2.0]]), "in", 1)
        tensor([[ True, False],
                [ True, False]])
        >>> largest(torch.tensor([[3.0, -1.0], [0.0, 2.0]]), "weight", 2)
        tensor([[ True, False],
                [False,  True]])
    """
    norms = block_norms(weight, groups="in") if groups == "in" else weight.abs().flatten()
    keep = torch.zeros(norms.shape, dtype=torch.bool, device=weight.device)
    keep[norms.sort(descending=True, stable=True).indices[:count]] = True
    if groups == "in":
        return keep.view(1, -1, *[1] * (weight.dim() - 2)).expand_as(weight).contiguous()
    return keep.view_as(weight)


def kept(step: int, steps: int, groups: int, count: int) -> int:
    """How many groups stay in step ``step`` of ``steps``: linearly from all down to ``count`` in the first third.

    >>> [kept(step, 9, 8, 2) for step in range(5)]
    [8, 6, 4, 2, 2]
    """
    fall = max(1, steps // 3)
    return count + (groups - count) * max(0, fall - step) // fall


@dataclass(frozen=True)
class Exact:
    """The least squares of the weights that are left, in every one of ``rounds`` in which some groups go.

    Args:
        rounds: in the first third of them groups go; 1 takes out all at once.
        ridge: as of :meth:`Reconstruction.solve`.
    """

    rounds: int = 12
    ridge: float = 1e-6

    def __call__(self, problem: Reconstruction, weight: Tensor, groups: str, count: int) -> tuple[Tensor, Tensor]:
        """The pruned weight, and its mask."""
        total = weight.shape[1] if groups == "in" else weight.numel()
        last, keep = total, torch.ones_like(weight, dtype=torch.bool)
        for step in range(1, self.rounds + 1):
            left = count if step == self.rounds else kept(step, self.rounds, total, count)
            if left < last:
                keep = largest(weight, groups, left)
                weight, last = problem.solve(keep, self.ridge), left
        return weight, keep


@dataclass(frozen=True)
class Steps:
    """Adam, as the authors' code has it: groups go in the first third of the steps, the rest trains what is left.

    After the first third of steps on input channels the rate is a tenth. What went has neither gradient nor moments.

    Args:
        steps: their number.
        lr: the rate.
    """

    steps: int = 3000
    lr: float = 5e-4

    def __call__(self, problem: Reconstruction, weight: Tensor, groups: str, count: int) -> tuple[Tensor, Tensor]:
        """The pruned weight, and its mask."""
        total = weight.shape[1] if groups == "in" else weight.numel()
        weight, last, keep = weight.clone(), total, torch.ones_like(weight, dtype=torch.bool)
        first, second = torch.zeros_like(weight), torch.zeros_like(weight)
        for step in range(1, self.steps + 1):
            gradient = problem.gradient(weight)
            gradient[~keep] = 0
            first.lerp_(gradient, 0.1)
            second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            rate = self.lr * (0.1 if groups == "in" and step > self.steps // 3 else 1)
            size = rate * math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
            weight.addcdiv_(first, second.sqrt().add_(1e-8 * math.sqrt(1 - 0.999**step)), value=-size)
            left = kept(step, self.steps, total, count)
            if left < last:
                keep, last = largest(weight, groups, left), left
            for each in (weight, first, second):
                each[~keep] = 0
        return weight, keep
