"""distillation_loss against its reference and torch's own composition: values, gradients, noise, edges, rules.

Not here: the CUDA kernel's own code (its C++ test, under emulation) and what only a card shows (the tests marked gpu).
"""

import os
import random
import subprocess
import sys
from itertools import product

import pytest
import torch
import torch.nn.functional as F

import pykd.reference as reference
from pykd.ops import distillation_loss, distillation_loss_and_grad, noisy_logits
from pykd.reference.noisy_logits import perturbed
from pykd.testing import DEVICES, FLOATS, NOISES, assert_matches, logits, tolerance

INF, NAN = float("inf"), float("nan")
ROWS = [(1, 1), (3, 2), (63, 7), (64, 8), (65, 9), (128, 10), (130, 100)]
TILES = [(7, 1000), (3, 1023), (2, 1024), (5, 1025), (3, 2049), (2, 5000)]  # the CPU's are of 1024 classes
NOISES = NOISES | {
    "teachers": {"sigma": 0.5, "alpha": 0.7, "n_teachers": 3, "row_offset": 2**33 + 5},
    "teachers_sample": {"sigma": 0.5, "alpha": 0.7, "n_teachers": 2, "noise_shape": "sample"},
}
NOISY = [name for name in NOISES if name != "clean"]
LOSSES = {
    "forward": {"temperature": 3.0},
    "reverse": {"temperature": 0.5, "direction": "reverse"},
    "both": {"temperature": 4.0, "hard_weight": 0.1, "label_smoothing": 0.1},
    "both_at_1": {"hard_weight": 0.3, "direction": "reverse"},
    "hard": {"hard_weight": 1.0, "label_smoothing": 0.2},
}
KEYS = ["direction", "temperature", "hard_weight", "label_smoothing", "ignored", "reduction", "noise"]
OPTIONS = product(["forward", "reverse"], [0.5, 1.0, 3.0, 4.0], [0.0, 0.3, 1.0], [0.0, 0.1, 1.0],
                  ["none", "some", "all"], ["none", "batchmean", "sum"], NOISES)  # fmt: skip
SAMPLE = [dict(zip(KEYS, values, strict=True)) for values in random.Random(0).sample(list(OPTIONS), 150)]


def seed_on(device, value=-123456789012345):
    return torch.tensor(value, device=device)


def labels(rows, classes, device="cpu", *, seed=99, ignored="some", ignore_index=-100):
    """Labels of which none, a third or all are ignored."""
    target = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))
    target[{"none": slice(0), "some": slice(0, None, 3), "all": slice(None)}[ignored]] = ignore_index
    return target.to(device)


def triple(shape, dtype=torch.float32, device="cpu", *, seed=0, **options):
    student, teacher = (logits(shape, dtype, device, seed=seed + i) for i in (0, 1))
    return student, teacher, labels(*shape, device, seed=seed + 2, **options)


def rounding(student, teacher, target, *, temperature=1.0, hard_weight=0.0, ignore_index=-100, **options):
    """What the errors of a row's loss, beyond its own size, and of its gradient's elements are relative to.

    Logits as large as L carry their rounding into exponentials, whose relative error is that of L / T.
    """
    noise = {"n_teachers": 1, "alpha": 1.0, "noise_shape": "logit", "noise_kind": "multiplicative", "row_offset": 0}
    noise |= {key: value for key, value in options.items() if key in {*noise, "sigma", "seed"}}
    s, z = student.double(), perturbed(teacher.double(), **{"sigma": 0.0, "generator": None} | noise)
    largest = sum(x.masked_fill(x == -INF, 0).abs().amax(1, keepdim=True) for x in (s, z))
    relative = 1 + largest / temperature
    soft, hard = (1 - hard_weight) * temperature, hard_weight * torch.ones_like(s[:, :1])
    if target is not None:
        hard = hard * (target != ignore_index).unsqueeze(1)
    p, q = F.softmax(z / temperature, 1), F.softmax(s / temperature, 1)
    of_loss = soft * temperature * relative + hard * (1 + largest)
    of_grad = soft * relative * (p + q) + hard * (1 + largest * F.softmax(s, 1))
    return relative.squeeze(1), of_loss.squeeze(1), of_grad + torch.finfo(torch.float32).tiny / tolerance(torch.float32)


def check(student, teacher, target=None, *, definition=reference.distillation_loss, reduction="batchmean", **options):
    """Value and gradient through autograd against the definition in float64."""
    device, (rows, classes) = student.device.type, student.shape
    options = {"seed": seed_on(device)} | options
    leaf = student.detach().clone().requires_grad_()
    wide = student.detach().double().requires_grad_()
    loss = distillation_loss(leaf, teacher, target, reduction=reduction, **options)
    of_double = (
        {key: value for key, value in options.items() if key != "seed"} if definition is composition else options
    )
    expected = definition(wide, teacher.double(), target, reduction=reduction, **of_double)
    assert loss.dtype == (torch.float64 if student.dtype == torch.float64 else torch.float32)

    relative, of_loss, of_grad = rounding(student, teacher, target, **options)
    each = reference.distillation_loss(wide, teacher.double(), target, reduction="none", **options).detach()
    of_loss = of_loss + (relative - 1) * each
    counted = rows if target is None else max(1, int((target != options.get("ignore_index", -100)).sum()))
    scale = 1 / counted if reduction == "batchmean" else 1.0
    assert_matches(loss, expected, length=classes, magnitude=of_loss if reduction == "none" else of_loss.sum() * scale)

    weight = torch.linspace(-1, 1, loss.numel(), dtype=torch.float64, device=device).reshape(loss.shape) + 0.25
    (grad,) = torch.autograd.grad(loss, leaf, weight.to(loss.dtype))
    (expected_grad,) = torch.autograd.grad(expected, wide, weight)
    assert grad.dtype == student.dtype and grad.is_contiguous()
    of_grad = of_grad * scale * weight.abs().reshape(-1, 1) + (relative - 1).unsqueeze(1) * expected_grad.abs()
    # Half types are computed in float32 and rounded once, at the end.
    of_grad = of_grad * (tolerance(loss.dtype) / tolerance(grad.dtype))
    assert_matches(grad, expected_grad, length=classes, magnitude=of_grad)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shapes", [ROWS, TILES], ids=["rows", "tiles"])
