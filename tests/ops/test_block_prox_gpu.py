"""block_prox_ on a CUDA device: what the tests over all devices do not ask.

Values and rules are tested for every device in test_block_prox.py, the kernel's own code under emulation in its C++
test. Here: agreement with the CPU at real sizes, reproducibility to the bit, streams, CUDA graphs, memory.
"""

import pytest
import torch

from pykd.ops import block_norms, block_prox_
from pykd.testing import DEVICES, FLOATS, assert_matches, logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("cuda" not in DEVICES, reason="needs a CUDA device and a build with CUDA"),
]

SHAPES = [(300, 784), (1000, 1000), (64, 32, 3, 3), (129, 65, 5, 5), (10, 512)]
GROUPS = ["in", "out", "kernel", (4, 4), (16, 16), (128, 128), (3, 7)]
NORMS = ["l1_l2", "l1_linf"]


def weights(dtype, device="cuda"):
    return [logits(shape, dtype, device, seed=i, scale=0.1) for i, shape in enumerate(SHAPES)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_cpu_and_cuda_agree(groups, norm, dtype):
    expected, given = weights(dtype, "cpu"), weights(dtype)
    block_prox_(expected, groups=groups, norm=norm, threshold=0.3)
    block_prox_(given, groups=groups, norm=norm, threshold=0.3)
    for near, wanted, before in zip(given, expected, weights(dtype, "cpu"), strict=True):
        assert_matches(near.cpu(), wanted, length=1_000_000, magnitude=before.double().abs().max())
        assert not wanted.equal(before)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_reproducible_to_the_bit(groups, norm):
    first = weights(torch.float32)
    block_prox_(first, groups=groups, norm=norm, threshold=0.3)
    for _ in range(20):
        again = weights(torch.float32)
        block_prox_(again, groups=groups, norm=norm, threshold=0.3)
        assert all(a.equal(b) for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize("groups", ["in", "out", (4, 4), (16, 16)], ids=str)
def test_large_weight_loses_the_threshold(groups):
    weight = torch.randn(10_000, 10_000, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    norms = block_norms(weight, groups=groups)
    threshold = float(norms.median())
    block_prox_(weight, groups=groups, threshold=threshold)
    assert_matches(
        block_norms(weight, groups=groups), (norms - threshold).relu(), length=10_000, magnitude=norms.double()
    )


@pytest.mark.parametrize("groups", ["in", "out", (4, 4), (16, 16)], ids=str)
def test_large_weight_is_clipped_by_the_threshold(groups):
    weight = torch.randn(10_000, 10_000, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    largest = block_norms(weight, groups=groups, norm="l1_linf")
    before, total = weight[:16].clone(), weight.abs().double().sum()
    block_prox_(weight, groups=groups, norm="l1_linf", threshold=0.5)
    assert_matches(total - weight.abs().double().sum(), torch.tensor(0.5 * largest.numel()).cuda(), length=10_000)
    assert (weight[:16].abs() <= before.abs()).all() and (weight[:16] * before >= 0).all()


@pytest.mark.parametrize("norm", NORMS)
def test_cuda_graph_replays_on_new_weights(norm):
    given, fresh = weights(torch.float32), weights(torch.float32)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        block_prox_(given, groups=(4, 4), norm=norm, threshold=0.1)  # warm-up, as torch asks for
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        block_prox_(given, groups=(4, 4), norm=norm, threshold=0.1)
    for factor in (2.0, 0.5):
        for to, weight in zip(given, fresh, strict=True):
            to.copy_(weight.mul_(factor))
        graph.replay()
        expected = [weight.clone() for weight in fresh]
        block_prox_(expected, groups=(4, 4), norm=norm, threshold=0.1)
        assert all(a.equal(b) for a, b in zip(given, expected, strict=True))


def test_runs_on_the_current_stream():
    expected = weights(torch.float32)
    block_prox_(expected, threshold=0.3)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = [torch.empty_like(weight) for weight in expected]
        torch.cuda._sleep(10_000_000)
        for to, weight in zip(late, weights(torch.float32), strict=True):
            to.copy_(weight)
        block_prox_(late, threshold=0.3)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(a.equal(b) for a, b in zip(late, expected, strict=True))


@pytest.mark.parametrize("norm", NORMS)
def test_no_host_synchronisation_and_no_memory(norm):
    given = weights(torch.float32)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        block_prox_(given, norm=norm, threshold=0.3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() == before
    assert all(weight.isfinite().all() for weight in given)
