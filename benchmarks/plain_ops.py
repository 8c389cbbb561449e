"""pykd's training ops as one writes them first in plain torch, under the same names, for recipes to run on.

They draw from torch's own generator, and so take no notice of a seed. ``pykd.reference`` says what the ops are, but is
no peer: it draws the very same numbers, by Philox in int64, and mostly computes in float64.
"""

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import pykd.ops

K1, K2, K3 = 0.63576, 1.87320, 1.48695
Weights = Sequence[Tensor]


def noisy_logits(
    logits: Tensor,
    *,
    sigma: float,
    alpha: float = 1.0,
    noise_shape: str = "logit",
    noise_kind: str = "multiplicative",
    **_: object,
) -> Tensor:
    if sigma == 0:
        return logits
    noise = torch.randn_like(logits if noise_shape == "logit" else logits[:, :1]) * sigma
    noise = noise * torch.empty_like(logits[:, :1]).bernoulli_(alpha)
    return logits + (logits * noise if noise_kind == "multiplicative" else noise)


def _target(teacher: Tensor, sigma: float = 0.0, n_teachers: int = 1, **noise: object) -> Tensor:
    draws = [noisy_logits(teacher, sigma=sigma, **noise) for _ in range(n_teachers)]
    return draws[0] if n_teachers == 1 else torch.stack(draws).mean(0)


def logit_regression(student: Tensor, teacher: Tensor, **noise: object) -> Tensor:
    return 0.5 * (student - _target(teacher, **noise)).square().sum() / len(student)


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 1.0,
    hard_weight: float = 0.0,
    direction: str = "forward",
    **noise: object,
) -> Tensor:
    logs = [F.log_softmax(logits / temperature, 1) for logits in (student, _target(teacher, **noise))]
    input, other = logs if direction == "forward" else reversed(logs)
    loss = F.kl_div(input, other, reduction="batchmean", log_target=True) * temperature**2
    return (1 - hard_weight) * loss + hard_weight * F.cross_entropy(student, target) if hard_weight else loss


def factor_loss(student: Tensor, teacher: Tensor, *, p: int = 1, reduction: str = "mean") -> Tensor:
    difference = F.normalize(student.flatten(1)) - F.normalize(teacher.flatten(1))
    return difference.abs().pow(p).mean() if reduction == "mean" else difference.norm(p, 1).mean()


def block_norm(
    weights: Weights, *, groups: str = "in", norm: str = "l1_l2", teachers: Weights, scale_by_size: bool = False
) -> Tensor:
    """Groups of input units or channels alone, unscaled: what the recipes have."""
    assert groups == "in" and not scale_by_size
    total = torch.zeros((), device=weights[0].device)
    for weight, teacher in zip(weights, teachers, strict=True):
        both = [
            each.transpose(0, 1).flatten(1).norm(2 if norm == "l1_l2" else torch.inf, 1) for each in (weight, teacher)
        ]
        size = max(map(len, both))
        mine, its = (F.pad(each, (0, size - len(each))) for each in both)
        total = total + (torch.hypot(mine, its) if norm == "l1_l2" else torch.maximum(mine, its)).sum()
    return total


def variational_kl(theta: Weights, log_sigma2: Weights) -> Tensor:
    total = torch.zeros((), device=theta[0].device)
    for mean, log_variance in zip(theta, log_sigma2, strict=True):
        log_alpha = log_variance - torch.log(mean.square() + 1e-8)
        total = total + (K1 - K1 * torch.sigmoid(K2 + K3 * log_alpha) + 0.5 * F.softplus(-log_alpha)).sum()
    return total


def _sample(mean: Tensor, variance: Tensor) -> Tensor:
    return mean + (variance + 1e-8).sqrt() * torch.randn_like(mean)


def variational_linear(
    input: Tensor, theta: Tensor, log_sigma2: Tensor, bias: Tensor | None = None, **_: object
) -> Tensor:
    return _sample(F.linear(input, theta, bias), F.linear(input.square(), log_sigma2.exp()))


def variational_conv2d(
    input: Tensor,
    theta: Tensor,
    log_sigma2: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    **_: object,
) -> Tensor:
    shape = (stride, padding, dilation, groups)
    return _sample(F.conv2d(input, theta, bias, *shape), F.conv2d(input.square(), log_sigma2.exp(), None, *shape))


PLAIN = [noisy_logits, logit_regression, distillation_loss, factor_loss, block_norm]
PLAIN += [variational_kl, variational_linear, variational_conv2d]
OPS = {getattr(pykd.ops, plain.__name__): plain for plain in PLAIN}


@contextmanager
def in_place_of_pykd() -> Iterator[None]:
    """Puts these functions in the place of pykd's, in every module and class of the package that names one."""
    modules = [module for name, module in sys.modules.items() if name.startswith("pykd.")]
    classes = {each for module in modules for each in vars(module).values() if inspect.isclass(each)}
    with pytest.MonkeyPatch.context() as patch:
        for owner in [*modules, *classes]:
            for name, value in list(vars(owner).items()):
                function = value.__func__ if isinstance(value, staticmethod) else value
                if inspect.isfunction(function) and function in OPS:
                    plain = OPS[function]
                    patch.setattr(owner, name, staticmethod(plain) if function is not value else plain)
        yield
