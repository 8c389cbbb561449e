"""variational_kl in plain PyTorch: the definition the kernels are judged against."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = Tensor | Sequence[Tensor]
K1, K2, K3 = 0.63576, 1.87320, 1.48695


def _as_list(weights: Weights) -> list[Tensor]:
    return [weights] if isinstance(weights, Tensor) else list(weights)


def _kl(log_alpha: Tensor) -> Tensor:
    # k1 - k1 s(u) is k1 s(-u), which keeps its digits where it is small
    return K1 * torch.sigmoid(-K2 - K3 * log_alpha) + 0.5 * F.softplus(-log_alpha, threshold=1e4)


def variational_kl(theta: Weights, log_sigma2: Weights) -> Tensor:
    thetas, log_sigmas = _as_list(theta), _as_list(log_sigma2)
    dtype = torch.float64 if thetas and thetas[0].dtype == torch.float64 else torch.float32
    total = torch.zeros((), dtype=torch.float64, device=thetas[0].device if thetas else None)
    for mean, log_variance in zip(thetas, log_sigmas, strict=True):
        safe = torch.where(mean == 0, 1.0, mean.double())  # theta = 0: log alpha = inf, KL and gradients 0
        kl = _kl(log_variance.double() - 2 * safe.abs().log())
        total = total + torch.where(mean == 0, 0.0, kl).sum()
    return total.to(dtype)


def variational_kl_and_grad(
    theta: Weights,
    log_sigma2: Weights,
    *,
    scale: float = 1.0,
    out: tuple[Weights, Weights] | None = None,
    accumulate: bool = False,
) -> tuple[Tensor, tuple[Weights, Weights]]:
    given = (theta, log_sigma2)
    leaves = [[each.detach().requires_grad_() for each in _as_list(weights)] for weights in given]
    with torch.enable_grad():
        value = scale * variational_kl(*leaves)
        flat = list(torch.autograd.grad(value, leaves[0] + leaves[1])) if leaves[0] else []
    grads = flat[: len(leaves[0])], flat[len(leaves[0]) :]
    if out is not None:
        for buffers, values in zip(out, grads, strict=True):
            for buffer, grad in zip(_as_list(buffers), values, strict=True):
                buffer.add_(grad) if accumulate else buffer.copy_(grad)
        return value.detach(), out
    one, other = (
        values[0] if isinstance(weights, Tensor) else values for weights, values in zip(given, grads, strict=True)
    )
    return value.detach(), (one, other)
