"""Trains the digits recipe for a few epochs and records the noisy targets of every step.

``python digits.py FOLDER``, alone or under torchrun. Every process writes ``FOLDER/targets-<rank>.pt``, a list of
(first row in the batch, targets); the run itself is in ``FOLDER/run``.
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import pykd
from pykd.config import Network
from pykd.ops import logit_regression_and_grad
from pykd.training import Batch

torch.set_num_threads(1)


@dataclass(frozen=True)
class Recording(pykd.methods.NoisyTeacher):
    """A noisy teacher that keeps what it teaches."""

    targets: list[tuple[int, Tensor]] = field(default_factory=list, compare=False)

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        teacher = batch.teacher_logits
        # The gradient of the sum at student = 0 is minus the target.
        _, gradient = logit_regression_and_grad(
            torch.zeros_like(teacher),
            teacher,
            sigma=self.sigma,
            alpha=self.alpha,
            reduction="sum",
            seed=batch.seed,
            row_offset=batch.row_offset,
        )
        self.targets.append((batch.row_offset, -gradient))
        return super().loss(student, batch)


def main(folder: Path) -> None:
    """See the module."""
    # The last of the batches of 22 has one row.
    shorter = ["teacher.training.epochs=1", "student.training.epochs=1", "student.training.batch_size=22"]
    config = pykd.config.load("noisy_teacher-digits", shorter)
    splits = pykd.data.load(config.data)

    def build(network: Network) -> nn.Module:
        return pykd.models.build(network.name, in_shape=splits.in_shape, classes=splits.classes, **network.arguments)

    method = Recording(targets=[])
    run = pykd.distill(
        method,
        teacher=lambda: build(config.teacher),
        student=lambda: build(config.student),
        train=splits.train,
        holdout=splits.holdout,
        test=splits.test,
        teacher_training=config.teacher.training,
        training=config.student.training,
        baselines=[],
        out=folder / "run",
        config=config,
        device="cpu",
    )
    assert not any(parameter.requires_grad for parameter in run.teacher.parameters())
    torch.save(method.targets, folder / f"targets-{os.environ.get('RANK', 0)}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
