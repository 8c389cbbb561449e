"""variational_linear and variational_conv2d against their references: values, gradients, noise, strides, edges, rules.

Not here: the CUDA kernel's own code (its C++ test, under emulation) and what only a card shows (the tests marked gpu).
"""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import pykd.reference as reference
from pykd.ops import variational_conv2d, variational_linear
from pykd.testing import DEVICES, FLOATS, assert_matches, logits

INF, NAN = float("inf"), float("nan")
# input, theta, options
LINEAR = {
    "one": ((1, 1), (1, 1), {}),
    "small": ((5, 7), (3, 7), {}),
    "rows": ((130, 33), (17, 33), {"row_offset": 2**33 + 5}),
    "wide": ((3, 20), (2100, 20), {}),
    "vector": ((9,), (4, 9), {}),
    "sequence": ((2, 3, 4, 11), (6, 11), {"row_offset": 3}),
}
CONV = {
    "one": ((1, 1, 1, 1), (1, 1, 1, 1), {}),
    "padded": ((3, 4, 7, 6), (5, 4, 3, 3), {"padding": 1}),
    "strided": ((2, 3, 9, 8), (4, 3, 3, 2), {"stride": (2, 1), "padding": (1, 0)}),
    "dilated": ((2, 3, 9, 9), (4, 3, 3, 3), {"dilation": (1, 2), "row_offset": 7}),
    "grouped": ((2, 6, 5, 5), (4, 3, 3, 3), {"groups": 2}),
    "depthwise": ((2, 6, 5, 5), (6, 1, 3, 3), {"groups": 6, "padding": 1}),
    "large": ((2, 3, 40, 40), (2, 3, 3, 3), {"padding": 1}),
}
CASES = [pytest.param("linear", case, id=f"linear-{name}") for name, case in LINEAR.items()]
CASES += [pytest.param("conv2d", case, id=f"conv2d-{name}") for name, case in CONV.items()]
SOME = [pytest.param("linear", LINEAR["sequence"], id="linear"), pytest.param("conv2d", CONV["strided"], id="conv2d")]
OPS = {"linear": variational_linear, "conv2d": variational_conv2d}
REFERENCES = {"linear": reference.variational_linear, "conv2d": reference.variational_conv2d}
PRODUCTS = {"linear": F.linear, "conv2d": F.conv2d}


