"""Every method and every stage, interrupted in mid-epoch and between epochs: the bits are those of one go."""

import copy
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import pykd
from pykd.config import Training
from pykd.errors import Interrupted
from pykd.methods import METHODS, CrossDistillation, FactorTransfer, NoisyTeacher, StudentAlone, VariationalStudent
from pykd.training import Method, Run
from pykd.training.loop import Fit
from pykd.training.progress import Reporter

DRAW = torch.Generator().manual_seed(0)
IMAGES, LABELS = torch.randn(70, 2, 6, 6, generator=DRAW), torch.arange(70) % 3
ROWS = TensorDataset(IMAGES[:60], LABELS[:60], torch.arange(60))
HOLDOUT = TensorDataset(IMAGES[60:], LABELS[60:], torch.arange(10))
HOW = Training(epochs=2, batch_size=16, lr=1e-2, warmup=0.2)  # four steps an epoch, the last a smaller one
AT: Any = {"teacher_at": ["4"], "student_at": ["4"]}

Point = tuple[str, str, int, int]


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Rows that are other ones in every epoch, by torch's global random numbers."""

    def __len__(self) -> int:
        return 60

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return IMAGES[row] + 0.1 * torch.randn(2, 6, 6), LABELS[row]


def network(dropout: float = 0.3) -> nn.Module:
    """Has everything that a checkpoint must hold: weights, buffers, and dropout's random numbers."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(dropout), nn.Linear(16, 3),
    )  # fmt: skip


def train(method: Method, out: Path, baselines: list[str], changes: dict[str, Any]) -> Run:
    arguments: dict[str, Any] = {
        "teacher": network, "student": network, "train": ROWS, "holdout": HOLDOUT, "teacher_training": HOW,
        "training": HOW, "baselines": baselines, "out": out, "resume": True, "device": "cpu", "progress": False,
    }  # fmt: skip
    return pykd.distill(method, **{**arguments, **{name: made() for name, made in changes.items()}})


def left(out: Path) -> dict[str, Any]:
    """Everything that a run leaves and that is not a time."""
    rows = [json.loads(line) | {"seconds": None} for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {"metrics": rows} | {file.name: file.read_bytes() for file in out.glob("*.safetensors")}


@pytest.fixture
def between(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Point], None]], None]:
    """Has a function called after every step, epoch and step before the first epoch, and skips measurements."""
    monkeypatch.setattr(sys.modules["pykd.training.distill"], "describe", lambda *_: {})

    def install(reached: Callable[[Point], None]) -> None:
        real, epoch, before = Fit._after_step, Reporter.epoch, Reporter.before

        def after_step(fit: Fit) -> None:
            reached(("step", fit._at.stage, fit._at.epoch, fit._at.step))
            real(fit)

        def after_epoch(reporter: Reporter, row: Any, epochs: int) -> None:
            reached(("epoch", row["stage"], row["epoch"], 0))
            epoch(reporter, row, epochs)

        def before_epochs(reporter: Reporter, stage: str, done: int, of: int) -> None:
            reached(("start", stage, done, of))
            before(reporter, stage, done, of)

        monkeypatch.setattr(Fit, "_after_step", after_step)
        monkeypatch.setattr(Reporter, "epoch", after_epoch)
        monkeypatch.setattr(Reporter, "before", before_epochs)

    return install


def interrupted(method: Method, folder: Path, between: Any, baselines: list[str], changes: dict[str, Any]) -> set[str]:
    """Trains in one go and again with a signal in each stage's second epoch, after its first and before it.

    Returns:
        The stages.
    """
    points: list[Point] = []
    hook: list[Callable[[Point], None]] = [points.append]
    between(lambda point: hook[0](point))
    train(method, folder / "whole", baselines, changes)
    stages = dict.fromkeys(stage for _, stage, *_ in points)
    wanted = [
        point
        for point in dict.fromkeys(points)
        if point[0] == "start" or point[2:] in ((1, 2), (0, 3)) or point[:1] + point[2:] == ("epoch", 1, 0)
    ]
    waiting = list(wanted)

    def reached(point: Point) -> None:
        if waiting and point == waiting[0]:
            del waiting[0]
            os.kill(os.getpid(), signal.SIGTERM)

    hook[0] = reached
    for _ in wanted:
        with pytest.raises(Interrupted):
            train(method, folder / "parts", baselines, changes)
    train(method, folder / "parts", baselines, changes)
    assert not waiting
    for stage in {stage for kind, stage, *_ in points if kind == "epoch"}:
        assert [kind for kind, its, *_ in wanted if its == stage and kind != "start"] == ["step", "epoch", "step"]
    whole, parts = left(folder / "whole"), left(folder / "parts")
    assert whole["metrics"] == parts["metrics"]
    assert {name for name in whole if whole[name] != parts.get(name)} == set()
    assert {f"{stage}.safetensors" for stage in stages} <= parts.keys()
    return set(stages)


@dataclass(frozen=True)
class Drawn(StudentAlone):
    """Adds random numbers to the weights in three steps before the first epoch."""

    keep_epoch: ClassVar[str] = "last"
    trains: ClassVar[bool] = True

    def prepare(self, student: nn.Module, teachers: Sequence[nn.Module], inputs: Tensor) -> nn.Module:
        return copy.deepcopy(student)

    def start(
        self, trained: nn.Module, teachers: Sequence[nn.Module], inputs: Tensor, done: int
    ) -> Iterator[tuple[int, int]]:
        for step in range(done, 3):
            for parameter in trained.parameters():
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
            yield step + 1, 3

    def finish(self, trained: nn.Module, student: nn.Module) -> dict[str, Any]:
        student.load_state_dict(trained.state_dict())
        return {}


PRUNING = CrossDistillation(fine_tune="kd", keep=0.5)
CASES: dict[str, tuple[Method, list[str]]] = {
    "noisy teacher": (NoisyTeacher(), ["alone", "clean", "kd"]),
    "variational student": (
        VariationalStudent(warmup_start=0.0, warmup_end=0.5),
        ["kd", "sparse_vd", "kd_sparse_vd", "bayesian_compression"],
    ),
    "factor transfer": (
        FactorTransfer(paraphraser={"epochs": 2, "batch_size": 16}, batch_norm=True, **AT),
        ["attention_transfer", "fitnet", "ft_kd"],
    ),
    "cross distillation": (
        PRUNING, ["magnitude", "features", "soft", "thinet"],
    ),
    "pruning by steps": (dataclasses.replace(PRUNING, solver="adam", steps=5, linear=True, fine_tune="none"), []),
    "drawn before the epochs": (Drawn(), []),
    "pruning to int8": (dataclasses.replace(PRUNING, int8=True), []),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_method_goes_on_with_the_same_bits_in_each_stage(case: str, tmp_path: Path, between: Any) -> None:
    method, baselines = CASES[case]
    changes = {"teacher": lambda: [network, network]} if case == "noisy teacher" else {}
    changes["teacher_training"] = lambda: [HOW, HOW] if case == "noisy teacher" else HOW
    stages = interrupted(method, tmp_path, between, baselines, changes)
    assert {"teacher", "student", *baselines} <= stages
    assert ("teacher-2" in stages) == (case == "noisy teacher")
    assert ("paraphraser" in stages) == (case == "factor transfer")


def test_every_method_is_among_the_cases() -> None:
    tried = {type(method) for method, _ in CASES.values()}
    tried |= {type(method.comparisons()[name]) for method, baselines in CASES.values() for name in baselines}
    assert {type(made(**AT) if name in ("factor_transfer",) else made()) for name, made in METHODS.items()} <= tried


def flipped(inputs: Tensor, generator: torch.Generator) -> Tensor:
    return inputs.flip(-1) if torch.rand((), generator=generator) < 0.5 else inputs


def shuffled(**options: Any) -> Callable[[], DataLoader[Any]]:
    return lambda: DataLoader(Noisy(), 16, shuffle=True, **options)


def iterated() -> DataLoader[Any]:
    """Not read by row: it draws with replacement."""
    return DataLoader(Noisy(), 16, sampler=torch.utils.data.RandomSampler(Noisy(), replacement=True))


WAYS: dict[str, dict[str, Any]] = {
    "bf16": {"mixed_precision": "bf16"},
    "the first epoch is the best": {"lr": 20.0, "optimizer": "sgd", "clip_norm": 1.0, "schedule": "constant"},
    "fp16": {"mixed_precision": "fp16", "clip_norm": 0.1},
    "parts of batches": {"accumulate": 3, "clip_norm": 0.1, "optimizer": "sgd"},
    "augmented": {"augment": True, "optimizer": "adamw", "weight_decay": 0.1, "schedule": "step"},
    "drawn anew": {"train": shuffled()},
    "drawn by a worker": {"train": shuffled(num_workers=1), "epochs": 2},
    "iterated": {"train": iterated},
}


@pytest.mark.parametrize("way", WAYS)
def test_each_way_to_train_goes_on_with_the_same_bits(way: str, tmp_path: Path, between: Any) -> None:
    fields = dict(WAYS[way])
    train = fields.pop("train", lambda: ROWS)
    how = HOW.model_copy(update=fields)
    changes = {"train": train, "training": lambda: how, "teacher_training": lambda: None, "augment": lambda: flipped}
    torch.manual_seed(0)
    teacher: Any = network().eval()
    teacher[-1].weight.data.mul_(
        50 if way == "fp16" else 3000
    )  # at first too much for fp16, so that its scale falls and steps are left out
    changes["teacher"] = lambda: teacher
    assert interrupted(NoisyTeacher(), tmp_path, between, [], changes) == {"student"}
    accuracies = [row["holdout_accuracy"] for row in left(tmp_path / "whole")["metrics"]]
    if "best" in way:
        assert accuracies[0] > accuracies[1]
