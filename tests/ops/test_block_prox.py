"""block_prox_ against its reference and against what it minimises: groups, norms, edges, rules.

Not here: the CUDA kernel's own code (its C++ test, under emulation) and what only a card shows (the tests marked gpu).
"""

import os
import subprocess
import sys

import pytest
import torch
from scipy.optimize import minimize

import pykd.reference as reference
from pykd.ops import block_norms, block_prox_
from pykd.reference.block_norm import by_group
from pykd.testing import DEVICES, FLOATS, assert_matches, logits, tolerance

INF, NAN = float("inf"), float("nan")
NORMS = ["l1_l2", "l1_linf"]
GROUPS = ["in", "out", "kernel", (1, 1), (2, 2), (4, 4), (3, 5), (1, 9), (16, 16), (8, 40), (1000, 1000)]
SHAPES = [(1, 1), (3, 2), (16, 16), (33, 65), (7, 1300), (1100, 6), (6, 5, 3, 3), (5, 70, 1, 1), (40, 3, 5, 5)]


def weight(shape, dtype=torch.float32, device="cpu", *, seed=0):
    return logits(shape, dtype, device, seed=seed)


def check(x, groups, norm, threshold):
    """Against the float64 reference; what is clipped off a group is subtracted from numbers of the group's size."""
    expected, found = x.detach().double().clone(), x.detach().clone()
    reference.block_prox_(expected, groups=groups, norm=norm, threshold=threshold)
    assert block_prox_(found, groups=groups, norm=norm, threshold=threshold) is None
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    length = by_group(x, groups).shape[-1] if x.numel() else 1
    rounding = tolerance(compute, length=length) / tolerance(x.dtype, length=length)  # half types round at the end
    size = x.double().abs() if norm == "l1_l2" else x.double().abs().amax()
    assert_matches(found, expected, length=length, magnitude=size * rounding)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_matches_reference(groups, norm, dtype, device):
    """Thresholds that touch a few entries, many, and nearly all."""
    for i, shape in enumerate(SHAPES):
        x = weight(shape, dtype, device, seed=i)
        norms = block_norms(x, groups=groups, norm="l1_l2")
        for share in (0.01, 0.7, 1.1):
            check(x, groups, norm, share * norms.mean().item())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("groups", ["in", "out", (4, 4)], ids=str)
