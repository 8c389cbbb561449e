"""Physical removal: equal outputs on every network, and as small as its dead units allow."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from pykd import models
from pykd.errors import PykdError
from pykd.pruning import flops, prunable, remove_dead

EXAMPLES = settings(derandomize=True, deadline=None, max_examples=60)


def size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def widths(network: nn.Module) -> list[int]:
    """Output units of the layers with weights, in order."""
    return [len(layer.weight) for layer in network.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]


@torch.no_grad()
def lively(network: nn.Module) -> nn.Module:
    """No parameter or statistic has the value that it begins with."""
    for layer in network.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for tensor in (layer.weight, layer.running_var):
                if tensor is not None:
                    tensor.uniform_(0.5, 1.5)
            for tensor in (layer.bias, layer.running_mean):
                if tensor is not None:
                    tensor.normal_()
    return network.eval()


@torch.no_grad()
def removed(network: nn.Module, inputs: Tensor) -> nn.Module:
    """What is left, with what has to hold for every network."""
    before = copy.deepcopy(network.state_dict())
    small = remove_dead(network, inputs[:1])
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    for batch in (inputs, inputs[:1]):
        expected = network(batch)
        torch.testing.assert_close(small(batch), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert size(small) <= size(network)
    assert flops(small, inputs) <= flops(network, inputs)
    assert before.keys() <= small.state_dict().keys()
    assert {name.rpartition(".")[2] for name in small.state_dict().keys() - before.keys()} <= {"bias"}
    again = remove_dead(small, inputs[:1])
    assert size(again) == size(small)
    again.load_state_dict(copy.deepcopy(small).state_dict())
    return small


class Sum(nn.Module):
    def __init__(self, *terms: nn.Module) -> None:
        super().__init__()
        self.terms = nn.ModuleList(terms)

    def forward(self, x: Tensor) -> Tensor:
        total = self.terms[0](x)
        for term in list(self.terms)[1:]:
            total = total + term(x)
        return total


class Side(Sum):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([term(x) for term in self.terms], 1)


class Call(nn.Module):
    """A function as a layer, seen by the tracer as the function's own operations."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.ReLU,
    lambda: nn.ReLU(inplace=True),
    lambda: nn.LeakyReLU(0.1),
    nn.Tanh,
    nn.Sigmoid,
    nn.Identity,
    lambda: nn.Dropout(0.5),
    lambda: Call(F.relu),
    lambda: Call(lambda x: F.leaky_relu(x, 0.2)),
    lambda: Call(lambda x: F.dropout(x, 0.5, training=False).tanh()),
    lambda: Call(lambda x: x.clone().relu_()),
    lambda: nn.Softmax(1),  # of all channels together
    lambda: Call(lambda x: x * x.sigmoid()),
]
POOLINGS: list[Callable[[], nn.Module]] = [
    lambda: nn.MaxPool2d(2, ceil_mode=True),
    lambda: nn.MaxPool2d(3, 1, padding=1),
    lambda: nn.AvgPool2d(2, ceil_mode=True),
    lambda: nn.AvgPool2d(3, 2, padding=1),
    lambda: nn.AvgPool2d(3, 1, padding=1, count_include_pad=False),
    lambda: Call(lambda x: F.avg_pool2d(x, 3, 1, 1)),
    lambda: Call(lambda x: F.max_pool2d(x, 2, ceil_mode=True)),
]
FLATTENINGS: list[Callable[[], nn.Module]] = [
    nn.Flatten,
    lambda: Call(lambda x: x.view(x.size(0), -1)),
    lambda: Call(lambda x: x.reshape(-1, x[0].numel())),
    lambda: Call(lambda x: x.mean((2, 3))),
    lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    lambda: nn.Sequential(nn.AdaptiveMaxPool2d((2, 1)), Call(lambda x: torch.flatten(x, 1))),
]
WIDTH = st.integers(1, 5)


@st.composite
def convolutions(draw: Any, inputs: int, outputs: int, side: int, same: bool = False) -> nn.Sequential:
    kernel, padding = draw(st.sampled_from([(1, 0), (3, 1)] + ([(3, 0)] if side >= 3 and not same else [])))
    mode = draw(st.sampled_from(["zeros", "zeros", "replicate"]))
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, padding=padding, bias=draw(st.booleans()), padding_mode=mode)
    ]
    if draw(st.booleans()):
        layers.append(nn.BatchNorm2d(outputs, affine=draw(st.booleans())))
        if draw(st.booleans()):
            layers[-1].bias = None
    return nn.Sequential(*layers, draw(st.sampled_from(ACTIVATIONS))())


