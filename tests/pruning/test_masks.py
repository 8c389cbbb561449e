"""Masked weights under optimisers, checkpoints and copies."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from pykd.errors import PykdError
from pykd.pruning.masks import mask_, unmask_


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def masks() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {"0": torch.rand(4, 2, 3, 3, generator=draw) < 0.3, "3": torch.rand(3, 64, generator=draw) < 0.3}


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=0.1),
        lambda parameters: torch.optim.AdamW(parameters, 0.1, weight_decay=0.1),
    ],
)
def test_sparsity_survives_momentum_and_weight_decay(optimizer: Any) -> None:
    trained, keep = network(), masks()
    steps = optimizer(trained.parameters())  # before the masks: momentum of weights that are masked later
    images, labels = torch.randn(8, 2, 6, 6), torch.arange(8) % 3
    for step in range(6):
        if step == 3:
            mask_(trained, keep)
            steps = optimizer(trained.parameters())
        steps.zero_grad()
        nn.functional.cross_entropy(trained(images), labels).backward()
        steps.step()
    before = copy.deepcopy(trained)(images)
    unmask_(trained)
    assert trained(images).equal(before)
    for name, mask in keep.items():
        assert (trained.get_submodule(name).weight != 0).equal(mask)
    assert set(trained.state_dict()) == set(network().state_dict())


def test_masks_are_of_the_state() -> None:
    one, other = network(), network()
    mask_(one, masks())
    mask_(other, {name: torch.ones_like(mask) for name, mask in masks().items()})
    other.load_state_dict(one.state_dict())
    assert other[0].weight.equal(one[0].weight)
    mask_(one, {"0": torch.zeros(4, 2, 3, 3, dtype=torch.bool)})
    assert not one[0].weight.any()


@pytest.mark.parametrize(
    ("keep", "words"),
    [({"7": torch.ones(1)}, "no module '7'"), ({"0": torch.ones(4, 2, 3)}, r"shape of its weight, got \[4, 2, 3\]")],
)
def test_wrong_masks(keep: Any, words: str) -> None:
    with pytest.raises(PykdError, match=words):
        mask_(network(), keep)
