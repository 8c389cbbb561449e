"""``pykd.distill`` end to end on small data: what it trains, how it reads data, and what it refuses."""

import copy
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

import pykd
from pykd.config import Training
from pykd.errors import Interrupted, PykdError
from pykd.methods import LogitRegression, NoisyTeacher, StudentAlone
from pykd.training import Batch, FrozenTeacher, Run, load_weights
from pykd.training.batches import Source
from pykd.training.loop import learning_rate

CPU: dict[str, Any] = {"device": "cpu", "progress": False}
DRAW = torch.Generator().manual_seed(0)
INPUTS = torch.randn(150, 5, generator=DRAW)
LABELS = torch.arange(150) % 3
ROWS = TensorDataset(INPUTS, LABELS)
INDEXED = TensorDataset(INPUTS, LABELS, torch.arange(150))


def teacher() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def student() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


def train(method: Any = None, **changes: Any) -> Run:
    arguments: dict[str, Any] = {"teacher": teacher, "student": student, "train": ROWS, "epochs": 2, "batch_size": 20}
    return pykd.distill(method or NoisyTeacher(), **{**arguments, **CPU, "baselines": [], **changes})


def same(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.state_dict().values(), right.state_dict().values(), strict=True))


@dataclass(frozen=True)
class Watching(LogitRegression):
    """Keeps the batches it was given."""

    batches: list[Batch] = field(default_factory=list, compare=False)

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        self.batches.append(batch)
        return super().loss(student, batch)


def test_table_compares_teacher_baselines_and_student() -> None:
    run = train(baselines=["alone", "clean"], teacher_training=Training(epochs=3), test=ROWS)
    assert [(row["name"], row["label"]) for row in run.summary["rows"]] == [
        ("teacher", "teacher"),
        ("alone", "student alone"),
        ("clean", "student, clean regression"),
        ("student", "student, noisy teacher"),
    ]
    assert run.summary["measured_on"] == "test"
    correct = (run.student(INPUTS).argmax(-1) == LABELS).sum().item()
    assert run.summary["rows"][-1]["accuracy"] == correct / 150


@pytest.mark.parametrize("still", [{"sigma": 0.0}, {"alpha": 0.0}])
def test_without_noise_it_is_clean_regression_bit_for_bit(still: dict[str, float]) -> None:
    assert same(train(NoisyTeacher(**still)).student, train(LogitRegression()).student)
    assert not same(train(NoisyTeacher()).student, train(LogitRegression()).student)


def test_same_seed_same_bits() -> None:
    assert same(train(seed=3).student, train(seed=3).student)
    assert not same(train(seed=3).student, train(seed=4).student)


def test_random_numbers_of_the_caller_are_untouched() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train()
    assert torch.equal(before, torch.get_rng_state())


def test_given_modules_are_trained_in_place_and_baselines_are_not() -> None:
    module = student()
    before = copy.deepcopy(module)
    run = train(student=module, baselines=["alone"])
    assert run.student is module
    assert not same(module, before)


def test_best_epoch_on_held_out_rows_is_kept() -> None:
    run = train(epochs=6, lr=0.05)
    accuracies = [row["holdout_accuracy"] for row in run.metrics]
    best = run.summary["rows"][-1]
    assert best["best_epoch"] == len(accuracies) - accuracies[::-1].index(max(accuracies))  # the last of equal ones
    assert best["holdout_accuracy"] == max(accuracies)
    assert best["accuracy"] == max(accuracies)  # without test rows
    assert run.summary["measured_on"] == "holdout"


def test_teacher_is_frozen_for_good() -> None:
    module = teacher()
    before = copy.deepcopy(module).state_dict()

    @dataclass(frozen=True)
    class Wakes(NoisyTeacher):
        def loss(self, student: nn.Module, batch: Batch) -> Tensor:
            module.train()
            module[1].train()
            assert not batch.teacher_logits.requires_grad
            return super().loss(student, batch)

    run = train(Wakes(), teacher=module)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    run.teacher.train()
    run.teacher.module.train()
    run.teacher(INPUTS)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert not any(each.training for each in run.teacher.modules())
    assert not any(parameter.requires_grad for parameter in run.teacher.parameters())
    assert isinstance(run.teacher, FrozenTeacher)


@pytest.mark.parametrize("cache", [True, False])
def test_teacher_logits_are_those_of_the_rows(cache: bool) -> None:
    watching = Watching()
    run = train(watching, train=INDEXED, cache_logits=cache, epochs=3)
    for batch in watching.batches:
        torch.testing.assert_close(batch.teacher_logits, run.teacher(batch.inputs))