@st.composite
def blocks(draw: Any, channels: int, side: int) -> nn.Module:
    kind = draw(st.sampled_from(["plain", "plain", "residual", "projection", "concat", "depthwise", "grouped", "pool"]))
    width, inner = draw(WIDTH), draw(WIDTH)
    if kind == "residual":
        body = draw(convolutions(channels, inner, side, True)), draw(convolutions(inner, channels, side, True))
        return nn.Sequential(Sum(nn.Identity(), nn.Sequential(*body)), draw(st.sampled_from(ACTIVATIONS))())
    if kind == "projection":
        return Sum(*(draw(convolutions(channels, width, side, True)) for _ in range(2)))
    if kind == "concat":
        terms = [draw(convolutions(channels, each, side, True)) for each in (width, inner)]
        return Side(*terms, *([nn.Identity()] if draw(st.booleans()) else []))
    if kind == "depthwise":
        padding, times = draw(st.integers(0, 1)) if side >= 3 else 1, draw(st.integers(1, 2))
        return nn.Conv2d(channels, times * channels, 3, padding=padding, groups=channels, bias=draw(st.booleans()))
    if kind == "grouped" and channels % 2 == 0:
        return nn.Conv2d(channels, 2 * width, 1, groups=2)
    if kind == "pool":
        return draw(st.sampled_from(POOLINGS))()
    return draw(convolutions(channels, width, side))


@st.composite
def networks(draw: Any) -> tuple[nn.Module, Tensor]:
    """A random network with random units and channels zeroed on either side, and inputs for it."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    inputs = torch.randn(3, draw(st.integers(1, 3)), 6, 5)
    layers: list[nn.Module] = []
    x = inputs
    for _ in range(draw(st.integers(0, 4))):
        layers.append(draw(blocks(x.shape[1], min(x.shape[2:]))))
        x = layers[-1].eval()(x)
    layers.append(draw(st.sampled_from(FLATTENINGS))())
    features = layers[-1](x).shape[1]
    for _ in range(draw(st.integers(0, 3))):
        layers.append(nn.Linear(features, features := draw(st.integers(1, 8)), bias=draw(st.booleans())))
        if draw(st.booleans()):
            layers.append(nn.BatchNorm1d(features))
        layers.append(draw(st.sampled_from(ACTIVATIONS))())
    network = lively(nn.Sequential(*layers, nn.Linear(features, 4)))
    for layer in network.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            rows, columns = (draw(st.sampled_from([0.0, 0.3, 0.6, 1.0])) for _ in range(2))
            silent = torch.rand(len(layer.weight)) < rows
            layer.weight.data[silent] = 0
            layer.weight.data[:, torch.rand(layer.weight.shape[1]) < columns] = 0
            if layer.bias is not None and draw(st.booleans()):
                layer.bias.data[silent] = 0
    return network, inputs


@EXAMPLES
@given(networks())
def test_outputs_are_equal_on_random_networks(case: tuple[nn.Module, Tensor]) -> None:
    removed(*case)


@st.composite
def chains(draw: Any) -> tuple[nn.Sequential, Tensor, list[int]]:
    """A network without branches, in which some units of every hidden layer are dead, inputs, and the widths left."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    inputs, convolutional = torch.randn(3, 2, 8, 8), draw(st.booleans())
    layers: list[nn.Module] = []
    features = 2
    for _ in range(draw(st.integers(1, 2)) if convolutional else 0):
        layers.append(nn.Conv2d(features, features := draw(st.integers(2, 6)), 3, bias=draw(st.booleans())))
        layers += [nn.BatchNorm2d(features)] * draw(st.integers(0, 1)) + [draw(st.sampled_from(ACTIVATIONS[:11]))()]
    layers += [nn.MaxPool2d(2)] * draw(st.integers(0, 1)) + [nn.Flatten()]
    features = nn.Sequential(*layers).eval()(inputs).shape[1]
    for _ in range(draw(st.integers(0 if convolutional else 1, 3))):
        layers.append(nn.Linear(features, features := draw(st.integers(2, 9)), bias=draw(st.booleans())))
        layers += [nn.BatchNorm1d(features)] * draw(st.integers(0, 1)) + [draw(st.sampled_from(ACTIVATIONS[:11]))()]
    network = nn.Sequential(*layers, nn.Linear(features, 3))
    lively(network)
    weighted = [layer for layer in network if isinstance(layer, (nn.Linear, nn.Conv2d))]
    left = []
    for layer, reader in itertools.pairwise(weighted):
        dead = draw(st.sets(st.integers(0, len(layer.weight) - 1), max_size=len(layer.weight) - 1))
        columns = reader.weight.data.unflatten(1, (len(layer.weight), -1))
        for unit in dead:
            if draw(st.booleans()):
                layer.weight.data[unit] = 0  # reads nothing: a constant
            else:
                columns[:, unit] = 0  # is not read
        left.append(len(layer.weight) - len(dead))
    return network, inputs, [*left, 3]


