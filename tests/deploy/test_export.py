"""Export: the file's network answers as the network does, and what it cannot hold is refused by name."""

import copy
import hashlib

import numpy as np
import pytest
import torch
from networks import Everything, Residual, networks, pruned
from torch import Tensor, nn
from torch.nn import functional as F

import pykd
from pykd.deploy import export, load, read
from pykd.deploy.graph import KINDS
from pykd.deploy.tracing import described, trace
from pykd.errors import PykdError

NETWORKS = networks()


def rows(shape: tuple[int, ...], count: int = 4) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))


def answers(network: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return network(inputs)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    """Within ``tolerance`` of the largest answer."""
    return found.shape == expected.shape and float((found - expected).abs().max() / expected.abs().max()) <= tolerance


@pytest.mark.parametrize("block", [None, (4, 4), (1, 16)])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_file_answers_as_the_network(name, block, tmp_path):
    network, shape = NETWORKS[name]
    state = {key: value.clone() for key, value in network.state_dict().items()}
    network.train()
    size = export(network, tmp_path / "a.pykd.safetensors", rows(shape, 1), block=block)
    assert network.training
    assert all(value.equal(state[key]) for key, value in network.state_dict().items())
    assert size == (tmp_path / "a.pykd.safetensors").stat().st_size
    assert close(answers(load(tmp_path / "a.pykd.safetensors"), rows(shape)), answers(network.eval(), rows(shape)))


@pytest.mark.parametrize("values", ["float16", "bfloat16", "int8"])
@pytest.mark.parametrize("name", ["mlp", "everything"])
def test_other_types_answer_nearly_so(name, values, tmp_path):
    network, shape = NETWORKS[name]
    whole = export(network, tmp_path / "a.pykd.safetensors", rows(shape, 1))
    size = export(network, tmp_path / "a.pykd.safetensors", rows(shape, 1), values=values)
    assert size < whole
    found = answers(load(tmp_path / "a.pykd.safetensors"), rows(shape))
    assert close(found, answers(network, rows(shape)), 0.05)


def test_every_operator_comes_out_of_a_network():
    found = {op.kind for network, shape in NETWORKS.values() for op in trace(network, rows(shape, 1))[1]}
    assert found == KINDS.keys()


def test_batch_norm_is_folded_where_a_layer_stands_before_it():
    layers = nn.Sequential(
        nn.BatchNorm2d(2), nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 6), nn.BatchNorm1d(6)
    )
    ops = trace(pruned(layers, 1.0), rows((2, 4, 4), 1))[1]
    assert [op.kind for op in ops] == ["affine", "conv2d", "flatten", "linear"]


def test_batch_norm_of_a_result_with_two_readers_stays():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return self.norm(y) + y

    ops = trace(pruned(Twice(), 1.0), rows((3,), 1))[1]
    assert [op.kind for op in ops] == ["linear", "affine", "add"]


def test_dead_units_are_left_out():
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        network[2].weight[:, 2:7] = 0
    ops = trace(network, torch.zeros(1, 6))[1]
    assert [op.weight.shape for op in ops if op.weight] == [(3, 6), (3, 3)]


def test_a_layer_used_twice_and_what_the_answer_does_not_need():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.unread = nn.Linear(4, 4), nn.Linear(4, 9)

        def forward(self, x: Tensor) -> Tensor:
            self.unread(x)
            return self.layer(torch.relu(self.layer(x)))

    ops = trace(Shared().eval(), rows((4,), 1))[1]
    assert [op.kind for op in ops] == ["linear", "relu", "linear"]


class InPlace(nn.Module):
    """What is written over is read as it then is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.relu = nn.Linear(4, 4), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        z = self.relu(y)
        return z + y


def test_layers_that_work_in_place(tmp_path):
    export(InPlace(), tmp_path / "a.pykd.safetensors", rows((4,), 1))
    network = InPlace()
    export(network, tmp_path / "a.pykd.safetensors", rows((4,), 1))
    assert close(answers(load(tmp_path / "a.pykd.safetensors"), rows((4,))), answers(network, rows((4,))))


class ChangesItsInput(nn.Module):
    """The layer reads what the flattened view was written over with."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.relu = nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        self.relu(x.flatten(1))
        return self.layer(x)


def test_networks_that_change_their_input_are_refused_or_right(tmp_path):
    network, given = ChangesItsInput(), rows((1, 5, 5))
    with pytest.raises(PykdError, match="beside the network itself"):
        export(network, tmp_path / "a.pykd.safetensors", given)
    assert given.equal(rows((1, 5, 5)))


