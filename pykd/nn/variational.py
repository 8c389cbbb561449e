"""Layers of sparse variational dropout, and networks turned into such layers and back."""

import copy
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pykd.errors import PykdError
from pykd.ops import variational_conv2d, variational_kl, variational_linear

THRESHOLD = 3.0  # of the authors' code: a weight of which log alpha is above it is noise


class _Variational(nn.Module):
    """What the layers have in common; a layer brings the two functions and the geometry that both take."""

    _noisy: ClassVar[Callable[..., Tensor]]
    _exact: ClassVar[Callable[..., Tensor]]

    theta: nn.Parameter
    log_sigma2: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, layer: nn.Linear | nn.Conv2d, log_sigma2: float, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.seed: Tensor | None = None
        self.row_offset = 0
        self._adopt(layer, log_sigma2)

    def _adopt(self, layer: nn.Linear | nn.Conv2d, log_sigma2: float) -> None:
        """Takes copies of the layer's values, and its mode."""
        weight = layer.weight.detach()
        self.theta = nn.Parameter(weight.clone(), layer.weight.requires_grad)
        self.log_sigma2 = nn.Parameter(torch.full_like(weight, log_sigma2), layer.weight.requires_grad)
        bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), layer.bias.requires_grad)
        self.register_parameter("bias", bias)
        self.train(layer.training)

    def _geometry(self) -> dict[str, Any]:
        return {}

    def _empty(self) -> nn.Linear | nn.Conv2d:
        """The plain layer of this geometry, without memory."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return self._exact(input, *self._finished(self.threshold), **self._geometry())
        return self._sampled(input)

    def _sampled(self, input: Tensor) -> Tensor:
        noise = {"seed": self.seed, "row_offset": self.row_offset}
        return self._noisy(input, self.theta, self.log_sigma2, self.bias, **self._geometry(), **noise)

    def _finished(self, threshold: float) -> tuple[Tensor, Tensor | None]:
        """Weight and bias without noise."""
        return self.theta * self.mask(threshold), self.bias

    @property
    def log_uniform(self) -> tuple[Tensor, Tensor]:
        """Mean and log variance of what has the log-uniform prior: :func:`kl` sums over it."""
        return self.theta, self.log_sigma2

    @property
    def log_alpha(self) -> Tensor:
        r""":math:`\log \sigma^2 - \log \theta^2` like ``theta``, without gradient; infinite where theta is 0."""
        mean, log_variance = (value.detach() for value in self.log_uniform)
        return torch.where(mean == 0, math.inf, log_variance - 2 * mean.abs().log())

    def mask(self, threshold: float | None = None) -> Tensor:
        """What stays: true where log alpha is below the threshold (the layer's own by default)."""
        return self.log_alpha < (self.threshold if threshold is None else threshold)

    def sparsity(self, threshold: float | None = None) -> float:
        """Share of the weights that go, in [0, 1]; 0 of an empty layer."""
        mask = self.mask(threshold)
        return 1 - int(mask.sum()) / max(1, mask.numel())

    @torch.no_grad()
    def to_plain(self, threshold: float | None = None) -> nn.Linear | nn.Conv2d:
        """A plain layer with the masked means (threshold of the layer by default): what this one is in eval mode."""
        layer = self._empty()
        weight, bias = self._finished(self.threshold if threshold is None else threshold)
        layer.weight = nn.Parameter(weight.clone(), self.theta.requires_grad)
        if bias is not None and self.bias is not None:
            layer.bias = nn.Parameter(bias.clone(), self.bias.requires_grad)
        return layer.train(self.training)


class VariationalLinear(_Variational):
    r"""A linear layer whose weights are Gaussian, one variance a weight (Molchanov, Ashukha & Vetrov 2017, section 3).

    .. math:: w_{ij} \sim N(\theta_{ij}, \sigma^2_{ij}), \qquad \log \alpha_{ij} = \log \sigma^2_{ij} -
        \log \theta^2_{ij}

    In training it samples outputs, not weights (:func:`pykd.ops.variational_linear`); in eval mode it is the linear
    layer of the means :math:`\theta_{ij}` where :math:`\log \alpha_{ij}` is below the threshold, 0 elsewhere.

    Args:
        in_features, out_features, bias, device, dtype: as of ``torch.nn.Linear``, whose initial values theta has.
        log_sigma2: initial :math:`\log \sigma^2`; the authors start from -10, and from -8 with a trained network.
        threshold: of natural :math:`\log \alpha`.

    Attributes:
        theta, log_sigma2: ``[out_features, in_features]``.
        bias: ``[out_features]``, or None.

    Cost: two matrix products instead of one, and one pass of noise over the outputs.

    Example:
        >>> layer = VariationalLinear.from_plain(nn.Linear(3, 2)).eval()
        >>> rows = torch.randn(5, 3)
        >>> bool(layer(rows).equal(layer.to_plain()(rows)))
        True
    """

    _noisy = staticmethod(variational_linear)
    _exact = staticmethod(F.linear)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        log_sigma2: float = -10.0,
        threshold: float = THRESHOLD,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        layer = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        super().__init__(layer, log_sigma2, threshold)

    @classmethod
    def from_plain(cls, layer: nn.Linear, log_sigma2: float = -8.0, threshold: float = THRESHOLD) -> Self:
        """The variational layer whose means are the layer's weights."""
        bias = layer.bias is not None
        new = cls(layer.in_features, layer.out_features, bias, threshold=threshold, device="meta")
        new._adopt(layer, log_sigma2)
        return new

    def _empty(self) -> nn.Linear:
        out_features, in_features = self.theta.shape
        return nn.Linear(in_features, out_features, self.bias is not None, device="meta")

    def extra_repr(self) -> str:
        out_features, in_features = self.theta.shape
        return f"{in_features}, {out_features}, bias={self.bias is not None}, threshold={self.threshold:g}"


class VariationalConv2d(_Variational):
    r"""A convolution whose weights are Gaussian, one variance a weight; see :class:`VariationalLinear`.

    The variance has no bias, and every output element its own noise (:func:`pykd.ops.variational_conv2d`).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device, dtype: as of
            ``torch.nn.Conv2d``, whose initial values theta has.
        padding_mode: "zeros" alone.
        log_sigma2, threshold: as of :class:`VariationalLinear`.

    Attributes:
        theta, log_sigma2: ``[out_channels, in_channels / groups, *kernel_size]``.
        bias: ``[out_channels]``, or None.

    Raises:
        PykdError: another padding mode, or a padding "same" that differs on two sides.

    Example:
        >>> layer = VariationalConv2d(3, 4, 3, padding=1)
        >>> layer(torch.zeros(2, 3, 8, 8)).shape, layer.sparsity(threshold=100.0)
        (torch.Size([2, 4, 8, 8]), 0.0)
    """

    _noisy = staticmethod(variational_conv2d)
    _exact = staticmethod(F.conv2d)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | str | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        log_sigma2: float = -10.0,
        threshold: float = THRESHOLD,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if padding_mode != "zeros":
            raise PykdError(f"a variational convolution pads with zeros, not {padding_mode}: set padding_mode='zeros'")
        layer = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            device=device,
            dtype=dtype,
        )
        self._shape: dict[str, Any] = {
            "stride": layer.stride,
            "padding": _padding(layer),
            "dilation": layer.dilation,
            "groups": groups,
        }
        super().__init__(layer, log_sigma2, threshold)

    @classmethod
    def from_plain(cls, layer: nn.Conv2d, log_sigma2: float = -8.0, threshold: float = THRESHOLD) -> Self:
        """The variational layer whose means are the layer's weights."""
        shape: Any = {
            "kernel_size": layer.kernel_size,
            "stride": layer.stride,
            "padding": layer.padding,
            "dilation": layer.dilation,
            "groups": layer.groups,
            "bias": layer.bias is not None,
            "padding_mode": layer.padding_mode,
        }
        new = cls(layer.in_channels, layer.out_channels, **shape, threshold=threshold, device="meta")
        new._adopt(layer, log_sigma2)
        return new

    def _geometry(self) -> dict[str, Any]:
        return self._shape

    def _empty(self) -> nn.Conv2d:
        out_channels, in_channels, *kernel = self.theta.shape
        sizes: Any = {"kernel_size": tuple(kernel), "bias": self.bias is not None, **self._shape}
        return nn.Conv2d(in_channels * self._shape["groups"], out_channels, **sizes, device="meta")

    def extra_repr(self) -> str:
        shape = ", ".join(f"{name}={value}" for name, value in self._shape.items())
        return f"{list(self.theta.shape)}, {shape}, bias={self.bias is not None}, threshold={self.threshold:g}"


