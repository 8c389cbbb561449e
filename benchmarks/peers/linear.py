"""Peers of a sparse linear layer without bias, batch-major [batch, in] -> [batch, out].

Those whose name ends in "transposed" are given and leave the activations as [in, batch] and [out, batch], at no charge.
"""

import math
from collections.abc import Callable

import pytest
import torch
from alternating import Call, compiled
from sparse_cases import Block, Implementations
from torch import Tensor
from torch.nn import functional as F

from peers import mkl, needs_bfloat16, package, runtimes
from pykd.deploy import ModelFile
from pykd.deploy.graph import Op
from pykd.sparse import SparseWeight

ENGINE, LAYERS = "pykd engine, of eight", 8  # layers in a row


class Linear:
    """A pruned weight [out, in], a batch, and the batch transposed."""

    def __init__(self, weight: Tensor, batch: int, block: Block, sparsity: float) -> None:
        self.weight, self.block, self.sparsity = weight, block, sparsity
        outputs, inputs = weight.shape
        self.x = torch.randn(batch, inputs, generator=torch.Generator().manual_seed(batch))
        self.out = torch.empty(batch, outputs)
        self.x_t = self.x.t().contiguous()
        double = self.x.double(), weight.double().t()
        self.product, self.magnitude = double[0] @ double[1], double[0].abs() @ double[1].abs()

    def expected(self, name: str) -> tuple[Tensor, Tensor] | None:
        if name == "shrunk":
            return None
        both = self.product, self.magnitude
        if name == ENGINE:
            weight = self.weight.double().t()
            for _ in range(LAYERS - 1):
                both = both[0] @ weight, both[1] @ weight.abs()
        return (both[0].t(), both[1].t()) if name.endswith("transposed") else both

    def graph(self) -> bytes:
        """As ONNX, dense."""
        step = Op("linear", (0,), weight=SparseWeight(self.weight))
        return runtimes.graph(ModelFile((self.weight.shape[1],), [step]))

    def csr(self) -> Tensor:
        return self.weight.to_sparse_csr()

    def bsr(self) -> Tensor:
        """Outputs are padded to whole blocks."""
        outputs, inputs = self.weight.shape
        if inputs % self.block[1]:
            pytest.skip("BSR needs inputs that are whole blocks")
        return F.pad(self.weight, (0, 0, 0, -outputs % self.block[0])).to_sparse_bsr(self.block)

    def cut(self, call: Call, outputs: int, transposed: bool) -> Call:
        """Without the outputs that the weight is padded with."""
        if outputs == len(self.weight):
            return call
        rows = slice(len(self.weight))
        return (lambda: call()[rows]) if transposed else (lambda: call()[:, rows])


def dense(case: Linear, threads: int) -> Call:
    x, weight = case.x, case.weight
    return lambda: F.linear(x, weight)


def dense_compiled(case: Linear, threads: int) -> Call:
    x, weight, function = case.x, case.weight, compiled(F.linear, False)
    return lambda: function(x, weight)


def bfloat16(case: Linear, threads: int) -> Call:
    needs_bfloat16()
    x, weight = case.x.bfloat16(), case.weight.bfloat16()
    return lambda: F.linear(x, weight)


def bfloat16_compiled(case: Linear, threads: int) -> Call:
    needs_bfloat16()
    x, weight, function = case.x.bfloat16(), case.weight.bfloat16(), compiled(F.linear, False)
    return lambda: function(x, weight)


def shrunk(case: Linear, threads: int) -> Call:
    """Dense, of as many multiplications: both sides shorter by the same factor."""
    kept = math.sqrt(1 - case.sparsity)
    outputs, inputs = (max(1, round(side * kept)) for side in case.weight.shape)
    x, weight = case.x[:, :inputs].contiguous(), case.weight[:outputs, :inputs].contiguous()
    return lambda: F.linear(x, weight)


def onnxruntime(case: Linear, threads: int) -> Call:
    return runtimes.onnxruntime(case.graph(), case.x, case.out, threads)


def openvino(precision: str) -> Callable[[Linear, int], Call]:
    def peer(case: Linear, threads: int) -> Call:
        return runtimes.openvino(case.graph(), case.x, case.out, threads, precision)

    return peer


def torch_sparse(layout: str, transposed: bool) -> Callable[[Linear, int], Call]:
    def peer(case: Linear, threads: int) -> Call:
        x, x_t, weight = case.x, case.x_t, getattr(case, layout)()
        call = (lambda: weight @ x_t) if transposed else (lambda: F.linear(x, weight))
        return case.cut(call, len(weight), transposed)

    return peer


def mkl_sparse(layout: str, transposed: bool) -> Callable[[Linear, int], Call]:
    def peer(case: Linear, threads: int) -> Call:
        weight, batch = getattr(case, layout)(), len(case.x)
        x, out = (case.x_t, (len(weight), batch)) if transposed else (case.x, (batch, len(weight)))
        call = mkl.product(weight, x, torch.empty(out), threads, transposed=transposed)
        return case.cut(call, len(weight), transposed)

    return peer


def scipy(layout: str) -> Callable[[Linear, int], Call]:
    def peer(case: Linear, threads: int) -> Call:
        sparse, x, tensor = package("scipy.sparse"), case.x_t.numpy(), getattr(case, layout)()
        arrays = tensor.values(), tensor.col_indices().int(), tensor.crow_indices().int()
        make = {"csr": sparse.csr_array, "bsr": sparse.bsr_array}[layout]
        weight = make(tuple(array.numpy() for array in arrays), shape=tuple(tensor.shape))
        return case.cut(lambda: weight @ x, len(tensor), True)

    return peer


PEERS: Implementations = {
    "torch": dense,
    "torch compiled": dense_compiled,
    "torch bfloat16": bfloat16,
    "torch bfloat16 compiled": bfloat16_compiled,
    "onnxruntime": onnxruntime,
    "OpenVINO": openvino("f32"),
    "OpenVINO bfloat16": openvino("bf16"),
    "MKL CSR": mkl_sparse("csr", False),
    "MKL CSR, transposed": mkl_sparse("csr", True),
    "MKL BSR": mkl_sparse("bsr", False),
    "MKL BSR, transposed": mkl_sparse("bsr", True),
    "torch CSR": torch_sparse("csr", False),
    "torch CSR, transposed": torch_sparse("csr", True),
    "torch BSR": torch_sparse("bsr", False),
    "torch BSR, transposed": torch_sparse("bsr", True),
    "scipy CSR, transposed": scipy("csr"),
    "scipy BSR, transposed": scipy("bsr"),
    "shrunk": shrunk,
}
