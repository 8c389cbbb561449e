"""The distance of a student's factors to a teacher's, each divided by its norm."""

import torch
from torch import Tensor

from pykd import _C
from pykd.ops._noise import explain

_BY_ROW = {"mean": False, "row": True}  # reduction, as the schema's by_row


def factor_loss(student: Tensor, teacher: Tensor, *, p: int = 1, reduction: str = "mean") -> Tensor:
    r"""Distance of the student's factors :math:`F_S` to the teacher's :math:`F_T`, each of length 1.

    .. math::
        d_i = \frac{F_{S,i}}{\lVert F_{S,i} \rVert_2} - \frac{F_{T,i}}{\lVert F_{T,i} \rVert_2}, \qquad
        L = \frac{1}{B n} \sum_{i=1}^{B} \sum_{j=1}^{n} |d_{ij}|^p
        \quad\text{or}\quad L = \frac{1}{B} \sum_{i=1}^{B} \lVert d_i \rVert_p

    Factor transfer (Kim, Park & Kwak 2018): each row's factor is one vector of :math:`n` entries. The mean
    for :math:`p = 1` is what the authors' code takes, the mean over the rows is the paper's formula. Neither factor's
    positive scale counts for the loss, however large or small; a vector of zeros stays one.

    Args:
        student: factors :math:`F_S`, ``[rows, ...]`` of two dimensions or more, float32, float64, float16 or bfloat16,
            any strides.
        teacher: factors :math:`F_T`, same shape and device; its dtype may differ (float64 only together).
        p: 1 or 2.
        reduction: ``"mean"`` over rows and entries, or ``"row"``, the mean of the rows' norms; 0 for no rows.

    Returns:
        A scalar, float64 for float64 factors, else float32.

    Raises:
        ValueError: if a shape or an option breaks a rule above.
        TypeError: if a dtype or device does.

    Gradients:
        First order in both, of those that require it; a second derivative raises. Equal factors cost exactly 0 with the
        gradient 0, as has a vector of zeros. A gradient beyond its dtype, as that of tiny factors, overflows. A row
        with NaN or infinity makes the loss NaN, and its own gradients.

    Cost:
        Each factor, of rows that fit the caches, is read once from memory and again from them: for its norm, the
        distance, the gradient. The backward pass does all three, as does :func:`factor_loss_and_grad`. No normalised
        copy, no scratch but a value a row; factors that are not contiguous are copied, forward and backward.

    Determinism:
        Bitwise reproducible on one device and build, for any number of threads.

    Example:
        >>> student, teacher = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])
        >>> factor_loss(student, teacher)
        tensor(0.4000)
        >>> factor_loss(student, 4 * student)
        tensor(0.)
    """
    op = "factor_loss"
    by_row = _by_row(op, p, reduction)
    if torch.compiler.is_compiling():
        return torch.ops.pykd.factor_loss(student, teacher, p, by_row)
    try:
        return _C.factor_loss(student, teacher, p, by_row)
    except TypeError as error:
        explain(op, error, student=student, teacher=teacher, p=p)


def factor_loss_and_grad(
    student: Tensor, teacher: Tensor, *, p: int = 1, reduction: str = "mean"
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    r"""The distance of :func:`factor_loss` and both gradients in one call, for loops without autograd.

    .. math::
        \frac{\partial L}{\partial F_S} = \frac{1}{\lVert F_S \rVert_2}
        \left(u - a\, u^\top a\right), \qquad a = \frac{F_S}{\lVert F_S \rVert_2}, \quad
        u = \frac{\partial L}{\partial d}

    for a row, and likewise :math:`-u` for the teacher's; :math:`u = \mathrm{sign}(d) / (B n)` for the mean and
    :math:`p = 1`.

    Args:
        student: as in :func:`factor_loss`, and so are all arguments.
        teacher: as there.
        p: as there.
        reduction: as there.

    Returns:
        The loss, and the gradients with respect to ``student`` and ``teacher``; none is differentiable.

    Raises:
        ValueError: if a shape or an option breaks a rule.
        TypeError: if a dtype or device does.

    Gradients:
        Not differentiable: it returns them. float16 gradients of the mean over many entries round to 0, there being no
        gradient from above to scale them by.

    Cost:
        One read of both factors from memory, two more from the caches, of rows that fit them, and one write of both
        gradients. Factors that are not contiguous are copied.

    Determinism:
        As :func:`factor_loss`.

    Example:
        >>> student, teacher = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])
        >>> loss, (of_student, of_teacher) = factor_loss_and_grad(student, teacher)
        >>> of_student
        tensor([[ 0.1120, -0.0840]])
        >>> of_teacher
        tensor([[-0.2500,  0.0000]])
    """
    op = "factor_loss_and_grad"
    by_row = _by_row(op, p, reduction)
    if torch.compiler.is_compiling():
        loss, *grads = torch.ops.pykd.factor_loss_and_grad(student, teacher, p, by_row)
        return loss, (grads[0], grads[1])
    try:
        loss, *grads = _C.factor_loss_and_grad(student, teacher, p, by_row)
    except TypeError as error:
        explain(op, error, student=student, teacher=teacher, p=p)
    return loss, (grads[0], grads[1])


def _by_row(op: str, p: int, reduction: str) -> bool:
    """The schema's by_row; refuses what C++ would take for a ``p`` of 1."""
    if isinstance(p, bool | Tensor):
        raise ValueError(f"{op}: p must be 1 or 2, got {p!r}")
    try:
        return _BY_ROW[reduction]
    except (KeyError, TypeError):
        raise ValueError(f"{op}: reduction must be one of {', '.join(_BY_ROW)}, got {reduction!r}") from None
