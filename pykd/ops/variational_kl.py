"""The divergence term of sparse variational dropout."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pykd import _C
from pykd.ops._noise import explain

Weights = Tensor | Sequence[Tensor]


def _as_list(op: str, argument: str, weights: Weights) -> list[Tensor]:
    tensors = [weights] if isinstance(weights, Tensor) else weights
    if not isinstance(tensors, list | tuple) or not all(isinstance(each, Tensor) for each in tensors):
        raise TypeError(f"{op}: {argument} must be a Tensor or a list of Tensors, got {type(weights).__name__}")
    return list(tensors)


def variational_kl(theta: Weights, log_sigma2: Weights) -> Tensor:
    r"""Divergence of normal weights from the log-uniform prior, summed over all weights of all layers.

    .. math::
        \mathrm{KL} = \sum k_1 - k_1\, s(k_2 + k_3 \log\alpha) + \tfrac{1}{2} \log(1 + \alpha^{-1}), \qquad
        \log\alpha = \log\sigma^2 - \log\theta^2

    with the logistic function :math:`s` and :math:`k_1 = 0.63576`, :math:`k_2 = 1.87320`, :math:`k_3 = 1.48695`: the
    approximation of Molchanov, Ashukha & Vetrov (2017, equation 14), whose constant :math:`k_1` lets it vanish for
    :math:`\alpha \to \infty`. :math:`\log\alpha` is not clipped. Add it to a mean cross-entropy with a weight of at
    most one over the number of training samples.

    Args:
        theta: means of the weights, a tensor of any shape or a list of them, float32, float64, float16 or bfloat16, any
            strides; a list has one dtype and device.
        log_sigma2: logarithms of the variances (natural), in the shapes of ``theta``.

    Returns:
        A scalar, float64 for float64 weights, else float32; 0 for no weights.

    Raises:
        ValueError: if the lists or their shapes differ.
        TypeError: if a dtype or device does.

    Gradients:
        First order in both; a second derivative raises. A weight of ``theta = 0`` has the limits: no divergence and
        no gradient. NaN and infinity go into the value and into the gradient of their own weight.

    Cost:
        One pass over all layers, forward and again backward: 8 bytes read and 8 written a float32 weight, two
        logarithms, two exponentials, three divisions. :func:`variational_kl_and_grad` needs one pass for both.

    Determinism:
        Bitwise reproducible on one device and build, for any number of threads.

    Example:
        >>> theta = torch.tensor([1.0, 0.0], requires_grad=True)
        >>> kl = variational_kl(theta, torch.tensor([0.0, -8.0]))
        >>> kl.detach()
        tensor(0.4312)
        >>> torch.autograd.grad(kl, theta)
        (tensor([0.7183, 0.0000]),)
    """
    thetas = _as_list("variational_kl", "theta", theta)
    log_sigmas = _as_list("variational_kl", "log_sigma2", log_sigma2)
    if not thetas and not log_sigmas:
        return torch.zeros(())
    op = torch.ops.pykd.variational_kl if torch.compiler.is_compiling() else _C.variational_kl
    return op(thetas, log_sigmas)


def variational_kl_and_grad(
    theta: Weights,
    log_sigma2: Weights,
    *,
    scale: float = 1.0,
    out: tuple[Weights, Weights] | None = None,
    accumulate: bool = False,
) -> tuple[Tensor, tuple[Weights, Weights]]:
    r"""The divergence of :func:`variational_kl` and both gradients in one pass, for loops without autograd.

    .. math::
        \frac{\partial\,\mathrm{KL}}{\partial \log\sigma^2} = -k_1 k_3\, s(1 - s) - \tfrac{1}{2} s(-\log\alpha), \qquad
        \frac{\partial\,\mathrm{KL}}{\partial \theta} =
        -\frac{2}{\theta} \frac{\partial\,\mathrm{KL}}{\partial \log\sigma^2}

    where :math:`s = s(k_2 + k_3 \log\alpha)` (Molchanov et al. 2017, equation 14).

    Args:
        theta: as in :func:`variational_kl`.
        log_sigma2: as there.
        scale: factor of the value and of the gradients.
        out: buffers for the gradients of ``theta`` and of ``log_sigma2``, contiguous, in their shapes and dtypes; they
            may be the weights themselves. Fresh memory costs as much as the arithmetic, so reuse them.
        accumulate: add to ``out`` instead of overwriting it: into ``.grad``, after the backward pass of the rest of
            the loss.

    Returns:
        ``scale`` times the divergence, and the gradients of ``theta`` and of ``log_sigma2``, each a tensor or a list
        as its argument is (``out`` where given); none is differentiable.

    Raises:
        ValueError: if the lists or their shapes differ, or a buffer's do.
        TypeError: if a dtype or device does.

    Gradients:
        Not differentiable: it returns them.

    Cost:
        One pass: as much as :func:`variational_kl` forward.

    Determinism:
        As :func:`variational_kl`.

    Example:
        >>> theta, log_sigma2 = torch.tensor([1.0, -1.0]), torch.zeros(2)
        >>> variational_kl_and_grad(theta, log_sigma2, scale=0.5)
        (tensor(0.4312), (tensor([ 0.3591, -0.3591]), tensor([-0.1796, -0.1796])))
    """
    op = "variational_kl_and_grad"
    thetas, log_sigmas = _as_list(op, "theta", theta), _as_list(op, "log_sigma2", log_sigma2)
    if out is None and accumulate:
        raise ValueError(f"{op}: accumulate=True needs buffers, pass them as out=")
    if out is not None and not (isinstance(out, list | tuple) and len(out) == 2):
        raise TypeError(f"{op}: out must be the buffers of theta and those of log_sigma2, got {type(out).__name__}")
    buffers = None if out is None else [_as_list(op, "out", each) for each in out]
    if not thetas and not log_sigmas:
        return torch.zeros(()), out or ([], [])
    given = (thetas, log_sigmas, scale) if buffers is None else (thetas, log_sigmas, scale, accumulate, *buffers)
    if torch.compiler.is_compiling():
        packet = torch.ops.pykd.variational_kl_and_grad
        found = packet(*given) if buffers is None else packet.out(*given)
    else:
        try:
            found = (_C.variational_kl_and_grad if buffers is None else _C.variational_kl_and_grad_out)(*given)
        except TypeError as error:
            explain(op, error, scale=scale, accumulate=accumulate)
    if out is not None:
        return found, out
    kl, *grads = found
    one, other = (
        each[0] if isinstance(weights, Tensor) else each
        for weights, each in zip((theta, log_sigma2), grads, strict=True)
    )
    return kl, (one, other)
