"""Romero, Ballas, Kahou, Chassang, Gatta & Bengio 2015, "FitNets: Hints for Thin Deep Nets", arXiv 1412.6550."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from pykd.methods import _fields, _maps
from pykd.methods.comparisons import comparisons
from pykd.nn.features import features
from pykd.ops import distillation_loss
from pykd.training import Batch, Method


@dataclass(frozen=True)
class FitNet:
    r"""The student's middle first learns the teacher's, then the student learns from labels and teacher.

    In the first epochs the layers up to the guided one learn the hint :math:`u` through a convolutional regressor
    :math:`r` (section 2.2):

    .. math:: L_{HT} = \tfrac{1}{2} \lVert u(x) - r(v(x)) \rVert^2

    In the others the whole student is distilled (section 2.1), the teacher's weight falling linearly:

    .. math::
        L = \mathrm{CE}(y, g) + \lambda\, \mathrm{KL}\bigl(\mathrm{softmax}(z / T) \,\Vert\,
        \mathrm{softmax}(g / T)\bigr)

    which is theirs but for the entropy of the teacher's answers, a constant.

    The squared distance is the mean over the map's entries here, so that its size is that of a cross-entropy whatever
    the maps are. The regressor is a convolution without padding that takes the guided maps to the hint's sides, or a
    1x1 convolution where they are no larger; hints larger than the guided maps are averaged to their sides.

    Of several teachers the first counts for the hint, and for the logits.

    Args:
        temperature: :math:`T`; 3 in the authors' code.
        weight: :math:`\lambda` of the first epoch of distillation, 4 in the authors' code; 1 in the last.
        hint_epochs: share of the epochs for the hint, in [0, 1); at least the last epoch distils.
        teacher_at: name of the teacher's module that gives the hint, a list of one.
        student_at: of the guided one.

    Raises:
        ValueError: a value outside these ranges, or more than one module.

    Example:
        >>> FitNet(teacher_at=["stage2"], student_at=["stage2"]).hint_epochs
        0.25
    """

    label: ClassVar[str] = "student, FitNet"
    keep_epoch: ClassVar[str] = "best"

    temperature: float = 3.0
    weight: float = 4.0
    hint_epochs: float = 0.25
    teacher_at: Sequence[str] = ("stage2",)
    student_at: Sequence[str] = ("stage2",)

    def __post_init__(self) -> None:
        _fields.positive("temperature", self.temperature)
        _fields.deviation("weight", self.weight)
        _fields.share("hint_epochs", self.hint_epochs)
        if self.hint_epochs == 1:
            raise ValueError("hint_epochs should be below 1: the whole student learns in the epochs that are left")
        _maps.check_points(self.teacher_at, self.student_at)
        if len(self.teacher_at) != 1:
            raise ValueError(f"teacher_at should name one module, the hint, got {len(self.teacher_at)}")

    def prepare(self, student: nn.Module, teachers: Sequence[nn.Module], inputs: Tensor) -> nn.Module:
        """The student with a regressor beside it."""
        hint = _maps.shapes("the teacher", teachers[0], inputs, self.teacher_at)[0]
        guided = _maps.shapes("the student", student, inputs, self.student_at)[0]
        kernel = [max(1, mine - its + 1) for mine, its in zip(guided[2:], hint[2:], strict=True)]
        regressor = nn.Conv2d(guided[1], hint[1], (kernel[0], kernel[1]))
        return _Guided(copy.deepcopy(student), regressor, self.student_at)

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        """That of the hint in the first epochs, then that of distillation; mean over the rows."""
        first = min(round(self.hint_epochs * batch.epochs), batch.epochs - 1)
        if batch.epoch < first:
            _, (maps,) = _maps.of_teacher(batch, self.teacher_at)
            logits, regressed = student(batch.inputs, True)
            hint, mine = _maps.aligned(maps, regressed)
            # The head learns nothing, but every parameter has a gradient, as several processes need it.
            return 0.5 * F.mse_loss(mine, hint) + 0 * logits.sum()
        taught = batch.teacher_logits
        logits, regressed = student(batch.inputs, True)
        done = (batch.epoch - first) / max(1, batch.epochs - first - 1)
        weight = self.weight + (1 - self.weight) * done
        whole = 1 + weight / self.temperature**2  # CE + weight KL = whole (w CE + (1 - w) T^2 KL), w = 1 / whole
        loss = whole * distillation_loss(
            logits, taught, batch.labels, temperature=self.temperature, hard_weight=1 / whole
        )
        return loss + 0 * regressed.sum()

    def finish(self, trained: nn.Module, student: nn.Module) -> dict[str, Any]:
        """The student takes over the weights; the regressor drops away."""
        assert isinstance(trained, _Guided)
        student.load_state_dict(trained.network.state_dict())
        return {}

    def comparisons(self) -> dict[str, Method]:
        """See :func:`pykd.methods.comparisons`."""
        return comparisons()


class _Guided(nn.Module):
    def __init__(self, network: nn.Module, regressor: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.network, self.regressor, self._names = network, regressor, names

    def forward(self, inputs: Tensor, guided: bool = False) -> Any:
        """The logits, and with ``guided`` what the regressor makes of the guided maps."""
        if not guided:
            return self.network(inputs)
        logits, maps = features(self.network, inputs, self._names)
        return logits, self.regressor(maps[0])