@EXAMPLES
@given(chains())
def test_chains_lose_every_dead_unit_and_no_other(case: tuple[nn.Sequential, Tensor, list[int]]) -> None:
    network, inputs, left = case
    small = removed(network, inputs)
    assert widths(small) == left
    if left != widths(network):
        assert size(small) < size(network)
        assert flops(small, inputs) < flops(network, inputs)


@torch.no_grad()
def test_perceptron_with_nine_tenths_of_a_layer_unread() -> None:
    network = models.build("mlp", in_shape=(1, 28, 28), classes=10, widths=[500, 50], dropout=0.5).eval()
    layers = [layer for layer in network if isinstance(layer, nn.Linear)]
    layers[1].weight[:, torch.randperm(500)[:450]] = 0
    small = removed(network, torch.randn(4, 1, 28, 28))
    assert widths(small) == [50, 50, 10]
    assert flops(small, torch.zeros(1, 1, 28, 28)) == 784 * 50 + 50 * 50 + 50 * 10


@pytest.mark.parametrize("side", ["rows", "columns"])
@pytest.mark.parametrize("name", ["lenet5", "lenet5_caffe", "modified_lenet", "nin", "shallow_cnn", "vgg"])
@torch.no_grad()
def test_half_of_every_hidden_layer_of_the_papers_networks(name: str, side: str) -> None:
    torch.manual_seed(0)
    arguments = {"width": 1 / 16} if name == "vgg" else {}
    network = lively(models.build(name, in_shape=(3, 32, 32), classes=10, **arguments))
    weighted = [layer for layer in network if isinstance(layer, (nn.Linear, nn.Conv2d))]
    norms = {id(layer): norm for layer, norm in zip(network, list(network)[1:], strict=False)}
    for layer, reader in itertools.pairwise(weighted):
        dead = torch.arange(len(layer.weight)) % 2 == 0
        if side == "rows":  # zeroes after the activation too, as padded convolutions have to read
            layer.weight[dead] = 0
            last = norms[id(layer)] if isinstance(norms[id(layer)], (nn.BatchNorm1d, nn.BatchNorm2d)) else layer
            last.bias[dead] = 0
            if last is not layer:
                last.running_mean[dead] = 0
        else:
            reader.weight.unflatten(1, (len(dead), -1))[:, dead] = 0
    small = removed(network, torch.randn(2, 3, 32, 32))
    assert widths(small) == [width // 2 for width in widths(network)[:-1]] + [10]


@pytest.mark.parametrize("number", [0, 1, 2])
@torch.no_grad()
def test_a_layer_of_zeroes_leaves_one_unit_a_layer(number: int) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    network[2 * number].weight.zero_()
    inputs = torch.randn(7, 6)
    small = removed(network, inputs)
    assert widths(small) == [1, 1, 3]
    torch.testing.assert_close(small(inputs), network(inputs[:1]).expand(7, 3))


@torch.no_grad()
def resnet(zeroes: Callable[[nn.Module], None]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    network = lively(torchvision.models.resnet18(num_classes=5))
    zeroes(network)
    return network, removed(network, torch.randn(2, 3, 40, 40))


def test_resnet_loses_channels_inside_a_block() -> None:
    def zeroes(network: Any) -> None:
        network.layer1[0].conv2.weight[:, :20] = 0
        network.layer3[1].conv2.weight[:, 100:] = 0

    network, small = resnet(zeroes)
    assert small.get_submodule("layer1.0.conv1").out_channels == 44
    assert small.get_submodule("layer1.0.bn1").running_var.shape == (44,)
    assert small.get_submodule("layer3.1.conv2").in_channels == 100
    assert widths(small)[-1] == 5
    assert size(network) - size(small) == 20 * (64 * 9 * 2 + 2) + 156 * (256 * 9 * 2 + 2)


@pytest.mark.parametrize("branches", [1, 2, 3])
def test_resnet_loses_a_channel_of_a_sum_that_no_branch_needs(branches: int) -> None:
    def zeroes(network: Any) -> None:
        ends = [(network.layer4[0].conv2, network.layer4[0].bn2)]
        ends += [tuple(network.layer4[0].downsample), (network.layer4[1].conv2, network.layer4[1].bn2)]
        for convolution, norm in ends[:branches]:
            convolution.weight[:3] = 0
            norm.running_mean[:3] = 0
            norm.bias[:3] = 0

    _, small = resnet(zeroes)
    left = 509 if branches == 3 else 512
    assert small.get_submodule("layer4.0.conv2").out_channels == left
    assert small.get_submodule("layer4.0.downsample.0").out_channels == left
    assert small.get_submodule("layer4.1.conv1").in_channels == left
    assert small.get_submodule("fc").in_features == left


def test_resnet_loses_a_channel_of_a_sum_that_nobody_reads() -> None:
    def zeroes(network: Any) -> None:
        for reader in (network.layer4[1].conv1, network.fc):
            reader.weight[:, 7] = 0

    _, small = resnet(zeroes)
    assert small.get_submodule("layer4.1.conv2").out_channels == 511
    assert small.get_submodule("fc").in_features == 511


@pytest.mark.parametrize(
    ("value", "arguments", "left"),
    [
        (0.5, {"padding": 1}, 4),
        (0.5, {"padding": "same"}, 4),
        (0.5, {"padding": "valid"}, 3),
        (0.5, {"padding": 0}, 3),
        (0.5, {"padding": 1, "padding_mode": "reflect"}, 3),
        (0.5, {"padding": 1, "bias": False}, 4),
        (0.5, {"bias": False}, 3),
        (-0.5, {"padding": 1}, 3),  # zero after ReLU
        (0.0, {"padding": "same"}, 3),
    ],
)
@torch.no_grad()
def test_a_constant_channel_goes_where_a_bias_can_stand_for_it(
    value: float, arguments: dict[str, Any], left: int
) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 3, **arguments), nn.ReLU())
    network[0].weight[1] = 0
    network[0].bias[1] = value
    small = removed(network, torch.randn(2, 2, 5, 5))
    assert widths(small) == [left, 3]
    assert (small.get_submodule("2").bias is None) == (network[2].bias is None and left == 4)


