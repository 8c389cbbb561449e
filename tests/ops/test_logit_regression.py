"""logit_regression against its reference: values, gradients, noise, strides, edges, rules.

Not here: the CUDA kernel's own code (its C++ test, under emulation) and what only a card shows (the tests marked gpu).
"""

import os
import subprocess
import sys

import pytest
import torch

import pykd.reference as reference
from pykd.ops import logit_regression, logit_regression_and_grad
from pykd.testing import DEVICES, FLOATS, assert_matches, logits

SHAPES = [(1, 1), (3, 10), (128, 10), (65, 7), (7, 1000), (130, 513), (5, 32001)]
NOISES = {
    "clean": {},
    "logit": {"sigma": 0.5, "alpha": 0.6},
    "sample": {"sigma": 0.5, "alpha": 1.0, "noise_shape": "sample"},
    "additive": {"sigma": 2.0, "alpha": 0.5, "noise_kind": "additive"},
    "additive_sample": {"sigma": 2.0, "alpha": 0.5, "noise_kind": "additive", "noise_shape": "sample"},
    "teachers": {"sigma": 0.5, "alpha": 0.7, "n_teachers": 3, "row_offset": 2**33 + 5},
    "teachers_sample": {"sigma": 0.5, "alpha": 0.7, "n_teachers": 2, "noise_shape": "sample"},
}
NOISY = [name for name in NOISES if name != "clean"]


def seed_on(device, value=-123456789012345):
    return torch.tensor(value, device=device)


def magnitude(student, teacher, sigma=0.0, **_):
    """The largest number that is subtracted: a logit, or a target with noise of up to 5.5 standard deviations."""
    if not student.numel():
        return 0.0
    return float(student.abs().max() + (1 + 5.5 * sigma) * max(1.0, float(teacher.abs().max())))


