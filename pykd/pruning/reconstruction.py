"""The problem of one layer: few weights that give, from the student's inputs, what the teacher's layer gives."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from pykd.errors import PykdError

SINGULAR = 1e-13  # of a pivot, beside its column's own square
TOLERANCE = 1e-5  # of conjugate gradients, beside the first residual


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

    so that value, gradient and minimum cost no more for many images than for few. Of few images the inputs themselves
    are kept, as long as that is less. The layer's bias cancels. Where teacher and student see the same in all terms,
    R and c are 0.

    Args:
        layer: the teacher's, ``Linear`` or ``Conv2d`` with ``groups=1``; its weight is :math:`W^T`.
        terms: of the objective; those of weight 0 cost nothing.

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
        self._layer, self._terms = layer, [term for term in terms if term.weight]
        self._weight = layer.weight.detach().flatten(1).double()
        columns = self._weight.shape[1]
        self._a = self._weight.new_zeros(columns, columns)
        self._r = torch.zeros_like(self._weight)
        self._c = 0.0
        self._parts: list[tuple[Tensor, Tensor]] = []  # inputs and errors that are not in A, R and c yet
        self.outputs = 0

    @torch.no_grad()
    def add(self, teacher: Tensor, student: Tensor) -> None:
        """Takes in a batch of the layer's inputs in the teacher and in the student, of one shape."""
        of_teacher, of_student = self._columns(teacher), self._columns(student)
        for weight, target, mine in self._terms:
            seen = torch.lerp(of_student, of_teacher, mine)
            error = (target - mine) * (self._weight.to(seen.dtype) @ (of_teacher - of_student))
            self._parts.append((math.sqrt(weight) * seen, math.sqrt(weight) * error))
        self.outputs += len(self._weight) * of_teacher.shape[1]
        if 2 * self._places >= len(self._a):
            self._fold()

    @property
    def _places(self) -> int:
        """How many of them are not in A, R and c yet."""
        return sum(seen.shape[1] for seen, _ in self._parts)

    def _few(self) -> tuple[Tensor, Tensor]:
        """Inputs and errors of all places, where none is in A, R and c yet."""
        seen, error = zip(*self._parts, strict=True)
        return torch.cat(seen, 1), torch.cat(error, 1)

    def _fold(self) -> None:
        for seen, error in self._parts:
            seen, error = seen.double(), error.double()
            self._a += seen @ seen.T
            self._r += error @ seen.T
            self._c += float(error.square().sum())
        self._parts = []

    @property
    def a(self) -> Tensor:
        self._fold()
        return self._a

    @property
    def r(self) -> Tensor:
        self._fold()
        return self._r

    @property
    def c(self) -> float:
        self._fold()
        return self._c

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

    def slope(self, columns: Tensor) -> Callable[[Tensor], Tensor]:
        """dL/dW of these columns' weights, float32 ``[out_channels, columns]``, as a function of them.

        All other weights are 0. A step's cost is that of ``gradient`` for as many columns, or less where the images
        are few.
        """
        gone = torch.ones(len(self._a), dtype=torch.bool, device=columns.device)
        gone[columns] = False
        scale, its = 2 / max(1, self.outputs), self._weight[:, columns].float()
        if 2 * self._places < len(columns) and self._parts:
            seen, error = self._few()
            mine, shift = seen[columns].float(), (error + self._weight[:, gone].to(seen.dtype) @ seen[gone]).float()
            forth, back = _product(mine), _product(scale * mine.T)
            return lambda weight: back(forth(weight - its) - shift)
        r = scale * (self.r[:, columns] + self._weight[:, gone] @ self.a[gone][:, columns])
        by_a, r = _product((scale * self.a[columns][:, columns]).float()), r.float()
        return lambda weight: by_a(weight - its).sub_(r)

    def channels(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        r"""What each input channel gives of the outputs: :math:`\langle Y_i, Y_j \rangle` and :math:`\langle Y_i, Y
        \rangle`.

        :math:`Y_i` is what channel i gives under ``weight``, Y what the teacher's layer gives; so that, with a factor
        :math:`\beta_i` for every channel, :math:`n L = \beta^\top M \beta - 2 \beta^\top v + \text{const}`.

        Returns:
            M, float64 ``[in_channels, in_channels]``, and v, float64 ``[in_channels]``.
        """
        mine, count = weight.detach().flatten(1).double(), weight.shape[1]
        products = (mine.T @ mine * self.a).view(count, -1, count, mine.shape[1] // count).sum((1, 3))
        return products, ((self._weight @ self.a + self.r) * mine).sum(0).view(count, -1).sum(1)

    def solve(
        self, mask: Tensor, ridge: float = 1e-6, start: Tensor | None = None, tolerance: float = TOLERANCE
    ) -> Tensor:
        r"""The weights that minimise L among those that are zero where ``mask`` is False.

        A distance to the teacher's weights, :math:`\rho \lVert W - W^T \rVert^2`, is added, with :math:`\rho` being
        ``ridge`` times the mean of A's diagonal: with few images many weights would give the same.

        Args:
            mask: bool, of the weight's shape or another that flattens to the same columns.
            ridge: not negative.
            start: where conjugate gradients begin, of the mask's shape; None for the teacher's weights.
            tolerance: they end where every row's residual is this share of its first.

        Returns:
            In the dtype of the layer's weight, and the mask's shape.

        Raises:
            PykdError: the problem has many solutions, which a ridge above 0 tells apart.

        Cost: where all rows keep the same, one factorisation of kept columns x kept columns, or of places x places
        where those of few images are less; else conjugate gradients of all rows together, each step a product of
        out_channels x columns x columns, or of twice places in place of the last.
        """
        keep = mask.flatten(1)
        kept, same = keep.any(0).nonzero().flatten(), bool((keep == keep[:1]).all())
        few = ridge > 0 and 0 < 2 * self._places < len(self._a)
        seen, error = (each.double() for each in (self._few() if few else (self.a, self.r)))
        diagonal = seen.square().sum(1) if few else seen.diagonal()
        rho = ridge * (float(diagonal.mean()) or 1.0)
        solved = torch.where(keep, self._weight, 0)
        if len(kept) and (same or not ridge):
            mine = seen[kept] if few else seen[kept[:, None], kept]
            inner = mine.T @ mine if few else mine.clone()
            inner.diagonal().add_(rho)
            factor, failed = torch.linalg.cholesky_ex(inner)
            if failed or (factor.diagonal().square() < SINGULAR * inner.diagonal()).any():
                raise PykdError("its least squares have many solutions: take more images, or a ridge above 0")
            goal = error + (self._weight - solved) @ seen
            if few:
                solved[:, kept] += torch.cholesky_solve(goal.T, factor).T @ mine.T
            else:
                solved[:, kept] += torch.cholesky_solve(goal[:, kept].T, factor).T
        if not same:

            def times(weight: Tensor) -> Tensor:
                return (weight @ seen @ seen.T if few else weight @ seen) + rho * weight

            begin = torch.where(keep, self._weight if start is None else start.flatten(1).double(), 0)
            rest = (error @ seen.T if few else error) + times(self._weight - begin)
            solved = _conjugate_gradients(times, diagonal + rho, begin, rest * keep, keep, tolerance)
        layer: Any = self._layer
        return solved.to(layer.weight.dtype).view_as(mask)


def _product(right: Tensor) -> Callable[[Tensor], Tensor]:
    """What multiplies a matrix with ``right``, float32.

    On the CPU oneDNN does, which takes AVX-512 on every processor that has it; torch's ``@`` is MKL's.
    """
    if right.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return lambda left: left @ right
    packed = right.T.contiguous().to_mkldnn()
    return lambda left: F.linear(left.to_mkldnn(), packed).to_dense()


def _conjugate_gradients(
    times: Callable[[Tensor], Tensor], diagonal: Tensor, solved: Tensor, rest: Tensor, keep: Tensor, tolerance: float
) -> Tensor:
    """For each row what ``times`` makes its goal of, among what is zero where ``keep`` is False.

    ``solved`` is where it begins, ``rest`` what is then missing from the goal, ``diagonal`` that of ``times``.
    """
    diagonal = torch.where(diagonal > 0, diagonal, 1)
    direction = ahead = rest / diagonal
    size = (rest * ahead).sum(1, keepdim=True)
    enough = tolerance**2 * size
    for _ in range(2 * len(diagonal)):
        if (size <= enough).all():
            break
        pulled = times(direction) * keep
        curvature = (direction * pulled).sum(1, keepdim=True)
        step = torch.where(curvature > 0, size / curvature, 0)
        solved, rest = solved + step * direction, rest - step * pulled
        ahead = rest / diagonal
        last, size = size, (rest * ahead).sum(1, keepdim=True)
        direction = ahead + torch.where(last > 0, size / last, 0) * direction
    return solved


class Activated:
    r"""A layer's objective with the activation s in it: :math:`\lVert s(W^T * h) - s(W * h') \rVert^2`.

    It is no quadratic: the inputs are kept, and each gradient runs the layer on all of them.

    Args:
        layer: as of :class:`Reconstruction`, with its bias.
        terms: as there.
        after: s.
    """

    def __init__(self, layer: nn.Module, terms: Sequence[Term], after: Callable[[Tensor], Tensor]) -> None:
        Reconstruction(layer, ())
        self._layer, self._terms, self._after = layer, [term for term in terms if term.weight], after
        self._parts: list[tuple[float, Tensor, Tensor]] = []
        self.outputs = 0

    @torch.no_grad()
    def add(self, teacher: Tensor, student: Tensor) -> None:
        """Takes in a batch of the layer's inputs in the teacher and in the student, of one shape."""
        for weight, target, mine in self._terms:
            taught = self._after(self._layer(torch.lerp(student, teacher, target)))
            self._parts.append((weight, taught, torch.lerp(student, teacher, mine)))
        self.outputs += taught.numel()

    def loss(self, weight: Tensor) -> float:
        """L(W) of a weight of the layer's shape."""
        with torch.no_grad():
            return sum(float(self._distance(weight, *part)) for part in self._parts) / max(1, self.outputs)

    def slope(self, columns: Tensor) -> Callable[[Tensor], Tensor]:
        """As of :class:`Reconstruction`; each call runs the layer forwards and backwards on all inputs."""
        layer: Any = self._layer
        shape = layer.weight.shape

        def gradient(weight: Tensor) -> Tensor:
            whole = layer.weight.new_zeros(len(weight), math.prod(shape[1:]))
            whole[:, columns] = weight.to(whole.dtype)
            whole.requires_grad_()
            total = torch.zeros_like(weight)
            for part in self._parts:
                (each,) = torch.autograd.grad(self._distance(whole.view(shape), *part), whole)
                total += each[:, columns]
            return total / max(1, self.outputs)

        return gradient

    def _distance(self, weight: Tensor, factor: float, taught: Tensor, inputs: Tensor) -> Tensor:
        answered = self._after(functional_call(self._layer, {"weight": weight}, (inputs,)))
        return factor * (taught - answered).square().sum()


def _mode(layer: nn.Conv2d) -> str:
    return "constant" if layer.padding_mode == "zeros" else layer.padding_mode
