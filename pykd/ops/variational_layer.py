"""Layers whose weights are normal variables, by local reparameterisation."""

import torch
from torch import Generator, Tensor

from pykd import _C
from pykd.ops._noise import traced_seed


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


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
    tensors = (input, theta, log_sigma2, bias)
    if torch.compiler.is_compiling():
        seed = traced_seed("variational_linear", input, 1.0, 1.0, seed, generator)
        return torch.ops.pykd.variational_linear(*tensors, seed, row_offset)[0]
    return _C.variational_linear(*tensors, seed, generator, row_offset)


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
    tensors = (input, theta, log_sigma2, bias, _pair(stride), _pair(padding), _pair(dilation), groups)
    if torch.compiler.is_compiling():
        seed = traced_seed("variational_conv2d", input, 1.0, 1.0, seed, generator)
        return torch.ops.pykd.variational_conv2d(*tensors, seed, row_offset)[0]
    return _C.variational_conv2d(*tensors, seed, generator, row_offset)
