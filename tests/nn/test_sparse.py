"""Sparse layers: they equal the dense ones, their state goes round, networks become sparse where that is faster."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from pykd.errors import PykdError
from pykd.nn import SparseConv2d, SparseLinear, sparsify
from pykd.nn import sparse as room
from pykd.sparse import SparseWeight
from pykd.testing import DEVICES, assert_matches, logits

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(12, 10),
    "linear, no bias": lambda: nn.Linear(12, 10, bias=False),
    "conv": lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1),
    "conv, groups": lambda: nn.Conv2d(6, 8, (3, 2), dilation=(2, 1), groups=2, bias=False),
    "conv, same": lambda: nn.Conv2d(6, 8, (5, 3), padding="same"),
    "conv, valid": lambda: nn.Conv2d(6, 8, 3, padding="valid"),
}
BLOCKS = [None, (1, 16), (4, 4)]


def pruned_layer(name: str) -> nn.Module:
    """A dense layer without the blocks [4, 4] that a checkerboard leaves out."""
    layer = LAYERS[name]().eval().requires_grad_(False)
    matrix = layer.weight.view(layer.weight.shape[0], -1)
    rows, columns = (torch.arange(side) // 4 for side in matrix.shape)
    matrix *= (rows[:, None] + columns) % 2
    return layer


def sparse_of(layer: nn.Module, block: tuple[int, int] | None) -> SparseLinear | SparseConv2d:
    return (SparseLinear if isinstance(layer, nn.Linear) else SparseConv2d).from_dense(layer, block)


def example_of(layer: nn.Module) -> Tensor:
    return logits((5, 12) if isinstance(layer, nn.Linear) else (5, 6, 9, 8), torch.float32, "cpu", seed=1, scale=1.0)


def matches(found: Tensor, expected: Tensor) -> None:
    assert_matches(found, expected, length=128, magnitude=float(expected.abs().max()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_dense_layer(name: str, block: tuple[int, int] | None, device: str) -> None:
    layer = pruned_layer(name).to(device)
    sparse, x = sparse_of(layer, block).to(device), example_of(layer).to(device)
    matches(sparse(x), layer(x))
    assert not list(sparse.parameters())
    assert sparse.weight.nnz == int(layer.weight.count_nonzero())
    before = sparse(x)
    layer.weight.zero_()
    if layer.bias is not None:
        layer.bias.zero_()
    assert sparse(x).equal(before), "it has values of its own"


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_state_goes_round(name: str, block: tuple[int, int] | None) -> None:
    """Into a layer with other entries and blocks, and through a file that holds no packed weight."""
    layer = pruned_layer(name)
    sparse, x = nn.Sequential(sparse_of(layer, block)), example_of(layer)
    expected = sparse(x)
    state = sparse.state_dict()
    assert set(state) == {"0.values", "0.positions"} | ({"0.bias"} if layer.bias is not None else set())
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = nn.Sequential(sparse_of(pruned_layer(name), (2, 2)))
    other(x)
    assert other.load_state_dict(torch.load(file, weights_only=True)) == ([], [])
    assert other(x).equal(expected)
    assert other[0].weight.block == sparse[0].weight.block


def test_states_that_are_no_weight_are_refused() -> None:
    layer = SparseLinear(SparseWeight(np.eye(4, dtype=np.float32)), torch.ones(4))
    x, good = torch.ones(1, 4), layer.state_dict()
    before = layer(x)
    for change, message in [
        ({"positions": good["positions"].flip(0)}, "positions should ascend from 0 on, below 16"),
        ({"positions": good["positions"] + 1}, "positions should ascend from 0 on, below 16"),
        ({"positions": good["positions"] - 1}, "positions should ascend from 0 on, below 16"),
        ({"positions": good["positions"][:3]}, r"they are \[4, 1, 1\] and \[3\]"),
        ({"positions": good["positions"].float()}, "they are"),
        ({"values": good["values"] * torch.nan}, "NaN or infinity"),
        ({"values": good["values"].expand(4, 1, 6)}, r"values should be \[4, 1, 4\], got \[4, 1, 6\]"),
    ]:
        with pytest.raises(RuntimeError, match=f"values and positions are no weight .4, 4.: .*{message}"):
            layer.load_state_dict(good | change)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"positions\""):
        layer.load_state_dict({name: value for name, value in good.items() if name != "positions"})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layer.load_state_dict(good | {"packed": x})
    assert layer(x).equal(before)


@pytest.mark.parametrize("name", LAYERS)
def test_copies_and_pickles(name: str) -> None:
    layer = pruned_layer(name)
    sparse, x = sparse_of(layer, (4, 4)), example_of(layer)
    expected = sparse(x)
    for again in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        assert again.weight is not sparse.weight and again(x).equal(expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_inputs(dtype: torch.dtype) -> None:
    layer = pruned_layer("conv")
    x = example_of(layer).to(dtype)
    result = sparse_of(layer, None).to(dtype)(x)
    assert result.dtype == dtype
    matches(result, nn.functional.conv2d(x.float(), layer.weight, layer.bias.to(dtype).float(), 2, 1))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ["linear", "conv, groups"])
def test_exports(name: str, strict: bool) -> None:
    """What has not run yet, for any batch size; through a file."""
    layer = pruned_layer(name)
    network, x = nn.Sequential(sparse_of(layer, (4, 4)), nn.ReLU()), example_of(layer)
    program = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for rows in (x, x[:3]):
        matches(loaded(rows), layer(rows).relu())


def test_compiles() -> None:
    torch._dynamo.reset()
    conv, linear = pruned_layer("conv"), nn.Linear(160, 3)
    network = nn.Sequential(sparse_of(conv, (4, 4)), nn.ReLU(), nn.Flatten(), sparse_of(linear, None))
    compiled = torch.compile(copy.deepcopy(network), fullgraph=True, dynamic=True)
    for rows in (5, 3):
        x = example_of(conv)[:rows]
        matches(compiled(x), network(x))


def test_weights_of_other_shapes_are_refused() -> None:
    with pytest.raises(PykdError, match=r"SparseWeight of 4 sides, got \[2, 3\]"):
        SparseConv2d(SparseWeight(np.ones((2, 3), np.float32)))
    with pytest.raises(PykdError, match="SparseWeight of 2 sides, got Tensor"):
        SparseLinear(torch.ones(2, 3))
    with pytest.raises(PykdError, match=r"bias should be a tensor \[2\] or None, got \[3\]"):
        SparseLinear(SparseWeight(np.ones((2, 3), np.float32)), torch.ones(3))
    with pytest.raises(PykdError, match=r"made of a torch\.nn\.Linear, got Conv2d"):
        SparseLinear.from_dense(nn.Conv2d(2, 2, 3))
    with pytest.raises(PykdError, match=r"made of a torch\.nn\.Conv2d, got ConvTranspose2d"):
        SparseConv2d.from_dense(nn.ConvTranspose2d(2, 2, 3))
    with pytest.raises(PykdError, match="pads with zeros, not circular: keep that layer dense"):
        SparseConv2d.from_dense(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"))
    with pytest.raises(PykdError, match="differs on two sides"):
        SparseConv2d.from_dense(nn.Conv2d(2, 2, 4, padding="same"))


def test_an_image_alone() -> None:
    layer = nn.Conv2d(3, 8, 3)
    sparse, image = SparseConv2d.from_dense(layer), torch.randn(3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(sparse(image), layer(image))


def test_traces_before_its_first_call() -> None:
    layer, x = nn.Linear(8, 8), torch.randn(2, 8)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(SparseLinear.from_dense(layer), x)
        torch.testing.assert_close(traced(x), layer(x))


# ---- sparsify ----


@pytest.fixture
def sparse_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every measurement is won by the form that stores least."""

    def times(forms, inputs, seconds):
        return {name: form.weight.values.size if name != "dense" else 10**9 for name, form in forms.items()}

    monkeypatch.setattr(room, "_times", times)