def _padding(layer: nn.Conv2d) -> tuple[int, ...]:
    if not isinstance(layer.padding, str):
        return layer.padding
    if layer.padding == "valid":
        return (0, 0)
    reaches = [step * (side - 1) for step, side in zip(layer.dilation, layer.kernel_size, strict=True)]
    if any(reach % 2 for reach in reaches):
        raise PykdError(f"padding='same' of the kernel {layer.kernel_size} differs on two sides: give numbers instead")
    return tuple(reach // 2 for reach in reaches)


def variational_layers(module: nn.Module) -> dict[str, _Variational]:
    """The variational layers of a network, each once, by name, in order.

    >>> list(variational_layers(nn.Sequential(nn.ReLU(), VariationalLinear(3, 2))))
    ['1']
    """
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, _Variational)}


def kl(module: nn.Module) -> Tensor:
    r"""Sum of the divergences of all weights of all variational layers from their prior, a scalar with gradient.

    One call of :func:`pykd.ops.variational_kl` for the whole network. Divide it by the number of training rows beside a
    mean over rows. Layers of group-sparse Bayesian compression add the divergence of their weights from
    :math:`N(0, 1)`.

    Example:
        >>> layer = VariationalLinear(1, 1)
        >>> _ = layer.theta.data.fill_(1.0), layer.log_sigma2.data.fill_(0.0)  # log alpha = 0
        >>> round(kl(layer).item(), 4)
        0.4312
    """
    layers = list(variational_layers(module).values())
    pairs = [layer.log_uniform for layer in layers]
    total = variational_kl([mean for mean, _ in pairs], [log_variance for _, log_variance in pairs])
    for layer in layers:
        if (rest := getattr(layer, "gaussian_kl", None)) is not None:
            total = total + rest()
    return total


