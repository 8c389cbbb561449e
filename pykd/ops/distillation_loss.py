"""Distillation from softened outputs, the teacher's logits clean or perturbed by noise."""

import torch
from torch import Generator, Tensor

from pykd import _C
from pykd.ops._noise import ADDITIVE, PER_SAMPLE, REDUCTION, REVERSE, explain, reject, traced_seed

# The arguments of the eager entries, in their order.
_ENTRY = (
    *("student", "teacher", "target", "seed", "generator"),
    *("reduction", "temperature", "hard_weight", "reverse", "label_smoothing", "ignore_index"),
    *("sigma", "alpha", "per_sample", "additive", "n_teachers", "row_offset"),
)


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 1.0,
    hard_weight: float = 0.0,
    direction: str = "forward",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
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
    r"""Divergence of the student's softened outputs from the (noisy) teacher's, and cross-entropy on hard labels.

    .. math::
        L = (1 - w)\, T^2\, \frac{1}{B} \sum_{i=1}^{B} \mathrm{KL}(p_i \,\|\, q_i)
            + w\, \frac{1}{B'} \sum_{i=1}^{B} \mathrm{CE}(g_i, y_i), \qquad
        p_i = \mathrm{softmax}(z'_i / T), \quad q_i = \mathrm{softmax}(g_i / T)

    with the student's logits :math:`g`, labels :math:`y`, temperature :math:`T`, :math:`w` = ``hard_weight``,
    :math:`B'` rows whose label is not ignored, and the teacher's logits with noise

    .. math:: z'_i = \frac{1}{K} \sum_{k=1}^{K} (1 + s_{ik}\, \xi_{ik}) \odot z_i

    where :math:`s_{ik} \sim \mathrm{Bernoulli}(\alpha)` for each row, :math:`\xi_{ik} \sim N(0, \sigma^2)` and
    :math:`K` = ``n_teachers``. Without noise it is the distillation of Hinton, Vinyals & Dean (2015, section 2); the
    noise is that of Sau & Balasubramanian (2016, section 3), drawn inside the kernel and never stored. CE is
    :func:`torch.nn.functional.cross_entropy`, at temperature 1.

    Args:
        student: logits :math:`g`, ``[rows, classes]``, float32, float64, float16 or bfloat16, any strides.
        teacher: logits :math:`z`, same shape and device; its dtype may differ (float64 only together). Gets no
            gradient. -inf is a masked class, of probability 0 and without noise. Not used where ``hard_weight`` is 1.
        target: labels :math:`y`, int64 ``[rows]``, each a class or ``ignore_index``. Not used where ``hard_weight`` is
            0, and may be None there.
        temperature: :math:`T`, finite and above 0. The rounding of the divergence is multiplied by its square: in
            float32 little is left of the loss from about 1000 on, as of torch's.
        hard_weight: :math:`w`, the share of the cross-entropy, in [0, 1].
        direction: ``"forward"`` as above, ``"reverse"`` for :math:`\mathrm{KL}(q_i \,\|\, p_i)`.
        label_smoothing: share of the label's probability that goes to all classes alike, in [0, 1].
        ignore_index: a row with this label has no cross-entropy; its divergence counts.
        n_teachers: :math:`K`, independent draws whose logits are averaged.
        reduction: ``"batchmean"`` divides as above (0 for no rows; where all labels are ignored their part is 0, not
            torch's NaN), ``"sum"`` does not, ``"none"`` returns a row's loss each.
        sigma: standard deviation of the noise, relative to a logit (multiplicative) or in logits (additive); 0 is none.
        alpha: share of the rows that are perturbed, in [0, 1]; 0 is none.
        noise_shape: ``"logit"`` draws one value a logit, ``"sample"`` one a row.
        noise_kind: ``"multiplicative"`` as above, ``"additive"`` for :math:`z + s\,\xi`; of one value a row it
            changes nothing, as a softmax does not see a shift.
        seed: int64 tensor with one value, on the logits' device. The same seed gives the same noise, on CPU and CUDA.
            Without it one is drawn from ``generator``, or from torch's default generator.
        generator: where the seed is drawn from, in eager mode only.
        row_offset: global index of the first row: a slice of a batch draws the noise it has in the whole.

    Returns:
        A scalar, or ``[rows]`` for ``reduction="none"``; float64 for float64 logits, else float32. +inf where the
        divergence is: at a class of mass that the student (forward) or the teacher (reverse) gives none, by -inf. NaN
        for a row with a logit of NaN or +inf, or with none but -inf.

    Raises:
        ValueError: if a shape or an option breaks a rule above, or on the CPU a label does. On CUDA, where a look at
            the labels would wait for the device, the loss and the gradient of that row are NaN.
        TypeError: if a dtype or device does.

    Gradients:
        First order in ``student`` only; a second derivative raises. Backward draws the same noise again. Finite where
        the loss is, but for NaN in a row that is ignored.

    Cost:
        Each logit is read once forward and once backward, with an exponential for each of teacher and student, and
        another for the hard labels at a temperature other than 1. A perturbed row costs one Philox4x32-10 call and four
        Box-Muller pairs for eight logits, an unperturbed one nothing more than the clean loss. Scratch on the
        CPU: three values a class and thread above 1024 classes.

    Determinism:
        Bitwise reproducible under a fixed seed on one device and build, for any number of threads. CPU and CUDA perturb
        the same rows and agree to rounding.

    Example:
        >>> student, teacher = torch.zeros(2, 2), torch.tensor([[0.0, 0.0], [0.0, -torch.inf]])
        >>> distillation_loss(student, teacher, reduction="none")
        tensor([0.0000, 0.6931])
        >>> labels = torch.tensor([1, -100])
        >>> distillation_loss(student, teacher, labels, temperature=4.0, hard_weight=0.1, reduction="none")
        tensor([0.0693, 9.9813])
        >>> noisy = distillation_loss(student, teacher, sigma=0.5, noise_kind="additive", seed=torch.tensor(7))
        >>> noisy.equal(distillation_loss(student, teacher, sigma=0.5, noise_kind="additive", seed=torch.tensor(7)))
        True
    """
    op = "distillation_loss"
    try:
        how, reverse = REDUCTION[reduction], REVERSE[direction]
        per_sample, additive = PER_SAMPLE[noise_shape], ADDITIVE[noise_kind]
    except (KeyError, TypeError):
        reject(op, reduction=reduction, direction=direction, noise_shape=noise_shape, noise_kind=noise_kind)
    loss = (how, temperature, hard_weight, reverse, label_smoothing, ignore_index)
    noise = (sigma, alpha, per_sample, additive, n_teachers, row_offset)
    if torch.compiler.is_compiling():
        seed = traced_seed(op, student, sigma, alpha, seed, generator)
        return torch.ops.pykd.distillation_loss(student, teacher, target, seed, *loss, *noise)
    eager = (student, teacher, target, seed, generator, *loss, *noise)
    try:
        return _C.distillation_loss(*eager)
    except TypeError as error:
        explain(op, error, **dict(zip(_ENTRY, eager, strict=True)))


