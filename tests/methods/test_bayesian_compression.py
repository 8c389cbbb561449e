"""Bayesian compression with group normal-Jeffreys: loss against formula, groups that go, a run that drops inputs."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import pykd
from pykd import reference
from pykd.methods import BayesianCompression
from pykd.nn import set_noise, variational_layers
from pykd.training import Batch

INPUTS = torch.randn(10, 2, 6, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(10) % 3


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def batch(epoch: int = 9) -> Batch:
    def teach() -> torch.Tensor:
        pytest.fail("asked the teacher")

    return Batch(INPUTS, LABELS, torch.tensor(3), 0, [teach], epoch=epoch, epochs=10, train_rows=50)


@pytest.mark.parametrize(("epoch", "share"), [(0, 0.0), (4, 0.5), (9, 1.0)])
def test_loss_is_its_formula(epoch: int, share: float) -> None:
    method = BayesianCompression(lambda_v=0.7, warmup_start=0.2, warmup_end=0.6)
    trained = method.prepare(network(), [], INPUTS[:1]).train()
    loss = method.loss(trained, batch(epoch))
    set_noise(trained, batch().seed)
    layers = variational_layers(trained).values()
    scales = reference.variational_kl([layer.scale for layer in layers], [layer.scale_log_sigma2 for layer in layers])
    weights = sum(
        0.5 * (layer.log_sigma2.exp() + layer.theta**2 - 1 - layer.log_sigma2).double().sum() for layer in layers
    )
    expected = F.cross_entropy(trained(INPUTS), LABELS) + share * 0.7 / 50 * (scales + weights).float()
    torch.testing.assert_close(loss, expected)


def test_uncertain_filters_and_inputs_go_whole() -> None:
    method = BayesianCompression()
    student = network()
    before = [student[0].weight.clone(), student[3].weight.clone()]
    trained = method.prepare(student, [], INPUTS[:1])
    conv, linear = variational_layers(trained).values()
    conv.scale.data[1] = 2.0
    conv.scale_log_sigma2.data[2] = 3.5
    linear.scale_log_sigma2.data[10:30] = 4.0
    facts = method.finish(trained, student)
    factor = torch.tensor([1.0, 2.0, 0.0, 1.0])
    assert student[0].weight.equal(before[0] * factor[:, None, None, None])
    assert student[0].bias[2] == 0
    kept = torch.ones(64)
    kept[10:30] = 0
    assert student[3].weight.equal(before[1] * kept)
    assert student(INPUTS).equal(trained.eval()(INPUTS))
    assert (facts["layers"]["0"]["kept_outputs"], facts["layers"]["3"]["kept_inputs"]) == (3, 44)
    assert sum(facts["layers"]["3"]["log_alpha"]) == 64


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lambda_v": -1.0}, "lambda_v should be finite and not negative"),
        ({"warmup_start": 2.0}, r"warmup_start should be in \[0, 1\]"),
        ({"threshold": "low"}, "threshold should be a finite number"),
    ],
    ids=str,
)
def test_broken_rules_say_which(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        BayesianCompression(**options)


def test_inputs_of_no_use_are_dropped() -> None:
    draw = torch.Generator().manual_seed(5)
    inputs = torch.randn(600, 8, generator=draw)
    labels = (inputs[:, 0] > 0).long()
    run = pykd.distill(
        BayesianCompression(warmup_end=0.3),
        teacher=nn.Linear(8, 2),
        student=lambda: nn.Linear(8, 2),
        train=TensorDataset(inputs, labels),
        baselines=[],
        epochs=60,
        batch_size=20,
        lr=2e-2,
        progress=False,
        device="cpu",
    )
    assert run.summary["rows"][1]["accuracy"] > 0.9
    assert run.student.weight.any(0).tolist() == [True] + [False] * 7
