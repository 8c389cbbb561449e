"""noisy_logits in plain PyTorch: the definition the kernels are judged against."""

import torch
from torch import Generator, Tensor

from pykd.reference.philox import mean_noise


def perturbed(
    logits: Tensor,
    *,
    sigma: float,
    alpha: float,
    noise_shape: str,
    noise_kind: str,
    n_teachers: int,
    seed: Tensor | None,
    generator: Generator | None,
    row_offset: int,
) -> Tensor:
    """The mean of ``n_teachers`` noisy copies of the logits; without noise the logits. A logit of -inf stays -inf."""
    if sigma == 0 or alpha == 0:
        return logits
    if seed is None:
        seed = torch.randint(2**63 - 1, (), generator=generator, device=logits.device)
    noise = mean_noise(
        *logits.shape,
        sigma=sigma,
        alpha=alpha,
        noise_shape=noise_shape,
        n_teachers=n_teachers,
        seed=seed,
        row_offset=row_offset,
    )
    if noise_kind == "multiplicative":
        noise = torch.where(logits == -torch.inf, 0.0, logits * noise)
    return logits + noise


def noisy_logits(
    logits: Tensor,
    *,
    sigma: float,
    alpha: float = 1.0,
    noise_shape: str = "logit",
    noise_kind: str = "multiplicative",
    seed: Tensor | None = None,
    generator: Generator | None = None,
    row_offset: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    noisy = perturbed(
        logits,
        sigma=sigma,
        alpha=alpha,
        noise_shape=noise_shape,
        noise_kind=noise_kind,
        n_teachers=1,
        seed=seed,
        generator=generator,
        row_offset=row_offset,
    )
    return noisy.to(logits.dtype, copy=True) if out is None else out.copy_(noisy)
