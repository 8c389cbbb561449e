"""A budget shared out among layers: kept, and used up."""

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pykd import models
from pykd.deploy.model_file import to_bytes
from pykd.deploy.tracing import described
from pykd.errors import PykdError
from pykd.ops import block_norms
from pykd.pruning import flops, prunable, remove_dead
from pykd.pruning.budget import COSTS, checked, within
from pykd.pruning.layer import largest

NETWORKS: dict[str, dict[str, Any]] = {
    "lenet5": {"in_shape": (1, 28, 28)},
    "vgg": {"in_shape": (3, 32, 32), "width": 0.25},
    "resnet20": {"in_shape": (3, 32, 32)},
}


def file_bytes(network: nn.Module, example: Tensor) -> int:
    return len(to_bytes(described(network, example)))


WITH_BYTES = {**COSTS, "bytes": file_bytes}


def built(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    network = models.build(name, classes=10, **NETWORKS[name])
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.bias)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return network.eval(), torch.zeros(1, *NETWORKS[name]["in_shape"])


def layers_of(network: nn.Module, example: Tensor, groups: str) -> dict[str, str]:
    found = prunable(network, example)
    return {each.name: groups for each in found if not each.first and (groups == "weight" or each.own.all())}


@torch.no_grad()
def weights_of(network: nn.Module, example: Tensor) -> dict[str, Tensor]:
    found = prunable(network, example)
    return {each.name: each.by_channel(network.get_submodule(each.name).weight.detach()) for each in found}


@torch.no_grad()
def pruned(network: nn.Module, example: Tensor, layers: Mapping[str, str], counts: Mapping[str, int]) -> nn.Module:
    network = copy.deepcopy(network)
    weights = weights_of(network, example)
    for name, count in counts.items():
        weight = weights[name]
        weight.masked_fill_(~largest(weight, layers[name], count), 0)
    return network


def measured(network: nn.Module, example: Tensor, what: str) -> int:
    """Written out once more."""
    if what == "bytes":
        return file_bytes(network, example)
    small = remove_dead(network, example)
    if what == "parameters":
        return sum(int((parameter != 0).sum()) for parameter in small.parameters())
    outputs: dict[str, Tensor] = {}
    for name, layer in small.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.register_forward_hook(lambda _, __, result, name=name: outputs.update({name: result}))
    small(example)
    layers: dict[str, Any] = {name: small.get_submodule(name) for name in outputs}
    return sum(int((layers[name].weight != 0).sum()) * result[0, 0].numel() for name, result in outputs.items())


def next_group(weights: Mapping[str, Tensor], layers: Mapping[str, str], counts: Mapping[str, int]) -> str:
    """The layer whose next group has the largest norm beside the root mean square of its layer."""
    scores = {}
    for name, groups in layers.items():
        norms = block_norms(weights[name], groups="in") if groups == "in" else weights[name].abs().flatten()
        norms = norms.double()
        if counts[name] < len(norms):
            scores[name] = norms.sort(descending=True).values[counts[name]] / norms.square().mean().sqrt()
    return max(scores, key=lambda name: float(scores[name]))


@pytest.mark.parametrize("what", WITH_BYTES)
@pytest.mark.parametrize(
    ("name", "groups", "share"),
    [("lenet5", "in", 0.5), ("lenet5", "weight", 0.1), ("vgg", "in", 0.3), ("resnet20", "in", 0.8)],
)
def test_the_budget_is_kept_and_the_next_group_exceeds_it(name: str, groups: str, share: float, what: str) -> None:
    network, example = built(name)
    layers = layers_of(network, example, groups)
    counts = within(network, example, layers, {what: share}, WITH_BYTES)
    limit = share * measured(network, example, what)
    assert measured(pruned(network, example, layers, counts), example, what) <= limit
    more = next_group(weights_of(network, example), layers, counts)
    assert measured(pruned(network, example, layers, {**counts, more: counts[more] + 1}), example, what) > limit
    assert list(counts) == list(layers) and min(counts.values()) >= 1


@pytest.mark.parametrize("name", ["vgg", "resnet20"])
def test_single_weights_of_large_networks(name: str) -> None:
    network, example = built(name)
    layers = layers_of(network, example, "weight")
    limit = measured(network, example, "parameters") // 10
    counts = within(network, example, layers, {"parameters": limit})
    assert limit == measured(pruned(network, example, layers, counts), example, "parameters")


def test_what_counts_without_zeros_is_what_flops_and_parameters_say() -> None:
    network, example = built("resnet20")
    layers = layers_of(network, example, "in")
    small = remove_dead(pruned(network, example, layers, dict.fromkeys(layers, 5)), example)
    assert COSTS["flops"](small, example) == COSTS["flops"](small, example.repeat(4, 1, 1, 1)) == flops(small, example)
    assert COSTS["parameters"](small, example) == sum(each.numel() for each in small.parameters())