def test_what_the_file_says(tmp_path):
    network, shape = NETWORKS["mlp"]
    about = {"normalization": ((0.25,), (0.5,)), "class_names": list("0123456789"), "licence": "CC0-1.0"}
    export(network, tmp_path / "a.pykd.safetensors", rows(shape, 1), provenance={"seed": 7}, **about)
    model = read(tmp_path / "a.pykd.safetensors")
    assert model.normalization == ((0.25,), (0.5,))
    assert "".join(model.class_names) == "0123456789"
    assert dict(model.provenance) == {"pykd": pykd.__version__, "seed": 7}
    assert model.licence == "CC0-1.0"
    pixels = torch.randint(0, 256, (4, *shape), dtype=torch.uint8)
    expected = answers(network, (pixels / 255 - 0.25) / 0.5)
    assert close(answers(load(tmp_path / "a.pykd.safetensors"), pixels), expected)


def test_pixels_need_a_normalization_and_rows_their_shape(tmp_path):
    export(nn.Linear(4, 2), tmp_path / "a.pykd.safetensors", torch.zeros(1, 4))
    network = load(tmp_path / "a.pykd.safetensors")
    with pytest.raises(PykdError, match="does not say how pixels are normalised"):
        network(torch.zeros(1, 4, dtype=torch.uint8))
    with pytest.raises(PykdError, match=r"takes \[rows, 4\], got \[1, 5\]"):
        network(torch.zeros(1, 5))


def test_half_and_double_networks_are_exported_in_float32(tmp_path):
    for dtype in (torch.float64, torch.bfloat16):
        network = nn.Linear(4, 2).to(dtype)
        export(network, tmp_path / "a.pykd.safetensors", torch.zeros(1, 4, dtype=dtype))
        found = answers(load(tmp_path / "a.pykd.safetensors"), rows((4,)))
        assert close(found, answers(copy.deepcopy(network).float(), rows((4,))))


def test_the_same_network_gives_the_same_file(tmp_path):
    network, shape = NETWORKS["residual"]
    hashes = set()
    for name in ("a", "b"):
        export(network, tmp_path / f"{name}.pykd.safetensors", rows(shape, 1))
        hashes.add(hashlib.sha256((tmp_path / f"{name}.pykd.safetensors").read_bytes()).hexdigest())
    assert len(hashes) == 1


def test_resnet18_of_torchvision(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    network = pruned(torchvision.models.resnet18(num_classes=7), 0.1)
    export(network, tmp_path / "a.pykd.safetensors", rows((3, 32, 32), 1))
    found = answers(load(tmp_path / "a.pykd.safetensors"), rows((3, 32, 32), 2))
    assert close(found, answers(network, rows((3, 32, 32), 2)))


class Calls(nn.Module):
    """A network of one call."""

    def __init__(self, call) -> None:
        super().__init__()
        self.call = call
        self.layer = nn.Conv2d(2, 2, 1)
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, self.layer(x))


def branch(network: nn.Module, x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


REFUSED = [
    (nn.Sequential(nn.Conv2d(2, 2, 1), nn.Sequential(nn.GELU())), r"1\.0 \(GELU\) cannot be exported"),
    (nn.Sequential(nn.Linear(6, 3)), r"0 \(Linear\).*it works on \[2, 6, 6\], not on features"),
    (nn.Sequential(nn.ConvTranspose2d(2, 2, 1)), r"0 \(ConvTranspose2d\) cannot be exported"),
    (nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")), r"0 \(Conv2d\).*it pads with reflect"),
    (nn.Sequential(nn.Conv2d(2, 2, 2, padding="same")), "it pads one side more than the other"),
    (nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False)), "it has no running statistics"),
    (nn.Sequential(nn.AdaptiveAvgPool2d(4)), r"its windows are unequal on an image of \[6, 6\]"),
    (nn.Sequential(nn.AvgPool2d(2, divisor_override=3)), r"0 \(AvgPool2d\).*divides by a number of its own"),
    (nn.Sequential(nn.Softmax(dim=2)), r"0 \(Softmax\).*another side than the first"),
    (nn.Sequential(nn.Flatten(2)), "rows another shape than a flat one"),
    (nn.Sequential(nn.Flatten(0)), "rows another shape than a flat one"),
    (Calls(lambda network, x: x * network.factor), "mul in the network cannot be exported"),
    (Calls(lambda network, x: x + network.factor), "add in the network.*one layer's result"),
    (Calls(lambda network, x: x + 1), "add in the network.*one layer's result"),
    (Calls(lambda network, x: torch.add(x, x, alpha=2)), "it scales what it adds"),
    (Calls(lambda network, x: torch.cat([x, x], 2)), "cat in the network.*another side than the first"),
    (Calls(lambda network, x: x.mean(1)), "it is no mean over the places"),
    (Calls(lambda network, x: x.sigmoid()), "sigmoid in the network"),
    (Calls(lambda network, x: F.dropout(x, 0.5, True)), "at random"),
    (Calls(lambda network, x: (x, x)), "output.*one layer's result"),
    (Calls(branch), "cannot be traced"),
    (Calls(lambda network, x: x / 0), "cannot be exported"),
]  # fmt: skip