def test_matches_reference_for_large_weights(groups, norm, device):
    """Several units of work a row of the grid, groups wider than a tile, rows a power of two apart."""
    for i, shape in enumerate([(700, 1024), (5, 9000), (3000, 70), (64, 16, 9, 9)]):
        check(weight(shape, device=device, seed=i), groups, norm, 2.5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("strides", ["columns", "sliced", "offset"])
def test_matches_reference_for_any_strides(strides, norm, device):
    views = {
        "columns": lambda x: x.t().contiguous().t(),
        "sliced": lambda x: x[::2, 1::3],
        "offset": lambda x: x.flatten()[1:-17].reshape(11, 18),
    }
    whole = weight((12, 18), device=device)
    kept, view = whole.clone(), views[strides](whole)
    expected = view.contiguous()
    block_prox_(expected, groups=(2, 5), norm=norm, threshold=1.0)
    block_prox_(view, groups=(2, 5), norm=norm, threshold=1.0)
    assert view.equal(expected)
    if strides == "sliced":
        assert whole[1::2].equal(kept[1::2]) and whole[:, ::3].equal(kept[:, ::3]), "the rest is left alone"


@pytest.mark.parametrize("norm", NORMS)
def test_is_the_minimiser_of_its_objective(norm):
    """min 1/2 |x - w|^2 + t |x|, by a solver that knows nothing of the closed form, with the norm as constraints."""
    x, t = weight((1, 6), torch.float64, seed=1), 1.7
    for scale in (1.0, 0.1):  # some left, and none
        w = (scale * x).numpy().ravel()

        def objective(variables, w=w):
            *near, bound = variables
            return 0.5 * sum((near - w) ** 2) + t * bound

        above = (
            [lambda v, s=s, i=i: v[-1] - s * v[i] for s in (1, -1) for i in range(6)]
            if norm == "l1_linf"
            else [lambda v: v[-1] ** 2 - sum(v[:-1] ** 2), lambda v: v[-1]]
        )
        start = [*(0.5 * w), 10.0]
        found = minimize(
            objective,
            start,
            constraints=[{"type": "ineq", "fun": each} for each in above],
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        near = scale * x.clone()
        block_prox_(near, groups="out", norm=norm, threshold=t)
        assert (near.ravel() - torch.tensor(found.x[:-1])).abs().max() < 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_threshold_of_zero_leaves_every_bit(norm, dtype, device):
    x = weight((24, 40), dtype, device, seed=2)
    x[0, 0], x[1, 1], x[2, 2], x[3, 3] = NAN, INF, -0.0, torch.finfo(dtype).smallest_normal
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()]
    before = x.view(bits).clone()
    block_prox_(x, groups=(4, 4), norm=norm, threshold=0.0)
    assert x.view(bits).equal(before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("groups", ["in", "out", (4, 4), (3, 5)], ids=str)
def test_small_groups_become_zero(groups, norm, device):
    """Where the dual norm of a group is at most the threshold: |w|_2, or the sum of |w|."""
    x = weight((24, 40), device=device, seed=3)
    x[:8], x[:, :8] = x[:8] * 0.01, x[:, :8] * 0.01
    entries = by_group(x, groups)
    dual = entries.norm(dim=-1) if norm == "l1_l2" else entries.abs().sum(-1)
    threshold = dual.median().item() * 1.001
    block_prox_(x, groups=groups, norm=norm, threshold=threshold)
    gone = by_group(x, groups).abs().amax(-1) == 0
    assert gone.equal(dual <= threshold) and gone.any() and not gone.all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("groups", ["in", "out", (4, 4), (16, 16)], ids=str)
def test_takes_the_threshold_off_each_group(groups, device):
    """l1_l2: off the group's norm; l1_linf: off the sum of its magnitudes, which are cut at one level."""
    x = weight((32, 48), torch.float64, device, seed=4)
    for norm in NORMS:
        near = x.clone()
        block_prox_(near, groups=groups, norm=norm, threshold=0.9)
        before, after = by_group(x, groups), by_group(near, groups)
        if norm == "l1_l2":
            assert_matches(before.norm(dim=-1) - after.norm(dim=-1), torch.full_like(before[..., 0], 0.9), magnitude=50)
            continue
        assert_matches((before.abs() - after.abs()).sum(-1), torch.full_like(before[..., 0], 0.9), magnitude=50)
        level = after.abs().amax(-1, keepdim=True)
        assert after.equal(before.clamp(-level, level))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("groups", ["in", "out", (2, 2), (4, 4), (3, 5), (16, 16)], ids=str)
def test_extreme_magnitudes(groups, norm, device):
    """Squares that overflow or vanish in float32, zeros, and thresholds as large and as small."""
    x = weight((24, 40), device=device, seed=5) / 16
    sizes = torch.tensor([1e30, 1e-30, 1.0, 0.0, 3e37, 1e-38, 1e18, 1e-19], device=device)
    for threshold in (1e-30, 1.0, 1e17, 1e30):
        for scaled in (x * sizes.repeat(5), x * sizes.repeat_interleave(5), x * sizes.repeat_interleave(3)[:, None]):
            check(scaled, groups, norm, threshold)
    for size in (1e-30, 1e18, 1e30):
        check(size * x, groups, norm, 0.3 * size)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("groups", ["in", "out", (4, 4), (16, 16)], ids=str)
def test_extreme_values_stay_in_their_group(groups, bad, norm, device):
    """A group with NaN is NaN; an infinite entry stays, beside entries that nothing is taken off."""
    x = weight((24, 40), device=device, seed=6)
    square = (slice(0, 16), slice(16, 32))
    own = {"in": (slice(None), 17), "out": (5,), (4, 4): (slice(4, 8), slice(16, 20)), (16, 16): square}
    mine = torch.zeros(24, 40, dtype=torch.bool, device=device)
    mine[own[groups]] = True
    clean = x.clone()
    block_prox_(clean, groups=groups, norm=norm, threshold=2.0)
    x[5, 17] = bad
    near = x.clone()
    block_prox_(near, groups=groups, norm=norm, threshold=2.0)
    assert near[~mine].equal(clean[~mine])
    assert near[mine].isnan().all() if bad != bad else near[mine].equal(x[mine])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_no_rows(groups, norm, device):
    for shape in ((0, 5), (5, 0), (0, 0), (0, 4, 3, 3), (4, 0, 3, 3)):
        empty, full = torch.empty(shape, device=device), weight((3, 4), device=device)
        expected = full.clone()
        block_prox_(expected, groups=groups, norm=norm, threshold=1.0)
        block_prox_([empty, full], groups=groups, norm=norm, threshold=1.0)
        assert full.equal(expected)
    block_prox_([], groups=groups, norm=norm, threshold=1.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("groups", ["in", "out", (4, 4), (3, 5)], ids=str)
def test_a_list_is_each_of_its_weights(groups, norm, device):
    weights = [weight(shape, device=device, seed=7) for shape in SHAPES]
    expected = [w.clone() for w in weights]
    for w in expected:
        block_prox_(w, groups=groups, norm=norm, threshold=0.8)
    block_prox_(weights, groups=groups, norm=norm, threshold=0.8)
    assert all(a.equal(b) for a, b in zip(weights, expected, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("groups", ["in", (4, 4)], ids=str)
def test_equal_entries_match_reference(groups, norm, device):
    """Weights of a handful of values: levels that meet entries exactly."""
    x = torch.randint(-2, 3, (24, 40), generator=torch.Generator().manual_seed(8)).float().to(device)
    for threshold in (0.25, 1.0, 2.0, 4.0, 16.0):
        check(x, groups, norm, threshold)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("groups", ["in", "out", (4, 4), (16, 16)], ids=str)
def test_threads_do_not_change_bits(groups, norm):
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append([weight(shape, seed=9) for shape in ((515, 333), (64, 32, 3, 3), (2, 3))])
            block_prox_(results[-1], groups=groups, norm=norm, threshold=1.0)
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(near.equal(first) for near, first in zip(result, results[0], strict=True))


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_instruction_sets_agree(isa):
    """The levels below this processor's own; a process each, since the choice is made once."""
    code = (
        "import torch; from pykd import _C; from pykd.ops import block_prox_ as op; from pykd.testing import logits\n"
        "print(_C.isa())\n"
        "for groups in ('in', 'out', (4, 4), (3, 9)):\n"
        "  for norm in ('l1_l2', 'l1_linf'):\n"
        "    x = logits((70, 1131), torch.float32, 'cpu', seed=10)\n"
        "    op(x, groups=groups, norm=norm, threshold=3.0)\n"
        "    print(x.double().norm().item(), x[:, 7].double().sum().item(), x[:, 1130].double().sum().item())\n"
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
    assert_matches(values, expected, length=1131, magnitude=10.0)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    for x in (weight((6, 8), device=device), weight((8, 6), device=device).t(), weight((6, 16), device=device)[:, ::2]):
        weights = [x, weight((3, 2, 3, 3), device=device)]
        torch.library.opcheck(torch.ops.pykd.block_prox_.default, (weights, 3, 2, 3, True, 0.5))


def test_gradcheck():
    """There is no gradient to check: weights that record one are refused, and nothing has changed then."""
    x = weight((4, 6), seed=11).requires_grad_()
    before = x.detach().clone()
    with pytest.raises(ValueError, match=r"block_prox_: it has no gradient, call it under torch.no_grad\(\)"):
        block_prox_(x, threshold=1.0)
    assert x.detach().equal(before)
    with torch.no_grad():
        block_prox_(x, threshold=1.0)
    assert x.requires_grad and not x.detach().equal(before)


def test_second_derivative_through_changed_weights_raises():
    """Autograd saved the weights that the step changes: it must not go unnoticed, in whatever mode."""
    for guard in (torch.no_grad(), torch.inference_mode()):
        x = weight((4, 6), seed=12).requires_grad_()
        loss = (x * x).sum()
        with guard:
            block_prox_(x, threshold=1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


ONE = torch.zeros(2, 3)
RULES = [
    (torch.zeros(3), {}, r"block_prox_: a weight must be \[out, in\] or \[out, in, height, width\], got \[3\]"),
    (ONE.long(), {}, r"weights must be float32, float64, float16 or bfloat16, got Long"),
    ([ONE, ONE.double()], {}, r"all weights must have the dtype and device of the first, Float on .*, got Double on"),
    (ONE, {"threshold": -1.0}, r"threshold must be finite and >= 0, got -1"),
    (ONE, {"threshold": NAN}, r"threshold must be finite and >= 0, got nan"),
    (ONE, {"threshold": INF}, r"threshold must be finite and >= 0, got inf"),
    (ONE, {"groups": (4, 0)}, r"groups must be in, out, kernel or \(rows, columns\) of ints >= 1, got \(4, 0\)"),
    (ONE, {"groups": "row"}, r"groups must be in, out, kernel or \(rows, columns\) of ints >= 1, got 'row'"),
    (ONE, {"norm": "l2"}, r"norm must be one of l1_l2, l1_linf, got 'l2'"),
    (ONE, {"threshold": "a"}, r"threshold must be a number, got str"),
    ([ONE, 1.0], {}, r"weights must be a Tensor or a list of them, got float"),
    (torch.zeros(1, 3).expand(2, 3), {}, r"a weight must have memory of its own for each value, got an expanded one"),
    ([ONE, ONE], {}, r"weights must hold tensors apart from each other, got two that share memory"),
    ([ONE.t(), ONE], {}, r"weights must hold tensors apart from each other, got two that share memory"),
    ([], {"norm": "l2"}, r"norm must be one of l1_l2, l1_linf, got 'l2'"),
    (ONE, {"groups": (2, "3")}, r"groups must be in, out, kernel or \(rows, columns\) of ints >= 1, got \(2, '3'\)"),
]


@pytest.mark.parametrize("weights, options, message", RULES)
def test_broken_rules_say_which(weights, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        block_prox_(weights, **{"threshold": 1.0} | options)


@pytest.mark.parametrize("weights, options, message", RULES[:9])
def test_meta_kernel_says_the_same(weights, options, message):
    weights = [w.to("meta") for w in weights] if isinstance(weights, list) else weights.to("meta")
    with pytest.raises((ValueError, TypeError), match=message):
        block_prox_(weights, **{"threshold": 1.0} | options)


@pytest.mark.parametrize("norm", NORMS)
def test_compiles(norm):
    def step(x, y):
        block_prox_([x, y], groups=(2, 3), norm=norm, threshold=1.0)
        return x * 2 + y.sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for rows in (4, 7):
        x, y = weight((rows, 5), seed=13), weight((3, 2, 3, 3), seed=14)
        eager = x.clone(), y.clone()
        assert_matches(compiled(x, y), step(*eager), magnitude=10.0)
        assert x.equal(eager[0]) and y.equal(eager[1])
