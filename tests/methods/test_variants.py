"""The variants of the noisy teacher, and the distillation of Hinton et al., against plain torch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pykd.methods import HintonDistillation, LogitRegression, NoisyTeacher, noisy_teacher
from pykd.ops import logit_regression_and_grad
from pykd.training import Batch

ROWS, CLASSES, SEED = 9, 5, 11
DRAW = torch.Generator().manual_seed(3)
STUDENT = torch.randn(ROWS, CLASSES, generator=DRAW)
TEACHERS = [2 * torch.randn(ROWS, CLASSES, generator=DRAW) for _ in range(3)]
LABELS = torch.randint(CLASSES, (ROWS,), generator=DRAW)
DISTILLATION = {"objective": "distillation", "temperature": 3.0, "hard_weight": 0.3}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"noise_shape": "sample", "noise_kind": "additive"},
    {"n_teachers": 2},
    {"noisy_teachers": "one"},
    {"noise_on": "student"},
    {"noise_on": "student", "noise_kind": "additive"},
    DISTILLATION,
    {**DISTILLATION, "n_teachers": 2, "noisy_teachers": "one"},
    {**DISTILLATION, "noise_on": "student"},
]


def batch(teachers: list[Tensor], rows: slice = slice(0, ROWS)) -> Batch:
    """Some rows of the global batch."""
    teach = [lambda logits=logits: logits[rows] for logits in teachers]
    return Batch(STUDENT[rows], LABELS[rows], torch.tensor(SEED), rows.start, teach)


def noisy(logits: Tensor, method: NoisyTeacher, seed: int, n_teachers: int = 1) -> Tensor:
    """z': the gradient of half the squared distance of 0 to z' is -z'."""
    _, gradient = logit_regression_and_grad(
        torch.zeros_like(logits),
        logits,
        n_teachers=n_teachers,
        reduction="sum",
        sigma=method.sigma,
        alpha=method.alpha,
        noise_shape=method.noise_shape,
        noise_kind=method.noise_kind,
        seed=torch.tensor(seed),
    )
    return -gradient


def in_plain_torch(method: NoisyTeacher, student: Tensor, teachers: list[Tensor]) -> Tensor:
    """The loss by its formula."""
    draws = method.n_teachers
    if method.noise_on == "student":
        targets = teachers
        if method.noise_kind == "additive":
            student = student + noisy(torch.zeros_like(student), method, SEED)
        else:
            student = student * noisy(torch.ones_like(student), method, SEED)
    elif len(teachers) == 1:
        targets = [noisy(teachers[0], method, SEED, draws)]
    else:
        perturbed = 1 if method.noisy_teachers == "one" else len(teachers)
        targets = [
            sum(noisy(logits, method, SEED + k * draws + j) for j in range(draws)) / draws if k < perturbed else logits
            for k, logits in enumerate(teachers)
        ]
    target = sum(targets) / len(targets)
    if method.objective == "regression":
        return (student - target).square().sum() / (2 * ROWS)
    return hinton(student, target, method.temperature, method.hard_weight)


def hinton(student: Tensor, target: Tensor, temperature: float, hard_weight: float) -> Tensor:
    """The distillation loss by its formula."""
    log_q, p = F.log_softmax(student / temperature, -1), F.softmax(target / temperature, -1)
    divergence = temperature**2 * (p * (p.log() - log_q)).sum() / ROWS
    return (1 - hard_weight) * divergence + hard_weight * F.cross_entropy(student, LABELS)


