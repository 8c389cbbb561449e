"""Sparse layers on a CUDA device in half precision, against cuBLAS, cuDNN and torch's sparse formats.

    python benchmarks/break_even.py RECORD.json     at which density each pattern costs as much as dense

The floors are counted in csrc/kernels/sparse_linear/sparse_linear_halves_cuda.cu and csrc/core/cuda_panels.h.
"""

import itertools

import pytest
import torch
from alternating import measure_on_gpu
from peers import gpu_sparse
from peers.gpu_sparse import Layer
from sparse_cases import Block, calls_of, of_pattern, prepare, runs
from torch.nn import functional as F

from pykd.ops import sparse_conv2d, sparse_linear

UNSTRUCTURED, SIDE = (1, 1), 4096
BLOCKS = [(16, 16), (32, 32)]
# block, sparsity, batch, dtype: the weights of a pattern one after another, which are made once
ROWS = list(itertools.product(BLOCKS, [0.5, 0.7, 0.8, 0.9, 0.95], [256, SIDE], [torch.bfloat16]))
ROWS += itertools.product([UNSTRUCTURED], [0.9, 0.95], [256, SIDE], [torch.bfloat16])
ROWS += itertools.product([(16, 16)], [0.9], [1, 16], [torch.bfloat16])
ROWS += itertools.product(BLOCKS, [0.9], [256, SIDE], [torch.float16])
# block, sparsity, channels, side of the images, batch, dtype
IMAGES = [((16, 16), 0.9, 256, 14, 32), ((16, 16), 0.9, 64, 56, 32), (UNSTRUCTURED, 0.9, 256, 14, 32)]
IMAGES = [(*row, torch.bfloat16) for row in IMAGES]


def convolve(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x, weight, padding=1)


def make(block: Block, sparsity: float, batch: int, dtype: torch.dtype) -> Layer:
    return Layer(F.linear, (SIDE, SIDE), (batch, SIDE), block, sparsity, dtype)


def make_conv2d(block: Block, sparsity: float, channels: int, side: int, batch: int, dtype: torch.dtype) -> Layer:
    return Layer(convolve, (channels, channels, 3, 3), (batch, channels, side, side), block, sparsity, dtype)


def pykd(case: Layer, threads: int):
    return lambda: sparse_linear(case.x, case.sparse)


def pykd_conv2d(case: Layer, threads: int):
    return lambda: sparse_conv2d(case.x, case.sparse, padding=1)


LINEAR = {"pykd": pykd, **gpu_sparse.LINEAR}
CONV2D = {"pykd": pykd_conv2d, **gpu_sparse.CONV2D}


def names(block: Block, sparsity: float, batch: int, dtype: torch.dtype) -> list[str]:
    """BSR in blocks that the pattern fills, and larger ones; CSR, which takes milliseconds, where it has a chance."""
    sides = [f"BSR {side}" for side in (16, 32, 64) if 1 < block[0] <= side]
    return [
        name
        for name in LINEAR
        if ("BSR" not in name or any(side in name for side in sides)) and ("CSR" not in name or sparsity >= 0.9)
    ]


@torch.no_grad()
def measured(benchmark, make, row, implementations, op, shape, pattern, name, block):
    """One block of an implementation; break_even.py finds pattern and density in the record."""
    case, calls = calls_of(make, row, 1)
    if name not in calls:  # checked by the tolerance of its dtype, which the name has
        calls[name] = prepare(implementations[name], case, 1, f"{name} {row[-1]}")
    benchmark.extra_info.update(pattern=f"{list(shape)}{pattern}", density=round(1 - row[1], 6))
    suffix = f"{pattern}, {100 * row[1]:.0f} %"
    measure_on_gpu(benchmark, calls[name].call, op, shape, suffix, row[-1], name, block)


@pytest.mark.gpu
@pytest.mark.parametrize("row, threads, name, block", runs([(row, 1) for row in ROWS], names))
def test_sparse_linear_on_gpu(benchmark, row, threads, name, block):
    shape, sparsity, batch, _ = row
    pattern = f", batch {batch}, {of_pattern(shape, sparsity).partition(' ')[0]}"
    measured(benchmark, make, row, LINEAR, "sparse_linear", (SIDE, SIDE), pattern, name, block)


@pytest.mark.gpu
@pytest.mark.parametrize("row, threads, name, block", runs([(row, 1) for row in IMAGES], lambda *row: list(CONV2D)))
def test_sparse_conv2d_on_gpu(benchmark, row, threads, name, block):
    shape, sparsity, channels, side, batch, _ = row
    pattern = f", 3x3 at {side}x{side}, batch {batch}, {of_pattern(shape, sparsity).partition(' ')[0]}"
    measured(benchmark, make_conv2d, row, CONV2D, "sparse_conv2d", (channels, channels), pattern, name, block)
