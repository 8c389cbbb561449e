"""Layers of Louizos, Ullrich & Welling 2017, "Bayesian Compression for Deep Learning", arXiv 1705.08665."""

from typing import Any

import torch
from torch import Tensor, nn

from pykd.nn.variational import VariationalConv2d, VariationalLinear, _Variational
from pykd.ops import noisy_logits


class _Grouped(_Variational):
    """A scale a group, with a log-uniform prior; given the scales, weights with the prior N(0, 1) times the scale."""

    scale: nn.Parameter
    scale_log_sigma2: nn.Parameter

    def _adopt(self, layer: nn.Linear | nn.Conv2d, log_sigma2: float) -> None:
        super()._adopt(layer, log_sigma2)
        groups = self.theta.new_ones(self._groups())
        self.scale = nn.Parameter(groups, self.theta.requires_grad)
        self.scale_log_sigma2 = nn.Parameter(torch.full_like(groups, log_sigma2), self.theta.requires_grad)

    def _groups(self) -> int:
        raise NotImplementedError

    @property
    def log_uniform(self) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the scales."""
        return self.scale, self.scale_log_sigma2

    def gaussian_kl(self) -> Tensor:
        """Divergence of the weights from N(0, 1), given the scales."""
        return 0.5 * (self.log_sigma2.exp() + self.theta.square() - 1 - self.log_sigma2).sum()

    def _scales(self, shape: torch.Size) -> Tensor:
        """Scales for every row, of ``shape`` = [rows, ...]; their seed is the complement of that of the outputs."""
        rows = self.scale.new_zeros(shape).flatten(1)
        seed = None if self.seed is None else ~self.seed
        noise = noisy_logits(rows, sigma=1.0, noise_kind="additive", seed=seed, row_offset=self.row_offset)
        return self.scale + (0.5 * self.scale_log_sigma2).exp() * noise.view(shape)


class GroupVariationalLinear(_Grouped, VariationalLinear):
    r"""A linear layer with a Gaussian scale for every input unit (group normal-Jeffreys; section 3.1, equations 5-8).

    .. math:: w_{oi} = z_i\, v_{oi}, \quad z_i \sim N(\mu_i, \varsigma_i^2), \quad v_{oi} \sim N(\theta_{oi},
        \sigma_{oi}^2), \qquad \log \alpha_i = \log \varsigma_i^2 - \log \mu_i^2

    In training scales are drawn anew for every row; in eval mode it is the linear layer of the means
    :math:`\mu_i \theta_{oi}`, 0 for inputs whose :math:`\log \alpha_i` is not below the threshold. Biases are plain.

    Args:
        in_features, out_features, bias, log_sigma2, threshold, device, dtype: as of :class:`VariationalLinear`;
            ``log_sigma2`` also of the scales, which begin as 1.

    Attributes:
        scale, scale_log_sigma2: ``[in_features]``.

    Example:
        >>> layer = GroupVariationalLinear(3, 2)
        >>> layer.scale.data[1] = 0.0
        >>> layer.to_plain().weight.count_nonzero(0)
        tensor([2, 0, 2])
    """

    def _groups(self) -> int:
        return self.theta.shape[1]

    def _sampled(self, input: Tensor) -> Tensor:
        return super()._sampled(input * self._scales(input.shape))

    def _finished(self, threshold: float) -> tuple[Tensor, Tensor | None]:
        return self.theta * (self.scale * self.mask(threshold)), self.bias


class GroupVariationalConv2d(_Grouped, VariationalConv2d):
    r"""A convolution with a Gaussian scale for every filter, its bias included; see :class:`GroupVariationalLinear`.

    Args:
        args, kwargs: as of :class:`VariationalConv2d`.

    Attributes:
        scale, scale_log_sigma2: ``[out_channels]``.

    Example:
        >>> GroupVariationalConv2d(3, 4, 3).log_alpha
        tensor([-10., -10., -10., -10.])
    """

    def _groups(self) -> int:
        return self.theta.shape[0]

    def _sampled(self, input: Tensor) -> Tensor:
        output = super()._sampled(input)
        return output * self._scales(output.shape[:2])[:, :, None, None]

    def _finished(self, threshold: float) -> tuple[Tensor, Tensor | None]:
        scale = self.scale * self.mask(threshold)
        return self.theta * scale[:, None, None, None], None if self.bias is None else self.bias * scale


GROUPED: dict[type[nn.Module], Any] = {nn.Linear: GroupVariationalLinear, nn.Conv2d: GroupVariationalConv2d}
