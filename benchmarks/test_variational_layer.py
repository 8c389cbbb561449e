"""variational_linear and variational_conv2d, each with variational_kl, against what a user would write, and compiled.

A training step: forward, backward, the divergence, and the gradients of all four tensors.

Floor: six matrix products or convolutions, two of them forward, on tensors that are there. The rest is an exponential
a weight, the divergence, and a root and a normal value an output value.
"""

from collections.abc import Callable

import pytest
import torch
from alternating import FLOATS, Call, compiled, in_turns, measure_case, measure_on_gpu, prepared, runs_on_gpu
from test_variational_kl import plain as plain_kl
from torch import Tensor
from torch.nn import functional as F

from pykd.ops import variational_conv2d, variational_kl_and_grad, variational_linear

OP = "variational_layer and variational_kl"
SCALE = 1e-5  # of the divergence: one over the training samples
# batch, in, out; batch, in, out, height and width, with kernels of 3x3
CASES = [(64, 300, 100), (64, 784, 300), (256, 784, 300), (64, 1024, 1024), (256, 1024, 1024)]
CASES += [(16, 64, 64, 32), (16, 512, 512, 4)]
GPU_NAMES = ["pykd", "plain", "plain, compiled", "six products"]
GPU_CASES = [((256, 1024, 1024), "", torch.float32, GPU_NAMES), ((128, 64, 64, 32), "", torch.float32, GPU_NAMES)]
GPU_CASES += [((4096, 4096, 4096), "", dtype, GPU_NAMES) for dtype in FLOATS]


class Step:
    """One layer's tensors."""

    def __init__(self, batch: int, inputs: int, outputs: int, *rest: object) -> None:
        *sides, device, dtype = rest
        self.convolution = bool(sides)
        size, kernel = sides * 2, [3, 3] if sides else []
        generator = torch.Generator(device).manual_seed(batch + inputs)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(dtype)

        x, theta, log_sigma2 = normal(batch, inputs, *size), normal(outputs, inputs, *kernel), normal(1)
        self.tensors = x, theta * 0.05, log_sigma2 * torch.ones_like(theta) - 8, normal(outputs)
        self.leaves = [tensor.clone().requires_grad_() for tensor in self.tensors]
        self.grad = normal(batch, outputs, *size)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1) if x.dim() == 4 else F.linear(x, weight, bias)


def plain(x: Tensor, theta: Tensor, log_sigma2: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The formula, as one writes it first."""
    mean = product(x, theta, bias)
    deviation = (product(x.square(), log_sigma2.exp(), None) + 1e-8).sqrt()
    return mean + deviation * torch.randn_like(mean), SCALE * plain_kl(theta, log_sigma2)


def implementations(case: Step, _: str) -> dict[str, Callable[[], Call]]:
    x, theta, log_sigma2, bias = case.leaves

    def pykd() -> tuple[Tensor, ...]:
        layer = (lambda *t: variational_conv2d(*t, padding=1)) if case.convolution else variational_linear
        grads = torch.autograd.grad(layer(x, theta, log_sigma2, bias), case.leaves, case.grad)
        weights = theta.detach(), log_sigma2.detach()
        variational_kl_and_grad(*weights, scale=SCALE, out=(grads[1], grads[2]), accumulate=True)
        return grads

    def peer(function: Callable) -> Call:
        one = torch.ones((), device=x.device, dtype=x.dtype)
        return lambda: torch.autograd.grad(function(*case.leaves), case.leaves, (case.grad, one))

    def six_products() -> Call:
        x, theta, sigma2, _ = case.tensors
        if case.convolution:
            shape = ([theta.shape[0]], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False])

            def convolutions() -> None:
                for weight in (theta, sigma2):
                    F.conv2d(x, weight, padding=1)
                    torch.ops.aten.convolution_backward(case.grad, x, weight, *shape)

            return convolutions
        out, of_x, of_w = torch.empty_like(case.grad), torch.empty_like(x), torch.empty_like(theta)

        def products() -> None:
            for weight in (theta, sigma2):
                torch.mm(x, weight.t(), out=out)
                torch.mm(case.grad, weight, out=of_x)
                torch.mm(case.grad.t(), x, out=of_w)

        return products

    return {
        "pykd": lambda: pykd,
        "plain": lambda: peer(plain),
        "plain, compiled": lambda: peer(compiled(plain, False)),
        "plain, compiled, fallback_random": lambda: peer(compiled(plain, True)),
        "six products": six_products,
    }


NAMES = list(implementations(Step(1, 1, 1, "cpu", torch.float32), ""))


@pytest.mark.parametrize("block, name", in_turns(NAMES, 3))
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_variational_layer(benchmark, shape, name, block):
    torch.set_num_threads(1)
    call = prepared(implementations, shape, "cpu", torch.float32, 1, "", name, Step)
    batch, inputs, outputs, *side = shape
    case = f"{inputs} -> {outputs}, batch {batch}" + (f", 3x3 at {side[0]}x{side[0]}" if side else "")
    work = batch * inputs * outputs * (9 * side[0] ** 2 if side else 1)
    rounds, iterations = (2, 1) if side else (7, max(1, 20_000_000 // work))
    measure_case(benchmark, call, OP, case, 1, name, block, rounds, iterations)


@pytest.mark.gpu
@pytest.mark.parametrize("shape, variant, dtype, name, block", runs_on_gpu(GPU_CASES))
def test_variational_layer_on_gpu(benchmark, shape, variant, dtype, name, block):
    call = prepared(implementations, shape, "cuda", dtype, 1, variant, name, Step)
    suffix = " (batch, in, out)" if len(shape) == 3 else " (batch, in, out, side; 3x3)"
    measure_on_gpu(benchmark, call, OP, shape, suffix, dtype, name, block)
