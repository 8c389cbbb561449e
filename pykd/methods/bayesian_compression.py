"""Louizos, Ullrich & Welling 2017, "Bayesian Compression for Deep Learning", arXiv 1705.08665."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from pykd.methods import _fields
from pykd.methods._variational import facts, warm_up, write_back
from pykd.methods.comparisons import comparisons
from pykd.nn import kl, set_noise, variational
from pykd.nn.group_variational import GROUPED
from pykd.training import Batch, Method, label_loss, unwrapped


@dataclass(frozen=True)
class BayesianCompression:
    r"""Group normal-Jeffreys (section 3.1): whole inputs and filters whose scale stays uncertain are cut away.

    With a scale for every input of a linear layer and every filter of a convolution, for :math:`N` training rows:

    .. math:: w_{oi} = z_i\, v_{oi}, \quad z_i \sim N(\mu_i, \varsigma_i^2), \quad v_{oi} \sim N(\theta_{oi},
        \sigma_{oi}^2), \qquad \log \alpha_i = \log \varsigma_i^2 - \log \mu_i^2

    .. math::
        L = \mathrm{CE}(y, z^s) + \lambda_V\, \frac{c}{N} \Bigl[ \sum_i \mathrm{KL}_{\mathrm{SVD}}(\log \alpha_i) +
        \tfrac{1}{2} \sum_{oi} \bigl( \sigma_{oi}^2 + \theta_{oi}^2 - 1 - \log \sigma_{oi}^2 \bigr) \Bigr]

    No teacher is asked. Finished, the student has the weights :math:`\mu_i \theta_{oi}`, 0 in groups whose
    :math:`\log \alpha_i` is not below the threshold. The paper chooses a threshold for each layer by eye, and then
    fewer bits a weight; here it is one number, and weights stay float32. Biases are plain numbers. On MNIST's held-out
    rows (784-500-50-10) every threshold from -2 to 4 had the same errors within 0.05 points: the lowest is the default.

    Args:
        lambda_v: :math:`\lambda_V`; 1 is the variational bound.
        warmup_start: share of the epochs in which :math:`c = 0`.
        warmup_end: share of the epochs from which :math:`c = 1`.
        threshold: of :math:`\log \alpha`.
        log_sigma2: initial :math:`\log \sigma^2` and :math:`\log \varsigma^2`.
        skip: names of layers that stay plain.

    Raises:
        ValueError: a value outside these ranges.

    Example:
        >>> BayesianCompression().keep_epoch
        'last'
    """

    label: ClassVar[str] = "student, Bayesian compression"
    keep_epoch: ClassVar[str] = "last"

    lambda_v: float = 1.0
    warmup_start: float = 0.05
    warmup_end: float = 0.4
    threshold: float = -2.0
    log_sigma2: float = -9.0
    skip: Sequence[str] = ()

    def __post_init__(self) -> None:
        _fields.deviation("lambda_v", self.lambda_v)
        _fields.interval("warmup_start", self.warmup_start, "warmup_end", self.warmup_end)
        _fields.number("threshold", self.threshold)
        _fields.number("log_sigma2", self.log_sigma2)
        _fields.names("skip", self.skip)

    def prepare(self, student: nn.Module, teachers: Sequence[nn.Module], inputs: Tensor) -> nn.Module:
        """The student with group-sparse layers."""
        return variational(student, log_sigma2=self.log_sigma2, threshold=self.threshold, skip=self.skip, kinds=GROUPED)

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy, mean over the rows, and the share of the divergence that is a row's."""
        trained = unwrapped(student)
        set_noise(trained, batch.seed, batch.row_offset)
        loss = label_loss(student, batch)
        if weight := self.lambda_v * warm_up(batch, self.warmup_start, self.warmup_end):
            loss = loss + weight / batch.train_rows * kl(trained)
        return loss

    def finish(self, trained: nn.Module, student: nn.Module) -> dict[str, Any]:
        """Means of the groups that stay become the student's weights; facts as of the variational student."""
        write_back(trained, student)
        return facts(trained, student)

    def comparisons(self) -> dict[str, Method]:
        """See :func:`comparisons`."""
        return comparisons()