def network() -> nn.Sequential:
    """All kinds of layers; the second is dense, one is used twice."""
    torch.manual_seed(1)
    shared = nn.Linear(16, 16)
    made = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.Conv2d(8, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(36, 16), shared),
        shared,
    )
    for layer in (made[0], made[3][2], shared):
        with torch.no_grad():
            layer.weight[:, ::2] = 0
    return made


IMAGES = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))


def test_layers_with_zeros_become_sparse_where_that_is_faster(sparse_wins: None) -> None:
    original = network().train()
    before = copy.deepcopy(original.state_dict())
    fast = sparsify(original, IMAGES)
    assert set(fast.sparsified) == {"0", "3.2", "3.3"}
    assert {type(layer) for layer in (fast[0], fast[1], fast[3][2])} == {SparseConv2d, nn.Conv2d, SparseLinear}
    assert fast[3][3] is fast[4], "a layer that is used twice stays one"
    assert not any(layer.training for layer in fast.modules())
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    assert all(layer.training for layer in original.modules()) and type(original[0]) is nn.Conv2d
    assert all(value.equal(before[name]) for name, value in original.state_dict().items())
    assert original[0].weight.requires_grad and "forward" not in original[0].__dict__
    matches(fast(IMAGES), original.eval()(IMAGES).detach())


