"""Transfers of features: losses against their formulas, what stays frozen, what drops away, whole runs."""

import copy
import dataclasses
import os
import signal
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import pykd
from pykd.config import Training
from pykd.errors import Interrupted, PykdError
from pykd.methods import AttentionTransfer, FactorTransfer, FitNet
from pykd.nn.features import features
from pykd.training import Batch, First, FrozenTeacher

INPUTS = torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6) % 3
AT: Any = {"teacher_at": ["1"], "student_at": ["1"]}


def network(channels: int, stride: int = 1, seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, channels, 3, stride, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.BatchNorm1d(4 * channels), nn.Linear(4 * channels, 3),
    )  # fmt: skip


def batch(teacher: nn.Module, epoch: int = 0, epochs: int = 4) -> Batch:
    frozen = FrozenTeacher(teacher)
    return Batch(
        INPUTS, LABELS, torch.tensor(3), 0, [lambda: frozen(INPUTS)], epoch, epochs, train_rows=50, teachers=[frozen]
    )


def maps_of(module: nn.Module) -> tuple[Tensor, Tensor]:
    output, (maps,) = features(module, INPUTS, ["1"])
    return output, maps


@pytest.mark.parametrize("stride", [1, 2])
def test_attention_transfer_is_its_formula(stride: int) -> None:
    teacher, student = network(5, seed=2).eval(), network(4, stride)
    loss = AttentionTransfer(beta=7.0, **AT).loss(student, batch(teacher))
    its = maps_of(teacher)[1].detach()
    logits, mine = maps_of(student)
    if stride == 2:
        its = F.adaptive_avg_pool2d(its, 4)
    q = [maps.pow(2).sum(1).flatten(1) for maps in (mine, its)]
    difference = q[0] / q[0].norm(dim=1, keepdim=True) - q[1] / q[1].norm(dim=1, keepdim=True)
    torch.testing.assert_close(loss, F.cross_entropy(logits, LABELS) + 7 * difference.square().mean())


@pytest.mark.parametrize("stride", [1, 2])
def test_fitnet_learns_the_hint_first(stride: int) -> None:
    method = FitNet(hint_epochs=0.5, weight=3.0, temperature=2.0, **AT)
    teacher, student = network(5, stride, seed=2).eval(), network(4)
    trained: Any = method.prepare(student, [teacher], INPUTS[:1])
    hint = maps_of(teacher)[1].detach()
    logits, mine = maps_of(trained.network)
    regressed = trained.regressor(mine)
    assert regressed.shape == hint.shape
    torch.testing.assert_close(method.loss(trained, batch(teacher)), (regressed - hint).square().mean() / 2)
    for epoch, weight in ((2, 3.0), (3, 1.0)):
        soft = F.kl_div(F.log_softmax(logits / 2, 1), F.softmax(teacher(INPUTS).detach() / 2, 1), reduction="batchmean")
        expected = F.cross_entropy(logits, LABELS) + weight * soft
        torch.testing.assert_close(method.loss(trained, batch(teacher, epoch)), expected)


@pytest.mark.parametrize(("p", "reduction"), [(1, "mean"), (2, "mean"), (1, "row"), (2, "row")])
@pytest.mark.parametrize("hard_weight", [1.0, 0.3])
def test_factor_transfer_is_its_formula(p: int, reduction: str, hard_weight: float) -> None:
    method = FactorTransfer(beta=7.0, p=p, reduction=reduction, hard_weight=hard_weight, temperature=2.0, **AT)
    teacher, student = network(6, seed=2).eval(), network(4, 2)
    first = method.first([teacher], INPUTS[:1])
    trained: Any = method.prepare(student, [teacher], INPUTS[:1], first.module)
    loss = method.loss(trained, batch(teacher))
    its = first.module.each[0].factor(maps_of(teacher)[1]).detach()  # type: ignore[index, union-attr]
    logits, mine = maps_of(trained.network)
    factors = trained.translators[0](mine).flatten(1), F.adaptive_avg_pool2d(its, 4).flatten(1)
    assert factors[0].shape[1] == 3 * 16
    difference = (factors[0] / factors[0].norm(dim=1, keepdim=True)) - factors[1] / factors[1].norm(dim=1, keepdim=True)
    distance = difference.abs().pow(p).mean() if reduction == "mean" else difference.norm(p, dim=1).mean()
    soft = F.kl_div(F.log_softmax(logits / 2, 1), F.softmax(teacher(INPUTS).detach() / 2, 1), reduction="batchmean")
    labels = hard_weight * F.cross_entropy(logits, LABELS) + (1 - hard_weight) * 4 * soft
    torch.testing.assert_close(loss, labels + 7 * distance)