@pytest.mark.parametrize("dead", [1, 2])
@torch.no_grad()
def test_a_sum_of_constants_is_one(dead: int) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(Sum(nn.Linear(4, 3), nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 2))
    for term in list(network[0].terms)[:dead]:
        term.weight[1] = 0
    assert widths(removed(network, torch.randn(5, 4))) == ([2, 2, 2] if dead == 2 else [3, 3, 2])


@torch.no_grad()
def test_what_is_removed_does_not_depend_on_the_size_of_the_example() -> None:
    """On one pixel every map is constant, at other sizes the borders of a padded layer are not."""
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.AvgPool2d(3, 1, 1), nn.Conv2d(4, 4, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
    )
    network[0].weight[:2] = 0
    network[1].weight[:2] = 0
    network[1].weight[2, 2:] = 0
    small = remove_dead(network, torch.zeros(1, 2, 1, 1))
    for side in (1, 2, 5):
        images = torch.randn(2, 2, side, side)
        torch.testing.assert_close(small(images), network(images))


@torch.no_grad()
def test_a_normalisation_of_scale_zero_is_a_constant() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    lively(network)
    network[1].weight[2:] = 0
    assert widths(removed(network, torch.randn(5, 3))) == [2, 2]


@torch.no_grad()
def test_normalisation_by_the_batch_is_followed() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.ReLU(), nn.Linear(4, 2))
    network[0].weight[0] = 0
    network[3].weight[:, 3] = 0
    small = remove_dead(network, torch.randn(5, 3))
    inputs = torch.randn(5, 3)
    torch.testing.assert_close(small(inputs), network(inputs))
    assert widths(small) == [3, 2]


