"""Groups of weights that are small become zero."""

import math

import torch
from torch import Tensor, nn

from pykd.ops import block_norms


@torch.no_grad()
def prune_groups_(
    module: nn.Module, *, groups: str | tuple[int, int] = "in", norm: str = "l1_l2", threshold: float
) -> dict[str, Tensor]:
    """Zeroes, in place, the groups of weights whose norm is at most ``threshold``; biases stay.

    Args:
        module: a network; its layers of the classes ``Linear`` and ``Conv2d`` are looked through.
        groups: ``"in"``, ``"out"``, ``"kernel"`` or ``(rows, columns)``, as of :func:`pykd.ops.block_norms`.
        norm: ``"l1_l2"`` for the Euclidean norm of a group, ``"l1_linf"`` for its largest absolute value.
        threshold: not negative; 0 finds the groups that are zero already. A group that holds NaN stays.

    Returns:
        For each layer, by name, a bool tensor of the shape of its ``block_norms``: True for the zeroed groups.

    Raises:
        ValueError: ``threshold`` is negative or not a number, or ``groups`` or ``norm`` of another form.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 0.1], [4.0, 0.1]]))
        >>> prune_groups_(layer, groups="in", threshold=1.0)
        {'': tensor([False,  True])}
        >>> layer.weight.tolist()
        [[3.0, 0.0], [4.0, 0.0]]
    """
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or math.isnan(threshold) or threshold < 0:
        raise ValueError(f"threshold should be a number that is not negative, got {threshold!r}")
    zeroed = {}
    for name, layer in module.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            small = grid = block_norms(layer.weight, groups=groups, norm=norm) <= threshold
            rows, columns = layer.weight.flatten(1).shape
            if isinstance(groups, str):
                grid = {"in": small[None], "out": small[:, None], "kernel": small}[groups]
                height, width = rows // len(grid), columns // grid.shape[1]
            else:
                height, width = min(groups[0], rows), min(groups[1], columns)
            mask = grid.repeat_interleave(height, 0).repeat_interleave(width, 1)[:rows, :columns]
            layer.weight.masked_fill_(mask.view_as(layer.weight), 0)
            zeroed[name] = small
    return zeroed
