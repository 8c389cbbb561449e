"""factor_loss against its reference: values, gradients, scales, strides, edges, rules.

Not here: the CUDA kernel's own code (its C++ test, under emulation) and what only a card shows (the tests marked gpu).
"""

import os
import subprocess
import sys

import pytest
import torch

import pykd.reference as reference
from pykd.ops import factor_loss, factor_loss_and_grad
from pykd.testing import DEVICES, FLOATS, assert_matches, logits, tolerance

INF, NAN = float("inf"), float("nan")
SHAPES = [(1, 1), (3, 10), (128, 32, 4, 4), (65, 7), (2, 5, 3, 3), (300, 3), (7, 1025), (2, 16385)]
FORMS = {f"p{p}-{reduction}": {"p": p, "reduction": reduction} for p in (1, 2) for reduction in ("mean", "row")}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
each_device = pytest.mark.parametrize("device", DEVICES)


def pair(shape, dtype=torch.float32, device="cpu", seed=0):
    return tuple(logits(shape, dtype, device, seed=seed + i) for i in (0, 1))


def unit(factor):
    """Each row in float64, of length 1, and its length before."""
    rows = factor.detach().double().flatten(1)
    norm = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(norm == 0, 1, norm), norm


def magnitudes(student, teacher, p, reduction):
    """What the loss and the gradients are sums and differences of, for the gradient of one: sizes, not rounding.

    Where d is 0 but for rounding, its sign may differ for p = 1, or all of its direction for p = 2: then an entry is
    off by 2, and the projection with it.
    """
    (a, student_norm), (b, teacher_norm) = unit(student), unit(teacher)
    size, d, entries = a.abs() + b.abs(), (a - b).abs(), a.shape[1]
    compute = torch.float64 if student.dtype == torch.float64 else torch.float32
    error = tolerance(compute, length=entries)
    flip = torch.where(d <= error * size, 2 / error, 0.0)
    if p == 1:
        outer = 1 + flip
    elif reduction == "mean":
        outer = 2 * size
    else:
        length = torch.maximum(d.norm(dim=1, keepdim=True), error * size.norm(dim=1, keepdim=True))
        outer = 2 * size / torch.where(length == 0, 1, length)
    parts = size if p == 1 else size.square()
    if reduction == "row" and p == 2:
        loss = size.norm(dim=1).mean()
    else:
        loss = parts.mean() if reduction == "mean" else parts.sum(1).mean()
    weight = 1 / len(a) if reduction == "row" else 1 / a.numel()
    grads = []
    for own, norm in ((a, student_norm), (b, teacher_norm)):
        inward = own.abs() * (outer * own.abs()).sum(1, keepdim=True)
        grads.append((weight * (outer + inward) / torch.where(norm == 0, 1, norm)).reshape(student.shape))
    return float(loss), grads


def check(student, teacher, **form):
    """Value and gradients, through autograd and in one call, against the float64 reference."""
    leaves = [x.detach().clone().requires_grad_() for x in (student, teacher)]
    wide = [x.detach().double().requires_grad_() for x in (student, teacher)]
    loss, expected = factor_loss(*leaves, **form), reference.factor_loss(*wide, **form)
    assert loss.dtype == (torch.float64 if student.dtype == torch.float64 else torch.float32)
    form = {"p": 1, "reduction": "mean"} | form
    size, sizes = magnitudes(student, teacher, **form)
    entries = student[0].numel()
    one, one_grads = factor_loss_and_grad(student, teacher, **form)
    for value in (loss.detach(), one):
        assert_matches(value, expected.detach(), length=entries, magnitude=size)
    weight = -0.7 * (len(student) if form["reduction"] == "row" else student.numel())
    found = torch.autograd.grad(loss, leaves, torch.tensor(weight, dtype=loss.dtype, device=loss.device))
    wanted = torch.autograd.grad(expected, wide, torch.tensor(weight, dtype=torch.float64, device=loss.device))
    for factor, grad, expected_grad, its, one_grad in zip(
        (student, teacher), found, wanted, sizes, one_grads, strict=True
    ):
        assert grad.dtype == factor.dtype and grad.is_contiguous()
        assert_matches(grad, expected_grad, length=entries, magnitude=abs(weight) * its)
        assert_matches(one_grad, expected_grad / weight, length=entries, magnitude=its)