def test_matches_reference(shapes, loss, noise, dtype, device):
    for shape in shapes:
        check(*triple(shape, dtype, device), **LOSSES[loss], **NOISES[noise])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: "-".join(str(value) for value in case.values()))
def test_matches_reference_for_every_option(case, device):
    options = {key: value for key, value in case.items() if key not in {"ignored", "noise"}} | NOISES[case["noise"]]
    for ignore_index in (-100, 3):
        student, teacher, target = triple(
            (67, 33), torch.float32, device, seed=3, ignored=case["ignored"], ignore_index=ignore_index
        )
        check(student, teacher, target, ignore_index=ignore_index, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("student_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_matches_reference_for_mixed_dtypes(student_dtype, teacher_dtype, device):
    for shape in ((33, 130), (3, 1500)):
        student, _, target = triple(shape, student_dtype, device, seed=6)
        check(student, logits(shape, teacher_dtype, device, seed=7), target, **LOSSES["both"], **NOISES["logit"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("strides", ["columns", "sliced", "expanded", "offset"])
def test_matches_reference_for_any_strides(strides, device):
    student, teacher, _ = triple((12, 18), torch.float32, device, seed=9)
    views = {
        "columns": lambda x: x.t().contiguous().t(),
        "sliced": lambda x: x[::2, 1::3],
        "expanded": lambda x: x[:1].expand(12, 18),
        "offset": lambda x: x.flatten()[1:-17].reshape(11, 18),
    }
    student, teacher = views[strides](student), views[strides](teacher)
    target = labels(2 * len(student), student.shape[1], device)[::2]
    check(student, teacher, target, **LOSSES["both"], **NOISES["logit"])


def composition(
    student,
    teacher,
    target,
    *,
    temperature=1.0,
    hard_weight=0.0,
    direction="forward",
    label_smoothing=0.0,
    ignore_index=-100,
    reduction="batchmean",
):
    """The loss of torch's own functions, as one writes it."""
    log_p, log_q = F.log_softmax(teacher / temperature, 1), F.log_softmax(student / temperature, 1)
    of, to = (log_q, log_p) if direction == "forward" else (log_p, log_q)
    soft = (1 - hard_weight) * temperature**2
    hard = {"label_smoothing": label_smoothing, "ignore_index": ignore_index}
    if reduction == "none":
        divergence = F.kl_div(of, to, reduction="none", log_target=True).sum(1)
        return soft * divergence + hard_weight * F.cross_entropy(student, target, reduction="none", **hard)
    divergence = F.kl_div(of, to, reduction=reduction, log_target=True)
    mean = "mean" if reduction == "batchmean" else reduction
    return soft * divergence + hard_weight * F.cross_entropy(student, target, reduction=mean, **hard)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("hard_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0, 4.0])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_matches_torchs_composition_for_every_option(direction, temperature, hard_weight, device):
    soft = {"direction": direction, "temperature": temperature, "hard_weight": hard_weight}
    for smoothing, ignore_index, reduction, classes in product(
        [0.0, 0.1, 1.0], [-100, 3], ["none", "batchmean", "sum"], [5, 100]
    ):
        options = soft | {"label_smoothing": smoothing, "ignore_index": ignore_index, "reduction": reduction}
        for dtype in (torch.float32, torch.float64):
            student, teacher, target = triple((9, classes), dtype, device, seed=12, ignore_index=ignore_index)
            check(student, teacher, target, definition=composition, **options)
        theirs, ours = (student.clone().requires_grad_() for _ in range(2))
        expected, loss = composition(theirs, teacher, target, **options), None
        loss = reference.distillation_loss(ours, teacher, target, **options)
        assert_matches(loss.detach(), expected.detach(), length=classes, magnitude=temperature**2)
        expected.sum().backward(), loss.sum().backward()
        assert_matches(ours.grad, theirs.grad, magnitude=temperature)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", ["none", "batchmean", "sum"])
def test_gradcheck(reduction, loss, noise, device):
    student, teacher, target = triple((4, 6), torch.float64, device, seed=15)
    options = {"reduction": reduction, "seed": seed_on(device)} | LOSSES[loss] | NOISES[noise]
    assert torch.autograd.gradcheck(
        lambda x: distillation_loss(x, teacher, target, **options), (student.requires_grad_(),)
    )


def schema_arguments(student, teacher, target, device, *, hard_weight=0.3):
    loss = (1, 3.0, hard_weight, False, 0.1, -100)
    return student, teacher, target, seed_on(device), *loss, 0.5, 0.6, False, False, 2, 3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("hard_weight", [0.0, 0.3])
@pytest.mark.parametrize("strides", ["rows", "columns", "sliced"])
def test_opcheck(strides, hard_weight, requires_grad, device):
    student, teacher, target = triple((6, 8), torch.float32, device, seed=18)
    if strides == "columns":
        student = student.t().contiguous().t()
    if strides == "sliced":
        student = logits((6, 16), torch.float32, device, seed=18)[:, ::2]
    student = student.detach().requires_grad_(requires_grad)
    arguments = schema_arguments(student, teacher, target if hard_weight else None, device, hard_weight=hard_weight)
    torch.library.opcheck(torch.ops.pykd.distillation_loss.default, arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_of_its_other_forms(device):
    student, teacher, target = triple((6, 8), torch.float32, device, seed=18)
    arguments = schema_arguments(student, teacher, target, device)
    ops = torch.ops.pykd
    torch.library.opcheck(ops.distillation_loss_backward.default, (torch.ones((), device=device), *arguments))
    torch.library.opcheck(ops.distillation_loss_and_grad.default, arguments)
    out = torch.zeros_like(student)
    torch.library.opcheck(ops.distillation_loss_and_grad.out, (*arguments, True, out))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("classes", [5, 1500])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("whose", ["student", "teacher", "both"])
@pytest.mark.parametrize("extreme", [1e4, -1e4, 1e30, -1e30])
def test_extreme_logits_have_their_limits(extreme, whose, direction, classes, device):
    student, teacher, target = triple((4, classes), torch.float32, device, seed=21)
    for name, x in (("student", student), ("teacher", teacher)):
        if whose in (name, "both"):
            x[:, 2] = extreme
    options = {"temperature": 3.0, "hard_weight": 0.2, "direction": direction, "reduction": "none"}
    loss, grad = distillation_loss_and_grad(student, teacher, target, **options)
    expected, expected_grad = reference.distillation_loss_and_grad(
        student.double(), teacher.double(), target, **options
    )
    size = float(max(student[:, 3:].abs().max(), teacher[:, 3:].abs().max())) ** 2
    assert_matches(loss, expected, length=classes, magnitude=9 * size)
    # The reverse one is q (log q - log p - KL), a difference that inherits the rounding of KL.
    of_grad = F.softmax(student.double() / 3, 1) * expected.unsqueeze(1) if direction == "reverse" else 0.0
    assert_matches(grad, expected_grad, length=classes, magnitude=3 * size + of_grad)
    for noise in NOISY:
        loss, grad = distillation_loss_and_grad(student, teacher, target, **options, **NOISES[noise])
        assert loss.isfinite().all() and grad.isfinite().all()


MASKS = {
    "one": [3],
    "all but one": [c for c in range(2100) if c != 2047],
    "first tile": range(1024),
    "a tile": range(1024, 2048),
    "alternating": range(0, 2100, 2),
    "last": range(2080, 2100),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("noise", ["clean", "logit", "additive", "teachers"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("masked", MASKS)
def test_extreme_masked_classes(masked, direction, noise, device):
    """-inf is probability 0: nothing is added, the gradient is finite, and noise leaves it where it is."""
    places = torch.tensor(list(MASKS[masked]), device=device)
    for dtype, hard_weight in product([torch.float32, torch.bfloat16, torch.float64], [0.0, 0.3]):
        student, teacher, _ = triple((3, 2100), dtype, device, seed=24)
        target = torch.tensor([2047, -100, 2047], device=device) if masked != "a tile" else labels(3, 1000, device)
        teacher[:, places] = -INF
        if direction == "reverse" or hard_weight:
            student[:2, places] = -INF
            target[2] = -100
        if direction == "reverse":
            student[2, places] = -INF
        options = {"temperature": 3.0, "hard_weight": hard_weight, "direction": direction}
        if masked == "all but one" and direction == "forward" and not hard_weight:
            alone = distillation_loss(student, teacher, temperature=3.0, reduction="none", **NOISES[noise])
            assert_matches(alone, -9 * F.log_softmax(student.double() / 3, 1)[:, 2047], length=2100, magnitude=9.0)
        check(student, teacher, target, **options, **NOISES[noise])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("classes", [9, 1500])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_extreme_divergence_is_infinite(direction, classes, device):
    """A class of mass that the other side gives none."""
    student, teacher, _ = triple((3, classes), torch.float32, device, seed=27)
    (student if direction == "forward" else teacher)[1, classes - 2] = -INF
    options = {"direction": direction, "temperature": 2.0, "reduction": "none"}
    loss, grad = distillation_loss_and_grad(student, teacher, **options)
    clean, clean_grad = distillation_loss_and_grad(student[::2], teacher[::2], **options)
    assert loss[1] == INF and loss[::2].equal(clean) and grad[::2].equal(clean_grad)
    if direction == "reverse":
        assert not grad[1].isfinite().all()
    else:
        expected = reference.distillation_loss_and_grad(student.double(), teacher.double(), **options)[1]
        assert_matches(grad, expected, length=classes, magnitude=2.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [9, 1500])
def test_extreme_cross_entropy_is_infinite(classes, smoothing, device):
    """A label, or a share of one by smoothing, at a class that the student gives no mass; the gradient is finite."""
    student, teacher, _ = triple((3, classes), torch.float32, device, seed=27)
    student[:, 2] = teacher[:, 2] = -INF
    options = {"hard_weight": 0.3, "label_smoothing": smoothing, "temperature": 3.0, "reduction": "none"}
    target = torch.tensor([2, 1, -100], device=device)
    loss, grad = distillation_loss_and_grad(student, teacher, target, **options)
    assert (loss == INF).tolist() == [True, smoothing > 0, False]
    expected = reference.distillation_loss_and_grad(student.double(), teacher.double(), target, **options)[1]
    assert_matches(grad, expected, length=classes, magnitude=3.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("noise", ["clean", "logit", "additive", "sample"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("classes", [9, 1500])
@pytest.mark.parametrize("value", [NAN, INF, "all -inf"])
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_extreme_values_show_in_their_row(whose, value, classes, loss, noise, device):
    student, teacher, target = triple((5, classes), torch.float32, device, seed=30, ignored="none")
    options = {"reduction": "none", "seed": seed_on(device)} | LOSSES[loss] | NOISES[noise]
    clean, clean_grad = distillation_loss_and_grad(student, teacher, target, **options)
    x = student if whose == "student" else teacher
    x[2, slice(None) if value == "all -inf" else classes - 3] = -INF if value == "all -inf" else value
    got, grad = distillation_loss_and_grad(student, teacher, target, **options)
    others = [0, 1, 3, 4]
    assert got[others].equal(clean[others]) and grad[others].equal(clean_grad[others])
    if whose == "teacher" and loss == "hard":
        assert got[2].equal(clean[2]) and grad[2].equal(clean_grad[2]), "the teacher has no part in it"
    else:
        assert got[2].isnan() and grad[2].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 1e3, 1e6])
def test_extreme_temperatures(temperature, direction, device):
    student, teacher, _ = triple((20, 50), torch.float32, device, seed=33)
    check(student, teacher, temperature=temperature, direction=direction)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reduction", ["none", "batchmean", "sum"])
def test_no_rows(reduction, device):
    student = torch.empty(0, 5, device=device, requires_grad=True)
    target = torch.empty(0, device=device, dtype=torch.int64)
    loss = distillation_loss(
        student, student.detach(), target, hard_weight=0.5, label_smoothing=0.1, sigma=0.5, reduction=reduction
    )
    assert loss.shape == ((0,) if reduction == "none" else ())
    assert loss.sum() == 0
    loss.sum().backward()
    assert student.grad.shape == (0, 5)


@pytest.mark.parametrize("device", DEVICES)
def test_ignored_rows_have_no_cross_entropy(device):
    student, teacher, target = triple((6, 10), torch.float32, device, seed=36, ignored="all")
    for reduction in ("none", "batchmean", "sum"):
        loss, grad = distillation_loss_and_grad(student, teacher, target, hard_weight=1.0, reduction=reduction)
        assert not loss.any() and not grad.any()
    soft = distillation_loss(student, teacher, temperature=3.0)
    assert_matches(distillation_loss(student, teacher, target, temperature=3.0, hard_weight=0.25), 0.75 * soft)


@pytest.mark.parametrize("device", DEVICES)
def test_target_is_not_read_where_it_has_no_weight(device):
    student, teacher, target = triple((6, 10), torch.float32, device, seed=36)
    expected = distillation_loss(student, teacher)
    assert distillation_loss(student, teacher, target + 1000).equal(expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("shape", [*ROWS, *TILES], ids=str)
def test_equal_logits_cost_nothing(shape, direction, device):
    x = logits(shape, torch.float32, device, seed=39)
    loss, grad = distillation_loss_and_grad(x, x.clone(), temperature=3.0, direction=direction, reduction="sum")
    assert_matches(loss, torch.zeros((), device=device), magnitude=9.0 * len(x))
    assert_matches(grad, torch.zeros_like(x), magnitude=3 * F.softmax(x.double() / 3, 1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_of_a_row_sums_to_zero_and_shifts_change_nothing(loss, device):
    student, teacher, target = triple((30, 100), torch.float64, device, seed=42)
    options = {"reduction": "none"} | LOSSES[loss]
    value, grad = distillation_loss_and_grad(student, teacher, target, **options)
    assert_matches(grad.sum(1), torch.zeros(30, device=device), length=100, magnitude=4.0)
    shifted, shifted_grad = distillation_loss_and_grad(student + 7, teacher - 5, target, **options)
    assert_matches(shifted, value, length=100, magnitude=16 * 40.0)
    assert_matches(shifted_grad, grad, length=100, magnitude=4 * 40.0)


@pytest.mark.parametrize("device", DEVICES)
def test_divergence_is_never_negative(device):
    """Rounding would make it so where the two are all but equal."""
    student = logits((500, 100), torch.float32, device, seed=45)
    teacher = student * (1 + 1e-7 * logits((500, 100), torch.float32, device, seed=46))
    for direction in ("forward", "reverse"):
        assert (distillation_loss(student, teacher, direction=direction, reduction="none") >= 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_reverse_is_forward_with_the_sides_exchanged(device):
    student, teacher, _ = triple((30, 100), torch.float64, device, seed=48)
    loss = distillation_loss(student, teacher, temperature=2.0, direction="reverse")
    assert_matches(loss, distillation_loss(teacher, student, temperature=2.0), length=100, magnitude=40.0)


@pytest.mark.parametrize("device", DEVICES)
def test_hard_weight_mixes_the_two_parts(device):
    student, teacher, target = triple((30, 10), torch.float64, device, seed=51)
    options = {"temperature": 3.0, "label_smoothing": 0.1}
    soft, hard, both = (
        distillation_loss_and_grad(student, teacher, target, hard_weight=w, **options) for w in (0.0, 1.0, 0.25)
    )
    for i in (0, 1):
        assert_matches(both[i], 0.75 * soft[i] + 0.25 * hard[i], length=10, magnitude=9.0)


@pytest.mark.parametrize("device", DEVICES)
def test_high_temperature_is_regression_of_centred_logits(device):
    """Hinton, Vinyals & Dean 2015, section 2.1: the gradient tends to (g - z) / C where both sum to 0."""
    student, teacher, _ = triple((8, 20), torch.float64, device, seed=54)
    gap = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    for temperature in (1e3, 1e4):
        _, grad = distillation_loss_and_grad(student, teacher, temperature=temperature, reduction="sum")
        # The next term of the expansion is smaller by a logit over T.
        assert (grad - gap / 20).abs().max() < gap.abs().max() / 20 * (20 / temperature)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("off", [{"sigma": 0.0, "alpha": 0.8}, {"sigma": 0.5, "alpha": 0.0}], ids=["sigma", "alpha"])
@pytest.mark.parametrize("loss", LOSSES)
def test_no_noise_is_clean_bit_for_bit(loss, off, device):
    for shape in (*ROWS, *TILES):
        student, teacher, target = triple(shape, torch.float32, device, seed=57)
        value, grad = distillation_loss_and_grad(student, teacher, target, **LOSSES[loss])
        for kind in ("logit", "sample"):
            options = LOSSES[loss] | off | {"noise_shape": kind}
            off_value, off_grad = distillation_loss_and_grad(student, teacher, target, **options)
            assert off_value.equal(value) and off_grad.equal(grad)
            assert distillation_loss(student, teacher, target, **options).equal(value)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", ["logit", "sample"])
def test_unselected_rows_are_clean_bit_for_bit(shape, device):
    student, teacher, target = triple((300, 20), torch.float32, device, seed=60)
    options = {"reduction": "none", "temperature": 3.0, "hard_weight": 0.1}
    noise = {"sigma": 0.5, "alpha": 0.3, "noise_shape": shape, "seed": seed_on(device)}
    noisy = distillation_loss(student, teacher, target, **options, **noise)
    clean = distillation_loss(student, teacher, target, **options)
    selected = reference.philox.selected(300, 0.3, seed=seed_on(device))
    assert 0 < selected.sum() < 300
    assert noisy[~selected].equal(clean[~selected])
    assert (noisy[selected] != clean[selected]).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("noise", [name for name in NOISY if "teachers" not in name])
def test_noise_is_that_of_noisy_logits(noise, device):
    for shape in ((65, 9), (3, 2049)):
        student, teacher, target = triple(shape, torch.float64, device, seed=63)
        options = NOISES[noise] | {"seed": seed_on(device)}
        loss, grad = distillation_loss_and_grad(student, teacher, target, **LOSSES["both"], **options)
        perturbed_teacher = noisy_logits(teacher, **options)
        expected, expected_grad = distillation_loss_and_grad(student, perturbed_teacher, target, **LOSSES["both"])
        assert_matches(loss, expected, length=shape[1], magnitude=16 * float(perturbed_teacher.abs().max()))
        assert_matches(grad, expected_grad, length=shape[1], magnitude=4 * float(perturbed_teacher.abs().max()))


@pytest.mark.parametrize("device", DEVICES)
def test_additive_noise_of_one_value_a_row_changes_nothing(device):
    """A softmax does not see a shift of all logits."""
    student, teacher, _ = triple((100, 30), torch.float64, device, seed=66)
    noisy = distillation_loss_and_grad(student, teacher, **NOISES["additive_sample"])
    for value, clean in zip(noisy, distillation_loss_and_grad(student, teacher), strict=True):
        assert_matches(value, clean, length=30, magnitude=20.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("noise", [name for name in NOISY if name != "additive_sample"])
def test_seed_decides(noise, device):
    student, teacher, target = triple((100, 30), torch.float32, device, seed=66)

    def draw(seed):
        options = {"seed": seed_on(device, seed)} | NOISES[noise]
        return distillation_loss_and_grad(student, teacher, target, hard_weight=0.1, **options)

    (loss, grad), (again, grad_again), (other, grad_other) = draw(1), draw(1), draw(2)
    assert loss.equal(again) and grad.equal(grad_again)
    assert not loss.equal(other) and not grad.equal(grad_other)
    assert not draw(1 + 2**40)[0].equal(loss), "the seed's high half counts"


@pytest.mark.parametrize("device", DEVICES)
def test_seed_comes_from_torchs_generator(device):
    student, teacher, _ = triple((50, 10), torch.float32, device, seed=69)

    def draw(**options):
        return distillation_loss(student, teacher, sigma=0.5, **options)

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert draw().equal(first) and not first.equal(second)
    generator = torch.Generator(device).manual_seed(4)
    third = draw(generator=generator)
    assert draw(generator=generator.manual_seed(4)).equal(third)
    state = torch.get_rng_state()
    draw(seed=seed_on(device)), draw(generator=generator), distillation_loss(student, teacher)
    assert torch.get_rng_state().equal(state), "a given seed, a generator or no noise leave torch's own alone"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("shape", [(128, 10), (130, 513), (2, 5000)], ids=str)
def test_a_slice_with_row_offset_draws_what_it_has_in_the_whole(shape, noise, device):
    student, teacher, target = triple(shape, torch.float32, device, seed=72)
    offset = NOISES[noise].get("row_offset", 0)
    options = NOISES[noise] | {"seed": seed_on(device), "temperature": 3.0, "hard_weight": 0.2}
    half = shape[0] // 2
    loss, grad = distillation_loss_and_grad(student, teacher, target, reduction="none", **options)
    parts = []
    for part, begin in ((slice(None, half), offset), (slice(half, None), offset + half)):
        slices = student[part], teacher[part], target[part]
        part_options = options | {"row_offset": begin}
        part_loss, part_grad = distillation_loss_and_grad(*slices, reduction="none", **part_options)
        assert part_loss.equal(loss[part]) and part_grad.equal(grad[part])
        parts.append(distillation_loss(*slices, reduction="sum", **part_options))
    whole = distillation_loss(student, teacher, target, reduction="sum", **options)
    assert_matches(parts[0] + parts[1], whole)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("shape", [(515, 333), (30, 2100)], ids=str)
def test_threads_do_not_change_bits(shape, noise):
    student, teacher, target = triple(shape, seed=75)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            options = {"seed": torch.tensor(9)} | LOSSES["both"] | NOISES[noise]
            results.append(distillation_loss_and_grad(student, teacher, target, **options))
    finally:
        torch.set_num_threads(threads)
    for loss, grad in results[1:]:
        assert loss.equal(results[0][0]) and grad.equal(results[0][1])


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_instruction_sets_agree(isa):
    """The levels below this processor's own; a process each, since the choice is made once."""
    code = (
        "import torch; from pykd import _C; from pykd.ops import distillation_loss_and_grad as op; "
        "from pykd.testing import logits; s, t = (logits((70, 1131), torch.float32, 'cpu', seed=i) for i in (78, 79)); "
        "options = dict(temperature=3.0, hard_weight=0.1, sigma=0.5, alpha=0.5, seed=torch.tensor(9)); "
        "loss, grad = op(s, t, torch.arange(70), label_smoothing=0.1, **options); "
        "print(_C.isa(), loss.item(), 100 * grad.double().norm().item(), 100 * grad[:, 7].double().sum().item())"
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
    assert_matches(values, expected, length=1131, magnitude=9.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("loss", LOSSES)
def test_and_grad_is_the_op_and_its_gradient_bit_for_bit(loss, noise, dtype, device):
    for shape in ((70, 131), (3, 1500)):
        student, teacher, target = triple(shape, dtype, device, seed=81)
        options = {"seed": seed_on(device)} | LOSSES[loss] | NOISES[noise]
        leaf = student.clone().requires_grad_()
        value = distillation_loss(leaf, teacher, target, **options)
        value.backward()
        one_value, one_grad = distillation_loss_and_grad(student, teacher, target, **options)
        assert one_value.equal(value.detach()) and one_grad.equal(leaf.grad)
        assert not one_value.requires_grad
        buffer = torch.full_like(student, NAN)
        out_value, out = distillation_loss_and_grad(student, teacher, target, out=buffer, **options)
        assert out is buffer and out.equal(one_grad) and out_value.equal(one_value)
        buffer.fill_(2.0)
        distillation_loss_and_grad(student, teacher, target, out=buffer, accumulate=True, **options)
        assert_matches(buffer, 2.0 + one_grad.double(), magnitude=2.0)
        for place in (0, 1):  # into the student's memory, and the teacher's
            arguments = [student.clone(), teacher.clone(), target]
            in_place = distillation_loss_and_grad(*arguments, out=arguments[place], **options)
            assert in_place[0].equal(one_value) and arguments[place].equal(one_grad)


def test_out_is_seen_by_autograd():
    """Overwriting a tensor that autograd saved must not go unnoticed."""
    x = torch.ones(2, 3, requires_grad=True)
    saved = x * 2
    loss = (saved * saved).sum()
    distillation_loss_and_grad(torch.zeros(2, 3), torch.ones(2, 3), out=saved.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    saved = x * 2
    loss = (saved * saved).sum()
    with torch.inference_mode():
        distillation_loss_and_grad(torch.zeros(2, 3), torch.ones(2, 3), out=saved)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("device", DEVICES)
def test_teacher_gets_no_gradient(device):
    student, teacher, _ = triple((4, 5), torch.float32, device, seed=84)
    student.requires_grad_(), teacher.requires_grad_()
    distillation_loss(student, teacher, sigma=0.5).backward()
    assert student.grad is not None and teacher.grad is None


def test_autocast_reads_halves_as_they_are():
    student, teacher, target = triple((8, 10), torch.bfloat16, seed=87)
    expected = distillation_loss(student, teacher, target, hard_weight=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = distillation_loss(student, teacher, target, hard_weight=0.1)
    assert loss.dtype == torch.float32 and loss.equal(expected)


ONE, ROW, Y = torch.zeros(2, 3), torch.zeros(3), torch.tensor([0, 1])
RULES = [
    (ROW, ROW, None, {}, r"distillation_loss: student must be \[rows, classes\], got \[3\]"),
    (torch.zeros(2, 0), torch.zeros(2, 0), None, {}, r"student must have at least one class, got \[2, 0\]"),
    (ONE, torch.zeros(2, 4), None, {}, r"teacher must have the shape of student \[2, 3\], got \[2, 4\]"),
    (ONE.long(), ONE.long(), None, {}, r"student must be float32, float64, float16 or bfloat16, got Long"),
    (ONE, ONE.int(), None, {}, r"teacher must be float32, float64, float16 or bfloat16, got Int"),
    (ONE.double(), ONE, None, {}, r"student and teacher must both be float64 or neither, got Double and Float"),
    (ONE, ONE, None, {"temperature": 0.0}, r"temperature must be finite and > 0, got 0"),
    (ONE, ONE, None, {"temperature": -4.0}, r"temperature must be finite and > 0, got -4"),
    (ONE, ONE, None, {"temperature": NAN}, r"temperature must be finite and > 0, got nan"),
    (ONE, ONE, None, {"temperature": INF}, r"temperature must be finite and > 0, got inf"),
    (ONE, ONE, Y, {"hard_weight": 1.5}, r"hard_weight must be in \[0, 1\], got 1.5"),
    (ONE, ONE, Y, {"hard_weight": -0.1}, r"hard_weight must be in \[0, 1\], got -0.1"),
    (ONE, ONE, Y, {"hard_weight": NAN}, r"hard_weight must be in \[0, 1\], got nan"),
    (ONE, ONE, Y, {"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\], got 1.5"),
    (ONE, ONE, Y, {"label_smoothing": NAN}, r"label_smoothing must be in \[0, 1\], got nan"),
    (ONE, ONE, None, {"hard_weight": 0.3}, r"hard_weight 0.3 needs a target, pass target= or hard_weight=0"),
    (ONE, ONE, Y[:1], {"hard_weight": 0.3}, r"target must be \[rows\] = \[2\], got \[1\]"),
    (ONE, ONE, Y.unsqueeze(1), {"hard_weight": 0.3}, r"target must be \[rows\] = \[2\], got \[2, 1\]"),
    (ONE, ONE, ONE, {"hard_weight": 0.3}, r"target must be \[rows\] = \[2\], got \[2, 3\]"),
    (ONE, ONE, Y.int(), {"hard_weight": 0.3}, r"target must be int64, got Int"),
    (ONE, ONE, Y.float(), {"hard_weight": 0.3}, r"target must be int64, got Float"),
    (ONE, ONE, None, {"sigma": -1.0}, r"sigma must be finite and >= 0, got -1"),
    (ONE, ONE, None, {"sigma": NAN}, r"sigma must be finite and >= 0, got nan"),
    (ONE, ONE, None, {"sigma": 0.5, "alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
    (ONE, ONE, None, {"n_teachers": 0}, r"n_teachers must be in \[1, 2\^31 - 1\], got 0"),
    (ONE, ONE, None, {"row_offset": -1}, r"row_offset must be in \[0, 2\^62\], got -1"),
    (ONE, ONE, None, {"sigma": 0.5, "seed": torch.tensor(1.0)}, r"seed must be int64, got Float"),
    (ONE, ONE, None, {"sigma": 0.5, "seed": torch.tensor([1, 2])}, r"seed must hold one value, got shape \[2\]"),
    (ONE, ONE, None, {"reduction": "mean"}, r"reduction must be one of none, batchmean, sum, got 'mean'"),
    (ONE, ONE, None, {"direction": "back"}, r"direction must be one of forward, reverse, got 'back'"),
    (ONE, ONE, None, {"noise_shape": "row"}, r"noise_shape must be one of logit, sample, got 'row'"),
    (ONE, ONE, None, {"noise_kind": "add"}, r"noise_kind must be one of multiplicative, additive, got 'add'"),
]


@pytest.mark.parametrize("student, teacher, target, options, message", RULES)
def test_broken_rules_say_which(student, teacher, target, options, message):
    for op in (distillation_loss, distillation_loss_and_grad):
        with pytest.raises((ValueError, TypeError), match=message):
            op(student, teacher, target, **options)


@pytest.mark.parametrize("wrong", [12, 10, -1, 2**40, -(2**63)])
@pytest.mark.parametrize("row", [0, 3, 299])
def test_broken_rules_of_a_target_name_value_and_row(row, wrong):
    student, teacher, target = triple((300, 10), seed=90)
    target[row] = wrong
    target[-1] = target[-1] if row == 299 else 77  # the first one is told
    for op in (distillation_loss, distillation_loss_and_grad):
        with pytest.raises(
            ValueError, match=rf"target must be in \[0, 10\) or ignore_index -100, got {wrong} in row {row}$"
        ):
            op(student, teacher, target, hard_weight=0.1)
    out = torch.ones_like(student)
    with pytest.raises(ValueError, match="target must be in"):
        distillation_loss_and_grad(student, teacher, target, hard_weight=0.1, out=out)
    assert out.equal(torch.ones_like(out)), "nothing is written where a label is wrong"


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
        distillation_loss_and_grad(ONE, ONE, out=out, accumulate=True)


def test_out_that_shares_a_part_of_the_logits_is_refused():
    memory, apart = torch.zeros(3, 3), torch.zeros(2, 3)
    for student, teacher, argument in ((memory[:2], apart, "student"), (apart, memory[:2], "teacher")):
        with pytest.raises(ValueError, match=f"out must lie apart from {argument} or be it"):
            distillation_loss_and_grad(student, teacher, out=memory[1:])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"student": [1.0]}, r"student must be a Tensor, got list"),
        ({"target": [0, 1]}, r"target must be a Tensor or None, got list"),
        ({"temperature": "hot"}, r"temperature must be a number, got str"),
        ({"temperature": None}, r"temperature must be a number, got NoneType"),
        ({"hard_weight": [0.1]}, r"hard_weight must be a number, got list"),
        ({"label_smoothing": "a"}, r"label_smoothing must be a number, got str"),
        ({"ignore_index": None}, r"ignore_index must be an int of 64 bits, got None"),
        ({"ignore_index": 1.5}, r"ignore_index must be an int of 64 bits, got 1.5"),
        ({"seed": 7}, r"seed must be a Tensor or None, got int"),
        ({"generator": 7}, r"generator must be a Generator or None, got int"),
        ({"sigma": "a"}, r"sigma must be a number, got str"),
        ({"n_teachers": 2.0}, r"n_teachers must be an int of 64 bits, got 2.0"),
        ({"row_offset": 2**70}, r"row_offset must be an int of 64 bits, got 1180591620717411303424"),
        ({"reduction": []}, r"reduction must be one of none, batchmean, sum, got \[\]"),
        ({"direction": None}, r"direction must be one of forward, reverse, got None"),
    ],
)
def test_wrong_types_say_which(options, message):
    for op in (distillation_loss, distillation_loss_and_grad):
        with pytest.raises((ValueError, TypeError), match=f"^{op.__name__}: {message}$"):
            op(**{"student": ONE, "teacher": ONE} | options)
    for wrong in ({"out": [1.0]}, {"out": ONE, "accumulate": "yes"}):
        with pytest.raises(TypeError, match=f"{list(wrong)[-1]} must be a (Tensor|bool), got (list|str)$"):
            distillation_loss_and_grad(ONE, ONE, **wrong)


@pytest.mark.parametrize("student, teacher, target, options, message", RULES[:25])
def test_meta_kernel_says_the_same(student, teacher, target, options, message):
    target = None if target is None else target.to("meta")
    with pytest.raises((ValueError, TypeError), match=message):
        distillation_loss(student.to("meta"), teacher.to("meta"), target, **options)


def test_target_must_be_on_the_students_device():
    with pytest.raises(TypeError, match=r"target must be on the student's device meta, got cpu"):
        distillation_loss(ONE.to("meta"), ONE.to("meta"), Y, hard_weight=0.1)


def test_meta_kernel_gives_the_shapes():
    student = torch.empty(6, 5, device="meta", dtype=torch.bfloat16)
    for reduction, shape in (("none", (6,)), ("sum", ())):
        loss, grad = distillation_loss_and_grad(student, student, reduction=reduction, sigma=0.5)
        assert (loss.shape, loss.dtype) == (shape, torch.float32)
        assert (grad.shape, grad.dtype) == ((6, 5), torch.bfloat16)


@pytest.mark.parametrize("device", DEVICES)
def test_second_derivative_raises(device):
    student, teacher, _ = triple((2, 3), torch.float64, device, seed=93)
    (grad,) = torch.autograd.grad(distillation_loss(student.requires_grad_(), teacher), student, create_graph=True)
    with pytest.raises(NotImplementedError, match="distillation_loss: the second derivative is not implemented"):
        torch.autograd.grad(grad.sum(), student)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("hard_weight", [0.0, 0.3])
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_compiles(reduction, hard_weight, device):
    options = {"temperature": 3.0, "reduction": reduction, "sigma": 0.5, "alpha": 0.5, "seed": seed_on(device)}

    def loss(student, teacher, target):
        return distillation_loss(student * 2, teacher, target, hard_weight=hard_weight, **options).mean()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for rows in (4, 7):
        student, teacher, target = triple((rows, 5), torch.float32, device, seed=96)
        target = target if hard_weight else None
        student.requires_grad_()
        (expected,) = torch.autograd.grad(loss(student, teacher, target), student)
        (grad,) = torch.autograd.grad(compiled(student, teacher, target), student)
        assert_matches(grad, expected)


def test_compiles_with_a_seed_of_its_own():
    compiled = torch.compile(lambda s, t: distillation_loss(s, t, sigma=0.5), fullgraph=True)
    student, teacher, _ = triple((16, 5), seed=99)
    assert not compiled(student, teacher).equal(compiled(student, teacher)), "each call draws anew"
    generator = torch.Generator()
    refused = torch.compile(lambda s, t: distillation_loss(s, t, sigma=0.5, generator=generator), fullgraph=True)
    with pytest.raises(Exception, match=r"cannot trace generator="):
        refused(student, teacher)


def test_compiles_and_grad_into_a_buffer():
    options = {"hard_weight": 0.1, "sigma": 0.5, "seed": torch.tensor(3)}

    def step(student, teacher, target, out):
        loss, _ = distillation_loss_and_grad(student, teacher, target, out=out, accumulate=True, **options)
        return loss

    arguments = triple((16, 5), seed=102)
    eager, compiled = torch.ones(16, 5), torch.ones(16, 5)
    loss = step(*arguments, eager)
    assert torch.compile(step, fullgraph=True)(*arguments, compiled).equal(loss)
    assert compiled.equal(eager)


def test_exports():
    class Loss(torch.nn.Module):
        def forward(self, student, teacher, target, seed):
            return distillation_loss(student, teacher, target, temperature=4.0, hard_weight=0.1, sigma=0.5, seed=seed)

    arguments = triple((6, 5), seed=105)
    program = torch.export.export(Loss(), (*arguments, torch.tensor(3)))
    assert program.module()(*arguments, torch.tensor(4)).equal(Loss()(*arguments, torch.tensor(4)))
