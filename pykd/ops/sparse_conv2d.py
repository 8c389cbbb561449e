"""A convolution whose weight is sparse, for inference."""

from typing import Literal

import torch
from torch import Tensor

from pykd import _C
from pykd.ops._sparse import explain, relu_of, tiles_of
from pykd.sparse import SparseWeight


def sparse_conv2d(
    input: Tensor,
    weight: SparseWeight,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    activation: Literal["relu"] | None = None,
) -> Tensor:
    r"""A convolution whose weight is sparse, with its bias and ReLU, for inference, without im2col.

    .. math::
        y_{bovu} = f\Big(b_o + \sum_{c,i,j:\, (o, c, i, j)\ \mathrm{stored}} w_{ocij}\,
        x_{b,\, c,\, v s + i d - p,\, u s + j d - p}\Big)

    with stride :math:`s`, dilation :math:`d` and padding :math:`p` of each direction. Zeros are left out as in
    :func:`sparse_linear`.

    Args:
        input: :math:`x`, ``[rows, in, height, width]``, float32, float16 or bfloat16, any strides.
        weight: :math:`w`, ``[out, in / groups, kernel height, kernel width]``; packed and kept as in
            :func:`sparse_linear`, for each number of groups.
        bias: :math:`b`, ``[out]``, floating-point, on the input's device.
        stride: one step or two (vertical, horizontal), >= 1.
        padding: zeros on each side, one number or two, >= 0.
        dilation: distance of the kernel's values, one or two, >= 1.
        groups: parts of the channels that are convolved apart; divides ``in`` and ``out``.
        activation: :math:`f`, "relu" or None.

    Returns:
        ``[rows, out, height, width]`` in the input's dtype, contiguous.

    Raises:
        ValueError: if a shape or an option breaks a rule above.
        TypeError: if a dtype or device does.
        RuntimeError: if input or bias wants a gradient in grad mode.

    Gradients:
        None: call it under ``torch.no_grad()`` or ``torch.inference_mode()``.

    Cost:
        A multiplication for each stored value and pixel of the output, in float32, and a copy of the input with its
        padding; a pass more over the output of half types and, for many images with outputs of up to 16 columns, of
        all. Weights of several groups are read as unstructured where a block holds rows of two groups. On a CUDA device
        tensor cores multiply half types under the rules of :func:`sparse_linear` for blocks of 9 rows and more.

    Determinism:
        Bitwise reproducible on one device and build, for any number of threads.

    Example:
        >>> weight = SparseWeight(torch.eye(9).view(9, 1, 3, 3)[:2])  # the first two places of the kernel
        >>> sparse_conv2d(torch.arange(9.0).view(1, 1, 3, 3), weight, padding=1)[0, :, 1]
        tensor([[0., 0., 1.],
                [0., 1., 2.]])
    """
    op = "sparse_conv2d"
    relu, tiles = relu_of(op, activation), tiles_of(op, input, weight, 4, groups)
    kernel = weight.shape[2:]
    shape = (_pair(op, "stride", stride), _pair(op, "padding", padding), _pair(op, "dilation", dilation))
    if torch.compiler.is_compiling():
        return torch.ops.pykd.sparse_conv2d(input, tiles.packed, tiles.head, bias, kernel, *shape, relu)
    try:
        return _C.sparse_conv2d(input, tiles.packed, tiles.host, bias, kernel, *shape, relu)
    except TypeError as error:
        explain(op, error, bias)


def _pair(op: str, argument: str, value: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(value, int):
        value = (value, value)
    elif not (isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(each, int) for each in value)):
        raise TypeError(f"{op}: {argument} must be one or two integers, got {value!r}")
    first, second = value
    if max(abs(first), abs(second)) >= 1 << 63:
        raise ValueError(f"{op}: {argument} must be one or two integers < 2^31, got {value!r}")
    return first, second
