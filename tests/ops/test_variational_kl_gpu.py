"""variational_kl on a CUDA device: what the tests over all devices do not ask.

Values, gradients and rules are tested for every device in test_variational_kl.py, the kernel's own code under emulation
in its C++ test. Here: agreement with the CPU at real sizes, reproducibility to the bit, streams, CUDA graphs.
"""

import pytest
import torch

from pykd.ops import variational_kl, variational_kl_and_grad
from pykd.testing import DEVICES, FLOATS, assert_matches, logits, tolerance

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("cuda" not in DEVICES, reason="needs a CUDA device and a build with CUDA"),
]

# One block alone, several, two networks, more layers than a launch takes.
NETWORKS = {
    "small": [(300,)],
    "ragged": [(1023, 1025)],
    "lenet_300_100": [(300, 784), (100, 300), (10, 100)],
    "lenet_5": [(20, 1, 5, 5), (50, 20, 5, 5), (500, 800), (10, 500)],
    "many": [(i % 7, 13) for i in range(200)],
}


def network(name, dtype=torch.float32, device="cuda"):
    shapes = NETWORKS[name]
    thetas = [logits(shape, dtype, device, seed=2 * i, scale=0.1) for i, shape in enumerate(shapes)]
    return thetas, [logits(shape, dtype, device, seed=2 * i + 1) - 4 for i, shape in enumerate(shapes)]


def joined(tensors):
    return torch.cat([x.flatten() for x in tensors])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_cpu_and_cuda_agree(name, dtype):
    weights = network(name, dtype)
    kl, grads = variational_kl_and_grad(*weights)
    wide = [[x.cpu().double() for x in each] for each in weights]
    expected, expected_grads = variational_kl_and_grad(*wide)
    theta, log_sigma2 = (joined(each) for each in wide)
    sensitivity = 2 * theta.abs().log().abs().clamp(max=200) + log_sigma2.abs()
    assert_matches(kl.cpu(), expected, length=len(theta), magnitude=float(sensitivity.max() * expected))
    for which, (found, wanted) in enumerate(zip(grads, map(joined, expected_grads), strict=True)):
        magnitude = wanted.abs() * sensitivity
        if which == 0:  # a derivative by log_sigma2 that is below the smallest normal number is 0
            magnitude += torch.finfo(torch.float32).tiny / (theta.abs().clamp(min=1e-37) * tolerance(torch.float32))
        assert_matches(joined(found).cpu(), wanted, magnitude=magnitude)


def test_more_weights_than_one_pass_of_the_card():
    """A network of 3e7, the same 4099 weights again and again."""
    theta, log_sigma2 = logits((4099,), torch.float32, "cuda", seed=0), logits((4099,), torch.float32, "cuda", seed=1)
    kl, grads = variational_kl_and_grad(theta, log_sigma2)
    many, many_grads = variational_kl_and_grad(theta.repeat(8192), log_sigma2.repeat(8192))
    assert_matches(many.cpu(), 8192 * kl.cpu().double(), length=4099)
    for grad, repeated in zip(grads, many_grads, strict=True):
        assert (repeated.view(8192, 4099) == grad).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_reproducible_to_the_bit(name):
    weights = network(name)
    kl, grads = variational_kl_and_grad(*weights)
    assert variational_kl(*weights).equal(kl), "with gradients or without"
    for _ in range(20):
        again, more = variational_kl_and_grad(*weights)
        assert again.equal(kl) and all(joined(a).equal(joined(b)) for a, b in zip(more, grads, strict=True))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_unaligned_views_give_the_same_gradients(dtype):
    theta, log_sigma2 = (x[0].flatten() for x in network("ragged", dtype))
    grads = variational_kl_and_grad(theta, log_sigma2)[1]
    for begin in (1, 2, 4):
        sliced = variational_kl_and_grad(theta[begin:], log_sigma2[begin:])[1]
        assert all(a.equal(b[begin:]) for a, b in zip(sliced, grads, strict=True))


@pytest.mark.parametrize("name", ["lenet_5", "many"])
def test_cuda_graph_of_a_training_step(name):
    leaves = [[x.requires_grad_() for x in each] for each in network(name)]
    flat = leaves[0] + leaves[1]
    out = tuple([torch.zeros_like(x) for x in each] for each in leaves)

    def step():
        kl = variational_kl(*leaves)
        with torch.no_grad():
            one_pass, _ = variational_kl_and_grad(*leaves, scale=0.5, out=out, accumulate=True)
        return kl, one_pass, torch.autograd.grad(kl, flat)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # warm-up, as torch asks for
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kl, one_pass, grads = step()
    for factor in (0.5, 3.0):
        with torch.no_grad():
            for x in leaves[0]:
                x *= factor
            for buffer in out[0] + out[1]:
                buffer.fill_(1)
        graph.replay()
        expected = variational_kl(*leaves)
        wanted = torch.autograd.grad(expected, flat)
        assert kl.equal(expected) and joined(grads).equal(joined(wanted))
        assert one_pass.equal(0.5 * expected)
        assert_matches(joined(out[0] + out[1]), 1 + 0.5 * joined(wanted).double(), magnitude=1)


def test_runs_on_the_current_stream():
    theta, log_sigma2 = (x[0] for x in network("ragged"))
    expected = variational_kl(theta, log_sigma2)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.empty_like(theta)
        torch.cuda._sleep(10_000_000)
        late.copy_(theta)
        kl = variational_kl(late, log_sigma2)
    torch.cuda.current_stream().wait_stream(stream)
    assert kl.equal(expected)


def test_no_host_synchronisation():
    leaves = [[x.requires_grad_() for x in each] for each in network("many")]
    torch.cuda.set_sync_debug_mode("error")
    try:
        kl = variational_kl(*leaves)
        grads = torch.autograd.grad(kl, leaves[0] + leaves[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert kl.isfinite() and joined(grads).isfinite().all()
