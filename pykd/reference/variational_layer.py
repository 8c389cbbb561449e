"""variational_linear and variational_conv2d in plain PyTorch: the definition the kernels are judged against."""

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from pykd.reference.philox import logit_normal

VARIANCE_FLOOR = 1e-8  # added to the variance: its root has a gradient everywhere


def _sample(
    mean: Tensor, variance: Tensor, seed: Tensor | None, generator: Generator | None, row_offset: int
) -> Tensor:
    """``mean + sqrt(variance + 1e-8) * eps``; the noise of sample b, flattened, is that of the logits of row b."""
    if seed is None:
        seed = torch.randint(2**63 - 1, (), generator=generator, device=mean.device)
    noise = torch.zeros_like(mean)
    if mean.numel():
        flat = mean.flatten(1)
        noise = logit_normal(*flat.shape, seed=seed, row_offset=row_offset).view_as(mean).to(mean.dtype)
    return mean + (variance + VARIANCE_FLOOR).sqrt() * noise


def variational_linear(
    input: Tensor,
    theta: Tensor,
    log_sigma2: Tensor,
    bias: Tensor | None = None,
    *,
    seed: Tensor | None = None,
    generator: Generator | None = None,
    row_offset: int = 0,
) -> Tensor:
    x, mean_weight, variance_weight = input.double(), theta.double(), log_sigma2.double().exp()
    mean = F.linear(x, mean_weight, None if bias is None else bias.double())
    rows, variances = (each.reshape(-1, len(theta)) for each in (mean, F.linear(x * x, variance_weight)))
    return _sample(rows, variances, seed, generator, row_offset).view_as(mean).to(input.dtype)


def variational_conv2d(
    input: Tensor,
    theta: Tensor,
    log_sigma2: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    seed: Tensor | None = None,
    generator: Generator | None = None,
    row_offset: int = 0,
) -> Tensor:
    x, mean_weight, variance_weight = input.double(), theta.double(), log_sigma2.double().exp()
    shape = (stride, padding, dilation, groups)
    mean = F.conv2d(x, mean_weight, None if bias is None else bias.double(), *shape)
    variance = F.conv2d(x * x, variance_weight, None, *shape)
    return _sample(mean, variance, seed, generator, row_offset).to(input.dtype)
