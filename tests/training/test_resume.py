"""What a run folder survives: damage, other people's files, a full disk, signals, a loss that is not finite."""

import errno
import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import pykd
from pykd._files import write_atomically
from pykd.config import Training
from pykd.errors import Interrupted, PykdError
from pykd.training import Batch, Run
from pykd.training.checkpoint import Checkpoints, Position, Saved

ROWS = TensorDataset(
    torch.randn(200, 5, generator=torch.Generator().manual_seed(0)), torch.arange(200) % 3, torch.arange(200)
)


@dataclass(frozen=True)
class Failing(pykd.methods.NoisyTeacher):
    """A noisy teacher that does something in the middle of the student's training."""

    calls: ClassVar[int] = 0
    what: ClassVar[Callable[[], float] | None] = None

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        Failing.calls += 1
        loss = super().loss(student, batch)
        return loss * Failing.what() if Failing.calls == 20 and Failing.what is not None else loss


def train(out: Path | None, what: Callable[[], float] | None = None, **changes: Any) -> Run:
    """A run of a second; ``what`` happens in the student's 20th step and gives a factor of the loss."""
    Failing.calls, Failing.what = 0, what
    arguments: dict[str, Any] = {
        "teacher": lambda: nn.Linear(5, 3),
        "student": lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)),
        "train": ROWS,
        "test": ROWS,
        "teacher_training": Training(epochs=2, batch_size=20),
        "epochs": 4,
        "batch_size": 20,
        "baselines": [],
        "out": out,
        "device": "cpu",
        "progress": False,
    }
    return pykd.distill(Failing(), **{**arguments, **changes})


def interrupted(out: Path, **changes: Any) -> None:
    """Leaves a run that a signal stopped in mid-epoch."""
    with pytest.raises(Interrupted):
        train(out, lambda: os.kill(os.getpid(), signal.SIGTERM) or 1.0, **changes)


def weights(out: Path) -> bytes:
    return (out / "student.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(out)
    return out


def test_run_folder_holds_what_is_promised(whole: Path) -> None:
    names = {path.name for path in whole.iterdir() if not path.name.startswith(".")}
    files = {"config.yaml", "environment.json", "metrics.jsonl", "summary.json", "tensorboard"}
    assert names == files | {"teacher.safetensors", "student.safetensors"}
    assert yaml.safe_load((whole / "config.yaml").read_text())["method"]["name"] == "Failing"
    assert {"python", "torch", "accelerate", "cpu", "threads", "argv"} <= set(
        json.loads((whole / "environment.json").read_text())
    )
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["epoch"]) for row in rows] == [
        *(("teacher", epoch) for epoch in (1, 2)),
        *(("student", epoch) for epoch in (1, 2, 3, 4)),
    ]
    summary = json.loads((whole / "summary.json").read_text())
    assert [row["name"] for row in summary["rows"]] == ["teacher", "student"]
    teacher = summary["rows"][0]
    assert teacher["bytes"] == (whole / "teacher.safetensors").stat().st_size
    assert teacher["parameters"] == teacher["nonzeros"] == 18
    assert 0 <= teacher["accuracy"] <= 1
    assert teacher["latency_ms"] > 0
    assert teacher["seconds"] > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_resume_gives_the_same_bits(whole: Path, tmp_path: Path, number: int) -> None:
    handlers = signal.getsignal(number)
    with pytest.raises(Interrupted, match=r"continue with --resume") as caught:
        train(tmp_path, lambda: os.kill(os.getpid(), number) or 1.0)
    assert caught.value.signum == number
    assert signal.getsignal(number) is handlers
    assert not (tmp_path / "student.safetensors").exists()
    run = train(tmp_path, resume=True)
    assert weights(tmp_path) == weights(whole)
    assert run.metrics == [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in run.metrics] == [row["loss"] for row in train(None).metrics]


def test_signal_without_a_folder_says_that_nothing_is_saved() -> None:
    with pytest.raises(Interrupted, match="without out= nothing is saved"):
        train(None, lambda: os.kill(os.getpid(), signal.SIGINT) or 1.0)


def test_finished_run_is_returned_at_once(whole: Path) -> None:
    before = weights(whole)
    run = train(whole, lambda: pytest.fail("trained again"), resume=True)
    assert weights(whole) == before
    assert run.summary == json.loads((whole / "summary.json").read_text())
    assert len(run.metrics) == 6


def test_folder_with_a_run_is_refused(whole: Path) -> None:
    with pytest.raises(PykdError, match=r"already holds a run: continue it with --resume or give another --out"):
        train(whole)


def test_resume_without_a_folder(tmp_path: Path) -> None:
    with pytest.raises(PykdError, match="needs out="):
        train(None, resume=True)
    assert train(tmp_path / "fresh", resume=True).out == tmp_path / "fresh"


