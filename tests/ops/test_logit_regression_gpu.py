"""logit_regression on a CUDA device: what the tests over all devices do not ask.

Values, gradients and rules are tested for every device in test_logit_regression.py, the kernel's own code under
emulation in its C++ test. Here: agreement with the CPU at real sizes, reproducibility to the bit, streams, CUDA graphs.
"""

import pytest
import torch

from pykd.ops import logit_regression, logit_regression_and_grad
from pykd.testing import DEVICES, FLOATS, assert_matches, logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("cuda" not in DEVICES, reason="needs a CUDA device and a build with CUDA"),
]

# One block alone (10 and 100 classes), several rows a block, rows over several blocks; odd classes.
SHAPES = [(128, 10), (128, 100), (1024, 1000), (513, 129), (64, 32000), (7, 32001)]
NOISES = {
    "logit": {"sigma": 0.5, "alpha": 0.5},
    "sample": {"sigma": 0.5, "alpha": 0.5, "noise_shape": "sample"},
    "additive": {"sigma": 2.0, "alpha": 0.5, "noise_kind": "additive"},
    "teachers": {"sigma": 0.5, "alpha": 0.5, "n_teachers": 3, "row_offset": 2**33 + 5},
}


def pair(shape, dtype=torch.float32, device="cuda"):
    return tuple(logits(shape, dtype, device, seed=i) for i in (0, 1))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpu_and_cuda_draw_the_same_noise(shape, noise, dtype):
    student, teacher = pair(shape, dtype, "cpu")
    seed = torch.tensor(-987654321987654321)
    options = {"reduction": "none", **NOISES[noise]}
    loss, grad = logit_regression_and_grad(student, teacher, seed=seed, **options)
    loss_cuda, grad_cuda = logit_regression_and_grad(student.cuda(), teacher.cuda(), seed=seed.cuda(), **options)
    size = float(student.abs().max() + teacher.abs().max() * (1 + 5.5 * options["sigma"]))
    assert_matches(grad_cuda.cpu(), grad, magnitude=2 * size)
    assert_matches(loss_cuda.cpu(), loss, length=shape[1], magnitude=2 * size * size)
    if dtype not in (torch.float32, torch.float64):
        return  # rounding to half could hide a row's faint noise
    # A row that is not perturbed has the clean gradient: the masks are equal.
    clean = logit_regression_and_grad(student, teacher, reduction="none")[1]
    perturbed = (grad != clean).any(1)
    clean_cuda = logit_regression_and_grad(student.cuda(), teacher.cuda(), reduction="none")[1]
    assert torch.equal((grad_cuda != clean_cuda).any(1).cpu(), perturbed)
    assert 0 < perturbed.sum() <= shape[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reproducible_to_the_bit(shape):
    student, teacher = pair(shape)
    seed = torch.tensor(5, device="cuda")
    first = logit_regression_and_grad(student, teacher, sigma=0.5, alpha=0.5, seed=seed)
    for _ in range(20):
        again = logit_regression_and_grad(student, teacher, sigma=0.5, alpha=0.5, seed=seed)
        assert again[0].equal(first[0]) and again[1].equal(first[1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_half_a_batch_equals_the_second_half_of_the_whole(shape):
    student, teacher = pair(shape)
    options = {"reduction": "none", "sigma": 0.5, "alpha": 0.5, "seed": torch.tensor(5, device="cuda")}
    half = shape[0] // 2
    loss, grad = logit_regression_and_grad(student, teacher, **options)
    loss_half, grad_half = logit_regression_and_grad(student[half:], teacher[half:], row_offset=half, **options)
    assert loss_half.equal(loss[half:]) and grad_half.equal(grad[half:])


@pytest.mark.parametrize("shape", [(128, 10), (1024, 1000), (64, 32000)], ids=str)
def test_cuda_graph_replays_new_noise(shape):
    student, teacher = pair(shape)
    seed = torch.zeros((), dtype=torch.int64, device="cuda")
    out = torch.empty_like(student)
    options = {"sigma": 0.5, "alpha": 1.0, "seed": seed, "out": out}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        logit_regression_and_grad(student, teacher, **options)  # warm-up, as torch asks for
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, _ = logit_regression_and_grad(student, teacher, **options)
    seen = []
    for value in (11, 12, 13, 11):
        seed.fill_(value)
        graph.replay()
        seen.append((loss.clone(), out.clone()))
        expected = logit_regression_and_grad(student, teacher, sigma=0.5, alpha=1.0, seed=torch.tensor(value).cuda())
        assert seen[-1][0].equal(expected[0]) and seen[-1][1].equal(expected[1])
    assert not seen[0][1].equal(seen[1][1]) and not seen[1][1].equal(seen[2][1])
    assert seen[0][1].equal(seen[3][1])


def test_cuda_graph_of_a_training_step():
    student, teacher = pair((128, 10))
    student.requires_grad_()
    seed = torch.zeros((), dtype=torch.int64, device="cuda")

    def step():
        student.grad = None
        loss = logit_regression(student, teacher, sigma=0.5, alpha=1.0, seed=seed)
        loss.backward()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    student.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    for value in (3, 4):
        seed.fill_(value)
        graph.replay()
        expected = logit_regression_and_grad(
            student.detach(), teacher, sigma=0.5, alpha=1.0, seed=torch.tensor(value).cuda()
        )
        assert loss.equal(expected[0]) and student.grad.equal(expected[1])


def test_runs_on_the_current_stream():
    student, teacher = pair((1024, 1000))
    expected = logit_regression(student, teacher)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.empty_like(student)
        torch.cuda._sleep(10_000_000)
        late.copy_(student)
        loss = logit_regression(late, teacher)
    torch.cuda.current_stream().wait_stream(stream)
    assert loss.equal(expected)


def test_no_host_synchronisation():
    student, teacher = pair((128, 100))
    seed = torch.tensor(1, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = logit_regression_and_grad(student, teacher, sigma=0.5, alpha=0.5, seed=seed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()