@pytest.mark.parametrize(("network", "sentence"), REFUSED, ids=[each[1] for each in REFUSED])
def test_what_the_file_cannot_hold_is_refused_by_name(network, sentence, tmp_path):
    with pytest.raises(PykdError, match=sentence) as caught:
        export(network, tmp_path / "a.pykd.safetensors", torch.ones(1, 2, 6, 6))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_layer_with_a_forward_of_its_own_is_another_layer(tmp_path):
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    with pytest.raises(PykdError, match="cannot be exported"):
        export(nn.Sequential(Doubled(3, 3)), tmp_path / "a.pykd.safetensors", torch.zeros(1, 3))


def test_variational_layers_say_how_they_become_plain(tmp_path):
    network = pykd.nn.variational(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(PykdError, match=r"0 \(VariationalLinear\).*pykd\.nn\.plain"):
        export(network, tmp_path / "a.pykd.safetensors", torch.zeros(1, 3))


def test_sparse_layers_say_what_to_export(tmp_path):
    network = nn.Sequential(pykd.nn.SparseLinear.from_dense(nn.Linear(3, 3)))
    with pytest.raises(PykdError, match=r"0 \(SparseLinear\) is sparse already: export the dense network"):
        export(network, tmp_path / "a.pykd.safetensors", torch.zeros(1, 3))


def test_hooks_are_found_out(tmp_path):
    network = nn.Sequential(nn.Linear(3, 3))
    network[0].register_forward_hook(lambda module, inputs, output: output + 1)
    with pytest.raises(PykdError, match="beside the network itself"):
        export(network, tmp_path / "a.pykd.safetensors", torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("network", "options", "sentence"),
    [
        (nn.Linear(3, 2), {"values": "int4"}, "values should be one of float32, float16, bfloat16, int8"),
        (nn.Linear(3, 2), {"block": (0, 1)}, "linear in step 1 cannot be exported: block should be"),
        (nn.Linear(3, 2), {"class_names": ["a"]}, "classes should be words, none or one for each of 2 answers"),
        (nn.Linear(3, 2), {"normalization": ((0.0,), (1.0,))}, "a mean and a positive std for each of 3 channels"),
        (nn.Linear(3, 2), {"provenance": {"seed": 0.5}}, "provenance should map words"),
        (nn.Linear(3, 2), {"licence": "two\nlines"}, "licence should be a line"),
    ],
)
def test_broken_rules_say_which(network, options, sentence, tmp_path):
    with pytest.raises(PykdError, match=sentence):
        export(network, tmp_path / "a.pykd.safetensors", torch.zeros(1, 3), **options)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_refused(tmp_path):
    network = nn.Linear(3, 2)
    with torch.no_grad():
        network.weight[0, 0] = np.inf
    with pytest.raises(PykdError, match="a sparse weight should be finite"):
        export(network, tmp_path / "a.pykd.safetensors", torch.zeros(1, 3))


@pytest.mark.parametrize("example", [torch.zeros(3), torch.zeros(0, 3), torch.zeros(1, 4), None])
def test_an_example_of_another_shape_is_refused(example, tmp_path):
    with pytest.raises(PykdError, match="example"):
        export(nn.Linear(3, 2), tmp_path / "a.pykd.safetensors", example)


def test_a_file_that_stood_there_is_replaced(tmp_path):
    path = tmp_path / "a.pykd.safetensors"
    path.write_bytes(b"before")
    export(nn.Linear(3, 2), path, torch.zeros(1, 3))
    assert read(path).output_shape == (2,)
    with pytest.raises(PykdError, match="cannot write"):
        export(nn.Linear(3, 2), tmp_path / "nowhere" / "a.pykd.safetensors", torch.zeros(1, 3))


def test_a_file_s_network_can_be_described_and_moved():
    network, shape = NETWORKS["lenet5"]
    model = described(network, rows(shape, 1))
    loaded = pykd.deploy.network.FileNetwork(model)
    kept = sum(op.weight.nnz for op in model.ops if op.weight)
    assert sum(int(each.count_nonzero()) for name, each in loaded.named_parameters() if "weight" in name) == kept
    assert not any(each.requires_grad for each in loaded.parameters())
    copied = copy.deepcopy(loaded)
    assert copied(rows(shape)).equal(loaded(rows(shape)))


def test_residual_and_everything_hold_what_they_say():
    assert {"add", "concat"} <= {op.kind for op in trace(Everything().eval(), rows((3, 17, 16), 1))[1]}
    assert [op.kind for op in trace(Residual(2, 4, 2).eval(), rows((2, 6, 6), 1))[1]].count("conv2d") == 3
