"""variational_kl against its reference: values, gradients, lists, strides, limits, rules.

Not here: the CUDA kernel's own code (its C++ test, under emulation) and what only a card shows (the tests marked gpu).
"""

import os
import subprocess
import sys

import pytest
import torch

import pykd.reference as reference
from pykd.ops import variational_kl, variational_kl_and_grad
from pykd.testing import DEVICES, FLOATS, assert_matches, logits, tolerance

INF, NAN = float("inf"), float("nan")
SHAPES = [(1,), (7,), (300, 100), (5, 3, 3, 3), (1025,), (3, 16385)]


def layer(shape, dtype, device, seed):
    """Means of about 0.1 and log variances of about -4 +- 3: log alpha on both sides of 0."""
    theta = logits(shape, dtype, device, seed=seed, scale=0.1)
    return theta, logits(shape, dtype, device, seed=seed + 1) - 4


def sensitivity(theta, log_sigma2):
    """How far rounding log_alpha, the difference of two logarithms, moves a term or a derivative, relatively."""
    return 2 * theta.double().abs().log().abs() + log_sigma2.double().abs()


def check(thetas, log_sigmas):
    """Value and gradients, through autograd and in one pass, against the float64 reference."""
    leaves = [[x.detach().clone().requires_grad_() for x in each] for each in (thetas, log_sigmas)]
    wide = [[x.detach().double().requires_grad_() for x in each] for each in (thetas, log_sigmas)]
    kl, expected = variational_kl(*leaves), reference.variational_kl(*wide)
    assert kl.dtype == (torch.float64 if thetas[0].dtype == torch.float64 else torch.float32)
    size = max(
        (float(sensitivity(*pair).detach().max()) for pair in zip(*wide, strict=True) if len(pair[0])), default=0.0
    )
    size *= float(expected.detach())
    assert_matches(kl, expected, length=sum(x.numel() for x in thetas), magnitude=size)
    one_pass, one_pass_grads = variational_kl_and_grad(thetas, log_sigmas)
    assert one_pass.equal(kl)
    found = torch.autograd.grad(kl, leaves[0] + leaves[1])
    wanted = torch.autograd.grad(expected, wide[0] + wide[1])
    for i, (grad, expected_grad) in enumerate(zip(found, wanted, strict=True)):
        assert grad.dtype == thetas[0].dtype and grad.is_contiguous()
        pair = wide[0][i % len(thetas)].detach(), wide[1][i % len(thetas)].detach()
        size = expected_grad.abs() * sensitivity(*pair)
        if i < len(thetas):  # a derivative by log_sigma2 that is below the smallest normal number is 0
            size += torch.finfo(torch.float32).tiny / (pair[0].abs() * tolerance(torch.float32))
        assert_matches(grad, expected_grad, magnitude=size)
        assert grad.equal((one_pass_grads[0] + one_pass_grads[1])[i])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, device):
    theta, log_sigma2 = layer(shape, dtype, device, 0)
    check([theta], [log_sigma2])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matches_reference_for_lists(dtype, device):
    layers = [layer(shape, dtype, device, 2 * i) for i, shape in enumerate([*SHAPES, (0, 4), (2, 2)])]
    check([theta for theta, _ in layers], [log_sigma2 for _, log_sigma2 in layers])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("strides", ["columns", "sliced", "expanded", "offset", "channels_last"])
def test_matches_reference_for_any_strides(strides, device):
    views = {
        "columns": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "sliced": lambda x: x[::2, 1::3],
        "expanded": lambda x: x[:1].expand_as(x),
        "offset": lambda x: x.flatten()[1:-17],
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    }
    check(*([views[strides](x)] for x in layer((12, 6, 5, 3), torch.float32, device, 1)))


