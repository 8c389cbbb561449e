"""The methods' losses against the reference, and the values they refuse."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pykd import reference
from pykd.methods import METHODS, LogitRegression, NoisyTeacher, StudentAlone, comparisons
from pykd.training import Batch

LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
TEACHER = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
LABELS = torch.arange(6) % 4


def batch(row_offset: int = 0) -> Batch:
    return Batch(LOGITS, LABELS, torch.tensor(11), row_offset, [lambda: TEACHER])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 0.7, "sigma": 1.5},
        {"noise_shape": "sample"},
        {"noise_kind": "additive"},
        {"n_teachers": 3},
    ],
)
@pytest.mark.parametrize("row_offset", [0, 5])
def test_noisy_teacher_is_the_papers_loss(options: dict[str, Any], row_offset: int) -> None:
    method = NoisyTeacher(**options)
    arguments = {"alpha": 0.8, "sigma": 0.5, **options}
    expected = reference.logit_regression(LOGITS, TEACHER, **arguments, seed=torch.tensor(11), row_offset=row_offset)
    torch.testing.assert_close(method.loss(nn.Identity(), batch(row_offset)), expected.float())
    assert not torch.isclose(expected.float(), LogitRegression().loss(nn.Identity(), batch()))


def test_clean_regression_is_half_the_squared_distance() -> None:
    expected = (LOGITS - TEACHER).square().sum() / (2 * 6)
    torch.testing.assert_close(LogitRegression().loss(nn.Identity(), batch()), expected)


def test_student_alone_asks_no_teacher() -> None:
    def teach() -> torch.Tensor:
        pytest.fail("asked the teacher")

    alone = Batch(LOGITS, LABELS, torch.tensor(0), 0, [teach])
    assert torch.equal(StudentAlone().loss(nn.Identity(), alone), F.cross_entropy(LOGITS, LABELS))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"alpha": -0.1}, r"alpha should be in \[0, 1\], got -0\.1"),
        ({"alpha": 1.5}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"alpha": "much"}, "alpha"),
        ({"alpha": True}, "alpha"),
        ({"sigma": -1.0}, r"sigma should be finite and not negative, got -1\.0"),
        ({"sigma": float("inf")}, "sigma"),
        ({"sigma": float("nan")}, "sigma"),
        ({"noise_shape": "row"}, "noise_shape should be logit or sample, got 'row'"),
        ({"noise_kind": "divisive"}, "noise_kind should be multiplicative or additive"),
        ({"n_teachers": 0}, "n_teachers should be a whole number of at least 1"),
        ({"n_teachers": 1.5}, "n_teachers"),
    ],
)
def test_broken_rules_say_which(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        NoisyTeacher(**options)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_label_and_the_comparisons(name: str) -> None:
    method = METHODS[name]()
    assert method.label
    assert comparisons().keys() <= method.comparisons().keys()
    assert method == METHODS[name]()
