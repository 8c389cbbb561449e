"""Methods that train another module in the student's place: what is trained, kept, written and told, and resume."""

import json
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import pykd
from pykd.config import Training
from pykd.errors import Interrupted, PykdError
from pykd.methods import HintonDistillation, StudentAlone
from pykd.training import Batch, Run, label_loss

DRAW = torch.Generator().manual_seed(0)
ROWS = TensorDataset(torch.randn(120, 5, generator=DRAW), torch.arange(120) % 3, torch.arange(120))


class Scaled(nn.Module):
    """The student, whose weights are multiplied by a number that is learnt."""

    def __init__(self, student: nn.Module, scale: float) -> None:
        super().__init__()
        self.network = nn.Linear(5, 3)
        self.network.load_state_dict(student.state_dict())
        self.scale = nn.Parameter(torch.tensor(scale) + 0.01 * torch.rand(()))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs) * self.scale


@dataclass(frozen=True)
class Scaling(StudentAlone):
    """Trains a :class:`Scaled` student."""

    keep_epoch: str = "last"
    scale: float = 2.0

    calls: ClassVar[int] = 0
    what: ClassVar[Callable[[], None] | None] = None
    seen: ClassVar[list[Any]] = []
    at: ClassVar[int] = 25

    def prepare(self, student: nn.Module, teachers: Sequence[nn.Module], inputs: Tensor) -> nn.Module:
        Scaling.seen.append([parameter.clone() for teacher in teachers for parameter in teacher.parameters()])
        return Scaled(student, self.scale)

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        Scaling.calls += 1
        if Scaling.calls == Scaling.at and Scaling.what is not None:
            Scaling.what()
        Scaling.seen.append((batch.epoch, batch.epochs, batch.train_rows))
        return label_loss(student, batch)

    def finish(self, trained: nn.Module, student: nn.Module) -> dict[str, Any]:
        student.load_state_dict({name: value * trained.scale for name, value in trained.network.state_dict().items()})
        return {"scale": trained.scale.item(), "warnings": ["the scale was learnt"]}

    def comparisons(self) -> dict[str, Any]:
        return {"alone": StudentAlone(), "twin": Scaling(scale=0.5)}


def train(out: Path | None, what: Callable[[], None] | None = None, at: int = 25, **changes: Any) -> Run:
    """A run of a second; ``what`` happens in step ``at`` of those that a scaled student takes."""
    Scaling.calls, Scaling.what, Scaling.at = 0, what, at
    Scaling.seen.clear()
    arguments: dict[str, Any] = {
        "teacher": lambda: nn.Linear(5, 3),
        "student": lambda: nn.Linear(5, 3),
        "train": ROWS,
        "test": ROWS,
        "teacher_training": Training(epochs=1, batch_size=20),
        "epochs": 3,
        "batch_size": 20,
        "lr": 0.05,
        "baselines": ["alone", "twin"],
        "out": out,
        "device": "cpu",
        "progress": False,
    }
    method = changes.pop("method", Scaling())
    return pykd.distill(method, **{**arguments, **changes})


