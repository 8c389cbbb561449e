"""What a run folder survives beside kills: damaged, foreign and forged checkpoints, a full disk, signals anywhere."""

import errno
import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import pykd
from pykd.config import Training
from pykd.errors import Interrupted, PykdError
from pykd.methods import StudentAlone
from pykd.training import Run, checkpoint, loop
from pykd.training.checkpoint import Checkpoints, Position, Saved
from pykd.training.run_folder import RunFolder
from pykd.training.teacher import TeacherLogits

ROWS = TensorDataset(
    torch.randn(80, 5, generator=torch.Generator().manual_seed(0)), torch.arange(80) % 3, torch.arange(80)
)
HOW = Training(epochs=2, batch_size=20)
STEPS = 4


def train(out: Path, **changes: Any) -> Run:
    arguments: dict[str, Any] = {"method": pykd.methods.NoisyTeacher(), "training": HOW, "resume": True}
    return pykd.distill(
        teacher=lambda: nn.Linear(5, 3), student=lambda: nn.Linear(5, 3), train=ROWS, test=ROWS, teacher_training=HOW,
        baselines=[], out=out, device="cpu", progress=False, **{**arguments, **changes},
    )  # fmt: skip


def weights(out: Path) -> bytes:
    return (out / "student.safetensors").read_bytes()


def metrics(out: Path) -> list[Any]:
    return [json.loads(line) | {"seconds": None} for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured."""
    monkeypatch.setattr(sys.modules["pykd.training.distill"], "describe", lambda *_: {})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    train(out)
    return out


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped in the student's second epoch, with two checkpoints."""
    out = tmp_path_factory.mktemp("half") / "run"
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, "student", 1, 2)
        with pytest.raises(Interrupted):
            train(out)
    return out


def at_step(patch: pytest.MonkeyPatch, stage: str, epoch: int, step: int) -> None:
    real = loop.Fit._after_step

    def after(fit: loop.Fit) -> None:
        if (fit._at.stage, fit._at.epoch, fit._at.step) == (stage, epoch, step):
            stop()
        real(fit)

    patch.setattr(loop.Fit, "_after_step", after)


