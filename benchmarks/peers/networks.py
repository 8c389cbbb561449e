"""Peers of a whole sparse network: dense torch and runtimes, and sparse products one after another.

Every peer gets what the model file has: dead units are gone and batch normalisation is folded for all of them.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from alternating import Call
from sparse_cases import Implementations
from torch import Tensor, nn

from peers import mkl, needs_bfloat16, package, runtimes
from pykd.deploy import ModelFile, read


class Network:
    """A model file whose steps follow one another, and a batch."""

    def __init__(self, file: Path, batch: int) -> None:
        self.file, self.model = file, read(file)
        self.module = torch_layers(self.model)
        self.x = torch.randn(batch, *self.model.input_shape, generator=torch.Generator().manual_seed(batch))
        self.answer = torch_layers(self.model).double()(self.x.double())
        self.out = torch.empty(self.answer.shape)

    def expected(self, name: str) -> tuple[Tensor, Tensor]:
        """Errors may grow with the layers."""
        layers = sum(op.weight is not None for op in self.model.ops)
        return self.answer, torch.full_like(self.answer, layers * self.answer.abs().max().item())


def torch_layers(model: ModelFile) -> nn.Sequential:
    """The network of torch's own layers."""
    layers: list[nn.Module] = []
    for number, op in enumerate(model.ops):
        if op.inputs != (number,):
            raise ValueError("the steps of a student to benchmark should follow one another")
        options = dict(op.options)
        match op.kind:
            case "linear" | "conv2d":
                weight = torch.tensor(op.weight.dense())
                outputs, inputs, *kernel = weight.shape
                bias = None if op.bias is None else torch.tensor(op.bias)
                if kernel:
                    inputs *= options["groups"]
                    layer = nn.Conv2d(inputs, outputs, kernel, bias=bias is not None, **options)
                else:
                    layer = nn.Linear(inputs, outputs, bias is not None)
                layer.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
                layers.append(layer)
            case "max_pool2d":
                kernel, stride, ceil = options.pop("kernel"), options.pop("stride"), options.pop("ceil")
                layers.append(nn.MaxPool2d(kernel, stride or None, ceil_mode=ceil, **options))
            case "avg_pool2d":
                stride = options["stride"] or None
                rest = options["padding"], options["ceil"], options["count_padding"]
                layers.append(nn.AvgPool2d(options["kernel"], stride, *rest))
            case kind:
                layers.append({"relu": nn.ReLU, "tanh": nn.Tanh, "flatten": nn.Flatten}[kind]())
    return nn.Sequential(*layers)


def dense(case: Network, threads: int) -> Call:
    return lambda: case.module(case.x)


def dense_compiled(case: Network, threads: int) -> Call:
    function = torch.compile(case.module, dynamic=False, options={"freezing": True})
    return lambda: function(case.x)


def bfloat16(case: Network, threads: int) -> Call:
    needs_bfloat16()
    module, x = torch_layers(case.model).bfloat16(), case.x.bfloat16()
    return lambda: module(x)


def onnxruntime(case: Network, threads: int) -> Call:
    return runtimes.onnxruntime(runtimes.graph(case.model), case.x, case.out, threads)


def openvino(precision: str) -> Callable[[Network, int], Call]:
    return lambda case, threads: runtimes.openvino(runtimes.graph(case.model), case.x, case.out, threads, precision)


def sparse_layers(case: Network) -> list[tuple[Tensor, Tensor, bool]]:
    """Of a multilayer perceptron: weight as CSR, bias [out, 1], and whether ReLU follows."""
    kinds = [op.kind for op in case.model.ops]
    if not set(kinds) <= {"flatten", "linear", "relu"}:
        pytest.skip("the sparse products have no convolution")
    return [
        (module.weight.to_sparse_csr(), module.bias.view(-1, 1), "relu" in kinds[number + 1 : number + 2])
        for number, module in enumerate(case.module)
        if isinstance(module, nn.Linear)
    ]


def torch_csr(case: Network, threads: int) -> Call:
    layers = sparse_layers(case)

    def call() -> Tensor:
        values = case.x.flatten(1).t()
        for weight, bias, relu in layers:
            values = torch.addmm(bias, weight, values)
            values = values.relu_() if relu else values
        return values.t()

    return call


def mkl_csr(case: Network, threads: int) -> Call:
    values, layers = case.x.flatten(1).t().contiguous(), []
    first = values
    for weight, bias, relu in sparse_layers(case):
        out = torch.empty(len(weight), len(case.x))
        layers.append((mkl.product(weight, values, out, threads, transposed=True), bias, relu))
        values = out

    def call() -> Tensor:
        first.copy_(case.x.flatten(1).t())
        for product, bias, relu in layers:
            result = product().add_(bias)
            result = result.relu_() if relu else result
        return result.t()

    return call


def scipy_csr(case: Network, threads: int) -> Call:
    sparse = package("scipy.sparse")
    layers = [
        (sparse.csr_array(weight.to_dense().numpy()), bias.numpy(), relu) for weight, bias, relu in sparse_layers(case)
    ]

    def call() -> np.ndarray:
        values = case.x.numpy().reshape(len(case.x), -1).T
        for weight, bias, relu in layers:
            values = weight @ values
            values += bias
            if relu:
                np.maximum(values, 0, out=values)
        return values.T

    return call


PEERS: Implementations = {
    "torch": dense,
    "torch compiled": dense_compiled,
    "torch bfloat16": bfloat16,
    "onnxruntime": onnxruntime,
    "OpenVINO": openvino("f32"),
    "OpenVINO bfloat16": openvino("bf16"),
    "MKL CSR": mkl_csr,
    "torch CSR": torch_csr,
    "scipy CSR": scipy_csr,
}
