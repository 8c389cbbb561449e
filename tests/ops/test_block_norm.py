"""block_norm, block_norm_and_grad and block_norms against their reference: groups, norms, teachers, edges, rules.

Not here: the CUDA kernel's own code (its C++ test, under emulation) and what only a card shows (the tests marked gpu).
"""

import os
import subprocess
import sys

import pytest
import torch

import pykd.reference as reference
from pykd.ops import block_norm, block_norm_and_grad, block_norms
from pykd.reference.block_norm import by_group
from pykd.testing import DEVICES, FLOATS, assert_matches, logits

INF, NAN = float("inf"), float("nan")
NORMS = ["l1_l2", "l1_linf"]
GROUPS = ["in", "out", "kernel", (1, 1), (2, 2), (4, 4), (3, 5), (1, 9), (16, 16), (8, 40), (1000, 1000)]
SHAPES = [(1, 1), (3, 2), (16, 16), (33, 65), (7, 1300), (1100, 6), (6, 5, 3, 3), (5, 70, 1, 1), (40, 3, 5, 5)]


def weight(shape, dtype=torch.float32, device="cpu", *, seed=0):
    return logits(shape, dtype, device, seed=seed)


def longest(weights, groups):
    """Entries of the largest group."""
    return max((by_group(w, groups).shape[-1] for w in weights), default=1)