def test_teacher_runs_once_where_samples_carry_an_index() -> None:
    calls = []
    module = teacher()
    module.register_forward_hook(lambda *_: calls.append(1))
    train(teacher=module, train=INDEXED, epochs=5, holdout=ROWS)
    with_index = len(calls)
    train(teacher=module, train=ROWS, epochs=5, holdout=ROWS)
    without = len(calls) - with_index
    assert without - with_index == 5 * 8 - 1  # a call a step against one for all rows


def test_augmented_inputs_are_never_cached() -> None:
    watching = Watching()
    shaken = {"training": Training(augment=True), "augment": lambda x, draw: x + torch.rand(x.shape, generator=draw)}
    run = train(watching, train=INDEXED, **shaken)
    for batch in watching.batches:
        torch.testing.assert_close(batch.teacher_logits, run.teacher(batch.inputs))
    first, second = (torch.cat([batch.inputs for batch in watching.batches[i : i + 7]]) for i in (0, 7))
    assert not torch.equal(first.sort(0).values, second.sort(0).values)
    with pytest.raises(PykdError, match="give augment="):
        train(training=Training(augment=True))


@pytest.mark.parametrize("parts", [2, 3, 20, 50])
def test_accumulation_changes_nothing_but_rounding(parts: int) -> None:
    whole, cut = train().student, train(accumulate=parts).student
    for expected, value in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_learns(precision: str) -> None:
    seen = []

    @dataclass(frozen=True)
    class Looks(LogitRegression):
        def loss(self, student: nn.Module, batch: Batch) -> Tensor:
            seen.append(student(batch.inputs).dtype)
            return super().loss(student, batch)

    run = train(Looks(), epochs=8, lr=0.02, mixed_precision=precision, clip_norm=10.0)
    assert set(seen) == {{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]}
    assert all(parameter.dtype == torch.float32 for parameter in run.student.parameters())
    assert run.metrics[-1]["loss"] < run.metrics[0]["loss"]


def test_clipping_bounds_a_step() -> None:
    module = student()
    before = [parameter.detach().clone() for parameter in module.parameters()]
    settings = {"optimizer": "sgd", "momentum": 0.0, "lr": 1.0, "schedule": "constant", "clip_norm": 1e-3}
    train(student=module, epochs=1, batch_size=150, **settings)
    step = [after - start for after, start in zip(module.parameters(), before, strict=True)]
    assert torch.cat([each.flatten() for each in step]).norm().item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_optimizers_learn(optimizer: str) -> None:
    run = train(LogitRegression(), optimizer=optimizer, epochs=10, lr=0.02)
    assert run.metrics[-1]["loss"] < 0.5 * run.metrics[0]["loss"]


def test_schedules() -> None:
    def rates(**settings: Any) -> list[float]:
        return [learning_rate(Training(lr=1.0, **settings), step, 8) for step in range(8)]

    assert rates(schedule="constant") == [1.0] * 8
    assert rates(schedule="step") == pytest.approx([1.0] * 4 + [0.1] * 2 + [0.01] * 2)
    assert rates(schedule="flat_linear") == [1.0] * 5 + [0.75, 0.5, 0.25]
    assert rates(schedule="constant", warmup=0.5) == [0.25, 0.5, 0.75, 1.0] + [1.0] * 4
    cosine = rates(schedule="cosine")
    assert cosine[0] == 1.0
    assert cosine[4] == pytest.approx(0.5)
    assert cosine == sorted(cosine, reverse=True)


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(INPUTS, LABELS, strict=True)

    def __len__(self) -> int:
        return 150


class Labelled(Dataset[tuple[Tensor, int]]):
    """Samples with plain integers for labels."""

    def __len__(self) -> int:
        return 150

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return INPUTS[index], int(LABELS[index])


@pytest.mark.parametrize(
    "data",
    [
        ROWS,
        INDEXED,
        Labelled(),
        DataLoader(ROWS, batch_size=20, shuffle=True),
        DataLoader(ROWS, batch_size=20, shuffle=True, drop_last=True, num_workers=1),
        DataLoader(ROWS, batch_sampler=BatchSampler(RandomSampler(ROWS), 20, False)),
        DataLoader(ROWS, batch_size=20, sampler=RandomSampler(ROWS, replacement=True)),
        DataLoader(Stream(), batch_size=20),
    ],
    ids=["tensors", "indexed", "labelled", "loader", "workers", "batch_sampler", "replacement", "stream"],
)
def test_any_data(data: Any) -> None:
    first, second = train(train=data, holdout=ROWS), train(train=data, holdout=ROWS)
    assert same(first.student, second.student)
    assert len(first.metrics) == 2


