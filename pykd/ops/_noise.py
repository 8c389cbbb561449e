"""The noise arguments that several ops share: their names in Python, and the seed."""

from collections.abc import Mapping
from typing import NoReturn

import torch
from torch import Generator, Tensor

PER_SAMPLE = {"logit": False, "sample": True}  # noise_shape, as the schema's per_sample
ADDITIVE = {"multiplicative": False, "additive": True}  # noise_kind, as the schema's additive
REDUCTION = {"none": 0, "batchmean": 1, "sum": 2}


def reject(op: str, *, reduction: str, noise_shape: str, noise_kind: str) -> NoReturn:
    """Raises for the first of the names that its table lacks."""
    names: list[tuple[str, str, Mapping[str, int]]] = [
        ("reduction", reduction, REDUCTION),
        ("noise_shape", noise_shape, PER_SAMPLE),
        ("noise_kind", noise_kind, ADDITIVE),
    ]
    argument, value, table = next(name for name in names if name[1] not in name[2])
    raise ValueError(f"{op}: {argument} must be one of {', '.join(table)}, got {value!r}") from None


def traced_seed(
    op: str, logits: Tensor, sigma: float, alpha: float, seed: Tensor | None, generator: Generator | None
) -> Tensor | None:
    """The seed under torch.compile, drawn by a traced operation where none is given; eager calls draw it in C++."""
    if generator is not None:
        raise ValueError(f"{op}: torch.compile cannot trace generator=, pass seed= instead")
    if seed is None and sigma > 0 and alpha > 0:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=logits.device)
    return seed
