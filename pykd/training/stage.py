"""The vocabulary of a run: a batch, a loss of a batch, a stage that minimises it, a method that brings the loss."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pykd.config import Training

if TYPE_CHECKING:
    from pykd.training.batches import Source


@dataclass
class Batch:
    """The rows of one optimiser step that this process holds, or a part of them.

    Args:
        inputs: ``[rows, ...]``, on the run's device.
        labels: ``[rows]``, int64.
        seed: int64 scalar tensor, for random numbers keyed by row: the same on every process.
        row_offset: index of the first row in the whole batch of the step.
        teach: for each teacher a function that gives its logits of these rows; asked at most once, and only by a loss
            that wants them; best before the student's pass, whose values then fill the memory.
        epoch: number of the epoch, from 0.
        epochs: of the stage.
        train_rows: rows of the training data.
        teachers: the networks themselves, each a ``FrozenTeacher``, for losses that want more of them than logits.
    """

    inputs: Tensor
    labels: Tensor
    seed: Tensor
    row_offset: int
    teach: Sequence[Callable[[], Tensor]]
    epoch: int = 0
    epochs: int = 1
    train_rows: int = 1
    teachers: Sequence[nn.Module] = ()

    @cached_property
    def teacher_logits(self) -> Tensor:
        """``[rows, classes]`` of the (first) teacher, without gradient."""
        return self.teach[0]()

    @cached_property
    def all_teacher_logits(self) -> list[Tensor]:
        """Those of every teacher."""
        return [self.teacher_logits, *(teach() for teach in self.teach[1:])]

    @property
    def mean_teacher_logits(self) -> Tensor:
        """Their mean over the teachers."""
        return mean_logits(self.all_teacher_logits)


def mean_logits(logits: Sequence[Tensor]) -> Tensor:
    """The mean of several networks' logits; a single network's as they are.

    >>> mean_logits([torch.zeros(1, 2), torch.ones(1, 2)])
    tensor([[0.5000, 0.5000]])
    """
    return logits[0] if len(logits) == 1 else torch.stack(list(logits)).mean(0)


Loss = Callable[[nn.Module, Batch], Tensor]


def label_loss(network: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of the network's logits with the labels, mean over the rows."""
    return F.cross_entropy(network(batch.inputs), batch.labels)


def unwrapped(network: nn.Module) -> nn.Module:
    """The module that is trained: a loss is given a wrapped one where several processes train."""
    return network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network


class Method(Protocol):
    """What ``pykd.distill`` asks of a method."""

    @property
    def label(self) -> str:
        """The student's row in the table."""

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        """Mean over the rows of the batch."""

    def comparisons(self) -> "Mapping[str, Method]":
        """Other ways to train the same student, by the name of the baseline."""


@runtime_checkable
class Converting(Method, Protocol):
    """A method that trains another module in the student's place, and makes the student out of it at the end."""

    @property
    def keep_epoch(self) -> str:
        """Which epoch's weights are finished: "best" on the held-out rows, or "last"."""

    def prepare(self, student: nn.Module, teachers: Sequence[nn.Module], inputs: Tensor) -> nn.Module:
        """A new module that is trained; ``student`` stays as it is.

        It is also called, with networks that are not trained yet, before a run starts: to tell mistakes early.

        Args:
            student: whose training it is.
            teachers: as they are by then.
            inputs: one row of them, on the networks' device.
        """

    def finish(self, trained: nn.Module, student: nn.Module) -> dict[str, Any]:
        """Writes the result into ``student``; returns facts for its row in the summary, plain JSON data.

        Sentences under "warnings" are told to the user.
        """


@runtime_checkable
class Starting(Converting, Protocol):
    """A method that works on what ``prepare`` made, with all training rows at hand, before the first epoch."""

    @property
    def trains(self) -> bool:
        """Whether epochs follow."""

    def start(
        self, trained: nn.Module, teachers: Sequence[nn.Module], inputs: Tensor, done: int
    ) -> Iterator[tuple[int, int]]:
        """Changes ``trained``, in place, step by step; yields the numbers of steps that are done and of all.

        A run saves between two steps; one that goes on gets the module as the last saved step left it.

        Args:
            trained: what ``prepare`` gave.
            teachers: trained, in eval mode.
            inputs: of all training rows, as networks take them, on their device.
            done: how many steps were done before.
        """


@runtime_checkable
class Preceded(Converting, Protocol):
    """A method that first trains a module of its own on the teachers; ``prepare`` gets it as ``first``."""

    def first(self, teachers: Sequence[nn.Module], inputs: Tensor) -> "First":
        """What is trained. Methods that give equal ``First.key`` share it; arguments as of ``prepare``."""


@dataclass(frozen=True)
class First:
    """A module that is trained after the teachers and before the students, once for all methods of one key.

    Args:
        name: of its weights file, its metrics and its bar.
        key: what decides what it becomes, beside the teachers and the data.
        module: what is trained. Its last epoch's weights stay: it has no accuracy.
        loss: of the module and a batch.
        training: how.
    """

    name: str
    key: object
    module: nn.Module
    loss: Loss
    training: Training


@dataclass(frozen=True)
class Stage:
    """One network's training.

    Args:
        name: of its weights file, its metrics and its row in the summary.
        module: what is trained, or what ``converting`` makes the trained module of.
        loss: mean over the rows of a batch; it calls the network it is given, which may be a wrapped one.
        training: how.
        stream: stages of one stream see the same batches, noise seeds and dropout.
        train: the rows to learn from.
        converting: the method, where it trains another module than ``module``.
        classifies: whether the module gives logits, whose accuracy decides which epoch is kept.
        first: what was trained for the method before, see :class:`Preceded`.
    """

    name: str
    module: nn.Module
    loss: Loss
    training: Training
    stream: str
    train: "Source"
    converting: Converting | None = None
    classifies: bool = True
    first: nn.Module | None = None


def derive(*parts: int | str) -> int:
    """A seed in [0, 2**63) that is a pure function of ``parts``.

    >>> derive(0, "student", 1) == derive(0, "student", 1) != derive(0, "student", 2)
    True
    """
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1
