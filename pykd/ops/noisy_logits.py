"""Logits perturbed by the noise of a noisy teacher."""

import torch
from torch import Generator, Tensor

from pykd import _C
from pykd.ops._noise import ADDITIVE, PER_SAMPLE, explain, reject, traced_seed


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
    r"""The logits :math:`z` of a network with noise: a share :math:`\alpha` of the rows is perturbed.

    .. math:: z'_i = (1 + s_i\, \xi_i) \odot z_i

    with :math:`s_i \sim \mathrm{Bernoulli}(\alpha)` for each row and :math:`\xi_i \sim N(0, \sigma^2)`: the noisy
    teacher of Sau & Balasubramanian (2016, section 3), for losses of your own. The losses of this package draw the same
    noise inside, in the same pass; with one teacher and the same seed they see these logits.

    Args:
        logits: :math:`z`, ``[rows, classes]``, float32, float64, float16 or bfloat16, any strides. -inf, a masked
            class, stays -inf.
        sigma: standard deviation of the noise, relative to a logit (multiplicative) or in logits (additive); 0 is none.
        alpha: share of the rows that are perturbed, in [0, 1]; 0 is none.
        noise_shape: ``"logit"`` draws one value a logit, ``"sample"`` one a row.
        noise_kind: ``"multiplicative"`` as above, ``"additive"`` for :math:`z + s\,\xi`.
        seed: int64 tensor with one value, on the logits' device. The same seed gives the same noise, on CPU and CUDA.
            Without it one is drawn from ``generator``, or from torch's default generator.
        generator: where the seed is drawn from, in eager mode only.
        row_offset: global index of the first row: a slice of a batch draws the noise it has in the whole.
        out: buffer for the result, contiguous, shape and dtype of ``logits``; may be ``logits`` itself. Fresh memory
            costs more than the noise of a small share of rows, so reuse one.

    Returns:
        :math:`z'`, like ``logits`` and in memory of its own; ``out`` where given.

    Raises:
        ValueError: if a shape or an option breaks a rule above.
        TypeError: if a dtype or device does.

    Gradients:
        Of any order in ``logits``, none through ``out``. The operation is affine: its gradient is the incoming one, as
        it is (additive) or times :math:`1 + s\,\xi` with the noise drawn again (multiplicative); a loop without
        autograd gets that from a call on the incoming gradient with the same seed.

    Cost:
        One read and one write of the logits; a perturbed row costs one Philox4x32-10 call and four Box-Muller pairs for
        eight logits. No scratch.

    Determinism:
        Bitwise reproducible under a fixed seed on one device and build, for any number of threads. CPU and CUDA perturb
        the same rows and agree to rounding.

    Example:
        >>> logits = torch.ones(2, 3)
        >>> noisy = noisy_logits(logits, sigma=0.5, alpha=0.8, seed=torch.tensor(7))
        >>> noisy.equal(noisy_logits(logits, sigma=0.5, alpha=0.8, seed=torch.tensor(7)))
        True
        >>> noisy_logits(logits, sigma=0.0)
        tensor([[1., 1., 1.],
                [1., 1., 1.]])
    """
    op = "noisy_logits"
    try:
        per_sample, additive = PER_SAMPLE[noise_shape], ADDITIVE[noise_kind]
    except (KeyError, TypeError):
        reject(op, noise_shape=noise_shape, noise_kind=noise_kind)
    options = (sigma, alpha, per_sample, additive, row_offset)
    if torch.compiler.is_compiling():
        seed = traced_seed(op, logits, sigma, alpha, seed, generator)
        if out is None:
            return torch.ops.pykd.noisy_logits(logits, seed, *options)
        torch.ops.pykd.noisy_logits.out(logits, seed, *options, out)
        return out
    try:
        if out is None:
            return _C.noisy_logits(logits, seed, generator, *options)
        _C.noisy_logits_out(logits, seed, generator, *options, out)
        return out
    except TypeError as error:
        numbers = {"sigma": sigma, "alpha": alpha, "row_offset": row_offset}
        buffer = {} if out is None else {"out": out}
        explain(op, error, logits=logits, seed=seed, generator=generator, **numbers, **buffer)
