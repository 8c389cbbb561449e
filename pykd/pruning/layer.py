"""Prunes one layer under its reconstruction problem."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pykd.errors import PykdError
from pykd.ops import block_norms, block_prox_
from pykd.pruning.reconstruction import TOLERANCE, Activated, Reconstruction

LASSO_PENALTIES, LASSO_STEPS = 40, 200
ROUGH = 1e-2  # tolerance of rounds that only say what goes next
NARROWER = 7 / 8  # of the columns are left: then the others are worth taking out


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
    return whole_channels(keep, weight) if groups == "in" else keep.view_as(weight)


def whole_channels(keep: Tensor, weight: Tensor) -> Tensor:
    """A mask of the weight's shape out of one of its input channels.

    >>> whole_channels(torch.tensor([True, False]), torch.zeros(1, 2, 2))
    tensor([[[ True,  True],
             [False, False]]])
    """
    return keep.view(1, -1, *[1] * (weight.dim() - 2)).expand_as(weight).contiguous()


def kept(step: int, fall: int, groups: int, count: int) -> int:
    """How many groups stay in step ``step``: linearly from all down to ``count`` in step ``fall``.

    >>> [kept(step, 3, 8, 2) for step in range(5)]
    [8, 6, 4, 2, 2]
    """
    return count + (groups - count) * max(0, fall - step) // fall


def thinet(problem: Reconstruction, weight: Tensor, count: int) -> Tensor:
    """The ``count`` input channels that are left where, one by one, the one whose loss costs least is taken out.

    Luo, Wu & Lin 2017, "ThiNet", arXiv 1707.06342, section 3.2.

    Returns:
        bool ``[in_channels]``.
    """
    products, targets = problem.channels(weight)
    keep = torch.ones(len(targets), dtype=torch.bool, device=weight.device)
    pull = products.sum(1) - targets
    for _ in range(len(targets) - count):
        loss = torch.where(keep, products.diagonal() - 2 * pull, math.inf)
        out = int(loss.argmin())
        keep[out] = False
        pull -= products[out]
    return keep


def lasso(problem: Reconstruction, weight: Tensor, count: int) -> Tensor:
    """The ``count`` input channels whose factors are the largest under the l1 penalty that leaves so many.

    He, Zhang & Sun 2017, "Channel Pruning for Accelerating Very Deep Neural Networks", arXiv 1707.06168, section 3.1.

    Returns:
        bool ``[in_channels]``.
    """
    products, targets = problem.channels(weight)
    step = 1 / float(products.abs().sum(1).max().clamp_min(torch.finfo(products.dtype).tiny))
    factors = best = torch.ones_like(targets)
    low, high = 0.0, float(targets.abs().max())
    for _ in range(LASSO_PENALTIES):
        penalty = (low + high) / 2
        for _ in range(LASSO_STEPS):
            factors = F.softshrink(factors - step * (factors @ products - targets), step * penalty)
        left = int(factors.count_nonzero())
        if left >= count:
            low, best = penalty, factors
        else:
            high = penalty
        if left == count:
            break
    keep = torch.zeros(len(targets), dtype=torch.bool, device=weight.device)
    keep[best.abs().sort(descending=True, stable=True).indices[:count]] = True
    return keep


@dataclass(frozen=True)
class Exact:
    """The least squares of the weights that are left, in every one of ``rounds`` in which as many groups go.

    Args:
        rounds: their number.
        ridge: as of :meth:`Reconstruction.solve`.
        select: by what groups stay: ``"norm"``, their size round by round; ``"thinet"`` or ``"lasso"``, for input
            channels, at once.
    """

    rounds: int = 20
    ridge: float = 1e-6
    select: str = "norm"

    def __call__(self, problem: Reconstruction, weight: Tensor, groups: str, count: int) -> tuple[Tensor, Tensor]:
        """The pruned weight, and its mask."""
        if self.select != "norm":
            chosen = {"thinet": thinet, "lasso": lasso}[self.select](problem, weight, count)
            keep = whole_channels(chosen, weight)
            return problem.solve(keep, self.ridge), keep
        total = weight.shape[1] if groups == "in" else weight.numel()
        last, keep = total, torch.ones_like(weight, dtype=torch.bool)
        for step in range(1, self.rounds + 1):
            left = kept(step, self.rounds, total, count)
            if left < last:
                keep = largest(weight, groups, left)
                tolerance = ROUGH if left > count else TOLERANCE
                weight, last = problem.solve(keep, self.ridge, weight, tolerance), left
        return weight, keep


@dataclass(frozen=True)
class Steps:
    """Adam, as the authors' code has it: groups go in the first third of the steps, the rest trains what is left.

    After the first third of steps on input channels the rate is a tenth. What went has neither gradient nor moments,
    and its columns cost nothing any more.

    Args:
        steps: their number.
        lr: the rate.
    """

    steps: int = 3000
    lr: float = 5e-4

    def __call__(
        self, problem: Reconstruction | Activated, weight: Tensor, groups: str, count: int
    ) -> tuple[Tensor, Tensor]:
        """The pruned weight, and its mask."""
        weight, inputs = weight.contiguous(), weight.shape[1]
        total = last = inputs if groups == "in" else weight.numel()
        mine, whole = weight.flatten(1).to(torch.float32, copy=True), True
        columns = torch.arange(mine.shape[1], device=weight.device)
        keep = torch.ones_like(mine, dtype=torch.bool)
        adam = torch.optim.Adam([mine], fused=mine.device.type in ("cpu", "cuda"))
        (group,) = adam.param_groups
        slope = problem.slope(columns)
        for step in range(1, self.steps + 1):
            mine.grad = slope(mine)
            if not whole:
                mine.grad.mul_(keep)
            group["lr"] = self.lr * (0.1 if groups == "in" and step > self.steps // 3 else 1)
            adam.step()
            if (left := kept(step, max(1, self.steps // 3), total, count)) == last:
                continue
            keep = largest(mine.view(len(mine), -1, weight[0, 0].numel(), 1), groups, left).flatten(1)
            last, whole = left, False
            state = adam.state.pop(mine)
            moments = {name: state[name] for name in ("exp_avg", "exp_avg_sq")}
            for each in (mine, *moments.values()):
                each.masked_fill_(~keep, 0)
            stay = keep[0].nonzero().flatten()
            if groups == "in" and (left == count or len(stay) <= NARROWER * len(columns)):
                columns, keep, whole = columns[stay], keep[:, stay], True
                mine, moments = mine[:, stay], {name: each[:, stay] for name, each in moments.items()}
                slope = problem.slope(columns)
            group["params"], adam.state[mine] = [mine], {**state, **moments}
        pruned, mask = torch.zeros_like(weight), torch.zeros_like(weight, dtype=torch.bool)
        pruned.flatten(1)[:, columns], mask.flatten(1)[:, columns] = mine.to(weight.dtype), keep
        return pruned, mask


@dataclass(frozen=True)
class Proximal:
    r"""The groups that a penalty leaves: :math:`\min_W L(W) + \lambda \sum_g \lVert W_g \rVert_2`, then least squares.

    Accelerated proximal gradients (Beck & Teboulle 2009, "FISTA", section 4), of which the proximal step is
    :func:`pykd.ops.block_prox_`: l2,1 for input channels, l1 for single weights. What the penalty leaves is then
    solved without it. How many groups stay is for the penalty alone to say.

    Args:
        penalty: :math:`\lambda`.
        steps: their number.
        ridge: as of :meth:`Reconstruction.solve`.
    """

    penalty: float
    steps: int = 500
    ridge: float = 1e-6

    def __call__(self, problem: Reconstruction, weight: Tensor, groups: str, count: int) -> tuple[Tensor, Tensor]:
        """The pruned weight, and its mask.

        Raises:
            PykdError: the penalty leaves nothing.
        """
        step = problem.outputs / (2 * float(problem.a.abs().sum(1).max().clamp_min(1e-30)))
        at, ahead, momentum = weight, weight, 1.0
        for _ in range(self.steps):
            last, at = at, ahead - step * problem.gradient(ahead)
            block_prox_(at, groups="in" if groups == "in" else (1, 1), threshold=step * self.penalty)
            before, momentum = momentum, (1 + math.sqrt(1 + 4 * momentum**2)) / 2
            ahead = at + (before - 1) / momentum * (at - last)
        keep = at != 0
        if groups == "in":
            keep = whole_channels(keep.view(*at.shape[:2], -1).any(2).any(0), at)
        if not keep.any():
            raise PykdError(f"a penalty of {self.penalty:g} leaves nothing of it: take a smaller one, or skip it")
        return problem.solve(keep, self.ridge), keep
