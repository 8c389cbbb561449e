"""sparse_conv2d against its reference: geometries, blocks, groups, batches, dtypes, strides, edges, rules.

Not here: the kernels' own code at every level (its C++ test) and what only a card shows (the tests marked gpu).
"""

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pykd import _C, reference
from pykd.ops import sparse_conv2d
from pykd.sparse import SparseWeight
from pykd.testing import DEVICES, assert_matches, logits, pruned

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCKS = [(1, 1), (1, 16), (4, 4), (8, 8), (16, 16), (3, 5), (32, 32)]
# in, height, width; weight; options
CASES = {
    "pixel": ((1, 1, 1), (1, 1, 1, 1), {}),
    "pixel, padded": ((3, 1, 1), (20, 3, 3, 3), {"padding": 1}),
    "plain": ((5, 9, 8), (18, 5, 3, 3), {}),
    "padded": ((6, 12, 13), (20, 6, 3, 3), {"padding": 1}),
    "1x1": ((17, 6, 7), (33, 17, 1, 1), {}),
    "1x1, strided": ((17, 6, 7), (33, 17, 1, 1), {"stride": 2}),
    "1x1, padded": ((4, 5, 5), (6, 4, 1, 1), {"padding": (2, 1)}),
    "strided": ((6, 17, 18), (20, 6, 3, 3), {"stride": 2, "padding": 1}),
    "strided by three": ((4, 17, 19), (9, 4, 5, 4), {"stride": (3, 2), "padding": (2, 1)}),
    "stride beyond the kernel": ((4, 11, 11), (9, 4, 2, 2), {"stride": 3}),
    "dilated": ((4, 15, 14), (17, 4, 3, 3), {"dilation": (2, 3), "padding": (2, 3)}),
    "dilated, strided": ((4, 15, 14), (17, 4, 3, 3), {"dilation": (3, 2), "stride": (2, 3), "padding": 4}),
    "padding beyond the kernel": ((3, 5, 4), (8, 3, 2, 2), {"padding": (4, 3)}),
    "one row": ((3, 1, 40), (8, 3, 1, 5), {"padding": (0, 2)}),
    "one column": ((3, 40, 1), (8, 3, 5, 1), {"padding": (2, 0)}),
    "wide": ((2, 3, 150), (5, 2, 3, 3), {"padding": 1}),
    "small maps": ((40, 4, 4), (48, 40, 3, 3), {"padding": 1}),
    "grouped": ((8, 9, 9), (32, 4, 3, 3), {"groups": 2, "padding": 1}),
    "groups that blocks straddle": ((6, 8, 8), (15, 2, 3, 3), {"groups": 3}),
    "depthwise": ((20, 8, 9), (20, 1, 3, 3), {"groups": 20, "padding": 1}),
    "depthwise, two each": ((10, 8, 9), (20, 1, 3, 3), {"groups": 10, "stride": 2}),
}
GIVEN = [pytest.param(*case, id=name) for name, case in CASES.items()]
SOME = [
    pytest.param(*CASES[name], id=name) for name in ("padded", "strided", "small maps", "groups that blocks straddle")
]


