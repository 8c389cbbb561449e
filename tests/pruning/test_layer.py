"""One layer's pruning: which groups stay, and what becomes of their weights."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pykd.pruning.layer import Exact, Steps, kept, largest
from pykd.pruning.reconstruction import Reconstruction, Term

SOLVERS: dict[str, Any] = {"exact": Exact(), "steps": Steps(steps=600, lr=2e-3)}


def problem() -> tuple[nn.Conv2d, Reconstruction]:
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 6, 3, padding=1)
    found = Reconstruction(layer, [Term(0.6, 1.0, 1.0), Term(0.4, 0.0, 0.0)])
    mixed = torch.randn(8, 3)  # channels that say the same as others
    teacher = torch.einsum("cd,ndhw->nchw", mixed, torch.randn(16, 3, 6, 6)) + 0.1 * torch.randn(16, 8, 6, 6)
    found.add(teacher, teacher + 0.1 * torch.randn_like(teacher))
    return layer, found


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize(("groups", "count"), [("in", 4), ("weight", 100)])
def test_what_is_left_is_counted_and_better_than_what_was(solver: Any, groups: str, count: int) -> None:
    layer, found = problem()
    weight: Tensor = layer.weight.detach()
    pruned, keep = solver(found, weight, groups, count)
    assert not pruned[~keep].any()
    assert (keep[0, :, 0, 0] if groups == "in" else keep).sum() == count
    if groups == "in":
        assert (keep == keep[:1, :, :1, :1]).all()
    assert found.loss(pruned) < 0.5 * found.loss(weight * largest(weight, groups, count))
    assert weight.equal(layer.weight)


def test_steps_are_those_of_torchs_adam() -> None:
    layer, found = problem()
    pruned, _ = Steps(steps=20, lr=1e-2)(found, layer.weight.detach(), "weight", layer.weight.numel())
    leaf = layer.weight.detach().clone().requires_grad_()
    adam = torch.optim.Adam([leaf], 1e-2)
    for _ in range(20):
        leaf.grad = found.gradient(leaf)
        adam.step()
    torch.testing.assert_close(pruned, leaf.detach())


def test_steps_reach_the_exact_solution_of_their_mask() -> None:
    layer, found = problem()
    pruned, keep = Steps(steps=6000, lr=1e-2)(found, layer.weight.detach(), "in", 4)
    assert found.loss(pruned) <= 1.02 * found.loss(found.solve(keep))


def test_largest_keeps_as_many_as_asked_of_equal_ones() -> None:
    assert largest(torch.ones(3, 4), "weight", 5).sum() == 5
    assert largest(torch.zeros(3, 4, 3, 3), "in", 2)[:, :2].all()


def test_the_schedule_ends_in_the_first_third() -> None:
    counts = [kept(step, 3000, 512, 256) for step in range(3001)]
    assert counts[0] == 512 and counts[1000:] == [256] * 2001
    assert all(a >= b for a, b in itertools.pairwise(counts))
