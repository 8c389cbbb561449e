"""Philox4x32-10 (Salmon et al. 2011) and the noise drawn from it, in plain torch: the definition of every random op."""

import torch
from torch import Tensor

_ROW_DRAW = 1 << 31  # counter word 1 of the draws that belong to a whole row, not to a class


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds: four 32-bit counter words and a 64-bit key to four 32-bit words, held in int64 tensors."""
    c0, c1, c2, c3 = counter
    low = 0xFFFFFFFF
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps modulo 2^64, which keeps all 64 bits
        c0, c1, c2, c3 = ((p1 >> 32) & low) ^ c1 ^ k0, p1 & low, ((p0 >> 32) & low) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def normal_pair(word: Tensor) -> tuple[Tensor, Tensor]:
    """One word to two independent N(0, 1) values by Box and Muller, float64.

    20 bits give the radius, 11 an angle in (-pi/2, pi/2), one the half of the plane. All are exact in float32, so that
    float32 kernels differ from this by rounding alone.
    """
    uniform = ((word >> 11) | 1).double() * 2.0**-21
    angle = ((word & 0x7FF).double() * 2 - 2047) * (torch.pi / 2 * 2.0**-11)
    radius = torch.sqrt(-2 * torch.log(uniform)) * (1 - 2 * (word >> 11 & 1))
    return radius * torch.cos(angle), radius * torch.sin(angle)


def _row_words(rows: int, *, seed: Tensor, teacher: int, row_offset: int) -> tuple[Tensor, ...]:
    row = torch.arange(row_offset, row_offset + rows, device=seed.device)
    zero = torch.zeros_like(row)
    return philox((zero, zero + (teacher | _ROW_DRAW), row & 0xFFFFFFFF, row >> 32), seed)


def selected(rows: int, alpha: float, *, seed: Tensor, teacher: int = 0, row_offset: int = 0) -> Tensor:
    """Bernoulli(alpha) for each row, bool ``[rows]``: the row's word is below ``round(alpha * 2**32)``."""
    return _row_words(rows, seed=seed, teacher=teacher, row_offset=row_offset)[0] < round(alpha * 2**32)


def sample_normal(rows: int, *, seed: Tensor, teacher: int = 0, row_offset: int = 0) -> Tensor:
    """One N(0, 1) value a row, float64 ``[rows, 1]``."""
    words = _row_words(rows, seed=seed, teacher=teacher, row_offset=row_offset)
    return normal_pair(words[1])[0].unsqueeze(1)


def logit_normal(rows: int, classes: int, *, seed: Tensor, teacher: int = 0, row_offset: int = 0) -> Tensor:
    """One N(0, 1) value a logit, float64 ``[rows, classes]``: eight classes share a counter."""
    row = torch.arange(row_offset, row_offset + rows, device=seed.device).unsqueeze(1)
    octet = torch.arange((classes + 7) // 8, device=seed.device).unsqueeze(0)
    words = philox((octet + 0 * row, torch.full_like(octet + row, teacher), row & 0xFFFFFFFF, row >> 32), seed)
    normals = [normal for word in words for normal in normal_pair(word)]
    return torch.stack(normals, dim=-1).reshape(rows, -1)[:, :classes]


def mean_noise(
    rows: int,
    classes: int,
    *,
    sigma: float,
    alpha: float,
    noise_shape: str,
    n_teachers: int,
    seed: Tensor,
    row_offset: int,
) -> Tensor:
    """Mean over the teachers of ``s * sigma * xi``, float64 ``[rows, classes]`` or ``[rows, 1]``."""
    total = torch.zeros(rows, 1, dtype=torch.float64, device=seed.device)
    for teacher in range(n_teachers):
        if noise_shape == "sample":
            normal = sample_normal(rows, seed=seed, teacher=teacher, row_offset=row_offset)
        else:
            normal = logit_normal(rows, classes, seed=seed, teacher=teacher, row_offset=row_offset)
        chosen = selected(rows, alpha, seed=seed, teacher=teacher, row_offset=row_offset)
        total = total + chosen.unsqueeze(1) * normal
    return total * (sigma / n_teachers)