@torch.no_grad()
def test_a_removed_layer_before_it_makes_more_units_dead() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    network[4].weight[:, :2] = 0
    network[2].weight[2:, 1:] = 0  # the units that are read read the first alone
    assert widths(removed(network, torch.randn(3, 4))) == [1, 2, 2]


class Twice(nn.Module):
    """One layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.two(self.one(self.one(x)).relu()).relu())


class Tied(Twice):
    """One weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.two(self.one(x).relu()).relu())


class Functional(Twice):
    """A layer whose weight is used outside it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.linear(self.one(x), self.two.weight).relu() + self.two(x))


class Overwritten(Twice):
    """What is read is no longer the constant that the layer made."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(self.one(x))
        z = y.view(-1, 4)
        y.relu_()
        return self.out(z)


class Sizes(Twice):
    """The number of units is used."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return self.out(self.two(y / y.shape[1]))


class Keywords(Twice):
    """Inputs by name."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.two(input=torch.flatten(input=self.one(x), start_dim=1)).relu())


class Defaults(Twice):
    def forward(self, x: Tensor, mask: Tensor | None = None, *, deep: bool = False) -> Tensor:
        y = self.two(x) if deep or mask is not None else self.two(self.one(x))
        return self.out(y)


class Partly(Twice):
    """A part of it cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = Branch()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.two(self.branch(self.one(x))))


class Branch(nn.Module):
    def forward(self, x: Tensor, _: object = None) -> Tensor:
        return x if x.sum() > 0 else -x


class Dropped(Twice):
    """A function that works as in training, here the same at every call."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.dropout(self.two(self.one(x)), 1.0))


class Pair(Twice):
    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = self.one(x)
        return self.out(self.two(y)), {"hidden": y}


def hooked() -> nn.Module:
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
    network[2].register_forward_hook(lambda layer, inputs, output: output + 1)
    return network


@pytest.mark.parametrize(
    ("build", "left"),
    [
        (Twice, [4, 2, 2]),
        (Tied, [4, 4, 2]),
        (Functional, [4, 4, 2]),
        (Overwritten, [2, 4, 2]),
        (Sizes, [4, 2, 2]),
        (Keywords, [4, 4, 2]),
        (Defaults, [2, 2, 2]),
        (Partly, [4, 2, 2]),
        (Dropped, [2, 4, 2]),
        (hooked, [4, 4, 2]),
    ],
)
@torch.no_grad()
def test_what_is_not_understood_stays_and_is_right(build: Callable[[], nn.Module], left: list[int]) -> None:
    torch.manual_seed(0)
    network = build().eval()
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    for layer in layers[:-1]:
        layer.weight[0] = 0
        layer.weight[1] = 0
        layer.bias[:2] = torch.tensor([-1.0, 2.0])
    assert widths(removed(network, torch.randn(6, 4))) == left


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.cat([x, x], 2),
        lambda x: torch.cat([x, x]).unflatten(0, (2, -1)).sum(0),
        lambda x: x.mean(1, keepdim=True),
        lambda x: x.mean((1, 2)),
        lambda x: x + 1,
        lambda x: x + x.mean((2, 3), keepdim=True),
        lambda x: x + x[:, :1],
        lambda x: torch.add(x, x, alpha=2),
        lambda x: x - x.relu(),
        lambda x: x.transpose(1, 2),
        lambda x: x.flatten(2),
        lambda x: x.reshape(-1, 2, 8, 4),
        lambda x: x.softmax(1),
        lambda x: F.pad(x, (1, 1)),
        lambda x: F.avg_pool2d(x, 2, divisor_override=3),
        lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    ],
)
@torch.no_grad()
def test_functions_that_mix_channels_with_places_are_left_alone(function: Callable[[Tensor], Tensor]) -> None:
    """There are as many channels as rows and columns, so that shapes alone do not tell them apart."""
    torch.manual_seed(0)
    inputs = torch.randn(4, 2, 4, 4)
    first = nn.Conv2d(2, 4, 1)
    first.weight[:2] = 0
    first.bias[:3] = torch.tensor([0.5, -0.5, 0.0])
    body = nn.Sequential(first, Call(function), nn.Tanh(), nn.Flatten())
    last = nn.Linear(body(inputs).shape[1], 3)
    last.weight[:, ::2] = 0
    last.weight[:, -2:] = 0
    removed(nn.Sequential(body, last), inputs)


