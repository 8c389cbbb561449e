"""The arguments that several ops share: their names in Python, their types, and the seed."""

from numbers import Integral, Real
from typing import Any, NoReturn

import torch
from torch import Generator, Tensor

PER_SAMPLE = {"logit": False, "sample": True}  # noise_shape, as the schema's per_sample
ADDITIVE = {"multiplicative": False, "additive": True}  # noise_kind, as the schema's additive
REDUCTION = {"none": 0, "batchmean": 1, "sum": 2}
REVERSE = {"forward": False, "reverse": True}  # direction, as the schema's reverse

_NAMES: dict[str, list[str]] = {
    "reduction": [*REDUCTION],
    "direction": [*REVERSE],
    "noise_shape": [*PER_SAMPLE],
    "noise_kind": [*ADDITIVE],
}


def reject(op: str, **arguments: str) -> NoReturn:
    """Raises for the first of the arguments whose value is not one of its names."""
    argument, value = next(pair for pair in arguments.items() if pair[1] not in _NAMES[pair[0]])
    raise ValueError(f"{op}: {argument} must be one of {', '.join(_NAMES[argument])}, got {value!r}") from None


# What the operators' arguments must be, in words and as types; arguments that are not here are integers.
_TENSOR = ("a Tensor", (Tensor,))
_TENSOR_OR_NONE = ("a Tensor or None", (Tensor, type(None)))
_NUMBER = ("a number", (Real,))
_TYPES: dict[str, tuple[str, tuple[type, ...]]] = {
    "logits": _TENSOR,
    "student": _TENSOR,
    "teacher": _TENSOR,
    "student_hidden": _TENSOR,
    "student_weight": _TENSOR,
    "teacher_hidden": _TENSOR,
    "teacher_weight": _TENSOR,
    "target": _TENSOR_OR_NONE,
    "input": _TENSOR,
    "weight": _TENSOR,
    "theta": _TENSOR,
    "log_sigma2": _TENSOR,
    "bias": _TENSOR_OR_NONE,
    "seed": _TENSOR_OR_NONE,
    "generator": ("a Generator or None", (Generator, type(None))),
    "temperature": _NUMBER,
    "hard_weight": _NUMBER,
    "label_smoothing": _NUMBER,
    "scale": _NUMBER,
    "sigma": _NUMBER,
    "alpha": _NUMBER,
    "threshold": _NUMBER,
    "scale_by_size": ("a bool", (bool,)),
    "out": _TENSOR,
    "accumulate": ("a bool", (bool,)),
}


def explain(op: str, error: TypeError, **arguments: Any) -> NoReturn:
    """Raises what is wrong with the type of the first argument that C++ does not take; else ``error`` itself.

    Called after the fact, so that calls in order pay nothing for it.
    """
    if "incompatible function arguments" not in str(error):
        raise error
    for name, value in arguments.items():
        if name in _TYPES:
            wanted, types = _TYPES[name]
            if not isinstance(value, types):
                raise TypeError(f"{op}: {name} must be {wanted}, got {type(value).__name__}") from None
        elif not isinstance(value, Integral) or not -(2**63) <= int(value) < 2**63:
            raise TypeError(f"{op}: {name} must be an int of 64 bits, got {value!r}") from None
    raise error


def traced_seed(
    op: str, logits: Tensor, sigma: float, alpha: float, seed: Tensor | None, generator: Generator | None
) -> Tensor | None:
    """The seed under torch.compile, drawn by a traced operation where none is given; eager calls draw it in C++."""
    if generator is not None:
        raise ValueError(f"{op}: torch.compile cannot trace generator=, pass seed= instead")
    if seed is None and sigma > 0 and alpha > 0:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=logits.device)
    return seed