def test_layers_that_lose_stay_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_times", lambda forms, inputs, seconds: dict.fromkeys(forms, 2.0) | {"dense": 1.0})
    fast = sparsify(network(), IMAGES)
    assert {timed.form for timed in fast.sparsified.values()} == {"dense"}
    assert not any(isinstance(layer, room._Sparse) for layer in fast.modules())


def test_forms_are_measured() -> None:
    """And each layer has the fastest."""
    empty, full = nn.Linear(1024, 1024), nn.Linear(1024, 1024)
    with torch.no_grad():
        empty.weight[16:] = 0
        full.weight[0, 0] = 0
    fast = sparsify(nn.Sequential(empty, full), torch.randn(64, 1024), blocks=[(1, 1), (16, 16)])
    assert set(fast.sparsified["0"].seconds) == {"dense", (1, 1), (16, 16)}
    assert set(fast.sparsified["1"].seconds) == {"dense", (1, 1)}, "no block of it is zero"
    assert all(0 < seconds < 10 for timed in fast.sparsified.values() for seconds in timed.seconds.values())
    for layer, timed in zip(fast, fast.sparsified.values(), strict=True):
        assert timed.seconds[timed.form] == min(timed.seconds.values())
        assert (layer.weight.block if isinstance(layer, SparseLinear) else "dense") == timed.form


def test_masked_and_parametrised_weights_count_as_they_are_used(sparse_wins: None) -> None:
    class Halved(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * (torch.arange(weight.shape[1]) % 2)

    original = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 8), nn.Linear(8, 6))
    prune.l1_unstructured(original[0], "weight", amount=0.7)
    prune.ln_structured(original[1], "weight", amount=0.5, n=2, dim=0)
    parametrize.register_parametrization(original[2], "weight", Halved())
    x = torch.randn(4, 12)
    expected = original(x).detach()
    fast = sparsify(original, x)
    assert all(type(layer) is SparseLinear for layer in fast)
    assert [layer.weight.nnz for layer in fast] == [36, 40, 24]
    matches(fast(x), expected)
    assert original(x).requires_grad, "the masks still train"


def test_layers_that_cannot_be_replaced_stay(sparse_wins: None) -> None:
    """Hooks, own forwards, other padding and dtypes, no call, and a fast path that reads weights."""

    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    class Standardised(nn.Conv2d):
        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(input, weight - weight.mean(), bias)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.standardised = Standardised(1, 1, 3, padding=1)
            self.hooked, self.own, self.wide = nn.Linear(8, 8), Own(8, 8), nn.Linear(8, 8).double()
            self.idle, self.same = nn.Linear(8, 8), nn.Conv2d(1, 1, (1, 4), padding="same")
            self.circular = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")
            self.encoder = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
            self.hooked.register_forward_hook(lambda layer, given, result: result + 1)
            with torch.no_grad():
                for parameter in self.parameters():
                    if parameter.dim() > 1:
                        parameter.view(-1)[::2] = 0

        def forward(self, input: Tensor) -> Tensor:
            x = self.wide(self.own(self.hooked(input)).double()).float()
            return self.encoder(self.same(self.circular(self.standardised(x[:, None])))[:, 0])

    original, x = Network().eval(), torch.randn(2, 5, 8)
    fast = sparsify(original, x)
    assert fast.sparsified == {}
    with torch.no_grad():
        assert fast(x).equal(original(x))


def test_networks_that_use_the_weights_themselves_are_told(sparse_wins: None) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)
            self.linear.weight.data.tril_()

        def forward(self, input: Tensor) -> Tensor:
            return self.linear(input.to(self.linear.weight.dtype))

    with pytest.raises(PykdError, match=r"does not run with sparse layers .*'dtype'.* uses a layer's weight itself"):
        sparsify(Network(), torch.ones(2, 6))


def test_several_arguments_and_bad_blocks() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)
            self.linear.weight.data.tril_()

        def forward(self, one: Tensor, other: Tensor) -> Tensor:
            return self.linear(one) + self.linear(input=other)

    fast = sparsify(Two(), (torch.ones(1, 6), torch.ones(3, 6)), seconds=1e-3)
    assert set(fast.sparsified["linear"].seconds) >= {"dense", (1, 1)}
    with pytest.raises(PykdError, match=r"blocks should be pairs \(rows, columns\), both at least 1, got \(0, 4\)"):
        sparsify(Two(), torch.ones(1, 6), blocks=[(0, 4)])
