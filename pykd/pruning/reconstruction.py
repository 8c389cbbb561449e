"""The problem of one layer: few weights that give, from the student's inputs, what the teacher's layer gives."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pykd.errors import PykdError


class Term(NamedTuple):
    r"""One squared distance of the objective: which inputs teacher and student see.

    With the inputs :math:`h^T` and :math:`h^S` that the layer has in the teacher and in the student:

    Args:
        weight: factor of the distance.
        target: share of :math:`h^T` in what the teacher's layer sees; the rest is :math:`h^S`.
        input: the same for the student's layer.
    """

    weight: float
    target: float
    input: float


class Reconstruction:
    r"""A layer's objective, gathered from batches of inputs.

    .. math::
        L(W) = \frac{1}{n} \sum_j w_j \lVert W^T * (a_j h^T + (1 - a_j) h^S) - W * (b_j h^T + (1 - b_j) h^S) \rVert^2

    over the terms :math:`(w_j, a_j, b_j)`, n being the number of outputs. It is a quadratic of W: of all inputs there
    remain the products of unfolded inputs with one another,

    .. math:: n L(W) = \mathrm{tr}(E A E^\top) - 2\, \mathrm{tr}(E R^\top) + c, \qquad E = W - W^T

    so that value, gradient and minimum cost no more for many images than for few. The layer's bias cancels. Where
    teacher and student see the same in all terms, R and c are 0.

    Args:
        layer: the teacher's, ``Linear`` or ``Conv2d`` with ``groups=1``; its weight is :math:`W^T`.
        terms: of the objective.

    Attributes:
        a: A, float64 ``[columns, columns]``, columns being in_channels times the kernel's places.
        r: R, float64 ``[out_channels, columns]``.
        c: c, a float.
        outputs: n.

    Raises:
        PykdError: a grouped convolution, or a layer of another kind.

    Cost: of ``add``, a product of columns x columns x places for each term, a place being an output's of an image; of
    ``loss`` and ``gradient``, one of out_channels x columns x columns.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> problem = Reconstruction(layer, [Term(1.0, 1.0, 1.0)])
        >>> problem.add(torch.eye(3), torch.zeros(3, 3))
        >>> problem.loss(layer.weight.detach())
        0.0
    """

    def __init__(self, layer: nn.Module, terms: Sequence[Term]) -> None:
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            raise PykdError(f"a {type(layer).__name__} has no layer problem: take a Linear or a Conv2d")
        if isinstance(layer, nn.Conv2d) and layer.groups != 1:
            raise PykdError(f"a convolution of {layer.groups} groups has no common inputs: leave it out")
        self._layer, self._terms = layer, list(terms)
        self._weight = layer.weight.detach().flatten(1).double()
        columns = self._weight.shape[1]
        self.a = self._weight.new_zeros(columns, columns)
        self.r = torch.zeros_like(self._weight)
        self.c = 0.0
        self.outputs = 0

    @torch.no_grad()
    def add(self, teacher: Tensor, student: Tensor) -> None:
        """Takes in a batch of the layer's inputs in the teacher and in the student, of one shape."""
        of_teacher, of_student = self._columns(teacher).double(), self._columns(student).double()
        for weight, target, mine in self._terms:
            seen = torch.lerp(of_student, of_teacher, mine)
            self.a += weight * (seen @ seen.T)
            if mine != target:
                error = (target - mine) * (self._weight @ (of_teacher - of_student))
                self.r += weight * (error @ seen.T)
                self.c += weight * float(error.square().sum())
        self.outputs += len(self._weight) * of_teacher.shape[1]

    def _columns(self, inputs: Tensor) -> Tensor:
        """``[columns, places]``: what each weight of an output is multiplied with, place by place."""
        layer = self._layer
        if isinstance(layer, nn.Linear):
            return inputs.flatten(0, -2).T
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            inputs, padding = F.pad(inputs, layer._reversed_padding_repeated_twice, _mode(layer)), (0, 0)
        else:
            padding = layer.padding  # type: ignore[assignment]
        unfolded = F.unfold(inputs, layer.kernel_size, layer.dilation, padding, layer.stride)
        return unfolded.transpose(0, 1).flatten(1)

    def loss(self, weight: Tensor) -> float:
        """L(W) of a weight of the layer's shape."""
        e = self._error(weight)
        return max(0.0, float((e @ self.a * e).sum() - 2 * (e * self.r).sum()) + self.c) / max(1, self.outputs)

    def gradient(self, weight: Tensor) -> Tensor:
        """dL/dW, in the weight's dtype and shape."""
        e = self._error(weight)
        return (2 / max(1, self.outputs) * (e @ self.a - self.r)).to(weight.dtype).view_as(weight)

    def _error(self, weight: Tensor) -> Tensor:
        return weight.detach().flatten(1).double() - self._weight

    def solve(self, mask: Tensor, ridge: float = 1e-6) -> Tensor:
        r"""The weights that minimise L among those that are zero where ``mask`` is False.

        A distance to the teacher's weights, :math:`\rho \lVert W - W^T \rVert^2`, is added, with :math:`\rho` being
        ``ridge`` times the mean of A's diagonal: with few images many weights would give the same.

        Args:
            mask: bool, of the weight's shape.
            ridge: not negative.

        Returns:
            In the dtype and shape of the layer's weight.

        Raises:
            PykdError: the problem has many solutions, which a ridge above 0 tells apart.

        Cost: one factorisation of kept columns x kept columns where all rows keep the same, else one for each row.
        """
        keep = mask.flatten(1)
        rho = ridge * float(self.a.diagonal().mean())
        a = self.a + rho * torch.eye(len(self.a), dtype=self.a.dtype, device=self.a.device)
        b = self._weight @ a + self.r
        solved = torch.zeros_like(b)
        rows = [slice(None)] if bool((keep == keep[:1]).all()) else [slice(i, i + 1) for i in range(len(keep))]
        for each in rows:
            kept = keep[each][0].nonzero().flatten()
            if len(kept):
                factor, failed = torch.linalg.cholesky_ex(a[kept[:, None], kept])
                if failed:
                    raise PykdError("its least squares have many solutions: take more images, or a ridge above 0")
                solved[each, kept] = torch.cholesky_solve(b[each, kept].T, factor).T
        weight = self._layer.weight
        return solved.to(weight.dtype).view_as(weight)  # type: ignore[operator, arg-type]


def _mode(layer: nn.Conv2d) -> str:
    return "constant" if layer.padding_mode == "zeros" else layer.padding_mode
