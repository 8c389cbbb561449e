"""The sum of group norms of a network's weights."""

import torch
from torch import Tensor

from pykd import _C
from pykd.ops._groups import Groups, Weights, as_list, packed
from pykd.ops._noise import explain


def block_norm(
    weights: Weights,
    *,
    groups: Groups = "in",
    norm: str = "l1_l2",
    teachers: Weights | None = None,
    scale_by_size: bool = False,
) -> Tensor:
    r"""Sum of the norms of groups of weights: the group lasso, of a student alone or beside its teacher.

    .. math::
        R = \sum_g s_g \sqrt{\|S_g\|_2^2 + \|T_g\|_2^2} \quad (\text{l1\_l2}), \qquad
        R = \sum_g s_g \max(\max |S_g|, \max |T_g|) \quad (\text{l1\_linf})

    over the groups :math:`g` of all weights, with the student's entries :math:`S_g`, the teacher's :math:`T_g` (none
    without teachers) and :math:`s_g = 1`, or the root of the number of both sides' entries. It drives whole groups of
    the student to zero: Yuan & Lin (2006, section 2); with the teacher's weights concatenated, those the least in
    which the teacher is strong: Hegde, Prasad, Hebbalaguppe & Kumar (2020).

    A weight is the matrix ``[out, in * kernel height * kernel width]``, cut into a grid of blocks, the groups.
    A teacher's weight is cut by the same rule. The group in row i and column j of its grid joins the student's there,
    so that the two may differ in shape; a group which only one side has stands alone.

    Args:
        weights: :math:`S`, ``[out, in]`` or ``[out, in, kernel height, kernel width]``, float32, float64, float16 or
            bfloat16, any strides; or a list of such, of one dtype and device. An empty list sums to 0.
        groups: a group is all weights of an input channel (``"in"``), of an output channel (``"out"``), of a pair of
            them (``"kernel"``), or a block (rows, columns) of the matrix, which is smaller at its edges.
        norm: ``"l1_l2"`` or ``"l1_linf"``.
        teachers: :math:`T`, one for each weight, of the same device; its dtype may differ (float64 only together).
            Gets no gradient.
        scale_by_size: multiply a group's norm by the root of its number of entries, so that large groups are not
            favoured.

    Returns:
        :math:`R`, a scalar; float64 for float64 weights, else float32.

    Raises:
        ValueError: if a shape or an option breaks a rule above.
        TypeError: if a dtype or device does.

    Gradients:
        First order, in ``weights``. l1_l2: :math:`s_g S_g / \sqrt{\|S_g\|^2 + \|T_g\|^2}`, and 0 where that norm is 0.
        l1_linf: :math:`s_g` times the sign at the student's largest entries, in equal parts where several tie, and 0
        where the teacher's largest is as large. The second derivative raises. An entry that is infinite or NaN shows
        in the value and in the gradient of its own group alone.

    Cost:
        One read of all weights; the gradient one more, and one write. No scratch but a number each 8000 weights.

    Determinism:
        Bitwise reproducible on one device and build, for any number of threads. CPU and CUDA agree to rounding.

    Example:
        >>> weight = torch.tensor([[3.0, 0.0], [4.0, 0.0]])
        >>> block_norm(weight, groups="in")
        tensor(5.)
        >>> block_norm(weight, groups="in", teachers=torch.tensor([[12.0, 2.0]]))
        tensor(15.)
        >>> block_norm([weight, weight], groups=(2, 2), norm="l1_linf")
        tensor(8.)
    """
    op = "block_norm"
    students, others = as_list(op, "weights", weights), as_list(op, "teachers", teachers)
    how = packed(op, groups, norm)
    if not students and not others:
        return torch.zeros((), dtype=torch.float32)
    call = torch.ops.pykd.block_norm if torch.compiler.is_compiling() else _C.block_norm
    try:
        return call(students, others, *how, scale_by_size)
    except TypeError as error:
        explain(op, error, scale_by_size=scale_by_size)


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
    r"""The value of :func:`block_norm` and its gradient, in one call without autograd.

    .. math:: \left(c R,\; c\, \partial R / \partial S\right), \qquad c = \text{scale}

    For loops of one's own. With ``out=[w.grad for w in weights]`` and ``accumulate=True`` it adds the regulariser
    :math:`c R` to the gradients of a loss.

    Args:
        weights: as in :func:`block_norm`, and so are all arguments but the last three.
        groups: as there.
        norm: as there.
        teachers: as there.
        scale_by_size: as there.
        scale: :math:`c`, a factor of value and gradient. :func:`torch.compile` compiles anew for each value.
        out: buffers for the gradients, one for each weight, contiguous, of its shape and dtype, apart from each other
            and from teachers; may be the weights themselves. Fresh memory costs more than the arithmetic, so reuse
            them.
        accumulate: add to ``out`` instead of overwriting it.

    Returns:
        The value, and the gradients with respect to ``weights``: a Tensor for a Tensor, else a list (``out`` where
        given). None of them is differentiable.

    Raises:
        ValueError: if a shape or an option breaks a rule.
        TypeError: if a dtype or device does.

    Gradients:
        Not differentiable: it returns the gradients.

    Cost:
        One read of the weights from memory and one write of the gradients: 8 bytes a float32 weight, 12 to accumulate.

    Determinism:
        As :func:`block_norm`.

    Example:
        >>> weight = torch.tensor([[3.0, 0.0], [4.0, 0.0]])
        >>> block_norm_and_grad(weight, groups="in", scale=10.0)
        (tensor(50.), tensor([[6., 0.],
                [8., 0.]]))
    """
    op = "block_norm_and_grad"
    if accumulate and out is None:
        raise ValueError(f"{op}: accumulate=True needs a buffer, pass it as out=")
    students, others = as_list(op, "weights", weights), as_list(op, "teachers", teachers)
    buffers = as_list(op, "out", out)
    arguments = (students, others, *packed(op, groups, norm), scale_by_size, scale)
    if not (students or others or buffers):
        return torch.zeros((), dtype=torch.float32), [] if out is None else out
    calls = torch.ops.pykd if torch.compiler.is_compiling() else _C
    try:
        if out is not None:
            call = torch.ops.pykd.block_norm_and_grad.out if calls is not _C else _C.block_norm_and_grad_out
            return call(*arguments, accumulate, buffers), out
        value, grads = calls.block_norm_and_grad(*arguments)
    except TypeError as error:
        explain(op, error, scale_by_size=scale_by_size, scale=scale, accumulate=accumulate)
    return value, grads[0] if isinstance(weights, Tensor) else grads