def test_golden_values():
    """The table of the approximation, and the integral it approximates, to their distance of 0.009."""
    log_alpha = torch.tensor([-8.0, -6, -4, -2, -1, 0, 1, 2, 3, 4, 6, 8], dtype=torch.float64)
    golden = [4.635899, 3.636446, 2.634208, 1.540533, 0.913872, 0.431239]
    golden += [0.177970, 0.068417, 0.025420, 0.009330, 0.001251, 0.000168]
    exact = [4.635014, 3.633937, 2.625755, 1.544155, 0.914531, 0.426686]
    exact += [0.173194, 0.066168, 0.024688, 0.009130, 0.001239, 0.000168]
    for dtype in (torch.float32, torch.float64):
        for theta in (1.0, -0.03):
            means = torch.full((12,), theta, dtype=dtype)
            log_sigma2 = (log_alpha + means.double().square().log()).to(dtype)
            kl = torch.stack([variational_kl(means[i : i + 1], log_sigma2[i : i + 1]) for i in range(12)])
            assert (kl - torch.tensor(golden)).abs().max() < 1e-5
            assert (kl - torch.tensor(exact)).abs().max() < 0.009


@pytest.mark.parametrize("device", DEVICES)
def test_gradcheck(device):
    theta, log_sigma2 = (x.requires_grad_() for x in layer((4, 5), torch.float64, device, 4))
    more = [x.requires_grad_() for x in layer((3,), torch.float64, device, 6)]
    assert torch.autograd.gradcheck(
        lambda a, b, c, d: variational_kl([a, b], [c, d]), (theta, more[0], log_sigma2, more[1])
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("strides", ["rows", "columns"])
def test_opcheck(strides, requires_grad, device):
    theta, log_sigma2 = layer((6, 8), torch.float32, device, 8)
    if strides == "columns":
        theta = theta.t().contiguous().t()
    theta, log_sigma2 = (x.detach().requires_grad_(requires_grad) for x in (theta, log_sigma2))
    other = [x.detach().requires_grad_(requires_grad) for x in layer((3,), torch.float32, device, 10)]
    torch.library.opcheck(torch.ops.pykd.variational_kl.default, ([theta, other[0]], [log_sigma2, other[1]]))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_of_its_other_forms(device):
    theta, log_sigma2 = ([x] for x in layer((6, 8), torch.float32, device, 8))
    torch.library.opcheck(
        torch.ops.pykd.variational_kl_backward.default, (torch.ones((), device=device), theta, log_sigma2)
    )
    torch.library.opcheck(torch.ops.pykd.variational_kl_and_grad.default, (theta, log_sigma2, 0.5))
    out = [torch.zeros_like(theta[0])], [torch.zeros_like(theta[0])]
    torch.library.opcheck(torch.ops.pykd.variational_kl_and_grad.out, (theta, log_sigma2, 0.5, True, *out))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_weights_stay_finite_and_right(dtype, device):
    theta = torch.tensor([2e-38, 1e-20, 1.0, 1e20, 1e38], dtype=dtype, device=device)
    log_sigma2 = torch.tensor([-100.0, -30.0, 0.0, 30.0, 100.0], dtype=dtype, device=device)
    for i in range(5):
        check([theta], [log_sigma2.roll(i)])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_limits(dtype, device):
    """No variance: infinite, with the gradient's limits. Infinite variance, or no mean: nothing."""

    def one(theta, log_sigma2):
        values = (torch.tensor([value], dtype=dtype, device=device) for value in (theta, log_sigma2))
        kl, (grad_theta, grad_log_sigma2) = variational_kl_and_grad(*values)
        return kl.item(), grad_theta.item(), grad_log_sigma2.item()

    assert one(0.5, -INF) == (INF, 2.0, -0.5)
    assert one(0.5, INF) == (0, 0, 0)
    for log_sigma2 in (-INF, -30.0, 0.0, 30.0, INF):
        assert one(0.0, log_sigma2) == (0, 0, 0)
        assert one(-0.0, log_sigma2) == (0, 0, 0)
    assert one(INF, -4.0)[0] == INF
    for smallest in (torch.finfo(dtype).tiny, torch.finfo(dtype).smallest_normal / 8):
        assert one(smallest, -4.0) == pytest.approx((0, 0, 0), abs=1e-30)


@pytest.mark.parametrize("device", DEVICES)
def test_extreme_values_stay_in_their_place(device):
    theta, log_sigma2 = layer((40,), torch.float32, device, 12)
    theta[3], log_sigma2[17] = NAN, NAN
    kl, grads = variational_kl_and_grad(theta, log_sigma2)
    assert kl.isnan()
    for grad in grads:
        assert grad.isnan().nonzero().flatten().tolist() == [3, 17]


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows(device):
    theta, log_sigma2 = (torch.empty(0, 5, device=device, requires_grad=True) for _ in range(2))
    kl = variational_kl(theta, log_sigma2)
    assert kl == 0 and kl.shape == ()
    kl.backward()
    assert theta.grad.shape == log_sigma2.grad.shape == (0, 5)
    assert variational_kl([], []) == 0
    assert variational_kl_and_grad([], []) == (torch.zeros(()), ([], []))


@pytest.mark.parametrize("device", DEVICES)
def test_list_is_the_sum_of_its_layers(device):
    layers = [layer(shape, torch.float64, device, 2 * i) for i, shape in enumerate(SHAPES)]
    total, grads = variational_kl_and_grad([a for a, _ in layers], [b for _, b in layers])
    apart = [variational_kl_and_grad(*pair) for pair in layers]
    assert_matches(total, sum(kl for kl, _ in apart), length=len(layers))
    for i, (_, (grad_theta, grad_log_sigma2)) in enumerate(apart):
        assert grads[0][i].equal(grad_theta) and grads[1][i].equal(grad_log_sigma2)


@pytest.mark.parametrize("device", DEVICES)
def test_falls_as_noise_grows(device):
    """The less certain a weight, the smaller its divergence; the sign of its mean does not matter."""
    theta = torch.full((200, 1), 0.3, dtype=torch.float64, device=device)
    log_sigma2 = torch.linspace(-12, 12, 200, dtype=torch.float64, device=device).unsqueeze(1)
    kl = torch.stack([variational_kl(a, b) for a, b in zip(theta, log_sigma2, strict=True)])
    assert (kl.diff() < 0).all() and (kl > 0).all()
    assert variational_kl(-theta, log_sigma2).equal(variational_kl(theta, log_sigma2))


def test_threads_do_not_change_bits():
    theta, log_sigma2 = layer((11, 16385), torch.float32, "cpu", 14)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            kl, grads = variational_kl_and_grad(theta, log_sigma2)
            results.append(torch.cat([kl.view(1), *(grad.flatten() for grad in grads)]))
    finally:
        torch.set_num_threads(threads)
    assert all(result.equal(results[0]) for result in results)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_instruction_sets_agree(isa):
    """The levels below this processor's own; a process each, since the choice is made once."""
    code = (
        "import torch; from pykd import _C; from pykd.ops import variational_kl_and_grad; "
        "from pykd.testing import logits; "
        "theta, log_sigma2 = (logits((70, 131), torch.float32, 'cpu', seed=i) for i in (0, 1)); "
        "kl, grads = variational_kl_and_grad(theta, log_sigma2 - 3); "
        "print(_C.isa(), kl.item(), *(grad.double().norm().item() for grad in grads))"
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
    assert_matches(values, expected, length=70 * 131)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("accumulate", [False, True])
def test_out_holds_the_scaled_gradients(accumulate, dtype, device):
    layers = [layer(shape, dtype, device, 2 * i) for i, shape in enumerate([(3, 5), (1100,)])]
    thetas, log_sigmas = [a for a, _ in layers], [b for _, b in layers]
    scaled, grads = variational_kl_and_grad(thetas, log_sigmas, scale=0.25)
    assert_matches(scaled, 0.25 * variational_kl(thetas, log_sigmas).double())
    out = [[torch.full_like(x, 0.5 if accumulate else NAN) for x in each] for each in (thetas, log_sigmas)]
    again, found = variational_kl_and_grad(thetas, log_sigmas, scale=0.25, out=(out[0], out[1]), accumulate=accumulate)
    assert again.equal(scaled)
    for buffers, one_pass, place in zip(found, grads, out, strict=True):
        for buffer, grad, given in zip(buffers, one_pass, place, strict=True):
            assert buffer is given
            if accumulate:
                assert_matches(buffer, grad.double() + 0.5, magnitude=grad.double().abs() + 0.5)
            else:
                assert buffer.equal(grad)


@pytest.mark.parametrize("device", DEVICES)
def test_out_may_be_the_weights(device):
    theta, log_sigma2 = layer((3, 700), torch.float32, device, 16)
    kl, grads = variational_kl_and_grad(theta, log_sigma2)
    again, found = variational_kl_and_grad(theta, log_sigma2, out=(theta, log_sigma2))
    assert again.equal(kl) and found[0] is theta
    assert theta.equal(grads[0]) and log_sigma2.equal(grads[1])


def test_out_is_seen_by_autograd():
    """Overwriting a tensor that autograd saved must not go unnoticed."""
    x = torch.ones(2, 3, requires_grad=True)
    for guard in (torch.no_grad(), torch.inference_mode()):
        saved = x * 2
        loss = (saved * saved).sum()
        with guard:
            variational_kl_and_grad(torch.ones(2, 3), torch.ones(2, 3), out=(saved, torch.ones(2, 3)))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


ONE = torch.ones(2, 3)
RULES = [
    ([ONE, ONE], [ONE], r"variational_kl: log_sigma2 must hold as many tensors as theta, 2, got 1"),
    ([], [ONE], r"variational_kl: theta must hold at least one tensor, got an empty list"),
    (ONE, torch.ones(3, 2), r"log_sigma2 must have the shape of theta \[2, 3\], got \[3, 2\]"),
    (ONE.long(), ONE, r"theta must be float32, float64, float16 or bfloat16, got Long"),
    (ONE, ONE.double(), r"all tensors must have the dtype and device of the first, Float on \w+, got Double on"),
    ([ONE, ONE.half()], [ONE, ONE.half()], r"dtype and device of the first, Float on \w+, got Half"),
]


@pytest.mark.parametrize("theta, log_sigma2, message", RULES)
def test_broken_rules_say_which(theta, log_sigma2, message):
    for op in (variational_kl, variational_kl_and_grad):
        with pytest.raises((ValueError, TypeError), match=message):
            op(theta, log_sigma2)


@pytest.mark.parametrize("theta, log_sigma2, message", RULES)
def test_meta_kernel_says_the_same(theta, log_sigma2, message):
    theta, log_sigma2 = (
        x.to("meta") if isinstance(x, torch.Tensor) else [y.to("meta") for y in x] for x in (theta, log_sigma2)
    )
    with pytest.raises((ValueError, TypeError), match=message):
        variational_kl(theta, log_sigma2)


@pytest.mark.parametrize(
    "out, message",
    [
        (([ONE, ONE], [ONE]), r"out must hold a buffer for each tensor of theta, 1, got 2"),
        ((torch.zeros(3, 3), ONE), r"out must have the shape of theta \[2, 3\], got \[3, 3\]"),
        ((ONE, ONE.double()), r"out must have the dtype and device of log_sigma2"),
        ((torch.zeros(3, 2).t(), ONE), r"out must be contiguous"),
        ((torch.zeros(2, 3, requires_grad=True), ONE), r"out must not require grad, pass it detached"),
        (ONE, r"out must be the buffers of theta and those of log_sigma2, got Tensor"),
        ((ONE, 7), r"out must be a Tensor or a list of Tensors, got int"),
        (None, r"accumulate=True needs buffers, pass them as out="),
    ],
)
def test_broken_rules_of_the_buffers_say_which(out, message):
    with pytest.raises((ValueError, TypeError), match=f"^variational_kl_and_grad: {message}"):
        variational_kl_and_grad(ONE, ONE, out=out, accumulate=True)


def test_out_that_shares_memory_is_refused():
    memory, a, b, c, d = (torch.ones(3, 3), *(torch.ones(2, 3) for _ in range(4)))
    for theta, log_sigma2, out in (
        (memory[:2], a, (memory[1:], b)),
        (a, memory[:2], (b, memory[1:])),
        ([a, b], [c, d], ([b, a], [c, d])),
        ([a, b], [c, d], ([torch.ones(2, 3), memory[:2]], [b, torch.ones(2, 3)])),
    ):
        with pytest.raises(ValueError, match="variational_kl_and_grad: out must lie apart from the weights, or each"):
            variational_kl_and_grad(theta, log_sigma2, out=out)
    with pytest.raises(ValueError, match="out must hold tensors apart from each other, got two that share memory"):
        variational_kl_and_grad(a, b, out=(memory[:2], memory[1:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_out_may_be_the_layers_own_weights_in_any_order(dtype):
    theta, log_sigma2 = torch.randn(7, 150, dtype=dtype), torch.randn(7, 150, dtype=dtype)
    kl, grads = variational_kl_and_grad(theta, log_sigma2)
    swapped = variational_kl_and_grad(theta, log_sigma2, out=(log_sigma2, theta))
    assert swapped[0].equal(kl) and log_sigma2.equal(grads[0]) and theta.equal(grads[1])


@pytest.mark.parametrize("wrong", [7, [1.0], None])
def test_wrong_types_say_which(wrong):
    for op in (variational_kl, variational_kl_and_grad):
        for given, argument in (((wrong, ONE), "theta"), ((ONE, wrong), "log_sigma2")):
            with pytest.raises(TypeError, match=f"^{op.__name__}: {argument} must be a Tensor or a list of Tensors"):
                op(*given)
    with pytest.raises(TypeError, match=r"^variational_kl_and_grad: scale must be a number, got str$"):
        variational_kl_and_grad(ONE, ONE, scale="a")


def test_meta_kernel_gives_the_shapes():
    theta = torch.empty(6, 5, device="meta", dtype=torch.bfloat16)
    kl, grads = variational_kl_and_grad([theta], [theta])
    assert (kl.shape, kl.dtype) == ((), torch.float32)
    assert all((grad[0].shape, grad[0].dtype) == ((6, 5), torch.bfloat16) for grad in grads)


@pytest.mark.parametrize("device", DEVICES)
def test_second_derivative_raises(device):
    theta, log_sigma2 = layer((2, 3), torch.float64, device, 18)
    (grad,) = torch.autograd.grad(variational_kl(theta.requires_grad_(), log_sigma2), theta, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(grad.sum(), theta)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles(device):
    def loss(theta, log_sigma2):
        return variational_kl([theta * 2, theta], [log_sigma2, log_sigma2 + 1]) * 0.5

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for rows in (4, 7):
        pair = [x.requires_grad_() for x in layer((rows, 5), torch.float64, device, 20)]
        for grad, expected in zip(
            torch.autograd.grad(compiled(*pair), pair), torch.autograd.grad(loss(*pair), pair), strict=True
        ):
            assert_matches(grad, expected)


def test_compiles_and_grad_into_buffers():
    def step(theta, log_sigma2, *out):
        kl, _ = variational_kl_and_grad(theta, log_sigma2, scale=0.1, out=out, accumulate=True)
        return kl

    pair = layer((16, 5), torch.float32, "cpu", 22)
    eager, compiled = ([torch.ones(16, 5), torch.ones(16, 5)] for _ in range(2))
    kl = step(*pair, *eager)
    assert torch.compile(step, fullgraph=True)(*pair, *compiled).equal(kl)
    assert all(a.equal(b) for a, b in zip(compiled, eager, strict=True))
