"""The divergence term of sparse variational dropout."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pykd import _C

Weights = Tensor | Sequence[Tensor]


def _as_list(weights: Weights) -> list[Tensor]:
    return [weights] if isinstance(weights, Tensor) else list(weights)


def variational_kl(theta: Weights, log_sigma2: Weights) -> Tensor:
    op = torch.ops.pykd.variational_kl if torch.compiler.is_compiling() else _C.variational_kl
    return op(_as_list(theta), _as_list(log_sigma2))


def variational_kl_and_grad(
    theta: Weights,
    log_sigma2: Weights,
    *,
    scale: float = 1.0,
    out: tuple[Weights, Weights] | None = None,
    accumulate: bool = False,
) -> tuple[Tensor, tuple[Weights, Weights]]:
    thetas, log_sigmas = _as_list(theta), _as_list(log_sigma2)
    if out is not None:
        buffers = _as_list(out[0]), _as_list(out[1])
        return _C.variational_kl_and_grad_out(thetas, log_sigmas, scale, accumulate, *buffers), out
    kl, grad_theta, grad_log_sigma2 = _C.variational_kl_and_grad(thetas, log_sigmas, scale)
    if isinstance(theta, Tensor):
        return kl, (grad_theta[0], grad_log_sigma2[0])
    return kl, (grad_theta, grad_log_sigma2)
