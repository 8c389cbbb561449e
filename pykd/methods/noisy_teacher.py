"""Sau & Balasubramanian 2016, "Deep Model Compression: Distilling Knowledge from Noisy Teachers", arXiv 1610.09650."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from pykd.methods.comparisons import comparisons
from pykd.ops import logit_regression
from pykd.training import Batch, Method


@dataclass(frozen=True)
class NoisyTeacher:
    r"""The student regresses the teacher's logits, which are perturbed anew for every row of every batch.

    With the student's logits :math:`g_i`, the teacher's :math:`z_i` and a batch of :math:`B` rows:

    .. math::
        z'_i = (1 + s_i\, \xi_i) \odot z_i, \quad s_i \sim \mathrm{Bernoulli}(\alpha), \; \xi_i \sim N(0, \sigma^2 I)

    .. math:: L = \frac{1}{2B} \sum_{i=1}^{B} \lVert g_i - z'_i \rVert_2^2

    Args:
        alpha: share of the rows that are perturbed, in [0, 1]; 0.8 did best in the paper.
        sigma: standard deviation of the noise, relative to a logit; the paper tunes it.
        noise_shape: ``"logit"`` draws a number for every logit, ``"sample"`` one for a row.
        noise_kind: ``"multiplicative"`` as above, ``"additive"`` for :math:`z + s\,\xi`.
        n_teachers: noisy teachers whose targets are averaged.

    Raises:
        ValueError: a value outside these ranges.

    Example:
        >>> NoisyTeacher(sigma=0.5).alpha
        0.8
    """

    label: ClassVar[str] = "student, noisy teacher"

    alpha: float = 0.8
    sigma: float = 0.5
    noise_shape: str = "logit"
    noise_kind: str = "multiplicative"
    n_teachers: int = 1

    def __post_init__(self) -> None:
        if not _is_number(self.alpha) or not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha should be in [0, 1], got {self.alpha!r}")
        if not _is_number(self.sigma) or not 0 <= self.sigma < math.inf:
            raise ValueError(f"sigma should be finite and not negative, got {self.sigma!r}")
        if self.noise_shape not in ("logit", "sample"):
            raise ValueError(f"noise_shape should be logit or sample, got {self.noise_shape!r}")
        if self.noise_kind not in ("multiplicative", "additive"):
            raise ValueError(f"noise_kind should be multiplicative or additive, got {self.noise_kind!r}")
        if not isinstance(self.n_teachers, int) or isinstance(self.n_teachers, bool) or self.n_teachers < 1:
            raise ValueError(f"n_teachers should be a whole number of at least 1, got {self.n_teachers!r}")

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        """Half the squared distance to the noisy logits, mean over the rows."""
        return logit_regression(
            student(batch.inputs),
            batch.teacher_logits,
            sigma=self.sigma,
            alpha=self.alpha,
            noise_shape=self.noise_shape,
            noise_kind=self.noise_kind,
            n_teachers=self.n_teachers,
            seed=batch.seed,
            row_offset=batch.row_offset,
        )

    def comparisons(self) -> dict[str, Method]:
        """The student alone and by clean regression."""
        return comparisons()


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
