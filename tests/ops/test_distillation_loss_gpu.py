"""distillation_loss on a CUDA device: what the tests over all devices do not ask.

Values, gradients and rules are tested for every device in test_distillation_loss.py, the kernel's own code under
emulation in its C++ test. Here: agreement with the CPU at real sizes, reproducibility to the bit, labels out of range,
streams, CUDA graphs.
"""

import pytest
import torch

from pykd.ops import distillation_loss, distillation_loss_and_grad
from pykd.testing import DEVICES, FLOATS, assert_matches, logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("cuda" not in DEVICES, reason="needs a CUDA device and a build with CUDA"),
]

# One block alone, several rows a block, a row a block in registers or shared memory, and rows too large for either.
SHAPES = [(128, 10), (128, 100), (1024, 1000), (513, 129), (64, 32000), (7, 32001), (3, 200000)]
NOISES = {
    "clean": {"sigma": 0.0},
    "logit": {"sigma": 0.5, "alpha": 0.5},
    "sample": {"sigma": 0.5, "alpha": 0.5, "noise_shape": "sample"},
    "additive": {"sigma": 2.0, "alpha": 0.5, "noise_kind": "additive"},
    "teachers": {"sigma": 0.5, "alpha": 0.5, "n_teachers": 3, "row_offset": 2**33 + 5},
}
LOSSES = {
    "forward": {"temperature": 4.0},
    "reverse": {"temperature": 4.0, "direction": "reverse"},
    "both": {"temperature": 4.0, "hard_weight": 0.1, "label_smoothing": 0.1},
    "hard": {"hard_weight": 1.0},
}


def triple(shape, dtype=torch.float32, device="cuda"):
    target = torch.randint(shape[1], shape[:1], generator=torch.Generator().manual_seed(2))
    target[::3] = -100
    return *(logits(shape, dtype, device, seed=i) for i in (0, 1)), target.to(device)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpu_and_cuda_agree(shape, loss, noise, dtype):
    student, teacher, target = triple(shape, dtype, "cpu")
    seed = torch.tensor(-987654321987654321)
    options = {"reduction": "none", **LOSSES[loss], **NOISES[noise]}
    value, grad = distillation_loss_and_grad(student, teacher, target, seed=seed, **options)
    on_card = student.cuda(), teacher.cuda(), target.cuda()
    value_cuda, grad_cuda = distillation_loss_and_grad(*on_card, seed=seed.cuda(), **options)
    # Logits, noise of up to 5.5 standard deviations, and T^2 times a divergence's rounding.
    size = float(student.abs().max() + teacher.abs().max() * (1 + 5.5 * options["sigma"]))
    temperature = options.get("temperature", 1.0)
    assert_matches(value_cuda.cpu(), value, length=shape[1], magnitude=temperature * (temperature + size))
    assert_matches(grad_cuda.cpu(), grad, length=shape[1], magnitude=temperature + size)


