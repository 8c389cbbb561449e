"""Weights of one layer on 255 levels an output, chosen under its reconstruction problem."""

import torch
from torch import Tensor

from pykd.pruning.reconstruction import Reconstruction

LEVELS = 127  # on either side of 0, as int8 without its smallest


@torch.no_grad()
def rounded(problem: Reconstruction, weight: Tensor, ridge: float = 0.0, sweeps: int = 2) -> Tensor:
    r"""The weight as int8 levels times a scale for each output, where the levels minimise the layer's loss.

    The scale of an output is its largest weight / 127. From the nearest levels on, every weight in turn gets the level
    that is best beside all others, which never raises what is minimised, the loss and :math:`\rho \lVert W - W^0
    \rVert^2`: with :math:`W^0` the weight as given and the gradient :math:`g = (W - W^T) A - R + \rho (W - W^0)`,

    .. math:: q_{oj} \leftarrow \mathrm{round}\bigl(q_{oj} - g_{oj} / (s_o (A_{jj} + \rho))\bigr)

    Zeros stay zero. A model file with int8 values holds these very levels.

    Args:
        problem: the layer's.
        weight: of its layer's shape.
        ridge: :math:`\rho` beside the mean of A's diagonal: with few images many levels would give the same.
        sweeps: how often every weight has its turn.

    Returns:
        Levels times scales, in the weight's dtype and shape.

    Cost: for each sweep a product of out_channels x columns x columns.

    Example:
        >>> from torch import nn
        >>> problem = Reconstruction(nn.Linear(2, 1), [])
        >>> rounded(problem, torch.tensor([[1.27, 0.004]]))
        tensor([[1.2700, 0.0000]])
    """
    mine, a = weight.flatten(1).double(), problem.a.clone()
    rho = ridge * float(a.diagonal().mean())
    a.diagonal().add_(rho)
    top, largest = mine.abs().max(1)
    scale = torch.where(top > 0, top / LEVELS, 1)
    levels = (mine / scale[:, None]).round()
    moves = mine != 0
    moves[torch.arange(len(mine)), largest] = False  # so that the scale stays what it is
    at = levels * scale[:, None]
    gradient = problem.gradient(at) * (problem.outputs / 2) + rho * (at - mine)
    for _ in range(sweeps):
        for column in range(len(a)):
            if a[column, column] <= 0:
                continue
            best = levels[:, column] - gradient[:, column] / (scale * a[column, column])
            best = torch.where(moves[:, column], best.round().clamp(-LEVELS, LEVELS), levels[:, column])
            change = (best - levels[:, column]) * scale
            levels[:, column] = best
            rows = change.nonzero().flatten()
            gradient[rows] += change[rows, None] * a[column]
    return (levels * scale[:, None]).to(weight.dtype).view_as(weight)