@torch.no_grad()
def test_a_depthwise_filter_of_zeroes_takes_its_channel_along() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 5, 1), nn.ReLU(), nn.Conv2d(5, 5, 3, padding=1, groups=5), nn.Conv2d(5, 2, 1))
    network[2].weight[[0, 3]] = 0
    small = removed(network, torch.randn(2, 2, 4, 4))
    assert widths(small) == [3, 3, 2]
    assert small.get_submodule("2").groups == 3


@torch.no_grad()
def test_sizes_written_in_forward_are_no_hindrance() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 4, 1), Call(lambda x: x.view(-1, 4 * 3 * 3)), nn.Linear(36, 2))
    network[0].weight[1] = 0
    small = removed(network, torch.randn(5, 2, 3, 3))
    assert widths(small) == [3, 2]
    assert small.get_submodule("2").in_features == 27


@torch.no_grad()
def test_every_output_of_the_network_stays() -> None:
    network = Pair()
    network.one.weight[0] = 0
    network.two.weight[:2] = 0
    small, inputs = remove_dead(network, torch.randn(1, 4)), torch.randn(5, 4)
    torch.testing.assert_close(small(inputs), network(inputs))
    assert widths(small) == [4, 2, 2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtype_mode_and_what_is_trainable_stay(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4, bias=False), nn.Linear(4, 2)).to(dtype)
    network[0].weight.data[0] = 0
    network[2].weight.requires_grad_(False)[0] = 0
    small, inputs = remove_dead(network, torch.zeros(1, 4, dtype=dtype)), torch.randn(5, 4, dtype=dtype)
    assert network.training
    assert not small.training
    trainable = {name: value.requires_grad for name, value in small.named_parameters()}
    assert trainable == {name: not name.startswith("2") for name in [*dict(network.named_parameters()), "2.bias"]}
    assert {value.dtype for value in small.parameters()} == {dtype}
    assert widths(small) == [3, 3, 2]
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(small(inputs), network.eval()(inputs), rtol=tolerance, atol=tolerance)
    small.train()(inputs).sum().backward()
    assert small.get_submodule("0").weight.grad.shape == (3, 4)


class Odd(nn.Module):
    """Neither its part nor the call of its part can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Branch()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x, object())


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        z = y
        y += 1
        return y + z


def test_says_what_cannot_be_traced() -> None:
    with pytest.raises(PykdError, match=r"the forward of Branch cannot be traced by torch\.fx"):
        remove_dead(Branch(), torch.ones(1, 4))
    with pytest.raises(PykdError, match="the forward of part in Odd cannot be traced"):
        remove_dead(Odd(), torch.ones(1, 4))
    with pytest.raises(PykdError, match=r"torch\.fx sees another network than InPlace in its forward"):
        remove_dead(InPlace(), torch.ones(1, 4))


def test_says_when_the_example_does_not_fit() -> None:
    with pytest.raises(PykdError, match=r"Linear does not run on an example of shape \[1, 3\]"):
        remove_dead(nn.Linear(4, 2), torch.ones(1, 3))


def listed(network: nn.Module, inputs: Tensor) -> dict[str, list[bool]]:
    """The layers that can be pruned, in order: which of their inputs are their own."""
    return {layer.name: layer.own.tolist() for layer in prunable(network, inputs)}


def firsts(network: nn.Module, inputs: Tensor) -> list[str]:
    return [layer.name for layer in prunable(network, inputs) if layer.first]


@pytest.mark.parametrize(
    ("name", "side", "skipped"),
    [
        ("resnet20", 32, []),
        ("resnet56", 32, [16, 20, 38, 54]),
        ("resnet18", 28, []),
        ("resnet18", 64, []),
        ("resnet34", 64, [6, 12, 14, 24]),
    ],
)
def test_second_convolutions_of_residual_blocks_have_inputs_of_their_own(
    name: str, side: int, skipped: list[int]
) -> None:
    """Cross distillation's code prunes those of every other one, 1x1 ones not counted, but for those it skips."""
    network = models.build(name, in_shape=(3, side, side), classes=10)
    layers = prunable(network, torch.zeros(1, 3, side, side))
    kernels = [layer for layer in layers if getattr(network.get_submodule(layer.name), "kernel_size", (1, 1)) > (1, 1)]
    depth = int(name.removeprefix("resnet"))
    assert len(kernels) == depth - 1
    own = [index for index, layer in enumerate(kernels) if layer.own.all()]
    assert own == list(range(2, depth - 1, 2))
    assert set(skipped) < set(own)
    assert sum(bool(layer.own.any()) for layer in layers) == len(own)
    assert [layer.name for layer in layers if layer.first] == [layers[0].name]


