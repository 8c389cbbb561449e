"""The same small runs by one process and by several; runs of several that fail, are killed, are resumed.

``python ranks.py FOLDER`` prints one JSON line; ``python ranks.py FOLDER cuda`` does a network with batch
normalisation on a card. Processes are forked, so that torch is imported once.
"""

import faulthandler
import gc
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the optimiser imports it; here, so that a fork need not
from torch import Tensor, nn
from torch.distributed import TCPStore
from torch.utils.data import Dataset

import pykd
from pykd.config import Training
from pykd.errors import PykdError
from pykd.methods import METHODS, NoisyTeacher, StudentAlone
from pykd.training import Batch

HANGS = 60  # seconds after which a process says where it is, and ends

AT = {"teacher_at": ["3"], "student_at": ["3"]}
FEATURES = {"reconstruction": "l2", "p": 2, "paraphraser": {"epochs": 1, "lr": 0.01, "batch_size": 20}, **AT}
VARIATIONAL = {"warmup_start": 0.0, "warmup_end": 0.0, "log_sigma2": -4.0}
LOGITS: dict[str, tuple[str, dict[str, Any]]] = {
    "alone": ("student_alone", {}),
    "clean": ("logit_regression", {}),
    "kd": ("kd", {}),
    "logit": ("noisy_teacher", {}),
    "sample": ("noisy_teacher", {"noise_shape": "sample"}),
    "additive": ("noisy_teacher", {"noise_kind": "additive"}),
    "sample_additive": ("noisy_teacher", {"noise_shape": "sample", "noise_kind": "additive"}),
    "draws": ("noisy_teacher", {"n_teachers": 3}),
    "distillation": ("noisy_teacher", {"objective": "distillation"}),
    "on_student": ("noisy_teacher", {"noise_on": "student"}),
    "two_teachers": ("noisy_teacher", {}),
    "one_noisy": ("noisy_teacher", {"noisy_teachers": "one"}),
}
WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "fitnet": ("fitnet", {"hint_epochs": 0.5, **AT}),
    "attention_transfer": ("attention_transfer", {"beta": 10.0, **AT}),
    "factor_transfer": ("factor_transfer", {"beta": 5.0, **FEATURES}),
    "variational": ("variational_student", {"lambda_g": 0.01, **VARIATIONAL}),
    "variational_l2": ("variational_student", {"norm": "l1_l2", "lambda_g": 0.01, **VARIATIONAL}),
    "sparse_vd": ("sparse_vd", VARIATIONAL),
    "bayesian_compression": ("bayesian_compression", VARIATIONAL),
    "channels": ("cross_distillation", {"fine_tune": "kd"}),
    "weights": ("cross_distillation", {"groups": "weight", "linear": True, "fine_tune": "labels"}),
}
PLAIN = Training(epochs=2, batch_size=20, optimizer="sgd", lr=0.05)
PARTS = Training(epochs=2, batch_size=20, optimizer="adam", lr=0.01, accumulate=2, clip_norm=0.1)


class Rows(Dataset):
    """Images of noise; the last batch of 20 has one row."""

    def __init__(self, rows: int = 41, *, wrong: range = range(0), gone: bool = False) -> None:
        draw = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(rows, 1, 8, 8, generator=draw)
        self.labels = torch.arange(rows) % 3
        self.wrong, self.gone = wrong, gone

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        if index == 1 and self.gone:
            raise FileNotFoundError(2, "No such file or directory", "one.png")
        label = self.labels[index]
        return self.inputs[index], torch.tensor(7) if index in self.wrong else label, index


def network(seed: int) -> nn.Module:
    """Small, without batch normalisation."""
    torch.manual_seed(seed)
    maps = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU())
    return nn.Sequential(*maps, nn.Flatten(), nn.Linear(96, 3))


def train(method: Any, out: Path | None = None, **given: Any) -> pykd.training.Run:
    """A small run."""
    data = {"train": Rows(), "holdout": Rows(9), "training": PLAIN, "teacher": network(1), **given}
    data = {"student": network(2), "device": "cpu", **data}
    return pykd.distill(method, baselines=[], out=out, progress=False, checkpoint_seconds=1e9, **data)


def train_all(folder: Path, runs: dict[str, tuple[str, dict[str, Any]]]) -> None:
    """Every run, into a folder of its name."""
    for name, (method, fields) in runs.items():
        several = name in ("two_teachers", "one_noisy")
        teachers = [network(1), network(3)] if several else network(1)
        trained = {"teacher_training": replace_epochs(PLAIN, 1)} if several else {}
        train(METHODS[method](**fields), folder / name, teacher=teachers, **trained)
    train(NoisyTeacher(), folder / "parts", training=PARTS)
    shift = PARTS.model_copy(update={"augment": True})
    train(NoisyTeacher(), folder / "augmented", training=shift, augment=noise)


def replace_epochs(training: Training, epochs: int) -> Training:
    return training.model_copy(update={"epochs": epochs})


def noise(inputs: Tensor, generator: torch.Generator) -> Tensor:
    return inputs + torch.randn(inputs.shape, generator=generator)


@dataclass(frozen=True)
class Disturbed(StudentAlone):
    """Adam's steps on labels; ``do`` is called in a step of one process."""

    do: Callable[[], object] = field(default=lambda: None, compare=False, repr=False)
    rank: int = 1
    step: int = 4
    seen: list[int] = field(default_factory=list, compare=False, repr=False)

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        self.seen.append(1)
        loss = super().loss(student, batch)
        if len(self.seen) == self.step and os.environ.get("RANK") == str(self.rank):
            value = self.do()
            return loss if value is None else loss * value
        return loss


