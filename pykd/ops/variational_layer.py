"""Layers whose weights are normal variables, by local reparameterisation."""

import torch
from torch import Generator, Tensor

from pykd import _C
from pykd.ops._noise import explain, traced_seed


def variational_linear(
    input: Tensor,
    theta: Tensor,
    log_sigma2: Tensor,
    bias: Tensor | None = None,
    *,
    seed: Tensor | None = None,
    generator: Generator | None = None,
    row_offset: int = 0,
) -> Tensor:
    r"""A linear layer with weights :math:`w \sim N(\theta, \sigma^2)`, drawn anew for each sample.

    .. math::
        y = x\theta^\top + b + \sqrt{x^2 (\sigma^2)^\top + 10^{-8}} \odot \varepsilon, \qquad \varepsilon \sim N(0, 1)

    Not the weights are drawn but the outputs, which have the same distribution and a gradient of far lower variance:
    the local reparameterisation of Kingma, Salimans & Welling (2015, section 2.3), in the additive form of Molchanov,
    Ashukha & Vetrov (2017). :math:`\varepsilon` is the noise of the logits of a row (docs/noise.md): drawn inside the
    kernel, again in the backward pass, and never stored. For evaluation take the means: a plain layer.

    Args:
        input: :math:`x`, ``[..., in]``, float32, float64, float16 or bfloat16, any strides; all but the last dimension
            are rows. Its squares must not overflow.
        theta: :math:`\theta`, ``[out, in]``, on the input's device; float64 with float64 inputs only. Half inputs may
            have float32 weights.
        log_sigma2: :math:`\log\sigma^2`, shape and dtype of ``theta``.
        bias: :math:`b`, ``[out]``, in the dtype of ``theta``; it has no noise.
        seed: int64 tensor with one value, on the input's device. The same seed gives the same noise, on CPU and CUDA.
            Without it one is drawn from ``generator``, or from torch's default generator. Layers of one network need
            different seeds.
        generator: where the seed is drawn from, in eager mode only.
        row_offset: global index of the first row: a slice of a batch draws the noise it has in the whole.

    Returns:
        ``[..., out]`` in the input's dtype.

    Raises:
        ValueError: if a shape or an option breaks a rule above.
        TypeError: if a dtype or device does.

    Gradients:
        First order in ``input``, ``theta``, ``log_sigma2`` and ``bias``, only those that are asked for; a second
        derivative raises.

    Cost:
        Six matrix products forward and backward, where a plain layer has three; an exponential a weight, and a square
        root, half a Box-Muller pair and an eighth of a Philox4x32-10 call a value. Kept for the backward pass:
        :math:`\sigma^2` and the deviations. Half inputs have the products of the variances in float32.

    Determinism:
        Bitwise reproducible under a fixed seed where the library's matrix products are. CPU and CUDA draw the same
        noise and agree to rounding.

    Example:
        >>> x, theta = torch.ones(2, 3), torch.ones(4, 3)
        >>> still = variational_linear(x, theta, torch.full((4, 3), -torch.inf), seed=torch.tensor(7))
        >>> torch.allclose(still, torch.full((2, 4), 3.0), atol=1e-3)
        True
        >>> variational_linear(x, theta, torch.zeros(4, 3)).shape
        torch.Size([2, 4])
    """
    op = "variational_linear"
    if torch.compiler.is_compiling():
        seed = traced_seed(op, input, 1.0, 1.0, seed, generator)
        return torch.ops.pykd.variational_linear(input, theta, log_sigma2, bias, seed, row_offset)[0]
    try:
        return _C.variational_linear(input, theta, log_sigma2, bias, seed, generator, row_offset)
    except TypeError as error:
        explain(
            op, error, input=input, theta=theta, log_sigma2=log_sigma2, bias=bias, seed=seed, generator=generator,
            row_offset=row_offset,
        )  # fmt: skip


def variational_conv2d(
    input: Tensor,
    theta: Tensor,
    log_sigma2: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    seed: Tensor | None = None,
    generator: Generator | None = None,
    row_offset: int = 0,
) -> Tensor:
    r"""A convolution with weights :math:`w \sim N(\theta, \sigma^2)`: :func:`variational_linear` over images.

    .. math::
        y = x * \theta + b + \sqrt{x^2 * \sigma^2 + 10^{-8}} \odot \varepsilon, \qquad \varepsilon \sim N(0, 1)

    One :math:`\varepsilon` an output value, as Molchanov et al. (2017) do after Kingma et al. (2015, section 2.3);
    the noise of a sample is that of a row, its values in the order ``[out, height, width]``.

    Args:
        input: ``[rows, in, height, width]``, dtypes as in :func:`variational_linear`, any strides.
        theta: ``[out, in / groups, kernel height, kernel width]``.
        log_sigma2: as there.
        bias: as there; in the mean alone.
        stride: one step or two (vertical, horizontal), >= 1.
        padding: zeros on each side, one number or two, >= 0.
        dilation: distance of the kernel's values, one or two, >= 1.
        groups: parts of the channels that are convolved apart; divides ``in`` and ``out``.
        seed: as there.
        generator: as there.
        row_offset: as there; a row is a sample.

    Returns:
        ``[rows, out, height, width]`` in the input's dtype, contiguous.

    Raises:
        ValueError: if a shape or an option breaks a rule above.
        TypeError: if a dtype or device does.

    Gradients:
        As there.

    Cost:
        Six convolutions forward and backward, where a plain layer has three; the rest as there.

    Determinism:
        As there, with the library's convolutions.

    Example:
        >>> x, theta = torch.ones(2, 3, 8, 8), torch.zeros(4, 3, 3, 3)
        >>> variational_conv2d(x, theta, theta - 8, stride=2, padding=1).shape
        torch.Size([2, 4, 4, 4])
    """
    op = "variational_conv2d"
    shape = (_pair(op, "stride", stride), _pair(op, "padding", padding), _pair(op, "dilation", dilation), groups)
    if torch.compiler.is_compiling():
        seed = traced_seed(op, input, 1.0, 1.0, seed, generator)
        return torch.ops.pykd.variational_conv2d(input, theta, log_sigma2, bias, *shape, seed, row_offset)[0]
    try:
        return _C.variational_conv2d(input, theta, log_sigma2, bias, *shape, seed, generator, row_offset)
    except TypeError as error:
        explain(
            op, error, input=input, theta=theta, log_sigma2=log_sigma2, bias=bias, groups=groups, seed=seed,
            generator=generator, row_offset=row_offset,
        )  # fmt: skip


def _pair(op: str, argument: str, value: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    if isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(each, int) for each in value):
        return value[0], value[1]
    raise TypeError(f"{op}: {argument} must be one or two integers, got {value!r}")