def test_bottlenecks_have_two_layers_with_inputs_of_their_own() -> None:
    found = listed(models.build("resnet50", in_shape=(3, 32, 32), classes=10), torch.zeros(1, 3, 32, 32))
    assert len(found) == 54
    for name, own in found.items():
        assert set(own) == {name.endswith(("conv2", "conv3"))}


@pytest.mark.parametrize(
    ("name", "arguments", "count"),
    [("vgg", {"width": 0.1}, 15), ("vgg13", {"width": 0.1}, 11), ("vgg16", {"width": 0.1}, 14), ("lenet5", {}, 5)],
)
def test_all_inputs_of_a_chain_but_the_first_are_own(name: str, arguments: dict[str, Any], count: int) -> None:
    layers = prunable(models.build(name, in_shape=(3, 32, 32), classes=10, **arguments), torch.zeros(1, 3, 32, 32))
    assert [set(layer.own.tolist()) for layer in layers] == [{False}, *[{True}] * (count - 1)]
    assert [layer.first for layer in layers] == [True, *[False] * (count - 1)]


class Backwards(nn.Module):
    """Its layers run in another order than they are listed."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.two, self.one = nn.Linear(4, 2), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.two(self.one(x).relu()).relu())


@pytest.mark.parametrize("name", ["resnet20", "wrn", "resnet18", "resnet50", "backwards"])
def test_layers_are_listed_in_the_order_in_which_they_run(name: str) -> None:
    network, inputs = Backwards(), torch.zeros(1, 4)
    if name != "backwards":
        network, inputs = models.build(name, in_shape=(3, 32, 32), classes=10).eval(), torch.zeros(1, 3, 32, 32)
    found = list(listed(network, inputs))
    ran: list[str] = []
    for path, layer in network.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.register_forward_hook(lambda *_, path=path: ran.append(path))
    network(inputs)
    assert found == ran


@pytest.mark.parametrize("name", ["resnet", "wrn", "lenet5", "vgg13"])
@torch.no_grad()
def test_inputs_of_its_own_go_with_their_weights_and_no_others_do(name: str) -> None:
    arguments: dict[str, Any] = {"resnet": {"depth": 8}, "wrn": {"depth": 10, "width": 1}, "vgg13": {"width": 1 / 16}}
    torch.manual_seed(0)
    network = lively(models.build(name, in_shape=(2, 16, 16), classes=10, **arguments.get(name, {})))
    example = torch.zeros(1, 2, 16, 16)
    for layer in prunable(network, example):
        changed = copy.deepcopy(network)
        weight: Any = changed.get_submodule(layer.name).weight
        half = weight.shape[1] // 2
        weight[:, :half] = 0
        left = remove_dead(changed, example).get_submodule(layer.name).weight.shape[1]  # type: ignore[union-attr, index]
        assert left == (weight.shape[1] - half if layer.own[:half].all() else weight.shape[1])


class Dense(nn.Module):
    """What it makes beside what it read."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