@pytest.mark.parametrize("noise", ["logit", "sample", "additive", "teachers"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpu_and_cuda_perturb_the_same_rows(shape, noise):
    """A row that is not perturbed has the clean gradient, bit for bit."""
    student, teacher, target = triple(shape, device="cpu")
    seed = torch.tensor(-987654321987654321)
    perturbed = []
    for device in ("cpu", "cuda"):
        arguments = student.to(device), teacher.to(device), target.to(device)
        options = {"reduction": "none", "temperature": 4.0}
        clean = distillation_loss_and_grad(*arguments, **options)[1]
        noisy = distillation_loss_and_grad(*arguments, seed=seed.to(device), **options, **NOISES[noise])[1]
        perturbed.append((clean != noisy).any(1).cpu())
    assert perturbed[0].equal(perturbed[1])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reproducible_to_the_bit(shape, loss):
    arguments = triple(shape)
    options = {"sigma": 0.5, "alpha": 0.5, "seed": torch.tensor(5, device="cuda")} | LOSSES[loss]
    first = distillation_loss_and_grad(*arguments, **options)
    for _ in range(20):
        again = distillation_loss_and_grad(*arguments, **options)
        assert again[0].equal(first[0]) and again[1].equal(first[1])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_half_a_batch_equals_the_second_half_of_the_whole(shape, loss):
    student, teacher, target = triple(shape)
    options = {"reduction": "none", "sigma": 0.5, "alpha": 0.5, "seed": torch.tensor(5, device="cuda")} | LOSSES[loss]
    half = shape[0] // 2
    value, grad = distillation_loss_and_grad(student, teacher, target, **options)
    halves = student[half:], teacher[half:], target[half:]
    half_value, half_grad = distillation_loss_and_grad(*halves, row_offset=half, **options)
    assert half_value.equal(value[half:]) and half_grad.equal(grad[half:])


@pytest.mark.parametrize("wrong", ["classes", -1, 2**40])
@pytest.mark.parametrize("classes", [10, 1000, 32000])
def test_a_label_out_of_range_makes_its_row_nan(classes, wrong):
    student, teacher, target = triple((40, classes))
    options = {"hard_weight": 0.1, "temperature": 4.0, "reduction": "none"}
    clean, clean_grad = distillation_loss_and_grad(student, teacher, target, **options)
    target[7] = classes if wrong == "classes" else wrong
    value, grad = distillation_loss_and_grad(student, teacher, target, **options)
    others = torch.arange(40, device="cuda") != 7
    assert value[7].isnan() and grad[7].isnan().all()
    assert value[others].equal(clean[others]) and grad[others].equal(clean_grad[others])
    assert distillation_loss(student, teacher, target, hard_weight=0.1).isnan()


@pytest.mark.parametrize("shape", [(128, 10), (1024, 1000), (64, 32000)], ids=str)
def test_cuda_graph_replays_new_noise(shape):
    student, teacher, target = triple(shape)
    seed = torch.zeros((), dtype=torch.int64, device="cuda")
    out = torch.empty_like(student)
    options = {"sigma": 0.5, "alpha": 1.0, "temperature": 4.0, "hard_weight": 0.1}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        distillation_loss_and_grad(
            student, teacher, target, seed=seed, out=out, **options
        )  # warm-up, as torch asks for
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, _ = distillation_loss_and_grad(student, teacher, target, seed=seed, out=out, **options)
    seen = []
    for value in (11, 12, 13, 11):
        seed.fill_(value)
        graph.replay()
        seen.append((loss.clone(), out.clone()))
        expected = distillation_loss_and_grad(student, teacher, target, seed=torch.tensor(value).cuda(), **options)
        assert seen[-1][0].equal(expected[0]) and seen[-1][1].equal(expected[1])
    assert not seen[0][1].equal(seen[1][1]) and not seen[1][1].equal(seen[2][1])
    assert seen[0][1].equal(seen[3][1])


def test_cuda_graph_of_a_training_step():
    student, teacher, target = triple((128, 10))
    student.requires_grad_()
    seed = torch.zeros((), dtype=torch.int64, device="cuda")
    options = {"sigma": 0.5, "alpha": 1.0, "temperature": 4.0, "hard_weight": 0.1}

    def step():
        student.grad = None
        loss = distillation_loss(student, teacher, target, seed=seed, **options)
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
        of_value = {"seed": torch.tensor(value).cuda()} | options
        expected = distillation_loss_and_grad(student.detach(), teacher, target, **of_value)
        assert loss.equal(expected[0]) and student.grad.equal(expected[1])


def test_runs_on_the_current_stream():
    student, teacher, target = triple((1024, 1000))
    expected = distillation_loss(student, teacher, target, hard_weight=0.1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.empty_like(student)
        torch.cuda._sleep(10_000_000)
        late.copy_(student)
        loss = distillation_loss(late, teacher, target, hard_weight=0.1)
    torch.cuda.current_stream().wait_stream(stream)
    assert loss.equal(expected)


def test_no_host_synchronisation():
    student, teacher, target = triple((128, 100))
    seed = torch.tensor(1, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = distillation_loss_and_grad(student, teacher, target, hard_weight=0.1, sigma=0.5, alpha=0.5, seed=seed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()
