"""sparse_linear against its reference: blocks, sparsities, batches, dtypes, strides, edges, rules.

Not here: the kernels' own code at every level (its C++ test) and what only a card shows (the tests marked gpu).
"""

import copy
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pykd import _C, reference
from pykd.ops import sparse_linear
from pykd.ops._sparse import Tiles
from pykd.sparse import SparseWeight
from pykd.testing import DEVICES, assert_matches, logits, pruned

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCKS = [(1, 1), (1, 16), (4, 4), (8, 8), (16, 16), (3, 5), (32, 32), (2, 1), (64, 3)]
ROWS = [1, 2, 7, 8, 33, 64]
SIZES = [(1, 1), (3, 5), (17, 33), (48, 64), (65, 130)]  # out, in


def check(input, weight, bias=None, **options):
    """The result against the float64 reference, whose rounding is that of the sum of magnitudes."""
    result = sparse_linear(input, weight, bias, **options)
    assert result.dtype == input.dtype and result.is_contiguous() and result.device == input.device
    wide = input.detach().double().cpu()
    dense = torch.from_numpy(weight.dense()).double()
    expected = reference.sparse_linear(wide, weight, None if bias is None else bias.double().cpu(), **options)
    magnitude = F.linear(wide.abs(), dense.abs(), None if bias is None else bias.double().cpu().abs())
    assert_matches(result.cpu(), expected, length=dense.shape[1], magnitude=magnitude)
    return result


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_matches_reference(block, sparsity, device):
    for number, size in enumerate(SIZES):
        weight = pruned(size, block, sparsity, seed=number)
        bias = logits(size[:1], torch.float32, device, seed=number)
        for rows in ROWS:
            x = logits((rows, size[1]), torch.float32, device, seed=10 * number + rows)
            check(x, weight, bias if rows % 2 else None, activation="relu" if rows % 4 < 2 else None)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference_for_dtypes_and_dimensions(dtype, block, device):
    weight = pruned((40, 50), block, 0.7, seed=3)
    bias = logits((40,), dtype, device, seed=4)
    for shape in [(50,), (1, 50), (9, 50), (2, 3, 4, 50), (35, 1, 50)]:
        check(logits(shape, dtype, device, seed=len(shape)), weight, bias)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("strides", ["turned", "sliced", "expanded"])
@pytest.mark.parametrize("block", [(1, 1), (16, 16)], ids=str)
def test_matches_reference_for_any_strides(block, strides, device):
    views = {
        "turned": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
        "sliced": lambda x: x.repeat_interleave(2, -1)[..., ::2],
        "expanded": lambda x: x[:1].expand_as(x),
    }
    weight = pruned((40, 50), block, 0.7, seed=5)
    for rows in (1, 20):
        x, bias = logits((rows, 50), torch.float32, device, seed=6), logits((40,), torch.float32, device, seed=7)
        check(views[strides](x), weight, views[strides](bias))


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int8], ids=lambda dtype: dtype.__name__)
def test_matches_reference_for_stored_dtypes(dtype):
    dense = np.random.default_rng(8).integers(-3, 4, (9, 12)).astype(dtype)
    check(logits((5, 12), torch.float32, "cpu", seed=9), SparseWeight(dense))


@pytest.mark.parametrize("rows", [1, 5, 64, 85])
@pytest.mark.parametrize("block", [(16, 16), (16, 32), (12, 6)], ids=str)
def test_blocks_of_bfloat16(block, rows):
    """By the processor's own products of bfloat16, or by the same sums where it has none; the input chooses them."""
    cpu, dense = torch.device("cpu"), pruned((40, 128), block, 0.7, seed=3).dense()
    weight = SparseWeight(torch.from_numpy(dense).bfloat16(), block=block)
    plain, halves = (
        Tiles(*_C.sparse_pack(weight.positions, weight.values, 40, 128, 1, cpu, dtype))
        for dtype in (torch.float32, torch.bfloat16)
    )
    weight.tiles |= {(1, cpu, dtype): halves for dtype in DTYPES}
    assert halves.packed.numel() > plain.packed.numel()
    bias = logits((40,), torch.float32, "cpu", seed=4)
    for dtype in DTYPES:
        check(logits((rows, 128), dtype, "cpu", seed=5), weight, bias, activation="relu" if rows % 2 else None)


