"""sparse_linear on a CUDA device: what the tests over all devices do not ask.

Values, rules and edges are tested for every device in test_sparse_linear.py, the kernels' own code under emulation in
their C++ tests. Here: agreement with float64 at real sizes, streams, CUDA graphs.
"""

import pytest
import torch
from torch.nn import functional as F

from pykd import reference
from pykd.ops import sparse_linear
from pykd.testing import DEVICES, assert_matches, logits, pruned

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("cuda" not in DEVICES, reason="needs a CUDA device and a build with CUDA"),
]

BLOCKS = [(1, 1), (1, 16), (4, 4), (16, 16)]
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