def test_batch_size_of_a_loader_counts_where_none_is_set() -> None:
    loader = DataLoader(ROWS, batch_size=30, shuffle=True)
    settings = {"teacher": teacher(), "student": student(), "train": loader, "holdout": ROWS, "baselines": (), **CPU}
    assert pykd.distill(NoisyTeacher(), epochs=1, **settings).metrics[0]["step"] == 5
    assert pykd.distill(NoisyTeacher(), epochs=1, batch_size=50, **settings).metrics[0]["step"] == 3


def test_order_is_the_same_from_any_position_on_and_for_any_number_of_processes() -> None:
    source = Source.of(INDEXED, "train")
    whole = list(source.batches(20, shuffle=True).read(7))
    later = list(source.batches(20, shuffle=True).read(7, start=3))
    assert [rows.positions.tolist() for rows in later] == [rows.positions.tolist() for rows in whole[3:]]
    assert sorted(torch.cat([rows.positions for rows in whole]).tolist()) == list(range(150))
    shares = [list(source.batches(20, shuffle=True, rank=rank, world=3).read(7)) for rank in range(3)]
    for step, rows in enumerate(whole):
        mine = [share[step] for share in shares]
        assert torch.equal(torch.cat([each.positions[: each.weight] for each in mine]), rows.positions)
        assert [each.offset for each in mine] == [0, mine[0].weight, mine[0].weight + mine[1].weight]
        assert all(torch.equal(each.inputs, INPUTS[each.positions]) for each in mine)


def test_unshared_rows_keep_every_process_busy() -> None:
    shares = [list(Source.of(ROWS, "train").batches(149, rank=rank, world=2)) for rank in (0, 1)]
    assert [(share[1].weight, len(share[1].inputs)) for share in shares] == [(0, 1), (1, 1)]


def test_worker_processes_change_nothing() -> None:
    alone = train(train=DataLoader(ROWS, batch_size=20, shuffle=True))
    helped = train(train=DataLoader(ROWS, batch_size=20, shuffle=True, num_workers=2))
    assert same(alone.student, helped.student)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"student": nn.Linear(5, 4)}, "teacher gives 3 logits and the student 4"),
        ({"student": nn.Linear(6, 3)}, r"the student cannot take inputs of shape \[5\]"),
        ({"student": nn.Flatten(0)}, r"the student should give logits of shape \[1, classes\], got \[5\]"),
        ({"student": nn.Sequential()}, "teacher gives 3 logits and the student 5"),
        ({"student": lambda: 5}, "student should be a module or a function that makes one, got int"),
        ({"student": nn.Linear(5, 3).requires_grad_(False)}, "student has no trainable parameters"),
        ({"train": TensorDataset(INPUTS[:0], LABELS[:0])}, "train has no rows"),
        ({"train": TensorDataset(INPUTS)}, r"a sample of train should be \(inputs, label\)"),
        ({"train": TensorDataset(INPUTS, LABELS.float())}, "a label of train should be one integer"),
        ({"train": Stream()}, "train should be a map-style Dataset or a DataLoader, got Stream"),
        ({"train": 5}, "train should be a map-style Dataset or a DataLoader, got int"),
        ({"train": DataLoader(Stream(), batch_size=5)}, "give the held-out rows as holdout="),
        ({"holdout": 0.0}, "holdout=0 of 150 rows leaves nothing"),
        ({"holdout": 1.0}, "holdout=1 of 150 rows leaves nothing"),
        ({"holdout": -0.5}, "leaves nothing"),
        ({"baselines": ["allone"]}, "unknown baseline 'allone'; did you mean 'alone'"),
        ({"epoch": 3}, "no argument 'epoch'; did you mean 'epochs'"),
        ({"epochs": 0}, "epochs: Input should be greater than or equal to 1"),
        ({"lr": float("nan")}, "lr: Input should be"),
        ({"device": "tpu"}, "device should be cpu or cuda"),
    ],
)
def test_broken_rules_say_which(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PykdError, match=sentence) as caught:
        train(**changes)
    assert "\n" not in str(caught.value)


def test_labels_beyond_the_classes_are_told() -> None:
    with pytest.raises(PykdError, match=r"train has the label 7, and the networks give 3 logits"):
        train(StudentAlone(), train=TensorDataset(INPUTS, LABELS.clone().index_fill_(0, torch.tensor([70]), 7)))