@pytest.fixture(autouse=True)
def exact_convolutions():
    """Float32 convolutions of cuDNN would use TF32."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


def seed_on(device, value=-123456789012345):
    return torch.tensor(value, device=device)


def tensors_of(case, dtype, device, *, weights=None, log_sigma2=-4.0):
    """Input, theta, log_sigma2 and bias, whose noise is about as large as its mean."""
    x, theta, _ = case
    return [
        logits(x, dtype, device, seed=0, scale=1.0),
        logits(theta, weights or dtype, device, seed=1, scale=0.2),
        logits(theta, weights or dtype, device, seed=2, scale=2.0) + log_sigma2,
        logits(theta[:1], weights or dtype, device, seed=3, scale=1.0),
    ]


def check(kind, tensors, options):
    """The sample and all gradients against the float64 reference."""
    device = tensors[0].device.type
    options = {"seed": seed_on(device)} | options
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    if not all(x.is_contiguous() for x in tensors):  # a clone is dense: differentiate through the view itself
        leaves = [x.detach().requires_grad_() for x in tensors]
    wide = [x.detach().double().requires_grad_() for x in tensors]
    sample, expected = OPS[kind](*leaves, **options), REFERENCES[kind](*wide, **options)
    assert sample.dtype == tensors[0].dtype and sample.is_contiguous()
    length = max(expected[0].numel(), tensors[1][0].numel(), len(tensors[0]))
    assert_matches(sample, expected, length=length, magnitude=float(expected.detach().abs().max()))
    weight = logits(sample.shape, sample.dtype, device, seed=4, scale=1.0)
    found = torch.autograd.grad(sample, leaves, weight)
    for grad, given, wanted in zip(found, leaves, torch.autograd.grad(expected, wide, weight.double()), strict=True):
        assert (grad.dtype, grad.shape) == (given.dtype, given.shape)
        half = tensors[0].dtype if tensors[0].dtype in (torch.float16, torch.bfloat16) else grad.dtype
        assert_matches(grad.to(half), wanted, length=128, magnitude=float(wanted.abs().max()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind, case", CASES)
def test_matches_reference(kind, case, dtype, device):
    check(kind, tensors_of(case, dtype, device), case[2])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind, case", SOME)
def test_matches_reference_for_float32_weights_beside_half_inputs(kind, case, dtype, device):
    check(kind, tensors_of(case, dtype, device, weights=torch.float32), case[2])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind, case", SOME)
def test_matches_reference_without_bias(kind, case, device):
    check(kind, tensors_of(case, torch.float32, device)[:3], case[2])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("strides", ["turned", "sliced", "expanded", "channels_last"])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_matches_reference_for_any_strides(kind, strides, device):
    views = {
        "turned": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
        "sliced": lambda x: x.repeat_interleave(2, -1)[..., ::2],
        "expanded": lambda x: x[:1].expand_as(x),
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x,
    }
    case = LINEAR["rows"] if kind == "linear" else CONV["padded"]
    check(kind, [views[strides](x) for x in tensors_of(case, torch.float32, device)], case[2])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("asked", range(1, 16))
@pytest.mark.parametrize("kind, case", SOME)
def test_matches_reference_for_the_gradients_asked_for(kind, case, asked, device):
    """Each of the fifteen choices gives what it gives among all."""
    options = {"seed": seed_on(device)} | case[2]

    def grads(chosen):
        tensors = tensors_of(case, torch.float32, device)
        leaves = [x.requires_grad_() for x, wanted in zip(tensors, chosen, strict=True) if wanted]
        return iter(torch.autograd.grad(OPS[kind](*tensors, **options).square().sum(), leaves))

    chosen = [bool(asked >> i & 1) for i in range(4)]
    found = grads(chosen)
    for grad, wanted in zip(grads([True] * 4), chosen, strict=True):
        if wanted:
            assert_matches(next(found), grad, length=128, magnitude=float(grad.abs().max()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind, case", SOME)
def test_gradcheck(kind, case, device):
    tensors = [x.requires_grad_() for x in tensors_of(case, torch.float64, device)]
    options = {"seed": seed_on(device)} | case[2]
    assert torch.autograd.gradcheck(lambda *given: OPS[kind](*given, **options), tensors, fast_mode=True)


def schema_arguments(kind, device, *, requires_grad=False, bias=True):
    tensors = [x.requires_grad_(requires_grad) for x in tensors_of(SOME_CASE[kind], torch.float32, device)]
    if not bias:
        tensors[3] = None
    shape = () if kind == "linear" else ([2, 1], [1, 0], [1, 1], 1)
    return (*tensors, *shape, seed_on(device), 3)


SOME_CASE = {"linear": LINEAR["sequence"], "conv2d": CONV["strided"]}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_opcheck(kind, requires_grad, bias, device):
    op = getattr(torch.ops.pykd, f"variational_{kind}").default
    torch.library.opcheck(op, schema_arguments(kind, device, requires_grad=requires_grad, bias=bias))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("needed", [[True] * 4, [False, True, False, True]])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_opcheck_of_its_backward(kind, needed, device):
    op = getattr(torch.ops.pykd, f"variational_{kind}").default
    x, theta, log_sigma2, bias, *rest = schema_arguments(kind, device)
    sample, deviation, sigma2 = op(x, theta, log_sigma2, bias, *rest)
    backward = getattr(torch.ops.pykd, f"variational_{kind}_backward").default
    arguments = (torch.ones_like(sample), x, theta, log_sigma2, sigma2, deviation, *rest, needed)
    torch.library.opcheck(backward, arguments)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind, case", SOME)
@pytest.mark.parametrize("log_sigma2", [-INF, -200.0, -30.0, 30.0])
def test_extreme_variances_stay_finite_and_right(log_sigma2, kind, case, device):
    tensors = tensors_of(case, torch.float32, device)
    tensors[2].fill_(log_sigma2)
    tensors[1].view(-1)[::2] = 0
    if log_sigma2 != -INF:
        check(kind, tensors, case[2])
    leaves = [x.requires_grad_() for x in tensors]
    sample = OPS[kind](*leaves, seed=seed_on(device), **case[2])
    grads = torch.autograd.grad(sample.sum(), leaves)
    assert sample.isfinite().all() and all(grad.isfinite().all() for grad in grads)
    if log_sigma2 < -100:  # the deviation is the root of 1e-8, and has no gradient
        options = {name: value for name, value in case[2].items() if name != "row_offset"}
        mean = PRODUCTS[kind](tensors[0], tensors[1], tensors[3], **options)
        assert (sample - mean).abs().max() < 6e-4 and not grads[2].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind, case", SOME)
def test_extreme_inputs(kind, case, device):
    """Up to 1e18 in float32 all is finite; a NaN stays in its row."""
    tensors = tensors_of(case, torch.float32, device)
    tensors[0] *= 1e17
    check(kind, tensors, case[2])
    tensors = tensors_of(case, torch.float32, device)
    tensors[0][1] = NAN
    sample = OPS[kind](*tensors, seed=seed_on(device), **case[2])
    assert sample[1].isnan().any() and sample[0].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "kind, x, theta",
    [("linear", (0, 5), (3, 5)), ("linear", (2, 0, 5), (3, 5)), ("conv2d", (0, 5, 4, 4), (3, 5, 3, 3))],
)
def test_no_rows(kind, x, theta, device):
    tensors = [x.requires_grad_() for x in tensors_of((x, theta, {}), torch.float32, device)]
    sample = OPS[kind](*tensors)
    assert sample.shape == ((*x[:-1], 3) if kind == "linear" else (0, 3, 2, 2))
    sample.sum().backward()
    assert tensors[0].grad.shape == x
    assert not any(tensor.grad.any() for tensor in tensors[1:])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind, case", CASES)
def test_noise_is_that_of_the_logits_of_a_row(kind, case, device):
    """What is left of a sample without its mean and deviation is the documented noise."""
    x, theta, log_sigma2, bias = tensors_of(case, torch.float64, device)
    shape = {name: value for name, value in case[2].items() if name != "row_offset"}
    row_offset = case[2].get("row_offset", 0)
    sample = OPS[kind](x, theta, log_sigma2, bias, seed=seed_on(device), **case[2])
    mean = PRODUCTS[kind](x, theta, bias, **shape)
    variance = PRODUCTS[kind](x * x, log_sigma2.exp(), None, **shape) + 1e-8
    rows = sample.reshape(-1, theta.shape[0]) if kind == "linear" else sample.flatten(1)
    noise = reference.philox.logit_normal(*rows.shape, seed=seed_on(device), row_offset=row_offset)
    assert_matches((sample - mean) / variance.sqrt(), noise.view(sample.shape), length=128, magnitude=10.0)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_mean_and_variance_are_those_of_drawn_weights(kind):
    """Local reparameterisation: an output is distributed as with weights drawn from N(theta, sigma^2)."""
    draws = 4000
    case = ((1, 6), (5, 6), {}) if kind == "linear" else ((1, 2, 4, 4), (3, 2, 3, 3), {"padding": 1})
    x, theta, log_sigma2, bias = tensors_of(case, torch.float64, "cpu", log_sigma2=-1.0)
    samples = OPS[kind](x.expand(draws, *x.shape[1:]), theta, log_sigma2, bias, seed=torch.tensor(5), **case[2])
    generator = torch.Generator().manual_seed(6)
    sigma = (log_sigma2 / 2).exp()
    drawn = torch.cat(
        [
            PRODUCTS[kind](
                x, theta + sigma * torch.randn(theta.shape, generator=generator, dtype=theta.dtype), bias, **case[2]
            )
            for _ in range(draws)
        ]
    )
    mean = PRODUCTS[kind](x, theta, bias, **case[2])[0]
    variance = PRODUCTS[kind](x * x, log_sigma2.exp(), None, **case[2])[0]
    for found in (samples, drawn):
        assert ((found.mean(0) - mean).abs() / (variance / draws).sqrt()).max() < 4.5  # standard errors
        assert ((found.var(0) / variance - 1).abs() / (2 / draws) ** 0.5).max() < 4.5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind, case", SOME)
def test_without_variance_it_is_the_plain_layer(kind, case, device):
    """Down to the root of the variance's floor of 1e-8, times six standard deviations."""
    x, theta, log_sigma2, bias = tensors_of(case, torch.float64, device)
    shape = {name: value for name, value in case[2].items() if name != "row_offset"}
    sample = OPS[kind](x, theta, torch.full_like(log_sigma2, -INF), bias, seed=seed_on(device), **case[2])
    assert (sample - PRODUCTS[kind](x, theta, bias, **shape)).abs().max() < 6e-4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind, case", SOME)
