"""sparse_conv2d on a CUDA device: what the tests over all devices do not ask.

Values, rules and edges are tested for every device in test_sparse_conv2d.py, the kernels' own code under emulation in
their C++ tests. Here: agreement with float64 at real sizes, streams, CUDA graphs.
"""

import pytest
import torch
from torch.nn import functional as F

from pykd import reference
from pykd.ops import sparse_conv2d
from pykd.sparse import SparseWeight
from pykd.testing import DEVICES, assert_matches, logits, pruned

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("cuda" not in DEVICES, reason="needs a CUDA device and a build with CUDA"),
]

BLOCKS = [(1, 1), (1, 16), (4, 4), (16, 16)]
CASES = [  # input, outputs
    ((1, 64, 32, 32), 64, {"padding": 1}),
    ((8, 64, 17, 19), 96, {"padding": 1, "stride": 2}),
    ((64, 128, 4, 4), 128, {"padding": 1}),
    ((3, 96, 20, 20), 96, {"padding": 2, "dilation": 2, "groups": 4}),
    ((3, 96, 20, 20), 96, {"groups": 96}),
]


def tensors(image, channels, options, block, dtype):
    kernel = (channels, image[1] // options.get("groups", 1), 3, 3)
    x, bias = logits(image, dtype, "cuda", seed=1), logits((channels,), torch.float32, "cuda", seed=2)
    return x, pruned(kernel, block, 0.9, seed=3), bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("image, channels, options", CASES)
def test_matches_reference_at_real_sizes(image, channels, options, block, dtype):
    check(*tensors(image, channels, options, block, dtype), options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [(16, 16), (32, 32), (16, 18)], ids=str)
@pytest.mark.parametrize("image, channels, options", CASES[:4])
def test_halves(image, channels, options, block, dtype):
    """Weights whose values the input's dtype holds."""
    x, weight, bias = tensors(image, channels, options, block, dtype)
    check(x, SparseWeight(torch.from_numpy(weight.dense()).to(dtype), block=block), bias, options)


def check(x, weight, bias, options):
    result = sparse_conv2d(x, weight, bias, **options)
    wide = x.double().cpu()
    dense = torch.from_numpy(weight.dense()).double()
    expected = reference.sparse_conv2d(wide, weight, bias.double().cpu(), **options)
    magnitude = F.conv2d(wide.abs(), dense.abs(), bias.double().cpu().abs(), **options)
    assert_matches(result.cpu(), expected, length=dense[0].numel(), magnitude=magnitude)
    assert all(sparse_conv2d(x, weight, bias, **options).equal(result) for _ in range(10)), "reproducible to the bit"


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("image, channels, options", CASES[:2])
def test_cuda_graph_and_current_stream(image, channels, options, block):
    x, weight, bias = tensors(image, channels, options, block, torch.float32)
    expected = sparse_conv2d(x, weight, bias, **options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(10_000_000)
        late.copy_(x)
        assert sparse_conv2d(late, weight, bias, **options).equal(expected)
        late.zero_()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = sparse_conv2d(late, weight, bias, **options)
    late.copy_(x)
    graph.replay()
    assert result.equal(expected)


@pytest.mark.parametrize("image, channels, options", CASES)
def test_no_host_synchronisation(image, channels, options):
    x, weight, bias = tensors(image, channels, options, (1, 1), torch.float32)
    expected = sparse_conv2d(x, weight, bias, **options)  # the weight goes to the device
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = sparse_conv2d(x, weight, bias, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.equal(expected)