@pytest.fixture
def run(half: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(half, tmp_path / "run")
    return tmp_path / "run"


def forged(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes position.json, and gives it the right sum."""
    content = json.loads((folder / "position.json").read_text())
    del content["sha256"]
    change(content)
    content["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "position.json").write_text(json.dumps(content))


def position(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: forged(folder, lambda content: content["position"].update(changes))


def in_place(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        shutil.rmtree(folder)
        make(folder)

    return change


def in_place_of_file(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / "position.json").unlink()
        make(folder / "position.json")

    return change


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file": (in_place(Path.touch), "Not a directory"),
    "a loop of links": (in_place(lambda folder: folder.symlink_to(folder)), "Too many levels"),
    "an empty folder": (in_place(Path.mkdir), "position.json: No such file"),
    "a folder as file": (in_place_of_file(Path.mkdir), "position.json: Is a directory"),
    "deep": (in_place_of_file(lambda file: file.write_text("[" * 10**5)), "recursion"),
    "a number": (in_place_of_file(lambda file: file.write_text("5")), "has no attribute"),
    "not text": (in_place_of_file(lambda file: file.write_bytes(b"\xff\xfe\xff")), "decode"),
    "too large": (in_place_of_file(lambda file: file.write_text(" " * 10**6)), "position.json is too large"),
    "another version": (
        lambda folder: forged(folder, lambda content: content.update(format=2)), "of another version of pykd",
    ),
    "no position": (
        lambda folder: forged(folder, lambda content: content.update(position=5)), "position: Input should be an",
    ),
    "no sums": (lambda folder: forged(folder, lambda content: content.update(files=[])), "indices"),
    "a negative step": (position(step=-1), "step: Input should be greater than or equal to 0"),
    "a word as epoch": (position(epoch="1"), "epoch: Input should be a valid integer"),
    "no time": (position(seconds=float("nan")), "seconds: Input should be a finite number"),
    "an unknown field": (position(steps=1), "steps: Unexpected"),
    "wrong results": (position(finished={"teacher": 1}), "finished.teacher: Input should be"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_what_is_no_checkpoint_is_passed_over_in_one_sentence(
    case: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "LARGEST_POSITION_BYTES", 500_000)
    change, words = DAMAGE[case]
    checkpoints = Checkpoints(run / "checkpoints", keep=2)
    older, newest = sorted((run / "checkpoints").iterdir())
    change(newest)
    saved, (sentence,) = checkpoints.newest()
    assert sentence.startswith(f"checkpoint {newest} is damaged (")
    assert words in sentence
    assert "\n" not in sentence
    assert saved is not None
    assert (saved.position.stage, saved.position.epoch, saved.position.step) == ("teacher", 2, 0)
    checkpoints.save(saved)
    assert sorted((run / "checkpoints").iterdir()) == [older, newest.with_name(f"{int(newest.name) + 1:06d}")]


def swapped(kind: Callable[..., torch.optim.Optimizer], shape: Sequence[int] = (3, 5)) -> Callable[[Saved], Saved]:
    def change(saved: Saved) -> Saved:
        parameters = [nn.Parameter(torch.zeros(*each)) for each in (shape, (3,))]
        optimizer = kind(parameters, lr=1e-3, weight_decay=0.0, fused=True)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        return replace(saved, state={**saved.state, "optimizer": optimizer.state_dict()})

    return change


def moved(**changes: Any) -> Callable[[Saved], Saved]:
    return lambda saved: replace(saved, position=replace(saved.position, **changes))


def state(**changes: Any) -> Callable[[Saved], Saved]:
    return lambda saved: replace(saved, state={**saved.state, **changes})


FOREIGN: dict[str, tuple[Callable[[Saved], Saved], str]] = {
    "sgd": (swapped(torch.optim.SGD), r"does not fit this run \(its optimiser is no Adam with the options"),
    "adamw": (swapped(torch.optim.AdamW), r"does not fit this run \(its optimiser is no Adam with the options"),
    "wider": (swapped(torch.optim.Adam, (3, 6)), r"does not fit this run \(its optimiser is that of another network"),
    "no optimiser": (state(optimizer=3), "the checkpoint of student does not fit this run"),
    "losses": (state(losses=torch.zeros(STEPS + 1)), "the checkpoint of student does not fit this run"),
    "no random numbers": (state(random=[{}]), "the checkpoint of student does not fit this run"),
    "epoch": (moved(epoch=3), r"does not fit this run \(it stands in step 2 of 4 after epoch 3 of 2\)"),
    "step": (moved(step=5), r"does not fit this run \(it stands in step 5 of 4 after epoch 1 of 2\)"),
    "stage": (moved(stage="alone"), "has stages that this run has not: start again with another --out"),
    "results": (moved(finished={"teacher": {}, "x": {}}), "has stages that this run has not"),
    "no result": (moved(finished={"teacher": {}}), r"teacher\.safetensors is missing or was changed"),
    "weights": (
        lambda saved: replace(saved, model={"weight": torch.zeros(3, 5)}),
        "the checkpoint belongs to another network: the file has no 'bias'",
    ),
    "best weights": (
        lambda saved: replace(saved, best={"weight": torch.zeros(3, 5)}),
        "the checkpoint belongs to another network: the file has no 'bias'",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_sentence(case: str, run: Path) -> None:
    change, words = FOREIGN[case]
    checkpoints = Checkpoints(run / "checkpoints", keep=2)
    saved, _ = checkpoints.newest()
    assert saved is not None
    checkpoints.save(change(saved))
    with pytest.raises(PykdError, match=words) as caught:
        train(run)
    assert "\n" not in str(caught.value)


class Another(StudentAlone):
    """Has no fields that could differ."""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": pykd.methods.NoisyTeacher(sigma=0.25)}, r"method\.sigma = 0\.5, not 0\.25"),
        ({"method": Another()}, r"method\.name = 'NoisyTeacher', not 'Another'"),
        ({"training": HOW.model_copy(update={"clip_norm": 1.0})}, r"student\.training\.clip_norm = None, not 1\.0"),
        ({"cache_logits": False}, r"cache_logits = True, not False"),
    ],
)
def test_a_run_of_another_recipe_is_refused(changes: dict[str, Any], words: str, run: Path) -> None:
    with pytest.raises(PykdError, match=words):
        train(run, **changes)


def test_what_a_kill_leaves_in_the_folder_is_no_hindrance(whole: Path, run: Path) -> None:
    folder = run / "checkpoints"
    (folder / ".writing").symlink_to(run)
    (folder / "000000").mkdir()
    (folder / "000000" / "position.json").write_text("{")
    (folder / "²").mkdir()
    (folder / "notes.txt").touch()
    (run / ".student.safetensors.1").write_bytes(b"half")
    train(run)
    assert weights(run) == weights(whole)
    assert metrics(run) == metrics(whole)
    assert (run / "config.yaml").exists()


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied"), NotADirectoryError(20, "Not")])
def test_checkpoints_that_cannot_be_listed_are_told(error: OSError, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, before = os.listdir, metrics(run)

    def listed(path: Any) -> list[str]:
        if Path(path).name == "checkpoints":
            raise error
        return real(path)

    monkeypatch.setattr(os, "listdir", listed)
    with pytest.raises(PykdError, match=r"cannot read .*checkpoints: .*; mend that or start again with another --out"):
        train(run)
    assert metrics(run) == before


@pytest.mark.parametrize("name", ["config.yaml", "summary.json"])
@pytest.mark.parametrize("content", [b"", b"5", b"\xff\xfe\xff", b"[" * 3000, b"2001-99-99"])
def test_files_that_hold_something_else_are_told(name: str, content: bytes, run: Path) -> None:
    (run / name).write_bytes(content)
    with pytest.raises(PykdError, match=rf"{name} cannot be read: .*--") as caught:
        train(run)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{}", '{"rows": 5}', '{"rows": [{}]}'])
def test_a_summary_without_a_table_is_told(content: str, run: Path) -> None:
    (run / "summary.json").write_text(content)
    with pytest.raises(PykdError, match=r"summary\.json cannot be read: put it back, or delete it and train again"):
        train(run)


class Full:
    """A file on a disk that is full after a few bytes."""

    def __init__(self, stream: IO[Any]) -> None:
        self._stream = stream

    def __enter__(self) -> "Full":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def write(self, content: Any) -> int:
        self._stream.write(content[:7])
        self._stream.flush()
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "name",
    ["environment.json", "config.yaml", "metrics.jsonl", "teacher.safetensors", "model.safetensors", "state.pt",
     "position.json", "student.safetensors", "summary.json", "tensorboard"],
)  # fmt: skip
def test_full_disk_at_any_write_leaves_a_run_that_goes_on(
    name: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.open

    def opened(path: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        stream = real(path, mode, *rest, **options)
        return Full(stream) if name in path.name and mode[0] in "wa" else stream

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            patch.setattr(SummaryWriter, "close", full)
        with pytest.raises(PykdError, match=r"no space is left to write .*: free some and continue with --resume"):
            train(tmp_path / "run")
    train(tmp_path / "run")
    assert weights(tmp_path / "run") == weights(whole)
    assert metrics(tmp_path / "run") == metrics(whole)
    assert not [path for path in (tmp_path / "run").rglob(".*") if path.name != ".lock"]


def once(patch: pytest.MonkeyPatch, owner: Any, name: str, call: int = 1) -> None:
    """A signal comes when the function is called, for the ``call``-th time."""
    real, calls = getattr(owner, name), 0

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            stop()
        return real(*arguments, **options)

    patch.setattr(owner, name, wrapped)


MOMENTS: dict[str, tuple[Any, str, int]] = {
    "before the first step": (sys.modules["pykd.training.distill"], "_settings", 1),
    "while a stage is evaluated": (loop, "accuracy", 3),
    "between two stages": (RunFolder, "write_weights", 1),
    "while the teacher's logits are computed": (TeacherLogits, "_compute", 1),
    "while the table is measured": (sys.modules["pykd.training.distill"], "accuracy", 1),
    "while networks are described": (sys.modules["pykd.training.distill"], "describe", 1),
    "while the summary is written": (RunFolder, "finish", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_any_moment_saves_and_stops(
    moment: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        once(patch, *MOMENTS[moment])
        with pytest.raises(Interrupted, match="is saved: continue with --resume"):
            train(out)
    saved, damaged = Checkpoints(out / "checkpoints", keep=2).newest()
    assert not damaged
    if moment == "while a stage is evaluated":
        assert saved is not None
        assert (saved.position.stage, saved.position.epoch, saved.position.step) == ("student", 0, STEPS)
        assert len(metrics(out)) == HOW.epochs
    train(out)
    assert weights(out) == weights(whole)
    assert metrics(out) == metrics(whole)


def test_a_clock_that_goes_backwards_changes_nothing(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock: Iterator[float] = iter(range(10**9, 0, -1000))
    monkeypatch.setattr("time.time", lambda: next(clock))
    train(tmp_path / "run", checkpoint_seconds=0.0)
    assert weights(tmp_path / "run") == weights(whole)


def test_newest_whole_checkpoints_stay(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in range(5):
        checkpoints.save(Saved(Position("student", step=step), {}, {}, {}))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["000003", "000004", "000005"]
    for name in ("000004", "000005"):
        (tmp_path / name / "state.pt").unlink()
    saved, passed = checkpoints.newest()
    assert saved is not None
    assert (saved.position.step, len(passed)) == (2, 2)
    checkpoints.save(saved)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["000003", "000006"]
