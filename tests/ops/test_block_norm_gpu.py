"""block_norm on a CUDA device: what the tests over all devices do not ask.

Values, gradients and rules are tested for every device in test_block_norm.py, the kernel's own code under emulation in
its C++ test. Here: agreement with the CPU at real sizes, reproducibility to the bit, streams, CUDA graphs, memory.
"""

import pytest
import torch

from pykd.ops import block_norm, block_norm_and_grad, block_norms
from pykd.testing import DEVICES, FLOATS, assert_matches, logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("cuda" not in DEVICES, reason="needs a CUDA device and a build with CUDA"),
]

SHAPES = [(300, 784), (1000, 1000), (64, 32, 3, 3), (129, 65, 5, 5), (10, 512)]
TEACHERS = [(500, 784), (1200, 900), (128, 64, 3, 3), (65, 129, 5, 5), (10, 512)]
GROUPS = ["in", "out", "kernel", (4, 4), (16, 16), (128, 128), (3, 7)]
NORMS = ["l1_l2", "l1_linf"]


def weights(shapes, dtype, device="cuda", seed=0):
    return [logits(shape, dtype, device, seed=seed + i, scale=0.1) for i, shape in enumerate(shapes)]


def on_cpu(tensors):
    return None if tensors is None else [tensor.cpu() for tensor in tensors]


@pytest.mark.parametrize("teachers", [None, TEACHERS], ids=["alone", "teachers"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_cpu_and_cuda_agree(groups, norm, dtype, teachers):
    students = weights(SHAPES, dtype)
    teachers = teachers and weights(teachers, dtype, seed=10)
    options = {"groups": groups, "norm": norm, "scale_by_size": teachers is not None}
    value, grads = block_norm_and_grad(students, teachers=teachers, **options)
    expected, expected_grads = block_norm_and_grad(on_cpu(students), teachers=on_cpu(teachers), **options)
    assert_matches(value.cpu(), expected, length=1_000_000)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert_matches(grad.cpu(), wanted, length=1_000_000)
    assert block_norm(students, teachers=teachers, **options).equal(value)
    for student in students:
        assert_matches(
            block_norms(student, groups=groups, norm=norm).cpu(),
            block_norms(student.cpu(), groups=groups, norm=norm),
            length=1_000_000,
        )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_reproducible_to_the_bit(groups, norm):
    students, teachers = weights(SHAPES, torch.float32), weights(TEACHERS, torch.float32, seed=10)
    options = {"groups": groups, "norm": norm, "teachers": teachers}
    value, grads = block_norm_and_grad(students, **options)
    for _ in range(20):
        again, grads_again = block_norm_and_grad(students, **options)
        assert again.equal(value)
        assert all(a.equal(b) for a, b in zip(grads_again, grads, strict=True))


# A norm is the sum of its gradient times the weight, which needs no second computation of 1e8 weights.
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("groups", ["in", "out", (4, 4), (16, 16)], ids=str)
def test_large_weight(groups, norm):
    weight = torch.randn(10_000, 10_000, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    value, grad = block_norm_and_grad(weight, groups=groups, norm=norm)
    total = sum((g.double() * w.double()).sum() for g, w in zip(grad.chunk(100), weight.chunk(100), strict=True))
    assert_matches(value, total, length=10_000)


def test_more_weights_than_one_launch_takes():
    students = weights([(5 + i % 7, 3 + i % 11) for i in range(130)], torch.float32)
    value, grads = block_norm_and_grad(students, groups=(2, 3))
    expected, expected_grads = block_norm_and_grad(on_cpu(students), groups=(2, 3))
    assert_matches(value.cpu(), expected, length=1000)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert_matches(grad.cpu(), wanted)


@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_cuda_graph_replays_new_weights(groups):
    students, teachers = weights(SHAPES, torch.float32), weights(TEACHERS, torch.float32, seed=10)
    out = [torch.zeros_like(student) for student in students]
    options = {"groups": groups, "teachers": teachers}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        block_norm_and_grad(students, out=out, **options)  # warm-up, as torch asks for
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value, _ = block_norm_and_grad(students, out=out, **options)
    for factor in (2.0, 0.25):
        for student in students:
            student.mul_(factor)
        graph.replay()
        expected, grads = block_norm_and_grad(students, **options)
        assert value.equal(expected)
        assert all(a.equal(b) for a, b in zip(out, grads, strict=True))


def test_runs_on_the_current_stream():
    students = weights(SHAPES, torch.float32)
    expected = block_norm(students)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = [torch.empty_like(student) for student in students]
        torch.cuda._sleep(10_000_000)
        for to, student in zip(late, students, strict=True):
            to.copy_(student)
        value = block_norm(late)
    torch.cuda.current_stream().wait_stream(stream)
    assert value.equal(expected)


def test_no_host_synchronisation():
    students, teachers = weights(SHAPES, torch.float32), weights(TEACHERS, torch.float32, seed=10)
    leaf = students[0].clone().requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        value, _ = block_norm_and_grad(students, teachers=teachers)
        block_norm(leaf).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert value.isfinite() and leaf.grad.isfinite().all()


def test_gradients_into_given_buffers_need_no_memory():
    weight = logits((1000, 1000), torch.float32, "cuda", seed=0)
    out = torch.zeros_like(weight)
    block_norm_and_grad(weight, groups=(4, 4), out=out)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    block_norm_and_grad(weight, groups=(4, 4), out=out, accumulate=True)
    assert torch.cuda.max_memory_allocated() - before < 16_384
