"""Regression of the student's logits on the teacher's, clean or perturbed by noise."""

import torch
from torch import Generator, Tensor

from pykd import _C
from pykd.ops._noise import ADDITIVE, PER_SAMPLE, REDUCTION, explain, reject, traced_seed


def logit_regression(
    student: Tensor,
    teacher: Tensor,
    *,
    n_teachers: int = 1,
    reduction: str = "batchmean",
    sigma: float = 0.0,
    alpha: float = 1.0,
    noise_shape: str = "logit",
    noise_kind: str = "multiplicative",
    seed: Tensor | None = None,
    generator: Generator | None = None,
    row_offset: int = 0,
) -> Tensor:
    r"""Half the squared distance of the student's logits :math:`g` to (noisy) teacher logits :math:`z'`.

    .. math::
        L = \frac{1}{2B} \sum_{i=1}^{B} \lVert g_i - z'_i \rVert_2^2, \qquad
        z'_i = \frac{1}{K} \sum_{k=1}^{K} (1 + s_{ik}\, \xi_{ik}) \odot z_i

    with :math:`s_{ik} \sim \mathrm{Bernoulli}(\alpha)` for each row, :math:`\xi_{ik} \sim N(0, \sigma^2)`, and
    :math:`K` = ``n_teachers``. Without noise it is the logit regression of Ba & Caruana (2014, section 3.2), with noise
    the noisy teacher of Sau & Balasubramanian (2016, section 3). Noise is drawn inside the kernel and never stored.

    Args:
        student: logits :math:`g`, ``[rows, classes]``, float32, float64, float16 or bfloat16, any strides.
        teacher: logits :math:`z`, same shape and device; its dtype may differ (float64 only together). Gets no
            gradient.
        n_teachers: :math:`K`, independent draws whose targets are averaged.
        reduction: ``"batchmean"`` divides the sum by the rows (0 for no rows), ``"sum"`` does not, ``"none"`` returns
            a row's loss each.
        sigma: standard deviation of the noise, relative to a logit (multiplicative) or in logits (additive); 0 is none.
        alpha: share of the rows that are perturbed, in [0, 1]; 0 is none.
        noise_shape: ``"logit"`` draws one value a logit, ``"sample"`` one a row.
        noise_kind: ``"multiplicative"`` as above, ``"additive"`` for :math:`z + s\,\xi`.
        seed: int64 tensor with one value, on the logits' device. The same seed gives the same noise, on CPU and CUDA.
            Without it one is drawn from ``generator``, or from torch's default generator.
        generator: where the seed is drawn from, in eager mode only.
        row_offset: global index of the first row: a slice of a batch draws the noise it has in the whole.

    Returns:
        A scalar, or ``[rows]`` for ``reduction="none"``; float64 for float64 logits, else float32.

    Raises:
        ValueError: if a shape or an option breaks a rule above.
        TypeError: if a dtype or device does.

    Gradients:
        First order in ``student`` only; a second derivative raises. Backward draws the same noise again.

    Cost:
        Each logit is read once forward and once backward; a perturbed row costs one Philox4x32-10 call and four
        Box-Muller pairs for eight logits, an unperturbed one nothing more than clean regression. No scratch but
        a value a row.

    Determinism:
        Bitwise reproducible under a fixed seed on one device and build, for any number of threads. CPU and CUDA perturb
        the same rows and agree to rounding.

    Example:
        >>> student, teacher = torch.zeros(2, 3), torch.ones(2, 3)
        >>> logit_regression(student, teacher)
        tensor(1.5000)
        >>> noisy = logit_regression(student, teacher, sigma=0.5, alpha=0.8, seed=torch.tensor(7))
        >>> noisy.equal(logit_regression(student, teacher, sigma=0.5, alpha=0.8, seed=torch.tensor(7)))
        True
    """
    op = "logit_regression"
    try:
        how, per_sample, additive = REDUCTION[reduction], PER_SAMPLE[noise_shape], ADDITIVE[noise_kind]
    except (KeyError, TypeError):
        reject(op, reduction=reduction, noise_shape=noise_shape, noise_kind=noise_kind)
    options = (how, sigma, alpha, per_sample, additive, n_teachers, row_offset)
    if torch.compiler.is_compiling():
        seed = traced_seed(op, student, sigma, alpha, seed, generator)
        return torch.ops.pykd.logit_regression(student, teacher, seed, *options)
    try:
        return _C.logit_regression(student, teacher, seed, generator, *options)
    except TypeError as error:
        numbers = {"sigma": sigma, "alpha": alpha, "n_teachers": n_teachers, "row_offset": row_offset}
        explain(op, error, student=student, teacher=teacher, seed=seed, generator=generator, **numbers)


