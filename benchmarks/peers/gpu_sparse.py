"""Peers of sparse layers on a CUDA device in half precision, without bias: cuBLAS, cuDNN, and torch's sparse formats.

``torch BSR`` is torch's Triton kernel, ``torch CSR, transposed`` cuSPARSE, which is given and leaves the activations as
[in, batch] and [out, batch] at no charge. ``torch 2:4`` multiplies another weight of the same shape, of which it stores
half the values whatever the pattern. Each is skipped, with its reason, where the format does not allow the case.
"""

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from alternating import Call, compiled
from sparse_cases import Block, pruned
from torch import Tensor
from torch.nn import functional as F

from pykd.sparse import SparseWeight


@lru_cache(maxsize=1)
def weight_of(shape: tuple[int, ...], block: Block, sparsity: float, dtype: torch.dtype) -> tuple[Tensor, SparseWeight]:
    """A pruned weight on the device, and the same sparse."""
    weight = pruned(shape, block, sparsity).to("cuda", dtype)
    return weight, SparseWeight(weight, block=block)


class Layer:
    """A pruned weight, a batch, and their product in float64."""

    def __init__(
        self,
        function: Callable[[Tensor, Tensor], Tensor],
        weight: tuple[int, ...],
        x: tuple[int, ...],
        block: Block,
        sparsity: float,
        dtype: torch.dtype,
    ) -> None:
        self.function, self.block = function, block
        self.weight, self.sparse = weight_of(weight, block, sparsity, dtype)
        self.x = torch.randn(x, generator=torch.Generator().manual_seed(x[0])).to("cuda", dtype)
        double = self.x.double(), self.weight.double()
        self.product, self.magnitude = function(*double), function(double[0].abs(), double[1].abs())

    def expected(self, name: str) -> tuple[Tensor, Tensor] | None:
        if "2:4" in name:
            return None
        both = self.product, self.magnitude
        return (both[0].t(), both[1].t()) if "transposed" in name else both


def dense(case: Layer, threads: int) -> Call:
    function, x, weight = case.function, case.x, case.weight
    return lambda: function(x, weight)


def dense_compiled(case: Layer, threads: int) -> Call:
    function, x, weight = compiled(case.function, False), case.x, case.weight
    return lambda: function(x, weight)


def channels_last(case: Layer, threads: int) -> Call:
    function = case.function
    x, weight = (each.contiguous(memory_format=torch.channels_last) for each in (case.x, case.weight))
    return lambda: function(x, weight)


def supported(peer: Callable[[Layer], Call]) -> Callable[[Layer, int], Call]:
    """The peer, skipped where its first call fails."""

    def prepared(case: Layer, threads: int) -> Call:
        try:
            call = peer(case)
            call()
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            pytest.skip(str(error).partition("\n")[0] or type(error).__name__)
        return call

    return prepared


def bsr(side: int) -> Callable[[Layer, int], Call]:
    """In blocks of this side, those of the pattern or larger ones."""

    def peer(case: Layer) -> Call:
        x, weight = case.x, case.weight.to_sparse_bsr((side, side))
        return lambda: F.linear(x, weight)

    return supported(peer)


def csr(case: Layer) -> Call:
    x, weight = case.x.t().contiguous(), case.weight.to_sparse_csr()
    return lambda: weight @ x


def two_of_four(case: Layer) -> Call:
    kept = torch.tensor([True, True, False, False], device="cuda").repeat(case.weight.shape[1] // 4)
    x, weight = case.x, torch.sparse.to_sparse_semi_structured(case.weight.masked_fill(~kept, 0))
    return lambda: F.linear(x, weight)


CONV2D = {"torch": dense, "torch channels last": channels_last, "torch compiled": dense_compiled}
LINEAR = {
    "torch": dense,
    "torch compiled": dense_compiled,
    "torch BSR 16": bsr(16),
    "torch BSR 32": bsr(32),
    "torch BSR 64": bsr(64),
    "torch CSR, transposed": supported(csr),
    "torch 2:4": supported(two_of_four),
}
