"""sparse_linear against dense torch, dense runtimes, and the sparse products of oneMKL, torch and scipy.

No bias and no activation: most peers would need a second pass for them. Peers whose name ends in "transposed" hold the
activations the other way round and pay nothing for it. `pykd engine, of eight` compares with them: a layer's share of
eight equal ones in a row, in the layout that the engine keeps between layers. `shrunk` is a dense layer of as many
multiplications.

Floor: two operations a weight that is not zero and a row, at the processor's rate for multiply-adds; at batch 1 and 8
the stored weight read from the cache that holds it.
"""

import itertools
import tempfile
from pathlib import Path

import pytest
from alternating import Call
from peers import linear
from peers.linear import ENGINE, LAYERS, Linear
from sparse_cases import Block, Implementations, measure, of_pattern, pruned, runs

from pykd.deploy import Model, ModelFile
from pykd.deploy.graph import Op
from pykd.deploy.model_file import write
from pykd.ops import sparse_linear
from pykd.sparse import SparseWeight

UNSTRUCTURED = (1, 1)
SHAPES = [(784, 300), (512, 512), (1024, 1024)]  # in, out
BATCHES = [1, 8, 64, 256]
BOTH = [UNSTRUCTURED, (16, 16)]
# in and out, batch, block, sparsity; the second line has the other blocks, the third where it breaks even
ROWS = [(row, 1) for row in itertools.product(SHAPES, BATCHES, BOTH, [0.95, 0.9])]
ROWS += [(row, 1) for row in itertools.product(SHAPES[1:], BATCHES, [(1, 16), (4, 4), (8, 8), (16, 32)], [0.95])]
ROWS += [(row, 1) for row in itertools.product([(512, 512)], [1, 64, 256], BOTH, [0.4, 0.5, 0.8, 0.98])]
ROWS += [(row, 2) for row in itertools.product(SHAPES, BATCHES, BOTH, [0.95])]


def make(sides: tuple[int, int], batch: int, block: Block, sparsity: float) -> Linear:
    return Linear(pruned((sides[1], sides[0]), block, sparsity), batch, block, sparsity)


def pykd(case: Linear, threads: int) -> Call:
    weight = SparseWeight(case.weight, block=case.block)
    return lambda: sparse_linear(case.x, weight)


def pykd_bfloat16(case: Linear, threads: int) -> Call:
    weight, x = SparseWeight(case.weight.bfloat16(), block=case.block), case.x.bfloat16()
    return lambda: sparse_linear(x, weight)


def engine(case: Linear, threads: int) -> Call:
    """Eight layers in a row."""
    outputs, inputs = case.weight.shape
    if outputs != inputs:
        pytest.skip("layers in a row need as many outputs as inputs")
    steps = [Op("linear", (i,), weight=SparseWeight(case.weight, block=case.block)) for i in range(LAYERS)]
    with tempfile.TemporaryDirectory() as folder:
        write(ModelFile((inputs,), steps), path := Path(folder, "layers.pykd.safetensors"))
        model = Model(path, threads=threads)
    x = case.x.numpy()
    return lambda: model(x)


IMPLEMENTATIONS: Implementations = {
    "pykd": pykd,
    ENGINE: engine,
    "pykd bfloat16": pykd_bfloat16,
    **linear.PEERS,
}


def names(sides: tuple[int, int], batch: int, block: Block, sparsity: float) -> list[str]:
    """Square blocks have BSR, those as large as a tile of bfloat16 have bfloat16."""
    left_out = [] if block[0] == block[1] > 1 else ["BSR"]
    left_out += [] if block == (16, 32) else ["pykd bfloat16"]
    return [name for name in IMPLEMENTATIONS if not any(word in name for word in left_out)]


@pytest.mark.parametrize("row, threads, name, block", runs(ROWS, names))
def test_sparse_linear(benchmark, row, threads, name, block):
    (inputs, outputs), batch, shape, sparsity = row
    title = f"{inputs} -> {outputs}, {of_pattern(shape, sparsity)}, batch {batch}"
    calls = LAYERS if name == ENGINE else 1
    measure(benchmark, make, row, IMPLEMENTATIONS, "sparse_linear", title, threads, name, block, calls)
