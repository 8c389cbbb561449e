"""The plain ways to train a student, which every method is compared with."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from pykd.methods import _fields
from pykd.ops import distillation_loss, logit_regression
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

    Of several teachers :math:`z_i` is the mean.
    """

    label: ClassVar[str] = "student, clean regression"

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        """Half the squared distance of the logits, mean over the rows."""
        taught = batch.mean_teacher_logits
        return logit_regression(student(batch.inputs), taught)

    def comparisons(self) -> dict[str, Method]:
        """See :func:`comparisons`."""
        return comparisons()


@dataclass(frozen=True)
class HintonDistillation:
    r"""The teacher's softened probabilities, and the labels (Hinton, Vinyals & Dean 2015, arXiv 1503.02531, section 2).

    .. math::
        L = \frac{1}{B} \sum_i \Bigl[ (1 - w)\, T^2\, \mathrm{KL}\bigl(\mathrm{softmax}(z_i / T) \,\Vert\,
        \mathrm{softmax}(g_i / T)\bigr) - w \log \mathrm{softmax}(g_i)_{y_i} \Bigr]

    Of several teachers :math:`z_i` is the mean of the logits.

    Args:
        temperature: :math:`T`.
        hard_weight: :math:`w`, the weight of the labels, in [0, 1].

    Raises:
        ValueError: a value outside these ranges.

    Example:
        >>> HintonDistillation()
        HintonDistillation(temperature=4.0, hard_weight=0.1)
    """

    label: ClassVar[str] = "student, KD"

    temperature: float = 4.0
    hard_weight: float = 0.1

    def __post_init__(self) -> None:
        _fields.positive("temperature", self.temperature)
        _fields.share("hard_weight", self.hard_weight)

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        """Divergence from the teacher and cross-entropy with the labels, mean over the rows."""
        taught = batch.mean_teacher_logits
        return distillation_loss(
            student(batch.inputs),
            taught,
            batch.labels,
            temperature=self.temperature,
            hard_weight=self.hard_weight,
        )

    def comparisons(self) -> dict[str, Method]:
        """See :func:`comparisons`."""
        return comparisons()


def comparisons() -> dict[str, Method]:
    """The baselines by name.

    >>> list(comparisons())
    ['alone', 'clean', 'kd']
    """
    return {"alone": StudentAlone(), "clean": LogitRegression(), "kd": HintonDistillation()}
