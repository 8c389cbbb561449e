"""linear_distillation_loss on a CUDA device: what the tests over all devices do not ask.

Values, gradients and rules are tested for every device in test_linear_distillation_loss.py, the kernel's own code under
emulation in the C++ test of distillation_loss. Here: agreement with the CPU at real sizes, reproducibility to the bit,
labels out of range, peak memory, streams, CUDA graphs.
"""

import pytest
import torch
import torch.nn.functional as F

from pykd.ops import distillation_loss, linear_distillation_loss, linear_distillation_loss_and_grad
from pykd.testing import DEVICES, assert_matches, logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("cuda" not in DEVICES, reason="needs a CUDA device and a build with CUDA"),
]

SHAPES = [(128, 100, 64, 96), (2048, 1000, 256, 512), (3000, 32001, 128, 64)]  # one chunk, eight, eight of odd sizes
LOSSES = {
    "forward": {"temperature": 4.0},
    "reverse": {"temperature": 4.0, "direction": "reverse"},
    "both": {"temperature": 4.0, "hard_weight": 0.1, "label_smoothing": 0.1},
    "hard": {"hard_weight": 1.0},
}


def inputs(shape, dtype=torch.float32, device="cuda"):
    rows, classes, features, more = shape
    target = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(2))
    target[: rows // 3] = -100  # whole chunks of them
    sizes = [(rows, features), (classes, features), (rows, more), (classes, more)]
    scales = [1.0, features**-0.5, 1.0, more**-0.5]
    tensors = [logits(size, dtype, device, seed=i, scale=scales[i]) for i, size in enumerate(sizes)]
    return *tensors, target.to(device)


@pytest.mark.parametrize("noise", [{}, {"sigma": 0.5, "alpha": 0.5, "row_offset": 2**33 + 5}], ids=["clean", "noise"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpu_and_cuda_agree(shape, loss, noise):
    """In float64, where what is left is the rounding of products in another order."""
    arguments, seed = inputs(shape, torch.float64, "cpu"), torch.tensor(-987654321987654321)
    for reduction in ("none", "batchmean"):
        options = {"reduction": reduction} | LOSSES[loss] | noise
        expected = linear_distillation_loss_and_grad(*arguments, seed=seed, **options)
        found = linear_distillation_loss_and_grad(*(x.cuda() for x in arguments), seed=seed.cuda(), **options)
        for on_card, wanted in zip(found, expected, strict=True):
            length = max(shape)
            assert_matches(on_card.cpu(), wanted, length=length, magnitude=length * float(wanted.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reproducible_to_the_bit(shape, loss, dtype):
    arguments = inputs(shape, dtype)
    options = {"sigma": 0.5, "alpha": 0.5, "seed": torch.tensor(5, device="cuda")} | LOSSES[loss]
    first = linear_distillation_loss_and_grad(*arguments, **options)
    for _ in range(5):
        again = linear_distillation_loss_and_grad(*arguments, **options)
        assert all(a.equal(b) for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize("wrong", ["classes", -1, 2**40])
def test_a_label_out_of_range_makes_its_row_nan(wrong):
    *tensors, target = inputs((2048, 100, 16, 24))
    options = {"hard_weight": 0.1, "temperature": 4.0, "reduction": "none"}
    clean = linear_distillation_loss_and_grad(*tensors, target, **options)
    target[1500] = 100 if wrong == "classes" else wrong
    value, grad, grad_weight = linear_distillation_loss_and_grad(*tensors, target, **options)
    others = torch.arange(2048, device="cuda") != 1500
    assert value[1500].isnan() and grad[1500].isnan().all() and grad_weight.isnan().all()
    assert value[others].equal(clean[0][others]) and grad[others].equal(clean[1][others])
    assert linear_distillation_loss(*tensors, target, hard_weight=0.1).isnan()


def peak_bytes(function):
    """The most memory that lives at once, beside what lived before; the library's own is there from the first time."""
    function()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


def test_logits_are_never_whole_in_memory():
    *tensors, _ = inputs((4096, 32000, 128, 256), torch.bfloat16)
    leaves = [x.requires_grad_() for x in tensors[:2]]
    one, grads = 2 * 4096 * 32000, sum(x.nbytes for x in leaves)

    def unfused():
        torch.autograd.grad(distillation_loss(F.linear(*tensors[:2]), F.linear(*tensors[2:])), leaves)

    def fused():
        torch.autograd.grad(linear_distillation_loss(*tensors), leaves)

    assert peak_bytes(unfused) >= 3 * one
    assert peak_bytes(fused) < min(peak_bytes(unfused) / 4, 2 * one / 8 + grads + 2**20)


def test_cuda_graph_of_a_training_step():
    *tensors, target = inputs((2048, 1000, 64, 96))
    leaves = [x.requires_grad_() for x in tensors[:2]]
    seed = torch.zeros((), dtype=torch.int64, device="cuda")
    options = {"sigma": 0.5, "alpha": 1.0, "temperature": 4.0, "hard_weight": 0.1, "seed": seed}

    def step():
        loss = linear_distillation_loss(*tensors, target, **options)
        return loss.detach(), *torch.autograd.grad(loss * 0.5, leaves)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    losses = []
    for value in (3, 4):
        seed.fill_(value)
        graph.replay()
        losses.append(found[0].clone())
        for replayed, wanted in zip(found, step(), strict=True):
            assert_matches(replayed, wanted, length=2048, magnitude=float(wanted.abs().max()))
    assert not losses[0].equal(losses[1])


def test_runs_on_the_current_stream():
    *tensors, target = inputs((2048, 1000, 64, 96))
    expected = linear_distillation_loss(*tensors, target, hard_weight=0.1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.empty_like(tensors[0])
        torch.cuda._sleep(10_000_000)
        late.copy_(tensors[0])
        loss = linear_distillation_loss(late, *tensors[1:], target, hard_weight=0.1)
    torch.cuda.current_stream().wait_stream(stream)
    assert loss.equal(expected)


def test_no_host_synchronisation():
    *tensors, target = inputs((2048, 1000, 64, 96))
    leaves = [x.requires_grad_() for x in tensors[:2]]
    options = {"hard_weight": 0.1, "sigma": 0.5, "alpha": 0.5, "seed": torch.tensor(1, device="cuda")}
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = linear_distillation_loss(*tensors, target, **options)
        grads = torch.autograd.grad(loss * 0.5, leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite() and all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_is_that_of_a_linear_layer(dtype):
    *tensors, target = inputs((2048, 1000, 64, 96))
    leaves = [x.requires_grad_() for x in tensors[:2]]
    half = [x.detach().to(dtype).requires_grad_() for x in tensors]
    expected = linear_distillation_loss(*half, target, hard_weight=0.1)
    with torch.autocast("cuda", dtype):
        loss = linear_distillation_loss(*tensors, target, hard_weight=0.1)
    assert loss.dtype == torch.float32 and loss.equal(expected)
    grads, wanted = torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, half[:2])
    assert all(grad.equal(of_half.float()) for grad, of_half in zip(grads, wanted, strict=True))
