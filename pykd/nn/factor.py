"""The two modules of factor transfer (Kim, Park & Kwak, 2018, arXiv 1802.04977), as the authors' code has them."""

import itertools
from collections import OrderedDict

from torch import Tensor, nn

SLOPE = 0.1  # of LeakyReLU


class Paraphraser(nn.Module):
    r"""An autoencoder of feature maps, whose code is the factor that a student is to learn.

    Three 3x3 convolutions take :math:`m` maps to :math:`m`, :math:`mk` and :math:`mk`, the factor; three transposed
    ones take it back to :math:`mk`, :math:`m` and :math:`m`. LeakyReLU with slope 0.1 follows each of the six, the last
    of encoder and decoder among them; sides stay as they are.

    Args:
        channels: :math:`m`.
        rate: :math:`k`; the factor has :math:`\mathrm{round}(mk)` channels.
        batch_norm: normalise before each LeakyReLU; the authors' code does not.

    Attributes:
        encoder: maps ``[rows, m, h, w]`` to factors ``[rows, round(m k), h, w]``.
        decoder: and back.
        factor_channels: :math:`\mathrm{round}(mk)`.

    Raises:
        ValueError: fewer than one channel, on either side.

    Example:
        >>> import torch
        >>> paraphraser = Paraphraser(64, 0.5)
        >>> paraphraser(torch.zeros(2, 64, 8, 8)).shape, paraphraser.factor(torch.zeros(2, 64, 8, 8)).shape
        (torch.Size([2, 64, 8, 8]), torch.Size([2, 32, 8, 8]))
    """

    def __init__(self, channels: int, rate: float, *, batch_norm: bool = False) -> None:
        super().__init__()
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < float("inf"):
            raise ValueError(f"rate should be a positive number, got {rate!r}")
        self.factor_channels = round(_count("channels", channels) * rate)
        if self.factor_channels < 1:
            raise ValueError(f"rate {rate} leaves none of {channels} channels: take at least {1 / channels:.3g}")
        self.encoder = _encoder(channels, self.factor_channels, batch_norm)
        self.decoder = _layers(
            nn.ConvTranspose2d, (self.factor_channels, self.factor_channels, channels, channels), batch_norm
        )

    def factor(self, maps: Tensor) -> Tensor:
        """The code alone."""
        code: Tensor = self.encoder(maps)
        return code

    def forward(self, maps: Tensor) -> Tensor:
        """The maps, reconstructed from their code."""
        reconstructed: Tensor = self.decoder(self.encoder(maps))
        return reconstructed


class Translator(nn.Module):
    """The student's side: the paraphraser's three convolutions from the student's channels to the factor's.

    Args:
        in_channels: of the student's maps.
        out_channels: of the factor.
        batch_norm: as of :class:`Paraphraser`.

    Raises:
        ValueError: fewer than one channel, on either side.

    Example:
        >>> import torch
        >>> Translator(16, 32)(torch.zeros(2, 16, 8, 8)).shape
        torch.Size([2, 32, 8, 8])
    """

    def __init__(self, in_channels: int, out_channels: int, *, batch_norm: bool = False) -> None:
        super().__init__()
        self.layers = _encoder(_count("in_channels", in_channels), _count("out_channels", out_channels), batch_norm)

    def forward(self, maps: Tensor) -> Tensor:
        factor: Tensor = self.layers(maps)
        return factor


def _encoder(inputs: int, outputs: int, batch_norm: bool) -> nn.Sequential:
    return _layers(nn.Conv2d, (inputs, inputs, outputs, outputs), batch_norm)


def _layers(
    kind: type[nn.Conv2d] | type[nn.ConvTranspose2d], channels: tuple[int, int, int, int], batch_norm: bool
) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (inputs, outputs) in enumerate(itertools.pairwise(channels), 1):
        layers[f"conv{number}"] = kind(inputs, outputs, 3, padding=1)
        if batch_norm:
            layers[f"norm{number}"] = nn.BatchNorm2d(outputs)
        layers[f"relu{number}"] = nn.LeakyReLU(SLOPE)
    return nn.Sequential(layers)


def _count(name: str, value: int) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} should be a positive integer, got {value!r}")
    return value
