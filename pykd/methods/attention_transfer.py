"""Zagoruyko & Komodakis 2017, "Paying More Attention to Attention", arXiv 1612.03928."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from pykd.methods import _fields, _maps
from pykd.methods.comparisons import comparisons
from pykd.nn.features import features
from pykd.training import Batch, Method, unwrapped


@dataclass(frozen=True)
class AttentionTransfer:
    r"""The student learns from labels, and where the teacher's maps are large.

    With the attention :math:`Q(A) = \mathrm{vec}\bigl(\sum_c A_c^2\bigr)` of maps :math:`A` and the pairs :math:`j` of
    named modules (activation-based transfer, section 3.1):

    .. math::
        L = \mathrm{CE}(y, g) + \beta \sum_j \mathrm{mean}\left(\frac{Q(A^j_S)}{\lVert Q(A^j_S) \rVert_2} -
        \frac{Q(A^j_T)}{\lVert Q(A^j_T) \rVert_2}\right)^2

    The mean is over rows and places, as in the authors' code, whose :math:`\beta` it is; equation 2 of the paper has
    :math:`\beta / 2` and the distance itself. Maps of different sides are averaged to the smaller ones.

    Of several teachers the first counts.

    Args:
        beta: :math:`\beta`; 1000 in the paper (section 4.1).
        teacher_at: names of the teacher's modules, deepest last.
        student_at: of the student's, one for each of the teacher's.

    Raises:
        ValueError: a negative ``beta``, or lists that do not fit together.

    Example:
        >>> AttentionTransfer(teacher_at=["stage2", "stage3"], student_at=["stage2", "stage3"]).beta
        1000.0
    """

    label: ClassVar[str] = "student, attention transfer"
    keep_epoch: ClassVar[str] = "best"

    beta: float = 1000.0
    teacher_at: Sequence[str] = ("stage1", "stage2", "stage3")
    student_at: Sequence[str] = ("stage1", "stage2", "stage3")

    def __post_init__(self) -> None:
        _fields.deviation("beta", self.beta)
        _maps.check_points(self.teacher_at, self.student_at)

    def prepare(self, student: nn.Module, teachers: Sequence[nn.Module], inputs: Tensor) -> nn.Module:
        """The student, once the named modules are known to give maps."""
        _maps.shapes("the teacher", teachers[0], inputs, self.teacher_at)
        _maps.shapes("the student", student, inputs, self.student_at)
        return copy.deepcopy(student)

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy and the distances of the attentions, mean over the rows."""
        _, taught = _maps.of_teacher(batch, self.teacher_at)
        logits, maps = features(student, batch.inputs, self.student_at, of=unwrapped(student))
        loss: Tensor = F.cross_entropy(logits, batch.labels)
        for mine, its in zip(maps, taught, strict=True):
            one, other = _maps.aligned(mine, its)
            loss = loss + self.beta * F.mse_loss(_attention(one), _attention(other))
        return loss

    def finish(self, trained: nn.Module, student: nn.Module) -> dict[str, object]:
        """The student takes over the weights."""
        student.load_state_dict(trained.state_dict())
        return {}

    def comparisons(self) -> dict[str, Method]:
        """See :func:`pykd.methods.comparisons`."""
        return comparisons()


def _attention(maps: Tensor) -> Tensor:
    return F.normalize(maps.float().square().sum(1).flatten(1))
