"""The block-sparse regulariser: its value, what it matches, and that the teacher stays as it is."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from pykd import reference
from pykd.errors import PykdError
from pykd.nn import BlockSparseRegularizer, variational


def perceptron(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convolutional(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * width, 4))


@pytest.mark.parametrize("scale_by_size", [False, True])
@pytest.mark.parametrize("norm", ["l1_linf", "l1_l2"])
@pytest.mark.parametrize("groups", ["in", "out", "kernel", (2, 3)])
@pytest.mark.parametrize("noisy", [False, True])
def test_value_and_gradient_are_the_norms_over_both_networks(
    groups: Any, norm: str, scale_by_size: bool, noisy: bool
) -> None:
    torch.manual_seed(0)
    student, teacher = convolutional(3), convolutional(5)
    trained = variational(student) if noisy else student
    options = {"groups": groups, "norm": norm, "scale_by_size": scale_by_size}
    value = BlockSparseRegularizer(trained, teacher, **options)()
    mine, its = ([net[0].weight.detach().double(), net[3].weight.detach().double()] for net in (student, teacher))
    expected, gradients = reference.block_norm_and_grad(mine, teachers=its, **options)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    weights = [trained[0].theta, trained[3].theta] if noisy else [trained[0].weight, trained[3].weight]
    for gradient, wanted in zip(torch.autograd.grad(value, weights), gradients, strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-6)


def test_it_follows_the_student_and_leaves_the_teacher() -> None:
    student, teacher = perceptron(4, 3, 2), perceptron(4, 6, 2)
    before = [parameter.clone() for parameter in teacher.parameters()]
    regularizer = BlockSparseRegularizer(student, teacher, groups=(1, 2), norm="l1_l2")
    assert list(regularizer.parameters()) == []
    assert regularizer.state_dict() == {}
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    values = []
    for _ in range(20):
        optimizer.zero_grad()
        value = regularizer()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0]
    for parameter, old in zip(teacher.parameters(), before, strict=True):
        assert parameter.grad is None
        assert parameter.equal(old)


def test_a_stronger_teacher_makes_the_maximum_inert() -> None:
    student, teacher = perceptron(4, 3, 2), perceptron(4, 6, 2)
    for parameter in teacher.parameters():
        parameter.data.fill_(10.0)
    BlockSparseRegularizer(student, teacher)().backward()
    assert not any(layer.weight.grad.any() for layer in (student[0], student[2]))


def test_match_by_name_and_by_mapping() -> None:
    student, teacher = perceptron(4, 3, 2), perceptron(4, 6, 6, 2)
    one = BlockSparseRegularizer(student, teacher, match={"0": "0", "2": "4"})
    expected = reference.block_norm(
        [student[0].weight, student[2].weight], teachers=[teacher[0].weight, teacher[4].weight], norm="l1_linf"
    )
    torch.testing.assert_close(one(), expected)
    assert BlockSparseRegularizer(student, teacher, match={"0": "0"})() < one()
    named = BlockSparseRegularizer(student, teacher, match="name")
    expected = reference.block_norm(
        [student[0].weight, student[2].weight], teachers=[teacher[0].weight, teacher[2].weight], norm="l1_linf"
    )
    torch.testing.assert_close(named(), expected)


@pytest.mark.parametrize(
    ("teacher", "options", "sentence"),
    [
        (
            perceptron(4, 6, 6, 2),
            {},
            r"the student's layers \(0: Linear, 2: Linear\) cannot be matched with the teacher's "
            r"\(0: Linear, 2: Linear, 4: Linear\) by order: give match=",
        ),
        (convolutional(2), {}, r"\(0: Linear, 2: Linear\) .* \(0: Conv2d, 3: Linear\) by order"),
        (nn.Sequential(nn.Linear(4, 6)), {"match": "name"}, "the teacher has no layer '2' to match; it has 0: Linear"),
        (convolutional(2), {"match": {"5": "0"}}, "the student has no layer '5' to match; it has 0: Linear"),
        (convolutional(2), {"match": {"0": "0"}}, "student layer '0' and teacher layer '0' are of two kinds"),
        (perceptron(4, 6, 2), {"match": "size"}, "match should be order, name or a mapping"),
        (nn.ReLU(), {}, r"the teacher's \(none\)"),
    ],
)
def test_layers_that_cannot_be_matched_are_named(teacher: nn.Module, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PykdError, match=sentence):
        BlockSparseRegularizer(perceptron(4, 3, 2), teacher, **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_teacher_that_is_not_finite_is_refused(value: float) -> None:
    teacher = perceptron(4, 6, 2)
    teacher[2].weight.data[0, 0] = value
    with pytest.raises(PykdError, match=r"the teacher's layer '2' .* not finite"):
        BlockSparseRegularizer(perceptron(4, 3, 2), teacher)


@pytest.mark.parametrize("options", [{"groups": "rows"}, {"groups": (0, 2)}, {"norm": "l2"}])
def test_groups_and_norms_that_are_none_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"block_norms?: "):
        BlockSparseRegularizer(perceptron(4, 3, 2), perceptron(4, 6, 2), **options)()
