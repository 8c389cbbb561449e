"""variational_linear and variational_conv2d on a CUDA device: what the tests over all devices do not ask.

Values, gradients and rules are tested for every device in test_variational_layer.py, the kernel's own code under
emulation in its C++ test. Here: agreement with the CPU at real sizes, reproducibility to the bit, streams, CUDA graphs.
"""

import pytest
import torch

from pykd.ops import variational_conv2d, variational_linear
from pykd.testing import DEVICES, FLOATS, assert_matches, logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("cuda" not in DEVICES, reason="needs a CUDA device and a build with CUDA"),
]

OPS = {"linear": variational_linear, "conv2d": variational_conv2d}
# rows, outputs: several rows a block, rows over several blocks; odd outputs.
SHAPES = [(1, 1), (128, 10), (128, 100), (1024, 1000), (513, 129), (64, 32000), (7, 32001)]
# Input, theta, options.
CASES = {
    "lenet_300_100": ("linear", (64, 784), (300, 784), {}),
    "square": ("linear", (256, 1024), (1024, 1024), {"row_offset": 2**33 + 5}),
    "odd": ("linear", (33, 101), (77, 101), {}),
    "lenet_5": ("conv2d", (64, 1, 28, 28), (20, 1, 5, 5), {}),
    "wide": ("conv2d", (16, 64, 32, 32), (64, 64, 3, 3), {"padding": 1}),
    "deep": ("conv2d", (16, 512, 4, 4), (512, 512, 3, 3), {"padding": 1, "row_offset": 3}),
    "grouped": ("conv2d", (3, 6, 9, 7), (8, 3, 3, 3), {"groups": 2, "stride": 2}),
}


@pytest.fixture(autouse=True)
def exact_convolutions():
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


def unit(shape, dtype, device):
    """A layer of mean 0 and variance 1 whose products are exact: what it gives is the noise."""
    rows, outputs = shape
    theta = torch.zeros(outputs, 1, dtype=dtype, device=device)
    return torch.ones(rows, 1, dtype=dtype, device=device), theta, theta.clone()


def tensors_of(case, dtype, device="cuda"):
    """Input, theta, log_sigma2 and bias, whose noise is about as large as its mean."""
    kind, x, theta, options = CASES[case]
    tensors = [
        logits(x, dtype, device, seed=0, scale=1.0),
        logits(theta, dtype, device, seed=1, scale=0.2),
        logits(theta, dtype, device, seed=2, scale=2.0) - 4,
        logits(theta[:1], dtype, device, seed=3, scale=1.0),
    ]
    return OPS[kind], [x.requires_grad_() for x in tensors], options


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpu_and_cuda_draw_the_same_noise(shape, dtype):
    seed, found = torch.tensor(-987654321987654321), {}
    for device in ("cpu", "cuda"):
        x, theta, log_sigma2 = unit(shape, dtype, device)
        log_sigma2.requires_grad_()
        noise = variational_linear(x, theta, log_sigma2, seed=seed.to(device), row_offset=2**32 - 2)
        weight = logits(shape, dtype, device, seed=0, scale=1.0)
        (grad,) = torch.autograd.grad(noise, log_sigma2, weight)
        found[device] = noise.detach().cpu(), grad.cpu()
    assert_matches(found["cuda"][0], found["cpu"][0], magnitude=5.5)
    assert_matches(found["cuda"][1], found["cpu"][1], length=shape[0], magnitude=5.5 * shape[0] ** 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_cpu_and_cuda_agree(case, dtype):
    op, leaves, options = tensors_of(case, dtype)
    wide = [x.detach().cpu().double().requires_grad_() for x in leaves]
    seed = torch.tensor(-987654321987654321)
    sample, expected = op(*leaves, seed=seed.cuda(), **options), op(*wide, seed=seed, **options)
    size = float(expected.detach().abs().max())
    assert_matches(sample.cpu(), expected, length=leaves[1][0].numel(), magnitude=size)
    weight = logits(sample.shape, dtype, "cuda", seed=4, scale=1.0)
    found = torch.autograd.grad(sample, leaves, weight)
    for grad, wanted in zip(found, torch.autograd.grad(expected, wide, weight.cpu().double()), strict=True):
        assert_matches(grad.cpu(), wanted, length=sample.numel(), magnitude=float(wanted.abs().max()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reproducible_to_the_bit(shape):
    x, theta, log_sigma2 = unit(shape, torch.float32, "cuda")
    log_sigma2.requires_grad_()

    def draw():
        noise = variational_linear(x, theta, log_sigma2, seed=torch.tensor(5, device="cuda"))
        return noise, *torch.autograd.grad(noise.square().sum(), log_sigma2)

    first = draw()
    for _ in range(20):
        assert all(a.equal(b) for a, b in zip(draw(), first, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_half_a_batch_equals_the_second_half_of_the_whole(shape):
    x, *weights = unit(shape, torch.float32, "cuda")
    seed, half = torch.tensor(5, device="cuda"), shape[0] // 2
    whole = variational_linear(x, *weights, seed=seed)
    assert variational_linear(x[half:], *weights, seed=seed, row_offset=half).equal(whole[half:])


@pytest.mark.parametrize("case", ["lenet_300_100", "lenet_5"])
def test_cuda_graph_of_a_training_step(case):
    op, leaves, options = tensors_of(case, torch.float32)
    seed = torch.zeros((), dtype=torch.int64, device="cuda")

    def step():
        sample = op(*leaves, seed=seed, **options)
        return sample.detach(), *torch.autograd.grad(sample.square().sum(), leaves)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # warm-up, as torch asks for
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    seen = []
    for value in (11, 12, 11):
        seed.fill_(value)
        graph.replay()
        seen.append([x.clone() for x in results])
        for found, wanted in zip(results, step(), strict=True):
            assert_matches(found, wanted, length=128, magnitude=float(wanted.abs().max()))
    assert not seen[0][0].equal(seen[1][0]) and seen[0][0].equal(seen[2][0])


def test_cuda_graph_without_a_seed_draws_anew():
    x, theta, log_sigma2 = unit((128, 100), torch.float32, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        variational_linear(x, theta, log_sigma2)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        noise = variational_linear(x, theta, log_sigma2)
    graph.replay()
    first = noise.clone()
    graph.replay()
    assert not noise.equal(first) and abs(float(noise.mean())) < 0.1 and abs(float(noise.std()) - 1) < 0.1


@pytest.mark.parametrize("case", ["lenet_300_100", "lenet_5"])
def test_runs_on_the_current_stream(case):
    op, leaves, options = tensors_of(case, torch.float32)
    x, *weights = (x.detach() for x in leaves)
    seed = torch.tensor(1, device="cuda")
    expected = op(x, *weights, seed=seed, **options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.empty_like(x)
        torch.cuda._sleep(10_000_000)
        late.copy_(x)
        sample = op(late, *weights, seed=seed, **options)
    torch.cuda.current_stream().wait_stream(stream)
    assert_matches(sample, expected, length=128, magnitude=float(expected.abs().max()))


@pytest.mark.parametrize("case", ["lenet_300_100", "lenet_5"])
def test_no_host_synchronisation(case):
    op, leaves, options = tensors_of(case, torch.float32)
    op(*leaves, **options)  # the libraries' own set-up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample = op(*leaves, **options)
        grads = torch.autograd.grad(sample, leaves, torch.ones_like(sample))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sample.isfinite().all() and all(grad.isfinite().all() for grad in grads)
