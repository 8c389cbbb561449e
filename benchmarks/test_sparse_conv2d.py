"""sparse_conv2d against dense torch, dense runtimes, and unfolding with the sparse products of torch and oneMKL.

No bias and no activation. `shrunk` is a dense convolution of as many multiplications, on fewer channels.

Floor: two operations a weight that is not zero and an output pixel, at the processor's rate for multiply-adds.
"""

import itertools

import pytest
from alternating import Call
from peers import conv2d
from peers.conv2d import KERNEL, Conv2d
from sparse_cases import Block, Implementations, measure, of_pattern, pruned, runs

from pykd.ops import sparse_conv2d
from pykd.sparse import SparseWeight

UNSTRUCTURED = (1, 1)
BOTH = [UNSTRUCTURED, (16, 16)]
MAPS = [(64, 32), (128, 16), (256, 8), (512, 4)]  # channels in and out, side
BATCHES = [1, 8, 64]
# channels and side, batch, block, sparsity, stride, groups
ROWS = [(row, 1) for row in itertools.product(MAPS, BATCHES, BOTH, [0.95, 0.9], [1], [1])]
ROWS += [(row, 1) for row in itertools.product([(64, 32), (256, 8)], [1, 64], BOTH, [0.95], [2], [1])]
ROWS += [((size, batch, UNSTRUCTURED, 0.9, 1, size[0]), 1) for size in [(64, 32), (256, 8)] for batch in (1, 64)]
ROWS += [(row, 2) for row in itertools.product(MAPS, BATCHES, BOTH, [0.95], [1], [1])]


def make(size: tuple[int, int], batch: int, block: Block, sparsity: float, stride: int, groups: int) -> Conv2d:
    channels, side = size
    weight = pruned((channels, channels // groups, KERNEL, KERNEL), block, sparsity)
    return Conv2d(weight, batch, side, stride, block, sparsity)


def pykd(case: Conv2d, threads: int) -> Call:
    weight = SparseWeight(case.weight, block=case.block)
    return lambda: sparse_conv2d(case.x, weight, None, case.stride, KERNEL // 2, 1, case.groups)


IMPLEMENTATIONS: Implementations = {"pykd": pykd, **conv2d.PEERS}


@pytest.mark.parametrize("row, threads, name, block", runs(ROWS, lambda *row: list(IMPLEMENTATIONS)))
def test_sparse_conv2d(benchmark, row, threads, name, block):
    (channels, side), batch, shape, sparsity, stride, groups = row
    kind = f"{f', stride {stride}' if stride > 1 else ''}{', depthwise' if groups > 1 else ''}"
    title = f"{channels} at {side}x{side}{kind}, {of_pattern(shape, sparsity)}, batch {batch}"
    measure(benchmark, make, row, IMPLEMENTATIONS, "sparse_conv2d", title, threads, name, block)
