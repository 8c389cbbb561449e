"""noisy_logits against its reference: values, gradients, noise, strides, edges, rules.

Not here: the CUDA kernel's own code (its C++ test, under emulation) and what only a card shows (the tests marked gpu).
"""

import os
import subprocess
import sys

import pytest
import torch

import pykd.reference as reference
from pykd.ops import noisy_logits
from pykd.testing import DEVICES, FLOATS, NOISES, assert_matches, logits, tolerance

INF, NAN = float("inf"), float("nan")
SHAPES = [(1, 1), (3, 2), (63, 7), (64, 8), (65, 9), (128, 10), (130, 100), (7, 1000), (3, 1023), (2, 1024), (5, 1025),
          (3, 2049), (2, 5000)]  # fmt: skip
NOISY = [name for name in NOISES if name != "clean"]


def seed_on(device, value=-123456789012345):
    return torch.tensor(value, device=device)


def check(x, **options):
    """Value and gradient against the float64 reference."""
    options = {"seed": seed_on(x.device)} | options
    leaf = x.detach().clone().requires_grad_()
    wide = x.detach().double().requires_grad_()
    noisy, expected = noisy_logits(leaf, **options), reference.noisy_logits(wide, **options)
    assert noisy.dtype == x.dtype and noisy.is_contiguous()
    finite = expected.isfinite()
    # z + z xi, xi up to 5.5 standard deviations. Half types are computed in float32 and rounded once, at the end.
    size = (1 + x.detach().double().masked_fill(~finite, 0).abs()) * (1 + 5.5 * options["sigma"])
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    size = size * (tolerance(compute) / tolerance(x.dtype))
    assert_matches(noisy[finite], expected[finite], magnitude=size[finite])
    assert noisy[~finite].equal(expected[~finite].to(x.dtype)), "-inf stays -inf"
    weight = logits(x.shape, torch.float64, x.device.type, seed=99).to(x.dtype)
    (grad,) = torch.autograd.grad(noisy, leaf, weight)
    (expected_grad,) = torch.autograd.grad(expected, wide, weight.double())
    assert grad.dtype == x.dtype
    size = (weight.double().abs() * (1 + 5.5 * options["sigma"])) * (tolerance(compute) / tolerance(x.dtype))
    assert_matches(grad[finite], expected_grad[finite], magnitude=size[finite])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, noise, dtype, device):
    check(logits(shape, dtype, device, seed=0), **NOISES[noise])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("strides", ["columns", "sliced", "expanded", "offset"])