def test_layers_differ_in_what_they_lose_and_may_differ_in_groups() -> None:
    network, example = built("vgg")
    layers = layers_of(network, example, "in")
    last = list(layers)[-1]
    with torch.no_grad():
        network.get_submodule(last).weight[:, 10:] *= 1e-3
    counts = within(network, example, {**layers, last: "weight"}, {"parameters": 0.5})
    assert counts[last] <= 10 * 10
    assert within(network, example, layers, {"parameters": 0.9})[last] <= 10


def test_scale_and_mode_and_batch_of_the_network_do_not_matter() -> None:
    network, example = built("vgg")
    layers = layers_of(network, example, "in")
    counts = within(network, example, layers, {"flops": 0.5})
    scaled = copy.deepcopy(network).train()
    with torch.no_grad():
        scaled.get_submodule(next(iter(layers))).weight *= 2.0**7
    before = copy.deepcopy(scaled.state_dict())
    assert within(scaled, example.repeat(3, 1, 1, 1), layers, {"flops": 0.5}) == counts
    assert scaled.training
    assert all(value.equal(before[name]) for name, value in scaled.state_dict().items())


def test_units_that_die_with_the_groups_count() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 2))
    for layer in network[::2]:
        nn.init.ones_(layer.weight)
    nn.init.zeros_(network[2].weight[1:])  # one unit of layer 2 alone is alive
    layers, example = {"2": "weight", "4": "in"}, torch.zeros(1, 3)
    assert within(network, example, layers, {"flops": 18}) == {"2": 16, "4": 4}  # 4 * 3 + 4 + 2: as it is
    assert within(network, example, layers, {"flops": 17}) == {"2": 3, "4": 1}  # 3 * 3 + 3 + 2


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = (nn.Linear(20, 20, bias=False) for _ in range(2))
        for layer in self.children():
            nn.init.ones_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.other(x)


def test_of_equal_layers_the_first_stays_and_a_layer_of_zeros_goes() -> None:
    network, example, layers = Sum(), torch.zeros(1, 20), {"one": "weight", "other": "weight"}
    assert within(network, example, layers, {"parameters": 300}) == {"one": 299, "other": 1}
    assert within(network, example, layers, {"parameters": 403}) == {"one": 400, "other": 3}
    nn.init.zeros_(network.one.weight)
    assert within(network, example, layers, {"parameters": 0.5}) == {"one": 1, "other": 200}


def test_a_network_that_reads_nothing_is_none() -> None:
    network, example = built("lenet5")
    layers = layers_of(network, example, "weight")
    with pytest.raises(PykdError, match=r"a budget of 10 flops nothing of the network's inputs reaches"):
        within(network, example, layers, {"flops": 10})


def test_all_may_stay_and_one_of_each_has_to() -> None:
    network, example = built("lenet5")
    layers = layers_of(network, example, "in")
    everything = {name: weight.shape[1] for name, weight in weights_of(network, example).items() if name in layers}
    assert everything == {"3": 6, "7": 16, "9": 120, "11": 84}
    for number in (1, 1.0, 10**400):
        assert within(network, example, layers, {"parameters": number}) == everything
    least = dict.fromkeys(layers, 1)
    smallest = measured(pruned(network, example, layers, least), example, "parameters")
    assert within(network, example, layers, {"parameters": smallest}) == least
    with pytest.raises(PykdError, match=f"budget of {smallest - 1:,} parameters .* the network has {smallest:,}; ask"):
        within(network, example, layers, {"parameters": smallest - 1})


@pytest.mark.parametrize(
    "budget",
    [
        *({"flops": number} for number in (0, -1, float("nan"), float("inf"), True, "0.5", None)),
        *({}, {"latency": 0.5}, {"flops": 0.5, "parameters": 0.5}, 0.5, None),
    ],
)
def test_wrong_budgets(budget: Any) -> None:
    with pytest.raises(ValueError, match="budget should be one of parameters, flops with a share"):
        checked(budget)
    with pytest.raises(ValueError, match="budget should be one of parameters, flops with a share"):
        within(nn.Identity(), torch.zeros(1, 1), {}, budget)


@pytest.mark.parametrize(
    ("layers", "error", "words"),
    [
        ({}, ValueError, "at least one layer"),
        ({"3": "out"}, ValueError, "groups of '3' should be in or weight, got 'out'"),
        ({"30": "in"}, PykdError, "no module '30'"),
        ({"1": "weight"}, PykdError, "'1' cannot be pruned"),
        ({"2": "weight"}, PykdError, "'2' cannot be pruned"),
        ({"0": "in"}, PykdError, "'0' cannot lose input channels"),
        ({"5": "weight"}, PykdError, "weights of '5' are not finite"),
    ],
)
def test_wrong_layers(layers: dict[str, str], error: type[Exception], words: str) -> None:
    network = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(4, 4, 1), nn.Flatten()),
        nn.Linear(16, 2),
    )
    network[5].weight.data[1, 3] = float("inf")
    with pytest.raises(error, match=words):
        within(network, torch.zeros(1, 3, 4, 4), layers, {"flops": 0.5})
