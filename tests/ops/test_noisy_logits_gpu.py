"""noisy_logits on a CUDA device: what the tests over all devices do not ask.

Values, gradients and rules are tested for every device in test_noisy_logits.py, the kernel's own code under emulation
in its C++ test. Here: agreement with the CPU at real sizes, reproducibility to the bit, streams, CUDA graphs.
"""

import pytest
import torch

from pykd.ops import noisy_logits
from pykd.testing import DEVICES, FLOATS, NOISES, assert_matches, logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("cuda" not in DEVICES, reason="needs a CUDA device and a build with CUDA"),
]

SHAPES = [(128, 10), (128, 100), (1024, 1000), (513, 129), (64, 32000), (7, 32001)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpu_and_cuda_draw_the_same_noise(shape, noise, dtype):
    x = logits(shape, dtype, "cpu", seed=0)
    seed = torch.tensor(-987654321987654321)
    noisy = noisy_logits(x, seed=seed, **NOISES[noise])
    on_card = noisy_logits(x.cuda(), seed=seed.cuda(), **NOISES[noise]).cpu()
    assert_matches(on_card, noisy, magnitude=(1 + x.double().abs()) * (1 + 5.5 * NOISES[noise]["sigma"]))
    assert (on_card != x).any(1).equal((noisy != x).any(1)), "the same rows"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reproducible_to_the_bit(shape):
    x, seed = logits(shape, torch.float32, "cuda", seed=1), torch.tensor(5, device="cuda")
    first = noisy_logits(x, sigma=0.5, alpha=0.5, seed=seed)
    for _ in range(20):
        assert noisy_logits(x, sigma=0.5, alpha=0.5, seed=seed).equal(first)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_half_a_batch_equals_the_second_half_of_the_whole(shape):
    x, half = logits(shape, torch.float32, "cuda", seed=2), shape[0] // 2
    options = {"sigma": 0.5, "alpha": 0.5, "seed": torch.tensor(5, device="cuda")}
    assert noisy_logits(x[half:], row_offset=half, **options).equal(noisy_logits(x, **options)[half:])


@pytest.mark.parametrize("shape", [(128, 10), (1024, 1000), (64, 32000)], ids=str)
def test_cuda_graph_replays_new_noise(shape):
    x, out = logits(shape, torch.float32, "cuda", seed=3), torch.empty(shape, device="cuda")
    seed = torch.zeros((), dtype=torch.int64, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        noisy_logits(x, sigma=0.5, seed=seed, out=out)  # warm-up, as torch asks for
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        noisy_logits(x, sigma=0.5, seed=seed, out=out)
    seen = []
    for value in (11, 12, 11):
        seed.fill_(value)
        graph.replay()
        seen.append(out.clone())
        assert out.equal(noisy_logits(x, sigma=0.5, seed=torch.tensor(value).cuda()))
    assert not seen[0].equal(seen[1]) and seen[0].equal(seen[2])


def test_runs_on_the_current_stream():
    x, seed = logits((1024, 1000), torch.float32, "cuda", seed=4), torch.tensor(1, device="cuda")
    expected = noisy_logits(x, sigma=0.5, seed=seed)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.empty_like(x)
        torch.cuda._sleep(10_000_000)
        late.copy_(x)
        noisy = noisy_logits(late, sigma=0.5, seed=seed)
    torch.cuda.current_stream().wait_stream(stream)
    assert noisy.equal(expected)


def test_no_host_synchronisation():
    x, seed = logits((128, 100), torch.float32, "cuda", seed=5), torch.tensor(1, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        noisy = noisy_logits(x, sigma=0.5, alpha=0.5, seed=seed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert noisy.isfinite().all()
