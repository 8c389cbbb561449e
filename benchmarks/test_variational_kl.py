"""variational_kl against what a user would write: the formula with autograd, its gradients by hand, and both compiled.

All implementations return the value and both gradients; those by hand write them into given buffers.

Floor, a float32 weight: 8 bytes read and 8 written, two logarithms, two exponentials and three divisions: some 90
instructions for 8 values with AVX2, of which 40 multiply.
"""

from collections.abc import Callable

import pytest
import torch
from alternating import (
    FLOATS,
    LARGE_NAMES,
    MIDDLE_NAMES,
    Call,
    bytes_of,
    compiled,
    in_turns,
    measure_case,
    measure_on_gpu,
    prepared,
    runs_on_gpu,
)
from torch import Tensor
from torch.nn import functional as F

from pykd.ops import variational_kl, variational_kl_and_grad

K1, K2, K3 = 0.63576, 1.87320, 1.48695
SHAPES = [(100, 300), (300, 784), (1024, 1024)]  # LeNet-300-100's layers, and a larger one
GPU_CASES = [((1024, 1024), "", torch.float32, MIDDLE_NAMES)]
GPU_CASES += [((10_000, 10_000), "", dtype, LARGE_NAMES[dtype]) for dtype in FLOATS]  # well past the caches


class Layer:
    """One layer's weights and buffers, with log alpha on both sides of 0."""

    def __init__(self, rows: int, columns: int, device: str, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(rows + columns)
        theta, log_sigma2 = (torch.randn(rows, columns, generator=generator, device=device).to(dtype) for _ in range(2))
        self.weights = theta * 0.1, log_sigma2 * 3 - 4
        self.leaves = [weight.clone().requires_grad_() for weight in self.weights]
        self.grads = torch.empty_like(theta), torch.empty_like(theta)


def plain(theta: Tensor, log_sigma2: Tensor) -> Tensor:
    """The formula, as one writes it first."""
    log_alpha = log_sigma2 - torch.log(theta.square() + 1e-8)
    return (K1 - K1 * torch.sigmoid(K2 + K3 * log_alpha) + 0.5 * F.softplus(-log_alpha)).sum()


def by_hand(theta: Tensor, log_sigma2: Tensor, grad_theta: Tensor, grad_log_sigma2: Tensor) -> Tensor:
    """Without autograd, for the compiler to fuse."""
    log_alpha = log_sigma2 - torch.log(theta.square() + 1e-8)
    s = torch.sigmoid(K2 + K3 * log_alpha)
    grad = -K1 * K3 * s * (1 - s) - 0.5 * torch.sigmoid(-log_alpha)
    grad_log_sigma2.copy_(grad)
    grad_theta.copy_(-2 * theta / (theta.square() + 1e-8) * grad)
    return (K1 - K1 * s + 0.5 * F.softplus(-log_alpha)).sum()


def implementations(case: Layer, _: str) -> dict[str, Callable[[], Call]]:
    def autograd(function: Callable) -> Call:
        return lambda: torch.autograd.grad(function(*case.leaves), case.leaves)

    def hand(function: Callable) -> Call:
        return lambda: function(*case.weights, *case.grads)

    def copy() -> Call:
        return lambda: [to.copy_(weight) for to, weight in zip(case.grads, case.weights, strict=True)]

    return {
        "pykd": lambda: lambda: variational_kl_and_grad(*case.weights, out=case.grads),
        "pykd autograd": lambda: autograd(variational_kl),
        "by hand": lambda: hand(by_hand),
        "by hand, compiled": lambda: hand(compiled(by_hand, False)),
        "plain": lambda: autograd(plain),
        "plain, compiled": lambda: autograd(compiled(plain, False)),
        "copy": copy,
    }


NAMES = list(implementations(Layer(1, 1, "cpu", torch.float32), ""))


@pytest.mark.parametrize("block, name", in_turns(NAMES, 3))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_variational_kl(benchmark, shape, threads, name, block):
    torch.set_num_threads(threads)
    call = prepared(implementations, shape, "cpu", torch.float32, threads, "", name, Layer)
    iterations = max(1, 300_000 // (shape[0] * shape[1]))
    measure_case(benchmark, call, "variational_kl", f"[{shape[0]}, {shape[1]}]", threads, name, block, 7, iterations)


@pytest.mark.gpu
@pytest.mark.parametrize("shape, variant, dtype, name, block", runs_on_gpu(GPU_CASES))
def test_variational_kl_on_gpu(benchmark, shape, variant, dtype, name, block):
    call, moved = prepared(implementations, shape, "cuda", dtype, 1, variant, name, Layer), bytes_of(shape, dtype, 4)
    measure_on_gpu(benchmark, call, "variational_kl", shape, "", dtype, name, block, bytes=moved)
