"""A linear layer whose weight is sparse, for inference."""

from typing import Literal

import torch
from torch import Tensor

from pykd import _C
from pykd.ops._sparse import explain, relu_of, tiles_of
from pykd.sparse import SparseWeight


def sparse_linear(
    input: Tensor, weight: SparseWeight, bias: Tensor | None = None, *, activation: Literal["relu"] | None = None
) -> Tensor:
    r"""A linear layer whose weight is sparse, with its bias and ReLU, for inference.

    .. math::
        y_{bo} = f\Big(b_o + \sum_{i:\, (o, i)\ \mathrm{stored}} w_{oi}\, x_{bi}\Big)

    The sum runs over the stored entries. Zeros within a stored block, and in an unstructured weight those that fill a
    row up to the length of another, may be read or left out: where they meet infinity or NaN in :math:`x_{bi}` the
    output may be NaN. No other zero is read.

    Args:
        input: :math:`x`, ``[..., in]``, float32, float16 or bfloat16, any strides. Autocast leaves it as it is.
        weight: :math:`w`, ``[out, in]``. It is packed for the kernel at its first call on a device, and that is kept in
            ``weight.tiles``: its arrays must not change after that. Values count in float32.
        bias: :math:`b`, ``[out]``, floating-point, on the input's device.
        activation: :math:`f`, "relu" or None.

    Returns:
        ``[..., out]`` in the input's dtype, contiguous.

    Raises:
        ValueError: if a shape or an option breaks a rule above.
        TypeError: if a dtype or device does.
        RuntimeError: if input or bias wants a gradient in grad mode.

    Gradients:
        None: call it under ``torch.no_grad()`` or ``torch.inference_mode()``.

    Cost:
        A multiplication for each stored value and row, in float32. One row, up to r + 1 of them for blocks of r = 2, 4
        or 8 rows, and any number for blocks of 16 are read as they lie; more go through panels of 16 or 32, a pass over
        inputs and outputs each. Where the processor multiplies bfloat16 itself (AMX, AVX-512-BF16, BFDOT), it does so
        for an input of bfloat16 and blocks of 9 to 16 rows and an even number of columns whose values bfloat16 holds;
        sums are float32 all the same. So do a CUDA device's tensor cores for an input of float16 or bfloat16 and blocks
        of 9 rows and more; in one launch, and as input and output lie, where inputs are a multiple of 16 and at most
        65536, and blocks have 16 or 32 columns, or a multiple of 16 that divides the inputs. A weight made of a tensor
        of the input's dtype has such values, one of float32 mostly not. Three microseconds for the call; threads share
        work above about 10 us. Packing takes a pass over the weight, for each dtype of the input.

    Determinism:
        Bitwise reproducible on one device and build, for any number of threads.

    Example:
        >>> weight = SparseWeight(torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0]]))
        >>> sparse_linear(torch.tensor([[1.0, torch.inf, 3.0]]), weight, torch.tensor([0.5, -1.0]), activation="relu")
        tensor([[7.5000, 0.0000]])
    """
    op = "sparse_linear"
    relu, tiles = relu_of(op, activation), tiles_of(op, input, weight, 2, 1)
    if torch.compiler.is_compiling():
        return torch.ops.pykd.sparse_linear(input, tiles.packed, tiles.head, bias, relu)
    try:
        return _C.sparse_linear(input, tiles.packed, tiles.host, bias, relu)
    except TypeError as error:
        explain(op, error, bias)