def distillation_loss_and_grad(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 1.0,
    hard_weight: float = 0.0,
    direction: str = "forward",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
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
    r"""The loss of :func:`distillation_loss` and its gradient in one pass, for loops without autograd.

    .. math:: \nabla_{g_i} L = (1 - w)\, \frac{T}{B} (q_i - p_i) + w\, \frac{1}{B'} (\mathrm{softmax}(g_i) - y_i)

    for the forward direction, with :math:`y_i` the label as (smoothed) probabilities; the first part is
    :math:`(1 - w)\, \frac{T}{B}\, q_i \odot (\log q_i - \log p_i - \mathrm{KL}(q_i \,\|\, p_i))` for the reverse.

    Args:
        student: as in :func:`distillation_loss`, and so are all arguments but the last two.
        teacher: as there.
        target: as there.
        temperature: as there.
        hard_weight: as there.
        direction: as there.
        label_smoothing: as there.
        ignore_index: as there.
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
        As :func:`distillation_loss`.

    Example:
        >>> student, teacher = torch.zeros(1, 2), torch.tensor([[0.0, -torch.inf]])
        >>> distillation_loss_and_grad(student, teacher)
        (tensor(0.6931), tensor([[-0.5000,  0.5000]]))
    """
    op = "distillation_loss_and_grad"
    if accumulate and out is None:
        raise ValueError(f"{op}: accumulate=True needs a buffer, pass it as out=")
    try:
        how, reverse = REDUCTION[reduction], REVERSE[direction]
        per_sample, additive = PER_SAMPLE[noise_shape], ADDITIVE[noise_kind]
    except (KeyError, TypeError):
        reject(op, reduction=reduction, direction=direction, noise_shape=noise_shape, noise_kind=noise_kind)
    loss = (how, temperature, hard_weight, reverse, label_smoothing, ignore_index)
    noise = (sigma, alpha, per_sample, additive, n_teachers, row_offset)
    if torch.compiler.is_compiling():
        seed = traced_seed(op, student, sigma, alpha, seed, generator)
        traced = (student, teacher, target, seed, *loss, *noise)
        if out is None:
            return torch.ops.pykd.distillation_loss_and_grad(*traced)
        return torch.ops.pykd.distillation_loss_and_grad.out(*traced, accumulate, out), out
    eager = (student, teacher, target, seed, generator, *loss, *noise)
    try:
        if out is None:
            return _C.distillation_loss_and_grad(*eager)
        return _C.distillation_loss_and_grad_out(*eager, accumulate, out), out
    except TypeError as error:
        buffer = {} if out is None else {"out": out, "accumulate": accumulate}
        explain(op, error, **dict(zip(_ENTRY, eager, strict=True)), **buffer)
