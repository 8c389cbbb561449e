"""What the tests and benchmarks of every op share: devices, inputs and tolerances.

Tolerances are computed here, once, from the arithmetic's dtype and the length of its reductions; no test has its own.
"""

import torch
from torch import Tensor

import pykd.ops  # noqa: F401  registers torch.ops.pykd
from pykd.sparse import SparseWeight

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

# Asks the dispatcher, not the environment: a CPU-only build has no CUDA kernels even beside a GPU.
DEVICES = ["cpu"] + (
    ["cuda"]
    if torch.cuda.is_available() and torch._C._dispatch_has_kernel_for_dispatch_key("pykd::logit_regression", "CUDA")
    else []
)

# Every kind of noise an op has, as its arguments.
NOISES = {
    "clean": {"sigma": 0.0},
    "logit": {"sigma": 0.5, "alpha": 0.6},
    "sample": {"sigma": 0.5, "alpha": 1.0, "noise_shape": "sample"},
    "additive": {"sigma": 2.0, "alpha": 0.5, "noise_kind": "additive"},
    "additive_sample": {"sigma": 2.0, "alpha": 0.5, "noise_kind": "additive", "noise_shape": "sample"},
    "offset": {"sigma": 0.5, "alpha": 0.7, "row_offset": 2**33 + 5},
}

_ELEMENT = 16  # roundings behind one element: a handful of operations and the noise's polynomials
_BLOCK = 128  # additions in a row before partial sums are merged


def logits(shape: tuple[int, ...], dtype: torch.dtype, device: str, *, seed: int, scale: float = 3.0) -> Tensor:
    """Normal values of standard deviation ``scale`` from a CPU generator: the same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(device, dtype)


def tolerance(dtype: torch.dtype, *, length: int = 1) -> float:
    """Relative error allowed against float64 for a sum of ``length`` terms computed in ``dtype``.

    Half types are computed in float32 and rounded once at the end. Sums run in blocks, so their error grows with the
    block and the number of levels, not with ``length``.
    """
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    error = torch.finfo(compute).eps * (_ELEMENT + min(length, _BLOCK))
    return error + (torch.finfo(dtype).eps if dtype in (torch.float16, torch.bfloat16) else 0)


def assert_matches(actual: Tensor, expected: Tensor, *, length: int = 1, magnitude: float | Tensor = 0.0) -> None:
    """``actual`` equals the float64 ``expected`` to rounding.

    ``magnitude`` is the size of what was subtracted on the way (logits, targets): a difference inherits their rounding.
    """
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.isfinite().all(), "not finite"
    error = (actual.double() - expected.double()).abs()
    allowed = tolerance(actual.dtype, length=length) * (expected.double().abs() + magnitude)
    allowed += torch.finfo(actual.dtype).smallest_normal
    worst = (error / allowed).max().item() if error.numel() else 0.0
    assert worst <= 1, f"off by {worst:.3g} times the tolerance, {error.max().item():.3g} at most"


def pruned(shape: tuple[int, ...], block: tuple[int, int], sparsity: float, *, seed: int) -> SparseWeight:
    """A normal weight of which a share of the blocks is zero, at random, stored in such blocks."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    rows, columns = shape[0], weight[0].numel()
    grid = torch.rand(-(-rows // block[0]), -(-columns // block[1]), generator=generator) >= sparsity
    mask = grid.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return SparseWeight(weight * mask.reshape(shape), block=block)