@pytest.mark.parametrize("name", ["model.safetensors", "best.safetensors", "state.pt", "position.json"])
@pytest.mark.parametrize("damage", ["torn", "flipped", "gone"])
def test_damaged_checkpoint_is_passed_over(
    whole: Path, tmp_path: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted(tmp_path)
    newest = max((tmp_path / "checkpoints").iterdir())
    file = newest / name
    content = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    elif damage == "torn":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    train(tmp_path, resume=True, progress=True)
    said = " ".join(capsys.readouterr().err.split())
    assert f"checkpoint {newest} is damaged" in said
    assert weights(tmp_path) == weights(whole)


def test_no_whole_checkpoint_is_told(tmp_path: Path) -> None:
    interrupted(tmp_path)
    for folder in (tmp_path / "checkpoints").iterdir():
        (folder / "state.pt").write_bytes(b"")
    with pytest.raises(PykdError, match=r"is damaged .* no older one is whole: start again with another --out"):
        train(tmp_path, resume=True)


def test_foreign_pickle_is_never_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "exploded"),)

    checkpoints = Checkpoints(tmp_path, keep=2)
    at = Position("student")
    checkpoints.save(Saved(at, {}, {}, {"bomb": pickle.dumps(0)}))
    before = Checkpoints(tmp_path, keep=2).newest()[0]
    assert before is not None
    checkpoints.save(Saved(at, {}, {}, {"bomb": Bomb()}))  # a whole checkpoint, with right sums
    found, passed = checkpoints.newest()
    assert found == before
    assert len(passed) == 1
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"lr": 0.5}, r"student\.training\.lr = 0\.001, not 0\.5"),
        ({"seed": 3}, "seed = 0, not 3"),
        ({"baselines": ["alone"]}, "baselines"),
        ({"teacher_training": Training(epochs=3)}, r"teacher\.training\.epochs = 2, not 3"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, changes: dict[str, Any], key: str) -> None:
    interrupted(tmp_path)
    with pytest.raises(PykdError, match=key):
        train(tmp_path, resume=True, **changes)


def test_other_networks_and_data_are_refused(whole: Path, tmp_path: Path) -> None:
    interrupted(tmp_path)
    with pytest.raises(PykdError, match=r"of another run: student network = 'Sequential with 47 parameters"):
        train(tmp_path, resume=True, student=lambda: nn.Linear(5, 3))
    with pytest.raises(PykdError, match=r"of another run: rows = "):
        train(tmp_path, resume=True, holdout=0.2)
    train(tmp_path, resume=True, checkpoint_seconds=1.0)  # decides nothing
    assert weights(tmp_path) == weights(whole)


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    interrupted(tmp_path / "a")
    interrupted(tmp_path / "b", lr=0.02)
    shutil.rmtree(tmp_path / "a" / "checkpoints")
    shutil.move(tmp_path / "b" / "checkpoints", tmp_path / "a" / "checkpoints")
    with pytest.raises(PykdError, match=r"checkpoints is of another run: student\.training\.lr = 0\.02, not 0\.001"):
        train(tmp_path / "a", resume=True)


def test_changed_weights_of_a_finished_stage_are_refused(tmp_path: Path) -> None:
    interrupted(tmp_path)
    (tmp_path / "teacher.safetensors").write_bytes(b"")
    with pytest.raises(PykdError, match=r"teacher\.safetensors is missing or was changed"):
        train(tmp_path, resume=True)


def test_lost_metrics_are_told(tmp_path: Path) -> None:
    interrupted(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(PykdError, match=r"metrics\.jsonl has lost rows"):
        train(tmp_path, resume=True)


def test_folder_in_use_is_refused(tmp_path: Path) -> None:
    def again() -> float:
        with pytest.raises(PykdError, match="another process is working"):
            pykd.training.run_folder.RunFolder(tmp_path, {}, resume=True)
        return 1.0

    train(tmp_path, again)


def test_unwritable_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PykdError, match=r"cannot write .*file.*; write it somewhere else"):
        train(tmp_path / "file" / "run")


def test_loss_that_is_not_finite_is_told(whole: Path, tmp_path: Path) -> None:
    sentence = (
        r"student: the loss is not finite in step 2 of epoch 3: make sure that the teacher gives finite values, "
        r"or start again with a lower learning rate, e\.g\. lr="
    )
    with pytest.raises(PykdError, match=sentence):
        train(tmp_path, lambda: float("nan"), checkpoint_seconds=1e-6)
    saved, _ = Checkpoints(tmp_path / "checkpoints", keep=2).newest()
    assert saved is not None
    assert (saved.position.epoch, saved.position.step) == (2, 1), "the newest checkpoint is of the last good step"
    train(tmp_path, resume=True)
    assert weights(tmp_path) == weights(whole)


def test_full_disk_leaves_a_run_that_goes_on(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill() -> float:
        monkeypatch.setattr(os, "fsync", full)
        return 1.0

    with pytest.raises(PykdError, match=r"no space is left to write .*: free some and continue with --resume"):
        train(tmp_path, fill)
    assert not [path for path in tmp_path.rglob("*") if "writing" in path.name]
    monkeypatch.setattr(os, "fsync", real)
    train(tmp_path, resume=True)
    assert weights(tmp_path) == weights(whole)


@pytest.mark.parametrize("call", range(1, 7))
def test_weights_files_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    target = tmp_path / "a.safetensors"
    write_atomically(target, b"old")
    calls = 0

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                raise OSError(errno.EIO, "Input/output error")
            return real(*arguments, **keywords)

        return wrapped

    for name in ("fsync", "replace", "open", "close"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))
    with suppress(PykdError):
        write_atomically(target, b"new")
    monkeypatch.undo()
    assert target.read_bytes() in (b"old", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
