"""sparse_linear on a CUDA device: what the tests over all devices do not ask.

Values, rules and edges are tested for every device in test_sparse_linear.py, the kernels' own code under emulation in
their C++ tests. Here: agreement with float64 at real sizes, streams, CUDA graphs.
"""

import pytest
import torch
from torch.nn import functional as F

from pykd import reference
from pykd.ops import sparse_linear
from pykd.sparse import SparseWeight
from pykd.testing import DEVICES, assert_matches, logits, pruned

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("cuda" not in DEVICES, reason="needs a CUDA device and a build with CUDA"),
]

BLOCKS = [(1, 1), (1, 16), (4, 4), (16, 16)]
HALVES = [torch.float16, torch.bfloat16]
CASES = [(1, 512), (64, 512), (3, 1024), (300, 1024), (5000, 300)]


def tensors(rows, size, block, dtype):
    x, bias = logits((rows, size), dtype, "cuda", seed=1), logits((size,), torch.float32, "cuda", seed=2)
    return x, pruned((size, size), block, 0.9, seed=3), bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("rows, size", CASES)
def test_matches_reference_at_real_sizes(rows, size, block, dtype):
    x, weight, bias = tensors(rows, size, block, dtype)
    result = sparse_linear(x, weight, bias)
    wide = x.double().cpu()
    dense = torch.from_numpy(weight.dense()).double()
    expected = reference.sparse_linear(wide, weight, bias.double().cpu())
    magnitude = F.linear(wide.abs(), dense.abs(), bias.double().cpu().abs())
    assert_matches(result.cpu(), expected, length=dense[0].numel(), magnitude=magnitude)
    assert all(sparse_linear(x, weight, bias).equal(result) for _ in range(10)), "reproducible to the bit"


def check_halves(x, weight, bias=None, activation=None):
    """Against float64; the weight's values are those of the input's dtype."""
    result = sparse_linear(x, weight, bias, activation=activation)
    wide, dense = x.double().cpu(), torch.from_numpy(weight.dense()).double()
    wide_bias = None if bias is None else bias.double().cpu()
    expected = reference.sparse_linear(wide, weight, wide_bias, activation=activation)
    magnitude = F.linear(wide.abs(), dense.abs(), None if bias is None else wide_bias.abs())
    assert_matches(result.cpu(), expected, length=dense.shape[1], magnitude=magnitude)
    assert sparse_linear(x, weight, bias, activation=activation).equal(result)
    return result


def halves(shape, block, sparsity, dtype):
    return SparseWeight(torch.from_numpy(pruned(shape, block, sparsity, seed=4).dense()).to(dtype), block=block)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 7, 17, 255])
@pytest.mark.parametrize(
    "shape, block",
    [
        ((512, 512), (16, 16)),  # outputs, inputs
        ((500, 528), (32, 32)),
        ((4099, 1040), (16, 16)),
        ((300, 1000), (16, 16)),  # inputs that are no multiple of 16
        ((300, 1004), (16, 4)),
        ((100, 65552), (16, 16)),  # more of them than are marked in shared memory
        ((160, 528), (24, 48)),
    ],
)
def test_halves_at_ragged_shapes(shape, block, rows, dtype):
    weight, bias = halves(shape, block, 0.8, dtype), logits((shape[0],), torch.float32, "cuda", seed=2)
    x = logits((rows, shape[1]), dtype, "cuda", seed=1)
    result = check_halves(x, weight, bias, "relu" if rows % 2 else None)
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    for each in (x.float(), x.to(other)):  # whose tiles lie beside
        sparse_linear(each, weight, bias)
    assert sparse_linear(x, weight, bias, activation="relu" if rows % 2 else None).equal(result)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows", [9, 300])
def test_halves_of_any_strides(rows, dtype):
    """A view that begins in the middle of 16 bytes is another path's; one that strides is copied."""
    weight = halves((4096, 256), (16, 16), 0.7, dtype)
    whole = logits((rows * 256 + 1,), dtype, "cuda", seed=5)
    expected = check_halves(whole[1:].clone().view(rows, 256), weight)
    unaligned = check_halves(whole[1:].view(rows, 256), weight)
    assert_matches(unaligned, expected.double(), magnitude=unaligned.abs().max().item())
    strided = torch.stack([whole[1:].view(rows, 256)] * 2, dim=1)[:, 1].t().contiguous().t()
    assert sparse_linear(strided, weight).equal(expected)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows", [8, 2048])
def test_halves_of_rows_without_values_and_extremes(rows, dtype):
    """Outputs without values are the bias; infinity and NaN stay in their row of the batch."""
    dense = torch.randn(1000, 512, generator=torch.Generator().manual_seed(6)).to(dtype)
    dense[200:700] = 0
    weight, bias = SparseWeight(dense, block=(16, 16)), logits((1000,), dtype, "cuda", seed=7)
    x = logits((rows, 512), dtype, "cuda", seed=8)
    result = check_halves(x, weight, bias)
    assert result[:, 208:688].equal(bias[208:688].expand(rows, -1))
    x[3, 5], x[5, 9] = torch.inf, torch.nan
    bad = sparse_linear(x, weight, bias)
    assert not bad[3, :200].isfinite().any() and not bad[5, :200].isfinite().any()
    left = [row for row in range(rows) if row not in (3, 5)]
    assert bad[left].equal(result[left])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows", [1, 17, 255, 4096])
def test_halves_in_a_cuda_graph(rows, dtype):
    weight, x = halves((1024, 1024), (32, 32), 0.9, dtype), logits((rows, 1024), dtype, "cuda", seed=9)
    expected, given = sparse_linear(x, weight), torch.zeros_like(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = sparse_linear(given, weight)
    given.copy_(x)
    graph.replay()
    assert result.equal(expected)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("rows, size", CASES[:2])
def test_cuda_graph_and_current_stream(rows, size, block):
    x, weight, bias = tensors(rows, size, block, torch.float32)
    expected = sparse_linear(x, weight, bias)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(10_000_000)
        late.copy_(x)
        assert sparse_linear(late, weight, bias).equal(expected)
        late.zero_()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = sparse_linear(late, weight, bias)
    late.copy_(x)
    graph.replay()
    assert result.equal(expected)


@pytest.mark.parametrize("rows, size", CASES)
def test_no_host_synchronisation(rows, size):
    x, weight, bias = tensors(rows, size, (1, 1), torch.float32)
    expected = sparse_linear(x, weight, bias)  # the weight goes to the device
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = sparse_linear(x, weight, bias)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.equal(expected)