def logit_regression_and_grad(
    student: Tensor,
    teacher: Tensor,
    *,
    n_teachers: int = 1,
    reduction: str = "batchmean",
    sigma: float = 0.0,
    alpha: float = 1.0,
    noise_shape: str = "logit",
    noise_kind: str = "multiplicative",
    seed: Tensor | None = None,
    generator: Generator | None = None,
    row_offset: int = 0,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""The loss of :func:`logit_regression` and its gradient in one pass, for loops without autograd.

    .. math:: \nabla_g L = \frac{1}{B} (g - z')

    Args:
        student: as in :func:`logit_regression`, and so are all arguments but the last two.
        teacher: as there.
        n_teachers: as there.
        reduction: as there; ``"none"`` gives a row's loss each and the gradient of their sum.
        sigma: as there.
        alpha: as there.
        noise_shape: as there.
        noise_kind: as there.
        seed: as there.
        generator: as there.
        row_offset: as there.
        out: buffer for the gradient, contiguous, shape and dtype of ``student``; may be ``student`` itself.
            Fresh memory costs more than the arithmetic, so reuse one.
        accumulate: add to ``out`` instead of overwriting it.

    Returns:
        The loss, and the gradient with respect to ``student`` (``out`` where given); neither is differentiable.

    Raises:
        ValueError: if a shape or an option breaks a rule.
        TypeError: if a dtype or device does.

    Gradients:
        Not differentiable: it returns the gradient.

    Cost:
        One read of both logits and one write of the gradient.

    Determinism:
        As :func:`logit_regression`.

    Example:
        >>> student, teacher = torch.zeros(2, 3), torch.ones(2, 3)
        >>> logit_regression_and_grad(student, teacher)
        (tensor(1.5000), tensor([[-0.5000, -0.5000, -0.5000],
                [-0.5000, -0.5000, -0.5000]]))
    """
    op = "logit_regression_and_grad"
    if accumulate and out is None:
        raise ValueError(f"{op}: accumulate=True needs a buffer, pass it as out=")
    try:
        how, per_sample, additive = REDUCTION[reduction], PER_SAMPLE[noise_shape], ADDITIVE[noise_kind]
    except (KeyError, TypeError):
        reject(op, reduction=reduction, noise_shape=noise_shape, noise_kind=noise_kind)
    options = (how, sigma, alpha, per_sample, additive, n_teachers, row_offset)
    if torch.compiler.is_compiling():
        seed = traced_seed(op, student, sigma, alpha, seed, generator)
        if out is None:
            return torch.ops.pykd.logit_regression_and_grad(student, teacher, seed, *options)
        return torch.ops.pykd.logit_regression_and_grad.out(student, teacher, seed, *options, accumulate, out), out
    try:
        if out is None:
            return _C.logit_regression_and_grad(student, teacher, seed, generator, *options)
        return _C.logit_regression_and_grad_out(student, teacher, seed, generator, *options, accumulate, out), out
    except TypeError as error:
        numbers = {"sigma": sigma, "alpha": alpha, "n_teachers": n_teachers, "row_offset": row_offset}
        buffer = {} if out is None else {"out": out, "accumulate": accumulate}
        explain(op, error, student=student, teacher=teacher, seed=seed, generator=generator, **numbers, **buffer)
