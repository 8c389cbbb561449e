"""block_prox_ in plain PyTorch: the definition the kernels are judged against."""

import torch
from torch import Tensor

from pykd.reference.block_norm import Groups, Weights, as_list, by_group, norm_of


def _clipped_at(entries: Tensor, threshold: float) -> Tensor:
    """The level at which clipping takes ``threshold`` off the sum of a group's absolute values; 0 where that is all."""
    ordered = entries.abs().sort(-1, descending=True).values
    count = torch.arange(1, entries.shape[-1] + 1, dtype=entries.dtype, device=entries.device)
    levels = (ordered.cumsum(-1) - threshold) / count
    support = (ordered > levels).sum(-1, keepdim=True).clamp(min=1)
    return levels.gather(-1, support - 1).clamp(min=0)


def block_prox_(weights: Weights, *, groups: Groups = "in", norm: str = "l1_l2", threshold: float) -> None:
    for weight in as_list(weights):
        entries = by_group(weight.detach().double(), groups)
        if norm == "l1_linf":
            level = _clipped_at(entries, threshold)
            near = entries.clamp(-level, level)
        else:
            near = entries * (1 - threshold / norm_of(entries, norm).unsqueeze(-1)).clamp(min=0)
        if threshold == 0:
            near = entries
        places = by_group(torch.arange(1, weight.numel() + 1, device=weight.device).view_as(weight), groups)
        flat = torch.empty(weight.numel() + 1, dtype=weight.dtype, device=weight.device)
        flat[places] = near.to(weight.dtype)
        weight.detach().copy_(flat[1:].view_as(weight))
