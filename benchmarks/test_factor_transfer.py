"""A step of factor transfer's second stage, forward and backward, against the passes that it cannot do without.

`passes` is the teacher's forward pass, and the student's forward and backward with cross-entropy; `plain` is the step
with the formula of the loss in autograd. What is left over is the paraphraser's encoder and the translator: at
ResNet-56 to ResNet-20, 20.6 million multiplications an image beside the 248 million of the passes, 8 %.
"""

from collections.abc import Callable

import pytest
import torch
from alternating import Call, in_turns, measure_case, prepared
from test_factor_loss import plain as plain_factor_loss
from torch.nn import functional as F

pytest.importorskip("pykd.training", reason="training needs pip install 'pykd[train]'")

from pykd.methods import FactorTransfer, factor_transfer
from pykd.models import build
from pykd.training import Batch, FrozenTeacher

# rows, teacher, student, module, and the images' channels and side: the recipes for CIFAR-10 and MNIST
CASES = [(64, "resnet56", "resnet20", "stage3", 3, 32), (64, "resnet20", "resnet8", "stage3", 1, 28)]


class Step:
    """One case's networks and batch."""

    def __init__(self, rows: int, teacher: str, student: str, at: str, channels: int, side: int, *_: object) -> None:
        torch.manual_seed(rows)

        def network(name: str) -> torch.nn.Module:
            return build("resnet", depth=int(name.removeprefix("resnet")), in_shape=(channels, side, side), classes=10)

        self.method = FactorTransfer(teacher_at=[at], student_at=[at])
        frozen, images = FrozenTeacher(network(teacher)), torch.rand(rows, channels, side, side)
        self.batch = Batch(images, torch.arange(rows) % 10, torch.tensor(0), 0, [], teachers=[frozen])
        first = self.method.first([frozen.module], images[:1])
        self.trained = self.method.prepare(network(student), [frozen.module], images[:1], first.module).train()


def implementations(case: Step, _: str) -> dict[str, Callable[[], Call]]:
    def step() -> None:
        case.method.loss(case.trained, case.batch).backward()

    def with_plain_loss() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(factor_transfer, "factor_loss", lambda one, other, **_: plain_factor_loss(one, other))
            step()

    def passes() -> None:
        case.batch.teachers[0](case.batch.inputs)
        F.cross_entropy(case.trained(case.batch.inputs), case.batch.labels).backward()

    return {"pykd": lambda: step, "plain": lambda: with_plain_loss, "passes": lambda: passes}


NAMES = ["pykd", "plain", "passes"]


@pytest.mark.parametrize("block, name", in_turns(NAMES, 3))
@pytest.mark.parametrize("shape", CASES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_factor_transfer(benchmark, shape, threads, name, block):
    torch.set_num_threads(threads)
    call = prepared(implementations, shape, "cpu", torch.float32, threads, "", name, Step)
    rows, teacher, student, at, *_ = shape
    case = f"{teacher} to {student} at {at}, batch {rows}"
    measure_case(benchmark, call, "factor_transfer's second stage", case, threads, name, block, 5, 1)