def test_halves_lose_nothing():
    """Values that they do not hold stay float32."""
    weight = pruned((32, 32), (16, 16), 0.5, seed=3)
    sizes = {_C.sparse_pack(weight.positions, weight.values, 32, 32, 1, X.device, dtype)[0].numel() for dtype in DTYPES}
    assert len(sizes) == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_nothing_stored_is_the_bias(block, activation, device):
    weight = SparseWeight(np.zeros((40, 50), np.float32), block=block)
    bias = logits((40,), torch.float32, device, seed=10)
    for rows in (1, 3, 40):
        result = sparse_linear(torch.full((rows, 50), NAN, device=device), weight, bias, activation=activation)
        assert result.equal((F.relu(bias) if activation else bias).expand(rows, 40))
        assert not sparse_linear(torch.ones(rows, 50, device=device), weight).any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_extreme_inputs_reach_only_what_reads_them(block, value, rows, device):
    """0 * inf of entries that are not stored is 0; a stored block reads all its columns."""
    weight = pruned((40, 50), block, 0.8, seed=11)
    x = logits((rows, 50), torch.float32, device, seed=12)
    clean = sparse_linear(x, weight)
    x[0, 7] = value
    result = sparse_linear(x, weight)
    dense = torch.from_numpy(weight.dense()).to(device)
    read = dense[:, 7] != 0
    stored = _stored(weight)[:, 7].to(device)
    assert result[1:].equal(clean[1:])
    assert result[0, ~stored].equal(clean[0, ~stored])
    assert (result[0, read] == dense[read, 7] * value).all() if value == value else result[0, read].isnan().all()
    relu = sparse_linear(x, weight, activation="relu")
    assert relu.isnan().equal(result.isnan())
    assert relu[~relu.isnan()].equal(F.relu(result)[~relu.isnan()])


def _stored(weight):
    """Which entries lie in a stored block."""
    ones = SparseWeight.from_blocks(weight.shape, weight.block, weight.positions, np.zeros_like(weight.values))
    ones.values[:] = 1
    return torch.from_numpy(ones.dense()) != 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1e-30, 1e18])
@pytest.mark.parametrize("block", [(1, 1), (16, 16)], ids=str)
def test_extreme_magnitudes(block, scale, device):
    weight = pruned((40, 50), block, 0.5, seed=13)
    for rows in (1, 20):
        check(logits((rows, 50), torch.float32, device, seed=14, scale=scale), weight)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 50), (2, 0, 50)], ids=str)
def test_no_rows(shape, device):
    weight = pruned((40, 50), (1, 1), 0.5, seed=15)
    assert sparse_linear(torch.zeros(shape, device=device), weight).shape == (*shape[:-1], 40)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_threads_do_not_change_the_result(block):
    """Large enough to be shared out, by rows and by tiles."""
    weight, threads = pruned((600, 700), block, 0.5, seed=16), torch.get_num_threads()
    for rows in (3, 33, 200):
        x, results = logits((rows, 700), torch.float32, "cpu", seed=17), []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(check(x, weight))
        finally:
            torch.set_num_threads(threads)
        assert all(result.equal(results[0]) for result in results)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_instruction_sets_agree(isa):
    """The levels below this processor's own; a process each, since the choice is made once."""
    code = (
        "import torch; from pykd import _C; from pykd.ops import sparse_linear; from pykd.testing import *; "
        "x = logits((21, 130), torch.float32, 'cpu', seed=1); print(_C.isa(), *(sparse_linear(x[:rows], "
        "pruned((70, 130), block, 0.6, seed=2)).norm().item() for block in [(1, 1), (1, 16), (4, 4), (16, 16)] "
        "for rows in (1, 21)))"
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
    given = {"input": torch.zeros(2, 50, device=device), "bias": torch.zeros(40, device=device)}
    given[who].requires_grad_()
    weight = pruned((40, 50), (1, 1), 0.5, seed=18)
    message = r"^sparse_linear has no gradient: call it under torch.no_grad\(\) or torch.inference_mode\(\)$"
    with pytest.raises(RuntimeError, match=message):
        sparse_linear(weight=weight, **given)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not sparse_linear(weight=weight, **given).requires_grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 9])
def test_opcheck(rows, bias, device):
    weight, x = pruned((40, 50), (4, 4), 0.5, seed=19), torch.ones(rows, 50, device=device)
    sparse_linear(x, weight)
    tiles = weight.tiles[1, x.device, x.dtype]
    given = (x, tiles.packed, tiles.head, torch.ones(40, device=device) if bias else None, True)
    torch.library.opcheck(torch.ops.pykd.sparse_linear.default, given)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_compiles(activation, device):
    """Batch sizes and weights may change; what is not packed yet is packed on the way."""
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True)
    def compiled(x, weight, bias):
        return 2 * sparse_linear(x + 1, weight, bias, activation=activation)

    bias = logits((40,), torch.float32, device, seed=20)
    for seed, rows in [(21, 5), (21, 8), (22, 8), (23, 3)]:
        weight = pruned((40, 50), (1, 1) if seed % 2 else (8, 8), 0.5, seed=seed)
        x = logits((rows, 50), torch.float32, device, seed=rows)
        expected = 2 * sparse_linear(x + 1, weight, bias, activation=activation)
        fresh = copy.deepcopy(weight)
        assert compiled(x, weight, bias).equal(expected)
        assert compiled(x, fresh, bias).equal(expected)


