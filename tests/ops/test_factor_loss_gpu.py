"""factor_loss on a CUDA device: what the tests over all devices do not ask.

Values, gradients and rules are tested for every device in test_factor_loss.py, the kernel's own code under emulation in
its C++ test. Here: agreement with the CPU at real sizes, reproducibility to the bit, streams, CUDA graphs.
"""

import pytest
import torch

from pykd.ops import factor_loss, factor_loss_and_grad
from pykd.testing import DEVICES, FLOATS, assert_matches, logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("cuda" not in DEVICES, reason="needs a CUDA device and a build with CUDA"),
]

# One block alone, several rows a block, a row a block; odd entries.
SHAPES = [(64, 10), (1000, 33), (128, 32, 8, 8), (32, 256, 7, 7), (3, 50001)]


def pair(shape, dtype=torch.float32, device="cuda"):
    return tuple(logits(shape, dtype, device, seed=i) for i in (0, 1))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpu_and_cuda_agree(shape, dtype):
    """For p = 2, whose gradient has no jumps; each row's unit vectors differ by at most 2."""
    student, teacher = pair(shape, dtype, "cpu")
    loss, grads = factor_loss_and_grad(student, teacher, p=2, reduction="row")
    loss_cuda, grads_cuda = factor_loss_and_grad(student.cuda(), teacher.cuda(), p=2, reduction="row")
    entries = student[0].numel()
    assert_matches(loss_cuda.cpu(), loss, length=entries, magnitude=2)
    for factor, grad, grad_cuda in zip((student, teacher), grads, grads_cuda, strict=True):
        size = 2 / (len(student) * float(factor.double().flatten(1).norm(dim=1).min()))
        assert_matches(grad_cuda.cpu(), grad, length=entries, magnitude=size)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reproducible_to_the_bit(shape):
    student, teacher = pair(shape)
    first, first_grads = factor_loss_and_grad(student, teacher)
    for _ in range(20):
        loss, grads = factor_loss_and_grad(student, teacher)
        assert loss.equal(first) and all(one.equal(other) for one, other in zip(grads, first_grads, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_half_a_batch_has_the_gradients_of_the_whole(shape):
    student, teacher = pair(shape)
    half = shape[0] // 2
    _, whole = factor_loss_and_grad(student, teacher, reduction="row")
    _, part = factor_loss_and_grad(student[:half].contiguous(), teacher[:half].contiguous(), reduction="row")
    for one, other in zip(part, whole, strict=True):
        assert_matches(one * half, other[:half].double() * shape[0])


def test_cuda_graph_of_a_training_step():
    student, teacher = pair((128, 32, 8, 8))
    student.requires_grad_()

    def step():
        student.grad = None
        loss = factor_loss(student, teacher)
        loss.backward()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # warm-up, as torch asks for
    torch.cuda.current_stream().wait_stream(stream)
    student.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    for seed in (3, 4):
        teacher.copy_(logits((128, 32, 8, 8), torch.float32, "cuda", seed=seed))
        graph.replay()
        expected, (grad, _) = factor_loss_and_grad(student.detach(), teacher)
        assert loss.equal(expected) and student.grad.equal(grad)


def test_runs_on_the_current_stream():
    student, teacher = pair((128, 32, 8, 8))
    expected = factor_loss(student, teacher)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.empty_like(student)
        torch.cuda._sleep(10_000_000)
        late.copy_(student)
        loss = factor_loss(late, teacher)
    torch.cuda.current_stream().wait_stream(stream)
    assert loss.equal(expected)


def test_no_host_synchronisation():
    student, teacher = pair((128, 100))
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = factor_loss_and_grad(student, teacher)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()
