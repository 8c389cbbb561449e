"""What a finished student's layers are like."""

from typing import Any

import torch
from torch import nn


@torch.no_grad()
def layers(student: nn.Module) -> dict[str, dict[str, Any]]:
    """What is left of every linear and convolutional layer, by name, as plain data.

    Returns:
        For each ``shape``, ``weights`` and ``kept`` (numbers of weights), ``sparsity``, ``kept_inputs`` and
        ``kept_outputs`` (numbers of units or channels with a weight left).

    Example:
        >>> layers(nn.Sequential(nn.Linear(2, 1)))["0"]["kept"]
        2
    """
    found = {}
    for name, layer in student.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            continue
        left = (layer.weight != 0).flatten(2).any(-1) if layer.weight.dim() > 2 else layer.weight != 0
        parts = layer.groups if isinstance(layer, nn.Conv2d) else 1  # each has inputs of its own
        apart = left.view(parts, len(left) // parts, left.shape[1])
        count = int(layer.weight.count_nonzero())
        found[name] = {
            "shape": list(layer.weight.shape),
            "weights": layer.weight.numel(),
            "kept": count,
            "sparsity": 1 - count / max(1, layer.weight.numel()),
            "kept_inputs": int(apart.any(1).sum()),
            "kept_outputs": int(left.any(1).sum()),
        }
    return found
