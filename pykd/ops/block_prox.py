"""The proximal operator of a sum of group norms."""

import torch

from pykd import _C
from pykd.ops._groups import Groups, Weights, as_list, packed
from pykd.ops._noise import explain


def block_prox_(weights: Weights, *, groups: Groups = "in", norm: str = "l1_l2", threshold: float) -> None:
    r"""Shrinks groups of weights in place, to exact zeros where they are small: the proximal step of a group norm.

    .. math:: W \leftarrow \arg\min_X \tfrac{1}{2} \|X - W\|_2^2 + t \sum_g \|X_g\|, \qquad t = \text{threshold}

    A gradient step on a loss followed by this one, with :math:`t` the step size times the strength of the
    regulariser, minimises their sum and leaves whole groups at zero. In closed form, a group at a time,

    .. math::
        W_g \leftarrow W_g \max(0, 1 - t / \|W_g\|_2) \quad (\text{l1\_l2}), \qquad
        W_g \leftarrow \mathrm{sign}(W_g) \min(|W_g|, \theta_g) \quad (\text{l1\_linf})

    l1_l2: Yuan & Lin (2006, section 2). l1_linf: what :math:`\theta_g` clips off is the projection on the l1 ball of
    radius :math:`t` (Duchi, Shalev-Shwartz, Singer & Chandra, 2008, section 3), :math:`\sum \max(|W_g| - \theta_g, 0) =
    t`, or all, where :math:`\sum |W_g| \le t`; found without sorting, by the finite iteration of Michelot (1986).

    Args:
        weights: as in :func:`pykd.ops.block_norm`; overwritten, so each has memory of its own. They must not require
            grad while gradients are recorded: call it under :func:`torch.no_grad`, as optimisers do.
        groups: as there.
        norm: as there.
        threshold: :math:`t`, finite and >= 0; 0 leaves every bit as it is. :func:`torch.compile` compiles anew for
            each value.

    Returns:
        Nothing.

    Raises:
        ValueError: if a shape or an option breaks a rule above.
        TypeError: if a dtype or device does.

    Gradients:
        None. Autograd notices that the weights have changed.

    Cost:
        One read of the weights from memory and one write, in place; l1_linf takes some six passes over a group in the
        caches. Weights that are not contiguous are copied, and back.

    Determinism:
        Bitwise reproducible on one device and build, for any number of threads. CPU and CUDA agree to rounding.

    Example:
        >>> weight = torch.tensor([[3.0, 0.1], [4.0, 0.1]])
        >>> block_prox_(weight, groups="in", threshold=1.0)
        >>> weight
        tensor([[2.4000, 0.0000],
                [3.2000, 0.0000]])
    """
    op = "block_prox_"
    found, how = as_list(op, "weights", weights), packed(op, groups, norm)
    if not found:
        return
    call = torch.ops.pykd.block_prox_ if torch.compiler.is_compiling() else _C.block_prox_
    try:
        call(found, *how, threshold)
    except TypeError as error:
        explain(op, error, threshold=threshold)
