"""linear_distillation_loss against its reference, and against distillation_loss on logits that no product rounds.

Inputs of a few bits have products that every dtype holds: there the logits of the chunks are those of the layers, and
what is left to compare is the kernel, bit for bit, and the products of its gradient. Not here: what the loss itself
promises (test_distillation_loss.py).
"""

import pytest
import torch
import torch.nn.functional as F

import pykd.reference as reference
from pykd.ops import (
    distillation_loss,
    distillation_loss_and_grad,
    linear_distillation_loss,
    linear_distillation_loss_and_grad,
)
from pykd.ops._noise import ADDITIVE, PER_SAMPLE, REDUCTION, REVERSE
from pykd.testing import DEVICES, FLOATS, NOISES, assert_matches, logits, tolerance

INF, NAN = float("inf"), float("nan")
LOSSES = {
    "forward": {"temperature": 3.0},
    "reverse": {"temperature": 2.0, "direction": "reverse"},
    "both": {"temperature": 4.0, "hard_weight": 0.1, "label_smoothing": 0.1},
    "hard": {"hard_weight": 1.0, "label_smoothing": 0.2},
}
SHAPES = [(1, 1, 1, 1), (3, 2, 5, 2), (17, 33, 7, 12), (65, 100, 24, 9), (9, 1500, 3, 4)]  # rows, classes, features
CHUNKS = [0, 1, 4, 64]  # rows of a chunk; 0 leaves it to the op


def seed_on(device, value=-123456789012345):
    return torch.tensor(value, device=device)


