"""Hegde, Prasad, Hebbalaguppe & Kumar 2020, "Variational Student", arXiv 1910.12061, over sparse variational dropout
(Molchanov, Ashukha & Vetrov 2017, arXiv 1701.05369)."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pykd.methods import _fields
from pykd.methods._variational import facts, warm_up, write_back
from pykd.methods.bayesian_compression import BayesianCompression
from pykd.methods.comparisons import comparisons
from pykd.nn import BlockSparseRegularizer, kl, set_noise, variational
from pykd.ops import distillation_loss
from pykd.pruning import prune_groups_
from pykd.training import Batch, Method, label_loss, unwrapped


@dataclass(frozen=True)
class VariationalStudent:
    r"""A student with variational weights learns from labels and teacher; what stays uncertain of it is cut away.

    With the logits :math:`z^s` and :math:`z^t`, :math:`N` training rows, the student's means and variances
    :math:`\theta, \sigma^2`, and :math:`c` rising from 0 to 1 over the epochs:

    .. math::
        L = \mathrm{CE}(y, z^s) + \lambda_T\, 2 T^2\, \mathrm{KL}\bigl(\mathrm{softmax}(z^t / T) \,\Vert\,
        \mathrm{softmax}(z^s / T)\bigr) + \lambda_V\, \frac{c}{N} \sum_w \mathrm{KL}_{\mathrm{SVD}}(\log \alpha_w) +
        \lambda_g\, R_g

    .. math:: \log \alpha = \log \sigma^2 - \log \theta^2, \qquad R_g = \sum_m \max\bigl(\max |W_{T, m}|,
        \max |\theta_m|\bigr)

    Finished, the student has the weights :math:`\theta` where :math:`\log \alpha` is below the threshold, 0 elsewhere.
    A weight :math:`\lambda = 0` switches its term off at no cost: without :math:`\lambda_T` no teacher is asked,
    without :math:`\lambda_V` the layers stay plain and nothing is masked.

    The paper's text could not be had; its loss was read from a survey's transcription, which leaves open:

    - the direction of the divergence: written as student || teacher there (``"reverse"``), while distillation is
      teacher || student (``"forward"``, the default);
    - the factor :math:`2 T^2`, which is taken as it is written;
    - the absolute value, written outside of the maximum; a norm needs :math:`\max |w|`;
    - the index :math:`m`, here the input unit or channel, and whether the norm is taken of the means;
    - the temperature, every :math:`\lambda`, the warm-up (here that of Molchanov et al. as shares of the epochs) and
      the threshold (theirs): the values are not found anywhere, these are ours.

    With the teacher's weights fixed, the norm ``"l1_linf"`` acts only on groups in which the student's largest weight
    exceeds the teacher's, and there on that weight alone; ``"l1_l2"`` shrinks every group, less where the teacher's is
    strong. Of several teachers the hint is the mean of the logits, and the groups are the first one's.

    Args:
        temperature: :math:`T`.
        lambda_t: :math:`\lambda_T`.
        lambda_v: :math:`\lambda_V`; 1 is the variational bound.
        lambda_g: :math:`\lambda_g`.
        direction: of the divergence, ``"forward"`` or ``"reverse"``.
        groups: ``"in"``, ``"out"``, ``"kernel"`` or ``(rows, columns)``, as of :func:`pykd.ops.block_norm`.
        norm: ``"l1_linf"`` or ``"l1_l2"``.
        match: which layers belong together, as of :class:`pykd.nn.BlockSparseRegularizer`.
        warmup_start: share of the epochs in which :math:`c = 0`.
        warmup_end: share of the epochs from which :math:`c = 1`.
        threshold: of :math:`\log \alpha`.
        log_sigma2: initial :math:`\log \sigma^2`.
        group_threshold: groups of the finished student whose norm is not above this are set to 0; 0 leaves them.
        skip: names of layers that stay plain.

    Raises:
        ValueError: a value outside these ranges.

    Example:
        >>> VariationalStudent(lambda_g=0.0).label
        'student, KD+SparseVD'
    """

    temperature: float = 2.0
    lambda_t: float = 0.5
    lambda_v: float = 1.0
    lambda_g: float = 1e-3
    direction: str = "forward"
    groups: str | Sequence[int] = "in"
    norm: str = "l1_linf"
    match: str | Mapping[str, str] = "order"
    warmup_start: float = 0.05
    warmup_end: float = 0.4
    threshold: float = 3.0
    log_sigma2: float = -10.0
    group_threshold: float = 0.0
    skip: Sequence[str] = ()

    def __post_init__(self) -> None:
        _fields.positive("temperature", self.temperature)
        for name in ("lambda_t", "lambda_v", "lambda_g", "group_threshold"):
            _fields.deviation(name, getattr(self, name))
        _fields.word("direction", self.direction, "forward", "reverse")
        _fields.groups("groups", self.groups)
        _fields.word("norm", self.norm, "l1_linf", "l1_l2")
        if not isinstance(self.match, Mapping):
            _fields.word("match", self.match, "order", "name")
        _fields.interval("warmup_start", self.warmup_start, "warmup_end", self.warmup_end)
        _fields.number("threshold", self.threshold)
        _fields.number("log_sigma2", self.log_sigma2)
        _fields.names("skip", self.skip)

    @property
    def label(self) -> str:
        """The student's row in the table: its terms."""
        terms = {"KD": self.lambda_t, "SparseVD": self.lambda_v, "BSR": self.lambda_g}
        return "student, " + ("+".join(name for name, weight in terms.items() if weight) or "labels alone")

    @property
    def keep_epoch(self) -> str:
        """The last epoch is finished where it is the sparsest."""
        return "last" if self.lambda_v or self.lambda_g else "best"

    def prepare(self, student: nn.Module, teachers: Sequence[nn.Module], inputs: Tensor) -> nn.Module:
        """The student with variational layers, and the regulariser that watches them."""
        if self.lambda_v:
            network = variational(student, log_sigma2=self.log_sigma2, threshold=self.threshold, skip=self.skip)
        else:
            network = copy.deepcopy(student)
        regularizer = None
        if self.lambda_g:
            regularizer = BlockSparseRegularizer(
                network, teachers[0], groups=self._groups, norm=self.norm, match=self.match
            )
        return _Trained(network, regularizer)

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        """Mean over the rows; the terms of the weights do not depend on them."""
        trained = unwrapped(student)
        if self.lambda_v:
            set_noise(trained, batch.seed, batch.row_offset)
        if self.lambda_t:
            whole = 1 + 2 * self.lambda_t  # CE + 2 lambda T^2 KL = whole * (w CE + (1 - w) T^2 KL), w = 1 / whole
            taught = batch.mean_teacher_logits
            loss = whole * distillation_loss(
                student(batch.inputs),
                taught,
                batch.labels,
                temperature=self.temperature,
                hard_weight=1 / whole,
                direction=self.direction,
            )
        else:
            loss = label_loss(student, batch)
        if weight := self.lambda_v * warm_up(batch, self.warmup_start, self.warmup_end):
            loss = loss + weight / batch.train_rows * kl(trained)
        if isinstance(trained, _Trained) and trained.regularizer is not None:
            loss = loss + self.lambda_g * trained.regularizer()
        return loss

    def finish(self, trained: nn.Module, student: nn.Module) -> dict[str, Any]:
        """Masked means become the student's weights, then weak groups become 0; the facts are those of
        :func:`pykd.methods._variational.facts`."""
        assert isinstance(trained, _Trained)
        write_back(trained.network, student)
        if self.group_threshold:
            prune_groups_(student, groups=self._groups, norm=self.norm, threshold=self.group_threshold)
        return facts(trained.network, student)

    def comparisons(self) -> dict[str, Method]:
        """The ablations of this method, its Bayesian rival, and the plain ways to train a student."""
        without_groups = dataclasses.replace(self, lambda_g=0.0, group_threshold=0.0)
        return {
            **comparisons(),
            "kd": dataclasses.replace(without_groups, lambda_v=0.0),
            "sparse_vd": dataclasses.replace(without_groups, lambda_t=0.0),
            "kd_sparse_vd": without_groups,
            "bayesian_compression": BayesianCompression(
                lambda_v=self.lambda_v, warmup_start=self.warmup_start, warmup_end=self.warmup_end, skip=self.skip
            ),
        }

    @property
    def _groups(self) -> str | tuple[int, int]:
        return self.groups if isinstance(self.groups, str) else (self.groups[0], self.groups[1])


class _Trained(nn.Module):
    """The network in training; the regulariser's copy of the teacher moves from device to device with it."""

    network: nn.Module
    regularizer: BlockSparseRegularizer | None

    def __init__(self, network: nn.Module, regularizer: BlockSparseRegularizer | None) -> None:
        super().__init__()
        self.network = network
        self.regularizer = regularizer

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.network(inputs)
        return logits