def test_seed_decides(kind, case, device):
    tensors = tensors_of(case, torch.float32, device)

    def draw(seed):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        sample = OPS[kind](*leaves, seed=seed_on(device, seed), **case[2])
        return sample, *torch.autograd.grad(sample.square().sum(), leaves)

    first, again, other, high = draw(1), draw(1), draw(2), draw(1 + 2**40)
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    assert not any(a.equal(b) for a, b in zip(first, other, strict=True))
    assert not first[0].equal(high[0]), "the seed's high half counts"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind, case", SOME)
def test_seed_comes_from_torchs_generator(kind, case, device):
    tensors = tensors_of(case, torch.float32, device)

    def draw(**options):
        return OPS[kind](*tensors, **options, **case[2])

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert draw().equal(first) and not first.equal(second)
    generator = torch.Generator(device).manual_seed(4)
    third = draw(generator=generator)
    assert draw(generator=generator.manual_seed(4)).equal(third)
    state = torch.get_rng_state()
    draw(seed=seed_on(device)), draw(generator=generator)
    assert torch.get_rng_state().equal(state), "a given seed or a generator leave torch's own alone"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_a_slice_with_row_offset_draws_what_it_has_in_the_whole(kind, device):
    case = LINEAR["rows"] if kind == "linear" else CONV["padded"]
    x, *weights = tensors_of(case, torch.float64, device)
    shape = {name: value for name, value in case[2].items() if name != "row_offset"}
    whole = OPS[kind](x, *weights, seed=seed_on(device), row_offset=4, **shape)
    rest = OPS[kind](x[2:], *weights, seed=seed_on(device), row_offset=6, **shape)
    assert_matches(rest, whole[2:], length=128, magnitude=10.0)