def labels(rows, classes, device="cpu", *, seed=99):
    """Labels of which the first third and every fifth are ignored: more in some chunks than in others."""
    target = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))
    target[: rows // 3] = target[::5] = -100
    return target.to(device)


def layers(shape, dtype=torch.float32, device="cpu", *, teacher=None, seed=0):
    """Hidden states and weights, normal, of logits with a standard deviation of 3."""
    rows, classes, features, more = shape
    sizes = [(rows, features), (classes, features), (rows, more), (classes, more)]
    dtypes = [dtype, dtype, teacher or dtype, teacher or dtype]
    scales = [1.0, 3 / features**0.5, 1.0, 3 / more**0.5]
    of_each = enumerate(zip(sizes, dtypes, scales, strict=True))
    return [logits(size, of, device, seed=seed + i, scale=scale) for i, (size, of, scale) in of_each]


def exact_layers(shape, dtype=torch.float32, device="cpu", *, seed=0):
    """Multiples of a half up to 1, and of 1 up to 2: sums of up to 25 products are exact in any dtype."""
    return [
        (x.clamp(-1, 1) * 2).round() / (2 if i % 2 == 0 else 1)
        for i, x in enumerate(layers(shape, dtype, device, seed=seed))
    ]


def in_chunks(chunk_rows, *tensors, reduction="batchmean", direction="forward", seed=None, **options):
    """The op with chunks of so many rows, which Python's function does not offer."""
    loss = {"temperature": 1.0, "hard_weight": 0.0, "reverse": REVERSE[direction], "label_smoothing": 0.0}
    loss |= {"ignore_index": -100}
    noise = {"sigma": 0.0, "alpha": 1.0, "noise_shape": "logit", "noise_kind": "multiplicative"}
    noise |= {"n_teachers": 1, "row_offset": 0} | options
    noise["noise_shape"], noise["noise_kind"] = PER_SAMPLE[noise["noise_shape"]], ADDITIVE[noise["noise_kind"]]
    values = [{**loss, **options}[name] for name in loss] + [noise[name] for name in list(noise)[:6]]
    return torch.ops.pykd.linear_distillation_loss(*tensors, seed, REDUCTION[reduction], *values, chunk_rows)


def rounding(tensors, target, weight, *, reduction, seed, **options):
    """What a loss, a row each, and the gradient of its logits may be off by, where the products round the logits.

    To first order the loss is off by its derivatives times the logits' errors, its gradient by twice their largest of
    the probabilities it is made of; where the divergence is reversed, times the logarithm that it holds, too.
    """
    hidden, teacher_hidden = tensors[::2]
    temperature, w = options.get("temperature", 1.0), options.get("hard_weight", 0.0)
    wide = [x.double() for x in tensors]
    s, z = (wide[0] @ wide[1].t()).requires_grad_(), (wide[2] @ wide[3].t()).requires_grad_()
    loss = reference.distillation_loss(s, z, target, reduction=reduction, seed=seed, **options)
    # Where hard_weight is 1 the teacher has no part in it.
    of_s, of_z = torch.autograd.grad((loss * weight).sum(), (s, z), allow_unused=True, materialize_grads=True)
    computed = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    errors = []
    for x, w_of, values in ((wide[0], wide[1], s), (wide[2], wide[3], z)):
        dtype = hidden.dtype if values is s else teacher_hidden.dtype
        of_product = tolerance(dtype, length=x.shape[1]) * (x.abs() @ w_of.abs().t())
        of_kernel = tolerance(computed, length=s.shape[1]) * (temperature + values.detach().abs().amax(1, keepdim=True))
        errors.append((of_product + of_kernel) * (1 if values is s else 1 + 5.5 * options.get("sigma", 0.0)))
    largest = sum(error.amax(1, keepdim=True) for error in errors)
    rows = len(s)
    counted = 1.0 if target is None else max(1, int((target != -100).sum()))
    soft, hard = ((1 - w) / rows, w / counted) if reduction == "batchmean" else (1 - w, w)
    scale = (soft + hard) * weight.abs().expand(rows).unsqueeze(1)
    of_loss = (of_s.abs() * errors[0] + of_z.abs() * errors[1]).sum(1) + (scale * largest**2).squeeze(1)
    s, z = s.detach(), z.detach()
    log_p, log_q = F.log_softmax(z / temperature, 1), F.log_softmax(s / temperature, 1)
    probabilities = log_p.exp() + log_q.exp() + F.softmax(s, 1)
    if options.get("sigma", 0.0) > 0:
        probabilities += 1  # of the teacher with noise
    if options.get("direction") == "reverse":
        probabilities = probabilities * (1 + (log_q - log_p).abs().amax(1, keepdim=True) * (1 + 5.5))
    return of_loss, 2 * scale * largest * probabilities + torch.finfo(hidden.dtype).tiny


def assert_within(actual, expected, allowed):
    assert actual.shape == expected.shape and actual.isfinite().all()
    error = (actual.double() - expected).abs()
    assert (error <= allowed).all(), f"off by {(error / allowed).max().item():.3g} times what is allowed"


def check(tensors, target=None, *, reduction="batchmean", chunk_rows=0, **options):
    """Value and gradients through autograd against the definition in float64."""
    device = tensors[0].device.type
    options = {"seed": seed_on(device)} | options
    leaves = [x.detach().clone().requires_grad_() for x in tensors[:2]]
    wide = [x.double() for x in tensors]
    of_double = [x.clone().requires_grad_() for x in wide[:2]]
    loss = in_chunks(chunk_rows, *leaves, *tensors[2:], target, reduction=reduction, **options)
    assert loss.dtype == (torch.float64 if tensors[0].dtype == torch.float64 else torch.float32)
    expected = reference.linear_distillation_loss(*of_double, *wide[2:], target, reduction=reduction, **options)
    weight = torch.linspace(-1, 1, loss.numel(), dtype=torch.float64, device=device).reshape(loss.shape) + 0.25
    grads = torch.autograd.grad(loss, leaves, weight.to(loss.dtype))
    expected_grads = torch.autograd.grad(expected, of_double, weight)

    ones = torch.ones_like(weight)
    of_loss, _ = rounding(tensors, target, ones, reduction=reduction, **options)
    own = tolerance(loss.dtype, length=tensors[1].shape[0]) * expected.detach().abs()
    assert_within(loss.detach(), expected.detach(), own + (of_loss if reduction == "none" else of_loss.sum()))
    _, of_grad = rounding(tensors, target, weight, reduction=reduction, **options)
    hidden, of_student = wide[:2]
    rows, classes = len(hidden), len(of_student)
    s = (hidden @ of_student.t()).requires_grad_()
    on_logits = reference.distillation_loss(s, wide[2] @ wide[3].t(), target, reduction=reduction, **options)
    g = torch.autograd.grad(on_logits, s, weight)[0].abs()
    dtype, chunks = tensors[0].dtype, -(-rows // chunk_rows) if chunk_rows else 1
    # The scale of a scalar loss is multiplied in at last: another rounding, of it and of the product.
    each = torch.finfo(dtype).eps * (2 + min(chunks, 8))
    bounds = [
        of_grad @ of_student.abs() + (tolerance(dtype, length=classes) + each) * (g @ of_student.abs()),
        of_grad.t() @ hidden.abs() + (tolerance(dtype, length=rows) + each) * (g.t() @ hidden.abs()),
    ]
    for grad, wanted, allowed in zip(grads, expected_grads, bounds, strict=True):
        assert grad.dtype == dtype and grad.is_contiguous()
        assert_within(grad, wanted, allowed + torch.finfo(dtype).smallest_normal)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("loss", LOSSES)
def test_matches_reference(loss, noise, dtype, device):
    for i, shape in enumerate(SHAPES):
        for reduction, chunk_rows in zip(REDUCTION, CHUNKS[i % 2 :], strict=False):
            target = labels(*shape[:2], device)
            options = {"reduction": reduction, "chunk_rows": chunk_rows}
            check(layers(shape, dtype, device, seed=i), target, **options, **LOSSES[loss], **NOISES[noise])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("teacher", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("student", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_matches_reference_for_mixed_dtypes(student, teacher, device):
    tensors = layers((33, 130, 16, 20), student, device, teacher=teacher, seed=6)
    check(tensors, labels(33, 130, device), chunk_rows=8, **LOSSES["both"], **NOISES["logit"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("strides", ["columns", "sliced", "expanded", "offset"])
def test_matches_reference_for_any_strides(strides, device):
    views = {
        "columns": lambda x: x.t().contiguous().t(),
        "sliced": lambda x: x[:, 1::3],
        "expanded": lambda x: x[:1].expand(len(x), x.shape[1]),
        "offset": lambda x: x.flatten()[1 : 1 - x.shape[1]].reshape(len(x) - 1, x.shape[1]),
    }
    tensors = [views[strides](x) for x in layers((12, 18, 9, 15), torch.float32, device, seed=9)]
    target = labels(2 * len(tensors[0]), 17, device)[::2]
    check(tensors, target, chunk_rows=5, **LOSSES["both"], **NOISES["logit"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("loss", LOSSES)
def test_chunks_are_the_loss_of_the_whole_batch(loss, noise, dtype, device):
    """Labels of which whole chunks are ignored, noise of the rows' own places: rows' losses bit for bit."""
    shape = (70, 130, 9, 12)
    tensors, target = exact_layers(shape, dtype, device, seed=12), labels(*shape[:2], device)
    options = {"seed": seed_on(device)} | LOSSES[loss] | NOISES[noise]
    student, teacher = F.linear(*tensors[:2]), F.linear(*tensors[2:])
    assert student.double().equal(F.linear(tensors[0].double(), tensors[1].double())), "the products are exact"
    for reduction in REDUCTION:
        whole, grad = distillation_loss_and_grad(student, teacher, target, reduction=reduction, **options)
        for chunk_rows in (1, 8, 23, 70):
            leaves = [x.clone().requires_grad_() for x in tensors[:2]]
            value = in_chunks(chunk_rows, *leaves, *tensors[2:], target, reduction=reduction, **options)
            if reduction == "none":
                assert value.equal(whole)
            assert_matches(value.detach(), whole)
            grads = torch.autograd.grad(value.sum(), leaves)
            for found, left, right in zip(grads, (grad, grad.t()), (tensors[1], tensors[0]), strict=True):
                # Each chunk's sum is rounded, and up to eight of them are added up in the weight's own dtype.
                allowed = tolerance(dtype, length=left.shape[1]) + 9 * torch.finfo(dtype).eps
                size = left.double().abs() @ right.double().abs() + torch.finfo(dtype).smallest_normal
                assert_within(found, left.double() @ right.double(), allowed * size)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_many_chunks_do_not_stop_the_weights_gradient(dtype, device):
    """Equal rows add up beyond what a half type would still add them to."""
    rows = 5000
    tensors = [torch.ones(n, 1, dtype=dtype, device=device) for n in (rows, 2, rows, 2)]
    target = torch.zeros(rows, dtype=torch.int64, device=device)
    tensors[1].requires_grad_()
    loss = in_chunks(1, *tensors, target, hard_weight=1.0, reduction="sum")
    (grad,) = torch.autograd.grad(loss, tensors[1])
    assert grad.tolist() == torch.tensor([[-rows / 2], [rows / 2]], dtype=dtype).tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", REDUCTION)
def test_gradcheck(reduction, loss, noise, device):
    tensors, target = layers((5, 6, 3, 2), torch.float64, device, seed=15), labels(5, 6, device)
    options = {"reduction": reduction, "seed": seed_on(device)} | LOSSES[loss] | NOISES[noise]
    leaves = [x.requires_grad_() for x in tensors[:2]]
    assert torch.autograd.gradcheck(lambda h, w: in_chunks(2, h, w, *tensors[2:], target, **options), leaves)


def schema_arguments(device, *, requires_grad=False, reduction=1, dtype=torch.float32):
    tensors = layers((6, 8, 4, 3), dtype, device, seed=18)
    for x in tensors[:2]:
        x.requires_grad_(requires_grad)
    loss = (reduction, 3.0, 0.3, False, 0.1, -100)
    return *tensors, labels(6, 8, device), seed_on(device), *loss, 0.5, 0.6, False, False, 2, 3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("reduction", [0, 1])
def test_opcheck(reduction, requires_grad, device):
    op = torch.ops.pykd.linear_distillation_loss.default
    for chunk_rows in (0, 2):
        arguments = schema_arguments(device, requires_grad=requires_grad, reduction=reduction)
        torch.library.opcheck(op, (*arguments, chunk_rows))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_of_its_other_forms(device):
    arguments, ops = schema_arguments(device), torch.ops.pykd
    for needed in ([True, True], [True, False], [False, True]):
        one = torch.ones((), device=device)
        torch.library.opcheck(ops.linear_distillation_loss_backward.default, (one, *arguments, needed, 2))
        torch.library.opcheck(ops.linear_distillation_loss_and_grad.default, (*arguments, needed, 2))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("extreme", [1e4, -1e4, 1e30, -1e30])
def test_extreme_logits_are_those_of_the_loss(extreme, direction, device):
    tensors, target = exact_layers((6, 40, 4, 5), torch.float32, device, seed=21), labels(6, 40, device)
    tensors[0][:, 0] = tensors[2][:, 0] = 1
    tensors[1][3] = torch.tensor([extreme, 0, 0, 0])
    tensors[3][5] = torch.tensor([extreme, 0, 0, 0, 0])
    options = {"temperature": 2.0, "hard_weight": 0.2, "direction": direction, "reduction": "none"}
    expected, grad = distillation_loss_and_grad(F.linear(*tensors[:2]), F.linear(*tensors[2:]), target, **options)
    loss, grad_hidden, grad_weight = linear_distillation_loss_and_grad(*tensors, target, **options)
    assert loss.equal(expected)
    assert_matches(grad_hidden, grad @ tensors[1], length=40, magnitude=grad.abs() @ tensors[1].abs())
    assert_matches(grad_weight, grad.t() @ tensors[0], length=6, magnitude=grad.t().abs() @ tensors[0].abs())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_extreme_masked_classes(direction, device):
    """A teacher whose weight is -inf where its hidden states are positive: a class of probability 0."""
    tensors = exact_layers((9, 20, 3, 1), torch.float32, device, seed=24)
    tensors[2].abs_().clamp_(0.5)
    tensors[3][4:9] = -INF
    if direction == "reverse":
        tensors[0][:, 0], tensors[1][:, 0] = 1, 0
        tensors[1][4:9, 0] = -INF
    options = {"direction": direction, "temperature": 2.0, "reduction": "none"}
    expected = distillation_loss(F.linear(*tensors[:2]), F.linear(*tensors[2:]), **options)
    assert in_chunks(4, *tensors, None, **options).equal(expected) and expected.isfinite().all()
    if direction == "forward":
        _, *grads = linear_distillation_loss_and_grad(*tensors, **options)
        assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("whose", [0, 2])
def test_extreme_values_show_in_their_row(whose, value, device):
    tensors = exact_layers((9, 20, 3, 4), torch.float32, device, seed=27)
    tensors[1][0], tensors[3][0] = 1, 1
    options = {"reduction": "none", "temperature": 2.0}
    clean, clean_grad, _ = linear_distillation_loss_and_grad(*tensors, **options)
    tensors[whose][5, 1] = value
    loss, grad_hidden, grad_weight = linear_distillation_loss_and_grad(*tensors, **options)
    others = torch.arange(9, device=device) != 5
    assert loss[5].isnan() and grad_hidden[5].isnan().all() and grad_weight.isnan().all()
    assert loss[others].equal(clean[others]) and grad_hidden[others].equal(clean_grad[others])


@pytest.mark.parametrize("device", DEVICES)
def test_extreme_scale_saves_float16_gradients(device):
    """A mean over many rows has gradients below float16's smallest number; those of a loss times 2^14 it holds."""
    tensors = [x / 4 for x in exact_layers((4096, 1024, 4, 4), torch.float16, device, seed=30)]
    leaf = tensors[0].requires_grad_()
    _, g = distillation_loss_and_grad(F.linear(*tensors[:2]).detach().float(), F.linear(*tensors[2:]))
    expected = g.double() @ tensors[1].double()
    (alone,) = torch.autograd.grad(linear_distillation_loss(*tensors), leaf)
    (scaled,) = torch.autograd.grad(linear_distillation_loss(*tensors) * 2**14, leaf)
    lost = (alone.double() - expected).abs().max()
    assert lost > expected.abs().max() / 64, "what float16 cannot hold"
    assert_within(scaled.double() / 2**14, expected, lost / 8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reduction", REDUCTION)
def test_no_rows(reduction, device):
    tensors = layers((0, 5, 3, 2), torch.float32, device)
    leaves = [x.requires_grad_() for x in tensors[:2]]
    target = torch.empty(0, device=device, dtype=torch.int64)
    loss = linear_distillation_loss(*tensors, target, hard_weight=0.5, sigma=0.5, reduction=reduction)
    assert loss.shape == ((0,) if reduction == "none" else ()) and loss.sum() == 0
    grads = torch.autograd.grad(loss.sum(), leaves)
    assert [grad.shape for grad in grads] == [(0, 3), (5, 3)] and not grads[1].any()


@pytest.mark.parametrize("device", DEVICES)
def test_teacher_gets_no_gradient_and_without_a_weight_is_not_read(device):
    tensors, target = layers((6, 8, 4, 3), torch.float32, device, seed=33), labels(6, 8, device)
    for x in tensors:
        x.requires_grad_()
    linear_distillation_loss(*tensors, target, hard_weight=0.5).backward()
    assert [x.grad is None for x in tensors] == [False, False, True, True]
    student = [x.detach() for x in tensors[:2]]
    expected = linear_distillation_loss_and_grad(*student, *tensors[2:], target, hard_weight=1.0)
    nothing = [torch.full_like(x, NAN) for x in tensors[2:]]
    found = linear_distillation_loss_and_grad(*student, *nothing, target, hard_weight=1.0)
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_target_without_a_weight_is_not_read(shape, device):
    tensors = layers((6, 8, 4, 3), torch.float32, device, seed=34)
    target = torch.full(shape, 99, device=device)
    assert in_chunks(4, *tensors, target).equal(in_chunks(4, *tensors, None))


def products(function):
    """How many matrix products torch does."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return sum(event.count for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm_"))


def test_only_what_is_asked_for_is_multiplied():
    tensors = layers((6, 8, 4, 3), seed=36)
    target = labels(6, 8)

    def asking(*which, again=False, **options):
        for i, x in enumerate(tensors[:2]):
            x.requires_grad_(i in which)
        leaves = [tensors[i] for i in which]
        loss = linear_distillation_loss(*tensors, target, **options)
        for retain in [True, False] if again else [False] if which else []:
            torch.autograd.grad(loss.sum(), leaves, retain_graph=retain)

    assert products(lambda: asking(0, 1)) == 4, "none is done twice"
    assert products(lambda: asking(0)) == products(lambda: asking(1)) == 3
    assert products(lambda: asking()) == 2
    assert products(lambda: asking(0, 1, hard_weight=1.0)) == 3, "not the teacher's"
    assert products(lambda: asking(0, 1, reduction="none")) == 6
    assert products(lambda: asking(0, 1, again=True)) == 8


@pytest.mark.parametrize("device", DEVICES)
def test_backward_comes_again_and_in_parts(device):
    """What was kept is given away once, in place; all else is computed anew."""
    tensors = layers((30, 20, 8, 6), torch.float64, device, seed=39)
    leaves = [x.requires_grad_() for x in tensors[:2]]
    expected = torch.autograd.grad(reference.linear_distillation_loss(*tensors, temperature=2.0) * 3, leaves)
    loss = linear_distillation_loss(*tensors, temperature=2.0) * 3
    weight_alone = torch.autograd.grad(loss, leaves[1:], retain_graph=True)
    first = [*torch.autograd.grad(loss, leaves, retain_graph=True), *weight_alone]
    second = torch.autograd.grad(loss, leaves)
    for found, wanted in zip([*first, *second], [*expected, expected[1], *expected], strict=True):
        assert_matches(found, wanted, length=30, magnitude=float(wanted.abs().max()))
    assert len({x.data_ptr() for x in [*first, *second]}) == 5
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaves)


def peak_bytes(function):
    """The most memory that lives at once, beside what lived before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    memory = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(memory, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def test_logits_are_never_whole_in_memory():
    rows, classes = 1024, 8000
    tensors = layers((rows, classes, 64, 96), seed=42)
    leaves = [x.requires_grad_() for x in tensors[:2]]

    def fused():
        torch.autograd.grad(linear_distillation_loss(*tensors), leaves)

    def unfused():
        torch.autograd.grad(distillation_loss(F.linear(*tensors[:2]), F.linear(*tensors[2:])), leaves)

    one, grads = 4 * rows * classes, sum(x.nbytes for x in leaves)
    assert peak_bytes(unfused) >= 3 * one
    assert peak_bytes(fused) < min(peak_bytes(unfused) / 4, 2 * one / 4 + grads + 2**20)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("noise", ["logit", "sample", "additive", "offset"])
def test_seed_decides(noise, device):
    tensors = layers((100, 30, 8, 6), torch.float32, device, seed=45)

    def draw(seed):
        return linear_distillation_loss_and_grad(*tensors, seed=seed_on(device, seed), **NOISES[noise])

    first, again, other = draw(1), draw(1), draw(2)
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    assert not any(a.equal(b) for a, b in zip(first, other, strict=True))
    torch.manual_seed(3)
    drawn = [linear_distillation_loss(*tensors, sigma=0.5) for _ in range(2)]
    torch.manual_seed(3)
    assert linear_distillation_loss(*tensors, sigma=0.5).equal(drawn[0]) and not drawn[0].equal(drawn[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_is_that_of_a_linear_layer(dtype):
    """All four tensors go to its dtype; the loss is float32, gradients come back in the tensors' own."""
    tensors, target = layers((20, 30, 8, 6), dtype, seed=48), labels(20, 30)
    tensors[1] = tensors[1].float()  # a master weight
    leaves = [x.requires_grad_() for x in tensors[:2]]
    half = [x.detach().bfloat16().requires_grad_() for x in tensors]
    expected = linear_distillation_loss(*half, target, hard_weight=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_distillation_loss(*tensors, target, hard_weight=0.1)
        eager = linear_distillation_loss_and_grad(*tensors, target, hard_weight=0.1)
    assert loss.dtype == torch.float32 and loss.equal(expected) and eager[0].equal(expected)
    grads, wanted = torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, half[:2])
    for grad, one_pass, leaf, of_half in zip(grads, eager[1:], leaves, wanted, strict=True):
        assert grad.dtype == one_pass.dtype == leaf.dtype
        assert grad.equal(of_half.to(leaf.dtype)) and one_pass.equal(grad)
    wide = [x.double() for x in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_distillation_loss(*wide).dtype == torch.float64, "which autocast leaves alone"


def test_no_grad_and_inference_mode_compute_the_loss_alone():
    tensors = layers((6, 8, 4, 3), seed=51)
    expected = linear_distillation_loss(*tensors)
    tensors[0].requires_grad_(), tensors[1].requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert products(lambda: linear_distillation_loss(*tensors)) == 2
            loss = linear_distillation_loss(*tensors)
        assert loss.equal(expected) and not loss.requires_grad


H, W, G, V, Y = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, 4), torch.zeros(5, 4), torch.tensor([0, 1])
RULES = [
    ({"student_hidden": torch.zeros(3)}, r"student_hidden must be \[rows, features\], got \[3\]"),
    ({"teacher_hidden": torch.zeros(2, 3, 4)}, r"teacher_hidden must be \[rows, features\], got \[2, 3, 4\]"),
    ({"student_hidden": torch.zeros(2, 0)}, r"student_hidden must have at least one feature, got \[2, 0\]"),
    ({"teacher_hidden": torch.zeros(2, 0)}, r"teacher_hidden must have at least one feature, got \[2, 0\]"),
    ({"student_weight": torch.zeros(5, 4)}, r"student_weight must be \[classes, 3\], got \[5, 4\]"),
    ({"student_weight": torch.zeros(3)}, r"student_weight must be \[classes, 3\], got \[3\]"),
    ({"teacher_weight": torch.zeros(5, 3)}, r"teacher_weight must be \[classes, 4\], got \[5, 3\]"),
    ({"student_weight": torch.zeros(0, 3)}, r"student_weight must have at least one class, got \[0, 3\]"),
    ({"teacher_weight": torch.zeros(6, 4)}, r"teacher_weight must have the classes of student_weight, 5, got \[6, 4\]"),
    ({"teacher_hidden": torch.zeros(3, 4)}, r"teacher_hidden must have the rows of student_hidden, 2, got \[3, 4\]"),
    ({"student_hidden": H.long()}, r"student_hidden must be float32, float64, float16 or bfloat16, got Long"),
    ({"teacher_hidden": G.int()}, r"teacher_hidden must be float32, float64, float16 or bfloat16, got Int"),
    ({"student_weight": W.half()}, r"student_weight must have the dtype of student_hidden, Float, got Half"),
    ({"teacher_weight": V.bfloat16()}, r"teacher_weight must have the dtype of teacher_hidden, Float, got BFloat16"),
    (
        {"teacher_hidden": G.double(), "teacher_weight": V.double()},
        r"student and teacher must both be float64 or neither, got Float and Double",
    ),
    ({"temperature": 0.0}, r"temperature must be finite and > 0, got 0"),
    ({"hard_weight": 1.5}, r"hard_weight must be in \[0, 1\], got 1.5"),
    ({"label_smoothing": NAN}, r"label_smoothing must be in \[0, 1\], got nan"),
    ({"hard_weight": 0.3}, r"hard_weight 0.3 needs a target, pass target= or hard_weight=0"),
    ({"hard_weight": 0.3, "target": Y[:1]}, r"target must be \[rows\] = \[2\], got \[1\]"),
    ({"hard_weight": 0.3, "target": Y.int()}, r"target must be int64, got Int"),
    ({"sigma": -1.0}, r"sigma must be finite and >= 0, got -1"),
    ({"sigma": 0.5, "alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
    ({"n_teachers": 0}, r"n_teachers must be in \[1, 2\^31 - 1\], got 0"),
    ({"row_offset": -1}, r"row_offset must be in \[0, 2\^62\], got -1"),
    ({"sigma": 0.5, "seed": torch.tensor(1.0)}, r"seed must be int64, got Float"),
    ({"reduction": "mean"}, r"reduction must be one of none, batchmean, sum, got 'mean'"),
    ({"direction": "back"}, r"direction must be one of forward, reverse, got 'back'"),
    ({"student_hidden": [1.0]}, r"student_hidden must be a Tensor, got list"),
    ({"teacher_weight": None}, r"teacher_weight must be a Tensor, got NoneType"),
    ({"temperature": "hot"}, r"temperature must be a number, got str"),
]


@pytest.mark.parametrize("wrong, message", RULES)
def test_broken_rules_say_which(wrong, message):
    arguments = {"student_hidden": H, "student_weight": W, "teacher_hidden": G, "teacher_weight": V} | wrong
    for op in (linear_distillation_loss, linear_distillation_loss_and_grad):
        with pytest.raises((ValueError, TypeError), match=f"^linear_distillation_loss(_and_grad)?: {message}"):
            op(**arguments)


@pytest.mark.parametrize("wrong, message", RULES[:15])
def test_meta_kernel_says_the_same(wrong, message):
    arguments = {"student_hidden": H, "student_weight": W, "teacher_hidden": G, "teacher_weight": V} | wrong
    with pytest.raises((ValueError, TypeError), match=message):
        linear_distillation_loss(**{name: x.to("meta") for name, x in arguments.items()})


def test_broken_rules_of_devices_and_chunks():
    for i, name in ((1, "student_weight"), (2, "teacher_hidden"), (3, "teacher_weight")):
        tensors = [H, W, G, V]
        tensors[i] = tensors[i].to("meta")
        with pytest.raises(TypeError, match=rf"{name} must be on student_hidden's device cpu, got meta"):
            torch.ops.pykd.linear_distillation_loss_and_grad(*tensors, None, None, 1, *schema_arguments("cpu")[7:])
    with pytest.raises(ValueError, match=r"chunk_rows must be >= 0, got -1"):
        in_chunks(-1, H, W, G, V, None)


@pytest.mark.parametrize("wrong", [20, -1, 2**40])
@pytest.mark.parametrize("row", [0, 29])
def test_broken_rules_of_a_target_name_value_and_row(row, wrong):
    tensors, target = layers((30, 20, 4, 3), seed=54), labels(30, 20)
    target[row] = wrong
    message = rf"^linear_distillation_loss: target must be in \[0, 20\) or ignore_index -100, got {wrong} in row {row}$"
    with pytest.raises(ValueError, match=message):
        in_chunks(8, *tensors, target, hard_weight=0.1)
    with pytest.raises(ValueError, match=message):
        linear_distillation_loss_and_grad(*tensors, target, hard_weight=0.1)


def test_meta_kernel_gives_the_shapes():
    tensors = [x.to("meta", torch.bfloat16) for x in (H, W, G, V)]
    for reduction, shape in (("none", (2,)), ("sum", ())):
        loss, *grads = linear_distillation_loss_and_grad(*tensors, reduction=reduction, sigma=0.5)
        assert (loss.shape, loss.dtype) == (shape, torch.float32)
        assert [(grad.shape, grad.dtype) for grad in grads] == [(x.shape, x.dtype) for x in tensors[:2]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_second_derivative_raises(reduction, which, device):
    tensors = layers((3, 4, 2, 2), torch.float64, device, seed=57)
    leaf = tensors[which].requires_grad_()
    loss = linear_distillation_loss(*tensors, reduction=reduction).sum()
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="linear_distillation_loss: the second derivative is not implemented"):
        torch.autograd.grad(grad.sum(), leaf)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_compiles(reduction, device):
    options = {"temperature": 3.0, "reduction": reduction, "sigma": 0.5, "seed": seed_on(device)}

    def loss(hidden, weight, *rest):
        return linear_distillation_loss(hidden * 2, weight, *rest, hard_weight=0.3, **options).mean() * 3

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for rows in (4, 7):
        tensors, target = layers((rows, 9, 5, 6), torch.float32, device, seed=60), labels(rows, 9, device)
        leaves = [x.requires_grad_() for x in tensors[:2]]
        expected = torch.autograd.grad(loss(*tensors, target), leaves)
        for grad, wanted in zip(torch.autograd.grad(compiled(*tensors, target), leaves), expected, strict=True):
            assert_matches(grad, wanted, length=9, magnitude=float(wanted.abs().max()))


def test_compiles_with_a_seed_of_its_own():
    tensors = layers((16, 9, 5, 6), seed=63)
    compiled = torch.compile(lambda *t: linear_distillation_loss_and_grad(*t, sigma=0.5), fullgraph=True)
    first, second = compiled(*tensors), compiled(*tensors)
    assert not first[0].equal(second[0]) and not first[2].equal(second[2]), "each call draws anew"


def test_exports():
    class Loss(torch.nn.Module):
        def forward(self, *tensors):
            return linear_distillation_loss(*tensors[:5], hard_weight=0.1, sigma=0.5, seed=tensors[5])

    arguments = (*layers((6, 9, 5, 6), seed=66), labels(6, 9))
    program = torch.export.export(Loss(), (*arguments, torch.tensor(3)))
    assert program.module()(*arguments, torch.tensor(4)).equal(Loss()(*arguments, torch.tensor(4)))
