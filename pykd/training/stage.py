"""The vocabulary of a run: a batch, a loss of a batch, a stage that minimises it, a method that brings the loss."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pykd.config import Training


@dataclass
class Batch:
    """The rows of one optimiser step that this process holds, or a part of them.

    Args:
        inputs: ``[rows, ...]``, on the run's device.
        labels: ``[rows]``, int64.
        seed: int64 scalar tensor, for random numbers keyed by row: the same on every process.
        row_offset: index of the first row in the whole batch of the step.
        teach: for each teacher a function that gives its logits of these rows; asked at most once, and only by a loss
            that wants them.
    """

    inputs: Tensor
    labels: Tensor
    seed: Tensor
    row_offset: int
    teach: Sequence[Callable[[], Tensor]]

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


@dataclass(frozen=True)
class Stage:
    """One network's training.

    Args:
        name: of its weights file, its metrics and its row in the summary.
        module: what is trained.
        loss: mean over the rows of a batch; it calls the network it is given, which may be a wrapped ``module``.
        training: how.
        stream: stages of one stream see the same batches, noise seeds and dropout.
    """

    name: str
    module: nn.Module
    loss: Loss
    training: Training
    stream: str


class Method(Protocol):
    """What ``pykd.distill`` asks of a method."""

    @property
    def label(self) -> str:
        """The student's row in the table."""

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        """Mean over the rows of the batch."""

    def comparisons(self) -> "Mapping[str, Method]":
        """Other ways to train the same student, by the name of the baseline."""


def derive(*parts: int | str) -> int:
    """A seed in [0, 2**63) that is a pure function of ``parts``.

    >>> derive(0, "student", 1) == derive(0, "student", 1) != derive(0, "student", 2)
    True
    """
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1