def block_norms(weight: Tensor, *, groups: Groups = "in", norm: str = "l1_l2") -> Tensor:
    r"""The norm of each group of one weight: which of its channels, kernels or blocks still matter.

    .. math:: n_g = \|W_g\|_2 \quad (\text{l1\_l2}), \qquad n_g = \max |W_g| \quad (\text{l1\_linf})

    The groups are those of :func:`block_norm`, the sum of these numbers.

    Args:
        weight: as in :func:`block_norm`, one alone.
        groups: as there.
        norm: as there.

    Returns:
        ``[in]``, ``[out]``, ``[out, in]`` for ``"in"``, ``"out"``, ``"kernel"``; for (rows, columns) the grid, ``[rows
        of blocks, columns of blocks]``. float64 for a float64 weight, else float32. A group without entries has 0.

    Raises:
        ValueError: if a shape or an option breaks a rule.
        TypeError: if a dtype does.

    Gradients:
        Not differentiable.

    Cost:
        One read of the weight.

    Determinism:
        As :func:`block_norm`.

    Example:
        >>> block_norms(torch.tensor([[3.0, 0.0], [4.0, 0.0]]), groups="in")
        tensor([5., 0.])
        >>> block_norms(torch.ones(4, 6), groups=(2, 4))
        tensor([[2.8284, 2.0000],
                [2.8284, 2.0000]])
    """
    op = "block_norms"
    call = torch.ops.pykd.block_norms if torch.compiler.is_compiling() else _C.block_norms
    try:
        return call(weight, *packed(op, groups, norm))
    except TypeError as error:
        explain(op, error, weight=weight)