def test_matches_reference_for_any_strides(strides, noise, device):
    views = {
        "columns": lambda x: x.t().contiguous().t(),
        "sliced": lambda x: x[::2, 1::3],
        "expanded": lambda x: x[:1].expand(12, 18),
        "offset": lambda x: x.flatten()[1:-17].reshape(11, 18),
    }
    x = views[strides](logits((12, 18), torch.float32, device, seed=1))
    options = NOISES[noise] | {"seed": seed_on(device)}
    assert noisy_logits(x, **options).equal(noisy_logits(x.contiguous(), **options))
    check(x, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("noise", NOISES)
def test_gradcheck(noise, device):
    x = logits((4, 6), torch.float64, device, seed=2).requires_grad_()
    options = NOISES[noise] | {"seed": seed_on(device)}
    assert torch.autograd.gradcheck(lambda x: noisy_logits(x, **options), (x,))
    assert torch.autograd.gradgradcheck(lambda x: noisy_logits(x, **options).square(), (x,))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("strides", ["rows", "columns", "sliced"])
def test_opcheck(strides, additive, requires_grad, device):
    x = logits((6, 16), torch.float32, device, seed=3)
    x = {"rows": x, "columns": x.t().contiguous().t(), "sliced": x[:, ::2]}[strides].requires_grad_(requires_grad)
    arguments = (x, seed_on(device), 0.5, 0.6, False, additive, 3)
    torch.library.opcheck(torch.ops.pykd.noisy_logits.default, arguments)
    if not requires_grad:
        out = torch.zeros_like(x, memory_format=torch.contiguous_format)
        torch.library.opcheck(torch.ops.pykd.noisy_logits.out, (*arguments, out))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("extreme", [1e4, -1e30, 1e-30])
def test_extreme_logits(extreme, noise, device):
    x = logits((3, 40), torch.float32, device, seed=4)
    x[:, 7] = extreme
    check(x, **NOISES[noise])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("noise", NOISES)
def test_extreme_masked_classes_stay_masked(noise, dtype, device):
    """At 5.5 times sigma some 1 + xi are negative, which would make +inf of -inf."""
    x = logits((20, 2100), dtype, device, seed=5)
    x[:, 3], x[1, 1024:2048], x[2] = -INF, -INF, -INF
    check(x, **NOISES[noise] | {"sigma": 2.0})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("noise", NOISES)
def test_extreme_values_show_in_their_place(noise, device):
    x = logits((20, 40), torch.float32, device, seed=6)
    options = NOISES[noise] | {"seed": seed_on(device)}
    clean = noisy_logits(x, **options)
    x[3, 5], x[4, 39] = NAN, INF
    noisy = noisy_logits(x, **options)
    assert (~noisy.isfinite()).nonzero().tolist() == [[3, 5], [4, 39]]
    assert noisy[4, 39] != -INF, "no class masks itself"
    finite = noisy.isfinite()
    assert noisy[finite].equal(clean[finite])


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows(device):
    x = torch.empty(0, 5, device=device, requires_grad=True)
    noisy = noisy_logits(x, sigma=0.5)
    assert noisy.shape == (0, 5)
    noisy.sum().backward()
    assert x.grad.shape == (0, 5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("off", [{"sigma": 0.0, "alpha": 0.8}, {"sigma": 0.5, "alpha": 0.0}], ids=["sigma", "alpha"])
def test_no_noise_is_the_logits_bit_for_bit(off, dtype, device):
    x = logits((70, 33), dtype, device, seed=7).requires_grad_()
    for shape, kind in (("logit", "multiplicative"), ("sample", "additive")):
        noisy = noisy_logits(x, noise_shape=shape, noise_kind=kind, **off)
        assert noisy.equal(x) and noisy.data_ptr() != x.data_ptr()
        (grad,) = torch.autograd.grad(noisy, x, x.detach())
        assert grad.equal(x)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("noise", NOISY)
def test_unselected_rows_are_the_logits_bit_for_bit(noise, device):
    x = logits((300, 20), torch.float32, device, seed=8)
    options = NOISES[noise] | {"alpha": 0.3, "seed": seed_on(device)}
    noisy = noisy_logits(x, **options)
    where = {"seed": seed_on(device), "row_offset": options.get("row_offset", 0)}
    selected = reference.philox.selected(300, 0.3, **where)
    assert 0 < selected.sum() < 300
    assert noisy[~selected].equal(x[~selected])
    assert (noisy[selected] != x[selected]).any(1).all()


@pytest.mark.parametrize("device", DEVICES)
def test_one_value_a_sample_is_one_factor_a_row(device):
    x = logits((50, 20), torch.float64, device, seed=9)
    options = {"sigma": 0.3, "noise_shape": "sample", "seed": seed_on(device)}
    factor = noisy_logits(x, **options) / x
    assert_matches(factor, factor[:, :1].expand_as(factor))
    shift = noisy_logits(x, noise_kind="additive", **options) - x
    assert_matches(shift, (factor[:, :1] - 1).expand_as(shift), magnitude=float(x.abs().max()))


def test_mean_and_spread_over_many_rows():
    """z' - z has mean 0 and variance alpha sigma^2 z^2 (multiplicative) or alpha sigma^2 (additive)."""
    draws, sigma, alpha = 4000, 0.5, 0.8
    x = logits((1, 12), torch.float64, "cpu", seed=10).expand(draws, -1)
    for kind, size in (("multiplicative", x[0].abs()), ("additive", torch.ones(12, dtype=torch.float64))):
        noise = noisy_logits(x, sigma=sigma, alpha=alpha, noise_kind=kind, seed=torch.tensor(5)) - x
        assert (noise.mean(0).abs() / (size * sigma * (alpha / draws) ** 0.5)).max() < 4.5  # standard errors
        spread = noise.square().mean(0) / (alpha * sigma**2 * size.square())
        # The variance of s^2 xi^2 relative to its mean squared is 3 / alpha - 1.
        assert (spread - 1).abs().max() < 4.5 * ((3 / alpha - 1) / draws) ** 0.5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("noise", NOISY)
def test_seed_decides(noise, device):
    x = logits((100, 30), torch.float32, device, seed=11)

    def draw(seed):
        return noisy_logits(x, **{"seed": seed_on(device, seed)} | NOISES[noise])

    assert draw(1).equal(draw(1)) and not draw(1).equal(draw(2))
    assert not draw(1 + 2**40).equal(draw(1)), "the seed's high half counts"


@pytest.mark.parametrize("device", DEVICES)
def test_seed_comes_from_torchs_generator(device):
    x = logits((50, 10), torch.float32, device, seed=12)
    torch.manual_seed(3)
    first, second = noisy_logits(x, sigma=0.5), noisy_logits(x, sigma=0.5)
    torch.manual_seed(3)
    assert noisy_logits(x, sigma=0.5).equal(first) and not first.equal(second)
    torch.manual_seed(3)
    assert noisy_logits(x, sigma=0.5, out=torch.empty_like(x)).equal(first)
    generator = torch.Generator(device).manual_seed(4)
    third = noisy_logits(x, sigma=0.5, generator=generator)
    assert noisy_logits(x, sigma=0.5, generator=generator.manual_seed(4)).equal(third)
    state = torch.get_rng_state()
    noisy_logits(x, sigma=0.5, seed=seed_on(device)), noisy_logits(x, sigma=0.5, generator=generator)
    noisy_logits(x, sigma=0.0)
    assert torch.get_rng_state().equal(state), "a given seed, a generator or no noise leave torch's own alone"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("shape", [(128, 10), (130, 513), (2, 5000)], ids=str)
def test_a_slice_with_row_offset_draws_what_it_has_in_the_whole(shape, noise, device):
    x = logits(shape, torch.float32, device, seed=13)
    options = {"row_offset": 0, "seed": seed_on(device)} | NOISES[noise]
    whole, half = noisy_logits(x, **options), shape[0] // 2
    assert noisy_logits(x[:half], **options).equal(whole[:half])
    options["row_offset"] += half
    assert noisy_logits(x[half:], **options).equal(whole[half:])


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("shape", [(515, 333), (30, 2100)], ids=str)
def test_threads_do_not_change_bits(shape, noise):
    x = logits(shape, torch.float32, "cpu", seed=14)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(noisy_logits(x, seed=torch.tensor(9), **NOISES[noise]))
    finally:
        torch.set_num_threads(threads)
    assert all(result.equal(results[0]) for result in results)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_instruction_sets_agree(isa):
    """The levels below this processor's own; a process each, since the choice is made once."""
    code = (
        "import torch; from pykd import _C; from pykd.ops import noisy_logits; from pykd.testing import logits; "
        "x = logits((70, 1131), torch.float32, 'cpu', seed=15); "
        "noisy = noisy_logits(x, sigma=0.5, alpha=0.5, seed=torch.tensor(9)).double(); "
        "print(_C.isa(), noisy.norm().item(), noisy[:, 7].sum().item(), noisy[:, 1130].sum().item())"
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
    assert_matches(values, expected, length=70, magnitude=30.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("shape", [(70, 131), (3, 1500)], ids=str)
def test_out_is_the_op_bit_for_bit(shape, noise, dtype, device):
    x = logits(shape, dtype, device, seed=16)
    options = NOISES[noise] | {"seed": seed_on(device)}
    noisy = noisy_logits(x, **options)
    buffer = torch.full_like(x, NAN)
    assert noisy_logits(x, out=buffer, **options) is buffer and buffer.equal(noisy)
    assert noisy_logits(x, out=x, **options) is x and x.equal(noisy)


def test_out_is_seen_by_autograd():
    """Overwriting a tensor that autograd saved must not go unnoticed."""
    x = torch.ones(2, 3, requires_grad=True)
    for guard in (torch.no_grad(), torch.inference_mode()):
        saved = x * 2
        loss = (saved * saved).sum()
        with guard:
            noisy_logits(torch.ones(2, 3), sigma=0.5, out=saved)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_autocast_reads_halves_as_they_are():
    x = logits((8, 10), torch.bfloat16, "cpu", seed=17)
    expected = noisy_logits(x, sigma=0.5, seed=torch.tensor(3))
    with torch.autocast("cpu", torch.bfloat16):
        noisy = noisy_logits(x, sigma=0.5, seed=torch.tensor(3))
    assert noisy.dtype == torch.bfloat16 and noisy.equal(expected)


ONE = torch.zeros(2, 3)
RULES = [
    (torch.zeros(3), {}, r"noisy_logits: logits must be \[rows, classes\], got \[3\]"),
    (torch.zeros(2, 0), {}, r"logits must have at least one class, got \[2, 0\]"),
    (ONE.long(), {}, r"logits must be float32, float64, float16 or bfloat16, got Long"),
    (ONE, {"sigma": -1.0}, r"sigma must be finite and >= 0, got -1"),
    (ONE, {"sigma": NAN}, r"sigma must be finite and >= 0, got nan"),
    (ONE, {"sigma": INF}, r"sigma must be finite and >= 0, got inf"),
    (ONE, {"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
    (ONE, {"alpha": NAN}, r"alpha must be in \[0, 1\], got nan"),
    (ONE, {"row_offset": -1}, r"row_offset must be in \[0, 2\^62\], got -1"),
    (ONE, {"seed": torch.tensor(1.0)}, r"seed must be int64, got Float"),
    (ONE, {"seed": torch.tensor([1, 2])}, r"seed must hold one value, got shape \[2\]"),
    (ONE, {"noise_shape": "row"}, r"noise_shape must be one of logit, sample, got 'row'"),
    (ONE, {"noise_kind": "add"}, r"noise_kind must be one of multiplicative, additive, got 'add'"),
    (ONE, {"out": torch.zeros(3, 3)}, r"out must have the shape of logits \[2, 3\], got \[3, 3\]"),
    (ONE, {"out": ONE.double()}, r"out must have the dtype and device of logits"),
    (ONE, {"out": torch.zeros(3, 2).t()}, r"out must be contiguous"),
    (ONE, {"out": torch.zeros(2, 3, requires_grad=True)}, r"out= has no gradient, pass logits and out detached"),
    (torch.zeros(2, 3, requires_grad=True), {"out": ONE}, r"out= has no gradient, pass logits and out detached"),
]


@pytest.mark.parametrize("x, options, message", RULES)
def test_broken_rules_say_which(x, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        noisy_logits(x, **{"sigma": 0.5} | options)


def test_out_that_shares_a_part_of_the_logits_is_refused():
    memory = torch.zeros(3, 3)
    with pytest.raises(ValueError, match="out must lie apart from logits or be it"):
        noisy_logits(memory[:2], sigma=0.5, out=memory[1:])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"logits": [1.0]}, r"logits must be a Tensor, got list"),
        ({"seed": 7}, r"seed must be a Tensor or None, got int"),
        ({"generator": 7}, r"generator must be a Generator or None, got int"),
        ({"sigma": "a"}, r"sigma must be a number, got str"),
        ({"alpha": None}, r"alpha must be a number, got NoneType"),
        ({"row_offset": 2**70}, r"row_offset must be an int of 64 bits, got 1180591620717411303424"),
        ({"out": [1.0]}, r"out must be a Tensor, got list"),
        ({"noise_shape": []}, r"noise_shape must be one of logit, sample, got \[\]"),
    ],
)
def test_wrong_types_say_which(options, message):
    with pytest.raises((ValueError, TypeError), match=f"^noisy_logits: {message}$"):
        noisy_logits(**{"logits": ONE, "sigma": 0.5} | options)


@pytest.mark.parametrize("x, options, message", RULES[:9])
def test_meta_kernel_says_the_same(x, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        noisy_logits(x.to("meta"), **{"sigma": 0.5} | options)


def test_meta_kernel_gives_the_shape():
    x = torch.empty(6, 5, device="meta", dtype=torch.bfloat16)
    noisy = noisy_logits(x, sigma=0.5)
    assert (noisy.shape, noisy.dtype, noisy.device) == (x.shape, x.dtype, x.device)


@pytest.mark.parametrize("device", DEVICES)
def test_second_derivative_is_that_of_an_affine_function(device):
    """d/dx sum(w * noisy(x)^2) = 2 w * noise(noisy(x)), whose derivative is 2 w (1 + xi)^2."""
    x = logits((5, 8), torch.float64, device, seed=18).requires_grad_()
    options = {"sigma": 0.5, "seed": seed_on(device)}
    factor = (noisy_logits(x, **options) / x).detach()
    (grad,) = torch.autograd.grad(noisy_logits(x, **options).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert_matches(second, 2 * factor.square())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("noise", ["logit", "additive"])
def test_compiles(noise, device):
    options = NOISES[noise] | {"seed": seed_on(device)}

    def loss(x):
        return noisy_logits(x * 2, **options).square().mean()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for rows in (4, 7):
        x = logits((rows, 5), torch.float32, device, seed=19).requires_grad_()
        (expected,), (grad,) = torch.autograd.grad(loss(x), x), torch.autograd.grad(compiled(x), x)
        assert_matches(grad, expected)


def test_compiles_with_a_seed_of_its_own():
    compiled = torch.compile(lambda x: noisy_logits(x, sigma=0.5), fullgraph=True)
    x = logits((16, 5), torch.float32, "cpu", seed=20)
    assert not compiled(x).equal(compiled(x)), "each call draws anew"
    generator = torch.Generator()
    refused = torch.compile(lambda x: noisy_logits(x, sigma=0.5, generator=generator), fullgraph=True)
    with pytest.raises(Exception, match=r"cannot trace generator="):
        refused(x)


def test_compiles_into_a_buffer():
    seed = torch.tensor(3)

    def step(x, out):
        return noisy_logits(x, sigma=0.5, seed=seed, out=out).sum()

    x = logits((16, 5), torch.float32, "cpu", seed=21)
    eager, compiled = torch.ones(16, 5), torch.ones(16, 5)
    assert_matches(torch.compile(step, fullgraph=True)(x, compiled), step(x, eager), magnitude=100.0)
    assert compiled.equal(eager)


def test_exports():
    class Noisy(torch.nn.Module):
        def forward(self, x, seed):
            return noisy_logits(x, sigma=0.5, seed=seed)

    x = logits((6, 5), torch.float32, "cpu", seed=22)
    program = torch.export.export(Noisy(), (x, torch.tensor(3)))
    assert program.module()(x, torch.tensor(4)).equal(Noisy()(x, torch.tensor(4)))