def value_and_gradient(loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    student = STUDENT.clone().requires_grad_()
    value = loss(student)
    return value.detach(), torch.autograd.grad(value, student)[0]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_variant_is_its_formula(variant: dict[str, Any], count: int) -> None:
    method, teachers = NoisyTeacher(**variant), TEACHERS[:count]
    rows = batch(teachers)
    loss, gradient = value_and_gradient(lambda student: method.loss(lambda _: student, rows))
    expected, expected_gradient = value_and_gradient(lambda student: in_plain_torch(method, student, teachers))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    still = NoisyTeacher(**{**variant, "sigma": 0.0}).loss(nn.Identity(), rows)
    assert not torch.isclose(loss, still), "there was no noise"


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_slices_of_a_batch_add_up_to_the_whole(variant: dict[str, Any], count: int) -> None:
    method, teachers = NoisyTeacher(**variant), TEACHERS[:count]
    whole = method.loss(nn.Identity(), batch(teachers))
    slices = [slice(0, 2), slice(2, 3), slice(3, ROWS)]
    parts = [method.loss(nn.Identity(), batch(teachers, rows)) * (rows.stop - rows.start) / ROWS for rows in slices]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("still", [{"sigma": 0.0}, {"alpha": 0.0}])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("noise_on", ["teacher", "student"])
def test_without_noise_it_is_the_clean_loss_bit_for_bit(still: dict[str, float], count: int, noise_on: str) -> None:
    rows = batch(TEACHERS[:count])
    for clean, options in ((LogitRegression(), {}), (HintonDistillation(3.0, 0.3), DISTILLATION)):
        method = NoisyTeacher(**options, **still, noise_on=noise_on)
        assert method.loss(nn.Identity(), rows).equal(clean.loss(nn.Identity(), rows))


@pytest.mark.parametrize("count", [1, 3])
def test_clean_losses_of_several_teachers_are_those_of_the_mean(count: int) -> None:
    mean = sum(TEACHERS[:count]) / count
    rows = batch(TEACHERS[:count])
    expected = (STUDENT - mean).square().sum() / (2 * ROWS)
    torch.testing.assert_close(LogitRegression().loss(nn.Identity(), rows), expected)
    for method in (HintonDistillation(), HintonDistillation(1.0, 0.0), HintonDistillation(2.0, 1.0)):
        loss, gradient = value_and_gradient(lambda student, method=method: method.loss(lambda _: student, rows))
        expected, expected_gradient = value_and_gradient(
            lambda student, method=method: hinton(student, mean, method.temperature, method.hard_weight)
        )
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("options", [{"n_teachers": 2}, DISTILLATION], ids=str)
def test_noise_of_a_single_teacher_is_never_stored(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noisy_teacher, "noisy_logits", lambda *_, **__: pytest.fail("made a copy of the logits"))
    NoisyTeacher(**options).loss(nn.Identity(), batch(TEACHERS[:1]))


def test_teachers_draw_noise_of_their_own() -> None:
    method = NoisyTeacher(alpha=1.0)
    ones = torch.ones(ROWS, CLASSES)
    together = method.loss(nn.Identity(), batch([ones, ones]))
    alone = method.loss(nn.Identity(), batch([ones]))
    assert not torch.isclose(together, alone)


def test_a_teacher_is_asked_once_and_only_where_it_is_wanted() -> None:
    asked = []

    def teach(number: int) -> Tensor:
        asked.append(number)
        return TEACHERS[number]

    rows = Batch(STUDENT, LABELS, torch.tensor(SEED), 0, [lambda: teach(0), lambda: teach(1)])
    assert rows.teacher_logits is TEACHERS[0]
    assert asked == [0]
    NoisyTeacher().loss(nn.Identity(), rows)
    LogitRegression().loss(nn.Identity(), rows)
    assert asked == [0, 1]


@pytest.mark.parametrize(
    ("method", "options", "sentence"),
    [
        (NoisyTeacher, {"objective": "hinton"}, "objective should be regression or distillation, got 'hinton'"),
        (NoisyTeacher, {"temperature": 0.0}, r"temperature should be finite and above 0, got 0\.0"),
        (NoisyTeacher, {"temperature": float("inf")}, "temperature"),
        (NoisyTeacher, {"hard_weight": 1.5}, r"hard_weight should be in \[0, 1\], got 1\.5"),
        (NoisyTeacher, {"noise_on": "both"}, "noise_on should be teacher or student, got 'both'"),
        (NoisyTeacher, {"noisy_teachers": 2}, "noisy_teachers should be all or one, got 2"),
        (NoisyTeacher, {"noise_on": "student", "n_teachers": 2}, "n_teachers and noisy_teachers say how teachers"),
        (NoisyTeacher, {"noise_on": "student", "noisy_teachers": "one"}, "leave them out with noise_on: student"),
        (HintonDistillation, {"temperature": -1}, "temperature should be finite and above 0, got -1"),
        (HintonDistillation, {"temperature": float("nan")}, "temperature"),
        (HintonDistillation, {"temperature": "hot"}, "temperature"),
        (HintonDistillation, {"hard_weight": True}, "hard_weight"),
    ],
)
def test_broken_rules_say_which(method: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        method(**options)
    assert "\n" not in str(caught.value)
