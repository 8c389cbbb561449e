"""One layer's pruning: which groups stay, and what becomes of their weights."""

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pykd.errors import PykdError
from pykd.ops import block_norm
from pykd.pruning.layer import Exact, Proximal, Steps, kept, largest, lasso, thinet
from pykd.pruning.reconstruction import Activated, Reconstruction, Term

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


@pytest.mark.parametrize("count", [432, 100])
def test_steps_on_single_weights_are_those_of_adam_with_masked_gradients_and_moments(count: int) -> None:
    layer, found = problem()
    pruned, keep = Steps(steps=60, lr=1e-2)(found, layer.weight.detach(), "weight", count)
    leaf, mask = layer.weight.detach().double(), torch.ones_like(layer.weight, dtype=torch.float64)
    first, second = torch.zeros_like(leaf), torch.zeros_like(leaf)
    for step in range(1, 61):
        gradient = found.gradient(leaf) * mask
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        leaf -= 1e-2 * first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        left = count + (432 - count) * max(0, 20 - step) // 20
        mask = (leaf.abs() >= leaf.abs().flatten().sort(descending=True).values[left - 1]).double()
        leaf, first, second = leaf * mask, first * mask, second * mask
    assert keep.equal(mask.bool())
    torch.testing.assert_close(pruned.double(), leaf, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize(("groups", "count"), [("in", 4), ("weight", 100)])
def test_the_layout_of_the_weight_does_not_matter(solver: Any, groups: str, count: int) -> None:
    layer, found = problem()
    weight = layer.weight.detach()
    expected, its = solver(found, weight, groups, count)
    pruned, keep = solver(found, weight.to(memory_format=torch.channels_last), groups, count)
    assert keep.equal(its)
    torch.testing.assert_close(pruned, expected)


@pytest.mark.parametrize(("channels", "images", "size", "steps"), [(8, 16, 6, 300), (64, 2, 3, 300), (96, 2, 2, 1500)])
def test_steps_are_those_of_the_convolutions_written_plainly(channels: int, images: int, size: int, steps: int) -> None:
    """The problem is a Gram matrix; or of few images their inputs until few channels are left; or inputs to the end."""
    path = Path(__file__).parents[2] / "benchmarks" / "plain_steps.py"
    spec: Any = importlib.util.spec_from_file_location("plain_steps", path)
    plain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plain)
    layer = nn.Conv2d(channels, 16, 3, padding=1)
    teacher = torch.randn(images, channels, size, size)
    student = teacher + 0.1 * torch.randn_like(teacher)
    found = Reconstruction(layer, [Term(0.6, 1.0, 1.0), Term(0.4, 0.0, 0.0)])
    found.add(teacher, student)
    pruned, keep = Steps(steps, lr=2e-3)(found, layer.weight.detach(), "in", 4)
    expected, its = plain.plain_steps(layer, teacher, student, 4, steps=steps, lr=2e-3)
    assert keep.equal(its)
    assert found.loss(pruned) == pytest.approx(found.loss(expected), rel=1e-3)
    torch.testing.assert_close(pruned, expected, rtol=1e-2, atol=1e-3)


def test_steps_reach_the_exact_solution_of_their_mask() -> None:
    layer, found = problem()
    pruned, keep = Steps(steps=6000, lr=1e-2)(found, layer.weight.detach(), "in", 4)
    assert found.loss(pruned) <= 1.02 * found.loss(found.solve(keep))


def test_largest_keeps_as_many_as_asked_of_equal_ones() -> None:
    assert largest(torch.ones(3, 4), "weight", 5).sum() == 5
    assert largest(torch.zeros(3, 4, 3, 3), "in", 2)[:, :2].all()


def test_the_schedule_falls_to_its_end_and_stays() -> None:
    counts = [kept(step, 1000, 512, 256) for step in range(3001)]
    assert counts[0] == 512 and counts[1000:] == [256] * 2001
    assert all(a >= b for a, b in itertools.pairwise(counts))


def test_channels_give_the_loss_of_factors() -> None:
    layer, found = problem()
    weight = torch.randn_like(layer.weight)
    products, targets = found.channels(weight)
    constant = found.loss(torch.zeros_like(weight)) * found.outputs
    for _ in range(3):
        factors = torch.rand(8, dtype=torch.float64)
        loss = factors @ products @ factors - 2 * factors @ targets + constant
        expected = found.loss(weight * factors.view(1, -1, 1, 1)) * found.outputs
        torch.testing.assert_close(loss.item(), expected, rtol=1e-5, atol=1e-5)


def test_thinet_takes_out_the_channel_that_costs_least_each_time() -> None:
    layer, found = problem()
    weight, keep = layer.weight.detach(), torch.ones(8, dtype=torch.bool)
    for count in range(7, 2, -1):
        losses = {}
        for channel in keep.nonzero().flatten().tolist():
            without = keep.clone()
            without[channel] = False
            losses[channel] = found.loss(weight * without.view(1, -1, 1, 1))
        keep[min(losses, key=losses.__getitem__)] = False
        assert thinet(found, weight, count).equal(keep)