def test_autocast_leaves_the_input_as_it_is():
    weight = pruned((40, 50), (1, 1), 0.5, seed=24)
    for dtype in DTYPES:
        x = logits((5, 50), dtype, "cpu", seed=25)
        with torch.autocast("cpu", torch.bfloat16):
            result = sparse_linear(x, weight)
        assert result.dtype == dtype and result.equal(sparse_linear(x, weight))


def test_packed_weight_is_made_once_and_never_copied():
    weight, x = pruned((40, 50), (1, 1), 0.5, seed=26), torch.ones(2, 50)
    expected = sparse_linear(x, weight)
    (tiles,) = weight.tiles.values()
    assert sparse_linear(x, weight).equal(expected) and weight.tiles[1, x.device, x.dtype] is tiles
    for again in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert again.tiles == {}
        assert sparse_linear(x, again).equal(expected)


W, X = SparseWeight(np.ones((4, 3), np.float32)), torch.zeros(2, 3)
RULES = [
    ({"input": torch.zeros(2, 4)}, ValueError, r"input must be \[..., 3\], got \[2, 4\]"),
    ({"input": torch.zeros(())}, ValueError, r"input must be \[..., 3\], got \[\]"),
    ({"input": X.double()}, TypeError, r"input must be float32, float16 or bfloat16, got Double"),
    ({"input": X.long()}, TypeError, r"input must be float32, float16 or bfloat16, got Long"),
    ({"input": [1.0]}, TypeError, r"input must be a Tensor, got list"),
    ({"weight": X}, TypeError, r"weight must be a pykd.sparse.SparseWeight, got Tensor"),
    (
        {"weight": SparseWeight(np.ones((4, 3, 1, 1), np.float32))},
        ValueError,
        r"weight must be \[out, in\], got \[4, 3, 1, 1\]",
    ),
    ({"bias": torch.zeros(3)}, ValueError, r"bias must be \[4\], got \[3\]"),
    ({"bias": torch.zeros(4).long()}, TypeError, r"bias must be floating-point on the input's device \w+, got Long on"),
    ({"bias": 0.5}, TypeError, r"bias must be a Tensor or None, got float"),
    ({"activation": "tanh"}, ValueError, r"activation must be None or 'relu', got 'tanh'"),
    ({"activation": []}, ValueError, r"activation must be None or 'relu', got \[\]"),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("options, error, message", RULES)
def test_broken_rules_say_which(options, error, message, device):
    given = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in ({"input": X, "weight": W, "bias": torch.zeros(4)} | options).items()
    }
    with pytest.raises(error, match=f"^sparse_linear: {message}"):
        sparse_linear(**given)


def test_foreign_buffers_are_refused():
    """Of another weight, cut short, or no packed weight at all; nothing is read beyond them."""
    op = torch.ops.pykd.sparse_linear
    packed, _, head = _C.sparse_pack(np.array([0, 3]), np.ones((2, 1, 1)), 4, 3, 1, X.device, X.dtype)
    assert op(X, packed, head, None, False).shape == (2, 4)
    for wrong, numbers in [
        (packed[:-64], head),
        (packed, head[:-1]),
        (packed, [head[0] + 1, *head[1:]]),
        (packed, [*head[:2], head[2] - 1, *head[3:]]),
        (packed.zero_().clone(), head),
        (packed.float(), head),
    ]:
        with pytest.raises(ValueError, match=r"^sparse_linear: (packed|head) must"):
            op(X, wrong, numbers, None, False)
    with pytest.raises(ValueError, match=r"^sparse_pack: positions must ascend from 0 on, below 12, got 2 at 1"):
        _C.sparse_pack(np.array([3, 2]), np.ones((2, 1, 1)), 4, 3, 1, X.device, X.dtype)
    with pytest.raises(ValueError, match=r"^sparse_pack: positions must ascend from 0 on, below 12, got 12 at 0"):
        _C.sparse_pack(np.array([12]), np.ones((1, 1, 1)), 4, 3, 1, X.device, X.dtype)


def test_meta_kernel_gives_the_shape():
    result = sparse_linear(torch.zeros(2, 5, 3, device="meta", dtype=torch.bfloat16), W)
    assert (result.shape, result.dtype, result.device.type) == ((2, 5, 4), torch.bfloat16, "meta")