@pytest.mark.parametrize("kind, case", SOME)
def test_threads_do_not_change_the_noise(kind, case):
    """Bits of the products are the library's: the noise alone, on a layer whose products are exact."""
    x, theta, log_sigma2, _ = tensors_of(case, torch.float32, "cpu")
    x = torch.ones((300, *x.shape[1:]))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(OPS[kind](x, 0 * theta, 0 * log_sigma2, seed=torch.tensor(9), **case[2]))
    finally:
        torch.set_num_threads(threads)
    assert all(result.equal(results[0]) for result in results)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_instruction_sets_agree(isa):
    """The levels below this processor's own; a process each, since the choice is made once."""
    code = (
        "import torch; from pykd import _C; from pykd.ops import variational_linear; "
        "from pykd.testing import logits; "
        "x, theta, log_sigma2 = (logits(s, torch.float32, 'cpu', seed=i) for i, s in "
        "enumerate([(70, 31), (1131, 31), (1131, 31)])); log_sigma2.requires_grad_(); "
        "y = variational_linear(x, theta, log_sigma2, seed=torch.tensor(9)); y.square().sum().backward(); "
        "print(_C.isa(), y.norm().item(), y[:, 1130].abs().sum().item(), log_sigma2.grad.norm().item())"
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
    assert_matches(values, expected, length=128)


@pytest.mark.parametrize("kind, case", SOME)
def test_autocast_reads_halves_as_they_are(kind, case):
    """Half inputs beside float32 weights, and float32 inputs too, give what they give outside."""
    for dtype in (torch.bfloat16, torch.float32):
        tensors = tensors_of(case, dtype, "cpu", weights=torch.float32)
        leaves, cast = ([x.detach().clone().requires_grad_() for x in tensors] for _ in range(2))
        options = {"seed": torch.tensor(3)} | case[2]
        expected = OPS[kind](*leaves, **options)
        with torch.autocast("cpu", torch.bfloat16):
            sample = OPS[kind](*cast, **options)
            grads = torch.autograd.grad(sample.float().sum(), cast)
        assert sample.dtype == dtype and sample.equal(expected)
        for grad, wanted in zip(grads, torch.autograd.grad(expected.float().sum(), leaves), strict=True):
            assert grad.equal(wanted)


X, W, IMAGE, KERNEL = torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2, 4, 5, 5), torch.zeros(6, 4, 3, 3)
LINEAR_RULES = [
    ({"input": torch.zeros(2, 4)}, r"input must be \[..., 3\], got \[2, 4\]"),
    ({"input": torch.zeros(())}, r"input must be \[..., 3\], got \[\]"),
    ({"theta": torch.zeros(3)}, r"theta must be \[out, in\], got \[3\]"),
    (
        {"theta": torch.zeros(0, 3), "log_sigma2": torch.zeros(0, 3), "bias": None},
        r"theta must have at least one weight",
    ),
    ({"log_sigma2": torch.zeros(3, 4)}, r"log_sigma2 must have the shape of theta \[4, 3\], got \[3, 4\]"),
    ({"bias": torch.zeros(3)}, r"bias must be \[4\], got \[3\]"),
    ({"input": X.long()}, r"input must be float32, float64, float16 or bfloat16, got Long"),
    ({"input": X.double()}, r"input and theta must both be float64 or neither, got Double and Float"),
    ({"log_sigma2": W.half()}, r"log_sigma2 must have the dtype and device of theta, Float on \w+, got Half"),
    ({"bias": torch.zeros(4).half()}, r"bias must have the dtype and device of theta"),
    ({"row_offset": -1}, r"row_offset must be in \[0, 2\^62\], got -1"),
    ({"seed": torch.tensor(1.0)}, r"seed must be int64, got Float"),
    ({"seed": torch.tensor([1, 2])}, r"seed must hold one value, got shape \[2\]"),
]
CONV_RULES = [
    ({"input": torch.zeros(4, 5, 5)}, r"input must be \[rows, 4, height, width\], got \[4, 5, 5\]"),
    ({"input": torch.zeros(2, 3, 5, 5)}, r"input must be \[rows, 4, height, width\], got \[2, 3, 5, 5\]"),
    ({"groups": 2}, r"input must be \[rows, 8, height, width\], got \[2, 4, 5, 5\]"),
    ({"groups": 4}, r"groups must divide the 6 outputs, got 4"),
    ({"groups": 0}, r"groups must divide the 6 outputs, got 0"),
    ({"stride": 0}, r"stride must be one or two integers >= 1, got \[0, 0\]"),
    ({"padding": (1, -1)}, r"padding must be one or two integers >= 0, got \[1, -1\]"),
    ({"dilation": (0, 1)}, r"dilation must be one or two integers >= 1, got \[0, 1\]"),
    ({"dilation": 3}, r"input must be as large as the kernel, got \[2, 4, 5, 5\]"),
    ({"theta": W, "log_sigma2": W}, r"theta must be \[out, in / groups, height, width\], got \[4, 3\]"),
]
RULES = [pytest.param("linear", *rule) for rule in LINEAR_RULES] + [
    pytest.param("conv2d", *rule) for rule in CONV_RULES
]
GIVEN = {
    "linear": {"input": X, "theta": W, "log_sigma2": W, "bias": torch.zeros(4)},
    "conv2d": {"input": IMAGE, "theta": KERNEL, "log_sigma2": KERNEL, "bias": torch.zeros(6)},
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kind, options, message", RULES)
def test_broken_rules_say_which(kind, options, message, device):
    given = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in (GIVEN[kind] | options).items()
    }
    with pytest.raises((ValueError, TypeError), match=f"^variational_{kind}: {message}"):
        OPS[kind](**given)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize(
    "options, message",
    [
        ({"input": [1.0]}, r"input must be a Tensor, got list"),
        ({"log_sigma2": None}, r"log_sigma2 must be a Tensor, got NoneType"),
        ({"bias": 0.5}, r"bias must be a Tensor or None, got float"),
        ({"seed": 7}, r"seed must be a Tensor or None, got int"),
        ({"generator": 7}, r"generator must be a Generator or None, got int"),
        ({"row_offset": 2**70}, r"row_offset must be an int of 64 bits, got 1180591620717411303424"),
    ],
)
def test_wrong_types_say_which(kind, options, message):
    with pytest.raises(TypeError, match=f"^variational_{kind}: {message}$"):
        OPS[kind](**GIVEN[kind] | options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"stride": "a"}, r"stride must be one or two integers, got 'a'"),
        ({"padding": (1, 2, 3)}, r"padding must be one or two integers, got \(1, 2, 3\)"),
        ({"dilation": 1.5}, r"dilation must be one or two integers, got 1.5"),
        ({"groups": 1.5}, r"groups must be an int of 64 bits, got 1.5"),
    ],
)
def test_wrong_shapes_of_a_convolution_say_which(options, message):
    with pytest.raises(TypeError, match=f"^variational_conv2d: {message}$"):
        variational_conv2d(**GIVEN["conv2d"] | options)