@pytest.mark.parametrize("part", ["holdout", "test"])
def test_labels_beyond_the_classes_are_told_of_every_part(part: str) -> None:
    with pytest.raises(PykdError, match=f"{part} has the label 7"):
        train(**{part: TensorDataset(INPUTS, LABELS + 5)})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"method": NoisyTeacher}, "method should be a method"),
        ({"teacher_training": {"epochs": 1}}, "teacher_training should be a pykd.config.Training, got dict"),
        ({"training": {"epochs": 1}}, "training should be a pykd.config.Training, got dict"),
        ({"student": 5}, "student should be a module"),
        ({"seed": 1.5}, "seed should be a whole number, got 1.5"),
        ({"holdout": float("nan")}, "leaves nothing on one side"),
        ({"holdout": float("inf")}, "leaves nothing on one side"),
        ({"keep_checkpoints": -1}, "keep_checkpoints should be at least 1"),
        ({"checkpoint_seconds": float("nan")}, "checkpoint_seconds not negative"),
    ],
)
def test_arguments_of_another_kind_are_told(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PykdError, match=sentence):
        train(**changes)


def test_seed_of_numpy_is_that_of_python(tmp_path: Any) -> None:
    left, right = train(seed=3), train(seed=np.int64(3), out=tmp_path)
    assert same(left.student, right.student)
    assert "seed: 3\n" in (tmp_path / "config.yaml").read_text()


def test_shared_parameters_are_told() -> None:
    module = teacher()
    with pytest.raises(PykdError, match=r"share parameters: give two networks, e\.g\. a copy\.deepcopy of one"):
        train(teacher=module, student=module)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_cuda_is_told() -> None:
    with pytest.raises(PykdError, match="no CUDA device is available"):
        train(device="cuda")


def test_lazy_layers_get_their_shapes() -> None:
    assert train(student=lambda: nn.LazyLinear(3), baselines=["alone"]).student.in_features == 5


def test_load_weights_says_what_does_not_fit(tmp_path: Any) -> None:
    file = tmp_path / "a.safetensors"
    with pytest.raises(PykdError, match="cannot read"):
        load_weights(nn.Linear(2, 3), file)
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(PykdError, match="not a whole safetensors file"):
        load_weights(nn.Linear(2, 3), file)
    save_file({"weight": torch.zeros(3, 2)}, file)
    with pytest.raises(PykdError, match="the file has no 'bias'"):
        load_weights(nn.Linear(2, 3), file)
    with pytest.raises(PykdError, match=r"'weight' is \[3, 2\], not \[4, 2\]"):
        load_weights(nn.Linear(2, 4, bias=False), file)
    module = nn.Linear(2, 3, bias=False)
    load_weights(module, file)
    assert not module.weight.any()


def test_tied_weights_are_stored_and_read_back(tmp_path: Any) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(5, 5)
            self.b = nn.Linear(5, 5)
            self.b.weight = self.a.weight
            self.last = nn.Linear(5, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.last(self.b(self.a(inputs)))

    run = train(student=Tied(), out=tmp_path / "run")
    again = Tied()
    load_weights(again, tmp_path / "run" / "student.safetensors")
    assert same(again, run.student)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_trains_on_cuda_as_on_the_cpu(tmp_path: Any, precision: str) -> None:
    settings = {"train": INDEXED, "mixed_precision": precision, "teacher": nn.Linear(5, 3), "epochs": 3}
    host, card = (train(**settings, device=device) for device in ("cpu", "cuda"))
    tolerance = {"no": 1e-3}.get(precision, 0.1)
    for expected, value in zip(host.student.parameters(), card.student.parameters(), strict=True):
        torch.testing.assert_close(value.cpu(), expected, rtol=tolerance, atol=tolerance)
    out = tmp_path / "run"
    assert next(train(**settings, device=None, out=out).student.parameters()).is_cuda
    again = train(**settings, device="cuda", out=out, resume=True)
    assert again.summary["rows"][-1]["name"] == "student"


@pytest.mark.gpu
def test_interrupted_on_cuda_goes_on(tmp_path: Any) -> None:
    calls = []

    @dataclass(frozen=True)
    class Stops(NoisyTeacher):
        def loss(self, student: nn.Module, batch: Batch) -> Tensor:
            calls.append(1)
            if len(calls) == 10:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().loss(student, batch)

    settings = {"teacher": nn.Linear(5, 3), "device": "cuda"}
    whole = train(NoisyTeacher(), **settings)
    with pytest.raises(Interrupted):
        train(Stops(), **settings, out=tmp_path / "run")
    resumed = train(Stops(), **settings, out=tmp_path / "run", resume=True)
    for expected, value in zip(whole.student.parameters(), resumed.student.parameters(), strict=True):
        torch.testing.assert_close(value, expected)
