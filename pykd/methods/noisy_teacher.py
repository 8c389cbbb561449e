"""Sau & Balasubramanian 2016, "Deep Model Compression: Distilling Knowledge from Noisy Teachers", arXiv 1610.09650."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pykd.methods import _fields
from pykd.methods.comparisons import comparisons
from pykd.ops import distillation_loss, logit_regression, noisy_logits
from pykd.training import Batch, Method, mean_logits


@dataclass(frozen=True)
class NoisyTeacher:
    r"""The student regresses the teacher's logits, which are perturbed anew for every row of every batch.

    With the student's logits :math:`g_i`, the teacher's :math:`z_i` and a batch of :math:`B` rows:

    .. math::
        z'_i = (1 + s_i\, \xi_i) \odot z_i, \quad s_i \sim \mathrm{Bernoulli}(\alpha), \; \xi_i \sim N(0, \sigma^2 I)

    .. math:: L = \frac{1}{2B} \sum_{i=1}^{B} \lVert g_i - z'_i \rVert_2^2

    Its variants:

    - several noisy draws of a teacher (``n_teachers`` :math:`= K`), and several teachers :math:`m = 1 \ldots M`:
      :math:`z'_i` is the mean of all :math:`z'_{imk}`, each with its own :math:`s_{imk}` and :math:`\xi_{imk}`; or only
      the first teacher is perturbed;
    - noise on the student: :math:`g'_i = (1 + s_i\, \xi_i) \odot g_i` in the place of :math:`g_i`, and :math:`z_i` in
      that of :math:`z'_i`;
    - the distillation loss of Hinton et al. (2015) of the same logits and the labels :math:`y_i`, with the temperature
      :math:`T` and the weight :math:`w`, in the place of the regression:

    .. math::
        L = \frac{1}{B} \sum_i \Bigl[ (1 - w)\, T^2\, \mathrm{KL}\bigl(\mathrm{softmax}(z'_i / T) \,\Vert\,
        \mathrm{softmax}(g_i / T)\bigr) - w \log \mathrm{softmax}(g_i)_{y_i} \Bigr]

    Args:
        alpha: share of the rows that are perturbed, in [0, 1]; about 0.8 is reported to do best.
        sigma: standard deviation of the noise, relative to a logit; the paper tunes it.
        noise_shape: ``"logit"`` draws a number for every logit, ``"sample"`` one for a row.
        noise_kind: ``"multiplicative"`` as above, ``"additive"`` for :math:`z + s\,\xi`.
        n_teachers: noisy draws of each noisy teacher whose targets are averaged.
        objective: ``"regression"`` as above, or ``"distillation"``.
        temperature: :math:`T`, for ``"distillation"``.
        hard_weight: :math:`w`, the weight of the labels in [0, 1], for ``"distillation"``.
        noise_on: ``"teacher"`` as above, or ``"student"``.
        noisy_teachers: ``"all"`` of several teachers, or ``"one"``, the first.

    Raises:
        ValueError: a value outside these ranges.

    Example:
        >>> NoisyTeacher(sigma=0.5).alpha
        0.8
    """

    alpha: float = 0.8
    sigma: float = 0.5
    noise_shape: str = "logit"
    noise_kind: str = "multiplicative"
    n_teachers: int = 1
    objective: str = "regression"
    temperature: float = 4.0
    hard_weight: float = 0.1
    noise_on: str = "teacher"
    noisy_teachers: str = "all"

    def __post_init__(self) -> None:
        _fields.share("alpha", self.alpha)
        _fields.deviation("sigma", self.sigma)
        _fields.word("noise_shape", self.noise_shape, "logit", "sample")
        _fields.word("noise_kind", self.noise_kind, "multiplicative", "additive")
        _fields.count("n_teachers", self.n_teachers)
        _fields.word("objective", self.objective, "regression", "distillation")
        _fields.positive("temperature", self.temperature)
        _fields.share("hard_weight", self.hard_weight)
        _fields.word("noise_on", self.noise_on, "teacher", "student")
        _fields.word("noisy_teachers", self.noisy_teachers, "all", "one")
        if self.noise_on == "student" and (self.n_teachers > 1 or self.noisy_teachers == "one"):
            raise ValueError(
                "n_teachers and noisy_teachers say how teachers are perturbed: leave them out with noise_on: student"
            )

    @property
    def label(self) -> str:
        """The student's row in the table."""
        return "student, noisy teacher" if self.noise_on == "teacher" else "student, noise on its logits"

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        """Distance of the student's logits from the targets, mean over the rows.

        Of several teachers, draw j of number k (both from 0) has the seed ``batch.seed + k * n_teachers + j``.
        """
        logits = student(batch.inputs)
        noise: dict[str, Any] = {
            "sigma": self.sigma,
            "alpha": self.alpha,
            "noise_shape": self.noise_shape,
            "noise_kind": self.noise_kind,
            "row_offset": batch.row_offset,
        }
        if self.noise_on == "student":
            noisy = noisy_logits(logits, seed=batch.seed, **noise)
            return self._distance(noisy, batch.mean_teacher_logits, batch.labels)
        if len(batch.teach) == 1:  # noise and loss in one pass
            noise.update(n_teachers=self.n_teachers, seed=batch.seed)
            return self._distance(logits, batch.teacher_logits, batch.labels, **noise)
        return self._distance(logits, self._mean_target(batch, noise), batch.labels)

    def comparisons(self) -> dict[str, Method]:
        """The student alone, by clean regression, and by clean distillation."""
        return comparisons()

    def _distance(self, logits: Tensor, target: Tensor, labels: Tensor, **noise: Any) -> Tensor:
        if self.objective == "regression":
            return logit_regression(logits, target, **noise)
        softened: dict[str, Any] = {"temperature": self.temperature, "hard_weight": self.hard_weight}
        return distillation_loss(logits, target, labels, **softened, **noise)

    def _mean_target(self, batch: Batch, noise: dict[str, Any]) -> Tensor:
        targets = []
        for k, logits in enumerate(batch.all_teacher_logits):
            if k > 0 and self.noisy_teachers == "one":
                targets.append(logits)
                continue
            seeds = [batch.seed + k * self.n_teachers + j for j in range(self.n_teachers)]
            targets.append(mean_logits([noisy_logits(logits, seed=seed, **noise) for seed in seeds]))
        return mean_logits(targets)
