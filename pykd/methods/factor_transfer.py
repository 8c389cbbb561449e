"""Kim, Park & Kwak 2018, "Paraphrasing Complex Network: Network Compression via Factor Transfer", arXiv 1802.04977."""

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from pykd.config import Training, training_of
from pykd.errors import PykdError
from pykd.methods import _fields, _maps
from pykd.methods.attention_transfer import AttentionTransfer
from pykd.methods.comparisons import comparisons
from pykd.methods.fitnet import FitNet
from pykd.nn.factor import Paraphraser, Translator
from pykd.nn.features import features
from pykd.ops import distillation_loss, factor_loss
from pykd.training import Batch, First, FrozenTeacher, Method, unwrapped

PARAPHRASER = {
    "epochs": 6,
    "optimizer": "sgd",
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "schedule": "constant",
}


@dataclass(frozen=True)
class FactorTransfer:
    r"""The student learns from labels, and the teacher's maps as an autoencoder paraphrases them.

    First a paraphraser learns, without labels, to reconstruct the frozen teacher's maps :math:`x_T`; its code is the
    factor :math:`F_T`. Then student and translator learn together, :math:`F_S` being what the translator makes of the
    student's maps, and both modules drop away:

    .. math::
        L = \mathrm{CE}(y, g) + \beta \sum_j d\left(\frac{F^j_T}{\lVert F^j_T \rVert_2},
        \frac{F^j_S}{\lVert F^j_S \rVert_2}\right)

    over the pairs :math:`j` of named modules. Each row's factor is a vector; :math:`d` is the mean of
    :math:`|\cdot|^p` over rows and entries, as in the authors' code, whose :math:`\beta` it is for :math:`p = 1`; with
    ``reduction="row"`` it is the mean over the rows of :math:`\lVert \cdot \rVert_p`, the formula. Factors of different
    sides are averaged to the smaller ones.

    With ``hard_weight`` w below 1 the labels' term is that of Hinton's distillation, the paper's FT+KD:
    :math:`(1 - w)\, T^2\, \mathrm{KL}(z \Vert g) + w\, \mathrm{CE}(y, g)`.

    Of several teachers the first counts.

    Args:
        rate: k; a factor has k times the channels of the teacher's maps.
        beta: :math:`\beta`.
        p: 1 or 2.
        reduction: ``"mean"`` or ``"row"``.
        reconstruction: the paraphraser's loss, ``"l1"`` as in the authors' code or ``"l2"``, mean over all entries.
        batch_norm: normalise in paraphraser and translator; the authors' code does not.
        paraphraser: how the paraphraser is trained, fields of :class:`pykd.config.Training`; by default as the authors'
            code does on CIFAR-10.
        hard_weight: w, in [0, 1].
        temperature: T.
        teacher_at: names of the teacher's modules.
        student_at: of the student's, one for each of the teacher's.

    Raises:
        ValueError: a value outside these ranges.

    Example:
        >>> FactorTransfer(hard_weight=0.1).label
        'student, FT+KD'
    """

    keep_epoch: ClassVar[str] = "best"

    rate: float = 0.5
    beta: float = 500.0
    p: int = 1
    reduction: str = "mean"
    reconstruction: str = "l1"
    batch_norm: bool = False
    paraphraser: Any = dataclasses.field(default_factory=dict)
    hard_weight: float = 1.0
    temperature: float = 4.0
    teacher_at: Sequence[str] = ("stage3",)
    student_at: Sequence[str] = ("stage3",)

    def __post_init__(self) -> None:
        _fields.positive("rate", self.rate)
        _fields.deviation("beta", self.beta)
        if type(self.p) is not int or self.p not in (1, 2):
            raise ValueError(f"p should be 1 or 2, got {self.p!r}")
        _fields.word("reduction", self.reduction, "mean", "row")
        _fields.word("reconstruction", self.reconstruction, "l1", "l2")
        _fields.share("hard_weight", self.hard_weight)
        _fields.switch("batch_norm", self.batch_norm)
        _fields.positive("temperature", self.temperature)
        _maps.check_points(self.teacher_at, self.student_at)
        self._training()

    @property
    def label(self) -> str:
        """The student's row in the table."""
        return "student, FT" if self.hard_weight == 1 else "student, FT+KD"

    def first(self, teachers: Sequence[nn.Module], inputs: Tensor) -> First:
        """The paraphrasers, one for each of the teacher's modules, trained on what those give."""
        shapes = _maps.shapes("the teacher", teachers[0], inputs, self.teacher_at)
        try:
            paraphrasers = [Paraphraser(each[1], self.rate, batch_norm=self.batch_norm) for each in shapes]
        except ValueError as error:
            raise PykdError(str(error)) from None
        except RuntimeError:  # torch's word for too little memory
            raise PykdError(f"a paraphraser of rate {self.rate} does not fit into memory: take a smaller one") from None
        distance = F.l1_loss if self.reconstruction == "l1" else F.mse_loss

        def loss(module: nn.Module, batch: Batch) -> Tensor:
            _, maps = _maps.of_teacher(batch, self.teacher_at)
            pairs = zip(module(maps), maps, strict=True)
            return sum((distance(mine, its) for mine, its in pairs), start=maps[0].new_zeros(()))

        training = self._training()
        key = (self.rate, self.reconstruction, self.batch_norm, tuple(self.teacher_at), training.model_dump_json())
        return First("paraphraser", key, _Each(nn.ModuleList(paraphrasers)), loss, training)

    def prepare(self, student: nn.Module, teachers: Sequence[nn.Module], inputs: Tensor, first: nn.Module) -> nn.Module:
        """The student with a translator for each pair, and the paraphrasers, frozen."""
        assert isinstance(first, _Each)
        _maps.shapes("the teacher", teachers[0], inputs, self.teacher_at)
        shapes = _maps.shapes("the student", student, inputs, self.student_at)
        translators = nn.ModuleList(
            Translator(shape[1], paraphraser.factor_channels, batch_norm=self.batch_norm)  # type: ignore[arg-type]
            for shape, paraphraser in zip(shapes, first.each, strict=True)
        )
        encoders = [FrozenTeacher(copy.deepcopy(each.encoder)) for each in first.each]  # type: ignore[arg-type]
        return _Translated(copy.deepcopy(student), translators, encoders, self.student_at)

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        """The labels' term and the factors', mean over the rows."""
        encoders: Any = unwrapped(student).encoders
        taught, maps = _maps.of_teacher(batch, self.teacher_at)
        targets = [encoder(each) for encoder, each in zip(encoders, maps, strict=True)]
        logits, factors = student(batch.inputs, True)
        if self.hard_weight == 1:
            loss: Tensor = F.cross_entropy(logits, batch.labels)
        else:
            loss = distillation_loss(
                logits, taught, batch.labels, temperature=self.temperature, hard_weight=self.hard_weight
            )
        for mine, its in zip(factors, targets, strict=True):
            pair = _maps.aligned(mine, its)
            loss = loss + self.beta * factor_loss(*pair, p=self.p, reduction=self.reduction)
        return loss

    def finish(self, trained: nn.Module, student: nn.Module) -> dict[str, Any]:
        """The student takes over the weights; translators and paraphrasers drop away."""
        assert isinstance(trained, _Translated)
        student.load_state_dict(trained.network.state_dict())
        return {}

    def comparisons(self) -> dict[str, Method]:
        """The plain ways to train a student, other transfers at the same modules, and this one with and without KD."""
        return {
            **comparisons(),
            "attention_transfer": AttentionTransfer(teacher_at=self.teacher_at, student_at=self.student_at),
            "fitnet": FitNet(teacher_at=self.teacher_at[-1:], student_at=self.student_at[-1:]),
            "factor_transfer": dataclasses.replace(self, hard_weight=1.0),
            "ft_kd": dataclasses.replace(self, hard_weight=0.1 if self.hard_weight == 1 else self.hard_weight),
        }

    def _training(self) -> Training:
        if not isinstance(self.paraphraser, dict):
            raise ValueError(f"paraphraser should be a mapping of training fields, got {self.paraphraser!r}")
        try:
            return training_of({**PARAPHRASER, **self.paraphraser})
        except ValueError as error:
            raise ValueError(f"paraphraser: {error}") from None


class _Each(nn.Module):
    """A module for each of several maps."""

    def __init__(self, each: nn.ModuleList) -> None:
        super().__init__()
        self.each = each

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [module(value) for module, value in zip(self.each, maps, strict=True)]


class _Translated(nn.Module):
    """The student in training; the paraphrasers' encoders move from device to device with it."""

    def __init__(
        self, network: nn.Module, translators: nn.ModuleList, encoders: list[FrozenTeacher], names: Sequence[str]
    ) -> None:
        super().__init__()
        self.network, self.translators, self.encoders = network, translators, nn.ModuleList(encoders)
        self._names = names

    def forward(self, inputs: Tensor, translated: bool = False) -> Any:
        """The logits; with ``translated`` also the factors."""
        if not translated:
            return self.network(inputs)
        logits, maps = features(self.network, inputs, self._names)
        factors = [translator(value) for translator, value in zip(self.translators, maps, strict=True)]
        return logits, factors
