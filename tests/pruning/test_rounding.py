"""Levels of one layer's weights: never worse than the nearest, zeros and scales as they were."""

import pytest
import torch
from torch import Tensor, nn

from pykd.pruning.reconstruction import Reconstruction, Term
from pykd.pruning.rounding import rounded


def nearest(weight: Tensor) -> Tensor:
    scale = weight.flatten(1).abs().amax(1).clamp_min(1e-30).view(-1, *[1] * (weight.dim() - 1)) / 127
    return (weight / scale).round() * scale


def problem(layer: nn.Module, terms: list[Term]) -> Reconstruction:
    found = Reconstruction(layer, terms)
    mixed = torch.randn(8, 3)  # inputs that go together, as those of images do
    inputs = torch.einsum("cd,ndhw->nchw", mixed, torch.randn(6, 3, 5, 5)) + 0.1 * torch.randn(6, 8, 5, 5)
    found.add(inputs, inputs + 0.1 * torch.randn_like(inputs))
    return found


@pytest.mark.parametrize("terms", [[Term(0.6, 1, 1), Term(0.4, 0, 0)], [Term(1, 1, 0)]], ids=["convex", "plain"])
@pytest.mark.parametrize("seed", range(3))
def test_levels_are_whole_and_better_than_the_nearest(terms: list[Term], seed: int) -> None:
    torch.manual_seed(seed)
    layer = nn.Conv2d(8, 6, 3, bias=False)
    found = problem(layer, terms)
    weight = found.solve(torch.rand(layer.weight.shape) < 0.5, 1e-3)
    result = rounded(found, weight)
    scale = weight.flatten(1).abs().amax(1) / 127
    levels = result.flatten(1) / scale[:, None]
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
    torch.testing.assert_close(levels.abs().amax(1), torch.full((6,), 127.0))
    assert not result[weight == 0].any()
    assert found.loss(result) < found.loss(nearest(weight))
    assert found.loss(rounded(found, weight, sweeps=3)) <= found.loss(rounded(found, weight, sweeps=1)) * (1 + 1e-6)


def test_where_inputs_say_nothing_it_is_the_nearest() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    found = Reconstruction(layer, [Term(1.0, 1.0, 1.0)])
    found.add(torch.zeros(2, 4), torch.zeros(2, 4))
    weight = layer.weight.detach()
    torch.testing.assert_close(rounded(found, weight), nearest(weight))
    assert not rounded(found, torch.zeros(3, 4)).any()


def test_a_ridge_keeps_what_few_inputs_say_little_about_near_the_nearest() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 6)
    found = Reconstruction(layer, [Term(1.0, 1.0, 1.0)])
    inputs = torch.randn(3, 8) * torch.tensor([1.0] * 7 + [1e-3])
    found.add(inputs, inputs)
    weight, other = layer.weight.detach(), torch.randn(200, 8)
    near = nearest(weight)

    def moved(ridge: float) -> float:
        return float((other @ (rounded(found, weight, ridge) - weight).T).square().mean())

    assert moved(1e-2) < 0.5 * moved(0.0)
    assert found.loss(rounded(found, weight, 1e-2)) < found.loss(near)