def test_lasso_finds_the_channels_that_matter() -> None:
    """Of eight channels three carry all, whatever the size of the weights of the others."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 6)
    layer.weight.data[:, 3:] *= 10
    found = Reconstruction(layer, [Term(1.0, 1.0, 0.0)])
    inputs = torch.randn(40, 8)
    inputs[:, 3:] *= 1e-3
    found.add(inputs, inputs)
    expected = torch.arange(8) < 3
    assert lasso(found, layer.weight.detach(), 3).equal(expected)
    assert thinet(found, layer.weight.detach(), 3).equal(expected)
    assert lasso(found, layer.weight.detach(), 5).sum() == 5


@pytest.mark.parametrize("groups", ["in", "weight"])
def test_the_exact_solution_of_few_images_is_that_of_their_products(groups: str) -> None:
    """Of one image the inputs are kept; of as many zeros beside it, there is a Gram matrix."""
    layer, _ = problem()
    teacher = torch.randn(1, 8, 4, 4)
    student = teacher + 0.1 * torch.randn_like(teacher)
    few, many = (Reconstruction(layer, [Term(1.0, 1.0, 0.2)]) for _ in range(2))
    few.add(teacher, student)
    many.add(*(torch.cat([each, torch.zeros(15, 8, 4, 4)]) for each in (teacher, student)))
    assert few._parts and not many._parts
    (pruned, keep), (expected, its) = (Exact()(each, layer.weight.detach(), groups, 4) for each in (few, many))
    assert keep.equal(its)
    torch.testing.assert_close(pruned, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("select", ["thinet", "lasso"])
def test_selected_channels_have_their_least_squares(select: str) -> None:
    layer, found = problem()
    pruned, keep = Exact(select=select)(found, layer.weight.detach(), "in", 4)
    assert keep[0, :, 0, 0].sum() == 4 and (keep == keep[:1, :, :1, :1]).all()
    torch.testing.assert_close(pruned, found.solve(keep, 1e-6))


@pytest.mark.parametrize("groups", ["in", "weight"])
def test_the_penalty_decides_what_stays_and_its_minimum_is_one(groups: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, found = problem()
    weight = layer.weight.detach()
    counts = []
    for penalty in (1e-3, 1e-2, 0.3 if groups == "in" else 0.1):
        pruned, keep = Proximal(penalty, steps=3000)(found, weight, groups, 0)
        counts.append(int(keep.sum()))
        assert not pruned[~keep].any()
        torch.testing.assert_close(pruned, found.solve(keep, 1e-6))
    assert counts[0] > counts[1] > counts[2] > 0
    monkeypatch.setattr(found, "solve", lambda keep, ridge: keep)  # what the penalty leaves, before least squares
    seen: list[Tensor] = []
    gradient = found.gradient
    monkeypatch.setattr(found, "gradient", lambda at: (seen.append(at), gradient(at))[1])
    Proximal(1e-2, steps=3000)(found, weight, groups, 0)
    size = "in" if groups == "in" else (1, 1)

    def total(at: Tensor) -> float:
        return found.loss(at) + 1e-2 * float(block_norm(at.contiguous(), groups=size))

    best = total(seen[-1])
    for _ in range(20):
        assert best <= total(seen[-1] + 1e-2 * torch.randn_like(weight)) + 1e-7
    assert best <= total(seen[-1] * 0.99) + 1e-7 and best <= total(seen[-1] * 1.01) + 1e-7


def test_a_penalty_that_leaves_nothing() -> None:
    layer, found = problem()
    with pytest.raises(PykdError, match="leaves nothing of it: take a smaller one"):
        Proximal(1e9)(found, layer.weight.detach(), "in", 0)


@pytest.mark.parametrize("images", [1, 16])
@pytest.mark.parametrize("gone", [0, 3])
def test_slope_of_some_columns_is_the_gradient_of_the_rest_at_zero(images: int, gone: int) -> None:
    """A single image stays as it is, sixteen become a Gram matrix."""
    torch.manual_seed(1)
    layer = nn.Conv2d(8, 6, 3, padding=1)
    found = Reconstruction(layer, [Term(0.6, 1.0, 0.2)])
    teacher = torch.randn(images, 8, 4, 4)
    found.add(teacher, teacher + 0.1 * torch.randn_like(teacher))
    assert bool(found._parts) == (images == 1)
    weight = torch.randn_like(layer.weight)
    weight[:, :gone] = 0
    columns = torch.arange(gone * 9, 72)
    slope = found.slope(columns)(weight.flatten(1)[:, columns])
    torch.testing.assert_close(slope, found.gradient(weight).flatten(1)[:, columns], rtol=1e-4, atol=1e-5)


def test_without_an_activation_the_activated_problem_is_the_plain_one() -> None:
    torch.manual_seed(2)
    layer = nn.Conv2d(3, 4, 3, padding=1)
    terms = [Term(0.6, 1.0, 1.0), Term(0.4, 0.5, 0.2)]
    problems: Any = Reconstruction(layer, terms), Activated(layer, terms, nn.Identity())
    teacher, student, weight = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5), torch.randn_like(layer.weight)
    for each in problems:
        each.add(teacher[:3], student[:3])
        each.add(teacher[3:], student[3:])
    plain, activated = problems
    assert activated.loss(weight) == pytest.approx(plain.loss(weight), rel=1e-5)
    columns = torch.arange(9, 27)
    slopes = [each.slope(columns)(weight.flatten(1)[:, columns]) for each in problems]
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-5)


def test_with_an_activation_what_it_cuts_off_does_not_count() -> None:
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[-1.0, -1.0]])
    found = Activated(layer, [Term(1.0, 1.0, 1.0)], nn.ReLU())
    found.add(torch.ones(3, 2), torch.ones(3, 2))
    assert found.loss(torch.tensor([[-5.0, 0.0]])) == 0
    assert found.loss(torch.tensor([[3.0, 0.0]])) == pytest.approx(9.0)