@pytest.mark.parametrize(("reconstruction", "distance"), [("l1", F.l1_loss), ("l2", F.mse_loss)])
def test_the_paraphraser_reconstructs_the_teachers_maps(reconstruction: str, distance: Any) -> None:
    method = FactorTransfer(reconstruction=reconstruction, paraphraser={"epochs": 2}, **AT)
    teacher = network(6, seed=2).eval()
    first = method.first([teacher], INPUTS[:1])
    maps = maps_of(teacher)[1].detach()
    loss = first.loss(first.module, batch(teacher))
    torch.testing.assert_close(loss, distance(first.module.each[0](maps), maps))  # type: ignore[index, operator, union-attr]
    assert (first.training.epochs, first.training.lr) == (2, 0.1)
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(value.grad is not None for value in first.module.parameters())
    assert all(value.grad is None for value in teacher.parameters())


def data() -> TensorDataset:
    labels = torch.arange(48) % 3
    images = torch.randn(48, 2, 8, 8, generator=torch.Generator().manual_seed(4)) + labels.view(-1, 1, 1, 1)
    return TensorDataset(images, labels)


def run(method: Any, out: Any = None, **options: Any) -> Any:
    given: dict[str, Any] = {
        "teacher": lambda: network(6, seed=2),
        "student": lambda: network(4),
        "train": data(),
        "baselines": [],
        "teacher_training": Training(epochs=2),
        "epochs": 3,
        "batch_size": 16,
        "progress": False,
        "device": "cpu",
        "out": out,
    }
    return pykd.distill(method, **{**given, **options})


FT: Any = {"paraphraser": {"epochs": 2, "batch_size": 16, "lr": 0.01}, "beta": 5.0, **AT}


@pytest.mark.parametrize("method", [AttentionTransfer(**AT), FitNet(**AT), FactorTransfer(**FT)], ids=lambda m: m.label)
def test_a_run_leaves_the_plain_student(method: Any) -> None:
    result = run(method)
    assert list(result.student.state_dict()) == list(network(4).state_dict())
    assert [row["name"] for row in result.summary["rows"]] == ["teacher", "student"]
    assert all(value.isfinite().all() for value in result.student.state_dict().values())


def test_teacher_and_paraphraser_keep_their_bits(tmp_path: Any) -> None:
    teacher = network(6, seed=2)
    before = copy.deepcopy(teacher.state_dict())
    seen: list[Any] = []

    class Watching(FactorTransfer):
        def prepare(self, *arguments: Any, **options: Any) -> nn.Module:
            trained = super().prepare(*arguments, **options)
            seen.append((trained, copy.deepcopy(trained.encoders.state_dict())))  # type: ignore[union-attr]
            return trained

    run(Watching(**{**FT, "batch_norm": True}), teacher=teacher, teacher_training=None)
    assert all(value.equal(before[name]) for name, value in teacher.state_dict().items())
    trained, encoders = seen[-1]
    assert all(value.equal(encoders[name]) for name, value in trained.encoders.state_dict().items())
    assert encoders


def test_one_paraphraser_serves_all(tmp_path: Any) -> None:
    result = run(FactorTransfer(**FT), tmp_path / "run", baselines=["alone", "ft_kd", "fitnet", "attention_transfer"])
    stages = list(dict.fromkeys(row["stage"] for row in result.metrics))
    assert stages == ["teacher", "paraphraser", "alone", "ft_kd", "fitnet", "attention_transfer", "student"]
    assert (tmp_path / "run" / "paraphraser.safetensors").exists()
    assert [row["holdout_accuracy"] for row in result.metrics if row["stage"] == "paraphraser"] == [None, None]
    again = run(
        FactorTransfer(**FT),
        tmp_path / "run",
        resume=True,
        baselines=["alone", "ft_kd", "fitnet", "attention_transfer"],
    )
    assert all(value.equal(result.student.state_dict()[name]) for name, value in again.student.state_dict().items())


@pytest.mark.parametrize("stage", ["paraphraser", "student"])
def test_interrupted_and_resumed_gives_the_same_bits(tmp_path: Any, stage: str) -> None:
    steps: list[str] = []

    def count(name: str) -> None:
        steps.append(name)
        if steps.count(stage) == 4 and name == stage:
            os.kill(os.getpid(), signal.SIGTERM)

    class Stopping(FactorTransfer):
        def first(self, *arguments: Any) -> First:
            first = super().first(*arguments)
            return dataclasses.replace(first, loss=lambda *of: (count("paraphraser"), first.loss(*of))[1])

        def loss(self, *arguments: Any) -> Tensor:
            count("student")
            return super().loss(*arguments)

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(FactorTransfer(**FT), whole)
    with pytest.raises(Interrupted):
        run(Stopping(**FT), stopped)
    run(Stopping(**FT), stopped, resume=True)
    for name in ("paraphraser", "student"):
        assert (whole / f"{name}.safetensors").read_bytes() == (stopped / f"{name}.safetensors").read_bytes()