def check(weights, groups, norm, *, teachers=None, scale_by_size=False):
    """Value and gradient, through autograd and in one pass, against the float64 reference."""
    options = {"groups": groups, "norm": norm, "scale_by_size": scale_by_size}
    leaves = [w.detach().clone().requires_grad_() for w in weights]
    wide = [w.detach().double().requires_grad_() for w in weights]
    value = block_norm(leaves, teachers=teachers, **options)
    expected = reference.block_norm(wide, teachers=teachers and [t.double() for t in teachers], **options)
    length = max(longest(weights, groups), longest(teachers or [], groups))
    compute = torch.float64 if weights[0].dtype == torch.float64 else torch.float32
    assert value.dtype == compute and value.shape == ()
    assert_matches(value, expected, length=length)
    grads = torch.autograd.grad(value, leaves, torch.tensor(-1.5, dtype=compute, device=value.device))
    for w, grad, expected_grad in zip(weights, grads, torch.autograd.grad(expected, wide), strict=True):
        assert grad.dtype == w.dtype and grad.is_contiguous()
        assert_matches(grad, -1.5 * expected_grad, length=length)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_matches_reference(groups, norm, dtype, device):
    for i, shape in enumerate(SHAPES):
        check([weight(shape, dtype, device, seed=i)], groups, norm)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale_by_size", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_matches_reference_with_teachers_of_other_sizes(groups, norm, scale_by_size, device):
    """Groups that only one side has, on either side, in rows and in columns; many weights in one call."""
    pairs = [
        ((30, 27), (30, 27)),
        ((30, 27), (60, 45)),
        ((60, 45), (30, 27)),
        ((30, 45), (60, 27)),
        ((6, 5, 3, 3), (12, 7, 3, 3)),
        ((9, 4, 5, 5), (7, 6, 3, 3)),
        ((8, 12), (9, 4, 3, 3)),
        ((3, 1500), (2, 1100)),
    ]
    students = [weight(pair[0], device=device, seed=i) for i, pair in enumerate(pairs)]
    teachers = [1.3 * weight(pair[1], device=device, seed=20 + i) for i, pair in enumerate(pairs)]
    check(students, groups, norm, teachers=teachers, scale_by_size=scale_by_size)
    for student, teacher in zip(students, teachers, strict=True):
        check([student], groups, norm, teachers=[teacher], scale_by_size=scale_by_size)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_matches_reference_for_mixed_dtypes(dtype, teacher_dtype, norm, device):
    students = [weight((33, 40), dtype, device), weight((9, 3, 3, 3), dtype, device)]
    teachers = [weight((50, 40), teacher_dtype, device, seed=1), weight((9, 4, 5, 5), teacher_dtype, device, seed=1)]
    check(students, "in", norm, teachers=teachers)
    check(students, (4, 4), norm, teachers=teachers, scale_by_size=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("groups", ["in", "out", (4, 4)], ids=str)
def test_matches_reference_for_large_weights(groups, norm, device):
    """Several units of work a row of the grid, groups wider than a tile, rows a power of two apart."""
    for i, shape in enumerate([(700, 1024), (5, 9000), (3000, 70), (64, 16, 9, 9)]):
        check([weight(shape, device=device, seed=i)], groups, norm)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("strides", ["columns", "sliced", "expanded", "offset"])
def test_matches_reference_for_any_strides(strides, norm, device):
    views = {
        "columns": lambda x: x.t().contiguous().t(),
        "sliced": lambda x: x[::2, 1::3],
        "expanded": lambda x: x[:1].expand(12, 18),
        "offset": lambda x: x.flatten()[1:-17].reshape(11, 18),
    }
    x, teacher = weight((12, 18), device=device), weight((14, 20), device=device, seed=1)
    check([views[strides](x)], (2, 5), norm, teachers=[teacher.t().contiguous().t()])
    norms = block_norms(views[strides](x), groups=(2, 5), norm=norm)
    assert norms.equal(block_norms(views[strides](x).contiguous(), groups=(2, 5), norm=norm))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_norms_match_reference(groups, norm, dtype, device):
    for i, shape in enumerate(SHAPES):
        x = weight(shape, dtype, device, seed=i)
        norms = block_norms(x, groups=groups, norm=norm)
        named = {"in": (shape[1],), "out": (shape[0],), "kernel": shape[:2]}
        assert groups not in named or norms.shape == named[groups]
        assert norms.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_matches(norms, reference.block_norms(x.double(), groups=groups, norm=norm), length=longest([x], groups))
        assert_matches(block_norm(x, groups=groups, norm=norm), norms.double().sum())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("groups", ["in", "out", "kernel", (2, 3)], ids=str)
def test_gradcheck(groups, norm, device):
    students = [weight(shape, torch.float64, device, seed=3) for shape in ((4, 6), (3, 2, 2, 2))]
    teachers = [0.3 * weight(shape, torch.float64, device, seed=4) for shape in ((5, 4), (2, 3, 2, 2))]
    for others in (None, teachers):
        assert torch.autograd.gradcheck(
            lambda *weights, others=others: block_norm(
                weights, groups=groups, norm=norm, teachers=others, scale_by_size=others is not None
            ),
            [student.requires_grad_() for student in students],
        )


OPTIONS = (3, 2, 3, False, True)  # groups of 2 x 3, l1_l2, by size


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("strides", ["rows", "columns", "sliced"])
def test_opcheck(strides, requires_grad, device):
    x = weight((6, 8), device=device)
    x = {"rows": x, "columns": x.t().contiguous().t(), "sliced": x[:, ::2]}[strides].requires_grad_(requires_grad)
    teachers = [weight((4, 4), device=device), weight((6, 9), device=device)]
    students = [x, weight((3, 2, 3, 3), device=device)]
    torch.library.opcheck(torch.ops.pykd.block_norm.default, (students, teachers, *OPTIONS))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_of_its_other_forms(device):
    students, teachers = [weight((6, 8), device=device)], [weight((4, 4), device=device)]
    arguments = (students, teachers, *OPTIONS)
    torch.library.opcheck(torch.ops.pykd.block_norm_backward.default, (torch.ones((), device=device), *arguments))
    torch.library.opcheck(torch.ops.pykd.block_norm_and_grad.default, (*arguments, 0.5))
    out = [torch.zeros_like(student) for student in students]
    torch.library.opcheck(torch.ops.pykd.block_norm_and_grad.out, (*arguments, 0.5, True, out))
    torch.library.opcheck(torch.ops.pykd.block_norms.default, (students[0], 0, 0, 0, False))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("groups", ["in", "out", (4, 4), (3, 5)], ids=str)
def test_extreme_magnitudes(groups, norm, device):
    """Squares that overflow or vanish in float32; groups of zeros beside them have a gradient of zero."""
    x = weight((24, 40), device=device, seed=5)
    sizes = torch.tensor([1e30, 1e-30, 1.0, 0.0, 3e36, 1e-38, 1e18, 1e-19], device=device)
    check([(x / 16) * sizes.repeat(5)], groups, norm)
    check([(x / 16) * sizes.repeat_interleave(5)], groups, norm)
    check([(x / 16) * sizes.repeat_interleave(3)[:, None]], groups, norm)
    for student, teacher in ((1e30, 1e29), (1e-30, 1e-30), (1e-30, 1.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)):
        check([student * x], groups, norm, teachers=[teacher * weight((20, 48), device=device, seed=6)])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_extreme_magnitudes_of_every_dtype(dtype, device):
    info = torch.finfo(dtype)
    for size in (info.max / 64, info.smallest_normal):
        x = torch.full((4, 8), size, dtype=dtype, device=device)
        expected = reference.block_norms(x.double(), groups=(4, 4))
        assert_matches(block_norms(x, groups=(4, 4)).double() / size, expected / size, length=16)
        _, grad = block_norm_and_grad(x, groups=(4, 4))
        assert_matches(grad, torch.full((4, 8), 0.25, dtype=torch.float64, device=device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("groups", ["in", "out", (4, 4), (3, 5)], ids=str)
def test_extreme_values_show_in_their_group(groups, bad, norm, device):
    """In the value and in the gradient of their own group; all others keep every bit."""
    x = weight((24, 40), device=device, seed=7)
    _, clean = block_norm_and_grad(x, groups=groups, norm=norm)
    x[5, 17] = bad
    value, grad = block_norm_and_grad(x, groups=groups, norm=norm)
    assert value.isnan() if bad != bad else value == INF
    own = {
        "in": (slice(None), 17),
        "out": (5,),
        (4, 4): (slice(4, 8), slice(16, 20)),
        (3, 5): (slice(3, 6), slice(15, 20)),
    }
    mine = torch.zeros(24, 40, dtype=torch.bool, device=device)
    mine[own[groups]] = True
    assert grad[~mine].equal(clean[~mine])
    assert grad[mine].isnan().any() or (norm == "l1_linf" and grad[5, 17].abs() == 1 and grad[mine].abs().sum() == 1)
    norms = block_norms(x, groups=groups, norm=norm)
    assert (~norms.isfinite()).sum() == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_no_rows(groups, norm, device):
    for shape in ((0, 5), (5, 0), (0, 0), (0, 4, 3, 3), (4, 0, 3, 3)):
        empty = torch.empty(shape, device=device, requires_grad=True)
        full = weight((3, 4), device=device).requires_grad_()
        expected = block_norm(full.detach(), groups=groups, norm=norm)
        value = block_norm([empty, full], groups=groups, norm=norm)
        assert value.equal(expected)
        value.backward()
        assert empty.grad.shape == shape and full.grad.any()
        assert block_norm(empty, groups=groups, norm=norm) == 0
        assert block_norm(empty, teachers=full, groups=groups, norm=norm).equal(expected), "the teacher stands alone"
        assert block_norm(full, teachers=empty, groups=groups, norm=norm).equal(expected)
        norms = block_norms(empty.detach(), groups=groups, norm=norm)
        assert not norms.any() and norms.shape == {"in": shape[1:2], "out": shape[:1]}.get(groups, norms.shape)


def test_no_weights():
    buffers = []
    (value, grads), (again, out) = block_norm_and_grad([]), block_norm_and_grad([], out=buffers, accumulate=True)
    assert grads == [] and out is buffers
    for nothing in (block_norm([]), block_norm([], teachers=[]), value, again):
        assert nothing == 0 and nothing.dtype == torch.float32


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_ties_share_the_gradient(dtype, device):
    x = torch.tensor([[2.0, -2.0, 1.0, 0.0], [2.0, 0.5, -1.0, 0.0]], dtype=dtype, device=device)
    _, grad = block_norm_and_grad(x, groups=(2, 2), norm="l1_linf")
    third = torch.tensor(1 / 3, dtype=dtype).item()
    expected = [[third, -third, 0.5, 0.0], [third, 0.0, -0.5, 0.0]]
    assert_matches(grad, torch.tensor(expected, dtype=torch.float64, device=device))
    buffer = torch.ones_like(x)
    block_norm_and_grad(x, groups=(2, 2), norm="l1_linf", out=buffer, accumulate=True)
    assert_matches(buffer, 1.0 + torch.tensor(expected, dtype=torch.float64, device=device))
    block_norm_and_grad(x, groups=(2, 2), norm="l1_linf", out=x)
    assert x.equal(grad)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("groups", ["in", "out", (4, 4), (3, 5)], ids=str)
def test_ties_of_few_values_match_reference(groups, device):
    """Weights of a handful of values: nearly every group has ties, and some are zero."""
    generator = torch.Generator().manual_seed(8)
    for shape in ((24, 40), (40, 2000)):
        x = torch.randint(-2, 3, shape, generator=generator).float().to(device)
        teacher = torch.randint(-2, 3, shape, generator=generator).float().to(device)
        check([x], groups, "l1_linf")
        check([x], groups, "l1_linf", teachers=[teacher], scale_by_size=True)


@pytest.mark.parametrize("device", DEVICES)
def test_a_teacher_as_strong_takes_the_gradient(device):
    """l1_linf: the student's groups below the teacher's are left alone; l1_l2: the stronger, the less they shrink."""
    x = weight((8, 12), device=device, seed=9)
    _, grad = block_norm_and_grad(x, norm="l1_linf", teachers=x.clone())
    assert not grad.any()
    _, alone = block_norm_and_grad(x)
    _, weak = block_norm_and_grad(x, teachers=0.5 * x)
    _, strong = block_norm_and_grad(x, teachers=3 * x)
    assert_matches(weak, alone.double() / 1.25**0.5)
    assert_matches(strong, alone.double() / 10**0.5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", NORMS)
def test_groups_are_the_same_under_other_names(norm, device):
    x = weight((6, 5, 3, 3), device=device, seed=10)
    for name, blocks in (("in", (6, 9)), ("out", (1, 45)), ("kernel", (1, 9))):
        value, grad = block_norm_and_grad(x, groups=name, norm=norm)
        same, same_grad = block_norm_and_grad(x.flatten(1), groups=blocks, norm=norm)
        assert value.equal(same) and grad.flatten(1).equal(same_grad)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("groups", ["in", "out", (4, 4), (16, 16)], ids=str)
def test_threads_do_not_change_bits(groups, norm):
    students = [weight(shape, seed=11) for shape in ((515, 333), (64, 32, 3, 3), (2, 3))]
    teachers = [weight(shape, seed=12) for shape in ((600, 400), (70, 30, 3, 3), (2, 3))]
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(block_norm_and_grad(students, groups=groups, norm=norm, teachers=teachers))
    finally:
        torch.set_num_threads(threads)
    for value, grads in results[1:]:
        assert value.equal(results[0][0])
        assert all(grad.equal(first) for grad, first in zip(grads, results[0][1], strict=True))


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_instruction_sets_agree(isa):
    """The levels below this processor's own; a process each, since the choice is made once."""
    code = (
        "import torch; from pykd import _C; from pykd.ops import block_norm_and_grad as op; "
        "from pykd.testing import logits; x = logits((70, 1131), torch.float32, 'cpu', seed=13); "
        "results = [op(x, groups=g, norm=n) for g in ('in', 'out', (4, 4), (3, 9)) for n in ('l1_l2', 'l1_linf')]; "
        "print(_C.isa(), *(f(r) for r in results for f in "
        "(lambda r: r[0].item(), lambda r: r[1].double().norm().item(), lambda r: r[1][:, 7].double().sum().item())))"
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
    assert_matches(values, expected, length=1131, magnitude=1.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("groups", ["in", "out", (4, 4), (3, 5)], ids=str)
def test_and_grad_is_the_op_and_its_gradient_bit_for_bit(groups, norm, dtype, device):
    students = [weight(shape, dtype, device, seed=14) for shape in ((30, 45), (6, 5, 3, 3))]
    teachers = [weight(shape, dtype, device, seed=15) for shape in ((40, 40), (9, 9, 3, 3))]
    options = {"groups": groups, "norm": norm, "teachers": teachers, "scale_by_size": True}
    leaves = [student.clone().requires_grad_() for student in students]
    value = block_norm(leaves, **options)
    value.backward()
    one_value, one_grads = block_norm_and_grad(students, **options)
    assert one_value.equal(value.detach()) and not one_value.requires_grad
    assert all(grad.equal(leaf.grad) for grad, leaf in zip(one_grads, leaves, strict=True))
    buffers = [torch.full_like(student, NAN) for student in students]
    out_value, out = block_norm_and_grad(students, out=buffers, **options)
    assert out is buffers and out_value.equal(one_value)
    assert all(buffer.equal(grad) for buffer, grad in zip(buffers, one_grads, strict=True))
    for buffer in buffers:
        buffer.fill_(2.0)
    scaled, _ = block_norm_and_grad(students, out=buffers, accumulate=True, scale=-0.25, **options)
    assert_matches(scaled, -0.25 * one_value.double())
    for buffer, grad in zip(buffers, one_grads, strict=True):
        assert_matches(buffer, 2.0 - 0.25 * grad.double(), magnitude=2.0)
    in_place = [student.clone() for student in students]
    block_norm_and_grad(in_place, out=in_place, **options)
    assert all(buffer.equal(grad) for buffer, grad in zip(in_place, one_grads, strict=True))
    stepped = [student.clone() for student in students]
    block_norm_and_grad(stepped, out=stepped, accumulate=True, scale=-0.25, **options)
    for buffer, student, grad in zip(stepped, students, one_grads, strict=True):
        assert_matches(buffer, student.double() - 0.25 * grad.double(), magnitude=3.0)
    one, grad = block_norm_and_grad(students[0], groups=groups, norm=norm)
    assert isinstance(grad, torch.Tensor) and one.equal(block_norm([students[0]], groups=groups, norm=norm))


def test_out_is_seen_by_autograd():
    """Overwriting a tensor that autograd saved must not go unnoticed."""
    x = torch.ones(2, 3, requires_grad=True)
    for guard in (torch.no_grad(), torch.inference_mode()):
        saved = x * 2
        loss = (saved * saved).sum()
        with guard:
            block_norm_and_grad(torch.ones(2, 3), out=saved)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("device", DEVICES)
def test_teachers_get_no_gradient(device):
    student, teacher = (weight((4, 5), device=device, seed=i).requires_grad_() for i in (16, 17))
    block_norm(student, teachers=teacher).backward()
    assert student.grad is not None and teacher.grad is None


def test_only_some_weights_require_grad():
    x, frozen = weight((4, 5), seed=18).requires_grad_(), weight((3, 3), seed=19)
    block_norm([frozen, x]).backward()
    assert_matches(x.grad, reference.block_norm_and_grad(x.detach())[1])


def test_autocast_reads_halves_as_they_are():
    x = weight((8, 10), torch.bfloat16, seed=20)
    expected = block_norm(x)
    with torch.autocast("cpu", torch.bfloat16):
        value = block_norm(x)
    assert value.dtype == torch.float32 and value.equal(expected)


ONE = torch.zeros(2, 3)
RULES = [
    (torch.zeros(3), {}, r"block_norm: a weight must be \[out, in\] or \[out, in, height, width\], got \[3\]"),
    ([ONE, torch.zeros(2, 3, 4)], {}, r"a weight must be \[out, in\] or \[out, in, height, width\], got \[2, 3, 4\]"),
    (ONE.long(), {}, r"weights must be float32, float64, float16 or bfloat16, got Long"),
    ([ONE, ONE.double()], {}, r"all weights must have the dtype and device of the first, Float on .*, got Double on"),
    (ONE, {"teachers": [ONE, ONE]}, r"teachers must hold a weight for each of weights, 1, got 2"),
    (ONE, {"teachers": torch.zeros(3)}, r"a weight must be \[out, in\] or \[out, in, height, width\], got \[3\]"),
    (ONE, {"teachers": ONE.double()}, r"weights and teachers must both be float64 or neither, got Float and Double"),
    (ONE, {"groups": (0, 4)}, r"groups must be in, out, kernel or \(rows, columns\) of ints >= 1, got \(0, 4\)"),
    (ONE, {"groups": (4, 2**70)}, r"groups must be in, out, kernel or \(rows, columns\) of ints >= 1, got \(4, 1180"),
    (ONE, {"groups": "row"}, r"groups must be in, out, kernel or \(rows, columns\) of ints >= 1, got 'row'"),
    (ONE, {"groups": (4,)}, r"groups must be in, out, kernel or \(rows, columns\) of ints >= 1, got \(4,\)"),
    (ONE, {"groups": 4}, r"groups must be in, out, kernel or \(rows, columns\) of ints >= 1, got 4"),
    (ONE, {"groups": (2.0, 2)}, r"groups must be in, out, kernel or \(rows, columns\) of ints >= 1, got \(2.0, 2\)"),
    (ONE, {"norm": "l2"}, r"norm must be one of l1_l2, l1_linf, got 'l2'"),
    (ONE, {"norm": None}, r"norm must be one of l1_l2, l1_linf, got None"),
    ([], {"groups": "row"}, r"groups must be in, out, kernel or \(rows, columns\) of ints >= 1, got 'row'"),
    ([], {"teachers": ONE}, r"block_norm: weights must hold at least one weight, got an empty list"),
    ([ONE, 1.0], {}, r"weights must be a Tensor or a list of them, got float"),
    (1.0, {}, r"weights must be a Tensor or a list of them, got float"),
    (ONE, {"teachers": "abc"}, r"teachers must be a Tensor or a list of them, got str"),
    (ONE, {"scale_by_size": "yes"}, r"scale_by_size must be a bool, got str"),
]


@pytest.mark.parametrize("weights, options, message", RULES)
def test_broken_rules_say_which(weights, options, message):
    for op in (block_norm, block_norm_and_grad):
        with pytest.raises((ValueError, TypeError), match=message):
            op(weights, **options)


@pytest.mark.parametrize(
    "x, options, message",
    [
        (torch.zeros(3), {}, r"block_norms: a weight must be \[out, in\] or \[out, in, height, width\], got \[3\]"),
        (ONE.long(), {}, r"block_norms: weights must be float32, float64, float16 or bfloat16, got Long"),
        ([ONE], {}, r"block_norms: weight must be a Tensor, got list"),
        (ONE, {"groups": "row"}, r"block_norms: groups must be in, out, kernel or"),
        (ONE, {"norm": "l2"}, r"block_norms: norm must be one of l1_l2, l1_linf, got 'l2'"),
    ],
)
def test_broken_rules_of_the_norms_say_which(x, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        block_norms(x, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"out": torch.zeros(3, 3)}, r"out must have the shape of the weight \[2, 3\], got \[3, 3\]"),
        ({"out": ONE.double()}, r"out must have the dtype and device of the weight"),
        ({"out": torch.zeros(3, 2).t()}, r"out must be contiguous"),
        ({"out": torch.zeros(2, 3, requires_grad=True)}, r"out must not require grad, pass it detached"),
        ({"out": [ONE, ONE]}, r"out must hold a buffer for each weight, 1, got 2"),
        ({"out": 1.0}, r"out must be a Tensor or a list of them, got float"),
        ({"out": []}, r"out must hold a buffer for each weight, 1, got 0"),
        ({"out": ONE, "accumulate": "yes"}, r"accumulate must be a bool, got str"),
        ({"accumulate": True}, r"accumulate=True needs a buffer, pass it as out="),
        ({"scale": "a"}, r"scale must be a number, got str"),
    ],
)
def test_broken_rules_of_the_buffer_say_which(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        block_norm_and_grad(ONE, **options)


def test_out_that_shares_memory_is_refused():
    memory, a, b = torch.zeros(3, 3), torch.zeros(2, 3), torch.zeros(2, 3)
    for weights, out in ((memory[:2], memory[1:]), ([a, b], [b, a]), ([memory[:2], a], [b, memory[1:]])):
        with pytest.raises(
            ValueError, match="block_norm_and_grad: out must lie apart from the weights, or each be its"
        ):
            block_norm_and_grad(weights, out=out)
    for teacher in (memory[:2], memory[1:].view(3, 2)):
        with pytest.raises(ValueError, match="block_norm_and_grad: out must lie apart from teachers, got memory of"):
            block_norm_and_grad([a], teachers=[teacher], out=[memory[1:]])
    with pytest.raises(ValueError, match="out must hold tensors apart from each other, got two that share memory"):
        block_norm_and_grad([a, b], out=[memory[:2], memory[1:]])
    block_norm_and_grad([a, memory.t()[:2]], teachers=[memory.t(), b], out=[a, memory[:2]])  # copied before


def test_broken_rules_of_the_backward_say_which():
    arguments = ([ONE], [], 0, 0, 0, False, False)
    with pytest.raises(
        ValueError, match=r"block_norm_backward: grad_value must have the shape of the value, got \[1\]"
    ):
        torch.ops.pykd.block_norm_backward(torch.ones(1), *arguments)
    with pytest.raises(TypeError, match="block_norm_backward: grad_value must be Float on cpu, got Double on cpu"):
        torch.ops.pykd.block_norm_backward(torch.ones((), dtype=torch.float64), *arguments)


@pytest.mark.parametrize("weights, options, message", RULES[:14])
def test_meta_kernel_says_the_same(weights, options, message):
    weights = [w.to("meta") for w in weights] if isinstance(weights, list) else weights.to("meta")
    if "teachers" in options:
        others = options["teachers"]
        others = [t.to("meta") for t in others] if isinstance(others, list) else others.to("meta")
        options = options | {"teachers": others}
    with pytest.raises((ValueError, TypeError), match=message):
        block_norm(weights, **options)


def test_meta_kernel_gives_the_shapes():
    x = torch.empty(6, 5, 3, 3, device="meta", dtype=torch.bfloat16)
    value, grad = block_norm_and_grad(x)
    assert (value.shape, value.dtype) == ((), torch.float32)
    assert (grad.shape, grad.dtype) == (x.shape, torch.bfloat16)
    shapes = {"in": (5,), "out": (6,), "kernel": (6, 5), (4, 4): (2, 12)}
    assert {groups: tuple(block_norms(x, groups=groups).shape) for groups in shapes} == shapes


@pytest.mark.parametrize("device", DEVICES)
def test_second_derivative_raises(device):
    x = weight((2, 3), torch.float64, device, seed=21).requires_grad_()
    (grad,) = torch.autograd.grad(block_norm(x), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(grad.sum(), x)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", NORMS)
def test_compiles(norm, device):
    def loss(x, y, teacher):
        return block_norm([x * 2, y], groups=(2, 3), norm=norm, teachers=[teacher, y.detach()]) + (
            block_norms(y, norm=norm).sum()
        )

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for rows in (4, 7):
        x, y, teacher = (weight((rows, 5), device=device, seed=i).requires_grad_(i < 24) for i in (22, 23, 24))
        expected, found = loss(x, y, teacher), compiled(x, y, teacher)
        assert_matches(found, expected)
        grads = [torch.autograd.grad(value, x)[0] for value in (found, expected)]
        assert_matches(*grads)


def test_compiles_and_grad_into_buffers():
    def step(x, y, out):
        value, _ = block_norm_and_grad([x, y], groups="out", scale=0.5, out=out, accumulate=True)
        again, grad = block_norm_and_grad(x)
        return value + again, grad

    x, y = weight((6, 5), seed=25), weight((3, 2, 3, 3), seed=26)
    eager, compiled = ([torch.ones_like(x), torch.ones_like(y)] for _ in range(2))
    expected = step(x, y, eager)
    found = torch.compile(step, fullgraph=True)(x, y, compiled)
    assert_matches(found[0], expected[0])
    assert found[1].equal(expected[1])
    assert all(a.equal(b) for a, b in zip(eager, compiled, strict=True))


def test_compiles_on_no_weights():
    compiled = torch.compile(lambda: (block_norm([]), block_norm_and_grad([])), fullgraph=True)
    assert compiled() == (0, (0, []))


def test_exports():
    class Norms(torch.nn.Module):
        def forward(self, x):
            return block_norm([x, x * 2], groups=(2, 2)), block_norms(x, groups="out")

    x = weight((6, 5), seed=27)
    program = torch.export.export(Norms(), (x,))
    assert all(a.equal(b) for a, b in zip(program.module()(x), Norms()(x), strict=True))


@pytest.mark.parametrize("groups", ["in", "out", (2, 2)])
@pytest.mark.parametrize("size", [1e-40, 3e-39])
def test_gradients_of_vanishing_groups_stay_finite(size, groups):
    x = torch.full((4, 4), size)
    for options in ({"scale": 4.0}, {"scale": -4.0}, {"scale_by_size": True}):
        _, grad = block_norm_and_grad(x, groups=groups, **options)
        assert grad.isfinite().all() and grad.abs().max() <= 4


@pytest.mark.parametrize("groups, columns", [("out", 128), ((1, 32), 32), ((1, 16), 64)])
def test_value_of_large_weights_stays_finite(groups, columns):
    x = torch.zeros(1, columns)
    x[0, 0] = 3e38
    assert block_norm(x, groups=groups, norm="l1_linf").item() == pytest.approx(3e38, rel=1e-6)