def check(student, teacher, *, reduction="batchmean", **options):
    """Value and gradient, through autograd and in one pass, against the float64 reference."""
    device, classes = student.device.type, student.shape[1]
    seed = seed_on(device)
    size = magnitude(student, teacher, **options)
    leaf = student.detach().clone().requires_grad_()
    wide = student.detach().double().requires_grad_()
    loss = logit_regression(leaf, teacher, reduction=reduction, seed=seed, **options)
    expected = reference.logit_regression(wide, teacher.double(), reduction=reduction, seed=seed, **options)
    assert loss.dtype == (torch.float64 if student.dtype == torch.float64 else torch.float32)
    # 1/2 (d + e)^2 = 1/2 d^2 + d e: a row's loss inherits the rounding of its largest term.
    assert_matches(
        loss, expected, length=classes, magnitude=size * size if reduction == "none" else float(expected.detach())
    )
    weight = torch.linspace(-1, 1, loss.numel(), dtype=torch.float64, device=device).reshape(loss.shape) + 0.25
    (grad,) = torch.autograd.grad(loss, leaf, weight.to(loss.dtype))
    (expected_grad,) = torch.autograd.grad(expected, wide, weight)
    assert grad.dtype == student.dtype and grad.is_contiguous()
    scale = 1 / len(student) if reduction == "batchmean" and len(student) else 1
    assert_matches(grad, expected_grad, magnitude=size * scale * float(weight.abs().max()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, noise, dtype, device):
    student, teacher = (logits(shape, dtype, device, seed=i) for i in (0, 1))
    check(student, teacher, **NOISES[noise])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_matches_reference_for_every_reduction(reduction, noise, device):
    student, teacher = (logits((67, 33), torch.float32, device, seed=i) for i in (2, 3))
    check(student, teacher, reduction=reduction, **NOISES[noise])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("student_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_matches_reference_for_mixed_dtypes(student_dtype, teacher_dtype, device):
    student = logits((33, 130), student_dtype, device, seed=4)
    check(student, logits((33, 130), teacher_dtype, device, seed=5), **NOISES["logit"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("strides", ["columns", "sliced", "expanded", "offset"])
def test_matches_reference_for_any_strides(strides, device):
    student, teacher = (logits((12, 18), torch.float32, device, seed=i) for i in (6, 7))
    views = {
        "columns": lambda x: x.t().contiguous().t(),
        "sliced": lambda x: x[::2, 1::3],
        "expanded": lambda x: x[:1].expand(12, 18),
        "offset": lambda x: x.flatten()[1:-17].reshape(11, 18),
    }
    check(views[strides](student), views[strides](teacher), **NOISES["logit"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("reduction", ["none", "batchmean", "sum"])
def test_gradcheck(reduction, noise, device):
    student, teacher = (logits((4, 6), torch.float64, device, seed=i) for i in (8, 9))
    seed = seed_on(device)
    assert torch.autograd.gradcheck(
        lambda x: logit_regression(x, teacher, reduction=reduction, seed=seed, **NOISES[noise]),
        (student.requires_grad_(),),
    )


def schema_arguments(student, teacher, device, *, sigma=0.5):
    return student, teacher, seed_on(device), 1, sigma, 0.6, False, False, 2, 3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("strides", ["rows", "columns", "sliced"])
def test_opcheck(strides, requires_grad, device):
    student, teacher = (logits((6, 8), torch.float32, device, seed=i) for i in (10, 11))
    if strides == "columns":
        student = student.t().contiguous().t()
    if strides == "sliced":
        student = logits((6, 16), torch.float32, device, seed=10)[:, ::2]
    arguments = schema_arguments(student.detach().requires_grad_(requires_grad), teacher, device)
    torch.library.opcheck(torch.ops.pykd.logit_regression.default, arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_of_its_other_forms(device):
    student, teacher = (logits((6, 8), torch.float32, device, seed=i) for i in (10, 11))
    arguments = schema_arguments(student, teacher, device)
    torch.library.opcheck(torch.ops.pykd.logit_regression_backward.default, (torch.ones((), device=device), *arguments))
    torch.library.opcheck(torch.ops.pykd.logit_regression_and_grad.default, arguments)
    out = torch.zeros_like(student)
    torch.library.opcheck(torch.ops.pykd.logit_regression_and_grad.out, (*arguments, True, out))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("noise", ["clean", "logit"])
@pytest.mark.parametrize("extreme", [1e4, -1e4, 1e18])
def test_extreme_logits_stay_finite(extreme, noise, device):
    student, teacher = (logits((2, 5), torch.float32, device, seed=i) for i in (12, 13))
    teacher[:, 0] = extreme
    loss, grad = logit_regression_and_grad(student, teacher, seed=seed_on(device), **NOISES[noise])
    assert loss.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("noise", ["clean", "logit", "sample"])
def test_extreme_values_pass_through(noise, device):
    """An infinite or undefined logit shows in its own row and class, and nowhere else."""
    student, teacher = (logits((3, 40), torch.float32, device, seed=i) for i in (14, 15))
    teacher[0, 3], student[1, 39] = float("inf"), float("nan")
    options = NOISES[noise] | {"seed": seed_on(device), "reduction": "none"}
    loss, grad = logit_regression_and_grad(student, teacher, **options)
    assert not loss[:2].isfinite().any() and loss[2].isfinite()
    assert (~grad.isfinite()).nonzero().tolist() == [[0, 3], [1, 39]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reduction", ["none", "batchmean", "sum"])
def test_no_rows(reduction, device):
    student = torch.empty(0, 5, device=device, requires_grad=True)
    loss = logit_regression(student, student.detach(), sigma=0.5, reduction=reduction)
    assert loss.shape == ((0,) if reduction == "none" else ())
    assert loss.sum() == 0
    loss.sum().backward()
    assert student.grad.shape == (0, 5)


@pytest.mark.parametrize("device", DEVICES)
def test_equal_logits_cost_nothing(device):
    x = logits((9, 17), torch.float32, device, seed=16)
    loss, grad = logit_regression_and_grad(x, x.clone())
    assert loss == 0 and not grad.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("off", [{"sigma": 0.0, "alpha": 0.8}, {"sigma": 0.5, "alpha": 0.0}], ids=["sigma", "alpha"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_noise_is_clean_bit_for_bit(shape, off, device):
    student, teacher = (logits(shape, torch.float32, device, seed=i) for i in (17, 18))
    for kind in ("logit", "sample"):
        loss, grad = logit_regression_and_grad(student, teacher, noise_shape=kind, **off)
        clean_loss, clean_grad = logit_regression_and_grad(student, teacher)
        assert loss.equal(clean_loss) and grad.equal(clean_grad)
        assert logit_regression(student, teacher, noise_shape=kind, **off).equal(clean_loss)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", ["logit", "sample"])
def test_unselected_rows_are_clean_bit_for_bit(shape, device):
    student, teacher = (logits((300, 20), torch.float32, device, seed=i) for i in (19, 20))
    options = {"reduction": "none", "seed": seed_on(device)}
    noisy = logit_regression(student, teacher, sigma=0.5, alpha=0.3, noise_shape=shape, **options)
    clean = logit_regression(student, teacher, reduction="none")
    selected = reference.philox.selected(300, 0.3, seed=seed_on(device))
    assert 0 < selected.sum() < 300
    assert noisy[~selected].equal(clean[~selected])
    assert (noisy[selected] != clean[selected]).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("noise", [name for name in NOISY if "additive" not in name])
def test_realised_loss_is_the_clean_loss_plus_its_regulariser(noise, device):
    """L = 1/2 |g - z|^2 + R,  R = 1/2 |xi z|^2 - (g - z)^T (xi z), with xi the realised mean noise."""
    student, teacher = (logits((40, 100), torch.float64, device, seed=i) for i in (21, 22))
    options = {"noise_shape": "logit", "n_teachers": 1, "row_offset": 0} | NOISES[noise]
    noise_times_z = teacher * reference.philox.mean_noise(40, 100, seed=seed_on(device), **options)
    gap = student - teacher
    extra = 0.5 * noise_times_z.square().sum(1) - (gap * noise_times_z).sum(1)
    loss = logit_regression(student, teacher, reduction="none", seed=seed_on(device), **options)
    clean = logit_regression(student, teacher, reduction="none")
    assert_matches(loss, clean + extra, length=100, magnitude=float(clean.max() + noise_times_z.square().sum(1).max()))


@pytest.mark.parametrize("shape", ["logit", "sample"])
def test_mean_of_many_noisy_gradients_is_the_clean_one(shape):
    """Each noisy gradient is the clean one minus s xi z: unbiased, of variance alpha sigma^2 z^2 an element."""
    draws, sigma, alpha = 4000, 0.5, 0.8
    student, teacher = (logits((1, 12), torch.float64, "cpu", seed=i) for i in (23, 24))
    options = {"sigma": sigma, "alpha": alpha, "noise_shape": shape, "reduction": "sum", "seed": torch.tensor(5)}
    _, grads = logit_regression_and_grad(student.expand(draws, -1), teacher.expand(draws, -1), **options)
    noise = (student - teacher) - grads
    error = noise.mean(0).abs() / (teacher.abs()[0] * sigma * (alpha / draws) ** 0.5)
    assert error.max() < 4.5  # standard errors
    spread = noise.square().mean(0) / (alpha * sigma**2 * teacher[0].square())
    # The variance of s^2 xi^2 relative to its mean squared is 3 / alpha - 1.
    assert (spread - 1).abs().max() < 4.5 * ((3 / alpha - 1) / draws) ** 0.5


def test_noise_is_normal():
    """Moments, tails and independence of the kernel's own normal values: additive noise on zero logits, read back."""
    rows, classes = 2000, 100
    zeros = torch.zeros(rows, classes)
    _, grad = logit_regression_and_grad(
        zeros, zeros, sigma=1.0, noise_kind="additive", reduction="sum", seed=torch.tensor(11)
    )
    x = -grad.double().flatten()
    n = x.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs((x**power).mean() - moment) < 4.5 * (variance / n) ** 0.5, power
    for edge, share in ((1.0, 0.317311), (2.0, 0.045500), (3.0, 0.0026998)):
        assert abs((x.abs() > edge).double().mean() - share) < 4.5 * (share / n) ** 0.5, edge
    quantiles = torch.distributions.Normal(0, 1).cdf(x.sort().values)
    steps = torch.arange(1, n + 1, dtype=torch.float64) / n
    assert (quantiles - steps).abs().max() < 2.2 / n**0.5  # Kolmogorov-Smirnov, one in ten thousand
    correlation = torch.corrcoef(x.reshape(rows, classes)[:, :16].T) - torch.eye(16, dtype=torch.float64)
    assert correlation.abs().max() < 4.5 / rows**0.5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("noise", NOISY)
def test_seed_decides(noise, device):
    student, teacher = (logits((100, 30), torch.float32, device, seed=i) for i in (25, 26))

    def draw(seed):
        return logit_regression_and_grad(student, teacher, seed=seed_on(device, seed), **NOISES[noise])

    (loss, grad), (again, grad_again), (other, grad_other) = draw(1), draw(1), draw(2)
    assert loss.equal(again) and grad.equal(grad_again)
    assert not loss.equal(other) and not grad.equal(grad_other)
    high = draw(1 + 2**40)[0]
    assert not high.equal(loss), "the seed's high half counts"


@pytest.mark.parametrize("device", DEVICES)
def test_seed_comes_from_torchs_generator(device):
    student, teacher = (logits((50, 10), torch.float32, device, seed=i) for i in (27, 28))

    def draw(**options):
        return logit_regression(student, teacher, sigma=0.5, **options)

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert draw().equal(first) and not first.equal(second)
    generator = torch.Generator(device).manual_seed(4)
    third = draw(generator=generator)
    assert draw(generator=generator.manual_seed(4)).equal(third)
    state = torch.get_rng_state()
    draw(seed=seed_on(device)), draw(generator=generator), logit_regression(student, teacher)
    assert torch.get_rng_state().equal(state), "a given seed, a generator or no noise leave torch's own alone"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("noise", NOISY)
@pytest.mark.parametrize("shape", [(128, 10), (130, 513), (2, 5000)], ids=str)
def test_a_slice_with_row_offset_draws_what_it_has_in_the_whole(shape, noise, device):
    student, teacher = (logits(shape, torch.float32, device, seed=i) for i in (29, 30))
    offset = NOISES[noise].get("row_offset", 0)
    options = NOISES[noise] | {"seed": seed_on(device), "reduction": "none"}
    loss, grad = logit_regression_and_grad(student, teacher, **options)
    half = shape[0] // 2
    options["row_offset"] = offset + half
    half_loss, half_grad = logit_regression_and_grad(student[half:], teacher[half:], **options)
    assert half_loss.equal(loss[half:]) and half_grad.equal(grad[half:])


@pytest.mark.parametrize("noise", NOISES)
def test_threads_do_not_change_bits(noise):
    student, teacher = (logits((515, 333), torch.float32, "cpu", seed=i) for i in (31, 32))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(logit_regression_and_grad(student, teacher, seed=torch.tensor(9), **NOISES[noise]))
    finally:
        torch.set_num_threads(threads)
    for loss, grad in results[1:]:
        assert loss.equal(results[0][0]) and grad.equal(results[0][1])


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_instruction_sets_agree(isa):
    """The levels below this processor's own draw the same noise; a process each, since the choice is made once."""
    code = (
        "import torch; from pykd import _C; from pykd.ops import logit_regression_and_grad as op; "
        "from pykd.testing import logits; s, t = (logits((70, 131), torch.float32, 'cpu', seed=i) for i in (33, 34)); "
        "loss, grad = op(s, t, sigma=0.5, alpha=0.5, seed=torch.tensor(9)); "
        "print(_C.isa(), loss.item(), grad.double().norm().item(), grad[:, 7].double().sum().item())"
    )

    def run(**environment):
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
        )
        name, *values = done.stdout.split()
        return name, torch.tensor([float(value) for value in values])

    (best, expected), (name, values) = run(), run(PYKD_CPU_ISA=isa)
    if best == "baseline":
        pytest.skip("this processor has only the baseline level")
    assert name == isa or isa == best
    assert_matches(values, expected, length=131, magnitude=1.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("noise", NOISES)
def test_and_grad_is_the_op_and_its_gradient_bit_for_bit(noise, dtype, device):
    student, teacher = (logits((70, 131), dtype, device, seed=i) for i in (35, 36))
    options = NOISES[noise] | {"seed": seed_on(device)}
    leaf = student.clone().requires_grad_()
    loss = logit_regression(leaf, teacher, **options)
    loss.backward()
    one_loss, one_grad = logit_regression_and_grad(student, teacher, **options)
    assert one_loss.equal(loss.detach()) and one_grad.equal(leaf.grad)
    assert not one_loss.requires_grad
    buffer = torch.full_like(student, float("nan"))
    out_loss, out = logit_regression_and_grad(student, teacher, out=buffer, **options)
    assert out is buffer and out.equal(one_grad) and out_loss.equal(one_loss)
    buffer.fill_(2.0)
    logit_regression_and_grad(student, teacher, out=buffer, accumulate=True, **options)
    assert_matches(buffer, 2.0 + one_grad.double(), magnitude=2.0)
    in_place = student.clone()
    logit_regression_and_grad(in_place, teacher, out=in_place, **options)
    assert in_place.equal(one_grad)


def test_out_is_seen_by_autograd():
    """Overwriting a tensor that autograd saved must not go unnoticed."""
    x = torch.ones(2, 3, requires_grad=True)
    saved = x * 2
    loss = (saved * saved).sum()
    logit_regression_and_grad(torch.zeros(2, 3), torch.ones(2, 3), out=saved.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    saved = x * 2
    loss = (saved * saved).sum()
    with torch.inference_mode():
        logit_regression_and_grad(torch.zeros(2, 3), torch.ones(2, 3), out=saved)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("device", DEVICES)
def test_teacher_gets_no_gradient(device):
    student, teacher = (logits((4, 5), torch.float32, device, seed=i).requires_grad_() for i in (37, 38))
    logit_regression(student, teacher, sigma=0.5).backward()
    assert student.grad is not None and teacher.grad is None


def test_autocast_reads_halves_as_they_are():
    student, teacher = (logits((8, 10), torch.bfloat16, "cpu", seed=i) for i in (39, 40))
    expected = logit_regression(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        loss = logit_regression(student, teacher)
    assert loss.dtype == torch.float32 and loss.equal(expected)


ONE, ROW = torch.zeros(2, 3), torch.zeros(3)
RULES = [
    (ROW, ROW, {}, r"logit_regression: student must be \[rows, classes\], got \[3\]"),
    (torch.zeros(2, 0), torch.zeros(2, 0), {}, r"student must have at least one class, got \[2, 0\]"),
    (ONE, torch.zeros(2, 4), {}, r"teacher must have the shape of student \[2, 3\], got \[2, 4\]"),
    (ONE.long(), ONE.long(), {}, r"student must be float32, float64, float16 or bfloat16, got Long"),
    (ONE, ONE.int(), {}, r"teacher must be float32, float64, float16 or bfloat16, got Int"),
    (ONE.double(), ONE, {}, r"student and teacher must both be float64 or neither, got Double and Float"),
    (ONE, ONE, {"sigma": -1.0}, r"sigma must be finite and >= 0, got -1"),
    (ONE, ONE, {"sigma": float("nan")}, r"sigma must be finite and >= 0, got nan"),
    (ONE, ONE, {"sigma": float("inf")}, r"sigma must be finite and >= 0, got inf"),
    (ONE, ONE, {"sigma": 0.5, "alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
    (ONE, ONE, {"sigma": 0.5, "alpha": float("nan")}, r"alpha must be in \[0, 1\], got nan"),
    (ONE, ONE, {"n_teachers": 0}, r"n_teachers must be in \[1, 2\^31 - 1\], got 0"),
    (ONE, ONE, {"row_offset": -1}, r"row_offset must be in \[0, 2\^62\], got -1"),
    (ONE, ONE, {"sigma": 0.5, "seed": torch.tensor(1.0)}, r"seed must be int64, got Float"),
    (ONE, ONE, {"sigma": 0.5, "seed": torch.tensor([1, 2])}, r"seed must hold one value, got shape \[2\]"),
    (ONE, ONE, {"reduction": "mean"}, r"reduction must be one of none, batchmean, sum, got 'mean'"),
    (ONE, ONE, {"noise_shape": "row"}, r"noise_shape must be one of logit, sample, got 'row'"),
    (ONE, ONE, {"noise_kind": "add"}, r"noise_kind must be one of multiplicative, additive, got 'add'"),
]


@pytest.mark.parametrize("student, teacher, options, message", RULES)
def test_broken_rules_say_which(student, teacher, options, message):
    for op in (logit_regression, logit_regression_and_grad):
        with pytest.raises((ValueError, TypeError), match=message):
            op(student, teacher, **options)


@pytest.mark.parametrize(
    "out, message",
    [
        (torch.zeros(3, 3), r"out must have the shape of student \[2, 3\], got \[3, 3\]"),
        (torch.zeros(2, 3).double(), r"out must have the dtype and device of student"),
        (torch.zeros(3, 2).t(), r"out must be contiguous"),
        (torch.zeros(2, 3, requires_grad=True), r"out must not require grad, pass it detached"),
        (None, r"accumulate=True needs a buffer, pass it as out="),
    ],
)
def test_broken_rules_of_the_buffer_say_which(out, message):
    with pytest.raises((ValueError, TypeError), match=message):
        logit_regression_and_grad(ONE, ONE, out=out, accumulate=True)


def test_out_that_shares_a_part_of_the_logits_is_refused():
    memory, apart = torch.zeros(3, 3), torch.zeros(2, 3)
    for student, teacher, argument in ((memory[:2], apart, "student"), (apart, memory[:2], "teacher")):
        with pytest.raises(ValueError, match=f"out must lie apart from {argument} or be it"):
            logit_regression_and_grad(student, teacher, out=memory[1:])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"student": [1.0]}, r"student must be a Tensor, got list"),
        ({"seed": 7}, r"seed must be a Tensor or None, got int"),
        ({"generator": 7}, r"generator must be a Generator or None, got int"),
        ({"sigma": "a"}, r"sigma must be a number, got str"),
        ({"alpha": None}, r"alpha must be a number, got NoneType"),
        ({"n_teachers": 2.0}, r"n_teachers must be an int of 64 bits, got 2.0"),
        ({"row_offset": 2**70}, r"row_offset must be an int of 64 bits, got 1180591620717411303424"),
        ({"reduction": []}, r"reduction must be one of none, batchmean, sum, got \[\]"),
    ],
)
def test_wrong_types_say_which(options, message):
    for op in (logit_regression, logit_regression_and_grad):
        with pytest.raises((ValueError, TypeError), match=f"^{op.__name__}: {message}$"):
            op(**{"student": ONE, "teacher": ONE} | options)
    for wrong in ({"out": [1.0]}, {"out": ONE, "accumulate": "yes"}):
        with pytest.raises(TypeError, match=f"{list(wrong)[-1]} must be a (Tensor|bool), got (list|str)$"):
            logit_regression_and_grad(ONE, ONE, **wrong)


@pytest.mark.parametrize("student, teacher, options, message", RULES[:11])
def test_meta_kernel_says_the_same(student, teacher, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        logit_regression(student.to("meta"), teacher.to("meta"), **options)


def test_meta_kernel_gives_the_shapes():
    student = torch.empty(6, 5, device="meta", dtype=torch.bfloat16)
    for reduction, shape in (("none", (6,)), ("sum", ())):
        loss, grad = logit_regression_and_grad(student, student, reduction=reduction, sigma=0.5)
        assert (loss.shape, loss.dtype) == (shape, torch.float32)
        assert (grad.shape, grad.dtype) == ((6, 5), torch.bfloat16)


@pytest.mark.parametrize("device", DEVICES)
def test_second_derivative_raises(device):
    student, teacher = (logits((2, 3), torch.float64, device, seed=i) for i in (41, 42))
    (grad,) = torch.autograd.grad(logit_regression(student.requires_grad_(), teacher), student, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(grad.sum(), student)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_compiles(reduction, device):
    seed = seed_on(device)

    def loss(student, teacher):
        return logit_regression(student * 2, teacher, sigma=0.5, alpha=0.5, reduction=reduction, seed=seed).mean()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for rows in (4, 7):
        student, teacher = (logits((rows, 5), torch.float32, device, seed=i) for i in (43, 44))
        student.requires_grad_()
        (expected,) = torch.autograd.grad(loss(student, teacher), student)
        (grad,) = torch.autograd.grad(compiled(student, teacher), student)
        assert_matches(grad, expected)


def test_compiles_with_a_seed_of_its_own():
    compiled = torch.compile(lambda s, t: logit_regression(s, t, sigma=0.5), fullgraph=True)
    student, teacher = (logits((16, 5), torch.float32, "cpu", seed=i) for i in (45, 46))
    assert not compiled(student, teacher).equal(compiled(student, teacher)), "each call draws anew"
    generator = torch.Generator()
    refused = torch.compile(lambda s, t: logit_regression(s, t, sigma=0.5, generator=generator), fullgraph=True)
    with pytest.raises(Exception, match=r"cannot trace generator="):
        refused(student, teacher)


def test_compiles_and_grad_into_a_buffer():
    seed = torch.tensor(3)

    def step(student, teacher, out):
        loss, _ = logit_regression_and_grad(student, teacher, sigma=0.5, seed=seed, out=out, accumulate=True)
        return loss

    student, teacher = (logits((16, 5), torch.float32, "cpu", seed=i) for i in (47, 48))
    eager, compiled = torch.ones(16, 5), torch.ones(16, 5)
    loss = step(student, teacher, eager)
    assert torch.compile(step, fullgraph=True)(student, teacher, compiled).equal(loss)
    assert compiled.equal(eager)


def test_exports():
    class Loss(torch.nn.Module):
        def forward(self, student, teacher, seed):
            return logit_regression(student, teacher, sigma=0.5, seed=seed)

    student, teacher = (logits((6, 5), torch.float32, "cpu", seed=i) for i in (49, 50))
    program = torch.export.export(Loss(), (student, teacher, torch.tensor(3)))
    expected = Loss()(student, teacher, torch.tensor(4))
    assert program.module()(student, teacher, torch.tensor(4)).equal(expected)