@pytest.mark.parametrize("method", [AttentionTransfer(**AT), FitNet(**AT), FactorTransfer(hard_weight=0.3, **AT)])
@pytest.mark.parametrize("epoch", [0, 3])
def test_the_teacher_runs_once_a_batch(method: Any, epoch: int) -> None:
    teacher, rows = network(6, seed=2), []
    first = {"first": method.first([teacher], INPUTS[:1]).module} if isinstance(method, FactorTransfer) else {}
    trained = method.prepare(network(4), [teacher], INPUTS[:1], **first)
    teacher.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    method.loss(trained, batch(teacher, epoch))
    assert rows == [len(INPUTS)]


def test_the_paraphraser_trains_as_the_students_do(tmp_path: Any) -> None:
    """With a loader's batch size; augmented only where there is an augmentation; one for each rate."""

    class Two(FactorTransfer):
        def comparisons(self) -> dict[str, Any]:
            return {"quarter": dataclasses.replace(FactorTransfer(**self.__dict__), rate=0.25)}

    fields = {**FT, "paraphraser": {"epochs": 1}}
    loader = DataLoader(data(), 8, drop_last=True)
    result = run(Two(**fields), tmp_path / "run", train=loader, batch_size=8, baselines=["quarter"], epochs=1)
    steps = {row["stage"]: row["step"] for row in result.metrics}
    assert steps["paraphraser"] == steps["paraphraser-2"] == steps["student"] > 1
    assert (tmp_path / "run" / "paraphraser-2.safetensors").exists()
    with pytest.raises(PykdError, match=r"training\.augment is set: give augment="):
        run(FactorTransfer(**{**FT, "paraphraser": {"augment": True}}))


@pytest.mark.parametrize("fill", [0.0, 300.0])
def test_attention_of_half_precision_is_finite(fill: float) -> None:
    method, half = AttentionTransfer(**AT), torch.autocast("cpu", torch.float16)

    class Filled(nn.Module):
        def forward(self, maps: Tensor) -> Tensor:
            return maps * 0 + fill

    student = network(4)
    student[1] = Filled()
    with half:
        assert method.loss(student, batch(network(5))).isfinite()


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        (FactorTransfer(**{**FT, "teacher_at": ["11"]}), "the teacher: there is no module '11': did you mean '1'"),
        (FactorTransfer(**{**FT, "student_at": ["3"]}), r"the student: the module '3' gives \[1, 16\]: name one that"),
        (FactorTransfer(**{**FT, "rate": 0.01}), "rate 0.01 leaves none of 6 channels"),
        (AttentionTransfer(teacher_at=["1"], student_at=["4"]), "the student: the module '4' gives"),
        (FitNet(teacher_at=["layer"], student_at=["1"]), "the teacher: there is no module 'layer'"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(method: Any, sentence: str) -> None:
    def fail() -> nn.Module:
        return network(4)

    with pytest.raises(PykdError, match=sentence):
        run(method, student=fail)


def test_maps_that_are_not_finite_are_told() -> None:
    teacher = network(6, seed=2)
    teacher[0].weight.data[0] = float("nan")
    with pytest.raises(PykdError, match="the teacher: the module '1' gives NaN or infinity"):
        run(FactorTransfer(**FT), teacher=teacher, teacher_training=None)


def test_a_teacher_that_is_not_frozen_is_told() -> None:
    student, given = network(4), batch(network(5))
    given.teachers = [network(5)]
    with pytest.raises(PykdError, match=r"the teacher, a Sequential, is not frozen: wrap it in pykd.training.Frozen"):
        AttentionTransfer(**AT).loss(student, given)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: FactorTransfer(p=3), "p should be 1 or 2, got 3"),
        (lambda: FactorTransfer(reduction="sum"), "reduction should be mean or row"),
        (lambda: FactorTransfer(p=1.0), r"p should be 1 or 2, got 1\.0"),
        (lambda: FactorTransfer(batch_norm="no"), "batch_norm should be true or false, got 'no'"),
        (lambda: FactorTransfer(paraphraser=3), "paraphraser should be a mapping of training fields"),
        (lambda: FactorTransfer(paraphraser={"lrr": 1}), "paraphraser: unknown field 'lrr'; did you mean 'lr'"),
        (lambda: FactorTransfer(paraphraser={"lr": -1}), "paraphraser: lr: Input should be greater than 0, got -1"),
        (lambda: FactorTransfer(teacher_at=["a", "b"]), "should name as many modules, at least one, got 2 and 1"),
        (lambda: AttentionTransfer(beta=-1), "beta should be finite and not negative"),
        (lambda: FitNet(teacher_at=["a", "b"], student_at=["a", "b"]), "should name one module, the hint, got 2"),
        (lambda: FitNet(hint_epochs=1), "hint_epochs should be below 1"),
        (lambda: FitNet(hint_epochs=2), r"hint_epochs should be in \[0, 1\]"),
    ],
)
def test_values_that_cannot_be(make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()
