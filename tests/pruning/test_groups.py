"""Groups that are small become zero, and nothing else; what a network costs."""

from typing import Any

import pytest
import torch
from torch import nn

from pykd.ops import block_norms
from pykd.pruning import flops, prune_groups_


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, (3, 2)), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(20, 7))


def entries(weight: torch.Tensor, groups: Any) -> list[torch.Tensor]:
    """The groups as views, in the order of their norms."""
    matrix = weight.flatten(1)
    kernel = weight[0, 0].numel()
    rows, columns = {"in": (len(weight), kernel), "out": (1, matrix.shape[1]), "kernel": (1, kernel)}.get(
        groups, groups
    )
    return [block for row in matrix.split(rows) for block in row.split(columns, 1)]


@pytest.mark.parametrize("norm", ["l1_l2", "l1_linf"])
@pytest.mark.parametrize("groups", ["in", "out", "kernel", (2, 4), (100, 100), (2**40, 2**40)])
def test_small_groups_become_zero_and_the_others_stay(groups: Any, norm: str) -> None:
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    norms = {name: block_norms(net.get_submodule(name).weight, groups=groups, norm=norm) for name in ("0", "4")}
    threshold = torch.cat([each.flatten() for each in norms.values()]).median().item()
    zeroed = prune_groups_(net, groups=groups, norm=norm, threshold=threshold)
    assert list(zeroed) == ["0", "4"]
    for name, small in zeroed.items():
        assert small.equal(norms[name] <= threshold)
        weight = net.get_submodule(name).weight.detach()
        old = entries(before.pop(f"{name}.weight"), groups)
        for block, was, gone in zip(entries(weight, groups), old, small.flatten().tolist(), strict=True):
            assert block.equal(torch.zeros_like(was) if gone else was)
    assert any(small.any() for small in zeroed.values())
    for name, value in before.items():
        assert net.state_dict()[name].equal(value)


def test_threshold_of_zero_finds_what_is_zero_and_nan_stays() -> None:
    layer = nn.Linear(3, 2)
    layer.weight.data = torch.tensor([[0.0, 1e-30, 0.0], [0.0, 0.0, float("nan")]])
    before = layer.weight.detach().clone()
    assert prune_groups_(layer, groups="in", threshold=0)[""].tolist() == [True, False, False]
    torch.testing.assert_close(layer.weight.detach(), before, rtol=0, atol=0, equal_nan=True)
    assert prune_groups_(layer, groups="in", threshold=1)[""].tolist() == [True, True, False]
    assert layer.weight.isnan().sum() == 1


@pytest.mark.parametrize("threshold", [-1, float("nan"), "1", None, True])
def test_says_what_a_threshold_is(threshold: Any) -> None:
    with pytest.raises(ValueError, match="threshold should be a number that is not negative, got"):
        prune_groups_(network(), threshold=threshold)


def test_flops_are_the_multiply_adds_of_one_pass() -> None:
    net = network().train()
    running = net[1].running_mean.clone()
    assert flops(net, torch.zeros(1, 3, 4, 3)) == 5 * 3 * 6 * 2 * 2 + 20 * 7
    assert flops(net, torch.zeros(4, 3, 4, 3)) == 4 * flops(net, torch.zeros(1, 3, 4, 3))
    assert flops(nn.Conv2d(4, 8, 3, groups=2, stride=2), torch.zeros(1, 4, 7, 7)) == 8 * 2 * 9 * 3 * 3
    twice = nn.Linear(6, 6)
    assert flops(nn.Sequential(twice, nn.ReLU(), twice), torch.zeros(1, 6)) == 2 * 36
    assert net.training
    assert net[1].running_mean.equal(running)
