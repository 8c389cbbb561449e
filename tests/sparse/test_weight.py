"""SparseWeight: what goes in comes out, in the fewest bytes."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from pykd.sparse import SparseWeight, gaps


def pruned(shape, density, seed=0, dtype=np.float32):
    random = np.random.RandomState(seed)
    return (random.randn(*shape) * (random.rand(*shape) < density)).astype(dtype)


@pytest.mark.parametrize("shape", [(1, 1), (10, 50), (7, 13), (300, 784), (6, 1, 5, 5), (5, 3, 3, 2)])
@pytest.mark.parametrize("block", [None, (1, 16), (4, 4), (16, 16), (3, 5), (1000, 1000)])
@pytest.mark.parametrize("density", [0.0, 0.03, 1.0])
def test_dense_gives_the_weight_back(shape, block, density):
    dense = pruned(shape, density)
    weight = SparseWeight(dense, block=block)
    np.testing.assert_array_equal(weight.dense(), dense)
    assert weight.dense().dtype == dense.dtype
    assert weight.nnz == np.count_nonzero(dense)
    again = SparseWeight.from_blocks(weight.shape, weight.block, weight.positions, weight.values)
    np.testing.assert_array_equal(again.dense(), dense)


def test_rows_of_blocks_are_those_of_torch():
    dense = torch.from_numpy(pruned((12, 20), 0.1))
    weight = SparseWeight(dense, block=(4, 5))
    theirs = dense.to_sparse_bsr((4, 5))
    assert weight.row_pointers.tolist() == theirs.crow_indices().tolist()
    assert weight.columns.tolist() == theirs.col_indices().tolist()
    np.testing.assert_array_equal(weight.values, theirs.values().numpy())


@pytest.mark.parametrize(
    ("columns", "index"), [(256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.uint32)]
)
def test_indices_take_the_fewest_bytes(columns, index):
    assert SparseWeight(np.eye(2, columns, dtype=np.float32)).columns.dtype == index
    assert SparseWeight(np.ones((1, columns), np.float32)).row_pointers.dtype == np.min_scalar_type(columns)


def test_a_weight_is_dense_where_that_takes_no_more():
    full = pruned((64, 64), 1.0)
    assert SparseWeight(full).pack().bits == 0
    assert SparseWeight(full).nbytes == full.nbytes
    assert SparseWeight(full, block=(48, 48)).nbytes == full.nbytes  # not that of four blocks
    half = SparseWeight(pruned((64, 64), 0.5))
    assert half.pack().bits == 1  # a bitmap
    assert half.nbytes == 4 * half.nnz + 64 * 64 // 8
    few = SparseWeight(pruned((64, 64), 0.02))
    assert few.nbytes < few.nnz * 5.1


def test_nbytes_are_those_of_values_and_codes():
    weight = SparseWeight(pruned((40, 30), 0.1), block=(2, 3))
    assert weight.nbytes == weight.values.nbytes + len(gaps.encode(weight.positions)[2])


def test_small_entries_go():
    dense = np.array([[0.5, -0.1, 0.2], [0.1, 0.0, -0.1]], np.float32)
    assert SparseWeight(dense, threshold=0.1).dense().tolist() == np.where(abs(dense) > 0.1, dense, 0).tolist()
    assert SparseWeight(dense, block=(1, 3), threshold=0.15).columns.tolist() == [0]


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        (torch.float32, np.float32),
        (torch.float64, np.float64),
        (torch.float16, np.float16),
        (torch.bfloat16, np.float32),
        (torch.int8, np.int8),
    ],
)
def test_tensors_of_every_dtype(given, stored):
    tensor = torch.tensor([[0, -128, 3]]).to(given).requires_grad_(given.is_floating_point)
    weight = SparseWeight(tensor)
    assert weight.values.dtype == stored
    assert weight.dense().tolist() == [[0, -128, 3]]


def test_strided_weights_and_later_changes():
    dense = pruned((8, 6), 0.5)
    weight = SparseWeight(np.asfortranarray(dense)[::2])
    expected = dense[::2].copy()
    dense[:] = 7
    np.testing.assert_array_equal(weight.dense(), expected)


@pytest.mark.parametrize(
    ("dense", "options", "sentence"),
    [
        (np.ones(3), {}, "should be .out, in."),
        (np.ones((3, 0)), {}, "with entries, got .3, 0."),
        (np.ones((2, 2, 2)), {}, "should be .out, in."),
        (np.ones((2, 2), int), {}, "should be float16.*got int64"),
        (np.ones((2, 2), complex), {}, "got complex128"),
        (np.array([[1.0, np.nan]]), {}, "should be finite"),
        (np.array([[1.0, np.inf]]), {}, "should be finite"),
        (np.ones((2, 2)), {"block": (0, 1)}, "block should be"),
        (np.ones((2, 2)), {"block": (1, 1, 1)}, "block should be"),
        (np.ones((2, 2)), {"block": (1.5, 1)}, "block should be"),
        (np.ones((2, 2)), {"threshold": -1}, "threshold should be"),
        (np.ones((2, 2)), {"threshold": float("nan")}, "threshold should be"),
    ],
)
def test_broken_rules_say_which(dense, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        SparseWeight(dense, **options)


@pytest.mark.parametrize(("block", "edge"), [((2, 1), (1, 0)), ((1, 2), (0, 1))])
def test_blocks_hold_nothing_over_the_edge(block, edge):
    values = np.zeros((1, *block), np.float32)
    values[0][edge] = 1
    with pytest.raises(ValueError, match="over the weight's edge"):
        SparseWeight.from_blocks((3, 3), block, np.array([5]), values)


def test_needs_no_torch():
    program = "import sys, pykd.sparse; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
