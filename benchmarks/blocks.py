"""What the benchmarks of group norms share: a weight, the cases, and the weight as a view of its blocks."""

from collections.abc import Callable

import pytest
import torch
from alternating import FLOATS, Shape, in_turns
from torch import Tensor

Groups = str | tuple[int, int]
Variant = tuple[Groups, str]  # and the norm
# shape, groups, threads: a small layer, one of a million weights, and one that no cache holds
CASES: list[tuple[Shape, Groups, int]] = [
    ((320, 320), (4, 4), 1),
    ((320, 320), (16, 16), 1),
    ((1024, 1024), (4, 4), 1),
    ((1024, 1024), (16, 16), 1),
    ((1024, 1024), "in", 1),
    ((3200, 3200), (4, 4), 1),
    ((1024, 1024), (4, 4), 2),
]
NORMS = ["l1_l2", "l1_linf"]


class Weight:
    """One weight and its buffers; every implementation works on the same."""

    def __init__(self, rows: int, columns: int, device: str, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(rows + columns)
        self.weight = (0.1 * torch.randn(rows, columns, generator=generator, device=device)).to(dtype)
        self.leaf = self.weight.clone().requires_grad_()
        self.result = torch.zeros_like(self.weight)

    def renew(self) -> None:
        self.result.copy_(self.weight)


def blocks(weight: Tensor, groups: Groups) -> Tensor:
    """``[grid rows, rows, grid columns, columns]``: a group in the second and the last dimension."""
    rows, columns = {"in": (len(weight), 1), "out": (1, weight.shape[1])}.get(groups, groups)
    return weight.view(len(weight) // rows, rows, -1, columns)


def suffix(groups: Groups, norm: str) -> str:
    """Of a case's name in the table."""
    return f", {groups if isinstance(groups, str) else f'{groups[0]}x{groups[1]}'}, {norm}"


def runs(implementations: Callable[[Weight, Variant], dict], cases: list[tuple[Shape, Groups, int]]) -> list:
    """All parameters in the order of measurement."""
    order, smallest = [], Weight(16, 16, "cpu", torch.float32)
    for shape, groups, threads in cases:
        for norm in NORMS:
            label = f"{shape[0]}x{shape[1]}-{threads}T{suffix(groups, norm).replace(', ', '-')}"
            for block, name in in_turns(list(implementations(smallest, (groups, norm))), 3):
                order.append(pytest.param(shape, groups, norm, threads, name, block, id=f"{label}-{name}-{block}"))
    return order


def gpu_cases(layer: list[str], large: Callable[[str, torch.dtype], list[str]]) -> list:
    """As ``alternating.runs_on_gpu`` has them: of a layer, and of a weight well past the caches.

    ``layer`` names the implementations that are measured on the first, ``large`` those of a norm and a dtype on the
    second.
    """
    cases = []
    for norm in NORMS:
        for groups in ("in", (16, 16)):
            cases.append(((1024, 1024), (groups, norm), torch.float32, layer))
        for groups in ("in", "out", (4, 4), (16, 16)):
            cases += [((9984, 9984), (groups, norm), dtype, large(norm, dtype)) for dtype in FLOATS]
    return cases
