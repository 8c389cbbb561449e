"""Runs with several teachers: their rows, files, logits and random numbers, and what is refused."""

import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

import pykd
from pykd.cli import app
from pykd.config import Training
from pykd.errors import Interrupted, PykdError
from pykd.methods import LogitRegression, NoisyTeacher
from pykd.training import Batch, Run, load_weights

DRAW = torch.Generator().manual_seed(0)
ROWS = TensorDataset(torch.randn(150, 5, generator=DRAW), torch.arange(150) % 3, torch.arange(150))
BRIEF = Training(epochs=2, batch_size=20)


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def narrow() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))


def train(method: Any = None, **changes: Any) -> Run:
    arguments: dict[str, Any] = {
        "teacher": [wide, wide, narrow],
        "student": lambda: nn.Linear(5, 3),
        "train": ROWS,
        "test": ROWS,
        "teacher_training": BRIEF,
        "training": BRIEF,
        "baselines": [],
        "device": "cpu",
        "progress": False,
    }
    return pykd.distill(method or NoisyTeacher(), **{**arguments, **changes})


def same(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.state_dict().values(), right.state_dict().values(), strict=True))


@dataclass(frozen=True)
class Watching(LogitRegression):
    """Keeps the batches it was given."""

    batches: list[Batch] = field(default_factory=list, compare=False)

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        self.batches.append(batch)
        return super().loss(student, batch)


def test_every_teacher_has_its_row_its_file_and_its_metrics(tmp_path: Path) -> None:
    run = train(out=tmp_path, baselines=["alone", "clean", "kd"])
    names = ["teacher", "teacher-2", "teacher-3", "alone", "clean", "kd", "student"]
    assert [row["name"] for row in run.summary["rows"]] == names
    assert [row["label"] for row in run.summary["rows"]][:3] == names[:3]
    assert list(dict.fromkeys(row["stage"] for row in run.metrics)) == names
    assert run.teacher is run.teachers[0]
    for name, teacher in zip(names, run.teachers, strict=False):
        stored = wide() if name != "teacher-3" else narrow()
        load_weights(stored, tmp_path / f"{name}.safetensors")
        assert same(stored, teacher.module)
    again = train(out=tmp_path, baselines=["alone", "clean", "kd"], resume=True)
    assert all(same(*pair) for pair in zip(run.teachers, again.teachers, strict=True))
    assert again.summary == run.summary


def test_the_same_network_listed_again_is_another_seed() -> None:
    first, second, _ = train().teachers
    assert not same(first, second)
    assert same(first, train(teacher=wide).teacher)
    assert same(first, train(teacher=(wide,)).teacher)


@pytest.mark.parametrize("cache", [True, False])
def test_logits_are_those_of_every_teacher(cache: bool) -> None:
    watching = Watching()
    run = train(watching, cache_logits=cache)
    for batch in watching.batches:
        expected = [teacher(batch.inputs) for teacher in run.teachers]
        torch.testing.assert_close(batch.teacher_logits, expected[0])
        torch.testing.assert_close(batch.all_teacher_logits, expected)
        torch.testing.assert_close(batch.mean_teacher_logits, sum(expected) / 3)
        assert not batch.mean_teacher_logits.requires_grad


def test_a_trained_teacher_stays_as_it_is(tmp_path: Path) -> None:
    given = narrow()
    before = [value.clone() for value in given.state_dict().values()]
    run = train(teacher=[wide, given], teacher_training=[BRIEF, None], out=tmp_path)
    assert run.teachers[1].module is given
    assert all(map(torch.equal, before, given.state_dict().values()))
    assert [row["seconds"] is None for row in run.summary["rows"]] == [False, True, False]
    stored = narrow()
    load_weights(stored, tmp_path / "teacher-2.safetensors")
    assert same(stored, given)