def sent(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def disturbed(out: Path, *, resume: bool = False, do: Any = None, rank: int = 1) -> None:
    """A run of eight steps with a checkpoint after every question."""
    pykd.distill(
        Disturbed(do or (lambda: None), rank),
        teacher=network(1),
        student=network(2),
        train=Rows(),
        holdout=Rows(9),
        training=Training(epochs=4, batch_size=20, lr=0.01),
        baselines=[],
        out=out,
        resume=resume,
        device="cpu",
        progress=False,
        checkpoint_seconds=1e-3,
    )


def told(work: Callable[[], object]) -> str:
    """The sentence with which it fails."""
    try:
        work()
    except PykdError as error:
        return str(error)
    return ""


def group(world: int, work: Callable[[], Any], **environment: str) -> list[Any]:
    """What ``work`` returns in each of ``world`` new processes, or the signal that killed it."""
    # Kept here, as torchrun does: a port found free can be another's before a child opens it.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    children = []
    for rank in range(world):
        source, sink = os.pipe()
        child = os.fork()
        if child == 0:
            faulthandler.dump_traceback_later(HANGS, exit=True)
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE="True")
            if world > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
            os.environ.update(environment)
            try:
                os.write(sink, json.dumps(work()).encode())
            except BaseException as error:
                os.write(sink, json.dumps(repr(error)).encode())
            os._exit(0)
        os.close(sink)
        children.append((child, source))
    results = []
    for child, source in children:
        with os.fdopen(source) as stream:
            said = stream.read()
        status = os.waitpid(child, 0)[1]
        results.append(json.loads(said) if said else -os.waitstatus_to_exitcode(status))
    return results


def disagreeing() -> list[str]:
    """One process after the other has other epochs, rows, labels, noise."""
    other = os.environ["RANK"] == "1"
    return [
        told(lambda: train(StudentAlone(), training=replace_epochs(PLAIN, 3 + other))),
        told(lambda: train(StudentAlone(), train=Rows(41 + other))),
        told(lambda: train(StudentAlone(), train=Rows(wrong=range(6, 7) if other else range(0)))),
        told(lambda: train(NoisyTeacher(sigma=0.5 + other))),
        told(lambda: train(StudentAlone(), training=replace_epochs(PLAIN, 1))),
    ]


def normalised(out: Path) -> None:
    """A run of a network with batch normalisation on the one card, over gloo."""
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    student = network(2)
    student[1] = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
    train(NoisyTeacher(), out, student=student, train=Rows(40), device="cuda")


def main(folder: Path) -> None:
    """See the module."""
    gc.freeze()  # what a stage collects at its end is then its own
    report: dict[str, Any] = {}

    def scenario(name: str, world: int, work: Callable[[], Any], **environment: str) -> None:
        report[name] = group(world, work, **environment)

    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    scenario("one", 1, lambda: train_all(folder / "one", LOGITS | WHOLE))
    scenario("two", 2, lambda: train_all(folder / "two", LOGITS | WHOLE))
    scenario("fsdp", 2, lambda: train_all(folder / "fsdp", LOGITS), **fsdp)
    scenario("refused", 2, lambda: [told(partial(train, METHODS[m](**f))) for m, f in WHOLE.values()], **fsdp)
    scenario("first version", 2, lambda: told(lambda: train(StudentAlone())), **(fsdp | {"FSDP_VERSION": "1"}))
    scenario("disagreeing", 2, disagreeing)

    def in_rank_1(**given: Any) -> dict[str, Any]:
        return given if os.environ["RANK"] == "1" else {}

    # The labels that processes compare are of every third row.
    scenario("label", 2, lambda: told(lambda: train(StudentAlone(), train=Rows(**in_rank_1(wrong=range(1, 41, 3))))))
    scenario("file", 2, lambda: told(lambda: train(StudentAlone(), train=Rows(**in_rank_1(gone=True)))))
    scenario("nan", 2, lambda: told(lambda: disturbed(folder / "nan", do=lambda: torch.nan)))

    def stopped() -> str:
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=6))
        ranks: list[Any] = [None, None]
        torch.distributed.all_gather_object(ranks, os.getpid())
        try:
            return told(lambda: disturbed(folder / "stopped", do=sent(signal.SIGSTOP)))
        finally:
            os.kill(ranks[1], signal.SIGKILL)

    scenario("stopped", 2, stopped)
    for kind, environment in (("ddp", {}), ("fsdp", fsdp)):
        whole, killed, saved = (folder / f"{kind}-{name}" for name in ("whole", "killed", "saved"))
        for world in (2, 3) if kind == "ddp" else (2,):
            scenario(f"{kind} {world} whole", world, partial(disturbed, whole / str(world)), **environment)
            for number, out in ((signal.SIGKILL, killed / str(world)), (signal.SIGTERM, saved / str(world))):
                name = f"{kind} {world} {number.name}"
                scenario(name, world, partial(told, partial(disturbed, out, do=sent(number))), **environment)
                scenario(f"{name} resumed", world, partial(told, partial(disturbed, out, resume=True)), **environment)
        out = folder / f"{kind}-other"
        scenario(f"{kind} other", 2, partial(told, partial(disturbed, out, do=sent(signal.SIGTERM))), **environment)
        scenario(f"{kind} other resumed", 1, partial(told, partial(disturbed, out, resume=True)), **environment)
    print(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # what two ways to add up differ by is then far below a row's part
    pykd.training.distill.__globals__["describe"] = lambda *_: {}  # sizes and latencies, which take their time
    if sys.argv[2:] == ["cuda"]:
        one, two = (Path(sys.argv[1]) / name for name in ("one", "two"))
        said = {"one": group(1, lambda: normalised(one)), "two": group(2, lambda: normalised(two), LOCAL_RANK="0")}
        print(json.dumps(said))
    else:
        main(Path(sys.argv[1]))