def set_noise(module: nn.Module, seed: Tensor | None, row_offset: int = 0) -> None:
    """Decides the noise of the next forward passes in training mode.

    Layer number k of the network, from 0, draws from the seed ``seed + k``, and the noise of a row depends on its
    number in the whole batch: it is the same however the batch is shared out among processes.

    Args:
        module: a network with variational layers.
        seed: int64 scalar; None draws one from torch's generator in every pass.
        row_offset: number of the first row that the network will get.

    Example:
        >>> layer = VariationalLinear(3, 2)
        >>> set_noise(layer, torch.tensor(1))
        >>> bool(layer(torch.ones(1, 3)).equal(layer(torch.ones(1, 3))))
        True
    """
    for number, layer in enumerate(variational_layers(module).values()):
        layer.seed = None if seed is None else seed + number
        layer.row_offset = row_offset


def variational(
    module: nn.Module,
    *,
    log_sigma2: float = -8.0,
    threshold: float = THRESHOLD,
    skip: Collection[str] = (),
    kinds: Mapping[type[nn.Module], Any] | None = None,
) -> nn.Module:
    """A copy of ``module`` in which every ``Linear`` and ``Conv2d`` is a variational layer with the same means.

    A layer that is used in several places stays one layer. Subclasses of the two stay as they are.

    Args:
        module: any network; it is not changed.
        log_sigma2: initial log variance.
        threshold: of log alpha.
        skip: names of layers that stay as they are.
        kinds: the class for each kind of layer, by default :class:`VariationalLinear` and :class:`VariationalConv2d`;
            ``pykd.nn.group_variational.GROUPED`` for those of group-sparse Bayesian compression.

    Raises:
        PykdError: a name in ``skip`` that is none, another kind of convolution, or layers that share a weight.

    Example:
        >>> variational(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), skip=["1"])[1]
        Linear(in_features=2, out_features=2, bias=True)
    """
    kinds = kinds or {nn.Linear: VariationalLinear, nn.Conv2d: VariationalConv2d}
    names = dict(module.named_modules(remove_duplicate=False))
    for name in skip:
        if name not in names:
            raise PykdError(f"the network has no layer {name!r} to skip; it has {', '.join(filter(None, names))}")
    kept = {id(names[name]) for name in skip}
    owners: dict[int, str] = {}  # of a parameter
    converted = set()
    for name, layer in module.named_modules():
        where = f"layer {name!r}" if name else "the network"
        convertible = id(layer) not in kept and type(layer) in kinds
        if convertible and isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
            raise PykdError(f"{where} pads by {layer.padding_mode}, which has no variational form: skip it")
        other_form = isinstance(layer, nn.modules.conv._ConvNd) and not isinstance(layer, nn.Conv2d)
        if other_form and id(layer) not in kept:
            raise PykdError(f"{where} is a {type(layer).__name__}, which has no variational form: skip it")
        for parameter in layer.parameters(recurse=False):
            other = owners.setdefault(id(parameter), name)
            if other != name and (convertible or other in converted):
                raise PykdError(f"layers {other!r} and {name!r} share a weight, which variances cannot: skip them")
        if convertible:
            converted.add(name)

    def change(layer: nn.Module, original: nn.Module) -> nn.Module:
        if type(layer) in kinds and id(original) not in kept:
            return kinds[type(layer)].from_plain(layer, log_sigma2, threshold)
        return layer

    return _changed(module, change)


def plain(module: nn.Module, threshold: float | None = None) -> nn.Module:
    """A copy of ``module`` in which every variational layer is a plain one with the masked means.

    Args:
        module: any network; it is not changed.
        threshold: of log alpha, by default each layer's own.

    Example:
        >>> plain(nn.Sequential(VariationalLinear(3, 2)))
        Sequential(
          (0): Linear(in_features=3, out_features=2, bias=True)
        )
    """

    def change(layer: nn.Module, _: nn.Module) -> nn.Module:
        return layer.to_plain(threshold) if isinstance(layer, _Variational) else layer

    return _changed(module, change)


def _changed(module: nn.Module, change: Callable[[nn.Module, nn.Module], nn.Module]) -> nn.Module:
    """A copy with ``change(copied layer, its original)`` in the place of every layer."""
    copied = copy.deepcopy(module)
    done: dict[int, nn.Module] = {}

    def visit(layer: nn.Module, original: nn.Module) -> nn.Module:
        if id(original) not in done:
            done[id(original)] = new = change(layer, original)
            if new is layer:
                for name, child in layer._modules.items():
                    if child is not None:
                        layer._modules[name] = visit(child, original.get_submodule(name))
        return done[id(original)]

    return visit(copied, module)
