"""The layer problem against convolutions written out, its minimum against its gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pykd.errors import PykdError
from pykd.pruning.reconstruction import Reconstruction, Term

TERMS = {
    "correction": [Term(1.0, 1.0, 1.0)],
    "imitation": [Term(1.0, 0.0, 0.0)],
    "convex": [Term(0.6, 1.0, 1.0), Term(0.4, 0.0, 0.0)],
    "plain": [Term(1.0, 1.0, 0.0)],
    "soft": [Term(1.0, 0.8, 0.3)],
}
LAYERS: dict[str, Any] = {
    "plain": lambda: nn.Conv2d(3, 4, 3, padding=1),
    "strided": lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2), bias=False),
    "same": lambda: nn.Conv2d(3, 4, 3, padding="same"),
    "reflected": lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
    "pointwise": lambda: nn.Conv2d(3, 4, 1),
    "linear": lambda: nn.Linear(3, 4),
}


def drawn(kind: str, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    layer = LAYERS[kind]()
    shape = (5, 3) if kind == "linear" else (5, 3, 7, 6)
    return layer, torch.randn(shape), torch.randn(shape), torch.randn_like(layer.weight)


def written_out(layer: nn.Module, terms: list[Term], teacher: Tensor, student: Tensor, weight: Tensor) -> Tensor:
    """The objective with the layers themselves, float64."""
    its, mine = (type(layer).__new__(type(layer)) for _ in range(2))
    its.__dict__, mine.__dict__ = layer.__dict__.copy(), layer.__dict__.copy()
    its._parameters = {
        name: None if each is None else each.detach().double() for name, each in layer._parameters.items()
    }
    mine._parameters = {**its._parameters, "weight": weight}
    total: Any = 0.0
    for factor, target, share in terms:
        taught = its((target * teacher + (1 - target) * student).double())
        answered = mine((share * teacher + (1 - share) * student).double())
        total = total + factor * (taught - answered).square().mean()
    return total


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_value_and_gradient_are_those_of_the_layers(kind: str, terms: list[Term]) -> None:
    layer, teacher, student, weight = drawn(kind)
    problem = Reconstruction(layer, terms)
    problem.add(teacher[:2], student[:2])
    problem.add(teacher[2:], student[2:])
    leaf = weight.double().requires_grad_()
    expected = written_out(layer, terms, teacher, student, leaf)
    torch.testing.assert_close(problem.loss(weight), expected.item(), rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(expected, leaf)
    torch.testing.assert_close(problem.gradient(weight), gradient.float(), rtol=1e-4, atol=1e-5)


def test_special_cases_of_the_soft_objective_are_the_others() -> None:
    layer, teacher, student, weight = drawn("plain")

    def loss(terms: list[Term]) -> float:
        problem = Reconstruction(layer, terms)
        problem.add(teacher, student)
        return problem.loss(weight)

    assert loss(TERMS["correction"]) == pytest.approx(loss([Term(1.0, 1.0, 1.0)]))
    assert loss(TERMS["convex"]) == pytest.approx(0.6 * loss(TERMS["correction"]) + 0.4 * loss(TERMS["imitation"]))


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("shared", [True, False])
def test_the_solution_has_no_gradient_where_it_may_move(terms: list[Term], shared: bool) -> None:
    layer, teacher, student, _ = drawn("plain")
    problem = Reconstruction(layer, terms)
    problem.add(teacher, student)
    mask = torch.rand(layer.weight.shape) < 0.4
    if shared:
        mask = (torch.arange(3) != 1).view(1, 3, 1, 1).expand_as(layer.weight)
    weight = problem.solve(mask, ridge=0.0)
    assert not weight[~mask].any()
    assert problem.gradient(weight)[mask].abs().max() < 1e-6
    assert problem.loss(weight) <= problem.loss(layer.weight * mask)


def test_equal_inputs_and_weights_cost_nothing() -> None:
    layer, teacher, _, _ = drawn("plain")
    for terms in TERMS.values():
        problem = Reconstruction(layer, terms)
        problem.add(teacher, teacher)
        assert problem.loss(layer.weight) == 0
        everything = torch.ones_like(layer.weight, dtype=torch.bool)
        torch.testing.assert_close(problem.solve(everything), layer.weight.detach(), rtol=1e-4, atol=1e-5)


def test_few_images_leave_the_teachers_weights_where_they_say_nothing() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 2)
    problem = Reconstruction(layer, TERMS["imitation"])
    inputs = torch.zeros(2, 6)
    inputs[0, 0] = inputs[1, 1] = 1.0
    problem.add(inputs, inputs)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[:, 5] = False
    with pytest.raises(PykdError, match="many solutions: take more images, or a ridge above 0"):
        problem.solve(mask, ridge=0.0)
    torch.testing.assert_close(problem.solve(mask), layer.weight.detach() * mask, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "words"), [(nn.ReLU(), "a ReLU has no"), (nn.Conv2d(4, 4, 3, groups=2), "of 2 groups")]
)
def test_layers_without_a_problem(layer: nn.Module, words: str) -> None:
    with pytest.raises(PykdError, match=words):
        Reconstruction(layer, TERMS["plain"])