@pytest.mark.parametrize("kind, case", CASES)
def test_meta_kernel_gives_the_shape(kind, case):
    tensors = tensors_of(case, torch.bfloat16, "cpu", weights=torch.float32)
    expected = OPS[kind](*tensors, **case[2])
    sample = OPS[kind](*(x.to("meta") for x in tensors), **case[2])
    assert (sample.shape, sample.dtype) == (expected.shape, torch.bfloat16)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind, case", SOME)
def test_second_derivative_raises(kind, case, device):
    tensors = [x.requires_grad_() for x in tensors_of(case, torch.float64, device)]
    for i in range(4):
        grads = torch.autograd.grad(OPS[kind](*tensors, **case[2]).square().sum(), tensors, create_graph=True)
        with pytest.raises(NotImplementedError, match=f"variational_{kind}: the second derivative"):
            torch.autograd.grad(sum(grad.sum() for grad in grads), tensors[i])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind, case", SOME)
def test_compiles(kind, case, device):
    seed = seed_on(device)

    def loss(*tensors):
        return OPS[kind](*tensors, seed=seed, **case[2]).square().mean()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    tensors = tensors_of(case, torch.float64, device)
    for rows in (2, 3):
        given = [torch.cat([tensors[0]] * rows), *tensors[1:]]
        given = [x.detach().requires_grad_() for x in given]
        for grad, expected in zip(
            torch.autograd.grad(compiled(*given), given), torch.autograd.grad(loss(*given), given), strict=True
        ):
            assert_matches(grad, expected, length=128, magnitude=float(expected.abs().max()))


def test_compiles_with_a_seed_of_its_own():
    compiled = torch.compile(lambda x: variational_linear(x, W + 1, W), fullgraph=True)
    x = torch.ones(16, 3)
    assert not compiled(x).equal(compiled(x)), "each call draws anew"
    generator = torch.Generator()
    refused = torch.compile(lambda x: variational_linear(x, W + 1, W, generator=generator), fullgraph=True)
    with pytest.raises(Exception, match=r"cannot trace generator="):
        refused(x)