def check(input, weight, bias=None, *, activation=None, **options):
    """The result against the float64 reference, whose rounding is that of the sum of magnitudes."""
    result = sparse_conv2d(input, weight, bias, **options, activation=activation)
    assert result.dtype == input.dtype and result.is_contiguous() and result.device == input.device
    wide = input.detach().double().cpu()
    dense = torch.from_numpy(weight.dense()).double()
    wide_bias = None if bias is None else bias.double().cpu()
    expected = reference.sparse_conv2d(wide, weight, wide_bias, **options, activation=activation)
    magnitude = F.conv2d(wide.abs(), dense.abs(), None if bias is None else wide_bias.abs(), **options)
    assert_matches(result.cpu(), expected, length=dense[0].numel(), magnitude=magnitude)
    return result


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("image, kernel, options", GIVEN)
def test_matches_reference(image, kernel, options, block, device):
    for number, (batch, sparsity) in enumerate([(1, 0.5), (2, 0.0), (7, 0.95), (17, 0.8), (33, 0.5)]):
        weight = pruned(kernel, block, sparsity, seed=number)
        x = logits((batch, *image), torch.float32, device, seed=10 + number)
        bias = logits(kernel[:1], torch.float32, device, seed=20 + number) if number % 2 else None
        check(x, weight, bias, activation="relu" if batch % 3 else None, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("image, kernel, options", GIVEN)
def test_matches_reference_for_dtypes(image, kernel, options, dtype, device):
    for batch, block in [(1, (1, 1)), (19, (4, 4)), (64, (1, 1))]:
        weight = pruned(kernel, block, 0.7, seed=batch)
        x, bias = logits((batch, *image), dtype, device, seed=30), logits(kernel[:1], dtype, device, seed=31)
        check(x, weight, bias, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("strides", ["turned", "sliced", "expanded", "channels_last"])
@pytest.mark.parametrize("image, kernel, options", SOME)
def test_matches_reference_for_any_strides(image, kernel, options, strides, device):
    views = {
        "turned": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
        "sliced": lambda x: x.repeat_interleave(2, -1)[..., ::2],
        "expanded": lambda x: x[:1].expand_as(x),
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    }
    for batch in (1, 18):
        x = views[strides](logits((batch, *image), torch.float32, device, seed=32))
        check(x, pruned(kernel, (4, 4), 0.7, seed=33), **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("image, kernel, options", SOME)
def test_nothing_stored_is_the_bias(image, kernel, options, block, device):
    weight = SparseWeight(np.zeros(kernel, np.float32), block=block)
    bias = logits(kernel[:1], torch.float32, device, seed=34)
    for batch in (1, 20):
        x = torch.full((batch, *image), NAN, device=device)
        result = sparse_conv2d(x, weight, bias, **options, activation="relu")
        assert result.equal(F.relu(bias)[:, None, None].expand_as(result))
        assert not sparse_conv2d(x, weight, **options).any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [1, 20])
@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("image, kernel, options", SOME)
def test_extreme_inputs_reach_only_what_reads_them(image, kernel, options, value, batch, device):
    """0 * inf of entries that are not stored is 0."""
    weight = pruned(kernel, (1, 1), 0.8, seed=35)
    x = logits((batch, *image), torch.float32, device, seed=36)
    clean = sparse_conv2d(x, weight, **options)
    x[0, 1, 2, 1] = value
    result = sparse_conv2d(x, weight, **options)
    spot = torch.zeros_like(x)
    spot[0, 1, 2, 1] = 1
    share = F.conv2d(spot, torch.from_numpy(weight.dense()).to(device), **options)
    assert share.any() and result[share == 0].equal(clean[share == 0])
    found, wanted = result[share != 0], share[share != 0] * value
    assert found.isnan().all() if value != value else found.equal(wanted)
    relu = sparse_conv2d(x, weight, **options, activation="relu")
    assert relu.nan_to_num(nan=7.0).equal(F.relu(result).nan_to_num(nan=7.0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1e-30, 1e18])
@pytest.mark.parametrize("image, kernel, options", SOME)
def test_extreme_magnitudes(image, kernel, options, scale, device):
    x = logits((3, *image), torch.float32, device, seed=37, scale=scale)
    check(x, pruned(kernel, (1, 1), 0.5, seed=38), **options)


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows(device):
    weight = pruned((6, 4, 3, 3), (1, 1), 0.5, seed=39)
    assert sparse_conv2d(torch.zeros(0, 4, 9, 8, device=device), weight, stride=2).shape == (0, 6, 4, 3)


@pytest.mark.parametrize("image, kernel, options", SOME)
def test_images_are_convolved_apart(image, kernel, options):
    """A batch gives what its images give."""
    weight, x = pruned(kernel, (4, 4), 0.5, seed=40), logits((35, *image), torch.float32, "cpu", seed=41)
    whole = sparse_conv2d(x, weight, **options)
    each = torch.cat([sparse_conv2d(image[None], weight, **options) for image in x])
    assert_matches(whole, each, length=128, magnitude=float(whole.abs().max()))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("side", [4, 19])
def test_threads_do_not_change_the_result(side, block):
    """Large enough to be shared out, by images and by tiles."""
    weight, threads = pruned((130, 96, 3, 3), block, 0.5, seed=42), torch.get_num_threads()
    for batch in (1, 3, 40):
        x, results = logits((batch, 96, side, side), torch.float32, "cpu", seed=43), []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(sparse_conv2d(x, weight, padding=1))
        finally:
            torch.set_num_threads(threads)
        assert all(result.equal(results[0]) for result in results)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_instruction_sets_agree(isa):
    """The levels below this processor's own; a process each, since the choice is made once."""
    code = (
        "import torch; from pykd import _C; from pykd.ops import sparse_conv2d; from pykd.testing import *; "
        "x = logits((21, 6, 13, 12), torch.float32, 'cpu', seed=1); print(_C.isa(), *(sparse_conv2d(x, "
        "pruned((20, 6, 3, 3), block, 0.6, seed=2), stride=s, padding=1).norm().item() "
        "for block in [(1, 1), (1, 16), (4, 4), (16, 16)] for s in (1, 2, 4)))"
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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("who", ["input", "bias"])
def test_gradient_raises(who, device):
    given = {"input": torch.zeros(2, 4, 5, 5, device=device), "bias": torch.zeros(6, device=device)}
    given[who].requires_grad_()
    weight = pruned((6, 4, 3, 3), (1, 1), 0.5, seed=44)
    message = r"^sparse_conv2d has no gradient: call it under torch.no_grad\(\) or torch.inference_mode\(\)$"
    with pytest.raises(RuntimeError, match=message):
        sparse_conv2d(weight=weight, **given)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not sparse_conv2d(weight=weight, **given).requires_grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_opcheck(stride, bias, device):
    weight, x = pruned((6, 4, 3, 3), (4, 4), 0.5, seed=45), torch.ones(2, 4, 7, 8, device=device)
    sparse_conv2d(x, weight)
    tiles = weight.tiles[1, x.device, x.dtype]
    numbers = ([3, 3], [stride, 1], [1, 0], [1, 2], True)
    given = (x, tiles.packed, tiles.head, torch.ones(6, device=device) if bias else None, *numbers)
    torch.library.opcheck(torch.ops.pykd.sparse_conv2d.default, given)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("image, kernel, options", SOME[1:2])
def test_compiles(image, kernel, options, device):
    """Batch sizes and weights may change; what is not packed yet is packed on the way."""
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True)
    def compiled(x, weight, bias):
        return 2 * sparse_conv2d(x + 1, weight, bias, activation="relu", **options)

    bias = logits(kernel[:1], torch.float32, device, seed=46)
    for seed, batch, longer in [(47, 5, 0), (47, 8, 3), (48, 8, 1)]:
        weight = pruned(kernel, (1, 1) if seed % 2 else (8, 8), 0.5, seed=seed)
        x = logits((batch, image[0], image[1] + longer, image[2]), torch.float32, device, seed=batch)
        expected = 2 * sparse_conv2d(x + 1, weight, bias, activation="relu", **options)
        fresh = copy.deepcopy(weight)
        assert compiled(x, weight, bias).equal(expected)
        assert compiled(x, fresh, bias).equal(expected)


def test_autocast_leaves_the_input_as_it_is():
    weight = pruned((6, 4, 3, 3), (1, 1), 0.5, seed=49)
    for dtype in DTYPES:
        x = logits((5, 4, 6, 6), dtype, "cpu", seed=50)
        with torch.autocast("cpu", torch.bfloat16):
            result = sparse_conv2d(x, weight)
        assert result.dtype == dtype and result.equal(sparse_conv2d(x, weight))


W, X = SparseWeight(np.ones((6, 4, 3, 3), np.float32)), torch.zeros(2, 4, 5, 5)
RULES = [
    ({"input": torch.zeros(4, 5, 5)}, ValueError, r"input must be \[rows, 4, height, width\], got \[4, 5, 5\]"),
    ({"input": torch.zeros(2, 3, 5, 5)}, ValueError, r"input must be \[rows, 4, height, width\], got \[2, 3, 5, 5\]"),
    ({"groups": 2}, ValueError, r"input must be \[rows, 8, height, width\], got \[2, 4, 5, 5\]"),
    ({"groups": 4}, ValueError, r"groups must divide the 6 outputs, got 4"),
    ({"groups": 0}, ValueError, r"groups must divide the 6 outputs, got 0"),
    ({"groups": 1.5}, ValueError, r"groups must divide the 6 outputs, got 1.5"),
    ({"stride": 0}, ValueError, r"stride must be one or two integers >= 1 and < 2\^31, got \[0, 0\]"),
    ({"padding": (1, -1)}, ValueError, r"padding must be one or two integers >= 0 and < 2\^31, got \[1, -1\]"),
    ({"padding": 2**40}, ValueError, r"padding must be one or two integers >= 0 and < 2\^31"),
    ({"stride": 10**20}, ValueError, r"stride must be one or two integers < 2\^31, got .1000"),
    ({"dilation": (0, 1)}, ValueError, r"dilation must be one or two integers >= 1 and < 2\^31, got \[0, 1\]"),
    ({"dilation": 3}, ValueError, r"input must be as large as the kernel, got \[2, 4, 5, 5\]"),
    ({"input": torch.zeros(2, 4, 0, 5), "padding": 3}, ValueError, r"input must be as large as the kernel"),
    ({"input": X.double()}, TypeError, r"input must be float32, float16 or bfloat16, got Double"),
    ({"input": None}, TypeError, r"input must be a Tensor, got NoneType"),
    ({"weight": X}, TypeError, r"weight must be a pykd.sparse.SparseWeight, got Tensor"),
    (
        {"weight": SparseWeight(np.ones((4, 3), np.float32))},
        ValueError,
        r"weight must be \[out, in / groups, height, width\], got \[4, 3\]",
    ),
    ({"bias": torch.zeros(4)}, ValueError, r"bias must be \[6\], got \[4\]"),
    ({"bias": 0.5}, TypeError, r"bias must be a Tensor or None, got float"),
    ({"stride": "a"}, TypeError, r"stride must be one or two integers, got 'a'"),
    ({"padding": (1, 2, 3)}, TypeError, r"padding must be one or two integers, got \(1, 2, 3\)"),
    ({"dilation": 1.5}, TypeError, r"dilation must be one or two integers, got 1.5"),
    ({"activation": "tanh"}, ValueError, r"activation must be None or 'relu', got 'tanh'"),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("options, error, message", RULES)
def test_broken_rules_say_which(options, error, message, device):
    given = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in ({"input": X, "weight": W, "bias": torch.zeros(6)} | options).items()
    }
    with pytest.raises(error, match=f"^sparse_conv2d: {message}"):
        sparse_conv2d(**given)


def test_images_too_large_for_the_kernel_are_refused_before_anything_is_allocated():
    for padding in (2**15, 2**30):
        with pytest.raises(ValueError, match=r"^sparse_conv2d: an image must have less than 2\^31 pixels"):
            sparse_conv2d(X, W, padding=padding)


def test_foreign_kernels_are_refused():
    """The kernel's shape comes apart from the packed weight."""
    packed, _, head = _C.sparse_pack(np.array([0, 3]), np.ones((2, 1, 1)), 6, 36, 1, X.device, X.dtype)
    numbers = ([1, 1], [0, 0], [1, 1], False)
    op = torch.ops.pykd.sparse_conv2d
    assert op(X, packed, head, None, [3, 3], *numbers).shape == (2, 6, 3, 3)
    with pytest.raises(ValueError, match=r"^sparse_conv2d: kernel must be the weight's, got \[5, 3\] for 36 columns"):
        op(X, packed, head, None, [5, 3], *numbers)
    with pytest.raises(ValueError, match=r"^sparse_conv2d: input must be \[rows, 9, height, width\]"):
        op(X, packed, head, None, [2, 2], *numbers)


@pytest.mark.parametrize("image, kernel, options", GIVEN)
def test_meta_kernel_gives_the_shape(image, kernel, options):
    x, weight = torch.zeros(2, *image, dtype=torch.bfloat16), SparseWeight(np.ones(kernel, np.float32))
    result = sparse_conv2d(x.to("meta"), weight, **options)
    assert (result.shape, result.dtype) == (sparse_conv2d(x, weight, **options).shape, torch.bfloat16)
