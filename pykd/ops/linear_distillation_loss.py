"""Distillation through the last linear layers of student and teacher, whose logits are never whole in memory."""

import torch
from torch import Generator, Tensor

from pykd import _C
from pykd.ops._noise import ADDITIVE, PER_SAMPLE, REDUCTION, REVERSE, explain, reject, traced_seed

# The arguments of the eager entries, in their order.
_ENTRY = (
    *("student_hidden", "student_weight", "teacher_hidden", "teacher_weight", "target", "seed", "generator"),
    *("reduction", "temperature", "hard_weight", "reverse", "label_smoothing", "ignore_index"),
    *("sigma", "alpha", "per_sample", "additive", "n_teachers", "row_offset"),
)


def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
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
    r"""Loss of :func:`distillation_loss` on the outputs of two linear layers, without their logits in memory.

    .. math:: L = \mathrm{distillation\_loss}(h_s W_s^\top,\ h_t W_t^\top,\ y)

    with the hidden states :math:`h_s, h_t` of student and teacher and the weights :math:`W_s, W_t` of their last
    layers. The rows go in chunks: the logits of one chunk are multiplied out, their gradient is written over the
    student's, and multiplied on into the gradients of :math:`h_s` and :math:`W_s` before the next chunk takes their
    place.

    Args:
        student_hidden: :math:`h_s`, ``[rows, features]``, float32, float64, float16 or bfloat16, any strides.
        student_weight: :math:`W_s`, ``[classes, features]``, in its dtype.
        teacher_hidden: :math:`h_t`, ``[rows, features of the teacher]``; its dtype may differ from the student's
            (float64 only together). Gets no gradient. Not used where ``hard_weight`` is 1.
        teacher_weight: :math:`W_t`, ``[classes, features of the teacher]``, in the dtype of ``teacher_hidden``. Gets no
            gradient.
        target: labels :math:`y`, int64 ``[rows]``, as in :func:`distillation_loss`, and so are all that follow.
        temperature: as there.
        hard_weight: as there.
        direction: as there.
        label_smoothing: as there.
        ignore_index: as there.
        n_teachers: as there.
        reduction: as there; the means are those of the whole batch.
        sigma: as there.
        alpha: as there.
        noise_shape: as there.
        noise_kind: as there.
        seed: as there; the noise is that of the whole batch's logits.
        generator: as there.
        row_offset: as there.

    Returns:
        A scalar, or ``[rows]`` for ``reduction="none"``; float64 for float64 tensors, else float32. Logits are of the
        dtype that the products have: the hidden states', or autocast's, to which all four tensors go under autocast.

    Raises:
        ValueError: if a shape or an option breaks a rule above, or on the CPU a label does. On CUDA, where a look at
            the labels would wait for the device, the loss of that row is NaN, and what is summed over it.
        TypeError: if a dtype or device does.

    Gradients:
        First order in ``student_hidden`` and ``student_weight``, only those that are asked for; a second derivative
        raises. Of a scalar loss they are made beside it, and the first backward pass multiplies them, in place, by what
        arrives from above, which bfloat16 rounds once more; another one through the same graph computes them anew. For
        ``reduction="none"``, and of float16, whose small values need the loss's scale from the start, they are made in
        the backward pass.

    Cost:
        Four matrix products of ``2 * rows * classes * features`` operations (the teacher's with its own features), as
        forward and backward of the layers have; three or two where fewer gradients are asked for, two without any, one
        less where ``hard_weight`` is 1. Gradients in the backward pass need both logits, so their products, once more.
        Between the products :func:`distillation_loss`. Memory beside the gradients: the logits of a chunk, the
        student's and the teacher's, and a loss a row. A chunk is an eighth of the rows, but 256 at least, or as many as
        have 256 MiB of logits, if those are fewer. The weight's gradient is read and written once a chunk.

    Determinism:
        Bitwise reproducible under a fixed seed where the library's matrix products are. The weight's gradient is added
        up in its own dtype, rounded once a chunk; beyond eight chunks that of a 16-bit weight in float32, for which
        there is then a buffer of its size.

    Example:
        >>> student, teacher = torch.ones(2, 3), torch.ones(2, 5)
        >>> of_student, of_teacher = torch.zeros(4, 3, requires_grad=True), torch.zeros(4, 5)
        >>> labels = torch.tensor([1, -100])
        >>> loss = linear_distillation_loss(student, of_student, teacher, of_teacher, labels, hard_weight=1.0)
        >>> loss
        tensor(1.3863, grad_fn=...)
        >>> loss.backward()
        >>> of_student.grad[:, 0]
        tensor([ 0.2500, -0.7500,  0.2500,  0.2500])
    """
    op = "linear_distillation_loss"
    try:
        how, reverse = REDUCTION[reduction], REVERSE[direction]
        per_sample, additive = PER_SAMPLE[noise_shape], ADDITIVE[noise_kind]
    except (KeyError, TypeError):
        reject(op, reduction=reduction, direction=direction, noise_shape=noise_shape, noise_kind=noise_kind)
    tensors = (student_hidden, student_weight, teacher_hidden, teacher_weight, target)
    loss = (how, temperature, hard_weight, reverse, label_smoothing, ignore_index)
    noise = (sigma, alpha, per_sample, additive, n_teachers, row_offset)
    if torch.compiler.is_compiling():
        seed = traced_seed(op, student_hidden, sigma, alpha, seed, generator)
        return torch.ops.pykd.linear_distillation_loss(*tensors, seed, *loss, *noise)
    eager = (*tensors, seed, generator, *loss, *noise)
    try:
        return _C.linear_distillation_loss(*eager)
    except TypeError as error:
        explain(op, error, **dict(zip(_ENTRY, eager, strict=True)))