FILES = ("alone.safetensors", "twin.safetensors", "student.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(out)
    return out


def test_files_and_rows_are_of_the_plain_network(whole: Path) -> None:
    rows = {row["name"]: row for row in json.loads((whole / "summary.json").read_text())["rows"]}
    for name in ("twin", "student"):
        stored = load_file(whole / f"{name}.safetensors")
        assert list(stored) == ["bias", "weight"]
        network = nn.Linear(5, 3)
        pykd.training.load_weights(network, whole / f"{name}.safetensors")
        inputs, labels, _ = ROWS.tensors
        assert rows[name]["accuracy"] == (network(inputs).argmax(-1) == labels).double().mean().item()
        assert rows[name]["parameters"] == 18
        assert rows[name]["best_epoch"] == 3
    assert rows["twin"]["facts"]["scale"] < 1 < rows["student"]["facts"]["scale"]
    assert rows["alone"]["facts"] is rows["teacher"]["facts"] is None


def test_a_method_is_told_where_training_stands_and_gets_trained_teachers() -> None:
    run = train(None, baselines=[])
    trial, real, *batches = Scaling.seen
    assert batches == [(epoch, 3, 108) for epoch in range(3) for _ in range(6)]
    trained = list(run.teacher.module.parameters())
    assert all(one.equal(other) for one, other in zip(real, trained, strict=True))
    assert not any(one.equal(other) for one, other in zip(trial, trained, strict=True)), "before the run, untrained"


def test_held_out_accuracy_is_the_trained_module_s() -> None:
    """The factor turns the plain student's answers round."""
    run = train(None, method=Scaling(scale=-3.0), baselines=[], lr=1e-6, epochs=1)
    inputs, labels, _ = ROWS.tensors
    row = run.metrics[-1]
    assert row["stage"] == "student"
    correct = (run.student(inputs).argmax(-1) == labels).double().mean().item()
    assert run.summary["rows"][-1]["accuracy"] == correct
    assert run.summary["rows"][-1]["holdout_accuracy"] == row["holdout_accuracy"]


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_best_or_the_last_epoch_is_finished(keep: str) -> None:
    run = train(None, method=Scaling(keep_epoch=keep), baselines=[], epochs=8, lr=1.0)
    accuracies = [row["holdout_accuracy"] for row in run.metrics if row["stage"] == "student"]
    row = run.summary["rows"][-1]
    assert accuracies[-1] < max(accuracies), "the test needs a run that gets worse"
    assert row["holdout_accuracy"] == (max(accuracies) if keep == "best" else accuracies[-1])
    expected = len(accuracies) - accuracies[::-1].index(max(accuracies)) if keep == "best" else 8
    assert row["best_epoch"] == expected


@pytest.mark.parametrize("step", [3, 18, 25])
@pytest.mark.parametrize("keep", ["best", "last"])
def test_resume_within_and_after_such_a_stage_gives_the_same_bits(tmp_path: Path, keep: str, step: int) -> None:
    method = Scaling(keep_epoch=keep)
    train(tmp_path / "whole", method=method)
    with pytest.raises(Interrupted):
        train(tmp_path / "run", lambda: os.kill(os.getpid(), signal.SIGTERM), at=step, method=method)
    run = train(tmp_path / "run", method=method, resume=True)
    for name in FILES:
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    summaries = [json.loads((tmp_path / each / "summary.json").read_text())["rows"] for each in ("run", "whole")]
    for one, other in zip(*summaries, strict=True):
        assert (one["facts"], one["accuracy"]) == (other["facts"], other["accuracy"])
    again = train(tmp_path / "run", lambda: pytest.fail("trained again"), at=1, method=method, resume=True)
    assert again.summary == run.summary
    assert again.student.weight.equal(run.student.weight)


def test_stopped_while_finishing_it_finishes_again(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: Scaling, trained: nn.Module, student: nn.Module) -> dict[str, Any]:
        student.weight.data.zero_()
        raise PykdError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Scaling, "finish", stop)
        with pytest.raises(PykdError, match="the disk is full"):
            train(tmp_path)
    train(tmp_path, resume=True)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes(), name


def test_warnings_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    train(None, baselines=[], progress=True)
    assert "student: the scale was learnt" in capsys.readouterr().err


def test_what_is_wrong_with_the_conversion_is_told_before_the_teacher_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Scaling, student: nn.Module, teachers: Sequence[nn.Module], inputs: Tensor) -> nn.Module:
        raise PykdError("cannot be scaled")

    monkeypatch.setattr(Scaling, "prepare", refuse)
    with pytest.raises(PykdError, match="cannot be scaled"):
        train(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_teachers_may_learn_from_other_rows() -> None:
    few = TensorDataset(*(values[:30] for values in ROWS.tensors))
    arguments = {"train": few, "holdout": ROWS, "baselines": [], "method": HintonDistillation()}
    small, large = train(None, **arguments), train(None, **arguments, teacher_train=ROWS)
    assert [row["step"] for row in small.metrics] == [2, 2, 4, 6]
    assert [row["step"] for row in large.metrics] == [6, 2, 4, 6]
    with pytest.raises(PykdError, match="teacher_train needs the held-out rows as holdout="):
        train(None, teacher_train=ROWS)
