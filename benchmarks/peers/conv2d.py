"""Peers of a sparse 3x3 convolution, padded by 1, without bias."""

import math
from collections.abc import Callable

import pytest
import torch
from alternating import Call, compiled
from sparse_cases import Block, Implementations
from torch import Tensor
from torch.nn import functional as F

from peers import mkl, needs_bfloat16, runtimes
from pykd.deploy import ModelFile
from pykd.deploy.graph import Op
from pykd.sparse import SparseWeight

KERNEL = 3


class Conv2d:
    """A pruned weight [out, in / groups, 3, 3] and a batch of images [batch, in, side, side]."""

    def __init__(self, weight: Tensor, batch: int, side: int, stride: int, block: Block, sparsity: float) -> None:
        self.weight, self.block, self.sparsity, self.stride = weight, block, sparsity, stride
        self.groups = len(weight) // weight.shape[1]
        self.x = torch.randn(batch, len(weight), side, side, generator=torch.Generator().manual_seed(batch))
        double = self.x.double(), weight.double()
        self.product, self.magnitude = self.convolve(*double), self.convolve(double[0].abs(), double[1].abs())
        self.out = torch.empty(self.product.shape)

    def expected(self, name: str) -> tuple[Tensor, Tensor] | None:
        return None if name == "shrunk" else (self.product, self.magnitude)

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, self.stride, KERNEL // 2, 1, self.groups)

    def graph(self) -> bytes:
        """As ONNX, dense."""
        options = {"stride": (self.stride,) * 2, "padding": (KERNEL // 2,) * 2, "dilation": (1, 1)}
        step = Op("conv2d", (0,), {**options, "groups": self.groups}, SparseWeight(self.weight))
        return runtimes.graph(ModelFile(tuple(self.x.shape[1:]), [step]))


def dense(case: Conv2d, threads: int) -> Call:
    return lambda: case.convolve(case.x, case.weight)


def channels_last(case: Conv2d, threads: int) -> Call:
    x, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (case.x, case.weight))
    return lambda: case.convolve(x, weight)


def dense_compiled(case: Conv2d, threads: int) -> Call:
    function = compiled(case.convolve, False)
    return lambda: function(case.x, case.weight)


def bfloat16(case: Conv2d, threads: int) -> Call:
    needs_bfloat16()
    x, weight = (t.bfloat16().contiguous(memory_format=torch.channels_last) for t in (case.x, case.weight))
    return lambda: case.convolve(x, weight)


def shrunk(case: Conv2d, threads: int) -> Call:
    """Dense, of as many multiplications: fewer channels on both sides by the same factor."""
    if case.groups > 1:
        return pytest.skip("a depthwise convolution has no such smaller one")
    channels = max(1, round(len(case.weight) * math.sqrt(1 - case.sparsity)))
    x, weight = case.x[:, :channels].contiguous(), case.weight[:channels, :channels].contiguous()
    return lambda: case.convolve(x, weight)


def onnxruntime(case: Conv2d, threads: int) -> Call:
    return runtimes.onnxruntime(case.graph(), case.x, case.out, threads)


def openvino(precision: str) -> Callable[[Conv2d, int], Call]:
    return lambda case, threads: runtimes.openvino(case.graph(), case.x, case.out, threads, precision)


def unfold(product: Callable[[Tensor, Tensor, Tensor, int], Callable[[Tensor], object]]) -> Callable:
    """Image by image, whose columns stay in the caches; ``product`` is of the weight as CSR and the columns."""

    def peer(case: Conv2d, threads: int) -> Call:
        if case.groups > 1:
            pytest.skip("unfolding knows no groups")
        images, outs = case.x.split(1), case.out.flatten(2).unbind()
        options = [KERNEL] * 2, [1] * 2, [KERNEL // 2] * 2, [case.stride] * 2
        columns = torch.ops.aten.im2col(images[0], *options)
        multiply = product(case.weight.flatten(1).to_sparse_csr(), columns[0], outs[0], threads)

        def call() -> Tensor:
            for image, out in zip(images, outs, strict=True):
                torch.ops.aten.im2col.out(image, *options, out=columns)
                multiply(out)
            return case.out

        return call

    return peer


def torch_csr(weight: Tensor, columns: Tensor, out: Tensor, threads: int) -> Callable[[Tensor], object]:
    return lambda out: torch.mm(weight, columns, out=out)


def mkl_csr(weight: Tensor, columns: Tensor, out: Tensor, threads: int) -> Callable[[Tensor], object]:
    return mkl.product(weight, columns, out, threads, transposed=True)


PEERS: Implementations = {
    "torch": dense,
    "torch channels last": channels_last,
    "torch compiled": dense_compiled,
    "torch bfloat16": bfloat16,
    "onnxruntime": onnxruntime,
    "OpenVINO": openvino("f32"),
    "OpenVINO bfloat16": openvino("bf16"),
    "unfold, torch CSR": unfold(torch_csr),
    "unfold, MKL CSR": unfold(mkl_csr),
    "shrunk": shrunk,
}