def linear_distillation_loss_and_grad(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The loss of :func:`linear_distillation_loss` and its gradients in one pass, for loops without autograd.

    .. math:: \nabla_{h_s} L = G W_s, \qquad \nabla_{W_s} L = G^\top h_s

    with the gradient :math:`G` of :func:`distillation_loss_and_grad` in the student's logits.

    Args:
        student_hidden: as in :func:`linear_distillation_loss`, and so are all arguments.
        student_weight: as there.
        teacher_hidden: as there.
        teacher_weight: as there.
        target: as there.
        temperature: as there.
        hard_weight: as there.
        direction: as there.
        label_smoothing: as there.
        ignore_index: as there.
        n_teachers: as there.
        reduction: as there; ``"none"`` gives a row's loss each and the gradients of their sum.
        sigma: as there.
        alpha: as there.
        noise_shape: as there.
        noise_kind: as there.
        seed: as there.
        generator: as there.
        row_offset: as there.

    Returns:
        The loss, and the gradients with respect to ``student_hidden`` and ``student_weight``, in their dtypes; none is
        differentiable.

    Raises:
        ValueError: if a shape or an option breaks a rule.
        TypeError: if a dtype or device does.

    Gradients:
        Not differentiable: it returns the gradients. float16 has no values below 6e-8, as which a mean's gradient over
        many rows ends easily: take ``reduction="sum"`` and divide later.

    Cost:
        Four matrix products, each logit's :func:`distillation_loss_and_grad` between them; memory as there.

    Determinism:
        As :func:`linear_distillation_loss`.

    Example:
        >>> student, teacher = torch.ones(1, 1), torch.ones(1, 1)
        >>> of_student, of_teacher = torch.zeros(2, 1), torch.tensor([[0.0], [-torch.inf]])
        >>> linear_distillation_loss_and_grad(student, of_student, teacher, of_teacher)
        (tensor(0.6931), tensor([[0.]]), tensor([[-0.5000],
                [ 0.5000]]))
    """
    op = "linear_distillation_loss_and_grad"
    try:
        how, reverse = REDUCTION[reduction], REVERSE[direction]
        per_sample, additive = PER_SAMPLE[noise_shape], ADDITIVE[noise_kind]
    except (KeyError, TypeError):
        reject(op, reduction=reduction, direction=direction, noise_shape=noise_shape, noise_kind=noise_kind)
    tensors = (student_hidden, student_weight, teacher_hidden, teacher_weight, target)
    loss = (how, temperature, hard_weight, reverse, label_smoothing, ignore_index)
    noise = (sigma, alpha, per_sample, additive, n_teachers, row_offset)
    if torch.compiler.is_compiling():
        seed = traced_seed(op, student_hidden, sigma, alpha, seed, generator)
        return torch.ops.pykd.linear_distillation_loss_and_grad(*tensors, seed, *loss, *noise)
    eager = (*tensors, seed, generator, *loss, *noise)
    try:
        return _C.linear_distillation_loss_and_grad(*eager)
    except TypeError as error:
        explain(op, error, **dict(zip(_ENTRY, eager, strict=True)))