@dataclass(frozen=True)
class Stops(NoisyTeacher):
    """Sends a signal in the student's fifth step."""

    steps: ClassVar[int] = 0

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        Stops.steps += 1
        if Stops.steps == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().loss(student, batch)


def interrupted(out: Path) -> None:
    """Leaves a run that a signal stopped after its teachers."""
    Stops.steps = 0
    with pytest.raises(Interrupted):
        train(Stops(), out=out)


def test_resumed_run_has_the_same_bits(tmp_path: Path) -> None:
    interrupted(tmp_path)
    resumed, whole = train(Stops(), out=tmp_path, resume=True), train()
    assert same(resumed.student, whole.student)
    assert all(same(*pair) for pair in zip(resumed.teachers, whole.teachers, strict=True))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"teacher_training": [BRIEF, BRIEF, Training(epochs=3)]}, r"more_teachers = "),
        ({"teacher": [wide, narrow, wide]}, r"teacher-2 network = 'Sequential with .*, not 'Sequential with "),
        ({"teacher": [wide, wide]}, "more_teachers = "),
    ],
)
def test_other_teachers_are_not_resumed_with(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    interrupted(tmp_path)
    with pytest.raises(PykdError, match=sentence):
        train(Stops(), out=tmp_path, resume=True, **changes)


MODULE = nn.Linear(5, 3)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"teacher": [wide, nn.Linear(5, 100)]}, "teacher-2 gives 100 logits and the student 3: give both the same"),
        ({"teacher": [wide, nn.Linear(6, 3)]}, r"the teacher-2 cannot take inputs of shape \[5\]"),
        ({"teacher": [wide, 5]}, "teacher-2 should be a module or a function that makes one, got int"),
        ({"teacher": []}, "teacher is an empty list: give at least one network"),
        ({"teacher": [MODULE, wide, MODULE]}, "teacher and teacher-3 share parameters: give two networks"),
        ({"student": MODULE, "teacher": [wide, MODULE]}, "teacher-2 and student share parameters"),
        ({"teacher_training": [BRIEF]}, "teacher_training has 1 entries for 3 teachers: give one for each"),
        ({"teacher_training": [BRIEF, None, 3]}, r"teacher_training should be a pykd\.config\.Training, got int"),
        ({"config": pykd.config.load("noisy_teacher-digits")}, "config has 1 teachers and teacher 3"),
    ],
)
def test_broken_rules_say_which(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PykdError, match=sentence) as caught:
        train(**changes)
    assert "\n" not in str(caught.value)


def test_a_recipe_with_several_teachers(tmp_path: Path) -> None:
    def run(out: str, *settings: str) -> list[str]:
        brief = [f"{role}.training.epochs=1" for role in ("teacher", "student")]
        changes = [f"--set={each}" for each in (*brief, "teacher.widths=[16]", "baselines=[kd]", *settings)]
        done = CliRunner().invoke(app, ["distill", "noisy_teacher-digits", *changes, "--out", str(tmp_path / out)])
        assert done.exit_code == 0, done.output
        again = CliRunner().invoke(app, ["evaluate", str(tmp_path / out)])
        found, before = (each.stdout.splitlines()[1:] for each in (again, done))  # the other columns differ
        assert [line.split("%")[0] for line in found] == [line.split("%")[0] for line in before]
        return again.stdout.splitlines()[1:]

    first = run("first", "more_teachers=[{name: mlp, widths: [4], training: {epochs: 1}}]", "student.dropout=0.2")
    assert [line.split()[0] for line in first] == ["teacher", "teacher-2", "student,", "student,"]
    weights = tmp_path / "second.safetensors"
    weights.write_bytes((tmp_path / "first" / "teacher-2.safetensors").read_bytes())
    second = run("second", f"more_teachers=[{{name: mlp, widths: [4], weights: {weights}}}]", "method.noise_on=student")
    assert second[1].split()[1] == first[1].split()[1]
    assert (tmp_path / "second" / "teacher-2.safetensors").read_bytes() == weights.read_bytes()