class Opaque(nn.Module):
    """Has a layer, and cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else x


YES, NO = True, False


@pytest.mark.parametrize(
    ("build", "found"),
    [
        (
            lambda: [Side(nn.Conv2d(2, 3, 1), nn.Conv2d(2, 2, 1)), nn.ReLU(), nn.Conv2d(5, 4, 1)],
            {"0.terms.0": [NO] * 2, "0.terms.1": [NO] * 2, "2": [YES] * 5},
        ),
        (
            lambda: [nn.Conv2d(2, 3, 1), Dense(nn.Conv2d(3, 2, 1)), nn.Conv2d(5, 4, 1)],
            {"0": [NO] * 2, "1.body": [NO] * 3, "2": [NO] * 3 + [YES] * 2},
        ),
        (
            lambda: [nn.Conv2d(2, 3, 1), nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)],
            {"0": [NO] * 2, "3": [YES] * 6},
        ),
        (
            lambda: [nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 1)],
            {"0": [NO] * 2, "2": [NO] * 4},
        ),
        (lambda: [nn.Conv2d(2, 3, 1), nn.Softmax(1), nn.Conv2d(3, 4, 1)], {"0": [NO] * 2, "2": [NO] * 3}),
        (lambda: [nn.Conv2d(2, 2, 1), Opaque(), nn.Conv2d(2, 4, 1)], {"0": [NO] * 2, "2": [NO] * 2}),
        (
            lambda: [Sum(nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 1)), nn.Conv2d(3, 4, 1)],
            {"0.terms.0": [NO] * 2, "0.terms.1": [NO] * 2, "1": [YES] * 3},
        ),
        (
            lambda: [nn.Conv2d(2, 3, 1), Sum(nn.Conv2d(3, 3, 1), nn.Identity()), nn.Conv2d(3, 4, 1)],
            {"0": [NO] * 2, "1.terms.0": [NO] * 3, "2": [NO] * 3},
        ),
    ],
)
def test_joined_grouped_and_unknown_layers(build: Callable[[], list[nn.Module]], found: dict[str, list[bool]]) -> None:
    assert listed(nn.Sequential(*build()), torch.zeros(1, 2, 5, 5)) == found


@pytest.mark.parametrize(
    ("build", "found"),
    [
        (Twice, {"two": [NO] * 4, "out": [YES] * 4}),
        (Tied, {"out": [NO] * 4}),
        (Functional, {"one": [NO] * 4, "out": [NO] * 4}),
        (Pair, {"one": [NO] * 4, "two": [NO] * 4, "out": [YES] * 4}),
        (hooked, {"0": [NO] * 4, "3": [NO] * 4}),
    ],
)
def test_shared_layers_and_those_with_hooks_are_not_listed(
    build: Callable[[], nn.Module], found: dict[str, list[bool]]
) -> None:
    assert listed(build(), torch.zeros(1, 4)) == found


@pytest.mark.parametrize(
    "flatten",
    [
        nn.Flatten(),
        Call(lambda x: x.flatten(1)),
        Call(lambda x: x.view(-1, 4 * 3 * 3)),
        Call(lambda x: x.view(x.size(0), -1)),
        Call(lambda x: x.reshape(x.shape[0], x.shape[1] * 9)),
    ],
)
def test_a_linear_layer_after_a_flattening_has_inputs_of_its_own(flatten: nn.Module) -> None:
    network = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), flatten, nn.Linear(36, 2))
    assert listed(network, torch.zeros(1, 2, 3, 3)) == {"0": [NO] * 2, "3": [YES] * 36}


@pytest.mark.parametrize(
    ("build", "first"),
    [
        (lambda: [nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 3, 1), nn.Conv2d(3, 4, 1)], ["2"]),
        (lambda: [nn.PReLU(), Sum(nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 1))], ["1.terms.0", "1.terms.1"]),
        (lambda: [Dense(nn.Conv2d(2, 3, 1)), nn.Conv2d(5, 4, 1)], ["0.body"]),
        (lambda: [nn.Conv2d(2, 2, 1, groups=2), nn.Conv2d(2, 4, 1)], []),
        (lambda: [nn.ConvTranspose2d(2, 3, 1), nn.Conv2d(3, 4, 1)], []),
        (lambda: [Opaque(), nn.Conv2d(2, 4, 1)], []),
    ],
)
def test_first_layers_read_what_no_other_layer_made(build: Callable[[], list[nn.Module]], first: list[str]) -> None:
    assert firsts(nn.Sequential(*build()), torch.zeros(1, 2, 5, 5)) == first
    assert firsts(Functional(), torch.zeros(1, 4)) == ["one"]