@each_device
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@each_form
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, form, dtype, device):
    check(*pair(shape, dtype, device), **form)


@each_device
@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("student_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_matches_reference_for_mixed_dtypes(student_dtype, teacher_dtype, device):
    check(logits((33, 130), student_dtype, device, seed=2), logits((33, 130), teacher_dtype, device, seed=3))


@each_device
@pytest.mark.parametrize("strides", ["columns", "sliced", "expanded", "offset", "channels_last"])
def test_matches_reference_for_any_strides(strides, device):
    views = {
        "columns": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "sliced": lambda x: x[::2, 1::3],
        "expanded": lambda x: x[:1].expand_as(x),
        "offset": lambda x: x.flatten()[1:-89].reshape(11, 90),
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    }
    check(*(views[strides](x) for x in pair((12, 6, 5, 3), device=device, seed=4)))


@each_device
@each_form
def test_matches_reference_where_the_factors_are_close(form, device):
    student, _ = pair((9, 700), device=device, seed=6)
    check(student, 3 * student * (1 + 1e-4 * logits(student.shape, torch.float32, device, seed=8)), **form)


@each_device
@each_form
def test_gradcheck(form, device):
    leaves = [x.requires_grad_() for x in pair((4, 3, 2), torch.float64, device, seed=10)]
    assert torch.autograd.gradcheck(lambda s, t: factor_loss(s, t, **form), leaves)


@each_device
@pytest.mark.parametrize("requires_grad", [(False, False), (True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("strides", ["rows", "columns", "channels_last"])
def test_opcheck(strides, requires_grad, device):
    student, teacher = pair((6, 8, 2, 3), device=device, seed=12)
    if strides == "columns":
        student = student.transpose(0, 1).contiguous().transpose(0, 1)
    if strides == "channels_last":
        student, teacher = (x.contiguous(memory_format=torch.channels_last) for x in (student, teacher))
    leaves = [x.detach().requires_grad_(wants) for x, wants in zip((student, teacher), requires_grad, strict=True)]
    torch.library.opcheck(torch.ops.pykd.factor_loss.default, (*leaves, 1, False))


@each_device
def test_opcheck_of_its_other_forms(device):
    student, teacher = pair((6, 8), device=device, seed=14)
    torch.library.opcheck(torch.ops.pykd.factor_loss_and_grad.default, (student, teacher, 2, True))
    for wants in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            torch.ops.pykd.factor_loss_backward.default,
            (torch.ones((), device=device), student, teacher, 2, False, *wants),
        )


# ---- edges -----------------------------------------------------------------------------------------------------------


@each_device
@pytest.mark.parametrize("scales", [(1e-30, 1e30), (1e30, 1e-30), (1e-30, 1), (1e36, 1e36), (1e-36, 1e-36)], ids=str)
@each_form
def test_extreme_scales_change_nothing(form, scales, device):
    student, teacher = pair((5, 200), device=device, seed=16)
    check(scales[0] * student, scales[1] * teacher, **form)


@each_device
@each_form
def test_extreme_scales_change_nothing_in_float64(form, device):
    student, teacher = pair((5, 200), torch.float64, device, seed=48)
    check(1e120 * student, 1e-120 * teacher, **form)


@each_device
@pytest.mark.parametrize("scale", [1e-22, 1e-20, 1e-17])
@each_form
def test_extreme_scales_keep_close_factors_apart(form, scale, device):
    """Squares of float32 lose digits before they vanish."""
    student, _ = pair((5, 200), device=device, seed=50)
    check(scale * student, scale * student * (1 + 1e-4 * logits((5, 200), torch.float32, device, seed=51)), **form)


@each_device
@each_form
def test_extreme_entries_at_the_beginning_of_a_long_row(form, device):
    factors = pair((2, 2500), device=device, seed=52)
    for factor in factors:
        factor[:, :1000] *= 1e30
    check(*factors, **form)


@each_device
@each_form
def test_extreme_powers_of_two_change_no_bit(form, device):
    student, teacher = pair((5, 200), device=device, seed=18)
    loss, (of_student, of_teacher) = factor_loss_and_grad(student, teacher, **form)
    for power in (-60, 60):
        scaled, grads = factor_loss_and_grad(student * 2.0**power, teacher * 2.0**-power, **form)
        assert scaled.equal(loss)
        assert grads[0].equal(of_student * 2.0**-power) and grads[1].equal(of_teacher * 2.0**power)


@each_device
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("which", ["student", "teacher"])
@each_form
def test_extreme_values_make_their_row_nan(form, which, bad, device):
    student, teacher = pair((4, 100), device=device, seed=20)
    (student if which == "student" else teacher)[2, 77] = bad
    loss, grads = factor_loss_and_grad(student, teacher, **form)
    assert loss.isnan()
    for grad in grads:
        assert grad[2].isnan().all() and grad[[0, 1, 3]].isfinite().all()


@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_extreme_numbers_of_a_dtype(dtype, device):
    """Its largest and smallest numbers, subnormal ones among them."""
    limits = torch.finfo(dtype)
    for value in (limits.max, limits.tiny, limits.smallest_normal / 4):
        student = torch.tensor([[value, -value, 0, value]], dtype=dtype, device=device)
        teacher = torch.tensor([[1, 1, 1, -1]], dtype=dtype, device=device)
        expected = reference.factor_loss(student.double(), teacher.double())
        assert_matches(factor_loss(student, teacher), expected)


@each_device
@each_form
def test_zero_factors_have_no_gradient(form, device):
    student, teacher = pair((4, 33), device=device, seed=22)
    student[0], teacher[1], student[2], teacher[2] = 0, 0, 0, 0
    check(student, teacher, **form)
    _, (of_student, of_teacher) = factor_loss_and_grad(student, teacher, **form)
    assert not of_student[[0, 2]].any() and not of_teacher[[1, 2]].any()
    assert of_student[3].all() and of_teacher[3].all()


@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_form
def test_zero_factors_have_no_gradient_for_any_weight(form, dtype, device):
    student, teacher = (1e-3 * x for x in pair((3, 33), dtype, device, seed=54))
    student[0], teacher[1] = 0, 0
    leaves = [x.requires_grad_() for x in (student, teacher)]
    (1e6 * factor_loss(*leaves, **form)).backward()
    assert not student.grad[0].any() and not teacher.grad[1].any()
    assert student.grad.isfinite().all() and teacher.grad.isfinite().all()


@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@each_form
def test_extreme_equal_factors_cost_nothing(form, dtype, device):
    """Of a dtype's smallest number, whose gradient would overflow but for the difference of 0."""
    limits = torch.finfo(dtype)
    student = torch.full((1, 3), limits.smallest_normal * limits.eps, dtype=dtype, device=device)
    loss, grads = factor_loss_and_grad(student, student.clone(), **form)
    assert student.all() and loss == 0 and not any(grad.any() for grad in grads)


@each_device
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equal_factors_cost_nothing(shape, dtype, device):
    student, _ = pair(shape, dtype, device, seed=24)
    for form in FORMS.values():
        for scale in (1.0, 2.0**-100, 2.0**100) if dtype in (torch.float32, torch.bfloat16) else (1.0,):
            loss, grads = factor_loss_and_grad(student * scale, student.clone(), **form)
            assert loss == 0 and not any(grad.any() for grad in grads)


@each_device
@each_form
def test_no_rows(form, device):
    student, teacher = (torch.empty(0, 5, 2, device=device, requires_grad=True) for _ in range(2))
    loss = factor_loss(student, teacher, **form)
    assert loss == 0 and loss.shape == ()
    loss.backward()
    assert student.grad.shape == teacher.grad.shape == (0, 5, 2)


# ---- facts of the maths ----------------------------------------------------------------------------------------------


@each_device
def test_golden_values(device):
    student = torch.tensor([[3.0, 4.0], [1.0, 0.0]], device=device)
    teacher = torch.tensor([[0.0, 2.0], [0.0, -5.0]], device=device)
    # d = (0.6, -0.2) and (1, 1)
    for form, value in (
        ({}, 2.8 / 4),
        ({"p": 2}, 2.4 / 4),
        ({"reduction": "row"}, 2.8 / 2),
        ({"p": 2, "reduction": "row"}, (0.4**0.5 + 2**0.5) / 2),
    ):
        assert_matches(factor_loss(student, teacher, **form), torch.tensor(value, device=device), magnitude=1)


@each_device
@each_form
def test_symmetric_in_both(form, device):
    student, teacher = pair((9, 515), torch.float64, device, seed=26)
    loss, (of_student, of_teacher) = factor_loss_and_grad(student, teacher, **form)
    swapped, (first, second) = factor_loss_and_grad(teacher, student, **form)
    assert_matches(swapped, loss, length=515, magnitude=1)
    _, sizes = magnitudes(student, teacher, **form)
    assert_matches(second, of_student, length=515, magnitude=sizes[0])
    assert_matches(first, of_teacher, length=515, magnitude=sizes[1])


@each_device
@each_form
def test_gradient_does_not_lengthen_its_factor(form, device):
    student, teacher = pair((9, 515), torch.float64, device, seed=28)
    _, grads = factor_loss_and_grad(student, teacher, **form)
    _, sizes = magnitudes(student, teacher, **form)
    for factor, grad, size in zip((student, teacher), grads, sizes, strict=True):
        along = (factor * grad).sum(1)
        assert_matches(along, torch.zeros_like(along), length=515, magnitude=(factor.abs() * size).sum(1))


@each_device
@pytest.mark.parametrize("wants", [(True, False), (False, True)], ids=["student", "teacher"])
def test_gradient_for_whichever_requires_it(wants, device):
    leaves = pair((5, 40), device=device, seed=30)
    grads = factor_loss_and_grad(*leaves)[1]
    for leaf, want in zip(leaves, wants, strict=True):
        leaf.requires_grad_(want)
    factor_loss(*leaves).backward()
    for leaf, want, grad in zip(leaves, wants, grads, strict=True):
        assert leaf.grad.equal(grad) if want else leaf.grad is None


@each_form
def test_threads_do_not_change_bits(form):
    threads = torch.get_num_threads()
    for shape in ((515, 333), (5, 16385)):
        results = []
        try:
            for count in (1, 2, 3, 7):
                torch.set_num_threads(count)
                loss, grads = factor_loss_and_grad(*pair(shape, seed=32), **form)
                results.append(torch.cat([loss.view(1), *(grad.flatten() for grad in grads)]))
        finally:
            torch.set_num_threads(threads)
        assert all(result.equal(results[0]) for result in results)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_instruction_sets_agree(isa):
    """The levels below this processor's own; a process each, since the choice is made once."""
    code = (
        "import torch; from pykd import _C; from pykd.ops import factor_loss_and_grad; "
        "from pykd.testing import logits; s, t = (logits((70, 131), torch.float32, 'cpu', seed=i) for i in (33, 34)); "
        "loss, grads = factor_loss_and_grad(s, t, p=2, reduction='row'); "
        "print(_C.isa(), loss.item(), *(grad.double().norm().item() for grad in grads))"
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
    assert_matches(values, expected, length=131)


def test_autocast_reads_halves_as_they_are():
    student, teacher = pair((8, 10), torch.bfloat16, seed=36)
    expected = factor_loss(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        loss = factor_loss(student, teacher)
    assert loss.dtype == torch.float32 and loss.equal(expected)


# ---- rules -----------------------------------------------------------------------------------------------------------

ONE = torch.zeros(2, 3)
RULES = [
    (
        torch.zeros(3),
        torch.zeros(3),
        {},
        r"factor_loss: student must be \[rows, ...\] with two dimensions or more",
    ),
    (torch.zeros(2, 0), torch.zeros(2, 0), {}, r"student must have at least one entry a row, got \[2, 0\]"),
    (torch.zeros(2, 3, 0, 1), torch.zeros(2, 3, 0, 1), {}, r"student must have at least one entry a row, got"),
    (ONE, torch.zeros(2, 4), {}, r"teacher must have the shape of student \[2, 3\], got \[2, 4\]"),
    (ONE.long(), ONE.long(), {}, r"student must be float32, float64, float16 or bfloat16, got Long"),
    (ONE, ONE.int(), {}, r"teacher must be float32, float64, float16 or bfloat16, got Int"),
    (ONE.double(), ONE, {}, r"student and teacher must both be float64 or neither, got Double and Float"),
    (ONE, ONE, {"p": 3}, r"p must be 1 or 2, got 3"),
    (ONE, ONE, {"reduction": "sum"}, r"reduction must be one of mean, row, got 'sum'"),
]


@pytest.mark.parametrize("student, teacher, options, message", RULES)
def test_broken_rules_say_which(student, teacher, options, message):
    for op in (factor_loss, factor_loss_and_grad):
        with pytest.raises((ValueError, TypeError), match=message):
            op(student, teacher, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"student": [1.0]}, r"student must be a Tensor, got list"),
        ({"teacher": None}, r"teacher must be a Tensor, got NoneType"),
        ({"p": 1.5}, r"p must be an int of 64 bits, got 1.5"),
        ({"p": True}, r"p must be 1 or 2, got True"),
        ({"p": torch.tensor(1)}, r"p must be 1 or 2, got tensor\(1\)"),
        ({"reduction": []}, r"reduction must be one of mean, row, got \[\]"),
    ],
)
def test_wrong_types_say_which(options, message):
    for op in (factor_loss, factor_loss_and_grad):
        with pytest.raises((ValueError, TypeError), match=f"^{op.__name__}: {message}$"):
            op(**{"student": ONE, "teacher": ONE} | options)


@pytest.mark.parametrize("student, teacher, options, message", RULES[:8])
def test_meta_kernel_says_the_same(student, teacher, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        factor_loss(student.to("meta"), teacher.to("meta"), **options)


def test_meta_kernel_gives_the_shapes():
    student, teacher = (torch.empty(6, 5, 2, device="meta", dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    loss, grads = factor_loss_and_grad(student, teacher)
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    assert [(grad.shape, grad.dtype) for grad in grads] == [((6, 5, 2), x.dtype) for x in (student, teacher)]


@each_device
def test_second_derivative_raises(device):
    student, teacher = (x.requires_grad_() for x in pair((2, 3), torch.float64, device, seed=38))
    for leaf in (student, teacher):
        (grad,) = torch.autograd.grad(factor_loss(student, teacher), leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivative"):
            torch.autograd.grad(grad.sum(), leaf)


# ---- compilers -------------------------------------------------------------------------------------------------------


@each_device
@pytest.mark.parametrize("wants", [(True, False), (True, True)], ids=["student", "both"])
def test_compiles(wants, device):
    def loss(student, teacher):
        return 3 * factor_loss(student * 2, teacher + 1, p=2, reduction="row")

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for rows in (4, 7):
        factors = pair((rows, 5, 3), device=device, seed=40)
        leaves = [x.requires_grad_() for x, want in zip(factors, wants, strict=True) if want]
        expected = torch.autograd.grad(loss(*factors), leaves)
        for grad, wanted in zip(torch.autograd.grad(compiled(*factors), leaves), expected, strict=True):
            assert_matches(grad, wanted)


def test_compiles_and_grad():
    factors = pair((16, 5), seed=42)
    loss, grads = factor_loss_and_grad(*factors)
    found, found_grads = torch.compile(factor_loss_and_grad, fullgraph=True)(*factors)
    assert found.equal(loss) and all(one.equal(other) for one, other in zip(found_grads, grads, strict=True))


def test_exports():
    class Loss(torch.nn.Module):
        def forward(self, student, teacher):
            return factor_loss(student, teacher)

    program = torch.export.export(Loss(), pair((6, 5), seed=44))
    other = pair((6, 5), seed=46)
    assert program.module()(*other).equal(Loss()(*other))
