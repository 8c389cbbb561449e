"""The plain ways to train a student, which every method is compared with."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from pykd.ops import logit_regression
from pykd.training import Batch, Method, label_loss


@dataclass(frozen=True)
class StudentAlone:
    """The student learns from the labels, by cross-entropy; there is no teacher."""

    label: ClassVar[str] = "student alone"

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy with the labels."""
        return label_loss(student, batch)

    def comparisons(self) -> dict[str, Method]:
        """See :func:`comparisons`."""
        return comparisons()


@dataclass(frozen=True)
class LogitRegression:
    r"""Regression on the teacher's clean logits (Ba & Caruana, 2014, section 3.2).

    .. math:: L = \frac{1}{2B} \sum_i \lVert g_i - z_i \rVert_2^2
    """

    label: ClassVar[str] = "student, clean regression"

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        """Half the squared distance of the logits, mean over the rows."""
        return logit_regression(student(batch.inputs), batch.teacher_logits)

    def comparisons(self) -> dict[str, Method]:
        """See :func:`comparisons`."""
        return comparisons()


def comparisons() -> dict[str, Method]:
    """The baselines by name.

    >>> list(comparisons())
    ['alone', 'clean']
    """
    return {"alone": StudentAlone(), "clean": LogitRegression()}
